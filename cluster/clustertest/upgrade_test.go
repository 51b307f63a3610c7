package clustertest

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/version"
)

// run starts the node anew with a program of another level.
func (n *Node) run(level int, name string) {
	n.cluster.t.Helper()
	n.Stop()
	n.Level, n.Version = level, name
	n.Start()
}

// row is a member's row as n has it.
func (n *Node) row(of *Node) (m member.MemberStatus) {
	n.cluster.t.Helper()
	s, err := n.Status(n.cluster.t.Context())
	if err != nil {
		n.cluster.t.Fatal(err)
	}
	for _, m := range s.Members {
		if m.ID == of.Self() {
			return m
		}
	}
	return m
}

// A site of three is upgraded node by node, rolled back, upgraded again and
// finished; only from then on are new shapes written and old programs refused.
func TestUpgradeAndRollBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		nodes := c.growOld()
		note := func(key string) {
			t.Helper()
			if err := nodes[len(key)%3].write(t.Context(), key, key); err != nil {
				t.Fatal(err)
			}
			for _, n := range nodes {
				n.want(key, key)
			}
		}
		levels := func(want ...int) {
			t.Helper()
			c.Await("the nodes to publish their levels", func() bool {
				for i, n := range nodes {
					if nodes[0].row(n).Feature != want[i] {
						return false
					}
				}
				return true
			})
		}
		finish := func(n *Node) error { return n.FinishUpgrade(t.Context()) }

		nodes[0].run(2, "v0.2")
		levels(2, 1, 1)
		note("a")
		if err := finish(nodes[0]); !errors.Is(err, version.ErrNotYet) {
			t.Fatalf("finished while two nodes run the older program: %v", err)
		}
		nodes[0].run(1, "v0.1") // and back
		levels(1, 1, 1)
		note("bb")
		for _, n := range nodes {
			n.run(2, "v0.2")
			note("b" + n.Name)
		}
		levels(2, 2, 2)
		for _, n := range nodes {
			if row := nodes[0].row(n); row.Member.Version != "" {
				t.Errorf("the row of %s has the new shape before the site is at its level", n.Name)
			}
		}
		nodes[1].run(1, "v0.1") // still allowed
		levels(2, 1, 2)
		nodes[1].run(2, "v0.2")
		levels(2, 2, 2)
		for range 2 { // safe to repeat
			if err := finish(nodes[2]); err != nil {
				t.Fatal(err)
			}
		}
		for _, n := range nodes {
			c.Await("the row of the new shape", func() bool { return nodes[0].row(n).Member.Version == "v0.2" })
		}
		note("ccc")

		// The older program is refused: on a directory of the site, and as a newcomer.
		old := nodes[1]
		old.Stop()
		old.Level = 1
		if err := old.TryStart(); !errors.Is(err, version.ErrMismatch) || !strings.Contains(err.Error(), "start atoll v0.2 or a newer version here") {
			t.Errorf("the older program starts again: %v", err)
		}
		stranger := c.NewNode()
		stranger.Level = 1
		if err := stranger.JoinWith(c.token(nodes[0]), nodes[0].Addr); !errors.Is(err, version.ErrMismatch) {
			t.Errorf("the older program joins: %v", err)
		}
		stranger.Level = 4
		if err := stranger.JoinWith(c.token(nodes[0]), nodes[0].Addr); !errors.Is(err, version.ErrMismatch) {
			t.Errorf("a program two versions ahead joins: %v", err)
		}
		old.Level = 2
		old.Start()
		note("dddd")
	})
}

// A node that was away while the upgrade was finished, and was rolled back
// meanwhile, stops when it hears of it; so does one that is two versions ahead.
func TestProgramThatDoesNotFitStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		nodes := c.growOld()
		for _, n := range nodes {
			n.run(2, "v0.2")
		}
		c.AwaitVoters(3)
		away := c.Others(c.Leader())[0]
		c.Await("the node to publish its level", func() bool { return c.Others(away)[0].row(away).Feature == 2 })
		c.Isolate(away)
		away.run(1, "v0.1")
		c.Await("the others to finish", func() bool {
			err := c.Leader().FinishUpgrade(t.Context())
			return err == nil
		})
		c.Rejoin(away)
		if err := away.ends(); !errors.Is(err, version.ErrMismatch) {
			t.Errorf("the rolled back node ended with %v", err)
		}
		away.Level = 4
		err := away.TryStart()
		if err == nil {
			err = away.ends()
		}
		if !errors.Is(err, version.ErrMismatch) || !strings.Contains(err.Error(), "works at 3 and 4") {
			t.Errorf("the node two versions ahead ended with %v", err)
		}
		away.run(2, "v0.2")
		away.want("nothing", "")
	})
}

// older has a node answer another's pings as a program that knows of no proofs does: it
// says which keys it holds and shows nothing for it. An upgrade is its next start.
func (n *Node) older(to *Node) (upgrade func()) {
	end := n.answers(to, func(said map[string]any) { delete(said, "proofs") })
	return func() {
		n.Stop()
		end()
		n.Start()
	}
}

// Voters of a program that does not prove that it holds the cluster key keep vote and
// key under a leader that wants proof: a rolling upgrade costs no tolerance. What needs
// proof waits until they are upgraded: a new vote, a new key, the end of the last holder.
func TestUpgradeFromNodesThatProveNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		nodes := c.Grow(3)
		leader := c.Leader()
		key := leader.ClusterKeys()
		var upgrades []func()
		for _, n := range c.Others(leader) {
			upgrades = append(upgrades, n.older(leader))
		}
		if _, err := leader.RotateKey(t.Context()); err != nil {
			t.Fatal(err)
		}
		for range 2 { // five could vote
			upgrades = append(upgrades, c.Join(leader).older(leader))
		}
		<-time.After(time.Minute)
		if votes := c.voting(leader); len(votes) != 3 {
			t.Errorf("%v vote", votes)
		}
		for _, n := range nodes {
			if err := n.write(t.Context(), "a", n.Name); err != nil {
				t.Error(err)
			}
			if !bytes.HasPrefix(n.ClusterKeys(), key) {
				t.Errorf("%s has given up the key that seals", n.Name)
			}
		}
		if s, err := leader.Status(t.Context()); err != nil || !s.Rekeying {
			t.Errorf("the key was changed though two voters do not prove to hold the next: %+v, %v", s, err)
		}
		for _, upgrade := range upgrades {
			upgrade()
		}
		c.Await("the key has changed everywhere", func() bool {
			for _, n := range c.nodes {
				s, err := n.Status(t.Context())
				if held := n.ClusterKeys(); err != nil || s.Rekeying || len(held) != pki.ClusterKeySize || bytes.Equal(held, key) {
					return false
				}
			}
			return true
		})
		c.AwaitVoters(5)
	})
}

// growOld founds a site of three nodes that run a program of level 1.
func (c *Cluster) growOld() (nodes []*Node) {
	c.t.Helper()
	for range 3 {
		n := c.NewNode()
		n.Level, n.Version = 1, "v0.1"
		var err error
		if len(nodes) == 0 {
			_, err = member.Found(n.Dir, n.Name, n.Addr, nil)
		} else {
			err = n.JoinWith(c.token(nodes[0]), nodes[0].Addr)
		}
		if err != nil {
			c.t.Fatal(err)
		}
		n.Start()
		nodes = append(nodes, n)
	}
	c.AwaitVoters(3)
	return nodes
}

func (c *Cluster) token(via *Node) string {
	c.t.Helper()
	token, err := via.CreateToken(c.t.Context(), time.Hour, 1)
	if err != nil {
		c.t.Fatal(err)
	}
	return token
}

// newNote is note as a later version has it.
type newNote struct {
	Text   string `cbor:"text"`
	Author string `cbor:"author"`
}

// A row with fields that only the newer program knows passes through a change by
// the older one, and comes back whole on a third node.
func TestNewFieldsPassThroughTheOlderProgram(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: func(n *Node, db *table.DB) {
			if n.Name == "node2" {
				withNotes(n, db)
			} else {
				n.Tables = table.Define[newNote](db, "note")
			}
		}})
		nodes := c.Grow(3)
		newer := func(n *Node) *table.Table[newNote] { return n.Tables.(*table.Table[newNote]) }
		if _, err := nodes[0].DB.Update(t.Context(), func(tx *table.Tx) error {
			return newer(nodes[0]).Put(tx, newNote{"1", "ann"}, "a")
		}); err != nil {
			t.Fatal(err)
		}
		nodes[1].want("a", "1")
		if err := nodes[1].write(t.Context(), "a", "2"); err != nil {
			t.Fatal(err)
		}
		c.Await("node3 to have both changes", func() bool {
			var got newNote
			_, err := nodes[2].DB.Confirmed(t.Context(), func(v *table.View) (err error) {
				got, _, _, err = newer(nodes[2]).Get(v, "a")
				return err
			})
			if err == nil && got.Text == "2" && got.Author != "ann" {
				t.Fatalf("the older program dropped a field: %+v", got)
			}
			return err == nil && got.Text == "2"
		})
	})
}
