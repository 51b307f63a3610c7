package traffic

import (
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// passes is a load of what a node passes on from one node to another, in parts.
func (n *node) passes(from, to string, c transfer.Class) *load {
	in := transfer.Flow{Peer: from, Class: c, Way: transfer.ByRelay}
	out := in
	out.Peer = to
	came := false
	return &load{
		take: func(size int) time.Duration {
			if !came {
				if wait := n.Incoming().Take(in, size); wait > 0 {
					return wait
				}
				came = true
			}
			wait := n.Take(out, size)
			came = wait > 0
			return wait
		},
		done: func(size int) { n.Received(in, size); n.Sent(out, size) },
	}
}

// What a node passes on counts for its caps, and competes by its class with what the node
// sends itself.
func TestWhatIsPassedOnCounts(t *testing.T) {
	for name, set := range map[string][2]string{
		"out": {"traffic.node", "8MiB"}, "in": {"traffic.node-in", "8MiB"}, "link": {"traffic.links", "a>c: 8MiB"}, "site": {"traffic.site", "8MiB"},
		"projects": {"traffic.projects", "library: 1MiB"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, 4, func(t *testing.T, s *site) {
				s.set(set[0], set[1])
				settle()
				n := s.nodes[0]
				passed := []*load{n.passes("id-b", "id-c", transfer.Pull), n.passes("id-d", "id-c", transfer.Repair)}
				drive(passed, 5*time.Second) // a site's caps are shared anew
				drive(passed, 10*time.Second)
				if name == "projects" { // whose it is the ends know
					if total(passed...) < 100<<20 {
						t.Errorf("%d bytes went", total(passed...))
					}
					return
				}
				near(t, "passed on", total(passed...), 8<<20*10, 0.1)
				if name == "in" {
					return
				}
				own := n.to("id-c", transfer.Pull, blob("x"))
				drive(append(passed, own), 10*time.Second)
				near(t, "with its own", total(append(passed, own)...), 8<<20*10, 0.1)
				near(t, "repair that is passed on", passed[1].sent, 8<<20*10/5, 0.2)
			})
		})
	}
}

// A budget counts what comes and what goes of what is passed on.
func TestWhatIsPassedOnIsInTheBudget(t *testing.T) {
	bubble(t, 3, func(t *testing.T, s *site) {
		s.set("traffic.budgets", "node: 20MiB/day")
		settle()
		n := s.nodes[0]
		l := n.passes("id-b", "id-c", transfer.Repair)
		l.take = slowly(l.take)
		drive([]*load{l}, 10*time.Second)
		near(t, "repair", l.sent, 10<<20, 0.1)
		if len(n.Notices()) != 1 {
			t.Errorf("the operator is told %+v", n.Notices())
		}
		pull := n.passes("id-b", "id-c", transfer.Pull)
		drive([]*load{pull}, time.Second)
		if pull.sent == 0 {
			t.Error("a pull that is passed on waits for the next day")
		}
	})
}

// slowly gives the disk its turn after each step.
func slowly(take func(int) time.Duration) func(int) time.Duration {
	return func(n int) time.Duration {
		pass(20 * time.Millisecond)
		return take(n)
	}
}

// Each hop of a way through another node is a way of its own: the ship sends to the shore
// through its second node, which alone sends over the link.
func TestAWayThroughAnotherNode(t *testing.T) {
	bubble(t, 3, func(t *testing.T, s *site) {
		s.mu.Lock()
		s.members[1].Labels = map[string]string{"zone": "ship"}
		s.mu.Unlock()
		s.set("traffic.links", "zone=ship<>zone=shore: 2MiB")
		settle()
		f := transfer.Flow{Blob: transfer.Blob{Digest: blob("x"), Size: 1 << 40}, Peer: "id-c", Via: "id-b"}
		first := &load{take: func(n int) time.Duration { return s.nodes[0].Take(f, n) }}
		second := s.nodes[1].passes("id-a", "id-c", transfer.Pull)
		drive([]*load{first, second}, 5*time.Second)
		drive([]*load{first, second}, 10*time.Second)
		if first.sent < 100<<20 {
			t.Errorf("%d bytes went within the ship", first.sent)
		}
		near(t, "over the link", second.sent, 2<<20*10, 0.1)
	})
}

// What is passed on is shown, and says what holds it back.
func TestWhatIsPassedOnIsShown(t *testing.T) {
	bubble(t, 3, func(t *testing.T, s *site) {
		s.set("traffic.node", "1MiB")
		settle()
		drive([]*load{s.nodes[0].passes("id-b", "id-c", transfer.Replication)}, 8*time.Second)
		seen := map[string]Transfer{}
		for _, one := range s.nodes[2].View(t.Context()).Transfers {
			seen[one.From+">"+one.To] = one
		}
		if len(seen) != 2 || seen["a>c"].HeldBack != "node" {
			t.Errorf("shown: %+v", seen)
		}
		for _, one := range seen {
			if one.Blob != "" || one.Engine != "relay" || one.Class != "replication" || one.Repository != "" || one.ETA != -1 {
				t.Errorf("shown: %+v", one)
			}
			near(t, "done", one.Done, 8<<20, 0.1)
		}
	})
}
