package kv

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"iter"
)

// This file says how the state lies in the spaces of an Engine, and reads it.

const (
	appliedKey  = "applied" // in the meta space: 8 bytes, big-endian
	logsKey     = "logs"    // in the meta space: how many logs have a number, 8 bytes, big-endian
	rowHeader   = 16        // about what a row takes beside its key and value
	counterSize = 8
)

// A row is stored as
//
//	uvarint  revision that created it
//	uvarint  (revision of the last write - that) * 2, + 1 when the value is packed
//	         the value
//
// and an entry of a log under the log's number and its own, both ordered, as a
// byte that is 1 when the value is packed and the value. The numbers of logs are
// given out in the order in which an engine first sees the logs; they are a matter
// of one file, and nothing outside of it names a log otherwise than by its name.

func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

// Applied is the revision of a state.
func Applied(c Content) uint64 {
	if v := c.Lookup(meta, []byte(appliedKey)); len(v) == 8 {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}

// ReadRow gives the row of a key. The row may alias the state: copy what must
// outlive the transaction.
func ReadRow(c Content, key []byte) (Row, bool) {
	v := c.Lookup(rows, key)
	if v == nil {
		return Row{}, false
	}
	return decodeRow(key, v), true
}

// ReadRows gives the rows with from <= key < to in order of their keys; a nil
// to means to the end. The rows may alias the state.
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
	created, revision, value, packed := cutHeader(stored)
	if packed {
		value = unpack(value)
	}
	return Row{Key: key, Value: value, Created: created, Revision: revision}
}

// ReadRevisions gives the revisions of a row and does not read its value, which
// is nil in what it gives.
func ReadRevisions(c Content, key []byte) (Row, bool) {
	stored := c.Lookup(rows, key)
	if stored == nil {
		return Row{}, false
	}
	created, revision, _, _ := cutHeader(stored)
	return Row{Key: key, Created: created, Revision: revision}, true
}

// CountRows counts the rows with from <= key < to without reading their values.
func CountRows(c Content, from, to []byte) (n int) {
	for range c.Ascend(rows, from, to) {
		n++
	}
	return n
}

func cutHeader(stored []byte) (created, revision uint64, value []byte, packed bool) {
	created, n := binary.Uvarint(stored)
	if n > 0 {
		later, m := binary.Uvarint(stored[n:])
		if m > 0 {
			return created, created + later>>1, stored[n+m:], later&1 == 1
		}
	}
	return 0, 0, stored, false // damaged: no condition holds, and nobody can decode it
}

func encodeRow(created, revision uint64, value []byte) []byte {
	return appendRow(make([]byte, 0, rowHeader+len(value)), created, revision, value)
}

// encodePair is encodeRow with a copy of the key, in one allocation.
func encodePair(key []byte, created, revision uint64, value []byte) (k, stored []byte) {
	b := append(make([]byte, 0, len(key)+rowHeader+len(value)), key...)
	b = appendRow(b, created, revision, value)
	return b[:len(key):len(key)], b[len(key):]
}

func appendRow(b []byte, created, revision uint64, value []byte) []byte {
	b = binary.AppendUvarint(b, created)
	header := len(b)
	b = binary.AppendUvarint(b, (revision-created)<<1|1)
	b, packed := pack(b, value)
	if packed {
		return b
	}
	b = binary.AppendUvarint(b[:header], (revision-created)<<1)
	return append(b, value...)
}

func encodeEntry(value []byte) []byte {
	b, packed := pack(append(make([]byte, 0, 1+len(value)), 1), value)
	if packed {
		return b
	}
	return append(append(b[:0], 0), value...)
}

func decodeEntry(stored []byte) []byte {
	if len(stored) == 0 {
		return nil // damaged
	}
	if stored[0] == 1 {
		return unpack(stored[1:])
	}
	return stored[1:]
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
	number uint64 // stands for the name in the keys of entries; 0 before there is one
}

func readLength(c Content, log []byte) logLength {
	v := c.Lookup(lengths, log)
	if len(v) != 32 {
		return logLength{}
	}
	return logLength{fromBE64(v), fromBE64(v[8:]), fromBE64(v[16:]), fromBE64(v[24:])}
}

func (l logLength) encode() []byte {
	b := make([]byte, 0, 32)
	for _, v := range []uint64{l.length, l.first, l.kept, l.number} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}

// numbered gives a log that has no number yet the next one.
func (l logLength) numbered(w Writer) (logLength, error) {
	if l.number != 0 {
		return l, nil
	}
	if v := w.Lookup(meta, []byte(logsKey)); v != nil {
		l.number = fromBE64(v)
	}
	l.number++
	return l, w.Set(meta, []byte(logsKey), be64(l.number))
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
// those that were trimmed are left out. The values may alias the state.
func ReadLog(c Content, log []byte, from uint64) iter.Seq2[uint64, []byte] {
	return func(yield func(uint64, []byte) bool) {
		l := readLength(c, log)
		from := max(from, l.first)
		if from >= l.length {
			return
		}
		for k, v := range c.Ascend(entries, entryKey(l.number, from), entryKey(l.number, l.length)) {
			_, k = cutOrdered(k)
			seq, _ := cutOrdered(k)
			if !yield(seq, decodeEntry(v)) {
				return
			}
		}
	}
}

// entryKey keeps the entries of each log together, in their order.
func entryKey(number, seq uint64) []byte {
	return ordered(ordered(make([]byte, 0, 18), number), seq)
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
		row, _ := ReadRevisions(c, k.Key)
		return row.Revision == k.Rev
	case RangeIs:
		var n, top uint64
		for _, stored := range c.Ascend(rows, k.Key, k.End) {
			if n++; n > k.Len {
				return false
			}
			_, revision, _, _ := cutHeader(stored)
			top = max(top, revision)
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

// Values are text for the most part, and much of the text is digests: 71 bytes
// that say 32. In the engine's file a value with digests in it is packed: a
// length and so many bytes as they are, then 32 bytes of a digest, and so on until
// the value ends. Outside of the file, in entries of raft's log, snapshots and
// whatever is sent, values are as they were written.

const (
	digestPrefix = "sha256:"
	sumBytes     = 32
	digestText   = len(digestPrefix) + 2*sumBytes
)

// pack appends a value to b in its packed form; false, and b as it was, when it
// has no digests.
func pack(b, value []byte) ([]byte, bool) {
	packed := false
	for from := 0; ; {
		i := bytes.Index(value[from:], []byte(digestPrefix))
		if i < 0 {
			break
		}
		at := from + i
		end := at + digestText
		if end > len(value) || !lowerHex(value[at+len(digestPrefix):end]) {
			from = at + 1
			continue
		}
		b = appendBytes(b, value[:at])
		b, _ = hex.AppendDecode(b, value[at+len(digestPrefix):end])
		value, from, packed = value[end:], 0, true
	}
	if packed && len(value) > 0 {
		b = appendBytes(b, value)
	}
	return b, packed
}

func lowerHex(text []byte) bool {
	for _, c := range text {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// unpack gives the value of a packed form. Bytes that are none, which only a damaged
// file has, are given as they are: whoever wanted the row cannot decode them and
// says so with its name.
func unpack(packed []byte) []byte {
	out := make([]byte, 0, len(packed)+(digestText-sumBytes)*(1+len(packed)/(2*sumBytes)))
	for rest := packed; len(rest) > 0; {
		n, used := binary.Uvarint(rest)
		if used <= 0 || n > uint64(len(rest)-used) {
			return packed
		}
		out = append(out, rest[used:used+int(n)]...)
		if rest = rest[used+int(n):]; len(rest) == 0 {
			break
		}
		if len(rest) < sumBytes {
			return packed
		}
		out = hex.AppendEncode(append(out, digestPrefix...), rest[:sumBytes])
		rest = rest[sumBytes:]
	}
	return out
}

// ordered appends a number so that the bytes of numbers compare as they do: how
// many bytes it has, then those. Small numbers, which most are, take two or three.
func ordered(b []byte, v uint64) []byte {
	var full [8]byte
	binary.BigEndian.PutUint64(full[:], v)
	n := 0
	for n < 8 && full[n] == 0 {
		n++
	}
	return append(append(b, byte(8-n)), full[n:]...)
}

// cutOrdered takes a number off the front.
func cutOrdered(b []byte) (v uint64, rest []byte) {
	if len(b) == 0 || len(b) <= int(b[0]) {
		return 0, nil
	}
	n := int(b[0])
	for _, c := range b[1 : 1+n] {
		v = v<<8 | uint64(c)
	}
	return v, b[1+n:]
}
