// Package airgaptest has a site in memory that implements every interface of
// package airgap, for tests of the exchange rules and of what stands on them. A
// budget of writes lets a test kill it at any of them.
package airgaptest

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"maps"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/atoll-registry/atoll/airgap"
	"github.com/atoll-registry/atoll/bundle/entry"
)

// ErrKilled is what every write returns once the budget is used up.
var ErrKilled = errors.New("killed")

// Site is a site in memory. It is used by one goroutine.
type Site struct {
	t           testing.TB
	ID          string
	Incarnation string
	RootKey     ed25519.PrivateKey
	Online      ed25519.PrivateKey
	Chains      map[string]entry.KeyChain
	Trusts      []airgap.Trust
	Algorithm   digest.Algorithm // by which what is pushed next is named

	logs    map[entry.LogID]*log
	blobs   map[digest.Digest][]byte
	staging map[string]map[digest.Digest][]byte

	Space  int64 // what Free answers
	Budget int   // writes until it is killed; negative: never
	Puts   int   // blobs and notes written into staging
}

type log struct {
	Project    string
	Values     [][]byte
	Checkpoint []byte
	State      entry.State `json:"-"`
	Manifests  map[digest.Digest][]byte
	tampered   bool
}

// New makes a site whose keys follow from the seed.
func New(t testing.TB, id string, seed byte) *Site {
	key := func(seed byte) ed25519.PrivateKey {
		return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize))
	}
	s := &Site{
		t: t, ID: id, Incarnation: "inc1", RootKey: key(seed), Online: key(seed + 1), Chains: map[string]entry.KeyChain{},
		logs: map[entry.LogID]*log{}, blobs: map[digest.Digest][]byte{}, staging: map[string]map[digest.Digest][]byte{},
		Algorithm: digest.SHA256, Space: 1 << 40, Budget: -1,
	}
	s.Certify(entry.OnlineKey{Key: s.key(s.Online), State: entry.KeyActive})
	return s
}

// Certify adds a key document with the online keys.
func (s *Site) Certify(online ...entry.OnlineKey) {
	s.t.Helper()
	document := entry.KeyDocument{
		Site: s.ID, Serial: uint64(bytes.Count(s.Chains[s.ID], []byte("\n"))) + 1, Threshold: 1,
		Root: []entry.Key{s.key(s.RootKey)}, Online: online,
	}
	signed, err := document.Sign(s.RootKey)
	s.must(err)
	s.Chains[s.ID] = s.Chains[s.ID].Add(signed)
}

func (s *Site) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *Site) key(private ed25519.PrivateKey) entry.Key {
	s.t.Helper()
	key, err := entry.KeyOf(private)
	s.must(err)
	return key
}

// Public is the site's identity document.
func (s *Site) Public() airgap.Site {
	root := s.key(s.RootKey)
	return airgap.Site{ID: s.ID, Incarnation: s.Incarnation, Name: "Site " + s.ID, RootKey: root, Fingerprint: root.Fingerprint()}
}

// Trust makes the site accept another's projects.
func (s *Site) Trust(other *Site, accept ...string) {
	s.Trusts = append(s.Trusts, airgap.Trust{Site: other.Public(), Accept: accept})
}

// LogID is the log of a project of this site's own.
func (s *Site) LogID(project string) entry.LogID {
	return entry.LogID{Site: s.ID, Incarnation: s.Incarnation, Scope: "p-" + project}
}

// Write appends entries to the log of an own project, which the first call makes.
func (s *Site) Write(project string, entries ...entry.Entry) {
	s.t.Helper()
	id := s.LogID(project)
	if s.logs[id] == nil {
		s.logs[id] = &log{Project: project, Manifests: map[digest.Digest][]byte{}}
		entries = append([]entry.Entry{{Kind: entry.ProjectPut, At: 1000, Actor: "admin", Name: project}}, entries...)
	}
	l := s.logs[id]
	for _, e := range entries {
		value, err := e.Encode()
		s.must(err)
		l.Values = append(l.Values, value)
		s.must(l.State.Apply(e))
	}
	last, err := entry.Decode(l.Values[len(l.Values)-1])
	s.must(err)
	tree := s.tree(id, len(l.Values))
	l.Checkpoint, err = entry.Checkpoint{Log: id, Size: tree.Size(), Root: tree.Root(), At: last.At}.Sign(s.Online)
	s.must(err)
}

func (s *Site) tree(id entry.LogID, size int) *entry.Tree {
	tree := &entry.Tree{}
	for seq, value := range s.logs[id].Values[:size] {
		leaf, err := entry.Leaf(id, uint64(seq), value)
		s.must(err)
		tree.Append(leaf)
	}
	return tree
}

// Blob stores a blob.
func (s *Site) Blob(content string) (digest.Digest, int) {
	d := s.Algorithm.FromString(content)
	s.blobs[d] = []byte(content)
	return d, len(content)
}

// Media types that the site pushes.
const (
	TypeManifest = "application/vnd.oci.image.manifest.v1+json"
	TypeIndex    = "application/vnd.oci.image.index.v1+json"
)

type object map[string]any

// Image pushes an image of the layers and tags it, unless tag is "".
func (s *Site) Image(project, repository, tag string, layers ...string) digest.Digest {
	s.t.Helper()
	var named []object
	var ids []digest.Digest
	for _, layer := range layers {
		d, size := s.Blob(layer)
		named = append(named, object{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": d, "size": size})
		ids = append(ids, d)
	}
	config, err := json.Marshal(object{"architecture": "amd64", "os": "linux", "config": object{}, "rootfs": object{"type": "layers", "diff_ids": ids}})
	s.must(err)
	d, size := s.Blob(string(config))
	return s.Manifest(project, repository, tag, TypeManifest, object{
		"schemaVersion": 2, "mediaType": TypeManifest, "layers": named,
		"config": object{"mediaType": "application/vnd.oci.image.config.v1+json", "digest": d, "size": size},
	})
}

// Manifest pushes any manifest.
func (s *Site) Manifest(project, repository, tag, mediaType string, manifest any) digest.Digest {
	s.t.Helper()
	data, err := json.Marshal(manifest)
	s.must(err)
	d := s.Algorithm.FromBytes(data)
	s.Write(project, entry.Entry{Kind: entry.ArtifactPut, At: 1001, Actor: "admin", Repository: repository, Digest: d, MediaType: mediaType, Size: int64(len(data)), PushedAt: 1001})
	s.logs[s.LogID(project)].Manifests[d] = data
	if tag != "" {
		s.Write(project, entry.Entry{Kind: entry.TagPut, At: 1002, Actor: "admin", Repository: repository, Tag: tag, Digest: d, PushedAt: 1002})
	}
	return d
}

// Index pushes an index of images that were pushed before.
func (s *Site) Index(project, repository, tag string, children ...digest.Digest) digest.Digest {
	s.t.Helper()
	var named []object
	for _, d := range children {
		named = append(named, object{"mediaType": TypeManifest, "digest": d, "size": len(s.logs[s.LogID(project)].Manifests[d])})
	}
	return s.Manifest(project, repository, tag, TypeIndex, object{"schemaVersion": 2, "mediaType": TypeIndex, "manifests": named})
}

// Visible is everything that a client of the site could see, as one text.
func (s *Site) Visible() string {
	projects := map[string]*log{}
	for id, l := range s.logs {
		projects[id.String()] = l
	}
	chains := map[string]string{}
	for site, chain := range s.Chains {
		chains[site] = string(chain)
	}
	data, err := json.Marshal([]any{projects, s.blobs, chains})
	s.must(err)
	return string(data)
}

// Holds reports whether the artifact and all that it names are here.
func (s *Site) Holds(project string, d digest.Digest) bool {
	for _, l := range s.logs {
		manifest, ok := l.Manifests[d]
		if l.Project != project || !ok {
			continue
		}
		var m struct {
			Config            struct{ Digest digest.Digest }
			Layers, Manifests []struct{ Digest digest.Digest }
		}
		s.must(json.Unmarshal(manifest, &m))
		for _, child := range m.Manifests {
			ok = ok && s.Holds(project, child.Digest)
		}
		for _, layer := range m.Layers {
			ok = ok && s.blobs[layer.Digest] != nil
		}
		return ok && (m.Config.Digest == "" || s.blobs[m.Config.Digest] != nil)
	}
	return false
}

// Lose drops a blob, as a rotten disk does.
func (s *Site) Lose(d digest.Digest) { delete(s.blobs, d) }

// Tamper makes the site's state of a log differ from its entries.
func (s *Site) Tamper(id entry.LogID) { s.logs[id].tampered = true }

// Rewrite replaces an entry of a log and signs the result: two histories.
func (s *Site) Rewrite(project string, seq int, e entry.Entry) {
	s.t.Helper()
	l := s.logs[s.LogID(project)]
	value, err := e.Encode()
	s.must(err)
	l.Values = slices.Clone(l.Values)
	l.Values[seq] = value
	l.State = entry.State{}
	for _, value := range l.Values {
		e, err := entry.Decode(value)
		s.must(err)
		s.must(l.State.Apply(e))
	}
	tree := s.tree(s.LogID(project), len(l.Values))
	last, err := entry.Decode(l.Values[len(l.Values)-1])
	s.must(err)
	l.Checkpoint, err = entry.Checkpoint{Log: s.LogID(project), Size: tree.Size(), Root: tree.Root(), At: last.At}.Sign(s.Online)
	s.must(err)
}

// Rename gives a project another name here.
func (s *Site) Rename(id entry.LogID, name string) { s.logs[id].Project = name }

// Staged counts what lies in staging areas.
func (s *Site) Staged() int {
	n := 0
	for _, area := range s.staging {
		n += len(area)
	}
	return n
}

func (s *Site) spend() error {
	if s.Budget == 0 {
		return ErrKilled
	}
	s.Budget--
	return nil
}

// Export writes a bundle of the projects.
func (s *Site) Export(w io.Writer, change func(*airgap.ExportRequest)) (airgap.Report, error) {
	request := airgap.ExportRequest{Site: s.Public(), Key: s.Online}
	if change != nil {
		change(&request)
	}
	return airgap.Export(s.t.Context(), w, request, airgap.Source{Journal: s, Content: s})
}

// Import reads a bundle.
func (s *Site) Import(r io.Reader, change func(*airgap.ImportOptions)) (airgap.Report, error) {
	options := airgap.ImportOptions{Self: s.Public(), Trust: s.Trusts}
	if change != nil {
		change(&options)
	}
	return airgap.Import(s.t.Context(), r, options, airgap.Target{Catalog: s, Blobs: s})
}

// Logs implements airgap.Journal.
func (s *Site) Logs(_ context.Context, projects []string) ([]airgap.Log, error) {
	var out []airgap.Log
	for id, l := range s.logs {
		if len(projects) > 0 && !slices.Contains(projects, l.Project) {
			continue
		}
		state, err := s.StateRoot(s.t.Context(), id)
		if err != nil {
			return nil, err
		}
		out = append(out, airgap.Log{ID: id, Project: l.Project, Size: uint64(len(l.Values)), Checkpoint: l.Checkpoint, State: state})
	}
	for _, name := range projects {
		if !slices.ContainsFunc(out, func(l airgap.Log) bool { return l.Project == name }) {
			return nil, fmt.Errorf("project %s: %w", name, airgap.ErrNoProject)
		}
	}
	return out, nil
}

// Entries implements airgap.Journal.
func (s *Site) Entries(_ context.Context, id entry.LogID, from, to uint64) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for _, value := range s.logs[id].Values[from:to] {
			if !yield(value, nil) {
				return
			}
		}
	}
}

// KeyChain implements airgap.Journal.
func (s *Site) KeyChain(_ context.Context, site string) (entry.KeyChain, error) {
	return s.Chains[site], nil
}

func (s *Site) content(d digest.Digest) ([]byte, error) {
	if data, ok := s.blobs[d]; ok {
		return data, nil
	}
	for _, l := range s.logs {
		if data, ok := l.Manifests[d]; ok {
			return data, nil
		}
	}
	return nil, fmt.Errorf("blob %s: %w", d, fs.ErrNotExist)
}

// Size implements airgap.Content.
func (s *Site) Size(_ context.Context, d digest.Digest) (int64, error) {
	data, err := s.content(d)
	return int64(len(data)), err
}

// Open implements airgap.Content.
func (s *Site) Open(_ context.Context, d digest.Digest) (io.ReadCloser, error) {
	data, err := s.content(d)
	return io.NopCloser(bytes.NewReader(data)), err
}

// Scope implements airgap.Catalog.
func (s *Site) Scope(_ context.Context, id entry.LogID) (airgap.Scope, bool, error) {
	l, ok := s.logs[id]
	if !ok {
		return airgap.Scope{}, false, nil
	}
	return airgap.Scope{Log: id, Project: l.Project, Applied: uint64(len(l.Values))}, true, nil
}

// Holder implements airgap.Catalog.
func (s *Site) Holder(_ context.Context, project string) (entry.LogID, bool, error) {
	for id, l := range s.logs {
		if l.Project == project {
			return id, true, nil
		}
	}
	return entry.LogID{}, false, nil
}

// Root implements airgap.Catalog.
func (s *Site) Root(_ context.Context, id entry.LogID, size uint64) (tlog.Hash, error) {
	return s.tree(id, int(size)).Root(), nil
}

// Apply implements airgap.Catalog. It is killed between two records.
func (s *Site) Apply(_ context.Context, scope airgap.Scope, records []airgap.Record) error {
	for _, record := range records {
		if err := s.spend(); err != nil {
			return err
		}
		l := s.logs[scope.Log]
		if l == nil {
			l = &log{Project: scope.Project, Manifests: map[digest.Digest][]byte{}}
			s.logs[scope.Log] = l
		}
		if record.Seq < uint64(len(l.Values)) {
			continue
		}
		if record.Seq > uint64(len(l.Values)) {
			return fmt.Errorf("entry %d applied after %d entries", record.Seq, len(l.Values))
		}
		e, err := entry.Decode(record.Value)
		if err != nil {
			return err
		}
		if err := l.State.Apply(e); err != nil {
			return err
		}
		l.Values = append(l.Values, record.Value)
		if record.Manifest != nil {
			l.Manifests[e.Digest] = record.Manifest
		}
	}
	return nil
}

// StateRoot implements airgap.Catalog.
func (s *Site) StateRoot(_ context.Context, id entry.LogID) ([32]byte, error) {
	l := s.logs[id]
	root, err := l.State.Root()
	if l.tampered {
		root[0] ^= 1
	}
	return root, err
}

// Finish implements airgap.Catalog.
func (s *Site) Finish(_ context.Context, finish airgap.Finish) error {
	if err := s.spend(); err != nil {
		return err
	}
	s.logs[finish.Log].Checkpoint = finish.Checkpoint
	s.Chains[finish.Log.Site] = finish.KeyChain
	for i := range s.Trusts {
		if s.Trusts[i].Site.ID == finish.Log.Site {
			s.Trusts[i].Serial = max(s.Trusts[i].Serial, finish.Serial)
		}
	}
	return nil
}

// Has implements airgap.Blobs.
func (s *Site) Has(_ context.Context, d digest.Digest) (bool, error) {
	_, ok := s.blobs[d]
	return ok, nil
}

// Free implements airgap.Blobs.
func (s *Site) Free(context.Context) (int64, error) { return s.Space, nil }

// Stage implements airgap.Blobs.
func (s *Site) Stage(_ context.Context, name string) (airgap.Staging, error) {
	if s.staging[name] == nil {
		s.staging[name] = map[digest.Digest][]byte{}
	}
	return &area{site: s, name: name}, nil
}

type area struct {
	site *Site
	name string
}

func (a *area) Has(_ context.Context, d digest.Digest) (bool, error) {
	_, ok := a.site.staging[a.name][d]
	return ok, nil
}

func (a *area) Put(_ context.Context, blob airgap.Blob, r io.Reader) error {
	data, err := io.ReadAll(r)
	if err != nil {
		return fmt.Errorf("stage %s: %w", blob.Digest, err)
	}
	if err := a.site.spend(); err != nil {
		return err
	}
	if blob.Digest.Algorithm().FromBytes(data) != blob.Digest || int64(len(data)) != blob.Size {
		return fmt.Errorf("stage %s: another content", blob.Digest)
	}
	a.site.Puts++
	a.site.staging[a.name][blob.Digest] = data
	return nil
}

func (a *area) Open(_ context.Context, d digest.Digest) (io.ReadCloser, error) {
	data, ok := a.site.staging[a.name][d]
	if !ok {
		return nil, fmt.Errorf("staged %s: %w", d, fs.ErrNotExist)
	}
	return io.NopCloser(bytes.NewReader(data)), nil
}

func (a *area) Commit(context.Context) error {
	if err := a.site.spend(); err != nil {
		return err
	}
	maps.Copy(a.site.blobs, a.site.staging[a.name])
	return nil
}

func (a *area) Discard(context.Context) error {
	if err := a.site.spend(); err != nil {
		return err
	}
	delete(a.site.staging, a.name)
	return nil
}
