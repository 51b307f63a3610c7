package member_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"

	"github.com/atoll-registry/atoll/cluster/clustertest"
	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
)

type word struct {
	Text string `cbor:"text"`
}

func withWords(n *clustertest.Node, db *table.DB) { n.Tables = table.Define[word](db, "word") }

// text is long enough to be compressed in the log.
func text(i int) string { return strings.Repeat(fmt.Sprintf("word %d, ", i), 50) }

func say(t *testing.T, n *clustertest.Node, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		if _, err := n.DB.Update(t.Context(), func(tx *table.Tx) error {
			return n.Tables.(*table.Table[word]).Put(tx, word{text(i)}, fmt.Sprint(i))
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// said reports whether a node's own state holds all words up to one.
func said(n *clustertest.Node, to int) bool {
	all := true
	err := n.DB.View(func(v *table.View) error {
		for i := range to {
			w, _, ok, err := n.Tables.(*table.Table[word]).Get(v, fmt.Sprint(i))
			if err != nil {
				return err
			}
			all = all && ok && w.Text == text(i)
		}
		return nil
	})
	return err == nil && all
}

func logFile(n *clustertest.Node) string { return filepath.Join(n.Dir, "raft", "log.db") }

// openLog opens the log of a node that is down.
func openLog(t *testing.T, n *clustertest.Node) (log *kv.Log, done func()) {
	t.Helper()
	log, err := kv.OpenLog(logFile(n))
	if err != nil {
		t.Fatal(err)
	}
	return log, func() {
		if err := log.Close(); err != nil {
			t.Error(err)
		}
	}
}

// tear cuts the compressed entries behind one, up to another, short, so that nobody can
// read them, and says how many those are.
func tear(t *testing.T, n *clustertest.Node, after, upto uint64) (torn int) {
	t.Helper()
	db, err := bbolt.Open(logFile(n), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("log"))
		for i := after; i < upto; i++ {
			key := binary.BigEndian.AppendUint64(nil, i+1)
			stored := bytes.Clone(b.Get(key))
			if len(stored) < 2 || stored[1] != 1 {
				continue
			}
			if err := b.Put(key, stored[:len(stored)-3]); err != nil {
				return err
			}
			torn++
		}
		return nil
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	return torn
}

// add puts one more command into the log of a node that is down.
func add(t *testing.T, n *clustertest.Node, data string) (index uint64) {
	t.Helper()
	log, done := openLog(t, n)
	defer done()
	last, err := log.LastIndex()
	if err != nil {
		t.Fatal(err)
	}
	term, err := log.GetUint64([]byte("CurrentTerm"))
	if err != nil {
		t.Fatal(err)
	}
	if err := log.StoreLog(&raft.Log{Index: last + 1, Term: term, Type: raft.LogCommand, Data: []byte(data)}); err != nil {
		t.Fatal(err)
	}
	return last + 1
}

// keep gives the way to put a file back as it is now.
func keep(t *testing.T, name string) (putBack func()) {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// entries gives all entries of a node that is down.
func entries(t *testing.T, n *clustertest.Node) map[uint64]raft.Log {
	t.Helper()
	log, done := openLog(t, n)
	defer done()
	first, err := log.FirstIndex()
	if err != nil {
		t.Fatal(err)
	}
	last, err := log.LastIndex()
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[uint64]raft.Log)
	for i := first; i <= last; i++ {
		var l raft.Log
		if err := log.GetLog(i, &l); err != nil {
			t.Fatal(err)
		}
		all[i] = l
	}
	return all
}

// A start reads nothing of the log that the state holds: not even entries that
// nobody could read.
func TestAStartBeginsBehindTheState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{Define: withWords})
		n := c.Found()
		say(t, n, 0, 200)
		n.Stop() // all of the state is on the disk
		if torn := tear(t, n, 0, 190); torn < 100 {
			t.Fatalf("only %d entries were torn", torn)
		}
		log, done := openLog(t, n)
		unreadable := 0
		for i := range uint64(190) {
			if err := log.GetLog(i+1, &raft.Log{}); err != nil {
				unreadable++
			}
		}
		done()
		if unreadable < 100 {
			t.Fatalf("only %d entries cannot be read", unreadable)
		}
		n.Start()
		if !said(n, 200) {
			t.Error("the state is not what it was")
		}
		say(t, n, 200, 210)
		n.Kill()
		n.Start()
		if !said(n, 210) {
			t.Error("what was written after the start is not there after another")
		}
	})
}

// The state may be behind the log: what it lacks is applied at the start.
func TestAStartAppliesWhatTheStateLacks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{Define: withWords})
		n := c.Found()
		say(t, n, 0, 50)
		n.Kill()
		putBack := keep(t, filepath.Join(n.Dir, "meta.db"))
		n.Start()
		say(t, n, 50, 120)
		n.Kill()
		putBack()
		n.Start()
		c.Await("the state has all of the log", func() bool { return said(n, 120) })
	})
}

// applied is how far the state is that a node has on its disk.
func applied(t *testing.T, n *clustertest.Node) (rev uint64) {
	t.Helper()
	e, err := kv.OpenBolt(filepath.Join(n.Dir, "meta.db"))
	if err != nil {
		t.Fatal(err)
	}
	err = e.Read(func(c kv.Content) error { rev = kv.Applied(c); return nil })
	if err := errors.Join(err, e.Close()); err != nil {
		t.Fatal(err)
	}
	return rev
}

// When all nodes are killed, what was acknowledged is in their logs and need not be
// in their states. One that comes back alone, and hears from nobody what is committed,
// serves all that it had served; and when a power cut took the mark beside the log, all
// that was acknowledged when it last wrote its log.
func TestASurvivorServesWhatWasAcknowledged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{Define: withWords})
		nodes := c.Grow(3)
		const words = 40
		say(t, c.Leader(), 0, words)
		c.Await("all nodes serve all", func() bool { return said(nodes[0], words) && said(nodes[1], words) && said(nodes[2], words) })
		c.Blackout()
		behind, unmarked := 0, 0
		for _, n := range nodes {
			state, there := applied(t, n), 0
			var newest uint64
			for i, l := range entries(t, n) {
				if l.Type == raft.LogCommand && bytes.Contains(l.Data, []byte("word\x00")) {
					there++
					newest = max(newest, i)
				}
			}
			if state < newest-1 {
				behind++
			}
			mark := logFile(n) + ".committed"
			if err := os.Rename(mark, mark+".away"); err != nil {
				t.Fatal(err)
			}
			n.Start()
			if there != words || !said(n, words-1) {
				t.Errorf("%s, at %d of %d, does not serve %d words", n.Name, state, newest, words-1)
			}
			if !said(n, words) {
				unmarked++
			}
			n.Kill()
			if err := os.Rename(mark+".away", mark); err != nil {
				t.Fatal(err)
			}
			n.Start()
			if !said(n, words) {
				t.Errorf("%s, at %d of %d, does not serve the last word", n.Name, state, newest)
			}
			n.Kill()
		}
		if behind == 0 || unmarked == 0 {
			t.Errorf("%d states were behind their logs, %d lacked the last word without the mark", behind, unmarked)
		}
		for _, n := range nodes {
			n.Start()
		}
		c.Await("nothing is lost", func() bool { return said(nodes[0], words) && said(nodes[1], words) && said(nodes[2], words) })
	})
}

// A site loses its power and is dark for hours. Who comes back alone says for how long it
// has heard of no leader, that time and not the time since its own start, and how much of
// its log it cannot serve.
func TestASurvivorSaysHowStaleItIs(t *testing.T) {
	const dark = 5 * time.Hour
	for _, unmarked := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			c := clustertest.New(t, clustertest.Options{Define: withWords})
			nodes := c.Grow(3)
			const words = 40
			say(t, c.Leader(), 0, words)
			n := c.Others(c.Leader())[0]
			c.Await("it serves all", func() bool { return said(n, words) })
			<-time.After(10 * time.Second)
			// The first is on the disk at once, the others when the power is gone.
			say(t, c.Leader(), words, words+3)
			<-time.After(80 * time.Millisecond) // the follower has heard that they are committed
			c.Blackout()
			if unmarked {
				if err := os.Remove(logFile(n) + ".committed"); err != nil {
					t.Fatal(err)
				}
			}
			<-time.After(dark)
			n.Start()
			<-time.After(time.Minute)
			fresh, err := n.DB.Confirmed(t.Context(), func(*table.View) error { return nil })
			if err != nil || !fresh.Stale || fresh.Age < dark || fresh.Age > dark+2*time.Minute {
				t.Errorf("after %v in the dark it says %+v, %v", dark, fresh, err)
			}
			s, err := n.Status(t.Context())
			if err != nil || s.Quorum || time.Since(s.LastContact) < dark || time.Since(s.LastContact) > dark+2*time.Minute {
				t.Errorf("its status says %v, %v", time.Since(s.LastContact), err)
			}
			if lacks := !said(n, words+3); lacks != unmarked || (s.Unconfirmed > 0) != lacks || s.Unconfirmed > 3 {
				t.Errorf("without the mark %v: it lacks the last words: %v, and says that %d entries are not confirmed", unmarked, lacks, s.Unconfirmed)
			}
			for _, other := range nodes {
				if other != n {
					other.Start()
				}
			}
			c.Await("nothing is lost and all is confirmed", func() bool {
				s, err := n.Status(t.Context())
				return err == nil && s.Quorum && s.Unconfirmed == 0 && said(n, words+3)
			})
		})
	}
}

// A lone voter needs nobody to know what is committed: all that it acknowledged.
func TestALoneNodeLosesNothingAcknowledged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{Define: withWords})
		n := c.Found()
		for round := range 4 {
			say(t, n, 10*round, 10*(round+1))
			c.Blackout()
			n.Start()
			if !said(n, 10*(round+1)) {
				t.Errorf("words are missing after round %d", round)
			}
		}
	})
}

// A leader that began behind its state sends every entry, in full, to one that
// lacks them all.
func TestALaggingFollowerGetsEveryEntry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{Define: withWords})
		nodes := c.Grow(3)
		away := nodes[2]
		say(t, nodes[0], 0, 5)
		away.Kill()
		say(t, nodes[0], 5, 150)
		for _, n := range nodes[:2] {
			n.Kill()
		}
		for _, n := range nodes[:2] {
			n.Start()
		}
		lead := c.Leader()
		away.Start()
		c.Await("the node that was away has everything", func() bool { return said(away, 150) })
		say(t, lead, 150, 160)
		c.Await("and goes on", func() bool { return said(away, 160) })
		for _, n := range nodes {
			n.Kill()
		}
		there, here := entries(t, away), entries(t, lead)
		compared := 0
		for i, l := range there {
			mine, ok := here[i]
			if !ok {
				continue // it came after the others were gone
			}
			if l.Term == mine.Term && (l.Type != mine.Type || !bytes.Equal(l.Data, mine.Data)) {
				t.Errorf("entry %d is another one on the node that was away", i)
			}
			if l.Type == raft.LogCommand && len(l.Data) == 0 {
				t.Errorf("entry %d came without its data", i)
			}
			compared++
		}
		if compared < 160 {
			t.Errorf("only %d entries are on both nodes", compared)
		}
	})
}

// A configuration that was applied before the start holds after it, though the
// entry is not read again.
func TestAStartKeepsTheMembership(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{Define: withWords, Snapshots: member.Snapshots{MinBytes: 1000, TrailingLogs: 2}})
		nodes := c.Grow(3)
		for round := range 3 {
			say(t, c.Leader(), 40*round, 40*(round+1))
			for _, n := range nodes {
				n.Kill()
			}
			for _, n := range nodes {
				n.Start()
			}
			c.AwaitVoters(3)
			for _, n := range nodes {
				c.Await("every node has everything", func() bool { return said(n, 40*(round+1)) })
			}
		}
	})
}

// Raft keeps its first term before its first entry; the power may go between.
func TestAFoundingThatWasCutOffGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{Define: withWords})
		n := c.NewNode()
		if _, err := member.Found(n.Dir, n.Name, n.Addr, nil); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(n.Dir, "raft"), 0o700); err != nil {
			t.Fatal(err)
		}
		raw, done := openLog(t, n)
		if err := raw.SetUint64([]byte("CurrentTerm"), 1); err != nil {
			t.Fatal(err)
		}
		done()
		n.Start()
		c.AwaitVoters(1)
		say(t, n, 0, 3)
		n.Kill()
		n.Start()
		c.AwaitVoters(1)
		if !said(n, 3) {
			t.Error("the words are gone")
		}
	})
}

// An entry that this version cannot read stops the node, at every start.
func TestAnUnknownEntryHaltsEveryStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{Define: withWords})
		n := c.Found()
		say(t, n, 0, 30)
		n.Kill()
		add(t, n, "of the future")
		for range 2 {
			err := n.TryStart()
			if err == nil {
				err = n.Done()
			}
			if !errors.Is(err, kv.ErrHalted) {
				t.Fatalf("a start on an entry that nobody knows: %v", err)
			}
			n.Kill()
		}
	})
}

// A voter whose log is gone could vote a second time: it does not start, and leaves
// the directory as it found it.
func TestANodeWithoutItsLogDoesNotStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{})
		c.Grow(3)
		victim := c.Others(c.Leader())[0]
		victim.Kill()
		whole := filepath.Join(t.TempDir(), "raft")
		if err := os.Rename(filepath.Join(victim.Dir, "raft"), whole); err != nil {
			t.Fatal(err)
		}
		for _, lost := range []string{"raft", "meta.db"} {
			if err := os.RemoveAll(filepath.Join(victim.Dir, lost)); err != nil {
				t.Fatal(err)
			}
			err := victim.TryStart()
			if !errors.Is(err, member.ErrLogLost) || !strings.Contains(err.Error(), "atoll node wipe --data "+victim.Dir) {
				t.Fatalf("without %s: %v", lost, err)
			}
			if err := member.CheckLog(victim.Dir); !errors.Is(err, member.ErrLogLost) {
				t.Fatalf("after a refused start: %v", err)
			}
		}
		// The log brings back what was only the state.
		if err := errors.Join(os.RemoveAll(filepath.Join(victim.Dir, "raft")), os.Rename(whole, filepath.Join(victim.Dir, "raft"))); err != nil {
			t.Fatal(err)
		}
		victim.Start()
		c.AwaitVoters(3)
	})
}

// A node that has joined and never ran has no log either, and may be cut off until
// it has one.
func TestANodeThatHasJustJoinedStarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{})
		first := c.Found()
		n := c.NewNode()
		if err := n.JoinWith(token(t, first, time.Hour, 1), first.Addr); err != nil {
			t.Fatal(err)
		}
		// Cut off while it made the log's directory.
		if err := os.Mkdir(filepath.Join(n.Dir, "raft"), 0o700); err != nil {
			t.Fatal(err)
		}
		n.Start()
		n.Kill()
		if err := os.RemoveAll(filepath.Join(n.Dir, "raft")); err != nil {
			t.Fatal(err)
		}
		if err := n.TryStart(); !errors.Is(err, member.ErrLogLost) {
			t.Fatalf("once it ran: %v", err)
		}
	})
}

// What a founding left behind that was cut short does not found beside the site
// that the machine joins then.
func TestAFoundingThatWasCutOffIsForgottenByAJoin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{})
		first := c.Found()
		n := c.NewNode()
		if _, err := member.Found(n.Dir, n.Name, n.Addr, nil); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(n.Dir, "identity.json")); err != nil { // the last to be written
			t.Fatal(err)
		}
		if err := n.JoinWith(token(t, first, time.Hour, 1), first.Addr); err != nil {
			t.Fatal(err)
		}
		n.Start()
		c.Await("one site of two", func() bool {
			s, err := n.Status(t.Context())
			return err == nil && s.Leader == first.Self() && len(s.Members) == 2
		})
	})
}
