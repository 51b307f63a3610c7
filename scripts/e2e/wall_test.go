package e2e

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// walled is a site of three whose third node is behind a firewall that lets nothing in.
// A blob has one copy here, so that whoever serves it is known.
func walled(ctx context.Context, t *testing.T, name string, net int, blocked string) *site {
	t.Helper()
	s := newSite(ctx, t, newLab(t), plan{name: name, net: net, nodes: 3, host: func(i int, h *lab.Host) error {
		if blocked != "" {
			if err := h.Block(ctx, blocked, "5001"); err != nil {
				return err
			}
		}
		if i == 3 {
			return h.Wall(ctx)
		}
		return nil
	}})
	s.allUp(ctx)
	s.atoll(ctx, s.nodes[0], "settings", "set", "peers.replicas", "1")
	s.atoll(ctx, s.nodes[0], "settings", "set", "peers.durability", "1")
	return s
}

// moves pushes to one node and pulls from others.
func (s *site) moves(ctx context.Context, from int, tag string, to ...int) {
	s.t.Helper()
	img := image(ctx, s.t, 4<<20)
	s.pushAll(ctx, s.nodes[from], img, "library/walled", tag)
	for _, i := range to {
		if got := s.pullAll(ctx, s.nodes[i], "walled:"+tag); got != img.Index.String() {
			s.t.Fatalf("%s serves %s, want %s", s.nodes[i].Host.Name, got, img.Index)
		}
	}
}

// A node that can only dial out is a member like others: it holds and serves, fetches,
// votes and is led, by either engine, also when the leader is killed.
func TestNodeThatOnlyDialsOut(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, blocked string
		net           int
	}{
		{"wb", "", 111},
		{"wt", "udp", 112},
		{"wu", "tcp", 113},
	} {
		t.Run("without_"+c.blocked, func(t *testing.T) {
			t.Parallel()
			ctx := deadline(t, 5*time.Minute)
			s := walled(ctx, t, c.name, c.net, c.blocked)
			for _, engine := range []string{"stream", "bittorrent"} {
				s.atoll(ctx, s.nodes[0], "settings", "set", "peers.transfer-engine", engine)
				s.moves(ctx, 2, engine+"-out", 0, 1)
				s.moves(ctx, 0, engine+"-in", 2)
			}
			leader := s.leads(ctx)
			if leader == 2 {
				t.Fatal("the walled node leads before anything happened")
			}
			s.nodes[leader].Kill()
			other := 1 - leader
			begun := time.Now()
			if err := s.nodes[other].WaitStatus(ctx, "a new leader", func(st lab.Status) bool {
				return st.Quorum && st.Leader != "" && st.Leader != s.nodes[leader].Host.Name
			}); err != nil {
				t.Fatal(err)
			}
			t.Logf("a new leader after %v", time.Since(begun).Round(100*time.Millisecond))
			s.moves(ctx, 2, "after-out", other)
			s.moves(ctx, other, "after-in", 2)
			if err := s.nodes[leader].Start(ctx); err != nil {
				t.Fatal(err)
			}
			s.allUp(ctx)
			s.moves(ctx, 2, "again", 0, 1)
		})
	}
}

// leads is the index of the node that leads.
func (s *site) leads(ctx context.Context) int {
	s.t.Helper()
	st, err := s.nodes[0].Status(ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, n := range st.Nodes {
		for i, node := range s.nodes {
			if n.Leader && n.Name == node.Host.Name {
				return i
			}
		}
	}
	s.t.Fatalf("nobody leads: %+v", st)
	return 0
}

// A firewall that comes while the nodes run, and goes: callbacks come and go with it. The
// doctor of each end says which way things go.
func TestWallThatComes(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 5*time.Minute)
	s := newSite(ctx, t, newLab(t), plan{name: "wc", net: 114, nodes: 3})
	s.trade(ctx, "before")
	for _, node := range s.nodes { // through a firewall that has seen a packet go out QUIC gets in
		if err := node.Host.Block(ctx, "udp", "5001"); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.nodes[2].Host.Wall(ctx); err != nil {
		t.Fatal(err)
	}
	// What is open stays open behind such a wall; a restart closes it.
	s.nodes[0].Kill()
	if err := s.nodes[0].Start(ctx); err != nil {
		t.Fatal(err)
	}
	s.allUp(ctx)
	s.trade(ctx, "behind")
	said := func(node int, check string) string {
		t.Helper()
		out, err := s.nodes[node].Atoll(ctx, "doctor", "--format", "json")
		var report struct {
			Findings []struct{ Check, State, Peer, Text string }
		}
		if jsonErr := json.Unmarshal([]byte(out), &report); jsonErr != nil {
			t.Fatalf("%v, %v: %s", jsonErr, err, out)
		}
		for _, f := range report.Findings {
			if f.Check == check && f.Peer == s.nodes[2-node].Host.Name {
				return f.State + ": " + f.Text
			}
		}
		return ""
	}
	if text := said(0, "reach"); !strings.HasPrefix(text, "warn") || !strings.Contains(text, "cannot be dialled") {
		t.Errorf("outside, the doctor says %q", text)
	}
	if text := said(0, "clock"); !strings.HasPrefix(text, "ok") {
		t.Errorf("outside, the doctor says %q of the clocks", text)
	}
	if text := said(2, "reached"); !strings.HasPrefix(text, "warn") || !strings.Contains(text, "connections that this node opens") {
		t.Errorf("inside, the doctor says %q", text)
	}
}
