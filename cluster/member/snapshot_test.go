package member_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/clustertest"
	"github.com/atoll-registry/atoll/cluster/member"
)

// often takes a snapshot after some 40 words and cuts the log right behind it.
var often = member.Snapshots{MinBytes: 16000, Eager: true, TrailingLogs: 2}

// snapshots are the directories of a node's snapshots, by age.
func snapshots(t *testing.T, n *clustertest.Node) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(n.Dir, "raft", "snapshots", "*-*-*"))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// sayMuch says words up to one, with pauses in which snapshots are taken.
func sayMuch(t *testing.T, n *clustertest.Node, to int) {
	t.Helper()
	for i := 0; i < to; i += 40 {
		say(t, n, i, min(i+40, to))
		<-time.After(3 * time.Second)
	}
}

// damage cuts a file in half.
func damage(t *testing.T, name string) {
	t.Helper()
	info, err := os.Stat(name)
	if err == nil {
		err = os.Truncate(name, info.Size()/2)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// newest says which of a node's snapshots is, and that there are several.
func newest(t *testing.T, n *clustertest.Node) string {
	t.Helper()
	all := snapshots(t, n)
	if len(all) < 2 {
		t.Fatalf("%s has the snapshots %q", n.Name, all)
	}
	return all[len(all)-1]
}

// The log was cut behind the newest snapshot, which nobody can read any more: the state
// is whole, so the node starts, says all that it said, and takes another snapshot, by
// which other nodes are brought up.
func TestAStartWithoutItsNewestSnapshot(t *testing.T) {
	for _, row := range []struct {
		name string
		lose func(t *testing.T, n *clustertest.Node)
	}{
		{"its description is damaged", func(t *testing.T, n *clustertest.Node) { damage(t, filepath.Join(newest(t, n), "meta.json")) }},
		{"its content is damaged", func(t *testing.T, n *clustertest.Node) { damage(t, filepath.Join(newest(t, n), "state.bin")) }},
		{"all are gone", func(t *testing.T, n *clustertest.Node) {
			if err := os.RemoveAll(filepath.Join(n.Dir, "raft", "snapshots")); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		synctest.Test(t, func(t *testing.T) {
			c := clustertest.New(t, clustertest.Options{Define: withWords, Snapshots: often})
			n := c.Found()
			sayMuch(t, n, 80)
			say(t, n, 80, 81) // so it is on the disk how little was logged since the snapshot
			n.Stop()
			row.lose(t, n)
			log, done := openLog(t, n)
			first, err := log.FirstIndex()
			done()
			if err != nil || first < 40 {
				t.Fatalf("%s: the log begins at %d, %v", row.name, first, err)
			}
			for range 2 {
				if err := n.TryStart(); err != nil {
					t.Fatalf("%s: %v", row.name, err)
				}
				if !said(n, 81) {
					t.Errorf("%s: the state is not what it was", row.name)
				}
				n.Kill()
			}
			n.Start()
			say(t, n, 81, 82)
			c.Join(n)
			c.Join(n)
			c.AwaitVoters(3)
			for _, other := range c.Others() {
				c.Await(row.name+": all have all", func() bool { return said(other, 82) })
			}
			// That took one snapshot, and takes no more.
			lead := c.Leader()
			taken := snapshots(t, lead)
			for i := range 5 {
				say(t, lead, 82+i, 83+i)
				<-time.After(3 * time.Second)
			}
			if now := snapshots(t, lead); len(taken) == 0 || now[len(now)-1] != taken[len(taken)-1] {
				t.Errorf("%s: there were the snapshots %q, and now %q", row.name, taken, now)
			}
		})
	}
}

// A node that was brought up by a snapshot has nothing of the log before it. It loses
// that snapshot, and its state knows all the same where it ends and who votes.
func TestAStartWithoutTheSnapshotThatBroughtItUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{Define: withWords, Snapshots: often})
		nodes := c.Grow(3)
		away := c.Others(c.Leader())[0]
		away.Kill()
		sayMuch(t, c.Leader(), 80)
		away.Start()
		c.Await("the node that was away has everything", func() bool { return said(away, 80) })
		away.Stop()
		for _, name := range snapshots(t, away) {
			damage(t, filepath.Join(name, "meta.json"))
		}
		if err := away.TryStart(); err != nil {
			t.Fatal(err)
		}
		if !said(away, 80) {
			t.Error("the state is not what it was")
		}
		for _, n := range nodes { // its vote is needed
			if n != away {
				n.Kill()
				break
			}
		}
		say(t, c.Leader(), 80, 90)
		c.Await("it goes on", func() bool { return said(away, 90) })
	})
}

// Neither the state nor any snapshot reaches to where the log begins: what lies between
// is not here. The node does not start, changes nothing, and says what to do.
func TestAGapBeforeTheLogIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{Define: withWords, Snapshots: often})
		n := c.Found()
		sayMuch(t, n, 80)
		n.Stop()
		newest(t, n)
		kept := filepath.Join(t.TempDir(), "meta.db")
		if err := os.Rename(filepath.Join(n.Dir, "meta.db"), kept); err != nil {
			t.Fatal(err)
		}
		hidden := filepath.Join(n.Dir, "raft", "snapshots")
		for _, name := range snapshots(t, n) {
			damage(t, filepath.Join(name, "state.bin"))
		}
		for range 2 {
			err := n.TryStart()
			if !errors.Is(err, member.ErrLogLost) || !strings.Contains(err.Error(), "no snapshot can be read, and the log has entries ") ||
				!strings.Contains(err.Error(), "atoll node wipe --data "+n.Dir) {
				t.Fatalf("a start with a gap: %v", err)
			}
		}
		if err := errors.Join(os.Remove(filepath.Join(n.Dir, "meta.db")), os.Rename(kept, filepath.Join(n.Dir, "meta.db")), os.RemoveAll(hidden)); err != nil {
			t.Fatal(err)
		}
		n.Start()
		if !said(n, 80) {
			t.Error("the state is not what it was")
		}
	})
}

// A log that was put back from some time ago has forgotten what it promised.
func TestALogThatEndsBeforeTheStateIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{Define: withWords})
		nodes := c.Grow(3)
		say(t, c.Leader(), 0, 20)
		old := c.Others(c.Leader())[0]
		old.Stop()
		putBack := keep(t, logFile(old))
		old.Start()
		say(t, nodes[0], 20, 60)
		c.Await("it has everything", func() bool { return said(old, 60) })
		old.Stop()
		putWhole := keep(t, logFile(old))
		for i, put := range []func(){putBack, putWhole} {
			put()
			if err := old.TryStart(); errors.Is(err, member.ErrLogLost) != (i == 0) {
				t.Fatalf("%d: %v", i, err)
			}
		}
		c.Await("it is whole again", func() bool { return said(old, 60) })
	})
}

// An entry of the log that nobody can read, behind the state, ends the start with words
// and not in a panic: whether it is known to be committed or not.
func TestAnEntryThatCannotBeReadIsRefused(t *testing.T) {
	refused := func(t *testing.T, n *clustertest.Node) {
		t.Helper()
		err := n.TryStart()
		if err == nil || !strings.Contains(err.Error(), "damaged") || !strings.Contains(err.Error(), "atoll node wipe --data "+n.Dir) {
			t.Errorf("a start on a damaged log: %v", err)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{Define: withWords})
		n := c.Found()
		say(t, n, 0, 20)
		n.Stop()
		putBack := keep(t, filepath.Join(n.Dir, "meta.db"))
		n.Start()
		say(t, n, 20, 60)
		n.Stop()
		putBack()
		if torn := tear(t, n, 0, 1000); torn < 50 {
			t.Fatal(torn)
		}
		if err := os.Remove(logFile(n) + ".committed"); err != nil {
			t.Fatal(err)
		}
		refused(t, n)
	})
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{Define: withWords})
		n := c.Found()
		n.Stop()
		damaged := add(t, n, text(0))
		add(t, n, text(1))
		if torn := tear(t, n, damaged-1, damaged); torn != 1 {
			t.Fatal(torn)
		}
		refused(t, n)
	})
}
