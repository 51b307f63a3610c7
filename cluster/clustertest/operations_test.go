package clustertest

import (
	"errors"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
)

// ends waits until a node that was removed ends by itself, and says why.
func (n *Node) ends() error {
	n.cluster.t.Helper()
	limit := time.NewTimer(time.Minute)
	defer limit.Stop()
	select {
	case err := <-n.done:
		n.done <- nil // for Stop
		n.Stop()
		return err
	case <-limit.C:
		n.cluster.t.Fatalf("%s still runs after a minute", n.Name)
		return nil
	}
}

func TestRemove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		nodes := c.Grow(3)
		leader := c.Leader()
		others := c.Others(leader)
		gone, stays := others[0], others[1]
		id := gone.Self()
		if err := stays.Remove(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if err := gone.ends(); !errors.Is(err, member.ErrRemoved) {
			t.Errorf("the removed node ended with %v", err)
		}
		c.AwaitVoters(1)
		for range 2 { // safe to repeat
			if err := leader.Remove(t.Context(), id); err != nil {
				t.Errorf("removing it again: %v", err)
			}
		}
		if err := leader.write(t.Context(), "a", "1"); err != nil {
			t.Error(err)
		}
		stays.want("a", "1")
		if err := stays.Authorize(id, member.ServiceRaft); err == nil {
			t.Error("the removed node may still connect")
		}
		// Its name is free, its id is not.
		heir := c.NewNode()
		heir.Name = gone.Name
		token, err := leader.CreateToken(t.Context(), time.Hour, 1)
		if err != nil {
			t.Fatal(err)
		}
		if err := heir.JoinWith(token, leader.Addr); err != nil {
			t.Fatal(err)
		}
		heir.Start()
		c.AwaitVoters(3)
		heir.want("a", "1")
		if err := nodes[0].Remove(t.Context(), "nobody"); !errors.Is(err, member.ErrNoMember) {
			t.Errorf("removing nobody: %v", err)
		}
	})
}

func TestRemoveKeepsTheQuorum(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		c.Grow(3)
		leader := c.Leader()
		others := c.Others(leader)
		dead, other := others[0], others[1]
		id, alive := dead.Self(), other.Self()
		dead.Kill()
		c.Await("it is missed", func() bool { return len(leader.Live()) == 2 && len(other.Live()) == 2 })
		for _, target := range []string{alive, leader.Self()} {
			if err := leader.Remove(t.Context(), target); !errors.Is(err, member.ErrQuorum) {
				t.Errorf("removing one of the two that are up: %v", err)
			} else {
				t.Log(err)
			}
		}
		if err := leader.Remove(t.Context(), id); err != nil {
			t.Fatalf("removing the dead one: %v", err)
		}
		c.AwaitVoters(1)
		if err := other.write(t.Context(), "a", "1"); err != nil {
			t.Error(err)
		}
		// The dead one returns, knowing nothing of it.
		if err := dead.TryStart(); err == nil {
			err = dead.ends()
			if !errors.Is(err, member.ErrRemoved) {
				t.Errorf("a removed node that came back ended with %v", err)
			}
		} else if !errors.Is(err, member.ErrRemoved) {
			t.Errorf("a removed node that came back does not start: %v", err)
		}
		// Alone.
		if err := leader.Remove(t.Context(), alive); err != nil {
			t.Fatal(err)
		}
		if err := other.ends(); !errors.Is(err, member.ErrRemoved) {
			t.Error(err)
		}
		if err := leader.Remove(t.Context(), leader.Self()); !errors.Is(err, member.ErrQuorum) {
			t.Errorf("removing the only node: %v", err)
		}
	})
}

func TestRemoveTheLeader(t *testing.T) {
	for _, size := range []int{2, 3, 5} {
		synctest.Test(t, func(t *testing.T) {
			c := New(t, Options{Define: withNotes})
			c.Grow(size)
			leader := c.Leader()
			if err := leader.write(t.Context(), "a", "1"); err != nil {
				t.Fatal(err)
			}
			if err := leader.Remove(t.Context(), leader.Self()); err != nil {
				t.Fatal(err)
			}
			if err := leader.ends(); !errors.Is(err, member.ErrRemoved) {
				t.Errorf("the former leader of %d ended with %v", size, err)
			}
			c.AwaitVoters([]int{0, 1, 1, 1, 3, 3}[size])
			for _, n := range c.Others() {
				n.want("a", "1")
				if err := n.write(t.Context(), "b", n.Name); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestGrowToFive: five voters survive two.
func TestGrowToFive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		c.Grow(5)
		c.Leader().Kill()
		c.Leader().Kill()
		left := c.Others()
		c.Await("a leader", func() bool { return left[0].write(t.Context(), "a", "1") == nil })
		for _, n := range left {
			n.want("a", "1")
		}
	})
}

func TestDrain(t *testing.T) {
	for _, size := range []int{2, 3, 4} {
		synctest.Test(t, func(t *testing.T) {
			c := New(t, Options{Define: withNotes})
			c.Grow(size)
			drained := c.Leader()
			id := drained.Self()
			for range 2 {
				if err := c.Others(drained)[0].Drain(t.Context(), id, false); err != nil {
					t.Fatal(err)
				}
			}
			c.Await("the drained leader has neither office nor vote", func() bool {
				s, err := drained.Status(t.Context())
				if err != nil || !s.Quorum || s.Leader == id {
					return false
				}
				for _, m := range s.Members {
					if m.ID == id && m.Voter {
						return false
					}
				}
				return true
			})
			c.AwaitVoters([]int{0, 0, 1, 1, 3}[size])
			if err := drained.write(t.Context(), "a", "1"); err != nil {
				t.Error(err)
			}
			if err := drained.Lead(t.Context(), id); !errors.Is(err, member.ErrNoVote) {
				t.Errorf("leading while drained: %v", err)
			}
			if err := drained.Drain(t.Context(), id, true); err != nil {
				t.Fatal(err)
			}
			c.AwaitVoters([]int{0, 0, 1, 3, 3}[size])
			if err := drained.Drain(t.Context(), id, false); err != nil {
				t.Fatal(err)
			}
			if err := c.Others(drained)[0].Remove(t.Context(), id); err != nil {
				t.Errorf("removing a drained node: %v", err)
			}
			if err := drained.ends(); !errors.Is(err, member.ErrRemoved) {
				t.Error(err)
			}
			if err := c.Leader().Drain(t.Context(), id, false); !errors.Is(err, member.ErrNoMember) {
				t.Errorf("draining a removed node: %v", err)
			}
		})
	}
}

func TestLead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		c.Grow(4)
		leader := c.Leader()
		for _, n := range c.Others(leader) {
			s, err := n.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			voter := false
			for _, m := range s.Members {
				voter = voter || m.ID == s.Self && m.Voter
			}
			err = c.Others(n)[0].Lead(t.Context(), n.Self())
			if !voter {
				if !errors.Is(err, member.ErrNoVote) {
					t.Errorf("a node without a vote may lead: %v", err)
				}
				continue
			}
			if err != nil {
				t.Errorf("moving the leadership to %s: %v", n.Name, err)
			}
			if now := c.Leader(); now != n {
				t.Errorf("%s leads instead of %s", now.Name, n.Name)
			}
			if err := n.Lead(t.Context(), n.Self()); err != nil {
				t.Errorf("again: %v", err)
			}
		}
	})
}

// TestClone: of two machines with one identity the later to start ends, and the
// site does not notice.
func TestClone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		nodes := c.Grow(3)
		node := nodes[2]
		node.Stop()
		clone := c.NewNode()
		if err := os.CopyFS(clone.Dir, os.DirFS(node.Dir)); err != nil {
			t.Fatal(err)
		}
		clone.Name = node.Name
		node.Start()
		c.AwaitVoters(3)
		if err := clone.TryStart(); !errors.Is(err, member.ErrCloned) {
			t.Fatalf("a clone beside its original started: %v", err)
		} else {
			t.Log(err)
		}
		// The clone comes first: to the site the node has moved. The original is the
		// later one now.
		node.Stop()
		clone.Start()
		c.Await("the clone's address is known", func() bool {
			s, err := nodes[0].Status(t.Context())
			for _, m := range s.Members {
				if m.ID == clone.Self() && m.Addr == clone.Addr && m.Up {
					return err == nil && s.Quorum
				}
			}
			return false
		})
		err := node.TryStart()
		if err == nil {
			err = node.ends() // it learns from the site where it is said to be
		}
		if !errors.Is(err, member.ErrCloned) {
			t.Errorf("the original ended with %v", err)
		}
		if err := clone.write(t.Context(), "a", "1"); err != nil {
			t.Error(err)
		}
		nodes[0].want("a", "1")
		// A node that moves is none.
		clone.Stop()
		clone.Addr = "10.0.1.99:5001"
		clone.Start()
		clone.want("a", "1")
	})
}
