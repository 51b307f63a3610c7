package member_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/clustertest"
	"github.com/atoll-registry/atoll/cluster/member"
)

// hanging is a disk whose writes do not return while it hangs.
type hanging struct {
	mu   sync.Mutex
	hung chan struct{} // nil: it works
}

func (h *hanging) hang(yes bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if yes {
		h.hung = make(chan struct{})
	} else {
		close(h.hung)
		h.hung = nil
	}
}

func (h *hanging) wait() {
	h.mu.Lock()
	hung := h.hung
	h.mu.Unlock()
	if hung != nil {
		<-hung
	}
}

func (h *hanging) Logs(s raft.LogStore) raft.LogStore         { return hangingLogs{s, h} }
func (h *hanging) Stable(s raft.StableStore) raft.StableStore { return s }
func (h *hanging) Broken() <-chan error                       { return nil }
func (h *hanging) Stop()                                      {}

type hangingLogs struct {
	raft.LogStore
	h *hanging
}

func (l hangingLogs) StoreLogs(logs []*raft.Log) error {
	l.h.wait()
	return l.LogStore.StoreLogs(logs)
}

// withDisks gives every node of a cluster a disk of its own.
func withDisks(disks map[string]*hanging) clustertest.Options {
	return clustertest.Options{Disk: func(n *clustertest.Node) member.Disk {
		if disks[n.Name] == nil {
			disks[n.Name] = &hanging{}
		}
		return disks[n.Name]
	}}
}

func write(t *testing.T, n *clustertest.Node, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err := n.CreateToken(ctx, time.Hour, 1)
	return err
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 1200 {
		if ok() {
			return
		}
		<-time.After(100 * time.Millisecond)
	}
	t.Fatalf("waited two minutes for: %s", what)
}

// A leader whose disk hangs goes on sending heartbeats, and its followers wait
// for it for ever. Told that it is unfit, it falls silent, another leads, and it
// refuses writes at once; when the disk answers it is a follower like others.
func TestHungDiskOfTheLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disks := map[string]*hanging{}
		c := clustertest.New(t, withDisks(disks))
		c.Grow(3)
		lead := c.Leader()
		others := c.Others(lead)
		disks[lead.Name].hang(true)
		writing := make(chan error, 1)
		go func() { writing <- write(t, lead, 20*time.Second) }()
		<-time.After(30 * time.Second)
		if err := <-writing; err == nil {
			t.Error("a write was acknowledged that the leader's disk never took")
		}
		for _, n := range others {
			if n.Leader() != lead.Self() {
				t.Fatal("the followers noticed by themselves: this test shows nothing")
			}
		}

		refusal := errors.New("the disk hangs, look at it")
		lead.Report(member.Report{Fitness: member.Unfit, Refusal: refusal, Codes: []string{"disk-hung"}})
		await(t, "another leader", func() bool {
			return others[0].Leader() != lead.Self() && others[0].Leader() != "" && others[0].Leader() == others[1].Leader()
		})
		began := time.Now()
		if err := write(t, lead, time.Minute); !errors.Is(err, refusal) {
			t.Errorf("a write through the unfit node: %v", err)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("it was refused after %v", took)
		}
		for _, n := range others {
			if err := write(t, n, time.Minute); err != nil {
				t.Errorf("a write through %s: %v", n.Name, err)
			}
		}
		s, err := others[0].Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range s.Members {
			if m.ID == lead.Self() && (m.Fitness != member.Unfit || strings.Join(m.Codes, ",") != "disk-hung") {
				t.Errorf("the others see the unfit node as %v with %v", m.Fitness, m.Codes)
			}
		}

		disks[lead.Name].hang(false)
		lead.Report(member.Report{})
		await(t, "the node follows and takes writes", func() bool {
			return lead.Leader() != "" && lead.Leader() != lead.Self() && write(t, lead, 10*time.Second) == nil
		})
		c.AwaitVoters(3)
	})
}

// A reluctant leader hands over to a voter that is not, stays where it is when
// there is none, and goes on taking writes either way.
func TestReluctantLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{})
		c.Grow(3)
		lead := c.Leader()
		others := c.Others(lead)
		for _, n := range append(others, lead) {
			n.Report(member.Report{Fitness: member.Reluctant})
		}
		<-time.After(2 * time.Minute)
		if lead.Leader() != lead.Self() {
			t.Errorf("with nobody in a better state the leader is %s", lead.Leader())
		}
		others[1].Report(member.Report{})
		await(t, "the one that is fit leads", func() bool { return lead.Leader() == others[1].Self() })
		for _, n := range []*clustertest.Node{lead, others[0], others[1]} {
			if err := write(t, n, time.Minute); err != nil {
				t.Errorf("a write through %s: %v", n.Name, err)
			}
		}
	})
}

// A lone node that is unfit refuses, and leads again as soon as it is fit.
func TestUnfitAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{})
		n := c.Found()
		n.Report(member.Report{Fitness: member.Unfit})
		if err := write(t, n, time.Minute); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("an unfit node's write: %v", err)
		}
		n.Report(member.Report{})
		if err := write(t, n, time.Minute); err != nil {
			t.Error(err)
		}
	})
}

// The site's clock moves on, and a node's own is not believed when it cannot be
// right.
func TestSiteClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		off := map[string]time.Duration{}
		set := func(name string, by time.Duration) {
			mu.Lock()
			defer mu.Unlock()
			off[name] = by
		}
		clock := func(name string) time.Time {
			mu.Lock()
			defer mu.Unlock()
			return time.Now().Add(off[name])
		}
		c := clustertest.New(t, clustertest.Options{Clock: func(n *clustertest.Node) func() time.Time {
			return func() time.Time { return clock(n.Name) }
		}})
		nodes := c.Grow(3)
		c.AwaitVoters(3)
		// A day passes, as far as the clocks go.
		const day = 24 * time.Hour
		for _, n := range nodes {
			set(n.Name, day)
		}
		seen := time.Now().Add(day)
		behind := func(n *clustertest.Node) time.Duration {
			set(n.Name, -50*365*day) // 1970, or before
			defer set(n.Name, day)
			return seen.Sub(n.Now())
		}
		await(t, "the site's clock moves", func() bool {
			return behind(nodes[0]) < time.Minute && behind(nodes[1]) < time.Minute && behind(nodes[2]) < time.Minute
		})
		for _, n := range nodes {
			set(n.Name, 12*365*day) // 2038
			if now := n.Now(); now.Sub(time.Now().Add(day)).Abs() > time.Hour {
				t.Errorf("%s, with its clock far ahead, judges by %v", n.Name, now)
			}
			set(n.Name, day)
			if now := n.Now(); !now.Equal(time.Now().Add(day)) {
				t.Errorf("%s does not believe a clock that is right: %v", n.Name, now)
			}
		}
		// One clock that runs away does not move the site's.
		lead := c.Leader()
		for moment := range 20 { // in whatever the leader does at that moment
			<-time.After(time.Minute + time.Duration(moment)*157*time.Millisecond)
			set(lead.Name, 300*day)
			<-time.After(10 * time.Second)
			set(lead.Name, day)
		}
		set(lead.Name, 300*day)
		<-time.After(3 * time.Minute)
		for _, n := range c.Others(lead) {
			if now := n.Now(); now.Sub(time.Now().Add(day)).Abs() > time.Hour {
				t.Errorf("%s took over the leader's wrong clock: %v", n.Name, now)
			}
		}
		s, err := lead.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range s.Members {
			if m.ID != lead.Self() && (!m.Clocked || (m.Skew+299*day).Abs() > m.SkewBound+time.Millisecond) {
				t.Errorf("the skew of %s is measured as %v within %v", m.Name, m.Skew, m.SkewBound)
			}
		}
		// When a majority of the nodes says so, it does move, however far.
		for _, n := range nodes {
			set(n.Name, 3*365*day)
		}
		await(t, "the site's clock follows its nodes", func() bool {
			for _, n := range nodes {
				if now := n.Now(); now.Before(time.Now().Add(2 * 365 * day)) {
					return false
				}
			}
			return true
		})
	})
}

func ExampleFitness() {
	fmt.Println(member.Fit, member.Reluctant, member.Unfit)
	// Output: fit reluctant unfit
}
