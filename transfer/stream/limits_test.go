package stream

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// gate lets one class pass, and remembers which have asked.
type gate struct {
	pass transfer.Class

	mu    sync.Mutex
	asked map[transfer.Class]int
}

func (g *gate) Take(f transfer.Flow, _ int) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked[f.Class]++
	if f.Class != g.pass {
		return time.Millisecond
	}
	return 0
}

func (g *gate) saw(c transfer.Class) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.asked[c] > 0
}

// When somebody asks for what was only prefetched, the holder hears of it in the middle
// of the session and serves it as a pull from then on.
func TestTheHolderHearsOfAnotherClass(t *testing.T) {
	content, blob := random(6 * transfer.PieceSize)
	full := transfertest.NewStore()
	full.Put(content)
	g := &gate{pass: transfer.Pull, asked: map[transfer.Class]int{}}
	source := serving(t, mover(t, full, peers(nil), func(c *Config) { c.Limiter = g }))
	e := mover(t, transfertest.NewStore(), peers{source}, func(c *Config) { c.StallTimeout = 10 * time.Second })
	f, err := e.Fetch(t.Context(), blob, transfer.For(transfer.Prefetch))
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the holder to be asked", func() bool { return g.saw(transfer.Prefetch) })
	if g.saw(transfer.Pull) {
		t.Error("it is a pull before anybody has asked")
	}
	if _, err := e.Fetch(t.Context(), blob, transfer.For(transfer.Pull)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := f.Wait(ctx); err != nil {
		t.Error(err)
	}
}

// A node serves so many connections at once; the number may change while it does.
func TestConnectionsAreBounded(t *testing.T) {
	content, blob := random(transfer.PieceSize)
	full := transfertest.NewStore()
	full.Put(content)
	var most atomic.Int64
	most.Store(1)
	source := serving(t, mover(t, full, peers(nil), func(c *Config) {
		c.Conns = transfer.NewPlaces(func() int { return int(most.Load()) })
	}))
	e := mover(t, transfertest.NewStore(), peers(nil), nil)
	ask := func() (close func(), err error) {
		conn, err := net.Dial("tcp", source.Addr)
		if err != nil {
			return nil, err
		}
		l := newLink(conn)
		go l.writer()
		if _, err = e.greet(t.Context(), l, hello{digest: blob.Digest, size: blob.Size, patience: time.Second}, nil); err != nil {
			l.close()
		}
		return l.close, err
	}
	first, err := ask()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ask(); err == nil {
		t.Error("a second connection is served")
	}
	most.Store(2)
	second, err := ask()
	if err != nil {
		t.Error(err)
	} else {
		second()
	}
	first()
	most.Store(1)
	waitFor(t, "places to be free", func() bool {
		again, err := ask()
		if err == nil {
			again()
		}
		return err == nil
	})
}

// Buffers beyond a lower bound are not kept.
func TestBuffersAreGivenUp(t *testing.T) {
	var most atomic.Int64
	most.Store(4)
	b := newBuffers(transfer.NewPlaces(func() int { return int(most.Load()) }), 10)
	var taken [][]byte
	for range 4 {
		buf, err := b.take(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		taken = append(taken, buf)
	}
	most.Store(2)
	for _, buf := range taken {
		b.give(buf)
	}
	if len(b.free) != 2 {
		t.Errorf("%d buffers are kept of 2", len(b.free))
	}
	if n, _ := b.places.Use(); n != 0 {
		t.Errorf("%d places are taken", n)
	}
}
