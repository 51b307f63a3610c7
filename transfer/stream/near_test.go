package stream

import (
	"context"
	"net"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// standing is a peer at a distance that counts who asks it.
type standing struct {
	transfer.Peer
	distance int
	asked    atomic.Int64
}

// counting is a listener that counts.
type counting struct {
	net.Listener
	n *atomic.Int64
}

func (c counting) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err == nil {
		c.n.Add(1)
	}
	return conn, err
}

// Who is farther is asked only while nobody nearer holds all of the blob, and then
// step by step.
func TestTheNearestAreAskedFirst(t *testing.T) {
	content, blob, _ := sample(t, 3*transfer.PieceSize)
	for name, c := range map[string]struct {
		holds []bool // by distance
		asked []bool
	}{
		"the nearest holds it":  {[]bool{true, true, true}, []bool{true, false, false}},
		"the next holds it":     {[]bool{false, true, true}, []bool{true, true, false}},
		"the farthest holds it": {[]bool{false, false, true}, []bool{true, true, true}},
		"none is near":          {[]bool{true, true}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var all []*standing
			var ask peers
			for i, holds := range c.holds {
				s := &standing{distance: i}
				if c.asked == nil {
					s.distance = Farthest
				}
				store := transfertest.NewStore()
				if holds {
					store.Put(content)
				}
				e := mover(t, store, peers(nil), nil)
				s.Peer = listening(t, "honest", func(ctx context.Context, ln net.Listener) { _ = e.Serve(ctx, counting{ln, &s.asked}) })
				s.ID += s.Addr
				all = append(all, s)
				ask = append(ask, s.Peer)
			}
			store := transfertest.NewStore()
			e := mover(t, store, ask, func(cfg *Config) {
				cfg.Self = "self"
				cfg.Distance = func(p transfer.Peer) int {
					for _, s := range all {
						if s.Peer == p {
							return s.distance
						}
					}
					t.Errorf("the distance of %v is asked for", p)
					return 0
				}
			})
			f, err := e.Fetch(t.Context(), blob)
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Wait(t.Context()); err != nil {
				t.Fatal(err)
			}
			if held, err := store.Open(t.Context(), digest.FromBytes(content)); err != nil {
				t.Error(err)
			} else {
				held.Close()
			}
			for i, s := range all {
				// Of two that are as near, the second may be too late.
				if c.asked != nil && s.asked.Load() > 0 != c.asked[i] {
					t.Errorf("the peer at distance %d was asked %d times", s.distance, s.asked.Load())
				}
			}
		})
	}
}
