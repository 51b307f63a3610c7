package bundle

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
)

// A site and its content, small and the same in every run.

type memory map[digest.Digest][]byte

func (m memory) put(by digest.Algorithm, data string) (digest.Digest, int64) {
	d := by.FromString(data)
	m[d] = []byte(data)
	return d, int64(len(data))
}

func (m memory) Size(_ context.Context, d digest.Digest) (int64, error) {
	data, ok := m[d]
	if !ok {
		return 0, fmt.Errorf("blob %s: %w", d, fs.ErrNotExist)
	}
	return int64(len(data)), nil
}

func (m memory) Open(_ context.Context, d digest.Digest) (io.ReadCloser, error) {
	data, ok := m[d]
	if !ok {
		return nil, fmt.Errorf("blob %s: %w", d, fs.ErrNotExist)
	}
	return io.NopCloser(bytes.NewReader(data)), nil
}

func seeded(seed byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize))
}

type site struct {
	t            testing.TB
	origin       Origin
	root, online ed25519.PrivateKey
	chain        entry.KeyChain
	content      memory
	by           digest.Algorithm // of what is put next
}

func newSite(t testing.TB, id string, seed byte) *site {
	s := &site{t: t, origin: Origin{Site: id, Incarnation: "inc1", Name: "Site " + id}, root: seeded(seed), online: seeded(seed + 1), content: memory{}, by: digest.SHA256}
	document := entry.KeyDocument{Site: id, Serial: 1, Issued: 1_700_000_000, Threshold: 1, Root: []entry.Key{s.key(s.root)}, Online: []entry.OnlineKey{{Key: s.key(s.online), State: entry.KeyActive}}}
	signed, err := document.Sign(s.root)
	if err != nil {
		t.Fatal(err)
	}
	s.chain = s.chain.Add(signed)
	return s
}

func (s *site) key(k ed25519.PrivateKey) entry.Key {
	s.t.Helper()
	key, err := entry.KeyOf(k)
	if err != nil {
		s.t.Fatal(err)
	}
	return key
}

func (s *site) trusted(id string) (entry.Key, bool) { return s.key(s.root), id == s.origin.Site }

const (
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar"
)

type object map[string]any

func (s *site) json(v any) (digest.Digest, int64) {
	s.t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		s.t.Fatal(err)
	}
	return s.content.put(s.by, string(data))
}

func desc(mediaType string, d digest.Digest, size int64) object {
	return object{"mediaType": mediaType, "digest": d, "size": size}
}

// image stores an image manifest of one layer and gives its artifact entry.
func (s *site) image(repository, layer string, more object) entry.Entry {
	l, lsize := s.content.put(s.by, layer)
	c, csize := s.json(object{"architecture": "amd64", "os": "linux", "rootfs": object{"type": "layers", "diff_ids": []digest.Digest{l}}, "config": object{}})
	m := object{"schemaVersion": 2, "mediaType": typeManifest, "config": desc(typeConfig, c, csize), "layers": []object{desc(typeLayer, l, lsize)}}
	for k, v := range more {
		m[k] = v
	}
	d, size := s.json(m)
	return entry.Entry{Kind: entry.ArtifactPut, At: 1_700_000_100, Actor: "admin", Repository: repository, Digest: d, MediaType: typeManifest, Size: size, PushedAt: 1_700_000_100}
}

func (s *site) multi(repository string, children ...entry.Entry) entry.Entry {
	manifests := []object{}
	for _, c := range children {
		manifests = append(manifests, desc(c.MediaType, c.Digest, c.Size))
	}
	d, size := s.json(object{"schemaVersion": 2, "mediaType": typeIndex, "manifests": manifests})
	return entry.Entry{Kind: entry.ArtifactPut, At: 1_700_000_101, Repository: repository, Digest: d, MediaType: typeIndex, Size: size, PushedAt: 1_700_000_101}
}

func tag(e entry.Entry, name string) entry.Entry {
	return entry.Entry{Kind: entry.TagPut, At: 1_700_000_102, Repository: e.Repository, Tag: name, Digest: e.Digest, PushedAt: 1_700_000_102}
}

// project is the project that most tests carry.
func (s *site) project() []entry.Entry {
	a, b := s.image("app", "layer of amd64", nil), s.image("app", "layer of arm64", nil)
	multi := s.multi("app", a, b)
	sbom := s.image("app", "the bill of materials", object{"artifactType": "application/spdx+json", "subject": desc(multi.MediaType, multi.Digest, multi.Size)})
	sbom.ArtifactType, sbom.Subject = "application/spdx+json", multi.Digest
	web := s.image("tools/web", "layer of web", nil)
	gone := s.image("app", "deleted again", nil)
	return []entry.Entry{
		{Kind: entry.ProjectPut, At: 1_700_000_000, Actor: "admin", Name: "lib", Public: true, Metadata: map[string]string{"owner": "ops"}},
		a, b, multi, tag(multi, "v1"), tag(multi, "latest"), sbom, web, tag(web, "1.0"),
		gone, tag(gone, "tmp"),
		{Kind: entry.TagDelete, At: 1_700_000_103, Repository: "app", Tag: "tmp"},
		{Kind: entry.ArtifactDelete, At: 1_700_000_104, Repository: "app", Digest: gone.Digest},
	}
}

// mixed is a project whose content is addressed by both algorithms: images of
// either, and an index of either over both.
func (s *site) mixed() []entry.Entry {
	entries := []entry.Entry{{Kind: entry.ProjectPut, At: 1_700_000_000, Actor: "admin", Name: "mixed"}}
	var images []entry.Entry
	for _, s.by = range entry.Algorithms() {
		images = append(images, s.image("app", "the same layer", nil))
	}
	entries = append(entries, images...)
	for _, s.by = range entry.Algorithms() {
		both := s.multi("app", images...)
		sbom := s.image("app", "the bill of materials", object{"artifactType": "application/spdx+json", "subject": desc(both.MediaType, both.Digest, both.Size)})
		sbom.ArtifactType, sbom.Subject = "application/spdx+json", both.Digest
		entries = append(entries, both, tag(both, s.by.String()), sbom)
	}
	s.by = digest.SHA256
	return entries
}

// log makes the log of a project from the entry at from on.
func (s *site) log(scope string, entries []entry.Entry, from int) Log {
	s.t.Helper()
	id := entry.LogID{Site: s.origin.Site, Incarnation: s.origin.Incarnation, Scope: scope}
	var values [][]byte
	var state entry.State
	tree, basis := &entry.Tree{}, &entry.Tree{}
	for i, e := range entries {
		value, err := e.Encode()
		if err != nil {
			s.t.Fatal(err)
		}
		if i == from {
			basis = tree.Clone()
		}
		leaf, err := entry.Leaf(id, uint64(i), value)
		if err != nil {
			s.t.Fatal(err)
		}
		tree.Append(leaf)
		if err := state.Apply(e); err != nil {
			s.t.Fatal(err)
		}
		values = append(values, value)
	}
	checkpoint, err := entry.Checkpoint{Log: id, Size: tree.Size(), Root: tree.Root(), At: entries[len(entries)-1].At}.Sign(s.online)
	if err != nil {
		s.t.Fatal(err)
	}
	root, err := state.Root()
	if err != nil {
		s.t.Fatal(err)
	}
	return Log{ID: id, Project: entries[0].Name, Basis: basis, Size: tree.Size(), Checkpoint: checkpoint, State: root, Values: each(values[from:])}
}

func each(values [][]byte) func() iter.Seq2[[]byte, error] {
	return func() iter.Seq2[[]byte, error] {
		return func(yield func([]byte, error) bool) {
			for _, v := range values {
				if !yield(v, nil) {
					return
				}
			}
		}
	}
}

func (s *site) spec(logs ...Log) Spec {
	return Spec{Source: s.origin, Key: s.online, Chains: map[string]entry.KeyChain{s.origin.Site: s.chain}, Logs: logs}
}

func (s *site) write(spec Spec) ([]byte, Written) {
	s.t.Helper()
	var out bytes.Buffer
	written, err := Write(s.t.Context(), &out, spec, s.content)
	if err != nil {
		s.t.Fatal(err)
	}
	return out.Bytes(), written
}

// sample is the bundle that most tests read.
func sample(t testing.TB) (*site, []byte) {
	s := newSite(t, "site-a", 10)
	data, _ := s.write(s.spec(s.log("p1", s.project(), 0)))
	return s, data
}

// readAll reads a bundle to its end and returns what it held.
func readAll(r io.Reader, trusted Trusted) (map[string][]byte, *Reader, error) {
	b, err := Open(r)
	if err != nil {
		return nil, nil, err
	}
	if err := b.Authenticate(trusted); err != nil {
		return nil, b, err
	}
	for {
		scope, err := b.NextLog()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, b, err
		}
		if _, err := scope.Check(scope.Body(), scope.Size); err != nil {
			return nil, b, err
		}
	}
	blobs := map[string][]byte{}
	for {
		blob, err := b.NextBlob()
		if err == io.EOF {
			return blobs, b, nil
		}
		if err != nil {
			return nil, b, err
		}
		data, err := io.ReadAll(blob)
		if err != nil {
			return nil, b, err
		}
		blobs[string(blob.Digest())] = slices.Clone(data)
	}
}
