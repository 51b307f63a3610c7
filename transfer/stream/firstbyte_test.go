package stream

import (
	"bytes"
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// distant is one end of a connection on which bytes take their time.
type distant struct {
	delay time.Duration
	in    *flow
	out   *flow
}

// flow is what goes one way.
type flow struct {
	mu     sync.Mutex
	more   sync.Cond
	way    []packet
	closed bool
}

// packet is bytes that arrive at a time; none are the end.
type packet struct {
	due  time.Time
	data []byte
}

func far(delay time.Duration) (a, b distant) {
	one, two := &flow{}, &flow{}
	one.more.L, two.more.L = &one.mu, &two.mu
	return distant{delay, one, two}, distant{delay, two, one}
}

func (c distant) Read(p []byte) (int, error) {
	f := c.in
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.way) == 0 && !f.closed {
		f.more.Wait()
	}
	if f.closed {
		return 0, net.ErrClosed
	}
	first := &f.way[0]
	if wait := time.Until(first.due); wait > 0 {
		f.mu.Unlock()
		<-time.After(wait)
		f.mu.Lock()
		first = &f.way[0] // there is one reader, and nobody else takes
	}
	if len(first.data) == 0 {
		return 0, io.EOF
	}
	n := copy(p, first.data)
	if first.data = first.data[n:]; len(first.data) == 0 {
		f.way = f.way[1:]
	}
	return n, nil
}

func (f *flow) add(p packet) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.way = append(f.way, p)
	f.more.Broadcast()
}

func (c distant) Write(p []byte) (int, error) {
	c.out.add(packet{time.Now().Add(c.delay), bytes.Clone(p)})
	return len(p), nil
}

func (c distant) Close() error {
	c.out.add(packet{time.Now().Add(c.delay), nil})
	c.in.mu.Lock()
	defer c.in.mu.Unlock()
	c.in.closed = true
	c.in.more.Broadcast()
	return nil
}

func (distant) LocalAddr() net.Addr              { return nil }
func (distant) RemoteAddr() net.Addr             { return nil }
func (distant) SetDeadline(time.Time) error      { return nil }
func (distant) SetReadDeadline(time.Time) error  { return nil }
func (distant) SetWriteDeadline(time.Time) error { return nil }

// A reader that comes to a node that has nothing waits for one round trip and the
// first piece, or two where the nearest candidate does not hold the blob; the table of
// the pieces does not cost one.
func TestTheFirstByteTakesTwoRoundTrips(t *testing.T) {
	const delay = 50 * time.Millisecond // one way
	content, blob := random(9*transfer.PieceSize + 5)
	full := transfertest.NewStore()
	full.Put(content)
	for name, c := range map[string]struct {
		stores []*transfertest.Store
		reads  int64
		trips  time.Duration
	}{
		"the nearest holds it":        {[]*transfertest.Store{full}, 0, 1},
		"it does, and one beyond":     {[]*transfertest.Store{full, full}, 0, 1},
		"the next holds it":           {[]*transfertest.Store{transfertest.NewStore(), full}, 0, 2},
		"from the middle":             {[]*transfertest.Store{full}, 5*transfer.PieceSize + 1, 1},
		"the middle, of the next one": {[]*transfertest.Store{transfertest.NewStore(), full}, 5*transfer.PieceSize + 1, 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				var wg sync.WaitGroup
				defer wg.Wait()
				defer cancel()
				var ask peers
				holders := map[string]*Engine{}
				for i, store := range c.stores {
					id := string(rune('a' + i))
					holders[id] = mover(t, store, peers(nil), nil)
					ask = append(ask, transfer.Peer{Addr: id})
				}
				store := transfertest.NewStore()
				e := mover(t, store, ask, func(cfg *Config) {
					cfg.StallTimeout = 10 * time.Second
					cfg.Dial = func(_ context.Context, addr string) (net.Conn, error) {
						here, there := far(delay)
						wg.Go(func() { holders[addr].serveConn(ctx, there) })
						return here, nil
					}
				})
				began := time.Now()
				f, err := e.Fetch(t.Context(), blob, transfer.ReadFrom(c.reads))
				if err != nil {
					t.Fatal(err)
				}
				if err := f.Ready(t.Context()); err != nil {
					t.Fatal(err)
				}
				r := f.Reader(t.Context())
				defer r.Close()
				if _, err := r.Seek(c.reads, io.SeekStart); err != nil {
					t.Fatal(err)
				}
				one := make([]byte, 1)
				if _, err := io.ReadFull(r, one); err != nil {
					t.Fatal(err)
				}
				if took, want := time.Since(began), c.trips*2*delay; took != want {
					t.Errorf("the first byte came after %v, want %v", took, want)
				}
				if err := f.Wait(t.Context()); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(store.Bytes(blob.Digest), content) {
					t.Error("another blob arrived")
				}
			})
		})
	}
}

// A fetch right after another one goes on over the same connection, though the holder has
// not said bye yet: to open one takes three round trips more.
func TestTheNextFetchWaitsForNoConnection(t *testing.T) {
	const trip = 100 * time.Millisecond
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		defer wg.Wait()
		defer cancel()
		full := transfertest.NewStore()
		holder := mover(t, full, peers(nil), nil)
		opened := 0
		store := transfertest.NewStore()
		e := mover(t, store, peers{{Addr: "a"}}, func(cfg *Config) {
			cfg.StallTimeout = 10 * time.Second
			cfg.Dial = func(context.Context, string) (net.Conn, error) {
				<-time.After(3 * trip)
				opened++
				here, there := far(trip / 2)
				wg.Go(func() { holder.serveConn(ctx, there) })
				return here, nil
			}
		})
		for i := range 4 {
			content, blob := random(9*transfer.PieceSize + i)
			full.Put(content)
			began := time.Now()
			f, err := e.Fetch(t.Context(), blob, transfer.ReadFrom(0))
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Ready(t.Context()); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(began); i > 0 && took != trip {
				t.Errorf("the first bytes of blob %d came after %v, want %v", i, took, trip)
			}
			if err := f.Wait(t.Context()); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(store.Bytes(blob.Digest), content) {
				t.Error("another blob arrived")
			}
		}
		if opened != 1 {
			t.Errorf("%d connections were opened", opened)
		}
	})
}
