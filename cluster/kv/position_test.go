package kv

import (
	"bytes"
	"io"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hashicorp/raft"
)

func reopen(t *testing.T, e Engine, path string) (Engine, *Machine) {
	t.Helper()
	if e != nil {
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
	}
	e, err := OpenBolt(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e, newTestMachine(t, e)
}

func wantPosition(t *testing.T, m *Machine, want Position) {
	t.Helper()
	if diff := cmp.Diff(want, m.Position(), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("position: %s", diff)
	}
}

func TestPosition(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	e, m := reopen(t, nil, path)
	wantPosition(t, m, Position{})
	command := func(index, term uint64) *raft.Log {
		l := entry(t, index, Txn{ID: NewID(), Ops: []Op{putOp("a", "1")}})
		l.Term = term
		return l
	}
	first, second := command(2, 1), command(5, 2)
	m.ApplyBatch([]*raft.Log{{Index: 1, Term: 1, Type: raft.LogConfiguration, Data: []byte("one")}, first})
	wantPosition(t, m, Position{Index: 2, Term: 1, Changed: 1, Members: []byte("one")})
	m.ApplyBatch([]*raft.Log{{Index: 4, Term: 2, Type: raft.LogConfiguration, Data: []byte("three")}, second})
	want := Position{Index: 5, Term: 2, Changed: 4, Members: []byte("three")}
	wantPosition(t, m, want)
	logged := int64(len("one") + len(first.Data) + len("three") + len(second.Data))
	if m.Logged() != logged {
		t.Errorf("%d bytes of log were applied, want %d", m.Logged(), logged)
	}

	e, m = reopen(t, e, path)
	wantPosition(t, m, want)
	m.ApplyBatch([]*raft.Log{first, second}) // raft replays what it need not
	if m.Logged() != logged {
		t.Errorf("after a start %d bytes of log were applied, want %d", m.Logged(), logged)
	}
	m.Saved(logged)
	third := command(6, 2)
	m.ApplyBatch([]*raft.Log{third})
	e, m = reopen(t, e, path)
	if m.Logged() != int64(len(third.Data)) {
		t.Errorf("after a snapshot and a start %d bytes of log were applied, want %d", m.Logged(), len(third.Data))
	}

	// A version that does not know of the record moves on without it.
	if err := e.Update(func(w Writer) error { return w.Set(meta, []byte(appliedKey), be64(9)) }); err != nil {
		t.Fatal(err)
	}
	_, m = reopen(t, e, path)
	wantPosition(t, m, Position{Index: 9, From: 9})
	m.ApplyBatch([]*raft.Log{third})
	if m.Logged() != int64(len(third.Data)) {
		t.Errorf("what another version applied counts as %d bytes when it is replayed, want %d", m.Logged(), len(third.Data))
	}
	m.ApplyBatch([]*raft.Log{command(10, 3)})
	wantPosition(t, m, Position{Index: 10, Term: 3, From: 9})
	m.ApplyBatch([]*raft.Log{{Index: 11, Term: 3, Type: raft.LogConfiguration, Data: []byte("five")}})
	wantPosition(t, m, Position{Index: 11, Term: 3, From: 9, Changed: 11, Members: []byte("five")})
}

// A snapshot brings a state and not a place in this node's log.
func TestPositionAfterRestore(t *testing.T) {
	m := newTestMachine(t, NewMemory())
	m.ApplyBatch([]*raft.Log{{Index: 1, Term: 1, Type: raft.LogConfiguration, Data: []byte("one")}, entry(t, 2, Txn{ID: NewID()})})
	var stream bytes.Buffer
	if err := m.engine.Read(func(c Content) error { return WriteSnapshot(&stream, c) }); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "state.db")
	e, other := reopen(t, nil, path)
	if err := other.Restore(io.NopCloser(&stream)); err != nil {
		t.Fatal(err)
	}
	wantPosition(t, other, Position{Index: 2, From: 2})
	if other.Logged() != 0 {
		t.Errorf("%d bytes of log since a snapshot that was just restored", other.Logged())
	}
	// Who restored it may know where it ends.
	want := Position{Index: 2, Term: 1, From: 2, Changed: 1, Members: []byte("one")}
	elsewhere := want
	elsewhere.Index, elsewhere.Term = 3, 2
	for _, p := range []Position{want, elsewhere} {
		if err := other.Place(p); err != nil {
			t.Fatal(err)
		}
		wantPosition(t, other, want)
	}
	_, other = reopen(t, e, path)
	wantPosition(t, other, want)
}

// What a batch did not write is not in the position either.
func TestPositionBeforeAHalt(t *testing.T) {
	m := newTestMachine(t, NewMemory())
	good := entry(t, 1, Txn{ID: NewID()})
	m.ApplyBatch([]*raft.Log{good, {Index: 2, Type: raft.LogCommand, Data: []byte("of the future")}, {Index: 3, Type: raft.LogConfiguration, Data: []byte("one")}})
	if m.Err() == nil {
		t.Fatal("the machine did not halt")
	}
	wantPosition(t, m, Position{Index: 1})
}
