package kv

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"
)

// The log knows what was committed when it was written last; a state that is behind
// is brought there, and no further.
func TestCatchUp(t *testing.T) {
	dir := t.TempDir()
	log, err := OpenLog(filepath.Join(dir, "log.db"))
	if err != nil {
		t.Fatal(err)
	}
	want := newTestMachine(t, NewMemory())
	var logs []*raft.Log
	for i := range uint64(300) {
		l := entry(t, i+1, Txn{ID: NewID(), Base: i, Ops: []Op{appendOp("log", "x"), putOp("a", "1")}})
		l.Term = 1
		switch i {
		case 10:
			*l = raft.Log{Index: i + 1, Term: 1, Type: raft.LogConfiguration, Data: []byte("members")}
		case 20:
			*l = raft.Log{Index: i + 1, Term: 1, Type: raft.LogNoop}
		}
		logs = append(logs, l)
		log.Stage(i - i%2) // what was committed before
		log.Stage(1)       // never less
		if err := log.StoreLog(l); err != nil {
			t.Fatal(err)
		}
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	if log, err = OpenLog(filepath.Join(dir, "log.db")); err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	const committed = 298
	if n, err := log.Committed(); n != committed || err != nil {
		t.Fatalf("committed up to %d, %v; want %d", n, err, committed)
	}
	for _, l := range logs[:committed] {
		if l.Type != raft.LogNoop {
			want.Apply(l)
		}
	}
	for _, at := range []int{0, 1, 15, 200, 297, committed, 300} {
		m := newTestMachine(t, NewMemory())
		for _, l := range logs[:at] {
			if l.Type != raft.LogNoop {
				m.Apply(l)
			}
		}
		before := dump(t, m.engine)
		if err := m.CatchUp(log); err != nil {
			t.Fatal(err)
		}
		if at > committed {
			if diff := cmp.Diff(before, dump(t, m.engine)); diff != "" {
				t.Errorf("a state that is ahead was changed: %s", diff)
			}
			continue
		}
		if diff := cmp.Diff(dump(t, want.engine), dump(t, m.engine)); diff != "" {
			t.Errorf("from %d: %s", at, diff)
		}
		wantPosition(t, m, want.Position())
	}
}

// Where it is not certain that the log goes on where the state ends, nothing is
// applied; of a log with a gap, what is before it.
func TestCatchUpIsCertain(t *testing.T) {
	start := func() (*Log, *Machine, []*raft.Log) {
		log, err := OpenLog(filepath.Join(t.TempDir(), "log.db"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { log.Close() })
		m := newTestMachine(t, NewMemory())
		var logs []*raft.Log
		for i := range uint64(20) {
			l := entry(t, i+1, Txn{ID: NewID(), Base: i, Ops: []Op{appendOp("log", "x")}})
			l.Term = 3
			logs = append(logs, l)
		}
		log.Stage(20)
		if err := log.StoreLogs(logs); err != nil {
			t.Fatal(err)
		}
		return log, m, logs
	}
	for name, c := range map[string]struct {
		applied, want int
		harm          func(log *Log, m *Machine) error
	}{
		"as it should be":                {10, 20, func(*Log, *Machine) error { return nil }},
		"the log begins later":           {10, 10, func(log *Log, _ *Machine) error { return log.DeleteRange(1, 12) }},
		"it begins right behind":         {10, 10, func(log *Log, _ *Machine) error { return log.DeleteRange(1, 10) }},
		"an empty state":                 {0, 0, func(log *Log, _ *Machine) error { return log.DeleteRange(1, 5) }},
		"a gap":                          {10, 14, func(log *Log, _ *Machine) error { return log.DeleteRange(15, 16) }},
		"the state is of another term":   {10, 10, func(_ *Log, m *Machine) error { m.position.Term = 2; return nil }},
		"the state was restored":         {10, 10, func(_ *Log, m *Machine) error { return m.Restore(snapshotOf(t, m)) }},
		"nothing is known of the commit": {10, 10, func(log *Log, _ *Machine) error { return log.Set(committedKey, be64(0)) }},
	} {
		log, m, logs := start()
		m.ApplyBatch(logs[:c.applied])
		if err := c.harm(log, m); err != nil {
			t.Fatal(err)
		}
		if err := m.CatchUp(log); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if m.Applied() != uint64(c.want) {
			t.Errorf("%s: applied up to %d, want %d", name, m.Applied(), c.want)
		}
	}
	log, m, _ := start()
	if err := log.StoreLog(&raft.Log{Index: 15, Term: 3, Type: raft.LogCommand, Data: []byte("of the future")}); err != nil {
		t.Fatal(err)
	}
	if err := m.CatchUp(log); !errors.Is(err, ErrHalted) || m.Applied() != 14 {
		t.Errorf("an entry that nobody can read: %v, applied up to %d", err, m.Applied())
	}
}

// The newest committed entry is marked beside the log. The mark counts only while the
// log has that very entry.
func TestMark(t *testing.T) {
	entryAt := func(index, term uint64, data string) *raft.Log {
		return &raft.Log{Index: index, Term: term, Type: raft.LogCommand, Data: []byte(data)}
	}
	for name, c := range map[string]struct {
		harm func(log *Log, path string) error
		want uint64
	}{
		"as it should be": {func(*Log, string) error { return nil }, 9},
		"more is staged":  {func(log *Log, _ string) error { log.Stage(11); return log.StoreLog(entryAt(12, 2, "12")) }, 11},
		"another entry":   {func(log *Log, _ string) error { return log.StoreLog(entryAt(9, 2, "of another log")) }, 5},
		"another term":    {func(log *Log, _ string) error { return log.StoreLog(entryAt(9, 3, "9")) }, 5},
		"no such entry":   {func(log *Log, _ string) error { return log.DeleteRange(9, 9) }, 5},
		"a torn mark":     {func(_ *Log, path string) error { return os.WriteFile(path+".committed", make([]byte, 7), 0o600) }, 5},
		"a damaged mark":  {func(_ *Log, path string) error { return os.WriteFile(path+".committed", make([]byte, 24), 0o600) }, 5},
		"no mark":         {func(_ *Log, path string) error { return os.Remove(path + ".committed") }, 5},
	} {
		path := filepath.Join(t.TempDir(), "log.db")
		log, err := OpenLog(path)
		if err != nil {
			t.Fatal(err)
		}
		log.Stage(5)
		for i := range uint64(11) {
			if err := log.StoreLog(entryAt(i+1, 2, fmt.Sprint(i+1))); err != nil {
				t.Fatal(err)
			}
			if i < 9 {
				log.Reached(entryAt(i+1, 2, fmt.Sprint(i+1)))
			}
		}
		if err := errors.Join(c.harm(log, path), log.Close()); err != nil {
			t.Fatal(err)
		}
		if log, err = OpenLog(path); err != nil {
			t.Fatal(err)
		}
		if n, err := log.Committed(); n != c.want || err != nil {
			t.Errorf("%s: committed up to %d, %v; want %d", name, n, err, c.want)
		}
		if err := log.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
