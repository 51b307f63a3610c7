package traffic

import (
	"testing"

	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/transfer"
)

// What the engines may take changes while they run, and is shown with what they have;
// what makes no sense is refused.
func TestLimits(t *testing.T) {
	bubble(t, 2, func(t *testing.T, s *site) {
		n := s.nodes[0]
		stream, swarm := n.Limits()
		use := func() Use {
			v := s.nodes[1].View(t.Context())
			if len(v.Nodes) != 2 || v.Nodes[0].Node != "a" || v.Nodes[1].Node != "b" {
				t.Fatalf("nodes: %+v", v.Nodes)
			}
			return v.Nodes[0]
		}
		before := use()
		if want := (Use{
			Node: "a", Fetches: Bound{0, 80}, Background: Bound{0, 16}, Answers: Bound{0, 1024},
			Connections: Bound{0, 1024}, Memory: Bound{0, 72 << 20},
		}); before != want {
			t.Errorf("at first %+v", before)
		}
		for name, value := range map[string]string{
			"traffic.pulls": "4", "traffic.fetches": "2", "traffic.connections": "16", "traffic.memory": "18MiB", "traffic.answers": "7", "traffic.holders": "3",
		} {
			s.set(name, value)
		}
		release, err := n.Place(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer release()
		for _, p := range []*transfer.Places{stream.Fetches, stream.Pieces, swarm.Pieces, swarm.Pieces, stream.Sending, swarm.Conns, stream.Conns} {
			if !p.Try() {
				t.Fatal("there is no place")
			}
		}
		if got, want := use(), (Use{
			Node: "a", Fetches: Bound{1, 6}, Background: Bound{1, 2}, Answers: Bound{0, 7},
			Connections: Bound{2, 16}, Memory: Bound{4 * transfer.PieceSize, 18 << 20},
		}); got != want {
			t.Errorf("by then %+v", got)
		}
		if stream.Holders() != 3 {
			t.Errorf("from %d nodes at once", stream.Holders())
		}
		for name, value := range map[string]string{
			"traffic.pulls": "3", "traffic.fetches": "0", "traffic.connections": "15", "traffic.memory": "17MiB", "traffic.answers": "many", "traffic.holders": "65",
		} {
			if _, err := n.settings.Set(t.Context(), name, value, ""); !fault.Is(err, fault.Invalid) {
				t.Errorf("%s %s: %v", name, value, err)
			}
		}
	})
}

// No setting lets connections take the files that a process may have open.
func TestConnectionsLeaveFiles(t *testing.T) {
	bubble(t, 1, func(t *testing.T, s *site) {
		n := s.nodes[0]
		n.limit(1024)
		stream, _ := n.Limits()
		if _, most := stream.Conns.Use(); most != 256 {
			t.Errorf("%d connections of 1024 files", most)
		}
	})
}
