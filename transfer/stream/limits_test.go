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
		if _, err = e.greet(t.Context(), l, nil, hello{digest: blob.Digest, size: blob.Size, patience: time.Second}, nil); err != nil {
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

// tally counts what is written to the connections of a listener.
type tally struct {
	net.Listener
	began time.Time
	rate  float64 // bytes a second that may go

	mu     sync.Mutex
	out    int64
	excess float64 // the most by which out was ahead of the rate
}

func (c *tally) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return tallied{conn, c}, nil
}

type tallied struct {
	net.Conn
	c *tally
}

func (t tallied) NetConn() net.Conn { return t.Conn }

func (t tallied) Write(p []byte) (int, error) {
	n, err := t.Conn.Write(p)
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	t.c.out += int64(n)
	t.c.excess = max(t.c.excess, float64(t.c.out)-t.c.rate*time.Since(t.c.began).Seconds())
	return n, err
}

// A cap on what comes in holds at the sender too, which cannot see it: what it is ahead
// is a few pieces, in the buffers of both ends.
func TestIncomingHoldsTheSender(t *testing.T) {
	const rate = 2 << 20
	content, blob := random(32 * transfer.PieceSize)
	full := transfertest.NewStore()
	full.Put(content)
	holder := mover(t, full, peers(nil), nil)
	c := &tally{rate: rate}
	source := listening(t, "honest", func(ctx context.Context, ln net.Listener) {
		c.Listener = ln
		_ = holder.Serve(ctx, c)
	})
	e := mover(t, transfertest.NewStore(), peers{source}, func(cfg *Config) {
		cfg.Incoming, cfg.StallTimeout = limiter(paced(rate)), 10*time.Second
	})
	c.began = time.Now()
	f, err := e.Fetch(t.Context(), blob)
	if err == nil {
		err = f.Wait(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	took := time.Since(c.began)
	c.mu.Lock()
	defer c.mu.Unlock()
	t.Logf("%d bytes in %v, at most %.0f ahead", c.out, took, c.excess)
	if least := time.Duration(float64(blob.Size) / rate * 0.9 * float64(time.Second)); took < least {
		t.Errorf("it took %v, at least %v was allowed", took, least)
	}
	if c.excess > 1<<20 {
		t.Errorf("the sender was %.0f bytes ahead", c.excess)
	}
}

// limiter is a function that is one; it is asked one at a time.
func limiter(take func(transfer.Flow, int) time.Duration) transfer.Limiter {
	return &serial{take: take}
}

type serial struct {
	mu   sync.Mutex
	take func(transfer.Flow, int) time.Duration
}

func (s *serial) Take(f transfer.Flow, n int) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.take(f, n)
}
