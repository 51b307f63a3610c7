package member_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"

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

// openLog opens the log of a node that is down. raw is what lies on the disk,
// full is what the node reads.
func openLog(t *testing.T, n *clustertest.Node) (raw *raftboltdb.BoltStore, full *kv.Packed, done func()) {
	t.Helper()
	raw, err := raftboltdb.New(raftboltdb.Options{Path: filepath.Join(n.Dir, "raft", "log.db")})
	if err != nil {
		t.Fatal(err)
	}
	full, err = kv.NewPacked(raw)
	if err != nil {
		t.Fatal(err)
	}
	return raw, full, func() {
		full.Close()
		if err := raw.Close(); err != nil {
			t.Error(err)
		}
	}
}

// entries gives all entries of a node that is down.
func entries(t *testing.T, n *clustertest.Node) map[uint64]raft.Log {
	t.Helper()
	_, full, done := openLog(t, n)
	defer done()
	first, err := full.FirstIndex()
	if err != nil {
		t.Fatal(err)
	}
	last, err := full.LastIndex()
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[uint64]raft.Log)
	for i := first; i <= last; i++ {
		var l raft.Log
		if err := full.GetLog(i, &l); err != nil {
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
		n.Kill()
		raw, _, done := openLog(t, n)
		damaged := 0
		for i := range uint64(190) {
			var l raft.Log
			if err := raw.GetLog(i+1, &l); err != nil {
				t.Fatal(err)
			}
			if string(l.Extensions) == "" {
				continue
			}
			l.Data = []byte("torn")
			if err := raw.StoreLog(&l); err != nil {
				t.Fatal(err)
			}
			damaged++
		}
		done()
		if damaged < 100 {
			t.Fatalf("only %d entries were damaged", damaged)
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
		file := filepath.Join(n.Dir, "meta.db")
		old, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		n.Start()
		say(t, n, 50, 120)
		n.Kill()
		if err := os.WriteFile(file, old, 0o600); err != nil {
			t.Fatal(err)
		}
		n.Start()
		c.Await("the state has all of the log", func() bool { return said(n, 120) })
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

// An entry that this version cannot read stops the node, at every start.
func TestAnUnknownEntryHaltsEveryStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clustertest.New(t, clustertest.Options{Define: withWords})
		n := c.Found()
		say(t, n, 0, 30)
		n.Kill()
		raw, full, done := openLog(t, n)
		last, err := full.LastIndex()
		if err != nil {
			t.Fatal(err)
		}
		term, err := raw.GetUint64([]byte("CurrentTerm"))
		if err != nil {
			t.Fatal(err)
		}
		if err := full.StoreLog(&raft.Log{Index: last + 1, Term: term, Type: raft.LogCommand, Data: []byte("of the future")}); err != nil {
			t.Fatal(err)
		}
		done()
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
