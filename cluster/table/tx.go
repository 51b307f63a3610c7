package table

import (
	"bytes"
	"fmt"
	"iter"
	"slices"
	"strings"

	"github.com/atoll-registry/atoll/cluster/kv"
)

// Reader is a *View or a *Tx. It is for use in the function that got it, from
// one goroutine at a time.
type Reader interface {
	row(key []byte) (kv.Row, bool, error)
	// revisions is row for who does not want the value.
	revisions(key []byte) (kv.Row, bool, error)
	// rows gives at most limit rows (0: all) with from <= key < to. A Tx fails
	// after 256.
	rows(from, to []byte, limit int) iter.Seq2[kv.Row, error]
	rowCodec() *codec
}

// View reads one consistent local state.
type View struct {
	state    kv.Content
	codec    *codec
	revision uint64
	ended    bool
}

// Revision is that of the state: the View includes all changes up to it.
func (v *View) Revision() uint64 { return v.revision }

func (v *View) rowCodec() *codec { return v.codec }

func (v *View) row(key []byte) (kv.Row, bool, error) {
	if v.ended {
		return kv.Row{}, false, errEnded
	}
	row, ok := kv.ReadRow(v.state, key)
	return row, ok, nil
}

func (v *View) revisions(key []byte) (kv.Row, bool, error) {
	if v.ended {
		return kv.Row{}, false, errEnded
	}
	row, ok := kv.ReadRevisions(v.state, key)
	return row, ok, nil
}

func (v *View) rows(from, to []byte, limit int) iter.Seq2[kv.Row, error] {
	return func(yield func(kv.Row, error) bool) {
		if v.ended {
			yield(kv.Row{}, errEnded)
			return
		}
		n := 0
		for row := range kv.ReadRows(v.state, from, to) {
			if !yield(row, nil) || v.ended {
				return
			}
			if n++; n == limit {
				return
			}
		}
	}
}

// Tx reads a consistent local state, with its own writes over it, and collects
// what shall be written. What it reads becomes a condition of the commit.
type Tx struct {
	view *View
	lists
	guarded map[string]bool // logs that have a LenIs; nil while there are none
	numbers []*uint64       // one for each Append and Add, in order
	failed  error           // the first failure of a call that returns none
}

// lists are what of a Tx is used again by another.
type lists struct {
	conds   []kv.Cond
	read    places    // rows of the state that were read, and so have a RevIs: their place in found
	found   []readRow // those rows
	ops     []kv.Op
	written places // the newest operation on a row
}

type readRow struct {
	kv.Row
	ok bool
}

// usual is how many rows are read, and written, by a transaction that is not small:
// a push takes about as many. Room for them is made at once, and kept for the next one.
const usual = 16

func newLists() *lists {
	few := func() places { return places{keys: make([][]byte, 0, usual), at: make([]int, 0, usual)} }
	return &lists{
		conds: make([]kv.Cond, 0, usual), found: make([]readRow, 0, usual), ops: make([]kv.Op, 0, usual), read: few(), written: few(),
	}
}

// empty forgets all that the lists hold; ok is false for those that are not kept, since
// they have grown large.
func (l *lists) empty() (ok bool) {
	if max(cap(l.conds), cap(l.found), cap(l.ops), cap(l.read.keys), cap(l.written.keys)) > 4*usual {
		return false
	}
	clear(l.conds)
	clear(l.found)
	clear(l.ops)
	l.conds, l.found, l.ops = l.conds[:0], l.found[:0], l.ops[:0]
	l.read.empty()
	l.written.empty()
	return true
}

func (db *DB) newTx(v *View) *Tx {
	return &Tx{view: v, lists: *db.lists.Get().(*lists)}
}

// release ends the use of a Tx.
func (db *DB) release(tx *Tx) {
	used := tx.lists
	tx.lists = lists{}
	if used.empty() {
		db.lists.Put(&used)
	}
}

func (tx *Tx) rowCodec() *codec { return tx.view.codec }

// base reads a row of the state below the Tx and guards it.
func (tx *Tx) base(key []byte) (kv.Row, bool, error) {
	if at, again := tx.read.find(key); again && !tx.view.ended {
		return tx.found[at].Row, tx.found[at].ok, nil
	}
	row, ok, err := tx.view.row(key)
	if err != nil {
		return kv.Row{}, false, err
	}
	tx.read.set(key, len(tx.found))
	tx.found = append(tx.found, readRow{row, ok})
	tx.conds = append(tx.conds, kv.Cond{Kind: kv.RevIs, Key: key, Rev: row.Revision})
	return row, ok, nil
}

func (tx *Tx) row(key []byte) (kv.Row, bool, error) {
	if own, ok, known := tx.own(key); known {
		return own, ok, nil
	}
	return tx.base(key)
}

// foresee looks for a row that the state machine will look for. It applies one
// transaction after another, while many are made at once, and what is not in the file is
// remembered for it.
func (tx *Tx) foresee(key []byte) error {
	_, _, err := tx.view.revisions(key)
	return err
}

func (tx *Tx) revisions(key []byte) (kv.Row, bool, error) { return tx.row(key) }

// own gives the row as this Tx has written it; known is false when it has not.
func (tx *Tx) own(key []byte) (row kv.Row, ok, known bool) {
	i, known := tx.written.find(key)
	if !known || tx.view.ended {
		return kv.Row{}, false, false
	}
	if tx.ops[i].Kind == kv.Delete {
		return kv.Row{}, false, true
	}
	row = kv.Row{Key: key, Value: tx.ops[i].Value}
	if old, ok := tx.below(key); ok && (i == 0 || !tx.deletedBefore(key, i)) {
		row.Created = old.Created
	}
	return row, true, true
}

// below reads a row of the state below the Tx without a guard.
func (tx *Tx) below(key []byte) (kv.Row, bool) {
	if at, again := tx.read.find(key); again {
		return tx.found[at].Row, tx.found[at].ok
	}
	return kv.ReadRow(tx.view.state, key)
}

// deletedBefore reports whether an earlier operation removes the row, so that
// a later Put creates it anew.
func (tx *Tx) deletedBefore(key []byte, i int) bool {
	return slices.ContainsFunc(tx.ops[:i], func(op kv.Op) bool {
		return op.Kind == kv.Delete && bytes.Equal(op.Key, key)
	})
}

func (tx *Tx) put(key, value []byte) error {
	if tx.view.ended {
		return errEnded
	}
	if i, ok := tx.written.find(key); ok && tx.ops[i].Kind == kv.Put {
		tx.ops[i].Value = value
		return nil
	}
	return tx.add(kv.Op{Kind: kv.Put, Key: key, Value: value}, true)
}

func (tx *Tx) remove(key []byte) error {
	if tx.view.ended {
		return errEnded
	}
	if i, ok := tx.written.find(key); ok {
		// One removal is enough, and a row written before need not be.
		tx.ops[i] = kv.Op{Kind: kv.Delete, Key: key}
		return nil
	}
	return tx.add(kv.Op{Kind: kv.Delete, Key: key}, true)
}

func (tx *Tx) add(op kv.Op, row bool) error {
	if len(tx.ops) >= kv.MaxParts {
		return fmt.Errorf("%w: more than %d operations", ErrTooLarge, kv.MaxParts)
	}
	if row {
		tx.written.set(op.Key, len(tx.ops))
	}
	tx.ops = append(tx.ops, op)
	return nil
}

// rows merges the state with what the Tx has written and guards the range that
// was read, up to where the reader stopped.
func (tx *Tx) rows(from, to []byte, limit int) iter.Seq2[kv.Row, error] {
	return func(yield func(kv.Row, error) bool) {
		if tx.view.ended {
			yield(kv.Row{}, errEnded)
			return
		}
		s := scan{tx: tx, guard: kv.Cond{Kind: kv.RangeIs, Key: from, End: to}}
		defer s.record()
		own := tx.ownKeys(from, to)
		n := 0
		give := func(row kv.Row, ok bool) bool {
			if !ok {
				return true
			}
			n++
			return yield(row, nil) && n != limit
		}
		ownUpTo := func(key []byte) bool {
			for len(own) > 0 && (key == nil || own[0] < string(key)) {
				k := []byte(own[0])
				own = own[1:]
				s.last = k
				row, ok, _ := tx.own(k)
				if !give(row, ok) {
					return false
				}
			}
			return true
		}
		for row := range kv.ReadRows(tx.view.state, from, to) {
			if !ownUpTo(row.Key) {
				return
			}
			if s.guard.Len == kv.MaxRangeRows {
				yield(kv.Row{}, fmt.Errorf("%w: a scan of more than %d rows; set a limit, or scan in a View and guard single rows", ErrTooLarge, kv.MaxRangeRows))
				return
			}
			s.saw(row)
			ok := true
			if len(own) > 0 && own[0] == string(row.Key) {
				own = own[1:]
			}
			if mine, has, known := tx.own(row.Key); known {
				row, ok = mine, has
			}
			if !give(row, ok) {
				return
			}
		}
		s.whole = ownUpTo(nil)
	}
}

// scan is the record of one range being read.
type scan struct {
	tx    *Tx
	guard kv.Cond
	last  []byte // the last key that was looked at
	whole bool   // the range was read to its end
}

func (s *scan) saw(row kv.Row) {
	s.last = bytes.Clone(row.Key)
	s.guard.Len++
	s.guard.Rev = max(s.guard.Rev, row.Revision)
}

func (s *scan) record() {
	if !s.whole {
		if s.last == nil {
			return // nothing was learned
		}
		s.guard.End = after(s.last)
	}
	if len(s.guard.End) > kv.MaxKeyBytes {
		s.tx.fail(fmt.Errorf("%w: a scan that ends at a key of %d bytes", ErrTooLarge, len(s.guard.End)))
		return
	}
	s.tx.conds = append(s.tx.conds, s.guard)
}

func (tx *Tx) ownKeys(from, to []byte) []string {
	var keys []string
	for _, k := range tx.written.keys {
		if bytes.Compare(k, from) >= 0 && bytes.Compare(k, to) < 0 {
			keys = append(keys, string(k))
		}
	}
	slices.Sort(keys)
	return slices.Compact(keys)
}

func (tx *Tx) fail(err error) {
	if tx.failed == nil {
		tx.failed = err
	}
}

// number hands the committed numbers to those who wait for them.
func (tx *Tx) number(numbers []uint64) {
	for i, p := range tx.numbers {
		if i < len(numbers) {
			*p = numbers[i]
		}
	}
}

// readable shows a key in an error.
func readable(key []byte) string { return strings.ReplaceAll(string(key), sep, "/") }
