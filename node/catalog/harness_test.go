package catalog_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/journal"
	"github.com/atoll-registry/atoll/node/project"
)

// plainSealer binds the name and hides nothing.
type plainSealer struct{}

func (plainSealer) Seal(name string, plain []byte) ([]byte, error) {
	return append([]byte(name+"\x00"), plain...), nil
}

func (plainSealer) Unseal(name string, sealed []byte) ([]byte, error) {
	plain, ok := bytes.CutPrefix(sealed, []byte(name+"\x00"))
	if !ok {
		return nil, fmt.Errorf("sealed under another name than %s", name)
	}
	return plain, nil
}

// memoryBig keeps large manifests in a map.
type memoryBig struct {
	mu   sync.Mutex
	held map[digest.Digest][]byte
}

func (b *memoryBig) Put(_ context.Context, d digest.Digest, body []byte) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held[d] = bytes.Clone(body)
	return nil
}

func (b *memoryBig) Read(_ context.Context, d digest.Digest) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if body, ok := b.held[d]; ok {
		return body, nil
	}
	return nil, fault.New(fault.NotFound, "nobody holds %s", d)
}

// site is one node's worth of rooms over tables in memory.
type site struct {
	t        *testing.T
	db       *table.DB
	records  *blobs.Records
	journal  *journal.Journal
	projects *project.Projects
	catalog  *catalog.Catalog
	big      *memoryBig
	backend  *tabletest.Backend
}

func newSite(t *testing.T, id string, gates ...catalog.Gate) *site {
	t.Helper()
	db := tabletest.Open(t)
	s := &site{t: t, db: db, records: blobs.NewRecords(db), journal: journal.New(db, plainSealer{}), big: &memoryBig{held: map[digest.Digest][]byte{}}}
	s.projects = project.New(db, s.journal)
	var err error
	s.catalog, err = catalog.New(catalog.Config{
		DB: db, Records: s.records, Journal: s.journal, Projects: s.projects, Big: s.big, Gates: gates,
	})
	must(t, err)
	s.projects.Attach(s.catalog)
	s.backend = tabletest.Start(t, db)
	_, err = s.journal.EnsureSite(t.Context(), id, id)
	must(t, err)
	must(t, s.projects.EnsureLibrary(t.Context(), "admin"))
	return s
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantKind(t *testing.T, err error, kind fault.Kind, code string) {
	t.Helper()
	if !fault.Is(err, kind) {
		t.Fatalf("error is %v (%s), want %s", err, fault.KindOf(err), kind)
	}
	if got, _, _ := fault.Public(err); code != "" && got != code {
		t.Fatalf("error %v has code %q, want %q", err, got, code)
	}
}

// blob makes content live and linked, as an upload does.
func (s *site) blob(repository, content string) v1.Descriptor {
	s.t.Helper()
	d := v1.Descriptor{MediaType: v1.MediaTypeImageLayerGzip, Digest: digest.FromString(content), Size: int64(len(content))}
	must(s.t, s.records.Add(s.t.Context(), "library", repository, blobs.Info{Digest: d.Digest, Size: d.Size}))
	return d
}

// live makes content live without a link, as an import's staging does.
func (s *site) live(d v1.Descriptor) {
	s.t.Helper()
	_, err := s.db.Update(s.t.Context(), func(tx *table.Tx) error { return s.records.Live(tx, d.Digest, d.Size) })
	must(s.t, err)
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	out, err := json.Marshal(v)
	must(t, err)
	return out
}

type option func(*v1.Manifest)

func subject(d v1.Descriptor) option { return func(m *v1.Manifest) { m.Subject = &d } }
func kind(artifactType string) option {
	return func(m *v1.Manifest) { m.ArtifactType = artifactType }
}
func note(value string) option {
	return func(m *v1.Manifest) { m.Annotations = map[string]string{"note": value} }
}

// image pushes the blobs of an image made of a seed, and gives its manifest.
func (s *site) image(repository, seed string, options ...option) []byte {
	s.t.Helper()
	config := s.blob(repository, "config "+seed)
	config.MediaType = v1.MediaTypeImageConfig
	m := v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: config, Layers: []v1.Descriptor{s.blob(repository, "layer "+seed)}}
	m.SchemaVersion = 2
	for _, o := range options {
		o(&m)
	}
	return encode(s.t, m)
}

func (s *site) push(repository, tag string, body []byte) (catalog.Artifact, error) {
	return s.catalog.Put(s.t.Context(), catalog.Push{
		Project: "library", Repository: repository, Tag: tag, Digest: digest.FromBytes(body), Bytes: body,
		Carrier: catalog.Client, Actor: "admin", At: time.Unix(1_700_000_000, 0),
	})
}

func (s *site) mustPush(repository, tag string, body []byte) catalog.Artifact {
	s.t.Helper()
	a, err := s.push(repository, tag, body)
	must(s.t, err)
	return a
}

func describe(a catalog.Artifact) v1.Descriptor {
	return v1.Descriptor{MediaType: a.MediaType, Digest: a.Digest, Size: a.Size}
}

func (s *site) view(read func(v *table.View) error) {
	s.t.Helper()
	must(s.t, s.db.View(read))
}

// log is the library's log with the manifests of its entries.
func (s *site) log() (id entry.LogID, entries []catalog.SeqEntry) {
	s.t.Helper()
	s.view(func(v *table.View) error {
		p, _, err := s.projects.Get(v, "library")
		id = p.Log
		if err != nil {
			return err
		}
		for e, err := range s.journal.Entries(v, id, 0, 0) {
			if err != nil {
				return err
			}
			entries = append(entries, catalog.SeqEntry{Seq: e.Seq, Value: e.Value})
		}
		return nil
	})
	for i, e := range entries {
		decoded, err := entry.Decode(e.Value)
		must(s.t, err)
		if decoded.Kind != entry.ArtifactPut {
			continue
		}
		m, _, err := s.catalog.Resolve(s.t.Context(), "library", decoded.Repository, decoded.Digest.String())
		if err == nil {
			entries[i].ManifestBytes = m.Bytes
		} else if !fault.Is(err, fault.NotFound) {
			s.t.Fatal(err)
		}
	}
	return id, entries
}

func (s *site) root(project string) (root [32]byte) {
	s.t.Helper()
	s.view(func(v *table.View) (err error) {
		root, err = entry.StateRoot(s.catalog.Materialise(v, project))
		return err
	})
	return root
}

// rows counts the revision: equal before and after means that nothing was written.
func (s *site) revision() (n uint64) {
	s.view(func(v *table.View) error { n = v.Revision(); return nil })
	return n
}
