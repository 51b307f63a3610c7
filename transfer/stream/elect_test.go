package stream

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/plan"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// plugged is one end of a connection of nodes that may lose their network.
type plugged struct {
	distant
	id  string         // who is at the other end
	out []*atomic.Bool // of both
}

func (p plugged) PeerID() string { return p.id }

func (p plugged) Write(b []byte) (int, error) {
	for _, out := range p.out {
		if out.Load() {
			return len(b), nil
		}
	}
	return p.distant.Write(b)
}

func (p plugged) Close() error {
	for _, out := range p.out {
		if out.Load() { // the other end does not hear of it
			p.in.mu.Lock()
			defer p.in.mu.Unlock()
			p.in.closed = true
			p.in.more.Broadcast()
			return nil
		}
	}
	return p.distant.Close()
}

// alike are the other nodes of a test.
type alike struct {
	self string
	ids  []string
}

func (a alike) Candidates(context.Context, digest.Digest) (list []transfer.Peer) {
	for _, id := range a.ids {
		if id != a.self {
			list = append(list, transfer.Peer{ID: id, Addr: id})
		}
	}
	return list
}

// The one of a site that asks beyond the slow link loses its network: no connection breaks.
// Another has gone on within two seconds.
func TestASilentElectedNodeIsReplaced(t *testing.T) {
	const delay = 12 * time.Millisecond // one way
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		defer wg.Wait()
		defer cancel()
		ids := []string{"00", "10", "11", "12"}
		engines, unplugged := map[string]*Engine{}, map[string]*atomic.Bool{}
		var mu sync.Mutex
		crossed := map[string]int64{}
		more := make(chan string, 1000)
		content, blob := random(40 * transfer.PieceSize)
		for _, id := range ids {
			unplugged[id] = &atomic.Bool{}
			store := transfertest.NewStore()
			if id == "00" {
				store.Put(content)
			}
			engines[id] = mover(t, store, alike{id, ids}, func(cfg *Config) {
				cfg.Self, cfg.StallTimeout = id, 10*time.Second
				cfg.Distance = func(p transfer.Peer) int {
					if (p.ID == "00") != (id == "00") {
						return Farthest
					}
					return 1
				}
				cfg.Hooks.Moved = func(from string, n int64) {
					if from == "00" {
						mu.Lock()
						crossed[id] += n
						mu.Unlock()
						more <- id
					}
				}
				if id == "00" {
					cfg.Limiter = limiter(paced(2 << 20))
				}
				cfg.Dial = func(_ context.Context, addr string) (net.Conn, error) {
					here, there := far(delay)
					out := []*atomic.Bool{unplugged[id], unplugged[addr]}
					wg.Go(func() { engines[addr].serveConn(ctx, plugged{there, id, out}) })
					return plugged{here, addr, out}, nil
				}
			})
		}
		elected := plan.Elect(blob.Digest.String(), ids[1:])
		for _, id := range ids[1:] {
			if _, err := engines[id].Fetch(t.Context(), blob); err != nil {
				t.Fatal(err)
			}
		}
		for {
			<-more
			mu.Lock()
			enough := crossed[elected] > blob.Size/3
			mu.Unlock()
			if enough {
				break
			}
		}
		unplugged[elected].Store(true)
		lost := time.Now()
		for id := range more {
			if id != elected {
				break
			}
		}
		took := time.Since(lost)
		t.Logf("the next piece came after %v", took)
		if took > 950*time.Millisecond {
			t.Errorf("the next piece came %v after the elected node had lost its network", took)
		}
	})
}
