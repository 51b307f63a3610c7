package kv

import (
	"bytes"
	"hash/maphash"
	"iter"

	"go.etcd.io/bbolt"
)

// In the engine's file the rows of each table have a B+tree of their own, a
// group: what goes before the first zero byte of a key is said once, and how
// full pages are packed is chosen for each table. A group is a bucket in that of
// the rows, under the key's beginning up to and with the zero byte and 0xff. A
// key without a zero byte, or with nothing after it, lies beside the groups as
// it is; no such key ends like the name of a group, and the order of all keys
// together is that of their bytes.

const groupEnd = "\x00\xff"

// splitGroup gives the group of a key and what is left of it; ok is false when
// the key lies beside the groups.
func splitGroup(key []byte) (prefix, rest []byte, ok bool) {
	i := bytes.IndexByte(key, 0)
	if i < 0 || i == len(key)-1 {
		return nil, nil, false
	}
	return key[:i+1], key[i+1:], true
}

// group is an open one. Its prefix ends with the zero byte.
type group struct {
	prefix []byte
	bucket *bbolt.Bucket
	cursor *bbolt.Cursor // see lookup
	growth *growth       // nil unless the transaction writes
}

// group opens a group; nil when there is none and none is to be created.
func (t *boltTx) group(prefix []byte, create bool) (*group, error) {
	for i := range t.groups {
		if bytes.Equal(t.groups[i].prefix, prefix) {
			return &t.groups[i], nil
		}
	}
	parent, name := t.bucket(rows), append(bytes.Clone(prefix), 0xff)
	b := parent.Bucket(name)
	if b == nil {
		if !create {
			return nil, nil
		}
		var err error
		if b, err = parent.CreateBucket(name); err != nil {
			return nil, err
		}
	}
	g := group{prefix: name[:len(prefix)], bucket: b}
	if t.growths != nil {
		g.growth = t.growths.of(g.prefix)
		b.FillPercent = g.growth.fill()
	}
	t.groups = append(t.groups, g)
	return &t.groups[len(t.groups)-1], nil
}

func (t *boltTx) lookupRow(key []byte) []byte {
	prefix, rest, ok := splitGroup(key)
	if !ok {
		return t.lookup(t.bucket(rows), &t.cursors[rows], key)
	}
	// Only making a group can fail.
	if g, _ := t.group(prefix, false); g != nil {
		return t.lookup(g.bucket, &g.cursor, rest)
	}
	return nil
}

func (t *boltTx) setRow(key, value []byte) error {
	prefix, rest, ok := splitGroup(key)
	if !ok {
		return t.bucket(rows).Put(key, value)
	}
	g, err := t.group(prefix, true)
	if err != nil {
		return err
	}
	g.growth.watch(g.bucket, rest)
	g.bucket.FillPercent = g.growth.fill()
	return g.bucket.Put(rest, value)
}

func (t *boltTx) unsetRow(key []byte) error {
	prefix, rest, ok := splitGroup(key)
	if !ok {
		return t.bucket(rows).Delete(key)
	}
	g, err := t.group(prefix, false)
	if g == nil {
		return err
	}
	return g.bucket.Delete(rest)
}

// ascendRows is Ascend over what lies in the groups and beside them.
func (t *boltTx) ascendRows(from, to []byte) iter.Seq2[[]byte, []byte] {
	return func(yield func([]byte, []byte) bool) {
		start, prefix := from, []byte(nil)
		first, rest, ok := splitGroup(from)
		if ok {
			prefix = first
			start = append(bytes.Clone(first), 0xff)
		}
		var joined arena
		c := t.bucket(rows).Cursor()
		for k, v := c.Seek(start); k != nil; k, v = c.Next() {
			if !bytes.HasSuffix(k, []byte(groupEnd)) {
				if to != nil && bytes.Compare(k, to) >= 0 || !yield(k, v) {
					return
				}
				t.step()
				continue
			}
			name := k[:len(k)-1]
			if to != nil && bytes.Compare(name, to) >= 0 {
				return
			}
			g, _ := t.group(name, false) // it is there
			inner := g.bucket.Cursor()
			begin := []byte(nil)
			if bytes.Equal(name, prefix) {
				begin = rest
			}
			end, bounded := bytes.CutPrefix(to, name)
			for k, v := inner.Seek(begin); k != nil; k, v = inner.Next() {
				if bounded && bytes.Compare(k, end) >= 0 || !yield(joined.join(name, k), v) {
					return
				}
				t.step()
			}
		}
	}
}

// arena holds joined keys, which live as long as the transaction, many to an
// allocation.
type arena struct {
	buf  []byte
	next int
}

func (a *arena) join(prefix, rest []byte) []byte {
	n := len(prefix) + len(rest)
	if cap(a.buf)-len(a.buf) < n {
		a.next = min(max(2*a.next, 128), 16<<10)
		a.buf = make([]byte, 0, max(a.next, n))
	}
	at := len(a.buf)
	a.buf = append(append(a.buf, prefix...), rest...)
	return a.buf[at:len(a.buf):len(a.buf)]
}

// A page that overflows is split. Where keys come in at random, two halves are
// best: both will be filled. Where each comes right behind one that came a short
// while ago (tags by number or date, whoever writes them), nothing will ever come
// into the lower half, and it should stay full; split in the middle, all such
// pages are half empty. growth finds out which of both a table is.
type growth struct {
	seed   maphash.Seed
	recent map[uint64]struct{}
	ring   [recentKeys]uint64
	count  uint64 // rows put so far
	runs   float64
}

const (
	// recentKeys is how many keys a growth remembers by their hashes, and so
	// how many places at which a table grows it can follow.
	recentKeys = 256
	// probeEach: of so many rows put, the place of one is looked at.
	probeEach = 4
	// growthWeight is what one look weighs in the running share of runs.
	growthWeight = 1.0 / 32

	fillApart  = 0.5  // both halves will be filled
	fillGrowth = 0.95 // the lower one stays as it is
)

// growths are those of all groups, of the one writer at a time.
type growths struct {
	seed maphash.Seed
	all  map[string]*growth
}

func newGrowths() *growths { return &growths{maphash.MakeSeed(), map[string]*growth{}} }

func (g *growths) of(prefix []byte) *growth {
	one := g.all[string(prefix)]
	if one == nil {
		one = &growth{seed: g.seed, recent: make(map[uint64]struct{}, recentKeys)}
		g.all[string(prefix)] = one
	}
	return one
}

func (g *growth) fill() float64 {
	if g.runs > 0.75 {
		return fillGrowth
	}
	return fillApart
}

// watch is told of a key before it is put.
func (g *growth) watch(b *bbolt.Bucket, key []byte) {
	at := &g.ring[g.count%recentKeys]
	g.count++
	if g.count%probeEach == 0 {
		c := b.Cursor()
		k, _ := c.Seek(key)
		if bytes.Equal(k, key) {
			return // no new row
		}
		if k == nil {
			k, _ = c.Last()
		} else {
			k, _ = c.Prev()
		}
		run := 0.0
		if _, ok := g.recent[maphash.Bytes(g.seed, k)]; ok && k != nil {
			run = 1
		}
		g.runs += (run - g.runs) * growthWeight
	}
	delete(g.recent, *at)
	*at = maphash.Bytes(g.seed, key)
	g.recent[*at] = struct{}{}
}
