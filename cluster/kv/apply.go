package kv

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"slices"
)

// Window is for how many revisions the result of a Txn is remembered.
const Window = 65536

// trimStep is how many forgotten log entries one operation removes from the
// engine: a long trim is paid for by the operations that follow on the log and
// never holds up one apply.
const trimStep = 1024

// batch is the work of one engine transaction. Nothing of it reaches the
// Machine before the transaction has committed.
type batch struct {
	w      Writer
	derive func(key, value []byte) [][]byte
	known  map[ID]uint64 // of the machine; read only
	oldest uint64        // no result is older, of the machine
	added  map[ID]uint64
	forgot map[ID]uint64
	keys   [][]byte // rows and logs that changed
}

// apply runs one Txn as revision rev. An error is the engine's: the whole
// batch is lost.
func (b *batch) apply(rev uint64, t *Txn) (Result, error) {
	if r, ok, err := b.recall(rev, t.ID); ok || err != nil {
		return r, err
	}
	if rev > Window && t.Base < rev-Window {
		// It may have been applied and forgotten. Not remembered: it stays
		// too old for ever.
		return Result{Rev: rev, Code: TooOld}, nil
	}
	r := b.judge(rev, t)
	if r.Code == OK {
		for i := range t.Ops {
			if err := b.run(rev, &t.Ops[i], &r); err != nil {
				return Result{}, err
			}
		}
	}
	// Failures are remembered too: a proposer that was told of a conflict runs
	// its function again, so the same bytes must not succeed afterwards.
	b.added[t.ID] = rev
	return r, b.w.Set(seen, be64(rev), slices.Concat(t.ID[:], r.Encode()))
}

// recall gives the result of an earlier application of the same Txn. What is
// past the window counts as forgotten whether or not it was removed yet, so
// that the answer depends on the revision alone.
func (b *batch) recall(rev uint64, id ID) (Result, bool, error) {
	first, ok := b.added[id]
	if !ok {
		first, ok = b.known[id]
	}
	if !ok || rev > Window && first < rev-Window {
		return Result{}, false, nil
	}
	v := b.w.Lookup(seen, be64(first))
	if len(v) < len(id) {
		return Result{}, false, fmt.Errorf("the result of revision %d is missing from the state", first)
	}
	r, err := DecodeResult(v[len(id):])
	return r, err == nil, err
}

// forget removes the results that no Txn from revision rev on can ask for.
func (b *batch) forget(rev uint64) error {
	if rev <= Window {
		return nil
	}
	var old [][]byte
	// Not from the start: what is forgotten may lie there, marked as gone, until
	// the engine comes to it, and would be passed each time.
	for k, v := range b.w.Ascend(seen, be64(b.oldest), be64(rev-Window)) {
		old = append(old, append([]byte(nil), k...))
		b.forgot[ID(v[:16])] = binary.BigEndian.Uint64(k)
	}
	for _, k := range old {
		if err := b.w.Unset(seen, k); err != nil {
			return err
		}
	}
	b.oldest = rev - Window
	return nil
}

// merge moves what the batch learned into the machine's memory.
func (b *batch) merge() {
	for id, rev := range b.forgot {
		if b.known[id] == rev {
			delete(b.known, id)
		}
	}
	maps.Copy(b.known, b.added)
}

// judge says what will become of a Txn without writing anything.
func (b *batch) judge(rev uint64, t *Txn) Result {
	if at := Holds(b.w, t.Conds); at >= 0 {
		return Result{Rev: rev, Code: Conflict, At: at}
	}
	// Only counters can fail now, and most have none.
	if !slices.ContainsFunc(t.Ops, func(op Op) bool { return op.Kind == Add }) {
		return Result{Rev: rev, Code: OK}
	}
	// A row that an earlier operation of the same Txn writes counts as written.
	written := map[string][]byte{}
	for i := range t.Ops {
		switch op := &t.Ops[i]; op.Kind {
		case Put:
			written[string(op.Key)] = op.Value
		case Delete:
			written[string(op.Key)] = be64(0)
		case Add:
			value, ok := written[string(op.Key)]
			if !ok {
				value = be64(0)
				if row, found := ReadRow(b.w, op.Key); found {
					value = row.Value
				}
			}
			sum, ok := add(value, op)
			if !ok {
				return Result{Rev: rev, Code: OutOfBounds, At: i}
			}
			written[string(op.Key)] = be64(uint64(sum))
		}
	}
	return Result{Rev: rev, Code: OK}
}

// add gives the counter's new value; false when it would leave its bounds or
// the row is no counter.
func add(value []byte, op *Op) (int64, bool) {
	old, ok := Counter(value)
	switch {
	case !ok || old < 0: // the row is no counter
		return 0, false
	case op.Delta > 0:
		// Not old+Delta > Max: that can overflow.
		if old > math.MaxInt64-op.Delta || old+op.Delta > op.Max {
			return 0, false
		}
	case op.Delta < 0:
		if old+op.Delta < 0 { // old is not negative: no overflow
			return 0, false
		}
	}
	return old + op.Delta, true
}

// run carries out one operation that judge has let pass.
func (b *batch) run(rev uint64, op *Op, r *Result) error {
	b.keys = append(b.keys, op.Key)
	switch op.Kind {
	case Put:
		return b.put(rev, op.Key, op.Value)
	case Delete:
		return b.remove(op.Key)
	case Add:
		value := be64(0)
		if row, ok := ReadRow(b.w, op.Key); ok {
			value = row.Value
		}
		sum, _ := add(value, op)
		r.Numbers = append(r.Numbers, uint64(sum))
		return b.put(rev, op.Key, be64(uint64(sum)))
	case Append:
		l, err := readLength(b.w, op.Key).numbered(b.w)
		if err != nil {
			return err
		}
		r.Numbers = append(r.Numbers, l.length)
		if err := b.w.Set(entries, entryKey(l.number, l.length), encodeEntry(op.Value)); err != nil {
			return err
		}
		l.length++
		return b.sweep(op.Key, l)
	case Trim:
		l := readLength(b.w, op.Key)
		l.first = max(l.first, min(op.Upto, l.length))
		return b.sweep(op.Key, l)
	}
	return fmt.Errorf("operation of kind %d", op.Kind) // DecodeTxn lets none pass
}

func (b *batch) put(rev uint64, key, value []byte) error {
	created := rev
	var gone [][]byte
	if old, ok := ReadRow(b.w, key); ok {
		created = old.Created
		gone = b.derive(key, old.Value)
	}
	if err := b.derived(key, gone, b.derive(key, value)); err != nil {
		return err
	}
	k, stored := encodePair(key, created, rev, value)
	return b.w.Set(rows, k, stored)
}

func (b *batch) remove(key []byte) error {
	old, ok := ReadRow(b.w, key)
	if !ok {
		return nil
	}
	if err := b.derived(key, b.derive(key, old.Value), nil); err != nil {
		return err
	}
	return b.w.Unset(rows, key)
}

// derived moves a row's local rows from one set of keys to another; most
// changes leave them as they are.
func (b *batch) derived(key []byte, from, to [][]byte) error {
	if len(from) == 0 && len(to) == 0 {
		return nil
	}
	stay := make(map[string]bool, len(from))
	for _, k := range from {
		stay[string(k)] = false
	}
	for _, k := range to {
		if _, ok := stay[string(k)]; !ok {
			if err := b.w.Set(Local, k, bytes.Clone(key)); err != nil {
				return err
			}
		}
		stay[string(k)] = true
	}
	for _, k := range from {
		if !stay[string(k)] {
			if err := b.w.Unset(Local, k); err != nil {
				return err
			}
		}
	}
	return nil
}

// sweep stores a log's length and removes some of its forgotten entries.
func (b *batch) sweep(log []byte, l logLength) error {
	for n := 0; n < trimStep && l.kept < l.first; n++ {
		if err := b.w.Unset(entries, entryKey(l.number, l.kept)); err != nil {
			return err
		}
		l.kept++
	}
	return b.w.Set(lengths, bytes.Clone(log), l.encode())
}
