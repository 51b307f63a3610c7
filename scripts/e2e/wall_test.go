package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// walled is a site of three of which some are behind firewalls of their own that let
// nothing in. A blob has one copy here, so that whoever serves it is known.
func walled(ctx context.Context, t *testing.T, p plan, blocked string, behind ...int) *site {
	t.Helper()
	p.nodes, p.host = 3, func(i int, h *lab.Host) error {
		if blocked != "" {
			if err := h.Block(ctx, blocked, "5001"); err != nil {
				return err
			}
		}
		if slices.Contains(behind, i-1) {
			return h.Wall(ctx)
		}
		return nil
	}
	s := newSite(ctx, t, newLab(t), p)
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
			s := walled(ctx, t, plan{name: c.name, net: c.net}, c.blocked, 2)
			for _, engine := range []string{"stream", "bittorrent"} {
				s.atoll(ctx, s.nodes[0], "settings", "set", "peers.transfer-engine", engine)
				s.moves(ctx, 2, engine+"-out", 0, 1)
				s.moves(ctx, 0, engine+"-in", 2)
			}
			leader := s.leads(ctx)
			if leader == 2 || leader == -1 {
				t.Fatalf("node %d leads before anything happened", leader)
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

// Two nodes of three that can only dial out reach each other: over UDP both ends open the
// firewalls by sending at the same time, and without that through the third. What one
// holds the other serves, and either of them leads the site.
func TestTwoNodesThatOnlyDialOut(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, blocked string
		net           int
	}{
		{"wd", "", 115},
		{"we", "udp", 116},
	} {
		t.Run("without_"+c.blocked, func(t *testing.T) {
			t.Parallel()
			ctx := deadline(t, 4*time.Minute)
			s := walled(ctx, t, plan{name: c.name, net: c.net}, c.blocked, 1, 2)
			for _, engine := range []string{"stream", "bittorrent"} {
				s.atoll(ctx, s.nodes[0], "settings", "set", "peers.transfer-engine", engine)
				s.moves(ctx, 1, engine+"-across", 2)
				s.moves(ctx, 2, engine+"-back", 1)
				s.moves(ctx, 0, engine+"-in", 1, 2)
			}
			if c.blocked != "" { // the node between keeps to its caps in what it passes on
				s.atoll(ctx, s.nodes[0], "settings", "set", "peers.transfer-engine", "auto")
				s.atoll(ctx, s.nodes[0], "settings", "set", "traffic.links", s.nodes[0].Host.Name+">"+s.nodes[2].Host.Name+": 512KiB")
				relayed := func() float64 { return s.metric(ctx, s.nodes[0], "atoll_peernet_relayed_bytes_total") }
				begun, before := time.Now(), relayed()
				s.moves(ctx, 1, "capped-across", 2)
				passed, cap := relayed()-before, 512*1024*time.Since(begun).Seconds()
				t.Logf("%.1f MiB were passed on, %.2f of the cap", passed/(1<<20), passed/cap)
				if passed > 1.1*cap || passed < 1<<20 { // some of it may be at the node between already, which sends it under the same cap
					t.Errorf("%.0f bytes were passed on, the cap allows %.0f", passed, cap)
				}
				s.atoll(ctx, s.nodes[0], "settings", "reset", "traffic.links")
			}
			if n := s.metric(ctx, s.nodes[0], "atoll_peernet_relayed_bytes_total"); c.blocked != "" && n < 4*4<<20 {
				t.Errorf("the node between passed on %.0f bytes", n)
			}
			if said, _ := s.nodes[1].Atoll(ctx, "doctor"); c.blocked != "" && strings.Count(said, "all goes through the node at "+s.nodes[0].PeerAddr()) != 2 {
				t.Errorf("the doctor says %s", said)
			}
			// A leader that nobody can dial reaches all, and all reach it.
			s.atoll(ctx, s.nodes[0], "cluster", "lead", s.nodes[1].Host.Name)
			wait, stop := context.WithTimeout(ctx, 30*time.Second)
			defer stop()
			s.until(wait, "the walled node to lead", func() bool { return s.leads(ctx) == 1 })
			for from := range s.nodes {
				s.moves(ctx, from, fmt.Sprintf("led-from-%d", from), 0, 1, 2)
			}
			s.nodes[1].Kill()
			s.until(ctx, "another to lead", func() bool { return s.leads(ctx) != 1 && s.leads(ctx) != -1 })
			if err := s.nodes[1].Start(ctx); err != nil {
				t.Fatal(err)
			}
			s.allUp(ctx)
			s.moves(ctx, 1, "again", 2)
		})
	}
}

// Machines that are set up alike found a site though one, or two, of them can only dial out.
func TestFoundingBehindWalls(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		net    int
		behind []int
	}{
		{"wf", 117, []int{0}},
		{"wg", 118, []int{0, 2}},
	} {
		t.Run(fmt.Sprintf("%d_of_3", len(c.behind)), func(t *testing.T) {
			t.Parallel()
			ctx := deadline(t, 3*time.Minute)
			l, dir := newLab(t), t.TempDir()
			s := &site{t: t}
			var addrs []string
			for i := range 3 {
				host, err := l.Host(ctx, fmt.Sprintf("%s%d", c.name, i+1), c.name, fmt.Sprintf("10.%d.0.%d/24", c.net, i+1))
				if err == nil {
					err = host.Block(ctx, "udp", "5001")
				}
				if err == nil && slices.Contains(c.behind, i) {
					err = host.Wall(ctx)
				}
				if err != nil {
					t.Fatal(err)
				}
				node := lab.NewNode(host, built.atoll, filepath.Join(dir, host.Name))
				s.nodes, addrs = append(s.nodes, node), append(addrs, node.PeerAddr())
			}
			token := filepath.Join(dir, "token")
			if _, err := s.nodes[0].Bare(ctx, "token", "create", "--bootstrap", "-o", token); err != nil {
				t.Fatal(err)
			}
			started := make(chan error)
			begun := time.Now()
			for _, node := range s.nodes {
				go func() {
					started <- node.Start(ctx, "--join", strings.Join(addrs, ","), "--bootstrap-expect", "3", "--token-file", token)
				}()
			}
			for range s.nodes {
				if err := <-started; err != nil {
					t.Error(err)
				}
			}
			for _, node := range s.nodes {
				t.Cleanup(node.Kill)
			}
			if t.Failed() {
				return
			}
			t.Logf("the site is there after %v", time.Since(begun).Round(100*time.Millisecond))
			var err error
			if s.env, err = lab.Clients(ctx, t.TempDir(), s.nodes...); err != nil {
				t.Fatal(err)
			}
			s.allUp(ctx)
			s.moves(ctx, 0, "one", 1, 2)
			s.moves(ctx, 2, "two", 0, 1)
		})
	}
}

// leads is the index of the node that leads; -1 when none does.
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
	return -1
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
