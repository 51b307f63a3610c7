package table

import (
	"bytes"
	"fmt"
	"iter"

	"github.com/atoll-registry/atoll/cluster/kv"
)

// LogEntry is one entry of an append-only log.
type LogEntry struct {
	Seq   uint64 // from 0, without gaps
	Value []byte
}

// Pending is a number that the commit gives out.
type Pending struct{ number *uint64 }

// Seq is the sequence number of the appended entry, valid once the Update has
// returned without error.
func (p Pending) Seq() uint64 { return *p.number }

// Append adds an entry to a log, which needs no making. Entries of one Tx get
// consecutive numbers in the order of the calls. It is no read: appends of
// several nodes do not conflict. A Tx whose value rests on the number reads
// LogLen, which guards it.
func (tx *Tx) Append(log string, value []byte) Pending {
	p := Pending{new(uint64)}
	key, err := tx.logKey(log)
	if err == nil {
		err = tx.add(kv.Op{Kind: kv.Append, Key: key, Value: bytes.Clone(value)}, false)
	}
	if err != nil {
		tx.fail(fmt.Errorf("append to log %q: %w", log, err))
		return p
	}
	tx.numbers = append(tx.numbers, p.number)
	return p
}

// Trim forgets the entries of a log below a sequence number.
func (tx *Tx) Trim(log string, upto uint64) {
	key, err := tx.logKey(log)
	if err == nil {
		err = tx.add(kv.Op{Kind: kv.Trim, Key: key, Upto: upto}, false)
	}
	if err != nil {
		tx.fail(fmt.Errorf("trim log %q: %w", log, err))
	}
}

func (tx *Tx) logKey(log string) ([]byte, error) {
	if tx.view.ended {
		return nil, errEnded
	}
	return logKey(log)
}

// LogLen is how many entries were ever appended to a log, those of this Tx
// included: the number that the next Append gets. The commit fails when
// somebody else appends first.
func (tx *Tx) LogLen(log string) (uint64, error) {
	key, err := tx.logKey(log)
	if err != nil {
		return 0, err
	}
	n := kv.LogLen(tx.view.state, key)
	if !tx.guarded[log] {
		if tx.guarded == nil {
			tx.guarded = map[string]bool{}
		}
		tx.guarded[log] = true
		tx.conds = append(tx.conds, kv.Cond{Kind: kv.LenIs, Key: key, Len: n})
	}
	for i := range tx.ops {
		if tx.ops[i].Kind == kv.Append && string(tx.ops[i].Key) == log {
			n++
		}
	}
	return n, nil
}

// LogLen is how many entries were ever appended to a log.
func (v *View) LogLen(log string) (uint64, error) {
	if v.ended {
		return 0, errEnded
	}
	key, err := logKey(log)
	if err != nil {
		return 0, err
	}
	return kv.LogLen(v.state, key), nil
}

// Log gives at most limit entries (0: all) of a log from sequence number from
// on. Entries that were trimmed are left out.
func (v *View) Log(log string, from uint64, limit int) iter.Seq2[LogEntry, error] {
	return func(yield func(LogEntry, error) bool) {
		key, err := logKey(log)
		if v.ended {
			err = errEnded
		}
		if err != nil {
			yield(LogEntry{}, err)
			return
		}
		n := 0
		for seq, value := range kv.ReadLog(v.state, key, from) {
			if !yield(LogEntry{Seq: seq, Value: bytes.Clone(value)}, nil) || v.ended {
				return
			}
			if n++; n == limit {
				return
			}
		}
	}
}

// Add adds delta to a counter, which starts at 0. The Update fails with
// ErrOutOfBounds when a positive delta takes it above max (math.MaxInt64 for
// no bound), or a negative one below 0. It is no read: additions of several
// nodes do not conflict.
func (tx *Tx) Add(delta, max int64, key ...string) error {
	if tx.view.ended {
		return errEnded
	}
	k, err := counterKey(key)
	if err != nil {
		return err
	}
	if err := tx.add(kv.Op{Kind: kv.Add, Key: k, Delta: delta, Max: max}, false); err != nil {
		return err
	}
	tx.numbers = append(tx.numbers, new(uint64))
	return nil
}

// Counter reads a counter with the additions of this Tx. The commit fails when
// somebody else adds first.
func (tx *Tx) Counter(key ...string) (int64, error) {
	k, err := counterKey(key)
	if err != nil {
		return 0, err
	}
	row, ok, err := tx.base(k)
	if err != nil {
		return 0, err
	}
	n, err := counter(row, ok)
	for i := range tx.ops {
		if tx.ops[i].Kind == kv.Add && bytes.Equal(tx.ops[i].Key, k) {
			n += tx.ops[i].Delta
		}
	}
	return n, err
}

// Counter reads a counter.
func (v *View) Counter(key ...string) (int64, error) {
	k, err := counterKey(key)
	if err != nil {
		return 0, err
	}
	row, ok, err := v.row(k)
	if err != nil {
		return 0, err
	}
	return counter(row, ok)
}

func counter(row kv.Row, ok bool) (int64, error) {
	if !ok {
		return 0, nil
	}
	n, ok := kv.Counter(row.Value)
	if !ok {
		return 0, fmt.Errorf("%s is no counter", readable(row.Key))
	}
	return n, nil
}
