package stream_test

import (
	"context"
	"net/http"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/stream"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// standing is a peer at a distance that counts what it is asked.
type standing struct {
	transfer.Peer
	distance int
	asked    atomic.Int64
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
					s.distance = stream.Farthest
				}
				store := transfertest.NewStore()
				if holds {
					store.Put(content)
				}
				handler := mover(t, store, nil, nil)
				s.Peer = serving(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					s.asked.Add(1)
					handler.ServeHTTP(w, r)
				}))
				s.ID += s.Addr
				all = append(all, s)
				ask = append(ask, s.Peer)
			}
			store := transfertest.NewStore()
			e := mover(t, store, ask, func(cfg *stream.Config) {
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
			if held, err := store.Open(context.Background(), digest.FromBytes(content)); err != nil {
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
