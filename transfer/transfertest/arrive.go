package transfertest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// withholds makes a source that keeps one piece back until the gate is open.
func withholds(piece int, g *Gate) func(transfer.Source) transfer.Source {
	return reads(func(ctx context.Context, p []byte, off int64, read func() (int, error)) (int, error) {
		from := int64(piece) * transfer.PieceSize
		if off < from+transfer.PieceSize && off+int64(len(p)) > from {
			if err := g.Pass(ctx); err != nil {
				return 0, err
			}
		}
		return read()
	})
}

// reading reads all of r in the background.
func reading(r io.Reader) <-chan read {
	ch := make(chan read, 1)
	go func() {
		b, err := io.ReadAll(r)
		ch <- read{b, err}
	}()
	return ch
}

type read struct {
	bytes []byte
	err   error
}

// A to B to C: C knows only B, and gets what B has while B still waits for the rest.
func testRelay(t *testing.T, f *fleet) {
	content := fresh(12 * transfer.PieceSize)
	b := blobOf(t, content)
	g := NewGate()
	first := f.node("a", holding(content), options{source: withholds(11, g)})
	middle, end := NewStore(), NewStore()
	relay := f.node("b", middle, options{}, first)
	last := f.node("c", end, options{}, relay)
	under := f.fetch(relay, b)
	fetch := f.fetch(last, b)
	r := fetch.Reader(f.ctx())
	defer r.Close()
	early := make([]byte, 11*transfer.PieceSize)
	if _, err := io.ReadFull(r, early); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(early, content[:len(early)]) {
		t.Fatal("other bytes arrived")
	}
	if under.Progress().Done || last.movedFrom("b") < int64(len(early)) {
		t.Fatal("the relay had it all already")
	}
	g.Open()
	for _, wait := range []*transfer.Fetch{under, fetch} {
		if err := wait.Wait(f.ctx()); err != nil {
			t.Fatal(err)
		}
	}
	f.arrives(last, end, content, b)
}

// partly fetches all of a blob but one piece and stops the node.
func (f *fleet) partly(store *Store, content []byte, b transfer.Blob) {
	f.t.Helper()
	g := NewGate()
	last := int(b.Size/transfer.PieceSize) - 1
	from := f.node("a", holding(content), options{source: withholds(last, g)})
	to := f.node("b", store, options{}, from)
	fetch := f.fetch(to, b)
	if _, err := fetch.More(f.ctx(), last-1); err != nil {
		f.t.Fatal(err)
	}
	to.stop()
	if err := fetch.Wait(f.ctx()); !errors.Is(err, transfer.ErrStopped) {
		f.t.Fatalf("error is %v", err)
	}
	if got := store.Marked(b.Digest); got != last {
		f.t.Fatalf("%d pieces kept, want %d", got, last)
	}
	from.stop()
}

func testResume(t *testing.T, f *fleet) {
	content := fresh(16 * transfer.PieceSize)
	b := blobOf(t, content)
	store := NewStore()
	f.partly(store, content, b)
	to := f.node("b", store, options{}, f.node("a", holding(content), options{}))
	f.arrives(to, store, content, b)
	if got := to.movedFrom(""); got != transfer.PieceSize {
		t.Errorf("%d bytes moved for the one piece that was missing", got)
	}
}

func testResumeAfterRot(t *testing.T, f *fleet) {
	content := fresh(16 * transfer.PieceSize)
	b := blobOf(t, content)
	store := NewStore()
	f.partly(store, content, b)
	store.Rot(b.Digest)
	to := f.node("b", store, options{}, f.node("a", holding(content), options{}))
	f.arrives(to, store, content, b)
	if got := to.movedFrom(""); got != 2*transfer.PieceSize {
		t.Errorf("%d bytes moved for one missing and one rotten piece", got)
	}
}

func testReadWhileArriving(t *testing.T, f *fleet) {
	const pieces = 16
	content := fresh(pieces*transfer.PieceSize + 1000)
	b := blobOf(t, content)
	g := NewGate()
	store := NewStore()
	to := f.node("b", store, options{}, f.node("a", holding(content), options{source: withholds(pieces, g)}))
	fetch := f.fetch(to, b)
	r := fetch.Reader(f.ctx())
	defer r.Close()
	got := make([]byte, pieces*transfer.PieceSize)
	if _, err := io.ReadFull(r, got); err != nil {
		t.Fatal(err)
	}
	if fetch.Progress().Done || store.Bytes(b.Digest) != nil {
		t.Fatal("the blob was complete before its last piece came")
	}
	g.Open()
	rest, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(append(got, rest...), content) {
		t.Fatal("other bytes arrived")
	}
	if err := fetch.Wait(f.ctx()); err != nil {
		t.Fatal(err)
	}
	// Those who come later read it too.
	late := fetch.Reader(f.ctx())
	defer late.Close()
	if again, err := io.ReadAll(late); err != nil || !bytes.Equal(again, content) {
		t.Fatalf("a late reader gets %d bytes, %v", len(again), err)
	}
}

func testReadersAtOffsets(t *testing.T, f *fleet) {
	content := fresh(20*transfer.PieceSize + 3)
	g := NewGate()
	store := NewStore()
	to := f.node("b", store, options{}, f.node("a", holding(content), options{source: gated(g)}))
	fetch := f.fetch(to, blobOf(t, content))
	var offsets []int64
	var results []<-chan read
	for _, off := range []int64{0, 1, transfer.PieceSize - 1, 10 * transfer.PieceSize, int64(len(content)) - 1, int64(len(content))} {
		r := fetch.Reader(f.ctx())
		defer r.Close()
		if end, err := r.Seek(0, io.SeekEnd); err != nil || end != int64(len(content)) {
			t.Fatalf("end is %d, %v", end, err)
		}
		if _, err := r.Seek(off, io.SeekStart); err != nil {
			t.Fatal(err)
		}
		offsets, results = append(offsets, off), append(results, reading(r))
	}
	g.Open()
	for i, ch := range results {
		got := <-ch
		if got.err != nil || !bytes.Equal(got.bytes, content[offsets[i]:]) {
			t.Errorf("reader at %d: %d bytes, %v", offsets[i], len(got.bytes), got.err)
		}
	}
	if err := fetch.Wait(f.ctx()); err != nil {
		t.Fatal(err)
	}
}

// Readers leave, by their context and by Close, while they wait; the fetch goes on.
func testReaderLeaves(t *testing.T, f *fleet) {
	content := fresh(6 * transfer.PieceSize)
	g := NewGate()
	store := NewStore()
	to := f.node("b", store, options{}, f.node("a", holding(content), options{source: gated(g)}))
	fetch := f.fetch(to, blobOf(t, content))
	ctx, cancel := context.WithCancel(f.ctx())
	impatient, closed := fetch.Reader(ctx), fetch.Reader(f.ctx())
	defer impatient.Close()
	one, two := reading(impatient), reading(closed)
	cancel()
	if got := <-one; !errors.Is(got.err, context.Canceled) || len(got.bytes) != 0 {
		t.Errorf("%d bytes, %v", len(got.bytes), got.err)
	}
	if err := closed.Close(); err != nil {
		t.Error(err)
	}
	if got := <-two; got.err == nil || len(got.bytes) != 0 {
		t.Errorf("%d bytes, %v", len(got.bytes), got.err)
	}
	waiting, leave := context.WithCancel(f.ctx())
	leave()
	if err := fetch.Wait(waiting); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	g.Open()
	if err := fetch.Wait(f.ctx()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(store.Bytes(fetch.Blob().Digest), content) {
		t.Fatal("another blob arrived")
	}
}

// A reader of a fetch that fails learns why.
func testReaderOfFailure(t *testing.T, f *fleet) {
	content := fresh(6 * transfer.PieceSize)
	to := f.node("b", NewStore(), options{}, f.node("a", holding(content), options{source: flips}))
	fetch := f.fetch(to, blobOf(t, content))
	r := fetch.Reader(f.ctx())
	defer r.Close()
	if _, err := io.ReadAll(r); !errors.Is(err, transfer.ErrNoHolder) {
		t.Errorf("error is %v", err)
	}
	if _, err := io.ReadAll(fetch.Reader(f.ctx())); !errors.Is(err, transfer.ErrNoHolder) {
		t.Errorf("late: error is %v", err)
	}
}

// A holder has to compute the piece table first, which takes longer than a stall
// does; it is alive, so it is waited for.
func testSlowTable(t *testing.T, f *fleet) {
	f.stall = hasty
	content := fresh(6 * transfer.PieceSize)
	from := f.node("a", holding(content), options{source: func(s transfer.Source) transfer.Source {
		return &Hostile{Source: s, Table: func(ctx context.Context, honest transfer.PieceTable) (transfer.PieceTable, error) {
			select {
			case <-time.After(5 * hasty):
			case <-ctx.Done():
				return honest, errLeft
			}
			return honest, nil
		}}
	}})
	store := NewStore()
	b := blobOf(t, content)
	to := f.node("b", store, options{}, from)
	fetch := f.fetch(to, b)
	if err := fetch.Ready(f.ctx()); err != nil {
		t.Fatal(err)
	}
	f.arrives(to, store, content, b)
}
