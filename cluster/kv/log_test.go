package kv

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"
)

func openTestLog(t *testing.T, path string) *Log {
	t.Helper()
	l, err := OpenLog(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestLogKeepsEntries(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log.db")
	l := openTestLog(t, path)
	repeats := []byte(strings.Repeat("artifact/library/app/"+digestOf(77), 20))
	at := time.Unix(1_700_000_000, 2).UTC()
	logs := []*raft.Log{
		{Index: 1, Term: 1, Type: raft.LogNoop, AppendedAt: at},
		{Index: 2, Term: 1, Type: raft.LogCommand, Data: []byte("short"), AppendedAt: at},
		{Index: 3, Term: 1, Type: raft.LogCommand, Data: repeats},
		{Index: 4, Term: 1, Type: raft.LogConfiguration, Data: repeats, AppendedAt: at},
		{Index: 5, Term: 2, Type: raft.LogCommand, Data: bytes.Repeat([]byte{0}, MaxTxnBytes), AppendedAt: at},
		{Index: 6, Term: 1 << 40, Type: raft.LogCommand, Data: repeats, Extensions: []byte("of another"), AppendedAt: at},
	}
	sent := bytes.Clone(repeats)
	if err := l.StoreLogs(logs); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(logs[2].Data, sent) {
		t.Error("the caller's entry was changed")
	}
	if n := len(l.encode(logs[2])); n > len(repeats)/5 {
		t.Errorf("an entry that repeats itself takes %d of %d bytes", n, len(repeats))
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = openTestLog(t, path)
	for _, want := range logs {
		got := raft.Log{Data: []byte("left from before"), Extensions: []byte("too")}
		if err := l.GetLog(want.Index, &got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(*want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("entry %d: %s", want.Index, diff)
		}
	}
	if err := l.GetLog(7, &raft.Log{}); !errors.Is(err, raft.ErrLogNotFound) {
		t.Errorf("an entry that is not there: %v", err)
	}
	ends := func(first, last uint64) {
		t.Helper()
		f, err1 := l.FirstIndex()
		n, err2 := l.LastIndex()
		if f != first || n != last || err1 != nil || err2 != nil {
			t.Errorf("the log goes from %d (%v) to %d (%v), want %d to %d", f, err1, n, err2, first, last)
		}
	}
	ends(1, 6)
	for _, cut := range [][4]uint64{{1, 2, 3, 6}, {6, 6, 3, 5}, {1, 100, 0, 0}} {
		if err := l.DeleteRange(cut[0], cut[1]); err != nil {
			t.Fatal(err)
		}
		ends(cut[2], cut[3])
	}
}

// Wherever the log is cut, once or twice, what is left is the same after a restart,
// and goes on.
func TestLogIsCut(t *testing.T) {
	const entries = 64
	type span struct{ first, last uint64 }
	for name, cut := range map[string]struct {
		cuts []span
		left span
	}{
		"start":                 {[]span{{1, 40}}, span{41, entries}},
		"start twice":           {[]span{{1, 40}, {1, 50}}, span{51, entries}},
		"start, and less":       {[]span{{1, 40}, {1, 30}}, span{41, entries}},
		"before the start":      {[]span{{1, 40}, {20, 40}}, span{41, entries}},
		"all but the last":      {[]span{{1, entries - 1}}, span{entries, entries}},
		"end":                   {[]span{{20, entries}}, span{1, 19}},
		"start, then end":       {[]span{{1, 10}, {20, entries}}, span{11, 19}},
		"all":                   {[]span{{1, entries}}, span{}},
		"start, then all":       {[]span{{1, 40}, {41, entries}}, span{}},
		"start, then all of it": {[]span{{1, 40}, {1, entries + 9}}, span{}},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "log.db")
			l := openTestLog(t, path)
			if err := l.StoreLogs(plainLogs(1, entries, 1000)); err != nil {
				t.Fatal(err)
			}
			for _, c := range cut.cuts {
				if err := l.DeleteRange(c.first, c.last); err != nil {
					t.Fatal(err)
				}
			}
			holds := func(want span) {
				t.Helper()
				first, err1 := l.FirstIndex()
				last, err2 := l.LastIndex()
				if (span{first, last}) != want || err1 != nil || err2 != nil {
					t.Errorf("the log goes from %d (%v) to %d (%v), want %v", first, err1, last, err2, want)
				}
				for i := uint64(0); i <= entries+10; i++ {
					err := l.GetLog(i, &raft.Log{})
					if in := want.first <= i && i <= want.last && i > 0; in && err != nil || !in && !errors.Is(err, raft.ErrLogNotFound) {
						t.Errorf("entry %d: %v", i, err)
					}
				}
			}
			holds(cut.left)
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			l = openTestLog(t, path)
			holds(cut.left)
			longer := span{cut.left.first, cut.left.last + 3}
			if cut.left.last == 0 {
				longer = span{5, 7} // a log may begin anywhere
			}
			if err := l.StoreLogs(plainLogs(longer.last-2, 3, 10)); err != nil {
				t.Fatal(err)
			}
			holds(longer)
		})
	}
}

func plainLogs(first uint64, n, size int) (logs []*raft.Log) {
	for i := range n {
		logs = append(logs, &raft.Log{Index: first + uint64(i), Term: 1, Type: raft.LogConfiguration, Data: make([]byte, size)})
	}
	return logs
}

// However much of the log's start is cut, no commit writes a long list of free pages, and
// what was cut makes room for what comes.
func TestLogStartIsReclaimedAsNeeded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log.db")
	l := openTestLog(t, path)
	l.db.NoSync = true
	const batch, size = 16, 16 << 10
	next := uint64(1)
	store := func(batches int) (longest int) {
		for range batches {
			if err := l.StoreLogs(plainLogs(next, batch, size)); err != nil {
				t.Fatal(err)
			}
			next += batch
			longest = max(longest, l.db.Stats().FreeAlloc)
		}
		return longest
	}
	store(128)
	whole := length(t, path)
	// Three quarters of the file go in each round.
	for range 6 {
		if err := l.DeleteRange(1, next-1-32*batch); err != nil {
			t.Fatal(err)
		}
		if free := store(96); free > 3*(spareLog+spareShare*batch*size*5/4) {
			t.Errorf("%d bytes were free in a file of %d", free, whole)
		}
	}
	if now := length(t, path); now > whole*5/4 {
		t.Errorf("the file grew from %d to %d bytes with a log that did not", whole, now)
	}
	if err := l.StoreLog(plainLogs(3, 1, 1)[0]); err == nil {
		t.Error("an entry before the log's start was taken")
	}
}

func length(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// What is compressed with a dictionary is read with the same one: it is frozen.
func TestLogDictionaryStays(t *testing.T) {
	const frozen = "3c2e84ecd3c134e963e88b74b098d1e8f7d696c844ff8870b964bacb42ff76f4"
	if sum := fmt.Sprintf("%x", sha256.Sum256([]byte(logDictionary))); sum != frozen {
		t.Errorf("the dictionary is another one, %s: logs that were written with the old one cannot be read; give the new one its own number beside it", sum)
	}
}

func TestLogNamesDamage(t *testing.T) {
	l := openTestLog(t, filepath.Join(t.TempDir(), "log.db"))
	whole := l.encode(&raft.Log{Type: raft.LogCommand, Term: 3, Data: []byte(strings.Repeat("again and ", 100))})
	for name, stored := range map[string][]byte{
		"cut short": whole[:len(whole)-3], "no header": whole[:2], "nothing": {}, "another compression": append([]byte{0, 9}, whole[2:]...),
	} {
		if err := l.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(logBucket).Put(be64(4), stored) }); err != nil {
			t.Fatal(err)
		}
		if err := l.GetLog(4, &raft.Log{}); err == nil || !strings.Contains(err.Error(), "entry 4 of the log is damaged") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLogKeepsVotes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log.db")
	l := openTestLog(t, path)
	// Raft knows a key that was never set by the error's text.
	if _, err := l.GetUint64([]byte("term")); err == nil || err.Error() != "not found" {
		t.Errorf("a key that is not there: %v", err)
	}
	if err := errors.Join(l.SetUint64([]byte("term"), 7), l.Set([]byte("vote"), []byte("n1"))); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenLog(path); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second opener: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = openTestLog(t, path)
	term, err1 := l.GetUint64([]byte("term"))
	vote, err2 := l.Get([]byte("vote"))
	if term != 7 || string(vote) != "n1" || err1 != nil || err2 != nil {
		t.Errorf("term %d (%v), vote %q (%v)", term, err1, vote, err2)
	}
	if _, err := l.GetUint64([]byte("vote")); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("a number that is none: %v", err)
	}
}

func TestLogRefusesOtherFormats(t *testing.T) {
	for name, write := range map[string]func(tx *bbolt.Tx) error{
		"format 09": func(tx *bbolt.Tx) error {
			b, err := tx.CreateBucket(logFormatBucket)
			if err != nil {
				return err
			}
			return b.Put([]byte(formatKey), []byte{9})
		},
		"has format  and": func(tx *bbolt.Tx) error { // from before there was a number
			_, err := tx.CreateBucket([]byte("logs"))
			return err
		},
	} {
		path := filepath.Join(t.TempDir(), "log.db")
		db, err := bbolt.Open(path, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(db.Update(write), db.Close()); err != nil {
			t.Fatal(err)
		}
		_, err = OpenLog(path)
		for _, want := range []string{path, name, fmt.Sprintf("format %d", logFormat), "join again"} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want %q in it", err, want)
			}
		}
	}
}

// The pages of the log are full, and what is cut off in front is used again.
func TestLogIsPacked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log.db")
	l := openTestLog(t, path)
	l.db.NoSync = true
	const size, batches, batch = 200, 400, 16
	store := func(from int) {
		for i := from; i < from+batches*batch; i += batch {
			var logs []*raft.Log
			for j := range batch {
				logs = append(logs, &raft.Log{Index: uint64(i + j), Type: raft.LogCommand, Data: make([]byte, size)})
			}
			if err := l.StoreLogs(logs); err != nil {
				t.Fatal(err)
			}
		}
	}
	store(1)
	if err := l.db.View(func(tx *bbolt.Tx) error {
		stats := tx.Bucket(logBucket).Stats()
		if full := float64(stats.LeafInuse) / float64(stats.LeafAlloc); full < 0.85 {
			t.Errorf("pages are %.2f full", full)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	before := length(t, path)
	for round := 1; round < 4; round++ {
		if err := l.DeleteRange(1, uint64(round*batches*batch)); err != nil {
			t.Fatal(err)
		}
		store(1 + round*batches*batch)
	}
	if after := length(t, path); after > before*3/2 {
		t.Errorf("the file grew from %d to %d bytes with a log that did not", before, after)
	}
}
