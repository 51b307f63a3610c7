package transfertest

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/atoll-registry/atoll/transfer"
)

// reads makes a source whose reads are changed.
func reads(change func(ctx context.Context, p []byte, off int64, read func() (int, error)) (int, error)) func(transfer.Source) transfer.Source {
	return func(s transfer.Source) transfer.Source { return &Hostile{Source: s, Read: change} }
}

// flips makes a source with one wrong bit in each piece.
func flips(s transfer.Source) transfer.Source {
	return &Hostile{Source: s, Read: func(_ context.Context, p []byte, _ int64, read func() (int, error)) (int, error) {
		n, err := read()
		if n > 0 {
			p[n/2] ^= 1
		}
		return n, err
	}}
}

// besides fetches a blob from a hostile peer and an honest one, who holds back until
// the hostile one was dropped, and wants the blob to arrive and the blame to fit.
func (f *fleet) besides(hostile *node, content []byte, b transfer.Blob, lie bool) {
	f.t.Helper()
	g := NewGate()
	honest := f.node("honest", holding(content), options{source: gated(g)})
	store := NewStore()
	to := f.node("to", store, options{}, hostile, honest)
	fetch := f.fetch(to, b)
	f.awaitDrop(to, hostile.id)
	g.Open()
	if err := fetch.Wait(f.ctx()); err != nil {
		f.t.Fatal(err)
	}
	f.arrives(to, store, content, b)
	if to.liar(hostile.id) != lie {
		f.t.Errorf("the hostile peer is called a liar: %v, want %v", !lie, lie)
	}
	if to.liar(honest.id) {
		f.t.Error("the honest peer is called a liar")
	}
}

func testLie(t *testing.T, f *fleet) {
	content := fresh(20 * transfer.PieceSize)
	f.besides(f.node("hostile", holding(content), options{source: flips}), content, blobOf(t, content), true)
}

// Without a root the lie shows only at the end, and only when the liar was alone.
func testLieWithoutRoot(t *testing.T, f *fleet) {
	f.stall = hasty // the honest peer may have its turn first, and holds back
	content := fresh(5 * transfer.PieceSize)
	f.besides(f.node("hostile", holding(content), options{source: flips}), content, rootless(blobOf(t, content)), true)
}

// A peer sends another blob of the same size under the right piece table.
func testReplay(t *testing.T, f *fleet) {
	content, other := fresh(6*transfer.PieceSize+9), fresh(6*transfer.PieceSize+9)
	hostile := f.node("hostile", holding(content), options{source: reads(func(_ context.Context, p []byte, off int64, _ func() (int, error)) (int, error) {
		return copy(p, other[off:]), nil
	})})
	f.besides(hostile, content, blobOf(t, content), true)
}

// A peer sends another blob with a piece table that fits it.
func testForeignTable(t *testing.T, f *fleet) {
	content, other := fresh(6*transfer.PieceSize+9), fresh(6*transfer.PieceSize+9)
	hostile := f.node("hostile", holding(content), options{source: func(s transfer.Source) transfer.Source {
		return &Hostile{
			Source: s,
			Read: func(_ context.Context, p []byte, off int64, _ func() (int, error)) (int, error) {
				return copy(p, other[off:]), nil
			},
			Table: func(context.Context, transfer.PieceTable) (transfer.PieceTable, error) {
				return transfer.HashPieces(Bytes(other).(io.Reader), int64(len(other)))
			},
		}
	}})
	// Only the hostile peer answers while it is alone, so it is asked for the table.
	store := NewStore()
	g := NewGate()
	honest := f.node("honest", holding(content), options{source: func(s transfer.Source) transfer.Source {
		return &Hostile{Source: s, Table: func(ctx context.Context, t transfer.PieceTable) (transfer.PieceTable, error) {
			return t, g.Pass(ctx)
		}}
	}})
	to := f.node("to", store, options{}, hostile)
	fetch := f.fetch(to, blobOf(t, content))
	f.awaitDrop(to, "hostile")
	g.Open()
	if err := fetch.Wait(f.ctx()); !errors.Is(err, transfer.ErrNoHolder) {
		t.Fatalf("error is %v", err)
	}
	if !to.liar("hostile") {
		t.Error("the foreign table was no lie")
	}
	to.mu.Lock()
	to.asks = append(to.asks, honest)
	to.mu.Unlock()
	f.arrives(to, store, content, blobOf(t, content))
}

// The trusted root is wrong, so nobody's table is right: nothing may arrive.
func testWrongRoot(t *testing.T, f *fleet) {
	content := fresh(4 * transfer.PieceSize)
	store := NewStore()
	to := f.node("to", store, options{}, f.node("a", holding(content), options{}))
	b := blobOf(t, content)
	b.Root = blobOf(t, fresh(4*transfer.PieceSize)).Root
	if err := f.fetch(to, b).Wait(f.ctx()); !errors.Is(err, transfer.ErrNoHolder) {
		t.Errorf("error is %v", err)
	}
	// And a root that fits bytes which are not the digest's.
	other := fresh(4 * transfer.PieceSize)
	b = blobOf(t, other)
	b.Digest = blobOf(t, content).Digest
	liar := f.node("b", holding(content), options{source: func(s transfer.Source) transfer.Source {
		return &Hostile{
			Source: s,
			Read: func(_ context.Context, p []byte, off int64, _ func() (int, error)) (int, error) {
				return copy(p, other[off:]), nil
			},
			Table: func(context.Context, transfer.PieceTable) (transfer.PieceTable, error) {
				return transfer.HashPieces(Bytes(other).(io.Reader), int64(len(other)))
			},
		}
	}})
	to = f.node("to", store, options{}, liar)
	if err := f.fetch(to, b).Wait(f.ctx()); !errors.Is(err, transfer.ErrDigest) {
		t.Errorf("error is %v", err)
	}
	if store.Bytes(b.Digest) != nil || store.Marked(b.Digest) != 0 {
		t.Error("something was kept of what is not the blob")
	}
}

func testSizeLie(t *testing.T, f *fleet) {
	for _, size := range []int64{1 << 31, 1 << 40, 0, 1, -1} {
		for _, root := range []bool{true, false} {
			content := fresh(3*transfer.PieceSize + 5)
			b := blobOf(t, content)
			if !root {
				b = rootless(b)
			}
			hostile := f.node("hostile", holding(content), options{source: func(s transfer.Source) transfer.Source {
				return &Hostile{Source: s, Size: func(int64) int64 { return size }}
			}})
			store := NewStore()
			to := f.node("to", store, options{}, hostile, f.node("honest", holding(content), options{}))
			f.arrives(to, store, content, b)
			if to.movedFrom("hostile") != 0 {
				t.Errorf("size %d: bytes were taken from a peer that lies about it", size)
			}
		}
	}
}

// A sender stops in the middle of the blob; whoever waits gets on by another.
func testStall(t *testing.T, f *fleet) {
	f.stall = hasty
	content := fresh(20 * transfer.PieceSize)
	for _, b := range []transfer.Blob{blobOf(t, content), rootless(blobOf(t, content))} {
		var stalled atomic.Bool
		hostile := f.node("hostile", holding(content), options{source: reads(func(ctx context.Context, _ []byte, off int64, read func() (int, error)) (int, error) {
			if off < b.Size/2 {
				return read()
			}
			stalled.Store(true)
			<-ctx.Done()
			return 0, errLeft
		})})
		store := NewStore()
		alone := f.node("alone", store, options{}, hostile)
		if err := f.fetch(alone, b).Wait(f.ctx()); !errors.Is(err, transfer.ErrNoHolder) {
			t.Fatalf("error is %v", err)
		}
		if !stalled.Load() || alone.liar("hostile") {
			t.Error("a stall is not a lie")
		}
		store = NewStore()
		to := f.node("to", store, options{}, hostile, f.node("honest", holding(content), options{}))
		f.arrives(to, store, content, b)
	}
}

// everyOther makes a source that breaks off in the middle of every other read.
func everyOther() func(transfer.Source) transfer.Source {
	var n atomic.Int64
	return reads(func(_ context.Context, p []byte, _ int64, read func() (int, error)) (int, error) {
		k, err := read()
		if n.Add(1)%12 == 0 {
			return k / 2, errors.New("the disk gives up")
		}
		return k, err
	})
}

func testShort(t *testing.T, f *fleet) {
	content := fresh(24 * transfer.PieceSize)
	store := NewStore()
	to := f.node("to", store, options{}, f.node("a", holding(content), options{source: everyOther()}))
	f.arrives(to, store, content, blobOf(t, content))
	if to.liar("a") {
		t.Error("a short answer is not a lie")
	}
}

func testShortWithoutRoot(t *testing.T, f *fleet) {
	content := fresh(24 * transfer.PieceSize)
	store := NewStore()
	to := f.node("to", store, options{},
		f.node("a", holding(content), options{source: everyOther()}),
		f.node("b", holding(content), options{source: everyOther()}))
	f.arrives(to, store, content, rootless(blobOf(t, content)))
}

// resetting breaks a connection after some bytes have gone out.
type resetting struct {
	net.Conn
	mu   sync.Mutex
	left int
}

func (r *resetting) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.left -= len(p); r.left < 0 {
		if tcp, ok := r.Conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		r.Close()
		return 0, net.ErrClosed
	}
	return r.Conn.Write(p)
}

func testReset(t *testing.T, f *fleet) {
	content := fresh(24 * transfer.PieceSize)
	store := NewStore()
	resets := func(c net.Conn) net.Conn { return &resetting{Conn: c, left: 3 * transfer.PieceSize} }
	to := f.node("to", store, options{}, f.node("a", holding(content), options{accept: resets}))
	f.arrives(to, store, content, blobOf(t, content))
	if to.liar("a") {
		t.Error("a broken connection is not a lie")
	}
}

func testOneOfThreeDies(t *testing.T, f *fleet) {
	content := fresh(48 * transfer.PieceSize)
	b := blobOf(t, content)
	dying, rest := NewGate(), NewGate()
	var served atomic.Int64
	a := f.node("a", holding(content), options{source: reads(func(ctx context.Context, _ []byte, _ int64, read func() (int, error)) (int, error) {
		if served.Add(1) > 20 { // a little more than a piece
			dying.Open()
			<-ctx.Done()
			return 0, errLeft
		}
		return read()
	})})
	store := NewStore()
	to := f.node("to", store, options{}, a,
		f.node("b", holding(content), options{source: gated(rest)}),
		f.node("c", holding(content), options{source: gated(rest)}))
	fetch := f.fetch(to, b)
	f.await("the first holder is in the middle of it", dying.Opened())
	a.stop()
	rest.Open()
	if err := fetch.Wait(f.ctx()); err != nil {
		t.Fatal(err)
	}
	f.arrives(to, store, content, b)
}

func testAllLie(t *testing.T, f *fleet) {
	content := fresh(6 * transfer.PieceSize)
	for _, b := range []transfer.Blob{blobOf(t, content), rootless(blobOf(t, content))} {
		store := NewStore()
		to := f.node("to", store, options{},
			f.node("a", holding(content), options{source: flips}),
			f.node("b", holding(content), options{source: flips}))
		err := f.fetch(to, b).Wait(f.ctx())
		var none *transfer.NoHolderError
		if !errors.As(err, &none) || len(none.Asked) != 2 {
			t.Fatalf("error is %v", err)
		}
		if !to.liar("a") || !to.liar("b") {
			t.Error("a liar is not reported")
		}
		if store.Bytes(b.Digest) != nil {
			t.Error("a lie was kept")
		}
	}
}

// Another node of the site answers at a peer's address.
func testWrongPeer(t *testing.T, f *fleet) {
	content := fresh(100)
	a := f.node("a", holding(content), options{})
	to := f.node("to", NewStore(), options{}, &node{id: "b", addr: a.addr})
	if err := f.fetch(to, blobOf(t, content)).Wait(f.ctx()); !errors.Is(err, transfer.ErrNoHolder) {
		t.Errorf("error is %v", err)
	}
}
