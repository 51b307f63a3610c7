package clustertest

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
)

type note struct {
	Text string `cbor:"text"`
}

func withNotes(n *Node, db *table.DB) { n.Tables = table.Define[note](db, "note") }

func (n *Node) notes() *table.Table[note] { return n.Tables.(*table.Table[note]) }

func (n *Node) write(ctx context.Context, key, text string) error {
	_, err := n.DB.Update(ctx, func(tx *table.Tx) error { return n.notes().Put(tx, note{text}, key) })
	return err
}

func (n *Node) read(ctx context.Context, key string) (string, table.Freshness, error) {
	var v note
	fresh, err := n.DB.Confirmed(ctx, func(view *table.View) (err error) {
		v, _, _, err = n.notes().Get(view, key)
		return err
	})
	return v.Text, fresh, err
}

// want reads key on n until it is confirmed as text; a leader may be new.
func (n *Node) want(key, text string) {
	n.cluster.t.Helper()
	n.cluster.Await(fmt.Sprintf("%s reads %s as %q", n.Name, key, text), func() bool {
		got, fresh, err := n.read(n.cluster.t.Context(), key)
		return err == nil && !fresh.Stale && got == text
	})
}

func TestGrowsFromOneToThree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		first := c.Found()
		start := time.Now()
		if err := first.write(t.Context(), "a", "1"); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > 100*time.Millisecond {
			t.Errorf("a lone node took %v for its first write", took)
		}
		second := c.Join(first)
		second.want("a", "1")
		c.AwaitVoters(1)
		if err := second.write(t.Context(), "b", "2"); err != nil {
			t.Fatal(err)
		}
		first.want("b", "2")
		third := c.Join(second) // any member takes a node in
		c.AwaitVoters(3)
		if err := third.write(t.Context(), "c", "3"); err != nil {
			t.Fatal(err)
		}
		for _, n := range []*Node{first, second, third} {
			n.want("a", "1")
			n.want("c", "3")
			c.Await(n.Name+" sees three live members", func() bool { return len(n.Live()) == 3 })
			if live := n.Live(); live[0].ID != n.Self() {
				t.Errorf("%s does not see itself first: %v", n.Name, live)
			}
		}
		sealed, err := first.Seal("x", []byte("secret"))
		if err != nil {
			t.Fatal(err)
		}
		if plain, err := third.Unseal("x", sealed); err != nil || string(plain) != "secret" {
			t.Errorf("what one node seals another opens as %q, %v", plain, err)
		}
		fourth := c.Join(first)
		fourth.want("a", "1")
		c.AwaitVoters(3)
	})
}

// TestOnlyALoneVoterConfirmsItself: with others to ask, or none that it leads,
// a node has no read index of its own.
func TestOnlyALoneVoterConfirmsItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		first := c.Found()
		for _, text := range []string{"1", "2", "3"} {
			if err := first.write(t.Context(), "a", text); err != nil {
				t.Fatal(err)
			}
			index, ok := first.OwnIndex()
			var revision uint64
			_ = first.DB.View(func(v *table.View) error { revision = v.Revision(); return nil })
			if !ok || index < revision {
				t.Errorf("the index of a lone voter is %d, %v after a commit at %d", index, ok, revision)
			}
			first.want("a", text)
		}
		second := c.Join(first)
		c.AwaitVoters(1)
		if _, ok := second.OwnIndex(); ok {
			t.Error("a node without a vote confirms itself")
		}
		if err := second.write(t.Context(), "b", "1"); err != nil {
			t.Fatal(err)
		}
		first.want("b", "1")
		third := c.Join(first)
		c.AwaitVoters(3)
		for _, n := range []*Node{first, second, third} {
			if _, ok := n.OwnIndex(); ok {
				t.Errorf("%s, one of three voters, confirms itself", n.Name)
			}
		}
		c.Isolate(first)
		c.Await("another leader", func() bool { l := c.Leader(); return l != nil && l != first })
		if _, ok := first.OwnIndex(); ok {
			t.Error("a node that is cut off confirms itself")
		}
		c.Rejoin(first)
	})
}

// A write that came in through a follower is visible there as soon as it is
// committed, not with the leader's next message in 50 to 100 ms.
func TestFollowersLearnAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		first := c.Found()
		second, third := c.Join(first), c.Join(first)
		c.AwaitVoters(3)
		for i := range 20 {
			for _, n := range []*Node{first, second, third} {
				key, text := n.Name+fmt.Sprint(i), fmt.Sprint(i)
				start := time.Now()
				if err := n.write(t.Context(), key, text); err != nil {
					t.Fatal(err)
				}
				for _, at := range []*Node{first, second, third} {
					if got, fresh, err := at.read(t.Context(), key); err != nil || fresh.Stale || got != text {
						t.Fatalf("%s reads %q (%+v) and %v, want what %s wrote", at.Name, got, fresh, err, n.Name)
					}
				}
				if took := time.Since(start); took > 20*time.Millisecond {
					t.Errorf("write %d on %s and its reads took %v", i, n.Name, took)
				}
			}
		}
	})
}

func TestKillingTheLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		c.Grow(3)
		old := c.Leader()
		if err := old.write(t.Context(), "a", "1"); err != nil {
			t.Fatal(err)
		}
		old.Kill()
		other := c.Others(old)[0]
		start := time.Now()
		if err := other.write(t.Context(), "a", "2"); err != nil {
			t.Fatalf("a write while the leader is dead: %v", err)
		}
		t.Logf("writes resumed after %v", time.Since(start))
		for _, n := range c.Others() {
			n.want("a", "2")
		}
		for i := range 20 {
			if err := other.write(t.Context(), fmt.Sprint("k", i), "v"); err != nil {
				t.Fatal(err)
			}
		}
		old.Start()
		old.want("k19", "v")
		c.AwaitVoters(3)
	})
}

// Leaders die again and again, by a kill, which resets their connections, and by a cut,
// after which nothing answers and nothing is refused. Writes go on within the heartbeat
// timeout, the step between two followers and the messages of an election.
func TestADeadLeaderIsMissedSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		c.Grow(3)
		const heartbeat = 3 * time.Second
		for round := range 12 {
			lead := c.Leader()
			other := c.Others(lead)[round/2%2]
			if err := other.write(t.Context(), "a", "before"); err != nil { // on the connection that it then has
				t.Fatal(err)
			}
			end := func() { c.Rejoin(lead) }
			if round%2 == 0 {
				lead.Kill()
				end = lead.Start
			} else {
				c.Isolate(lead)
			}
			start := time.Now()
			if err := other.write(t.Context(), "a", fmt.Sprint(round)); err != nil {
				t.Fatalf("a write while the leader is dead: %v", err)
			}
			if took := time.Since(start); took > heartbeat+heartbeat/5+200*time.Millisecond {
				t.Errorf("round %d: writes resumed after %v", round, took)
			} else {
				t.Logf("round %d: writes resumed after %v", round, took)
			}
			end()
			c.AwaitVoters(3)
			for _, n := range c.Others() {
				n.want("a", fmt.Sprint(round))
			}
		}
	})
}

func TestStoppingTheLeaderHandsOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		c.Grow(3)
		old := c.Leader()
		start := time.Now()
		old.Stop()
		if err := c.Others(old)[0].write(t.Context(), "a", "1"); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("stopping the leader and the next write took %v: it was not handed over", took)
		}
	})
}

func TestWithoutQuorum(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		c.Grow(3)
		last := c.Leader()
		if err := last.write(t.Context(), "a", "1"); err != nil {
			t.Fatal(err)
		}
		for _, n := range c.Others(last) {
			n.Kill()
		}
		c.Await("the leader steps down", func() bool { return last.Leader() == "" })
		start := time.Now()
		err := last.write(t.Context(), "a", "2")
		if took := time.Since(start); !errors.Is(err, table.ErrNoLeader) || took < 14*time.Second || took > 16*time.Second {
			t.Errorf("a write gave %v after %v, want ErrNoLeader after 15 s", err, took)
		}
		start = time.Now()
		text, fresh, err := last.read(t.Context(), "a")
		if err != nil || text != "1" || !fresh.Stale || fresh.Age < 10*time.Second {
			t.Errorf("a read gave %q, %+v, %v; want the old value, marked stale", text, fresh, err)
		}
		if took := time.Since(start); took > 250*time.Millisecond {
			t.Errorf("a stale read took %v", took)
		}
		status, err := last.Status(t.Context())
		if err != nil || status.Quorum || status.Leader != "" {
			t.Errorf("the status is %+v, %v", status, err)
		}
		if live := last.Live(); len(live) != 1 {
			t.Errorf("%d members are live", len(live))
		}
	})
}

// What was acknowledged while a node was away is found at that node, also when the
// leader is killed in the moment at which it comes back.
func TestFoundThoughTheLeaderIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		nodes := c.Grow(3)
		lead, away := c.Leader(), nodes[2]
		if away == lead {
			away = nodes[1]
		}
		away.Kill()
		if err := lead.write(t.Context(), "a", "1"); err != nil {
			t.Fatal(err)
		}
		lead.Kill()
		away.Start()
		start := time.Now()
		var v note
		fresh, err := away.DB.Sought(t.Context(), func(view *table.View) (found bool, err error) {
			v, _, found, err = away.notes().Get(view, "a")
			return found, err
		})
		if err != nil || v.Text != "1" || fresh.Stale {
			t.Errorf("after %v it finds %q, %+v, %v", time.Since(start), v.Text, fresh, err)
		}
	})
}

func TestLoneRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		n := c.Found()
		if err := n.write(t.Context(), "a", "1"); err != nil {
			t.Fatal(err)
		}
		for _, end := range []func(){n.Stop, n.Kill} {
			end()
			start := time.Now()
			n.Start()
			if text, fresh, err := n.read(t.Context(), "a"); err != nil || fresh.Stale || text != "1" {
				t.Errorf("after a restart it reads %q, %+v, %v", text, fresh, err)
			}
			if err := n.write(t.Context(), "b", "2"); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(start); took > 100*time.Millisecond {
				t.Errorf("a lone node needed %v to lead", took)
			}
		}
	})
}

func TestSecondCopyOfTwo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		nodes := c.Grow(2)
		lead, other := nodes[0], nodes[1]
		c.Await("the second copy counts", func() bool {
			s, err := lead.Status(t.Context())
			return err == nil && len(s.Members) == 2 && s.Members[0].Lag == 0 && s.Members[1].Lag == 0 && len(lead.Live()) == 2
		})
		if err := lead.write(t.Context(), "a", "1"); err != nil {
			t.Fatal(err)
		}
		// On its disk is not yet in its state: it learns with the next message
		// that the entry is committed.
		other.want("a", "1")
		// The link is cut: the write is acknowledged, but only once the other
		// no longer counts as live.
		c.Isolate(other)
		start := time.Now()
		if err := lead.write(t.Context(), "a", "2"); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took < 500*time.Millisecond || took > 3*time.Second {
			t.Errorf("a write with the other node cut off took %v", took)
		}
		start = time.Now()
		if err := lead.write(t.Context(), "a", "3"); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > 100*time.Millisecond {
			t.Errorf("a write took %v though the other node is known to be away", took)
		}
		text, fresh, err := other.read(t.Context(), "a")
		if err != nil || !fresh.Stale || text != "1" {
			t.Errorf("the node that is cut off reads %q, %+v, %v", text, fresh, err)
		}
		c.Rejoin(other)
		other.want("a", "3")
	})
}

// A node that was itself brought up by a snapshot, and restarted since, can bring
// up others by it when it leads.
func TestSnapshotIsPassedOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes, Snapshots: member.Snapshots{MinBytes: 1000, TrailingLogs: 2}})
		first := c.Found()
		for i := range 200 {
			if err := first.write(t.Context(), fmt.Sprint("k", i), "some text that fills the log"); err != nil {
				t.Fatal(err)
			}
		}
		c.Await("a snapshot", func() bool { return len(first.snapshots(t)) > 0 || first.writeMore(t) })
		second, third := c.Join(first), c.Join(first)
		c.AwaitVoters(3)
		for _, n := range []*Node{second, third} {
			if len(n.snapshots(t)) == 0 {
				t.Fatal("a new node was brought up without a snapshot")
			}
			n.Kill()
			n.Start()
			c.AwaitVoters(3)
		}
		first.Kill()
		if err := c.Leader().write(t.Context(), "k0", "new"); err != nil {
			t.Fatal(err)
		}
		fourth := c.Join(second)
		fourth.want("k0", "new")
	})
}

// A machine that lost its disk is set up anew under its name and at its address.
func TestNewDiskAtTheOldAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		c.Grow(3)
		lead := c.Leader()
		dead := c.Others(lead)[0]
		if err := lead.write(t.Context(), "a", "1"); err != nil {
			t.Fatal(err)
		}
		dead.Kill()
		c.Await("the site sees it", func() bool { return len(lead.Live()) == 2 })
		token, err := lead.CreateToken(t.Context(), time.Hour, 1)
		if err != nil {
			t.Fatal(err)
		}
		heir := c.NewNode()
		heir.Name, heir.Addr = dead.Name, dead.Addr
		if err := heir.JoinWith(token, lead.Addr); err != nil {
			t.Fatal(err)
		}
		heir.Start()
		heir.want("a", "1")
		c.AwaitVoters(3)
		if s, err := heir.Status(t.Context()); err != nil || len(s.Members) != 3 {
			t.Errorf("the status is %+v, %v", s, err)
		}
		for _, n := range c.Others(lead, heir) {
			n.Kill() // its vote counts
		}
		if err := lead.write(t.Context(), "a", "2"); err != nil {
			t.Error(err)
		}
	})
}

// A stranger at a dead voter's address has no vote and acknowledges nothing in its
// name: it does not have what the dead one had.
func TestStrangerAtAVotersAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		c.Grow(3)
		lead := c.Leader()
		others := c.Others(lead)
		dead, second := others[0], others[1]
		dead.Kill()
		token, err := lead.CreateToken(t.Context(), time.Hour, 1)
		if err != nil {
			t.Fatal(err)
		}
		stranger := c.NewNode()
		stranger.Addr = dead.Addr
		if err := stranger.JoinWith(token, lead.Addr); err != nil {
			t.Fatal(err)
		}
		stranger.Start()
		second.Kill()
		if err := lead.write(t.Context(), "a", "1"); !errors.Is(err, table.ErrNoLeader) && !errors.Is(err, table.ErrUnknownOutcome) {
			t.Errorf("with one of three voters and a stranger a write ends with %v", err)
		}
		second.Start()
		c.Await("a write with a majority", func() bool { return lead.write(t.Context(), "b", "2") == nil })
	})
}

func TestSnapshotBringsANewNodeUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes, Snapshots: member.Snapshots{MinBytes: 1000, TrailingLogs: 2}})
		first := c.Found()
		for i := range 200 {
			if err := first.write(t.Context(), fmt.Sprint("k", i), "some text that fills the log"); err != nil {
				t.Fatal(err)
			}
		}
		// Snapshots wait until the log outweighs the state, which a file of
		// some pages never does here in the short run.
		c.Await("a snapshot", func() bool { return len(first.snapshots(t)) > 0 || first.writeMore(t) })
		second := c.Join(first)
		second.want("k0", "some text that fills the log")
		if len(second.snapshots(t)) == 0 {
			t.Error("the new node was brought up without a snapshot")
		}
		second.Kill()
		if err := first.write(t.Context(), "k0", "new"); err != nil {
			t.Fatal(err)
		}
		second.Start()
		second.want("k0", "new")
		first.Kill()
		first.Start()
		first.want("k0", "new")
	})
}

func TestOneWayCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		c.Grow(3)
		old := c.Leader()
		others := c.Others(old)
		// The leader hears the others, but they do not hear it.
		for _, n := range others {
			c.Network.CutOneWay(old.Addr, n.Addr)
		}
		if err := others[0].write(t.Context(), "a", "1"); err != nil {
			t.Fatalf("a write while the old leader is not heard: %v", err)
		}
		if text, fresh, err := old.read(t.Context(), "a"); err == nil && !fresh.Stale && text != "1" {
			t.Errorf("the old leader confirms %q", text)
		}
		for _, n := range others {
			c.Network.Heal(old.Addr, n.Addr)
		}
		old.want("a", "1")
	})
}

func TestAddressChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		nodes := c.Grow(3)
		moved := nodes[2]
		moved.Stop()
		moved.Addr = "10.0.0.99:5001"
		moved.Start()
		c.Await("the others know the new address", func() bool {
			s, err := nodes[0].Status(t.Context())
			if err != nil {
				return false
			}
			for _, m := range s.Members {
				if m.ID == moved.Self() {
					return m.Addr == moved.Addr && m.Up
				}
			}
			return false
		})
		if err := moved.write(t.Context(), "a", "1"); err != nil {
			t.Fatal(err)
		}
		moved.want("a", "1")
	})
}

// snapshots are the files of the node's snapshots.
func (n *Node) snapshots(t *testing.T) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(n.Dir, "raft", "snapshots", "*", "state.bin"))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// writeMore adds to the log without adding to the state; it gives false.
func (n *Node) writeMore(t *testing.T) bool {
	t.Helper()
	if err := n.write(t.Context(), "filler", strings.Repeat("x", 60000)); err != nil {
		t.Fatal(err)
	}
	return false
}
