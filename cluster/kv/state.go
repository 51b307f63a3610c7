package kv

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"iter"
)

// This file says how the state lies in the spaces of an Engine, and reads it.

const (
	appliedKey  = "applied" // in the meta space: 8 bytes, big-endian
	rowHeader   = 16        // created and last revision, 8 bytes each, big-endian
	counterSize = 8
)

func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

// Applied is the revision of a state.
func Applied(c Content) uint64 {
	if v := c.Lookup(meta, []byte(appliedKey)); len(v) == 8 {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}

// ReadRow gives the row of a key. The row aliases the state: copy what must
// outlive the transaction.
func ReadRow(c Content, key []byte) (Row, bool) {
	v := c.Lookup(rows, key)
	if v == nil {
		return Row{}, false
	}
	return decodeRow(key, v), true
}

// ReadRows gives the rows with from <= key < to in order of their keys; a nil
// to means to the end. The rows alias the state.
func ReadRows(c Content, from, to []byte) iter.Seq[Row] {
	return func(yield func(Row) bool) {
		for k, v := range c.Ascend(rows, from, to) {
			if !yield(decodeRow(k, v)) {
				return
			}
		}
	}
}

func decodeRow(key, stored []byte) Row {
	return Row{
		Key:      key,
		Value:    stored[rowHeader:],
		Created:  binary.BigEndian.Uint64(stored),
		Revision: binary.BigEndian.Uint64(stored[8:]),
	}
}

func encodeRow(created, revision uint64, value []byte) []byte {
	b := make([]byte, 0, rowHeader+len(value))
	b = binary.BigEndian.AppendUint64(b, created)
	b = binary.BigEndian.AppendUint64(b, revision)
	return append(b, value...)
}

// Counter reads the value of a counter row; false when the value is none.
func Counter(value []byte) (int64, bool) {
	if len(value) != counterSize {
		return 0, false
	}
	return int64(binary.BigEndian.Uint64(value)), true
}

// logLength describes a log.
type logLength struct {
	length uint64 // entries ever appended
	first  uint64 // the first entry that was not trimmed
	kept   uint64 // the first entry that the engine still has, at most first
}

func readLength(c Content, log []byte) logLength {
	v := c.Lookup(lengths, log)
	if len(v) != 24 {
		return logLength{}
	}
	return logLength{binary.BigEndian.Uint64(v), binary.BigEndian.Uint64(v[8:]), binary.BigEndian.Uint64(v[16:])}
}

func (l logLength) encode() []byte {
	b := make([]byte, 0, 24)
	b = binary.BigEndian.AppendUint64(b, l.length)
	b = binary.BigEndian.AppendUint64(b, l.first)
	return binary.BigEndian.AppendUint64(b, l.kept)
}

// Logs gives the names of all logs, in order, and how many entries were ever
// appended to each. The names alias the state.
func Logs(c Content) iter.Seq2[[]byte, uint64] {
	return func(yield func([]byte, uint64) bool) {
		for name := range c.Ascend(lengths, nil, nil) {
			if !yield(name, LogLen(c, name)) {
				return
			}
		}
	}
}

// LogLen gives how many entries were ever appended to a log.
func LogLen(c Content, log []byte) uint64 { return readLength(c, log).length }

// ReadLog gives the entries of a log from sequence number from on, in order;
// those that were trimmed are left out. The values alias the state.
func ReadLog(c Content, log []byte, from uint64) iter.Seq2[uint64, []byte] {
	return func(yield func(uint64, []byte) bool) {
		l := readLength(c, log)
		from := max(from, l.first)
		if from >= l.length {
			return
		}
		for k, v := range c.Ascend(entries, entryKey(log, from), entryKey(log, l.length)) {
			if !yield(binary.BigEndian.Uint64(k[len(k)-8:]), v) {
				return
			}
		}
	}
}

// entryKey keeps the entries of each log together, whatever the log's name.
func entryKey(log []byte, seq uint64) []byte {
	b := make([]byte, 0, 2+len(log)+8)
	b = binary.BigEndian.AppendUint16(b, uint16(len(log))) // at most MaxKeyBytes
	b = append(b, log...)
	return binary.BigEndian.AppendUint64(b, seq)
}

// Holds gives the index of the first condition that does not hold in a state,
// or -1 when all hold.
func Holds(c Content, conds []Cond) int {
	for i := range conds {
		if !conds[i].holds(c) {
			return i
		}
	}
	return -1
}

func (k *Cond) holds(c Content) bool {
	switch k.Kind {
	case RevIs:
		row, _ := ReadRow(c, k.Key)
		return row.Revision == k.Rev
	case RangeIs:
		var n, top uint64
		for row := range ReadRows(c, k.Key, k.End) {
			if n++; n > k.Len {
				return false
			}
			top = max(top, row.Revision)
		}
		return n == k.Len && top == k.Rev
	case LenIs:
		return LogLen(c, k.Key) == k.Len
	}
	return false
}

// describe names a condition's or operation's target in an error.
func describe(key []byte) string {
	return fmt.Sprintf("%q", bytes.ReplaceAll(key, []byte{0}, []byte{'/'}))
}

func fromBE64(b []byte) uint64 { return binary.BigEndian.Uint64(b) }
