package gossip_test

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/cluster/clustertest"
	"github.com/atoll-registry/atoll/cluster/gossip"
)

// site is some nodes that do nothing but gossip.
type site struct {
	t       *testing.T
	network *clustertest.Network
	members []gossip.Member
	nodes   []*node
}

type node struct {
	*gossip.Gossip
	gossip.Member
	host     clustertest.Bare
	registry *prometheus.Registry
	cancel   context.CancelFunc
	done     chan error

	mu   sync.Mutex
	hint string
}

func (n *node) says(hint string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hint = hint
}

func newSite(t *testing.T, nodes int) *site {
	s := &site{t: t, network: clustertest.NewNetwork()}
	for i := range nodes {
		s.members = append(s.members, gossip.Member{ID: fmt.Sprintf("node-%d", i), Addr: fmt.Sprintf("10.0.0.%d:5001", i)})
	}
	for _, m := range s.members {
		s.nodes = append(s.nodes, s.start(m))
	}
	t.Cleanup(func() {
		for _, n := range s.nodes {
			n.stop()
		}
	})
	return s
}

func (s *site) start(m gossip.Member) *node {
	s.t.Helper()
	n := &node{Member: m, host: s.network.Bare(m.ID, m.Addr), registry: prometheus.NewRegistry(), done: make(chan error, 1)}
	log := slog.New(slog.DiscardHandler)
	if os.Getenv("ATOLL_TEST_LOG") != "" {
		log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("self", m.ID)
	}
	var err error
	n.Gossip, err = gossip.New(gossip.Config{
		Self: m.ID, Network: n.host, Log: log, Registry: n.registry,
		Hint: func() []byte {
			n.mu.Lock()
			defer n.mu.Unlock()
			return []byte(n.hint)
		},
	})
	if err != nil {
		s.t.Fatal(err)
	}
	n.Follow(s.members)
	ctx, cancel := context.WithCancel(context.WithoutCancel(s.t.Context()))
	n.cancel = cancel
	go func() { n.done <- n.Run(ctx) }()
	return n
}

// stop ends the node in order.
func (n *node) stop() {
	n.cancel()
	n.done <- <-n.done
}

// kill ends it as a power cut does.
func (n *node) kill() {
	n.host.Kill()
	n.stop()
}

// await waits until ok, for so long at most, and gives the time that it took.
func (s *site) await(what string, atMost time.Duration, ok func() bool) time.Duration {
	s.t.Helper()
	begun := time.Now()
	for !ok() {
		if time.Since(begun) > atMost {
			s.views()
			s.t.Fatalf("waited %v in vain: %s", atMost, what)
		}
		pass(10 * time.Millisecond) // of the bubble's time
	}
	return time.Since(begun)
}

// views logs what every node sees.
func (s *site) views() {
	for _, n := range s.nodes {
		for _, m := range s.members {
			s.t.Logf("%s sees %s %s", n.ID, m.ID, n.State(m.ID))
		}
	}
}

// see reports whether all nodes but one see another in a state.
func (s *site) see(of *node, want gossip.State, not ...*node) bool {
	for _, n := range s.nodes {
		skip := n == of
		for _, x := range not {
			skip = skip || n == x
		}
		if !skip && n.State(of.ID) != want {
			return false
		}
	}
	return true
}

func (s *site) allUp() bool {
	for _, n := range s.nodes {
		if !s.see(n, gossip.Up) {
			return false
		}
	}
	return true
}

// stays holds that ok is true for all of a time.
func (s *site) stays(what string, d time.Duration, ok func() bool) {
	s.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); pass(10 * time.Millisecond) {
		if !ok() {
			s.views()
			s.t.Fatalf("%v before the end, not for long: %s", time.Until(end), what)
		}
	}
}

// pass lets time of the bubble pass.
func pass(d time.Duration) { <-time.After(d) }

// meanwhile runs a test in a bubble, where seconds cost nothing.
func meanwhile(t *testing.T, nodes int, test func(t *testing.T, s *site)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, nodes)
		s.await("all see each other", 10*time.Second, s.allUp)
		test(t, s)
	})
}

// TestKilled: who is killed is missed within five seconds, in the middle, and by
// everybody; a new process under the id is seen at once.
func TestKilled(t *testing.T) {
	for _, nodes := range []int{2, 3, 5, 7} {
		t.Run(fmt.Sprint(nodes), func(t *testing.T) {
			var sum time.Duration
			const rounds = 12
			meanwhile(t, nodes, func(t *testing.T, s *site) {
				for range rounds {
					// Long enough to forget that probes failed: a node alone with a dead
					// one cannot tell which of them is ill, and probes more slowly.
					pass(30 * time.Second)
					dead, killed := s.nodes[1], time.Now()
					dead.kill()
					s.await("it is missed", 10*time.Second, func() bool { return s.see(dead, gossip.Down) })
					took := time.Since(killed)
					sum += took
					if at, ok := s.nodes[0].DownSince(dead.ID); !ok || time.Since(at) > took {
						t.Errorf("down since %v, %v", at, ok)
					}
					s.nodes[1] = s.start(dead.Member)
					s.await("it is back", 10*time.Second, s.allUp)
				}
			})
			mean := sum / rounds
			t.Logf("%d nodes: missed after %v", nodes, mean)
			if mean > 5*time.Second {
				t.Errorf("a killed node is missed after %v, five seconds are the goal", mean)
			}
		})
	}
}

// TestLeaves: who stops in order is missed at once.
func TestLeaves(t *testing.T) {
	meanwhile(t, 3, func(t *testing.T, s *site) {
		s.nodes[2].stop()
		if took := s.await("it is missed", 10*time.Second, func() bool { return s.see(s.nodes[2], gossip.Down) }); took > time.Second {
			t.Errorf("missed after %v", took)
		}
		s.nodes[2] = s.start(s.nodes[2].Member)
		s.await("it is back", 10*time.Second, s.allUp)
	})
}

// TestPaused: a node that stands still for two seconds is not missed, one for ten
// seconds is, and both are back at once.
func TestPaused(t *testing.T) {
	meanwhile(t, 3, func(t *testing.T, s *site) {
		isolate := func(do func(a, b string)) {
			do(s.members[2].Addr, s.members[0].Addr)
			do(s.members[2].Addr, s.members[1].Addr)
		}
		paused := s.nodes[2]
		for range 5 {
			isolate(s.network.Cut)
			for end := time.Now().Add(2 * time.Second); time.Now().Before(end); pass(10 * time.Millisecond) {
				for _, n := range s.nodes[:2] {
					if n.State(paused.ID) == gossip.Down {
						t.Fatal("a short pause counts as an end")
					}
				}
			}
			isolate(s.network.Heal)
			s.await("all is well", 5*time.Second, s.allUp)
			pass(10 * time.Second) // until nobody remembers
		}
		isolate(s.network.Cut)
		s.await("it is suspected", 5*time.Second, func() bool { return s.nodes[0].State(paused.ID) == gossip.Suspect })
		s.await("each misses the other", 10*time.Second, func() bool {
			return s.see(paused, gossip.Down) && paused.State(s.members[0].ID) == gossip.Down && paused.State(s.members[1].ID) == gossip.Down
		})
		isolate(s.network.Heal)
		s.await("all is well", 10*time.Second, s.allUp)
		s.stays("nobody is missed", 30*time.Second, s.allUp)
	})
}

// TestPausedAgainAndAgain: two of five nodes are out of reach for a while again and
// again, at moments of their own, as on machines that have too much to do. They come
// back each time with what they took for the end of the others, who deny it: nobody
// who is there is missed for longer than that takes, nobody at all when it is over,
// and no storm comes of it.
func TestPausedAgainAndAgain(t *testing.T) {
	meanwhile(t, 5, func(t *testing.T, s *site) {
		const length = 4 * time.Minute
		sent := func() (sum float64) {
			for _, n := range s.nodes {
				sum += n.sum(t, "atoll_gossip_sent_bytes_total")
			}
			return sum
		}
		quiet := sent()
		pass(time.Minute)
		quiet = (sent() - quiet) / 60
		paused := s.nodes[3:]
		over := make(chan struct{})
		var pausing sync.WaitGroup
		for i, n := range paused {
			dice := rand.New(rand.NewPCG(uint64(i), 7))
			pausing.Go(func() {
				for {
					s.apart(n, s.network.Cut)
					pass(time.Duration(dice.IntN(8000)) * time.Millisecond)
					s.apart(n, s.network.Heal)
					select {
					case <-over:
						return
					case <-time.After(time.Duration(500+dice.IntN(4000)) * time.Millisecond):
					}
				}
			})
		}
		before, flaps, longest := sent(), 0, time.Duration(0)
		since := map[[2]string]time.Time{} // a node takes one that is there for dead
		for end := time.Now().Add(length); time.Now().Before(end); pass(20 * time.Millisecond) {
			for _, a := range s.nodes[:3] {
				for _, b := range s.nodes[:3] {
					pair := [2]string{a.ID, b.ID}
					at, missed := since[pair]
					switch down := a.State(b.ID) == gossip.Down; {
					case down && !missed:
						since[pair], flaps = time.Now(), flaps+1
					case !down && missed:
						longest = max(longest, time.Since(at))
						delete(since, pair)
					}
				}
			}
		}
		storm := (sent() - before) / length.Seconds()
		t.Logf("nodes that are there were missed %d times in %v, for %v at most; %.0f bytes a second, %.0f while all is well", flaps, length, longest, storm, quiet)
		for pair, at := range since {
			longest = max(longest, time.Since(at))
			t.Logf("%s misses %s", pair[0], pair[1])
		}
		if longest > 3*time.Second {
			t.Errorf("one that is there was missed for %v", longest)
		}
		if storm > 10*quiet {
			t.Error("that is a storm")
		}
		close(over)
		pausing.Wait()
		s.await("all is well", 15*time.Second, s.allUp)
		s.stays("nobody is missed", 2*time.Minute, s.allUp)
	})
}

// apart does something to all links of a node.
func (s *site) apart(n *node, do func(a, b string)) {
	for _, m := range s.members {
		if m.ID != n.ID {
			do(n.Addr, m.Addr)
		}
	}
}

// TestOneWay: where packets are lost between two in one direction, the others vouch
// for both; the one who cannot reach the other knows that much.
func TestOneWay(t *testing.T) {
	meanwhile(t, 3, func(t *testing.T, s *site) {
		a, b, c := s.nodes[0], s.nodes[1], s.nodes[2]
		s.network.CutOneWay(a.Addr, b.Addr)
		s.await("a cannot reach b", 5*time.Second, func() bool { return a.State(b.ID) == gossip.Suspect })
		s.stays("nobody counts as down", time.Minute, func() bool {
			return a.State(b.ID) != gossip.Down && b.State(a.ID) != gossip.Down && c.State(a.ID) == gossip.Up && c.State(b.ID) == gossip.Up
		})
		if a.State(b.ID) != gossip.Suspect {
			t.Errorf("b is %s for a", a.State(b.ID))
		}
		s.network.Heal(a.Addr, b.Addr)
		s.await("all is well", 10*time.Second, s.allUp)
	})
}

// TestPartition: each side misses the other, for longer than anybody is remembered,
// and both find together again.
func TestPartition(t *testing.T) {
	meanwhile(t, 5, func(t *testing.T, s *site) {
		cross := func(do func(a, b string)) {
			for _, a := range s.members[:2] {
				for _, b := range s.members[2:] {
					do(a.Addr, b.Addr)
				}
			}
		}
		for _, length := range []time.Duration{10 * time.Second, 10 * time.Minute} {
			cross(s.network.Cut)
			s.await("the sides miss each other", 20*time.Second, func() bool {
				for i, n := range s.nodes {
					for j, m := range s.members {
						if want := map[bool]gossip.State{true: gossip.Up, false: gossip.Down}[(i < 2) == (j < 2)]; n.State(m.ID) != want {
							return false
						}
					}
				}
				return true
			})
			pass(length)
			cross(s.network.Heal)
			s.await("they find together", 15*time.Second, s.allUp)
		}
	})
}

// TestMoved: a node that comes back at another address is found there.
func TestMoved(t *testing.T) {
	meanwhile(t, 3, func(t *testing.T, s *site) {
		s.nodes[1].kill()
		s.await("it is missed", 10*time.Second, func() bool { return s.see(s.nodes[1], gossip.Down) })
		s.members[1].Addr = "10.0.1.1:5001"
		s.nodes[1] = s.start(s.members[1])
		for _, n := range s.nodes {
			n.Follow(s.members)
		}
		s.await("it is found", 10*time.Second, s.allUp)
	})
}

// TestRemoved: who is no member any more is nobody, whatever others say of it.
func TestRemoved(t *testing.T) {
	meanwhile(t, 4, func(t *testing.T, s *site) {
		gone := s.nodes[3]
		left := s.members[:3]
		// Node 2 has not heard of the removal and goes on telling of the node.
		s.nodes[0].Follow(left)
		s.nodes[1].Follow(left)
		s.stays("it does not come back", 2*time.Minute, func() bool {
			return s.nodes[0].State(gone.ID) == gossip.Down && s.nodes[1].State(gone.ID) == gossip.Down
		})
		if s.nodes[2].State(gone.ID) == gossip.Down {
			t.Error("it does not even try")
		}
		// The others are none the worse for it.
		for _, n := range s.nodes[:3] {
			for _, m := range left {
				if n.State(m.ID) == gossip.Down {
					t.Errorf("%s is down for %s", m.ID, n.ID)
				}
			}
		}
	})
}

// TestHint: what a node says of itself is everywhere at once, and only then is
// anybody woken.
func TestHint(t *testing.T) {
	meanwhile(t, 5, func(t *testing.T, s *site) {
		for _, n := range s.nodes {
			drain(n)
		}
		s.nodes[0].says("v2")
		took := s.await("all have heard", 5*time.Second, func() bool {
			for _, n := range s.nodes[1:] {
				if string(n.Hint(s.members[0].ID)) != "v2" {
					return false
				}
			}
			return true
		})
		if took > 2*time.Second {
			t.Errorf("it took %v", took)
		}
		for _, n := range s.nodes[1:] {
			select {
			case <-n.Changed():
			default:
				t.Errorf("%s was not woken", n.ID)
			}
		}
	})
}

func drain(n *node) {
	select {
	case <-n.Changed():
	default:
	}
}

// processor is the time that this process took of it.
func processor(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// sum of a counter's values.
func (n *node) sum(t *testing.T, name string) (sum float64) {
	t.Helper()
	families, err := n.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

// TestIdle: what a site costs while nothing happens, of the network and of the
// processor; the latter without TLS, which scripts/e2e measures with all else.
func TestIdle(t *testing.T) {
	meanwhile(t, 3, func(t *testing.T, s *site) {
		pass(time.Minute)
		total := func() (sum float64) {
			for _, n := range s.nodes {
				sum += n.sum(t, "atoll_gossip_sent_bytes_total")
			}
			return sum
		}
		before, used := total(), processor(t)
		pass(10 * time.Minute)
		share := (processor(t) - used).Seconds() / 600 / 3
		t.Logf("%.2f %% of a processor for each node", 100*share)
		if share > 0.01 {
			t.Error("an idle site is not idle")
		}
		perPair := (total() - before) / 600 / 3
		t.Logf("%.0f bytes a second between two nodes, without TLS and TCP", perPair)
		if perPair > 512 || perPair < 10 {
			t.Error("that is not gentle, or not measured")
		}
		for _, n := range s.nodes {
			if dropped := n.sum(t, "atoll_gossip_dropped_total"); dropped > 20 {
				t.Errorf("%s dropped %v", n.ID, dropped)
			}
		}
	})
}
