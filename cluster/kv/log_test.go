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

// What is compressed with a dictionary is read with the same one: it is frozen.
// TestLogIsCutInSteps: a long start goes in several transactions, the end, and all
// there is, in one.
func TestLogIsCutInSteps(t *testing.T) {
	const entries, size = 64, 1000
	for name, cut := range map[string]struct {
		first, last, left uint64
		transactions      int
	}{
		"start":  {1, 40, entries - 40, 4},
		"middle": {2, 40, entries - 39, 1},
		"end":    {20, entries, 19, 1},
		"all":    {1, entries, 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			l := openTestLog(t, filepath.Join(t.TempDir(), "log.db"))
			l.cut = 10 * size
			var logs []*raft.Log
			for i := range entries {
				logs = append(logs, &raft.Log{Index: uint64(i + 1), Term: 1, Type: raft.LogConfiguration, Data: make([]byte, size)})
			}
			if err := l.StoreLogs(logs); err != nil {
				t.Fatal(err)
			}
			before := txid(t, l)
			if err := l.DeleteRange(cut.first, cut.last); err != nil {
				t.Fatal(err)
			}
			if got := txid(t, l) - before; got != cut.transactions {
				t.Errorf("%d transactions, want %d", got, cut.transactions)
			}
			left := uint64(0)
			for i := uint64(1); i <= entries; i++ {
				var entry raft.Log
				switch err := l.GetLog(i, &entry); {
				case err == nil && (i < cut.first || i > cut.last):
					left++
				case !errors.Is(err, raft.ErrLogNotFound):
					t.Errorf("entry %d: %v", i, err)
				}
			}
			if left != cut.left {
				t.Errorf("%d entries are left, want %d", left, cut.left)
			}
		})
	}
}

// txid is the number of the newest transaction of a log's file.
func txid(t *testing.T, l *Log) (id int) {
	t.Helper()
	if err := l.db.View(func(tx *bbolt.Tx) error {
		id = tx.ID()
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return id
}

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
	length := func() int64 {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
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
	before := length()
	for round := 1; round < 4; round++ {
		if err := l.DeleteRange(1, uint64(round*batches*batch)); err != nil {
			t.Fatal(err)
		}
		store(1 + round*batches*batch)
	}
	if after := length(); after > before*3/2 {
		t.Errorf("the file grew from %d to %d bytes with a log that did not", before, after)
	}
}
