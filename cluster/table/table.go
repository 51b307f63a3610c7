package table

import (
	"fmt"
	"iter"
	"reflect"
	"regexp"

	"github.com/atoll-registry/atoll/cluster/kv"
)

// Meta says when a row was written. In a Tx a row that the Tx itself wrote has
// Revision 0, and Created 0 when it is new: both are known after the commit.
type Meta struct {
	Created  uint64 // revision of the first write: a number that no other row of the table has had
	Revision uint64 // revision of the last write
}

// Row is a row of a table.
type Row[T any] struct {
	Key   []string
	Value T
	Meta
	// Index has the parts of the index entry that a Lookup found the row by;
	// nil from a Scan.
	Index []string
}

// Range selects rows by their keys, or by those of an index.
type Range struct {
	// Prefix selects the keys that begin with these parts and go on after
	// them; for a Lookup, the index entries that begin with these parts.
	Prefix []string
	// After leaves out everything up to and including this key: the whole key
	// of the last row of the page before.
	After []string
	// AfterIndex is, for a Lookup with After, the Index of that last row. It
	// may be left out when Prefix is all parts of the index.
	AfterIndex []string
	// Limit is how many rows to give at most; 0 for all.
	Limit int
	// Since leaves out the rows that were not written after this revision. A
	// Scan passes them over without decoding them; a Lookup ignores it.
	Since uint64
}

// Table is a typed table: rows of T, stored as CBOR maps under T's field names
// (`cbor:"name"`), by keys of one or more parts in byte order. A key whose
// parts are a prefix of another's is allowed.
type Table[T any] struct {
	name    string
	shape   *shape
	indexes map[string]Index[T]
	codec   *codec
}

// definition is what a DB knows of a Table without its type.
type definition struct {
	name     string
	versions map[string]int // of the indexes
	derive   func(key, value []byte) [][]byte
}

// Define makes a table known to a DB before it is built. It panics when the
// program cannot be right: a name that is taken or has other characters than
// a-z, 0-9, "-" and "_", a T that is no plain struct, a DB that is built.
func Define[T any](db *DB, name string, indexes ...Index[T]) *Table[T] {
	if db.machine.Load() != nil {
		panic("table: Define(" + name + ") after Build")
	}
	checkName(name)
	if db.tables[name] != nil {
		panic("table: table " + name + " is defined twice")
	}
	t := &Table[T]{name: name, shape: shapeOf(reflect.TypeFor[T]()), indexes: map[string]Index[T]{}, codec: &db.codec}
	d := &definition{name: name, versions: map[string]int{}, derive: t.derive}
	for _, x := range indexes {
		checkName(x.Name)
		if _, ok := t.indexes[x.Name]; ok || x.Keys == nil || x.Version < 0 {
			panic(fmt.Sprintf("table: index %s of %s is defined twice, has no Keys or a negative Version", x.Name, name))
		}
		t.indexes[x.Name] = x
		d.versions[x.Name] = x.Version
	}
	db.tables[name] = d
	return t
}

func checkName(name string) {
	if ok, _ := regexp.MatchString(`^[a-z][a-z0-9_-]*$`, name); !ok {
		panic(fmt.Sprintf("table: bad name %q", name))
	}
}

// Get reads a row. In a Tx it guards the row, absent or not. An error other
// than that of a bad key means that this version cannot decode the row.
func (t *Table[T]) Get(r Reader, key ...string) (v T, meta Meta, ok bool, err error) {
	k, err := rowKey(t.name, key)
	if err != nil {
		return v, meta, false, err
	}
	row, ok, err := r.row(k)
	if err != nil || !ok {
		return v, meta, false, err
	}
	v, err = t.decode(k, row.Value)
	return v, Meta{row.Created, row.Revision}, err == nil, err
}

// Meta says when a row was written without decoding its value: whoever keeps what
// a value amounts to knows by the Revision whether it still does. In a Tx it guards
// the row, as Get does.
func (t *Table[T]) Meta(r Reader, key ...string) (Meta, bool, error) {
	k, err := rowKey(t.name, key)
	if err != nil {
		return Meta{}, false, err
	}
	row, ok, err := r.revisions(k)
	return Meta{row.Created, row.Revision}, ok, err
}

func (t *Table[T]) decode(key, value []byte) (v T, err error) {
	if err := t.codec.dec.Unmarshal(value, &v); err != nil {
		return v, fmt.Errorf("row %s is unreadable for this version: %w", readable(key), err)
	}
	return v, nil
}

// Put writes a row. It keeps the fields of the stored row that T does not
// have, and so it reads, and guards, the row. A T without fields has a row whose key
// says everything: it is written as it is, and not guarded.
func (t *Table[T]) Put(tx *Tx, v T, key ...string) error {
	k, err := rowKey(t.name, key)
	if err != nil {
		return err
	}
	if len(t.shape.fields) == 0 {
		if err := tx.foresee(k); err != nil {
			return err
		}
		return tx.put(k, []byte{emptyMap})
	}
	row, _, err := tx.row(k)
	if err != nil {
		return err
	}
	b, err := t.codec.encode(t.shape, v, row.Value)
	if err != nil {
		return fmt.Errorf("write row %s: %w", readable(k), err)
	}
	return tx.put(k, b)
}

// Delete removes a row; removing none is no error. It reads and guards
// nothing: a Tx that has to know whether there was a row uses Get.
func (t *Table[T]) Delete(tx *Tx, key ...string) error {
	k, err := rowKey(t.name, key)
	if err != nil {
		return err
	}
	return tx.remove(k)
}

// Scan gives rows in order of their keys. In a Tx it guards the range up to
// where the caller stopped, which covers at most 256 rows, and sees what the
// Tx has written before the Scan began. A row that this version cannot decode
// comes with its Key and an error; the Scan goes on if the caller does.
func (t *Table[T]) Scan(r Reader, rg Range) iter.Seq2[Row[T], error] {
	return func(yield func(Row[T], error) bool) {
		for row, err := range t.walk(r, rg) {
			if err != nil {
				yield(Row[T]{}, err)
				return
			}
			_, parts := splitKey(row.Key)
			v, err := t.decode(row.Key, row.Value)
			if !yield(Row[T]{Key: parts, Value: v, Meta: Meta{row.Created, row.Revision}}, err) {
				return
			}
		}
	}
}

// Keys is Scan for who wants the keys alone: rows are not decoded.
func (t *Table[T]) Keys(r Reader, rg Range) iter.Seq2[[]string, error] {
	return func(yield func([]string, error) bool) {
		for row, err := range t.walk(r, rg) {
			if err != nil {
				yield(nil, err)
				return
			}
			if _, parts := splitKey(row.Key); !yield(parts, nil) {
				return
			}
		}
	}
}

// walk gives the rows of a Range as they are stored; an error ends it.
func (t *Table[T]) walk(r Reader, rg Range) iter.Seq2[kv.Row, error] {
	return func(yield func(kv.Row, error) bool) {
		from, to, err := t.span(rg)
		if err != nil {
			yield(kv.Row{}, err)
			return
		}
		if string(from) >= string(to) {
			return
		}
		walk := rg.Limit
		if rg.Since > 0 {
			walk = 0 // the limit is of those that are given
		}
		given := 0
		for row, err := range r.rows(from, to, walk) {
			if err != nil {
				yield(kv.Row{}, err)
				return
			}
			if rg.Since > 0 && row.Revision != 0 && row.Revision <= rg.Since {
				continue
			}
			if !yield(row, nil) {
				return
			}
			if given++; given == rg.Limit {
				return
			}
		}
	}
}

// span gives the keys of a Range.
func (t *Table[T]) span(rg Range) (from, to []byte, err error) {
	prefix, err := joinKey(t.name, rg.Prefix)
	if err != nil {
		return nil, nil, err
	}
	from, to = below(prefix)
	if len(rg.After) > 0 {
		last, err := rowKey(t.name, rg.After)
		if err != nil {
			return nil, nil, err
		}
		if next := after(last); string(next) > string(from) {
			from = next
		}
	}
	return from, to, nil
}

// Count gives the number of rows whose keys begin with a prefix and go on
// after it. It reads their keys only.
func (t *Table[T]) Count(v *View, prefix ...string) (int, error) {
	from, to, err := t.span(Range{Prefix: prefix})
	if err != nil {
		return 0, err
	}
	if v.ended {
		return 0, errEnded
	}
	return kv.CountRows(v.state, from, to), nil
}
