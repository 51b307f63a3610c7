package kv

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"
)

// sink is a raft.SnapshotSink in memory.
type sink struct {
	bytes.Buffer
	closed, cancelled bool
	fail              error
}

func (s *sink) Write(b []byte) (int, error) {
	if s.fail != nil {
		return 0, s.fail
	}
	return s.Buffer.Write(b)
}
func (s *sink) Close() error  { s.closed = true; return nil }
func (s *sink) Cancel() error { s.cancelled = true; return nil }
func (s *sink) ID() string    { return "test" }

func snapshotOf(t *testing.T, m *Machine) io.ReadCloser {
	t.Helper()
	snap, err := m.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	var s sink
	if err := snap.Persist(&s); err != nil {
		t.Fatal(err)
	}
	snap.Release() // raft's own, after ours
	if !s.closed {
		t.Error("the sink is not closed")
	}
	return io.NopCloser(&s.Buffer)
}

func TestSnapshotCarriesTheState(t *testing.T) {
	for name, open := range engines(t) {
		t.Run(name, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(3, 3))
			logs := randomTxns(t, rnd, 200)
			from := newTestMachine(t, open(t))
			applyInBatches(from, rnd, logs[:150])
			to := newTestMachine(t, open(t))
			do(t, to, nil, putOp("zzz", "must go"), appendOp("zzz", "too"))
			if err := to.Restore(snapshotOf(t, from)); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(dump(t, from.engine), dump(t, to.engine)); diff != "" {
				t.Fatal(diff)
			}
			checkDerived(t, to.engine)
			if got := listAll(t, to.engine, Local); !strings.Contains(strings.Join(got, " "), "mark=\x01") {
				t.Error("the marks are missing")
			}
			// What was remembered came with it: both go on alike.
			if diff := cmp.Diff(applyInBatches(from, rnd, logs[150:]), applyInBatches(to, rnd, logs[150:])); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(dump(t, from.engine), dump(t, to.engine)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestSnapshotIsOfItsMoment(t *testing.T) {
	m := newTestMachine(t, openTestBolt(t, filepath.Join(t.TempDir(), "state.db")))
	do(t, m, nil, putOp("a", "1"))
	before := dump(t, m.engine)
	snap, err := m.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	do(t, m, nil, putOp("a", "2"))
	var s sink
	if err := snap.Persist(&s); err != nil {
		t.Fatal(err)
	}
	to := newTestMachine(t, NewMemory())
	if err := to.Restore(io.NopCloser(&s.Buffer)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, dump(t, to.engine)); diff != "" {
		t.Error(diff)
	}
}

func TestDamagedSnapshotChangesNothing(t *testing.T) {
	from := newTestMachine(t, NewMemory())
	applyInBatches(from, rand.New(rand.NewPCG(1, 2)), randomTxns(t, rand.New(rand.NewPCG(1, 1)), 40))
	good, _ := io.ReadAll(snapshotOf(t, from))
	for name, open := range engines(t) {
		t.Run(name, func(t *testing.T) {
			to := newTestMachine(t, open(t))
			do(t, to, nil, putOp("mine", "1"))
			before := dump(t, to.engine)
			try := func(data []byte) {
				t.Helper()
				if err := to.Restore(io.NopCloser(bytes.NewReader(data))); err == nil {
					t.Error("a damaged snapshot was restored")
				}
			}
			for n := 0; n < len(good); n += 1 + len(good)/20 {
				if n != 0 {
					try(good[:n])
				}
				if n > len(snapshotMagic) {
					bad := bytes.Clone(good)
					bad[n] ^= 0x10
					try(bad)
				}
			}
			try(append(bytes.Clone(good), good[8:]...))
			if diff := cmp.Diff(before, dump(t, to.engine)); diff != "" {
				t.Error(diff)
			}
			if to.Err() != nil {
				t.Errorf("halted: %v", to.Err())
			}
			newer := bytes.Clone(good)
			newer[len(snapshotMagic)]++
			try(newer)
			if to.Err() == nil {
				t.Error("an unknown format must halt")
			}
		})
	}
}

func TestPersistCancelsAndReleases(t *testing.T) {
	m := newTestMachine(t, openTestBolt(t, filepath.Join(t.TempDir(), "state.db")))
	do(t, m, nil, putOp("a", "1"))
	snap, err := m.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	s := sink{fail: errors.New("no space")}
	if err := snap.Persist(&s); !errors.Is(err, s.fail) || !s.cancelled || s.closed {
		t.Errorf("%v, cancelled %v, closed %v", err, s.cancelled, s.closed)
	}
	// Close waits for open reads: without the release it would hang.
	if err := m.engine.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestSnapshotIsTheSameEverywhere: equal states have equal snapshots.
func TestSnapshotIsTheSameEverywhere(t *testing.T) {
	logs := randomTxns(t, rand.New(rand.NewPCG(4, 4)), 100)
	var got [][]byte
	for range 2 {
		m := newTestMachine(t, NewMemory())
		applyInBatches(m, rand.New(rand.NewPCG(uint64(len(got)), 5)), logs)
		b, _ := io.ReadAll(snapshotOf(t, m))
		got = append(got, b)
	}
	if !bytes.Equal(got[0], got[1]) {
		t.Error("two snapshots of one state differ")
	}
}

func FuzzRestore(f *testing.F) {
	m, err := NewMachine(NewMemory(), Hooks{})
	if err != nil {
		f.Fatal(err)
	}
	txn := samples()[2]
	txn.Conds = nil
	txn.Ops = txn.Ops[4:]
	data, _ := txn.Encode()
	m.Apply(&raft.Log{Index: 1, Type: raft.LogCommand, Data: data})
	snap, _ := m.Snapshot()
	var s sink
	if err := snap.Persist(&s); err != nil {
		f.Fatal(err)
	}
	f.Add(s.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := NewMachine(NewMemory(), Hooks{})
		if err != nil {
			t.Fatal(err)
		}
		_ = m.Restore(io.NopCloser(bytes.NewReader(data)))
	})
}

// released notes whether a state is still read.
type released struct {
	Snapshot
	done bool
}

func (r *released) Release() {
	r.done = true
	r.Snapshot.Release()
}

type discardSink struct{ io.Writer }

func (discardSink) ID() string    { return "test" }
func (discardSink) Cancel() error { return nil }
func (discardSink) Close() error  { return nil }

// A snapshot does not read any more when it waits for the engine, which may wait for
// its readers.
func TestPersistLetsGoBeforeItWaits(t *testing.T) {
	e := NewMemory()
	state, err := e.Open()
	if err != nil {
		t.Fatal(err)
	}
	r := &released{Snapshot: state}
	waited := false
	s := &fsmSnapshot{state: r, sync: func() error {
		if waited = true; !r.done {
			t.Error("it waits while it reads")
		}
		return nil
	}}
	if err := s.Persist(discardSink{io.Discard}); err != nil || !waited {
		t.Errorf("%v, waited: %v", err, waited)
	}
}
