package clustertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/member"
)

// schedule is a random sequence of faults; all that is random in it follows from
// one seed. What the scheduler of Go does is not random by that seed: a schedule
// that is played again makes the same faults, and nearly the same interleaving.
type schedule struct {
	*rig
	dice *rand.Rand
	deck []int // faults to come
	of   func(*Node) *machine
	made map[string]int

	*tally
}

// tally is what faults that are made at once add to.
type tally struct{ refused atomic.Int64 }

// fault is one way in which a machine or a site is disturbed. It returns when
// what it broke is mended.
type fault struct {
	name string
	make func(s *schedule, ctx context.Context, victim *Node)
	with company
}

// company says which second fault may be made to another node meanwhile.
type company uint8

const (
	alone  company = iota // none
	living                // one that leaves its node running: the first asks it, too
	any2                  // any of the simple ones
)

const (
	behind    = "absence until the log is cut"
	installed = "snapshots installed after it"
	atOnce    = "two at once"
)

var faults = [...]fault{
	{"kill", (*schedule).kill, any2},
	{"partition", (*schedule).partition, any2},
	{"one-way partition", (*schedule).oneWay, any2},
	{"stall", (*schedule).stall, any2},
	{"broken state", (*schedule).breakState, any2},
	{"full log", (*schedule).fillLog, any2},
	{"old clock", (*schedule).oldClock, any2},
	{behind, (*schedule).fallBehind, living},
	{"transfer of the leadership", (*schedule).transfer, living},
	{"drain", (*schedule).drain, living},
	{"join", (*schedule).join, alone},
	{"remove", (*schedule).remove, living},
	{"no quorum", (*schedule).noQuorum, alone},
}

// besides are the faults that are made besides another one; the first of them
// restarts its node.
var besides = faults[:4]

// TestRandomSchedule: registers are linearizable, no acknowledged increment is
// lost or made twice and all replicas are equal in the end, whatever is done to
// four to seven nodes. CHAOS_SEED plays a schedule again, CHAOS_SECONDS plays new ones for
// so long.
func TestRandomSchedule(t *testing.T) {
	rounds := 8
	if testing.Short() {
		rounds = 4
	}
	seed := rand.Uint64()
	if text := os.Getenv("CHAOS_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	seconds, _ := strconv.Atoi(os.Getenv("CHAOS_SECONDS")) // none is one schedule
	if seconds > 0 {
		rounds = 2 * len(faults)
	}
	end := time.Now().Add(time.Duration(seconds) * time.Second)
	total := map[string]int{}
	for schedules := 1; ; schedules++ {
		t.Logf("CHAOS_SEED=%d plays this schedule again", seed)
		synctest.Test(t, func(t *testing.T) { playSchedule(t, seed, rounds, total) })
		if t.Failed() || !time.Now().Before(end) {
			t.Logf("%d schedules, faults: %v", schedules, total)
			if away := total[behind]; away >= 5 && total[installed] == 0 {
				t.Errorf("of %d nodes that were away none was brought up by a snapshot", away)
			}
			return
		}
		seed++
	}
}

func playSchedule(t *testing.T, seed uint64, rounds int, total map[string]int) {
	var mu sync.Mutex
	machines := map[*Node]*machine{}
	of := func(n *Node) *machine {
		mu.Lock()
		defer mu.Unlock()
		if machines[n] == nil {
			machines[n] = &machine{}
		}
		return machines[n]
	}
	s := &schedule{dice: rand.New(rand.NewPCG(seed, 0)), of: of, made: total, tally: &tally{}}
	s.rig = &rig{t: t, mu: make(turn, 1), Cluster: New(t, Options{
		Define: withNotes, Snapshots: member.Snapshots{MinBytes: 64 << 10, TrailingLogs: 16},
		Engine: func(n *Node, e kv.Engine) kv.Engine { return &engine{e, of(n)} },
		Disk:   func(n *Node) member.Disk { return newLogDisk(t, n, of(n)) },
		Clock:  func(n *Node) func() time.Time { return of(n).now },
	})}
	s.open = slices.Clone(s.Grow(4 + s.dice.IntN(3))) // of four and of six one has no vote
	ctx, cancel := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	for id := range 5 {
		clients.Go(func() { s.client(ctx, id, rand.New(rand.NewPCG(seed, uint64(1+id)))) })
	}
	for range rounds {
		s.attack(t.Context())
	}
	cancel()
	clients.Wait()
	s.AwaitVoters(min(5, len(s.open)-1+len(s.open)%2))
	s.judge()
}

// attack makes one fault, to the leader in half of all cases, or two at once to
// different nodes, and lets the site recover for a while. Two of four voters that
// are cut off leave no quorum until one is back.
func (s *schedule) attack(ctx context.Context) {
	if len(s.deck) == 0 {
		s.deck = s.dice.Perm(len(faults)) // each comes before one comes again
	}
	f := faults[s.deck[0]]
	s.deck = s.deck[1:]
	victim := s.pick()
	if s.dice.IntN(2) == 0 {
		for _, n := range s.open {
			if n.Leader() == n.Self() {
				victim = n
			}
		}
	}
	s.t.Logf("%s: %s", f.name, victim.Name)
	s.made[f.name]++
	var second sync.WaitGroup
	if other := s.pick(); f.with != alone && other != victim && s.dice.IntN(2) == 0 {
		may := besides[:]
		if f.with == living {
			may = may[1:]
		}
		g := may[s.dice.IntN(len(may))]
		s.t.Logf("and %s: %s", g.name, other.Name)
		s.made[g.name]++
		s.made[atOnce]++
		own := *s // with dice of its own, so that the schedule follows from the seed
		own.dice = rand.New(rand.NewPCG(s.dice.Uint64(), 0))
		second.Go(func() {
			own.wait(ctx, 3*time.Second)
			g.make(&own, ctx, other)
		})
	}
	f.make(s, ctx, victim)
	second.Wait()
	s.wait(ctx, 4*time.Second)
}

func (s *schedule) pick() *Node {
	nodes := s.nodes()
	return nodes[s.dice.IntN(len(nodes))]
}

// nodes are those that are open now.
func (s *schedule) nodes() []*Node {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.open)
}

// wait waits for a random while.
func (s *schedule) wait(ctx context.Context, atMost time.Duration) {
	t := time.NewTimer(time.Duration(s.dice.Int64N(int64(atMost))))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// start starts the next run of a node.
func (s *schedule) start(n *Node) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n.Start()
}

func (s *schedule) kill(ctx context.Context, victim *Node) {
	victim.Kill()
	s.wait(ctx, 9*time.Second)
	s.start(victim)
}

func (s *schedule) partition(ctx context.Context, victim *Node) {
	s.Isolate(victim)
	s.wait(ctx, 9*time.Second)
	s.Rejoin(victim)
}

func (s *schedule) oneWay(ctx context.Context, victim *Node) {
	for _, n := range s.nodes() {
		if n != victim && s.dice.IntN(2) == 0 {
			s.Network.CutOneWay(victim.Addr, n.Addr)
		} else if n != victim {
			s.Network.CutOneWay(n.Addr, victim.Addr)
		}
	}
	s.wait(ctx, 9*time.Second)
	s.Rejoin(victim)
}

// stall is as near to a pause as one process comes: nothing leaves the node or
// reaches it, and its state does not move. Its timers go on; scripts/chaos stops
// whole processes.
func (s *schedule) stall(ctx context.Context, victim *Node) {
	s.Isolate(victim)
	release := s.of(victim).hang()
	s.wait(ctx, 9*time.Second)
	release()
	s.Rejoin(victim)
}

// breakState makes a commit of the state fail, before or after it has happened.
// The node has to end by itself, and to agree with the others when it is back.
func (s *schedule) breakState(ctx context.Context, victim *Node) {
	b := &broken{err: []error{errFull, errBroken}[s.dice.IntN(2)], after: s.dice.IntN(2) == 0}
	s.of(victim).breakNext(b)
	limit := time.NewTimer(20 * time.Second)
	defer limit.Stop()
	select {
	case err := <-victim.done:
		victim.done <- nil // for Stop
		if !errors.Is(err, kv.ErrHalted) || !errors.Is(err, b.err) {
			s.t.Errorf("%s, whose state cannot be written, ended with: %v", victim.Name, err)
		}
		victim.Kill()
		s.wait(ctx, 3*time.Second)
		s.start(victim)
	case <-limit.C:
		if !s.of(victim).mend() {
			s.t.Errorf("%s goes on although its state could not be written", victim.Name)
		}
	}
}

// fillLog lets a node's log take no entry for a while.
func (s *schedule) fillLog(ctx context.Context, victim *Node) {
	s.of(victim).full.Store(true)
	s.wait(ctx, 6*time.Second)
	s.of(victim).full.Store(false)
}

// oldClock starts a node with a clock that stands up to two years back. It stays
// wrong until the next old clock.
func (s *schedule) oldClock(ctx context.Context, victim *Node) {
	victim.Kill()
	for _, n := range s.nodes() {
		s.of(n).back.Store(0)
	}
	s.of(victim).back.Store(s.dice.Int64N(int64(2 * 365 * 24 * time.Hour)))
	s.wait(ctx, 5*time.Second)
	s.start(victim)
}

// fallBehind keeps a node away until the others have forgotten what it needs.
func (s *schedule) fallBehind(ctx context.Context, victim *Node) {
	restored := s.of(victim).restored.Load()
	victim.Kill()
	text := make([]byte, 4<<10)
	written := 0
	for i := range 80 {
		for j := range text {
			text[j] = 'a' + byte(s.dice.IntN(26))
		}
		via := s.pick()
		if via == victim {
			continue
		}
		op, cancel := context.WithTimeout(ctx, 5*time.Second)
		if via.write(op, fmt.Sprint("bulk", i%8), string(text)) == nil {
			written++
		}
		cancel()
	}
	s.wait(ctx, 5*time.Second)
	s.start(victim)
	if written < 40 {
		return // there was no leader for long
	}
	limit := time.NewTimer(30 * time.Second)
	defer limit.Stop()
	for s.of(victim).restored.Load() == restored {
		select {
		case <-limit.C:
			s.t.Logf("%s needed no snapshot", victim.Name)
			return
		default:
			s.wait(ctx, time.Second)
		}
	}
	s.made[installed]++
}

func (s *schedule) transfer(ctx context.Context, victim *Node) {
	s.may(s.pick().Lead(ctx, victim.Self()), member.ErrNoVote)
}

func (s *schedule) drain(ctx context.Context, victim *Node) {
	id := victim.Self()
	s.may(s.pick().Drain(ctx, id, false), member.ErrQuorum)
	s.wait(ctx, 9*time.Second)
	// It must be ended, else there are too few voters for what comes.
	s.Await("the drain of "+victim.Name+" is ended", func() bool { return s.pick().Drain(ctx, id, true) == nil })
}

// join adds a node while the load goes on.
func (s *schedule) join(ctx context.Context, via *Node) {
	if len(s.open) >= 7 {
		return
	}
	token, err := via.CreateToken(ctx, time.Hour, 1)
	if err != nil {
		s.may(err)
		return
	}
	n := s.NewNode()
	if err := n.JoinWith(token, via.Addr); err != nil {
		s.may(err, member.ErrUnreachable)
		return
	}
	n.Start()
	s.mu.Lock()
	s.open = append(s.open, n)
	s.mu.Unlock()
}

// remove takes a node out of the site for good, down to four.
func (s *schedule) remove(ctx context.Context, victim *Node) {
	if len(s.open) <= 4 {
		return
	}
	id, via := victim.Self(), s.pick()
	if err := via.Remove(ctx, id); err != nil {
		s.may(err, member.ErrQuorum)
		return
	}
	s.mu.Lock()
	s.open = slices.DeleteFunc(s.open, func(n *Node) bool { return n == victim })
	s.mu.Unlock()
	if err := victim.ends(); !errors.Is(err, member.ErrRemoved) {
		s.t.Errorf("%s, which was removed, ended with: %v", victim.Name, err)
	}
}

// noQuorum parts every node from every other. What the victim knows can be read,
// and is said to be stale; nothing is acknowledged.
func (s *schedule) noQuorum(ctx context.Context, victim *Node) {
	all := s.nodes()
	for _, n := range all {
		s.Isolate(n)
	}
	defer func() {
		for _, n := range all {
			s.Rejoin(n)
		}
	}()
	// One that knows no leader may have the votes to become it, and be it until its lease ends.
	<-time.After(5 * time.Second)
	s.Await(victim.Name+", alone, knows no leader", func() bool { return victim.Leader() == "" })
	op, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if _, fresh, err := victim.read(op, "count"); err != nil || !fresh.Stale {
		s.t.Errorf("%s, alone, answers a read with %+v, %v: want what it knows, marked stale", victim.Name, fresh, err)
	}
	if err := victim.write(op, "alone", victim.Name); !errors.Is(err, errNoLeader) {
		s.t.Errorf("%s, alone, answers a write with: %v", victim.Name, err)
	}
}

// may notes an order that was refused, which it may be for want of a leader or
// for the reasons given.
func (s *schedule) may(err error, reasons ...error) {
	if err == nil {
		return
	}
	s.refused.Add(1)
	for _, reason := range append(reasons, errNoLeader, context.DeadlineExceeded) {
		if errors.Is(err, reason) {
			return
		}
	}
	s.t.Errorf("refused: %v", err)
}

// judge asks for all that was promised.
func (s *schedule) judge() {
	t := s.t
	if !s.history.Linearizable() {
		t.Errorf("no order explains the %d operations", s.history.Len())
	}
	var count int
	s.Await("the count", func() bool {
		text, fresh, err := s.open[0].read(t.Context(), "count")
		count, _ = strconv.Atoi(text)
		return err == nil && !fresh.Stale
	})
	added, maybe := int(s.added.Load()), int(s.maybe.Load())
	if count < added || count > added+maybe {
		t.Errorf("the row counts %d; %d increments were acknowledged and %d may have been made", count, added, maybe)
	}
	for _, n := range s.open {
		n.want("count", strconv.Itoa(count))
	}
	if s.history.Len() < 50 || s.reads.Load() < 20 || added < 5 {
		t.Errorf("only %d operations, %d confirmed reads and %d increments got through", s.history.Len(), s.reads.Load(), added)
	}
	t.Logf("%d operations, %d confirmed reads, %d increments and %d unknown, %d orders refused",
		s.history.Len(), s.reads.Load(), added, maybe, s.refused.Load())
	s.replicasAreEqual()
}

// replicasAreEqual compares the states byte by byte at one revision: snapshots of
// equal states are equal.
func (s *schedule) replicasAreEqual() {
	var states [][]byte
	s.Await("all nodes to be at one revision", func() bool {
		states = nil
		revisions := map[uint64]bool{}
		for _, n := range s.open {
			state, err := n.engine.Open()
			if err != nil {
				s.t.Fatal(err)
			}
			var b bytes.Buffer
			if err := kv.WriteSnapshot(&b, state); err != nil {
				s.t.Fatal(err)
			}
			revisions[kv.Applied(state)] = true
			states = append(states, b.Bytes())
			state.Release()
		}
		return len(revisions) == 1
	})
	var differ []string
	for i, n := range s.open {
		if !bytes.Equal(states[i], states[0]) {
			differ = append(differ, n.Name)
		}
	}
	if len(differ) > 0 {
		s.t.Errorf("the states of %s differ from that of %s", strings.Join(differ, ", "), s.open[0].Name)
	}
}
