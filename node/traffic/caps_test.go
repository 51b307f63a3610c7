package traffic

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// bubble runs a test in which time passes only while everybody waits.
func bubble(t *testing.T, nodes int, f func(t *testing.T, s *site)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, nodes)
		stop := s.run()
		f(t, s)
		stop()
	})
}

// settle lets the nodes take up what was set, and what was saved up be spent.
func settle() { pass(time.Second) }

func TestCapIsKept(t *testing.T) {
	for _, rate := range []struct {
		text string
		is   float64
	}{{"128KiB", 128 << 10}, {"2MiB", 2 << 20}, {"50MiB", 50 << 20}} {
		t.Run(rate.text, func(t *testing.T) {
			bubble(t, 2, func(t *testing.T, s *site) {
				s.set("traffic.node", rate.text)
				settle()
				var loads []*load
				for i := range 5 {
					loads = append(loads, s.nodes[0].to(fmt.Sprintf("peer%d", i), transfer.Pull, blob("x")))
				}
				during := 10 * time.Second
				if rate.is < piece {
					during = time.Minute // a piece takes two seconds
				}
				drive(loads, during)
				near(t, "all", total(loads...), rate.is*during.Seconds(), 0.1)
			})
		})
	}
}

func TestWithoutACapNothingWaits(t *testing.T) {
	bubble(t, 2, func(t *testing.T, s *site) {
		n := s.nodes[0]
		settle()
		if wait := n.Take(transfer.Flow{Blob: transfer.Blob{Digest: blob("x")}, Peer: "id-b"}, 1<<30); wait != 0 {
			t.Errorf("told to wait %v", wait)
		}
	})
}

func TestClassesShareByWeight(t *testing.T) {
	bubble(t, 2, func(t *testing.T, s *site) {
		s.set("traffic.node", "15MiB")
		settle()
		n := s.nodes[0]
		var loads []*load
		for c := range transfer.Class(transfer.Classes) {
			// The less urgent a class is, the more ask for it.
			for i := range 1 + 3*int(c) {
				loads = append(loads, n.to(fmt.Sprintf("peer%d-%d", c, i), c, blob("x")))
			}
		}
		drive(loads, 20*time.Second)
		near(t, "all", total(loads...), 15<<20*20, 0.1)
		at := 0
		for c := range transfer.Class(transfer.Classes) {
			of := loads[at : at+1+3*int(c)]
			at += len(of)
			near(t, c.String(), total(of...), float64(c.Weight())*20*(1<<20), 0.15)
		}
		alone := n.to("peer", transfer.Prefetch, blob("x"))
		drive([]*load{alone}, 10*time.Second)
		near(t, "prefetch alone", alone.sent, 15<<20*10, 0.1)
	})
}

// Nobody gets more by asking for more at once, and who has been away has saved up
// nothing.
func TestClientsAreAlike(t *testing.T) {
	bubble(t, 2, func(t *testing.T, s *site) {
		s.set("traffic.node", "8MiB")
		settle()
		n := s.nodes[0]
		greedy := make([]*load, 8)
		for i := range greedy {
			greedy[i] = n.to("greedy", transfer.Pull, blob(fmt.Sprint(i)))
		}
		drive(greedy, 5*time.Second)
		modest := n.to("modest", transfer.Pull, blob("x"))
		client, err := n.Begin(t.Context(), Content{Digest: blob("y"), Size: 1 << 40, Project: "library", Repository: "app", Client: "ann@192.0.2.1"})
		if err != nil {
			t.Fatal(err)
		}
		defer client.End()
		answer := &load{take: client.Take}
		drive(append(greedy, modest, answer), 12*time.Second)
		third := 8.0 * (1 << 20) * 12 / 3
		near(t, "greedy", total(greedy...), third, 0.12)
		near(t, "modest", modest.sent, third, 0.12)
		near(t, "the client's answer", answer.sent, third, 0.12)
	})
}

func TestAChangeCountsWithinASecond(t *testing.T) {
	bubble(t, 2, func(t *testing.T, s *site) {
		n := s.nodes[0]
		l := n.to("id-b", transfer.Pull, blob("x"))
		s.set("traffic.node", "1MiB")
		settle()
		drive([]*load{l}, 4*time.Second)
		near(t, "before", l.sent, 4<<20, 0.1)
		s.set("traffic.node", "stop")
		settle()
		drive([]*load{l}, 4*time.Second)
		if l.sent > 0 {
			t.Errorf("stopped, and %d bytes went", l.sent)
		}
		// The change comes while the load waits: what it lost is a second at most.
		began := time.Now()
		time.AfterFunc(2*time.Second, func() { s.set("traffic.node", "16MiB") })
		drive([]*load{l}, 6*time.Second)
		if took := time.Since(began); l.sent < 16<<20*3 || l.sent > 70<<20 {
			t.Errorf("%d bytes in %v, of which 4 s at 16 MiB/s", l.sent, took)
		}
		s.set("traffic.node", "0")
		settle()
		drive([]*load{l}, time.Second)
		if l.sent < 100<<20 {
			t.Errorf("without a cap only %d bytes went", l.sent)
		}
	})
}

// Each of a flow's caps holds: its node's, its link's, its project's.
func TestCapsAddUp(t *testing.T) {
	bubble(t, 3, func(t *testing.T, s *site) {
		ship := s.nodes[0]
		s.owners[blob("mine")] = []Repository{{"mine", "app"}}
		s.owners[blob("both")] = []Repository{{"free", "app"}, {"mine", "app"}}
		s.set("traffic.links", "zone=ship > zone=shore: 4MiB | zone=shore<>c: 1MiB")
		s.set("traffic.projects", "mine: 512KiB")
		settle()
		mine, both := ship.to("id-b", transfer.Pull, blob("mine")), ship.to("id-b", transfer.Pull, blob("both"))
		other := ship.to("id-c", transfer.Pull, blob("both"))
		drive([]*load{mine, both, other}, 10*time.Second)
		near(t, "the project", mine.sent, 512<<10*10, 0.1)
		near(t, "the link", total(mine, both, other), 4<<20*10, 0.1)
		// The other way nothing is capped, and between the shores something is.
		back := s.nodes[1].to("id-a", transfer.Pull, blob("both"))
		drive([]*load{back}, time.Second)
		if back.sent < 100<<20 {
			t.Errorf("back to the ship only %d bytes went", back.sent)
		}
		there, and := s.nodes[1].to("id-c", transfer.Pull, blob("both")), s.nodes[2].to("id-b", transfer.Pull, blob("both"))
		drive([]*load{there, and}, 10*time.Second)
		near(t, "both ways", total(there, and), 1<<20*10, 0.15)
	})
}

// between is a load that both ends of a link are asked about, as when nodes trade.
func (s *site) between(from, to *node, c transfer.Class) *load {
	out := transfer.Flow{Blob: transfer.Blob{Digest: blob("x"), Size: 1 << 40}, Peer: to.id, Class: c}
	in := out
	in.Peer = from.id
	sent := false // the piece is on its way, and has to be let in
	return &load{
		take: func(n int) time.Duration {
			if !sent {
				if wait := from.Take(out, n); wait > 0 {
					return wait
				}
				sent = true
			}
			wait := to.Incoming().Take(in, n)
			sent = wait > 0
			return wait
		},
		done: func(n int) { from.Sent(out, n); to.Received(in, n) },
	}
}

// A cap of a link lets through what it says, though both of its ends are nodes that
// know of it.
func TestALinkHasTwoEnds(t *testing.T) {
	bubble(t, 3, func(t *testing.T, s *site) {
		s.set("traffic.links", "zone=ship<>zone=shore: 4MiB")
		settle()
		ship, shore := s.nodes[0], s.nodes[1]
		loads := []*load{s.between(ship, shore, transfer.Pull)}
		drive(loads, 5*time.Second) // they find each other
		drive(loads, 10*time.Second)
		near(t, "one way", total(loads...), 4<<20*10, 0.1)
		loads = append(loads, s.between(shore, ship, transfer.Pull), s.between(s.nodes[2], ship, transfer.Replication))
		drive(loads, 5*time.Second)
		drive(loads, 10*time.Second)
		near(t, "both ways", total(loads...), 4<<20*10, 0.1)
	})
}

// All that enters or leaves a place has a cap; what stays in it has none.
func TestACapOfAPlace(t *testing.T) {
	bubble(t, 3, func(t *testing.T, s *site) {
		s.set("traffic.links", "zone=shore > !zone=shore: 2MiB | !zone=shore > zone=shore: 1MiB")
		settle()
		ship, one, two := s.nodes[0], s.nodes[1], s.nodes[2]
		out := []*load{s.between(one, ship, transfer.Pull), s.between(two, ship, transfer.Pull)}
		in := []*load{s.between(ship, one, transfer.Pull), s.between(ship, two, transfer.Repair)}
		inside := s.between(one, two, transfer.Prefetch)
		drive(append(append(out, in...), inside), 5*time.Second)
		drive(append(append(out, in...), inside), 10*time.Second)
		near(t, "out", total(out...), 2<<20*10, 0.1)
		near(t, "in", total(in...), 1<<20*10, 0.1)
		if inside.sent < 500<<20 {
			t.Errorf("only %d bytes went within the place", inside.sent)
		}
	})
}

// A cap of a link is for all nodes together, also when one of them needs less.
func TestNodesShareACap(t *testing.T) {
	bubble(t, 4, func(t *testing.T, s *site) {
		s.set("traffic.site", "12MiB")
		settle()
		loads := make([]*load, 4)
		for i, n := range s.nodes {
			loads[i] = n.to("somebody", transfer.Pull, blob("x"))
		}
		drive(loads[:1], 5*time.Second)
		near(t, "one node", total(loads[:1]...), 12<<20*5, 0.1)
		drive(loads, 5*time.Second) // they find each other
		drive(loads, 10*time.Second)
		near(t, "four nodes", total(loads...), 12<<20*10, 0.1)
		for i, l := range loads {
			near(t, fmt.Sprintf("node %d", i), l.sent, 3<<20*10, 0.15)
		}
		// One needs a tenth of its part; the others have the rest.
		slow := &load{take: func(n int) time.Duration {
			pass(800 * time.Millisecond)
			return s.nodes[0].Take(transfer.Flow{Peer: "p"}, n)
		}}
		drive(append(loads[1:], slow), 5*time.Second)
		drive(append(loads[1:], slow), 10*time.Second)
		near(t, "with a slow one", total(append(loads[1:], slow)...), 12<<20*10, 0.1)
	})
}

// A user's cap is for all clients of that user, on all nodes.
func TestUsersHaveCaps(t *testing.T) {
	bubble(t, 2, func(t *testing.T, s *site) {
		s.set("traffic.users", "ann: 2MiB | robot$ci: 1MiB")
		settle()
		client := func(n *node, user, address string) *load {
			a, err := n.Begin(t.Context(), Content{Digest: blob("x"), Size: 1 << 40, Project: "library", Repository: "app", User: user, Client: user + "@" + address})
			if err != nil {
				t.Fatal(err)
			}
			return &load{take: a.Take}
		}
		ann := []*load{client(s.nodes[0], "ann", "192.0.2.1"), client(s.nodes[0], "ann", "192.0.2.2"), client(s.nodes[1], "ann", "192.0.2.3")}
		robot, bob := client(s.nodes[1], "robot$ci", "192.0.2.4"), client(s.nodes[1], "bob", "192.0.2.4")
		all := append(ann, robot, bob)
		drive(all, 5*time.Second) // the nodes find each other
		drive(all, 10*time.Second)
		near(t, "ann", total(ann...), 2<<20*10, 0.1)
		near(t, "the robot", robot.sent, 1<<20*10, 0.1)
		if bob.sent < 500<<20 {
			t.Errorf("only %d bytes went to one without a cap", bob.sent)
		}
		if held := s.nodes[0].View(t.Context()).Transfers; len(held) == 0 || held[len(held)-1].HeldBack != "user ann" {
			t.Errorf("shown: %+v", held)
		}
	})
}

func TestIncomingIsCapped(t *testing.T) {
	bubble(t, 2, func(t *testing.T, s *site) {
		s.set("traffic.node-in", "4MiB")
		settle()
		limiter := s.nodes[0].Incoming()
		f := func(peer string) *load {
			flow := transfer.Flow{Blob: transfer.Blob{Digest: blob("x"), Size: 1 << 40}, Peer: peer}
			return &load{take: func(n int) time.Duration { return limiter.Take(flow, n) }, done: func(n int) { s.nodes[0].Received(flow, n) }}
		}
		loads := []*load{f("id-b"), f("id-c"), s.nodes[0].to("id-b", transfer.Pull, blob("x"))}
		drive(loads, 10*time.Second)
		near(t, "asked for", total(loads[:2]...), 4<<20*10, 0.1)
		if loads[2].sent < 100<<20 {
			t.Errorf("what goes out was held back: %d bytes", loads[2].sent)
		}
	})
}

// The clock of the wall may jump: the rate stays, and only the hours change.
func TestClockJumps(t *testing.T) {
	bubble(t, 2, func(t *testing.T, s *site) {
		s.set("traffic.node", "2MiB")
		settle()
		l := s.nodes[0].to("id-b", transfer.Pull, blob("x"))
		for _, at := range []time.Time{time.Unix(0, 0), time.Date(2038, 1, 19, 3, 14, 8, 0, time.UTC), time.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC)} {
			s.mu.Lock()
			s.wall = func() time.Time { return at }
			s.mu.Unlock()
			drive([]*load{l}, 5*time.Second)
			near(t, at.String(), l.sent, 2<<20*5, 0.1)
		}
	})
}
