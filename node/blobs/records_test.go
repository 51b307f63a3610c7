package blobs_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/blobs/blobstest"
	"github.com/atoll-registry/atoll/node/fault"
)

const (
	layer    = digest.Digest("sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")
	config   = digest.Digest("sha256:cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc")
	manifest = digest.Digest("sha256:eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee")
)

type rows struct {
	*blobs.Records
	t       *testing.T
	db      *table.DB
	backend *tabletest.Backend
}

func newRows(t *testing.T) rows {
	db := tabletest.Open(t)
	r := blobs.NewRecords(db)
	return rows{r, t, db, tabletest.Start(t, db)}
}

func (r rows) update(fn func(tx *table.Tx) error) error {
	_, err := r.db.Update(r.t.Context(), fn)
	return err
}

func (r rows) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r rows) state(d digest.Digest, want blobs.State) blobs.Blob {
	r.t.Helper()
	var got blobs.Blob
	r.must(r.db.View(func(v *table.View) (err error) {
		got, _, err = r.Get(v, d)
		return err
	}))
	if got.State != want {
		r.t.Fatalf("blob %s is %q, want %q", d, got.State, want)
	}
	return got
}

func (r rows) linked(project, repository string, d digest.Digest) (linked bool) {
	r.t.Helper()
	r.must(r.db.View(func(v *table.View) (err error) {
		linked, err = r.Linked(v, project, repository, d)
		return err
	}))
	return linked
}

// pushManifest is what the catalog does with an artifact that needs the layer.
func (r rows) pushManifest() error {
	return r.update(func(tx *table.Tx) error { return r.AddRef(tx, layer, "library", "app", manifest) })
}

var later = time.Now().Add(time.Hour)

func TestLifeOfABlob(t *testing.T) {
	r := newRows(t)
	r.must(r.Add(t.Context(), "library", "app", blobs.Info{Digest: layer, Size: 7}))
	if b := r.state(layer, blobs.Live); b.Size != 7 || b.Copies != 1 || time.Since(time.Unix(b.At, 0)) > time.Minute {
		t.Fatalf("row %+v", b)
	}
	if !r.linked("library", "app", layer) || r.linked("library", "other", layer) {
		t.Fatal("the blob is not linked where it was pushed, or elsewhere")
	}
	r.must(r.pushManifest())
	if err := r.Condemn(t.Context(), layer); !fault.Is(err, fault.Precondition) {
		t.Fatalf("condemning what is referred to: %v", err)
	}
	r.must(r.update(func(tx *table.Tx) error {
		return r.DropRefs(tx, []digest.Digest{layer, config}, "library", "app", manifest)
	}))
	r.must(r.Condemn(t.Context(), layer))
	condemned := r.state(layer, blobs.Condemned)
	r.must(r.Condemn(t.Context(), layer))
	if again := r.state(layer, blobs.Condemned); again.At != condemned.At {
		t.Fatal("condemning again began the wait again")
	}
	if err := r.Gone(t.Context(), layer, time.Now().Add(-time.Hour)); !fault.Is(err, fault.Precondition) {
		t.Fatalf("ending a blob before its wait is over: %v", err)
	}
	if err := r.Unlinkable(t.Context(), layer); !fault.Is(err, fault.Precondition) {
		t.Fatalf("unlinking a condemned blob: %v", err)
	}
	r.must(r.Gone(t.Context(), layer, later))
	r.state(layer, blobs.Gone)
	r.must(r.Unlinkable(t.Context(), layer))
	if r.linked("library", "app", layer) {
		t.Fatal("a link outlived its blob")
	}
	if err := r.Condemn(t.Context(), layer); !blobstest.Code(err, fault.NotFound, "BLOB_UNKNOWN") {
		t.Fatalf("condemning what is gone: %v", err)
	}
	if err := r.pushManifest(); !blobstest.Code(err, fault.NotFound, "BLOB_UNKNOWN") {
		t.Fatalf("referring to what is gone: %v", err)
	}
	if _, err := r.Revive(t.Context(), layer); !blobstest.Code(err, fault.NotFound, "BLOB_UNKNOWN") {
		t.Fatalf("reviving what is gone: %v", err)
	}
	r.must(r.Add(t.Context(), "library", "app", blobs.Info{Digest: layer, Size: 7}))
	r.must(r.pushManifest())
	r.state(layer, blobs.Live)
}

// Whoever wants a condemned blob revives it before the answer.
func TestRevival(t *testing.T) {
	r := newRows(t)
	wants := map[string]func() error{
		"HEAD": func() error { _, err := r.Revive(t.Context(), layer); return err },
		"PUT": func() error {
			return r.Add(t.Context(), "library", "app", blobs.Info{Digest: layer, Size: 7})
		},
		"mount": func() error {
			return r.update(func(tx *table.Tx) error { return r.Link(tx, "library", "new", layer) })
		},
		"manifest": r.pushManifest,
	}
	r.must(r.Add(t.Context(), "library", "app", blobs.Info{Digest: layer, Size: 7}))
	for name, want := range wants {
		r.must(r.update(func(tx *table.Tx) error {
			return r.DropRefs(tx, []digest.Digest{layer}, "library", "app", manifest)
		}))
		r.must(r.Condemn(t.Context(), layer))
		if err := want(); err != nil {
			t.Fatalf("%s of a condemned blob: %v", name, err)
		}
		r.state(layer, blobs.Live)
		if err := r.Gone(t.Context(), layer, later); !fault.Is(err, fault.Precondition) {
			t.Fatalf("ending a blob that %s revived: %v", name, err)
		}
	}
	before := r.backend.Proposals()
	_, err := r.Revive(t.Context(), layer)
	r.must(err)
	if n := r.backend.Proposals() - before; n != 0 {
		t.Fatalf("a HEAD of a live blob proposed %d transactions", n)
	}
}

// A collection and a push meet at every point: one of them wins, and a push that
// succeeded never refers to a blob that is gone.
func TestCollectionAgainstPush(t *testing.T) {
	type step struct {
		name string
		do   func(r rows) error
	}
	condemn := step{"condemn", func(r rows) error { return r.Condemn(r.t.Context(), layer) }}
	gone := step{"gone", func(r rows) error { return r.Gone(r.t.Context(), layer, later) }}
	push := step{"manifest", rows.pushManifest}
	link := step{"mount", func(r rows) error {
		return r.update(func(tx *table.Tx) error { return r.Link(tx, "library", "new", layer) })
	}}
	add := step{"put", func(r rows) error {
		return r.Add(r.t.Context(), "library", "new", blobs.Info{Digest: layer, Size: 7})
	}}
	tests := []struct {
		before []step
		late   step // has read, and proposes after early has committed
		early  step
		state  blobs.State
		lost   string // which of the two must fail
	}{
		{nil, condemn, push, blobs.Live, "condemn"},
		{nil, push, condemn, blobs.Live, ""}, // revived by the push
		{nil, condemn, link, blobs.Condemned, ""},
		{[]step{condemn}, gone, push, blobs.Live, "gone"},
		{[]step{condemn}, push, gone, blobs.Gone, "manifest"},
		{[]step{condemn}, gone, link, blobs.Live, "gone"},
		{[]step{condemn}, link, gone, blobs.Gone, "mount"},
		{[]step{condemn}, gone, add, blobs.Live, "gone"},
		{[]step{condemn}, add, gone, blobs.Live, ""}, // brings it back: it has the bytes
	}
	for _, test := range tests {
		t.Run(fmt.Sprintf("%s over %s", test.early.name, test.late.name), func(t *testing.T) {
			r := newRows(t)
			r.must(r.Add(t.Context(), "library", "app", blobs.Info{Digest: layer, Size: 7}))
			for _, s := range test.before {
				r.must(s.do(r))
			}
			var early error
			r.backend.BeforeNext(func() { early = test.early.do(r) })
			late := test.late.do(r)
			for name, err := range map[string]error{test.early.name: early, test.late.name: late} {
				if (err != nil) != (name == test.lost) {
					t.Errorf("%s: %v, but %q is to lose", name, err, test.lost)
				}
			}
			b := r.state(layer, test.state)
			var referred bool
			r.must(r.db.View(func(v *table.View) (err error) {
				referred, err = r.Referred(v, layer)
				return err
			}))
			if referred && b.State != blobs.Live {
				t.Errorf("a reference to a blob that is %s", b.State)
			}
			if b.State == blobs.Gone && (r.linked("library", "app", layer) || r.linked("library", "new", layer)) {
				t.Error("a link to a blob that is gone")
			}
		})
	}
}

func TestGoneTakesManyLinks(t *testing.T) {
	r := newRows(t)
	const n = 2300
	for from := 0; from < n; from += 500 {
		r.must(r.update(func(tx *table.Tx) error {
			if err := r.Live(tx, layer, 7); err != nil {
				return err
			}
			for i := from; i < min(from+500, n); i++ {
				if err := r.Link(tx, "library", fmt.Sprint("app/", i), layer); err != nil {
					return err
				}
			}
			return nil
		}))
	}
	r.must(r.Condemn(t.Context(), layer))
	r.must(r.Gone(t.Context(), layer, later))
	for _, i := range []int{0, 1, 999, 1000, 2000, n - 1} {
		if r.linked("library", fmt.Sprint("app/", i), layer) {
			t.Errorf("link %d outlived its blob", i)
		}
	}
}

func TestUnlinkableWantsALeader(t *testing.T) {
	r := newRows(t)
	r.must(r.Add(t.Context(), "library", "app", blobs.Info{Digest: layer, Size: 7}))
	r.must(r.Condemn(t.Context(), layer))
	r.must(r.Gone(t.Context(), layer, later))
	r.backend.SetLeader(false)
	if err := r.Unlinkable(t.Context(), layer); !fault.Is(err, fault.Unavailable) {
		t.Fatalf("unlinking without a leader: %v", err)
	}
}

func TestSetRoot(t *testing.T) {
	r := newRows(t)
	root, other := make([]byte, 32), make([]byte, 32)
	other[0] = 1
	if err := r.SetRoot(t.Context(), layer, root); !blobstest.Code(err, fault.NotFound, "BLOB_UNKNOWN") {
		t.Fatalf("a root without a blob: %v", err)
	}
	r.must(r.Add(t.Context(), "library", "app", blobs.Info{Digest: layer, Size: 7}))
	if err := r.SetRoot(t.Context(), layer, root[:31]); err == nil {
		t.Fatal("a root of 31 bytes was taken")
	}
	r.must(r.SetRoot(t.Context(), layer, root))
	r.must(r.SetRoot(t.Context(), layer, root))
	if err := r.SetRoot(t.Context(), layer, other); !errors.Is(err, blobs.ErrRootDiffers) {
		t.Fatalf("a second root: %v", err)
	}
	if b := r.state(layer, blobs.Live); !slices.Equal(b.Root, root) {
		t.Fatalf("root %x", b.Root)
	}
	if err := r.Add(t.Context(), "library", "app", blobs.Info{Digest: layer, Size: 8}); !errors.Is(err, blobs.ErrSizeDiffers) {
		t.Fatalf("a second size: %v", err)
	}
}

func TestCopies(t *testing.T) {
	r := newRows(t)
	for i, d := range []digest.Digest{layer, config, manifest} {
		r.must(r.Add(t.Context(), "library", "app", blobs.Info{Digest: d, Size: 7}))
		r.must(r.update(func(tx *table.Tx) error { return r.SetCopies(tx, d, i) }))
	}
	before := r.backend.Proposals()
	r.must(r.update(func(tx *table.Tx) error { return r.SetCopies(tx, layer, 0) }))
	if n := r.backend.Proposals() - before; n != 0 {
		t.Fatal("what did not change was written")
	}
	check := func(wanted int, want ...digest.Digest) {
		t.Helper()
		r.must(r.db.View(func(v *table.View) error {
			var got []digest.Digest
			for row, err := range r.UnderReplicated(v, wanted) {
				if err != nil {
					return err
				}
				got = append(got, digest.Digest(row.Key[0]))
			}
			if n, err := r.CountUnderReplicated(v, wanted); err != nil || n != len(want) || !slices.Equal(got, want) {
				t.Fatalf("on fewer than %d nodes: %v (%d, %v), want %v", wanted, got, n, err, want)
			}
			return nil
		}))
	}
	check(1, layer)
	check(2, layer, config)
	check(3, layer, config, manifest)
	r.must(r.Condemn(t.Context(), layer))
	check(3, config, manifest)
	r.must(r.db.View(func(v *table.View) error {
		var got []string
		for row, err := range r.Scan(v, layer, 1) {
			if err != nil {
				return err
			}
			got = append(got, row.Key...)
		}
		if !slices.Equal(got, []string{config.String()}) {
			t.Fatalf("the blob after %s is %v", layer, got)
		}
		return nil
	}))
}

// The file and the row of a blob that is pushed while it is collected: the pin
// keeps the file for the row that the push is about to revive.
func TestPinAgainstCollection(t *testing.T) {
	r := newRows(t)
	s := open(t, t.TempDir(), blobs.Options{})
	content := []byte("content")
	d := put(t, s, content)
	info := blobs.Info{Digest: d, Size: int64(len(content))}
	r.must(r.Add(t.Context(), "library", "app", info))
	r.must(r.Condemn(t.Context(), d))
	r.must(r.Gone(t.Context(), d, later))

	collect := func() error {
		return s.RemoveIf(t.Context(), d, func(ctx context.Context) error { return r.Unlinkable(ctx, d) })
	}
	release := s.Pin(d)
	put(t, s, content) // finds it held
	if err := collect(); !fault.Is(err, fault.Conflict) {
		t.Fatalf("collecting during a push: %v", err)
	}
	r.must(r.Add(t.Context(), "library", "app", info))
	release()
	if err := collect(); !fault.Is(err, fault.Precondition) {
		t.Fatalf("collecting after a push: %v", err)
	}
	blobstest.Check(t, s, content)

	r.must(r.Condemn(t.Context(), d))
	r.must(r.Gone(t.Context(), d, later))
	r.must(collect())
	blobstest.CheckAbsent(t, s, d)
}
