package kv

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"
)

// deriveFirst derives one local row from a row's first byte.
func deriveFirst(key, value []byte) [][]byte {
	if len(value) == 0 {
		return nil
	}
	return [][]byte{append([]byte{value[0], '/'}, key...)}
}

func newTestMachine(t *testing.T, e Engine) *Machine {
	t.Helper()
	m, err := NewMachine(e, Hooks{Derive: deriveFirst, Marks: func() map[string][]byte { return map[string][]byte{"mark": {1}} }})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func entry(t *testing.T, index uint64, txn Txn) *raft.Log {
	t.Helper()
	data, err := txn.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return &raft.Log{Index: index, Type: raft.LogCommand, Data: data}
}

// do applies a Txn with a fresh ID as the next revision.
func do(t *testing.T, m *Machine, conds []Cond, ops ...Op) Result {
	t.Helper()
	index := m.Applied() + 1
	r, ok := m.Apply(entry(t, index, Txn{ID: NewID(), Base: index - 1, Conds: conds, Ops: ops})).(Result)
	if !ok {
		t.Fatalf("no result: %v", m.Err())
	}
	return r
}

func putOp(key, value string) Op { return Op{Kind: Put, Key: []byte(key), Value: []byte(value)} }
func delOp(key string) Op        { return Op{Kind: Delete, Key: []byte(key)} }
func addOp(key string, delta, max int64) Op {
	return Op{Kind: Add, Key: []byte(key), Delta: delta, Max: max}
}
func appendOp(log, value string) Op { return Op{Kind: Append, Key: []byte(log), Value: []byte(value)} }
func trimOp(log string, upto uint64) Op {
	return Op{Kind: Trim, Key: []byte(log), Upto: upto}
}
func revIs(key string, rev uint64) Cond { return Cond{Kind: RevIs, Key: []byte(key), Rev: rev} }

// dump is the whole replicated state and what is derived from it, as text.
func dump(t *testing.T, e Engine) string {
	t.Helper()
	var out bytes.Buffer
	err := e.Read(func(c Content) error {
		fmt.Fprintf(&out, "applied %d\n", Applied(c))
		for row := range ReadRows(c, nil, nil) {
			fmt.Fprintf(&out, "row %q %d %d %q\n", row.Key, row.Created, row.Revision, row.Value)
		}
		for name := range c.Ascend(lengths, nil, nil) {
			l := readLength(c, name)
			fmt.Fprintf(&out, "log %q %d %d\n", name, l.length, l.first)
			for seq, v := range ReadLog(c, name, 0) {
				fmt.Fprintf(&out, "  %d %q\n", seq, v)
			}
		}
		for k, v := range c.Ascend(seen, nil, nil) {
			fmt.Fprintf(&out, "seen %x %x\n", k, v)
		}
		for k, v := range c.Ascend(Local, nil, nil) {
			if string(k) != "mark" {
				fmt.Fprintf(&out, "local %q %q\n", k, v)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestConditionsAndOperations(t *testing.T) {
	rangeIs := func(from, to string, n, rev uint64) Cond {
		return Cond{Kind: RangeIs, Key: []byte(from), End: []byte(to), Len: n, Rev: rev}
	}
	lenIs := func(n uint64) Cond { return Cond{Kind: LenIs, Key: []byte("log"), Len: n} }
	m := newTestMachine(t, NewMemory())
	steps := []struct {
		name  string
		conds []Cond
		ops   []Op
		want  Result
	}{
		1:  {"create", []Cond{revIs("a", 0)}, []Op{putOp("a", "1")}, Result{}},
		2:  {"create again", []Cond{revIs("a", 0)}, []Op{putOp("a", "2")}, Result{Code: Conflict}},
		3:  {"change what was read", []Cond{revIs("a", 1)}, []Op{putOp("a", "2"), putOp("b", "1")}, Result{}},
		4:  {"second condition fails", []Cond{revIs("b", 3), revIs("a", 1)}, []Op{delOp("a")}, Result{Code: Conflict, At: 1}},
		5:  {"range holds", []Cond{rangeIs("a", "c", 2, 3), rangeIs("x", "y", 0, 0)}, nil, Result{}},
		6:  {"range has more rows", []Cond{rangeIs("a", "c", 1, 3)}, nil, Result{Code: Conflict}},
		7:  {"range has another revision", []Cond{rangeIs("a", "c", 2, 2)}, nil, Result{Code: Conflict}},
		8:  {"count up", nil, []Op{addOp("n", 3, 5), addOp("n", 2, 5)}, Result{Numbers: []uint64{3, 5}}},
		9:  {"over the bound, nothing happens", nil, []Op{putOp("c", "1"), addOp("n", 1, 5)}, Result{Code: OutOfBounds, At: 1}},
		10: {"release above a lowered bound", nil, []Op{addOp("n", -1, 2)}, Result{Numbers: []uint64{4}}},
		11: {"below zero", nil, []Op{addOp("n", -5, 9)}, Result{Code: OutOfBounds}},
		12: {"lowest delta", nil, []Op{addOp("n", math.MinInt64, 9)}, Result{Code: OutOfBounds}},
		13: {"overflow", nil, []Op{addOp("n", math.MaxInt64, math.MaxInt64)}, Result{Code: OutOfBounds}},
		14: {"no counter", nil, []Op{addOp("a", 1, 9)}, Result{Code: OutOfBounds}},
		15: {"a counter deleted on the way", nil, []Op{delOp("n"), addOp("n", 7, 9)}, Result{Numbers: []uint64{7}}},
		16: {"append", []Cond{lenIs(0)}, []Op{appendOp("log", "x"), addOp("n", 1, 9), appendOp("log", "y")}, Result{Numbers: []uint64{0, 8, 1}}},
		17: {"append on another length", []Cond{lenIs(0)}, []Op{appendOp("log", "z")}, Result{Code: Conflict}},
		18: {"trim keeps the length", nil, []Op{trimOp("log", 1)}, Result{}},
		19: {"append after trim", []Cond{lenIs(2)}, []Op{appendOp("log", "z")}, Result{Numbers: []uint64{2}}},
		20: {"trim past the end", nil, []Op{trimOp("log", 99), trimOp("log", 1)}, Result{}},
		21: {"create anew", nil, []Op{delOp("a"), putOp("a", "3")}, Result{}},
	}
	for i, s := range steps[1:] {
		s.want.Rev = uint64(i + 1)
		if diff := cmp.Diff(s.want, do(t, m, s.conds, s.ops...)); diff != "" {
			t.Errorf("%s: %s", s.name, diff)
		}
	}
	_ = m.engine.Read(func(c Content) error {
		for key, want := range map[string][2]uint64{"a": {21, 21}, "b": {3, 3}, "n": {15, 16}} {
			if row, ok := ReadRow(c, []byte(key)); !ok || row.Created != want[0] || row.Revision != want[1] {
				t.Errorf("row %s: %v %+v", key, ok, row)
			}
		}
		if _, ok := ReadRow(c, []byte("c")); ok {
			t.Error("a refused Txn wrote")
		}
		if got := maps.Collect(ReadLog(c, []byte("log"), 0)); len(got) != 0 || LogLen(c, []byte("log")) != 3 {
			t.Errorf("log: %v", got)
		}
		return nil
	})
}

func TestLongTrimIsPaidInPieces(t *testing.T) {
	m := newTestMachine(t, NewMemory())
	for range 3 {
		ops := make([]Op, MaxParts)
		for i := range ops {
			ops[i] = appendOp("log", "x")
		}
		do(t, m, nil, ops...)
	}
	do(t, m, nil, trimOp("log", 12000))
	left := func() (visible, stored int) {
		_ = m.engine.Read(func(c Content) error {
			visible = len(maps.Collect(ReadLog(c, []byte("log"), 0)))
			for range c.Ascend(entries, nil, nil) {
				stored++
			}
			return nil
		})
		return visible, stored
	}
	if visible, stored := left(); visible != 288 || stored != 3*MaxParts-trimStep {
		t.Errorf("%d visible, %d stored", visible, stored)
	}
	for range 12 {
		do(t, m, nil, appendOp("log", "y"))
	}
	if visible, stored := left(); visible != 300 || stored != 300 {
		t.Errorf("later: %d visible, %d stored", visible, stored)
	}
}

func TestSameBytesTakeEffectOnce(t *testing.T) {
	e := NewMemory()
	m := newTestMachine(t, e)
	do(t, m, nil, putOp("a", "0"))
	txn := Txn{ID: NewID(), Base: 1, Conds: []Cond{revIs("a", 1)}, Ops: []Op{putOp("a", "1"), appendOp("log", "x")}}
	lost := Txn{ID: NewID(), Base: 1, Conds: []Cond{revIs("b", 7)}, Ops: []Op{putOp("c", "1")}}
	// Twice in one batch, later again, and after a restart.
	out := m.ApplyBatch([]*raft.Log{entry(t, 2, txn), entry(t, 3, txn), entry(t, 4, lost)})
	out = append(out, m.Apply(entry(t, 5, txn)))
	m = newTestMachine(t, e)
	out = append(out, m.Apply(entry(t, 6, txn)))
	for i, want := range []any{0: Result{Rev: 2, Numbers: []uint64{0}}, 1: Result{Rev: 2, Numbers: []uint64{0}}, 2: Result{Rev: 4, Code: Conflict}, 3: Result{Rev: 2, Numbers: []uint64{0}}, 4: Result{Rev: 2, Numbers: []uint64{0}}} {
		if diff := cmp.Diff(want, out[i]); diff != "" {
			t.Errorf("answer %d: %s", i, diff)
		}
	}
	// A conflict that somebody was told of stays one.
	do(t, m, nil, putOp("b", "x")) // revision 7
	if diff := cmp.Diff(any(Result{Rev: 4, Code: Conflict}), m.Apply(entry(t, 8, lost))); diff != "" {
		t.Error(diff)
	}
}

func TestTooOld(t *testing.T) {
	e := NewMemory()
	m := newTestMachine(t, e)
	first := Txn{ID: NewID(), Base: 9, Ops: []Op{appendOp("log", "x")}}
	m.Apply(entry(t, 10, first))
	at := func(index uint64, txn Txn) Result { return m.Apply(entry(t, index, txn)).(Result) }
	if got := at(10+Window, first); got.Rev != 10 || got.Code != OK {
		t.Errorf("at the end of the window: %+v", got)
	}
	if got := at(11+Window, first); got.Code != TooOld {
		t.Errorf("past the window: %+v", got)
	}
	if got := at(12+Window, Txn{ID: NewID(), Base: 12}); got.Code != OK {
		t.Errorf("a base just inside: %+v", got)
	}
	if got := at(14+Window, Txn{ID: NewID(), Base: 13}); got.Code != TooOld {
		t.Errorf("a base just outside: %+v", got)
	}
	if len(m.known) != 1 {
		t.Errorf("%d results are remembered, want that of revision %d alone", len(m.known), 12+Window)
	}
	_ = e.Read(func(c Content) error {
		if n := LogLen(c, []byte("log")); n != 1 {
			t.Errorf("%d entries", n)
		}
		return nil
	})
}

func TestReplayedAndOtherEntries(t *testing.T) {
	m := newTestMachine(t, NewMemory())
	logs := []*raft.Log{
		entry(t, 1, Txn{ID: NewID(), Ops: []Op{appendOp("log", "x")}}),
		{Index: 2, Type: raft.LogConfiguration, Data: []byte("not for us")},
		entry(t, 4, Txn{ID: NewID(), Ops: []Op{appendOp("log", "y")}}),
	}
	m.ApplyBatch(logs[:2])
	if m.Applied() != 2 {
		t.Errorf("applied %d: a change of the configuration moves it", m.Applied())
	}
	out := m.ApplyBatch(logs)
	if !errors.Is(out[0].(error), ErrReplayed) || !errors.Is(out[1].(error), ErrReplayed) || out[2].(Result).Numbers[0] != 1 {
		t.Errorf("answers %v", out)
	}
	if m.Applied() != 4 {
		t.Errorf("applied %d", m.Applied())
	}
}

func TestUnreadableEntryHalts(t *testing.T) {
	e := NewMemory()
	m := newTestMachine(t, e)
	bad := entry(t, 2, Txn{ID: NewID()})
	bad.Data[0] = 7
	out := m.ApplyBatch([]*raft.Log{entry(t, 1, Txn{ID: NewID(), Ops: []Op{putOp("a", "1")}}), bad, entry(t, 3, Txn{ID: NewID(), Ops: []Op{putOp("b", "1")}})})
	if out[0].(Result).Rev != 1 || !errors.Is(out[1].(error), ErrHalted) || !errors.Is(out[2].(error), ErrFormat) {
		t.Errorf("answers %v", out)
	}
	select {
	case <-m.Halted():
	default:
		t.Error("not halted")
	}
	if _, err := m.Snapshot(); !errors.Is(err, ErrHalted) {
		t.Errorf("a snapshot would drop the entry: %v", err)
	}
	if err := m.Restore(io.NopCloser(bytes.NewReader(nil))); !errors.Is(err, ErrHalted) {
		t.Errorf("restore: %v", err)
	}
	if out := m.Apply(entry(t, 4, Txn{ID: NewID()})); !errors.Is(out.(error), ErrHalted) {
		t.Errorf("later: %v", out)
	}
	// A version that reads the entry goes on from there.
	m = newTestMachine(t, e)
	if m.Applied() != 1 {
		t.Errorf("applied %d", m.Applied())
	}
}

// tallied counts Updates and what the largest one wrote.
type tallied struct {
	Engine
	updates, largest int
}

type talliedWriter struct {
	Writer
	keys int
}

func (w *talliedWriter) Set(s Space, key, value []byte) error {
	if s == rows {
		w.keys++
	}
	return w.Writer.Set(s, key, value)
}

func (e *tallied) Update(fn func(Writer) error) error {
	e.updates++
	return e.Engine.Update(func(w Writer) error {
		c := &talliedWriter{Writer: w}
		err := fn(c)
		e.largest = max(e.largest, c.keys)
		return err
	})
}

// A batch as large as raft makes them is no large transaction over a large state, and one over
// a small one. What comes before an entry that cannot be read is kept, wherever in the batch
// that is.
func TestBatchesAreParted(t *testing.T) {
	const entries, each = 64, 10
	for _, bad := range []int{-1, 0, applyMost - 1, applyMost, 30, entries - 1} {
		e := &tallied{Engine: sized{NewMemory(), true}}
		m := newTestMachine(t, e)
		var logs []*raft.Log
		for i := range entries {
			var ops []Op
			for k := range each {
				ops = append(ops, putOp(fmt.Sprintf("%d/%d", i, k), "1"))
			}
			logs = append(logs, entry(t, uint64(i+1), Txn{ID: NewID(), Ops: ops}))
		}
		want := entries
		if bad >= 0 {
			logs[bad].Data[0], want = 7, bad
		}
		for i, answer := range m.ApplyBatch(logs) {
			if r, ok := answer.(Result); ok != (i < want) || ok && r.Rev != uint64(i+1) {
				t.Errorf("entry %d cannot be read: the answer to entry %d is %v", bad, i, answer)
			}
		}
		if m.Applied() != uint64(want) || (m.Err() != nil) != (bad >= 0) {
			t.Errorf("entry %d cannot be read: applied up to %d (%v)", bad, m.Applied(), m.Err())
		}
		if most := (want + applyMost) / applyMost; e.largest > applyMost*each || e.updates > most {
			t.Errorf("%d entries were applied in %d transactions of up to %d rows", want, e.updates, e.largest)
		}
	}
	small := &tallied{Engine: sized{NewMemory(), false}}
	var logs []*raft.Log
	for i := range entries {
		logs = append(logs, entry(t, uint64(i+1), Txn{ID: NewID(), Ops: []Op{putOp(fmt.Sprint(i), "1")}}))
	}
	newTestMachine(t, small).ApplyBatch(logs)
	if small.updates != 1 || small.largest != entries {
		t.Errorf("over a small state a batch was applied in %d transactions of up to %d rows", small.updates, small.largest)
	}
}

// brokenEngine fails to commit.
type brokenEngine struct{ Engine }

func (brokenEngine) Update(func(Writer) error) error { return errors.New("disk full") }

func TestBrokenEngineHalts(t *testing.T) {
	m := newTestMachine(t, brokenEngine{NewMemory()})
	if out := m.Apply(entry(t, 1, Txn{ID: NewID()})); !errors.Is(out.(error), ErrHalted) || m.Applied() != 0 || m.Err() == nil {
		t.Errorf("answer %v, applied %d", out, m.Applied())
	}
}

// randomTxns is a history in which conditions sometimes hold and the same
// bytes sometimes come again.
func randomTxns(t *testing.T, rnd *rand.Rand, n int) []*raft.Log {
	var logs []*raft.Log
	keys := []string{"a", "ab", "b", "c\x00d", "c\x00e", "n1", "n2"}
	key := func() string { return keys[rnd.IntN(len(keys))] }
	index := uint64(0)
	for range n {
		index += 1 + uint64(rnd.IntN(2)) // raft keeps some indexes for itself
		if rnd.IntN(10) == 0 && len(logs) > 0 {
			logs = append(logs, &raft.Log{Index: index, Type: raft.LogCommand, Data: logs[rnd.IntN(len(logs))].Data})
			continue
		}
		txn := Txn{Base: index - 1}
		for i := range txn.ID {
			txn.ID[i] = byte(rnd.Uint32())
		}
		if rnd.IntN(3) == 0 {
			txn.Conds = append(txn.Conds, revIs(key(), uint64(rnd.IntN(2))*uint64(rnd.IntN(int(index)))))
		}
		for range rnd.IntN(4) {
			switch rnd.IntN(6) {
			case 0, 1:
				txn.Ops = append(txn.Ops, putOp(key(), fmt.Sprint(rnd.IntN(40))))
			case 2:
				txn.Ops = append(txn.Ops, delOp(key()))
			case 3:
				txn.Ops = append(txn.Ops, addOp(key(), int64(rnd.IntN(9)-4), 20))
			case 4:
				txn.Ops = append(txn.Ops, appendOp(key(), fmt.Sprint(index)))
			case 5:
				txn.Ops = append(txn.Ops, trimOp(key(), uint64(rnd.IntN(8))))
			}
		}
		logs = append(logs, entry(t, index, txn))
	}
	return logs
}

// applyInBatches applies in batches of random sizes. The bytes of an entry are raft's
// again once it is answered.
func applyInBatches(m *Machine, rnd *rand.Rand, logs []*raft.Log) (out []any) {
	for len(logs) > 0 {
		n := min(1+rnd.IntN(8), len(logs))
		var lent []*raft.Log
		for _, l := range logs[:n] {
			own := *l
			own.Data = bytes.Clone(l.Data)
			lent = append(lent, &own)
		}
		out = append(out, m.ApplyBatch(lent)...)
		for _, l := range lent {
			clear(l.Data)
		}
		logs = logs[n:]
	}
	return out
}

func TestEnginesAgree(t *testing.T) {
	for seed := range uint64(5) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		logs := randomTxns(t, rnd, 300)
		memory := NewMemory()
		disk := openTestBolt(t, filepath.Join(t.TempDir(), "state.db"))
		// Two layers of a few Updates: rows, and those that are gone, lie everywhere.
		layers := newBehind(openTestBolt(t, filepath.Join(t.TempDir(), "state.db")), time.Microsecond, layerSize{bytes: layerBytes, updates: 3})
		a := applyInBatches(newTestMachine(t, memory), rnd, logs)
		for _, e := range []Engine{disk, layers} {
			b := applyInBatches(newTestMachine(t, e), rnd, logs)
			if diff := cmp.Diff(a, b); diff != "" {
				t.Fatalf("seed %d: answers differ: %s", seed, diff)
			}
			if diff := cmp.Diff(dump(t, memory), dump(t, e)); diff != "" {
				t.Fatalf("seed %d: states differ: %s", seed, diff)
			}
		}
		checkDerived(t, memory)
		if err := layers.Sync(); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(dump(t, memory), dump(t, layers.below)); diff != "" {
			t.Fatalf("seed %d: what is below the layers differs: %s", seed, diff)
		}
		if err := layers.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// checkDerived compares the local rows with those that the rows give.
func checkDerived(t *testing.T, e Engine) {
	t.Helper()
	_ = e.Read(func(c Content) error {
		want := map[string]string{}
		for row := range ReadRows(c, nil, nil) {
			for _, k := range deriveFirst(row.Key, row.Value) {
				want[string(k)] = string(row.Key)
			}
		}
		got := map[string]string{}
		for k, v := range c.Ascend(Local, nil, nil) {
			if string(k) != "mark" {
				got[string(k)] = string(v)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("derived rows: %s", diff)
		}
		return nil
	})
}

// TestCrash copies the file after every commit, damages the newest of its two
// meta pages in half of the copies (a write that power loss tore), and goes on
// from the copy by replaying the whole log, as raft does.
func TestCrash(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 7))
	dir := t.TempDir()
	path := filepath.Join(dir, "state.db")
	logs := randomTxns(t, rnd, 60)
	m := newTestMachine(t, openTestBolt(t, path))
	var copies []string
	var at []uint64 // the revision that each copy was taken at
	for i := 0; i < len(logs); {
		n := min(1+rnd.IntN(4), len(logs)-i)
		m.ApplyBatch(logs[i : i+n])
		i += n
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if len(copies)%2 == 1 {
			tearNewestMeta(data)
		}
		name := filepath.Join(dir, fmt.Sprint("copy", len(copies)))
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		copies = append(copies, name)
		at = append(at, m.Applied())
	}
	want := dump(t, m.engine)
	for i, name := range copies {
		e, err := OpenBolt(name)
		if err != nil {
			t.Fatalf("copy %d: %v", i, err)
		}
		again := newTestMachine(t, e)
		if torn := i%2 == 1; torn == (again.Applied() == at[i]) {
			t.Errorf("copy %d, torn %v, was taken at %d and opens at %d", i, torn, at[i], again.Applied())
		}
		applyInBatches(again, rnd, logs)
		if diff := cmp.Diff(want, dump(t, e)); diff != "" {
			t.Errorf("copy %d: %s", i, diff)
		}
		checkDerived(t, e)
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// tearNewestMeta damages the checksum of the meta page with the higher
// transaction number. The layout is bbolt's: a header of 16 bytes, then the
// meta with its number at 48 and its checksum at 56.
func tearNewestMeta(data []byte) {
	size := os.Getpagesize()
	number := func(page int) byte { return data[page*size+16+48] }
	newest := 0
	if int8(number(1)-number(0)) > 0 {
		newest = 1
	}
	data[newest*size+16+56] ^= 0xff
}

func TestHooks(t *testing.T) {
	type call struct {
		rev  uint64
		keys string
	}
	var calls []call
	m, err := NewMachine(NewMemory(), Hooks{Applied: func(rev uint64, keys [][]byte) {
		calls = append(calls, call{rev, fmt.Sprintf("%v %s", keys == nil, keys)})
	}})
	if err != nil {
		t.Fatal(err)
	}
	do(t, m, nil, putOp("a", "1"), appendOp("log", "x"))
	do(t, m, []Cond{revIs("a", 9)}, putOp("b", "1"))
	if err := m.Restore(snapshotOf(t, m)); err != nil {
		t.Fatal(err)
	}
	want := []call{{1, "false [a log]"}, {2, "false []"}, {2, "true []"}}
	if diff := cmp.Diff(want, calls, cmp.AllowUnexported(call{})); diff != "" {
		t.Error(diff)
	}
}
