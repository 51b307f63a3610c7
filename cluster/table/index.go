package table

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"strings"

	"github.com/atoll-registry/atoll/cluster/kv"
)

// Index finds rows by something else than their keys. It is a matter of one
// node: what Keys gives may change with any release, with a new Version.
type Index[T any] struct {
	Name string
	// Version is raised whenever Keys gives something else for a row that may
	// be stored already.
	Version int
	// Keys gives the entries under which a row is found, of one or more parts
	// each, none for a row that the index leaves out. It depends on nothing but
	// its arguments. A part must not hold a zero byte, or the entry is left out.
	Keys func(key []string, v T) [][]string
}

// Lookup gives rows in the order of an index, a row once for each of its
// entries in the Range. What it costs depends on the rows that it gives, not
// on those that there are.
func (t *Table[T]) Lookup(v *View, index string, rg Range) iter.Seq2[Row[T], error] {
	return func(yield func(Row[T], error) bool) {
		from, to, err := t.indexSpan(index, rg)
		if err == nil && v.ended {
			err = errEnded
		}
		if err != nil {
			yield(Row[T]{}, err)
			return
		}
		prefix := indexPrefix(t.name, index)
		n := 0
		for entry, key := range v.state.Ascend(kv.Local, from, to) {
			row, ok := t.follow(v, t.indexes[index], entry, key)
			if !ok {
				continue
			}
			row.Index = splitIndexKey(entry, prefix)
			if !yield(row, nil) || v.ended {
				return
			}
			if n++; n == rg.Limit {
				return
			}
		}
	}
}

// follow reads the row that an entry points at. An entry that the row would
// not get now is left from another version's Keys and ignored.
func (t *Table[T]) follow(v *View, x Index[T], entry, key []byte) (Row[T], bool) {
	stored, ok := kv.ReadRow(v.state, key)
	if !ok {
		return Row[T]{}, false
	}
	value, err := t.decode(key, stored.Value)
	if err != nil {
		return Row[T]{}, false
	}
	_, parts := splitKey(key)
	for _, own := range t.entriesIn(x, parts, key, value) {
		if bytes.Equal(own, entry) {
			return Row[T]{Key: parts, Value: value, Meta: Meta{stored.Created, stored.Revision}}, true
		}
	}
	return Row[T]{}, false
}

func (t *Table[T]) indexSpan(index string, rg Range) (from, to []byte, err error) {
	if _, ok := t.indexes[index]; !ok {
		return nil, nil, fmt.Errorf("table %s has no index %q", t.name, index)
	}
	prefix := indexPrefix(t.name, index)
	from = bytes.Clone(prefix)
	for _, p := range rg.Prefix {
		if strings.Contains(p, sep) {
			return nil, nil, fmt.Errorf("index %s of %s: %q holds a zero byte", index, t.name, p)
		}
		from = append(append(from, p...), 0)
	}
	to = bytes.Clone(from)
	to[len(to)-1]++ // it ends with a separator
	if len(rg.After) == 0 {
		return from, to, nil
	}
	last, err := rowKey(t.name, rg.After)
	if err != nil {
		return nil, nil, err
	}
	parts := rg.AfterIndex
	if parts == nil {
		parts = rg.Prefix
	}
	entry, ok := indexKey(prefix, parts, last[len(t.name)+1:])
	if !ok {
		return nil, nil, fmt.Errorf("index %s of %s: no entry can be %q", index, t.name, parts)
	}
	if next := after(entry); bytes.Compare(next, from) > 0 {
		from = next
	}
	return from, to, nil
}

// derive is part of the machine's Derive hook.
func (t *Table[T]) derive(key, value []byte) [][]byte {
	if len(t.indexes) == 0 {
		return nil
	}
	v, err := t.decode(key, value)
	if err != nil {
		return nil
	}
	_, parts := splitKey(key)
	return t.entriesOf(parts, key, v)
}

// entriesOf gives the entries of a row in all indexes.
func (t *Table[T]) entriesOf(parts []string, key []byte, v T) (out [][]byte) {
	for _, x := range t.indexes {
		out = append(out, t.entriesIn(x, parts, key, v)...)
	}
	return out
}

// entriesIn gives the entries of a row in one index. It runs while entries of
// the log are applied: a Keys that panics would take the node down, and again
// at every start, so it leaves the row out instead.
func (t *Table[T]) entriesIn(x Index[T], parts []string, key []byte, v T) (out [][]byte) {
	defer func() {
		if recover() != nil {
			out = nil
		}
	}()
	prefix := indexPrefix(t.name, x.Name)
	for _, k := range x.Keys(parts, v) {
		if len(k) == 0 {
			continue
		}
		if entry, ok := indexKey(prefix, k, key[len(t.name)+1:]); ok {
			out = append(out, entry)
		}
	}
	return out
}

// derive is the machine's Derive hook.
func (db *DB) derive(key, value []byte) [][]byte {
	i := bytes.IndexByte(key, 0)
	if i < 0 {
		return nil
	}
	if d := db.tables[string(key[:i])]; d != nil {
		return d.derive(key, value)
	}
	return nil
}

// marks is the machine's Marks hook: what a state that was derived by this
// program is marked with.
func (db *DB) marks() map[string][]byte {
	out := make(map[string][]byte)
	for _, d := range db.tables {
		for index, version := range d.versions {
			out[indexMark(d.name, index)] = mark(version)
		}
	}
	return out
}

func mark(version int) []byte { return binary.AppendUvarint(nil, uint64(version)+1) }

// unfinished marks an index that is being built or dropped: whoever finds it
// at the next start does it again.
var unfinished = []byte{0}

// buildChunk is how many rows or entries one transaction of a build handles.
const buildChunk = 1000

func (db *DB) buildIndexes(ctx context.Context) error {
	have := make(map[string][]byte)
	err := db.engine.Read(func(c kv.Content) error {
		for k, v := range c.Ascend(kv.Local, []byte("v"+sep), []byte("v\x01")) {
			have[string(k)] = bytes.Clone(v)
		}
		return nil
	})
	if err != nil {
		return err
	}
	want := db.marks()
	for name, v := range have {
		if !bytes.Equal(v, want[name]) {
			// Dropped, or to be built anew. An index that no table defines must
			// go even if its version may come back: nobody keeps it up to date.
			if err := db.dropIndex(ctx, name); err != nil {
				return err
			}
		}
	}
	for name, v := range want {
		if !bytes.Equal(v, have[name]) {
			if err := db.buildIndex(ctx, name, v); err != nil {
				return err
			}
		}
	}
	return nil
}

func (db *DB) dropIndex(ctx context.Context, name string) error {
	_, table, index := splitMark(name)
	from := indexPrefix(table, index)
	to := bytes.Clone(from)
	to[len(to)-1]++
	for more := true; more; {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := db.engine.Update(func(w kv.Writer) error {
			var old [][]byte
			for k := range w.Ascend(kv.Local, from, to) {
				if old = append(old, bytes.Clone(k)); len(old) == buildChunk {
					break
				}
			}
			for _, k := range old {
				if err := w.Unset(kv.Local, k); err != nil {
					return err
				}
			}
			if more = len(old) == buildChunk; more {
				return w.Set(kv.Local, []byte(name), unfinished)
			}
			return w.Unset(kv.Local, []byte(name))
		})
		if err != nil {
			return fmt.Errorf("drop index %s of %s: %w", index, table, err)
		}
	}
	return nil
}

func (db *DB) buildIndex(ctx context.Context, name string, version []byte) error {
	_, table, index := splitMark(name)
	prefix := indexPrefix(table, index)
	from, to := below([]byte(table))
	rows := 0
	for more := true; more; {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := db.engine.Update(func(w kv.Writer) error {
			n := 0
			for row := range kv.ReadRows(w, from, to) {
				for _, entry := range db.derive(row.Key, row.Value) {
					if bytes.HasPrefix(entry, prefix) {
						if err := w.Set(kv.Local, entry, bytes.Clone(row.Key)); err != nil {
							return err
						}
					}
				}
				if n++; n == buildChunk {
					from = after(bytes.Clone(row.Key))
					break
				}
			}
			rows += n
			if more = n == buildChunk; more {
				return w.Set(kv.Local, []byte(name), unfinished)
			}
			return w.Set(kv.Local, []byte(name), version)
		})
		if err != nil {
			return fmt.Errorf("build index %s of %s: %w", index, table, err)
		}
	}
	if rows > 0 {
		db.log.Info("built an index", "table", table, "index", index, "rows", rows)
	}
	return nil
}

func splitMark(name string) (kind, table, index string) {
	kind, rest, _ := strings.Cut(name, sep)
	table, index, _ = strings.Cut(rest, sep)
	return kind, table, index
}
