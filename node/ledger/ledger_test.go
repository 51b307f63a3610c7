package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/journal"
	"github.com/atoll-registry/atoll/node/project"
)

type open struct{}

func (open) Seal(_ string, b []byte) ([]byte, error)   { return b, nil }
func (open) Unseal(_ string, b []byte) ([]byte, error) { return b, nil }

type noBig struct{}

func (noBig) Put(context.Context, digest.Digest, []byte) error    { return nil }
func (noBig) Read(context.Context, digest.Digest) ([]byte, error) { return nil, os.ErrNotExist }

// site is a catalog without a cluster, and a ledger of it.
type site struct {
	*Ledger
	t       *testing.T
	records *blobs.Records
}

func newSite(t *testing.T) *site {
	t.Helper()
	db := tabletest.Open(t)
	j := journal.New(db, open{})
	p := project.New(db, j)
	records := blobs.NewRecords(db)
	c, err := catalog.New(catalog.Config{DB: db, Records: records, Journal: j, Projects: p, Big: noBig{}})
	if err != nil {
		t.Fatal(err)
	}
	p.Attach(c)
	tabletest.Start(t, db)
	if _, err := j.EnsureSite(t.Context(), "site", "Site"); err != nil {
		t.Fatal(err)
	}
	if err := p.EnsureLibrary(t.Context(), "system"); err != nil {
		t.Fatal(err)
	}
	l := New(Config{Data: t.TempDir(), DB: db, Journal: j, Projects: p, Catalog: c, Log: slog.New(slog.DiscardHandler)})
	t.Cleanup(l.close)
	return &site{l, t, records}
}

// push puts a manifest that differs by its number.
func (s *site) push(tag string, n int) digest.Digest {
	s.t.Helper()
	config := []byte(fmt.Sprintf(`{"n":%d}`, n))
	d := digest.FromBytes(config)
	if err := s.records.Add(s.t.Context(), "library", "app", blobs.Info{Digest: d, Size: int64(len(config))}); err != nil {
		s.t.Fatal(err)
	}
	m := v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: v1.Descriptor{MediaType: v1.MediaTypeImageConfig, Digest: d, Size: int64(len(config))}, Layers: []v1.Descriptor{}}
	m.SchemaVersion = 2
	body, err := json.Marshal(m)
	if err != nil {
		s.t.Fatal(err)
	}
	a, err := s.Catalog.Put(s.t.Context(), catalog.Push{Project: "library", Repository: "app", Tag: tag, Bytes: body, Carrier: catalog.Client, At: time.Unix(1700000000, 0)})
	if err != nil {
		s.t.Fatal(err)
	}
	return a.Digest
}

func (s *site) catch() {
	s.t.Helper()
	if err := s.Catch(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
}

// want holds what the ledger amounts to against tags; every manifest has to be
// there whole.
func (s *site) want(artifacts int, tags map[string]digest.Digest) {
	s.t.Helper()
	got := state{projects: map[string]*projectState{}, bytes: map[digest.Digest]place{}}
	name, err := read(s.dir, func(at place, r record) {
		if err := got.apply(at, r); err != nil {
			s.t.Error(err)
		}
	})
	if err != nil {
		s.t.Fatal(err)
	}
	file, err := os.Open(name)
	if err != nil {
		s.t.Fatal(err)
	}
	defer file.Close()
	p := got.projects["library"]
	if p == nil || !p.entry.Public || len(p.artifacts) != artifacts || len(p.tags) != len(tags) {
		s.t.Fatalf("the ledger has %+v", p)
	}
	for tag, d := range tags {
		if p.tags[artifactKey{"app", tag}].Digest != d {
			s.t.Errorf("%s is %s, want %s", tag, p.tags[artifactKey{"app", tag}].Digest, d)
		}
	}
	for key := range p.artifacts {
		d := digest.Digest(key.name)
		if _, err := manifestAt(file, got.bytes[d], d); err != nil {
			s.t.Error(err)
		}
	}
}

func (s *site) size() int64 {
	s.t.Helper()
	info, err := os.Stat(filepath.Join(s.dir, s.at.File))
	if err != nil {
		s.t.Fatal(err)
	}
	return info.Size()
}

func TestFollowsTheJournals(t *testing.T) {
	s := newSite(t)
	a := s.push("a", 1)
	s.catch()
	s.want(1, map[string]digest.Digest{"a": a})
	before := s.size()
	s.catch()
	if s.size() != before {
		t.Error("it grows although nothing happened")
	}
	b := s.push("a", 2) // the tag moves
	if err := s.Catalog.DeleteTag(t.Context(), "library", "app", "a", "admin"); err != nil {
		t.Fatal(err)
	}
	s.push("b", 1)
	s.catch()
	s.want(2, map[string]digest.Digest{"b": a})
	_ = b
}

// Few bytes are held at once, however many entries there are, and none is left out.
func TestHoldsLittle(t *testing.T) {
	s := newSite(t)
	s.Ledger.held = 1
	tags := map[string]digest.Digest{}
	for n := range 5 {
		tags[fmt.Sprint("tag", n)] = s.push(fmt.Sprint("tag", n), n)
	}
	if err := s.DB.View(func(v *table.View) error {
		for id, err := range s.Journal.Logs(v, entry.LogID{}) {
			records, failed := s.page(v, id, 0)
			if len(records) > 1 {
				t.Errorf("%d entries are held at once", len(records))
			}
			if err := errors.Join(err, failed); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	s.catch()
	s.want(5, tags)
}

// A burst is followed in pieces, between which there is room for others; at the end of
// the node there is no time for that.
func TestBreathes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		s.Ledger.held = 1
		burst := func() (took time.Duration) {
			for n := range 5 {
				s.push(fmt.Sprint("tag", n), int(time.Now().UnixNano())+n)
			}
			start := time.Now()
			s.catch()
			return time.Since(start)
		}
		if took := burst(); took < 10*breath || took > 20*breath {
			t.Errorf("5 artifacts and their tags, each entry by itself: %v", took)
		}
		s.hurry = true
		if took := burst(); took > 0 {
			t.Errorf("in a hurry: %v", took)
		}
	})
}

// What was written and not counted when the power failed is written again.
func TestTornTail(t *testing.T) {
	s := newSite(t)
	a := s.push("a", 1)
	s.catch()
	s.close()
	file, err := os.OpenFile(filepath.Join(s.dir, s.at.File), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := file.WriteString("\x00\x00\x10\x00torn"); err != nil {
		t.Fatal(err)
	}
	file.Close()
	s.want(1, map[string]digest.Digest{"a": a})
	b := s.push("b", 2)
	s.catch()
	s.want(2, map[string]digest.Digest{"a": a, "b": b})

	// Cut below what counts, it begins anew.
	s.close()
	if err := os.Truncate(filepath.Join(s.dir, s.at.File), 10); err != nil {
		t.Fatal(err)
	}
	s.catch()
	s.want(2, map[string]digest.Digest{"a": a, "b": b})
}

// The file is bounded by what there is, not by what happened.
func TestCompacts(t *testing.T) {
	s := newSite(t)
	s.roomy = 4 << 10
	var last digest.Digest
	for n := range 60 {
		last = s.push("a", n%2)
		s.catch()
	}
	if s.at.Number == 0 || s.size() > 16<<10 {
		t.Errorf("after 60 pushes of two manifests file %d has %d bytes", s.at.Number, s.size())
	}
	s.want(2, map[string]digest.Digest{"a": last})
	files, err := os.ReadDir(s.dir)
	if err != nil || len(files) != 2 {
		t.Errorf("the directory has %v, %v", files, err)
	}
	s.push("b", 7)
	s.catch()
	s.want(3, map[string]digest.Digest{"a": last, "b": s.push("b", 7)})
}

// A damaged block ends what is believed.
func TestDamaged(t *testing.T) {
	s := newSite(t)
	s.push("a", 1)
	s.catch()
	s.push("b", 2)
	s.catch()
	s.close()
	name := filepath.Join(s.dir, s.at.File)
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	n := 0
	if _, err := read(s.dir, func(place, record) { n++ }); err == nil || n == 0 {
		t.Errorf("%d records, then %v", n, err)
	}
}
