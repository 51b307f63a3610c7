package e2e

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// allUp waits until every node of the site sees all of them up, with a leader.
func (s *site) allUp(ctx context.Context) {
	s.t.Helper()
	for _, node := range s.nodes {
		if err := node.WaitStatus(ctx, "all to be up", func(st lab.Status) bool {
			up := 0
			for _, n := range st.Nodes {
				if n.Up {
					up++
				}
			}
			return up == len(s.nodes) && st.Quorum && st.Leader != ""
		}); err != nil {
			s.t.Fatal(err)
		}
	}
}

// trade pushes an image to one node, which counts as done when two hold it, and
// pulls it from the others.
func (s *site) trade(ctx context.Context, tag string) {
	s.t.Helper()
	img := image(ctx, s.t, 8<<20)
	s.pushAll(ctx, s.nodes[0], img, "library/carried", tag)
	for _, node := range s.nodes[1:] {
		if got := s.pullAll(ctx, node, "carried:"+tag); got != img.Index.String() {
			s.t.Fatalf("%s serves %s, want %s", node.Host.Name, got, img.Index)
		}
	}
}

func (s *site) blockPeers(ctx context.Context, protocol string) (unblock func()) {
	s.t.Helper()
	for _, node := range s.nodes {
		if err := node.Host.Block(ctx, protocol, "5001"); err != nil {
			s.t.Fatal(err)
		}
	}
	return func() {
		s.t.Helper()
		for _, node := range s.nodes {
			if err := node.Host.Unblock(ctx, protocol, "5001"); err != nil {
				s.t.Fatal(err)
			}
		}
	}
}

// withoutTCP waits until the nodes have given up their connections over TCP, which
// takes as long as it takes to notice that one on which nothing happens is dead.
func (s *site) withoutTCP(ctx context.Context) {
	s.t.Helper()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for _, node := range s.nodes {
		for {
			open, err := node.Host.Run(ctx, "ss", "-Htn", "state", "established", "( dport = :5001 or sport = :5001 )")
			if err != nil {
				s.t.Fatal(err)
			}
			if open == "" {
				break
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				s.t.Fatalf("%s keeps connections:\n%s", node.Host.Name, open)
			}
		}
	}
}

// A site whose nodes use QUIC alone, with TCP between them blocked all the while.
func TestSiteOverQUIC(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 4*time.Minute)
	s := newSite(ctx, t, newLab(t), plan{name: "u", net: 81, nodes: 3, args: []string{"--peer-transport", "quic"}})
	s.blockPeers(ctx, "tcp")
	s.trade(ctx, "quic")
	// One that is killed and comes back is a member as before.
	s.nodes[2].Kill()
	if err := s.nodes[2].Start(ctx); err != nil {
		t.Fatal(err)
	}
	s.allUp(ctx)
	s.trade(ctx, "again")
}

// A firewall that drops TCP or UDP between nodes while they run: the other carries all.
func TestEitherCarrierIsEnough(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 4*time.Minute)
	s := newSite(ctx, t, newLab(t), plan{name: "v", net: 82, nodes: 3})
	s.trade(ctx, "both")
	unblock := s.blockPeers(ctx, "udp")
	s.allUp(ctx)
	s.trade(ctx, "tcp")
	unblock()
	unblock = s.blockPeers(ctx, "tcp")
	s.withoutTCP(ctx)
	s.allUp(ctx)
	s.trade(ctx, "udp")
	unblock()
	s.trade(ctx, "again")
}

// The doctor says which carrier does not get through, which way, and what to open.
func TestDoctorFindsWhatIsBlocked(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 4*time.Minute)
	s := newSite(ctx, t, newLab(t), plan{name: "w", net: 83, nodes: 2})
	type finding struct{ Check, State, Peer, Text, Remedy string }
	// What is said of the ways to and from the second node.
	ways := func() map[string]finding {
		t.Helper()
		// A bad finding is an exit code, and the report is there all the same.
		out, err := s.nodes[0].Atoll(ctx, "doctor", "--format", "json")
		var report struct{ Findings []finding }
		if jsonErr := json.Unmarshal([]byte(out), &report); jsonErr != nil {
			t.Fatalf("%v, %v: %s", jsonErr, err, out)
		}
		found := map[string]finding{}
		for _, f := range report.Findings {
			if f.Peer == s.nodes[1].Host.Name {
				found[f.Check] = f
			}
			if (err != nil) != slices.ContainsFunc(report.Findings, func(f finding) bool { return f.State == "bad" }) {
				t.Fatalf("%v, but the report is %s", err, out)
			}
		}
		return found
	}
	expect := func(found map[string]finding, want map[string]string) {
		t.Helper()
		for check, state := range want {
			if found[check].State != state {
				t.Errorf("%s is %+v, want %s", check, found[check], state)
			}
		}
	}
	expect(ways(), map[string]string{"reach": "ok", "reached": "ok", "clock": "ok", "transport": "ok", "mtu": "ok"})
	for _, node := range s.nodes {
		if err := node.Host.Block(ctx, "udp", "5001"); err != nil {
			t.Fatal(err)
		}
	}
	found := ways()
	expect(found, map[string]string{"reach": "warn", "reached": "warn", "clock": "ok", "transport": "ok"})
	if !strings.Contains(found["reach"].Remedy, "open the port for UDP") {
		t.Errorf("the remedy is %q", found["reach"].Remedy)
	}
	if err := s.nodes[1].Host.Block(ctx, "tcp", "5001"); err != nil {
		t.Fatal(err)
	}
	expect(ways(), map[string]string{"reach": "bad"})
}
