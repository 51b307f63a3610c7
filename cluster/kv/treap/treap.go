// Package treap is an ordered map of byte strings of which every version stays
// as it is: a writer copies the path that it changes, so whoever holds a Map
// holds all of it, without a lock and for as long as it likes.
//
// Invariants:
//   - A node is changed only by the Edit that made it, and never once a Map that
//     the Edit gave is in other hands (Edit.Map ends the Edit).
//   - Keys and values are kept, not copied: once they are set nobody changes them.
package treap

import (
	"bytes"
	"iter"
	"math/rand/v2"
)

// Map is one version. The zero Map is empty.
type Map struct{ root *node }

type node struct {
	key, value  []byte
	weight      uint64 // random; no child weighs more
	left, right *node
	owner       *owner
}

// owner tells the nodes of one Edit from all others.
type owner struct{ _ byte }

// Empty reports whether there is nothing in it.
func (m Map) Empty() bool { return m.root == nil }

// Get gives the value of a key, which may be nil; ok is false when there is none.
func (m Map) Get(key []byte) (value []byte, ok bool) {
	n := m.root
	for n != nil {
		switch c := bytes.Compare(key, n.key); {
		case c < 0:
			n = n.left
		case c > 0:
			n = n.right
		default:
			return n.value, true
		}
	}
	return nil, false
}

// Ascend gives the pairs with from <= key < to in order; a nil to means to the end.
func (m Map) Ascend(from, to []byte) iter.Seq2[[]byte, []byte] {
	return func(yield func([]byte, []byte) bool) {
		for c := m.Seek(from); c.Valid() && (to == nil || bytes.Compare(c.Key(), to) < 0); c.Next() {
			if !yield(c.Key(), c.Value()) {
				return
			}
		}
	}
}

// Cursor stands at a pair of a Map, or behind the last.
type Cursor struct{ path []*node } // those still to come: the last is next

// Seek gives a cursor at the first key that is not below from.
func (m Map) Seek(from []byte) *Cursor {
	c := &Cursor{}
	for n := m.root; n != nil; {
		if bytes.Compare(n.key, from) < 0 {
			n = n.right
			continue
		}
		c.path = append(c.path, n)
		n = n.left
	}
	return c
}

// Valid is false behind the last pair; Key, Value and Next are for when it is true.
func (c *Cursor) Valid() bool { return len(c.path) > 0 }

// Key is that of the pair.
func (c *Cursor) Key() []byte { return c.path[len(c.path)-1].key }

// Value is that of the pair.
func (c *Cursor) Value() []byte { return c.path[len(c.path)-1].value }

// Next goes to the next pair.
func (c *Cursor) Next() {
	n := c.path[len(c.path)-1].right
	c.path = c.path[:len(c.path)-1]
	for ; n != nil; n = n.left {
		c.path = append(c.path, n)
	}
}

// Edit makes a new version out of a Map, which stays as it is. It is for one
// goroutine.
type Edit struct {
	root  *node
	owner *owner
}

// Edit begins a new version.
func (m Map) Edit() *Edit { return &Edit{root: m.root} }

// Map is the new version. What is changed after it goes into copies again.
func (e *Edit) Map() Map {
	e.owner = nil
	return Map{e.root}
}

// Get is Map.Get on what was written so far.
func (e *Edit) Get(key []byte) (value []byte, ok bool) { return Map{e.root}.Get(key) }

// Set gives a key a value; nil stays nil. Both are kept.
func (e *Edit) Set(key, value []byte) {
	e.begin()
	e.root = e.set(e.root, key, value)
}

// Remove takes a key out.
func (e *Edit) Remove(key []byte) {
	if _, ok := e.Get(key); ok {
		e.begin()
		e.root = e.remove(e.root, key)
	}
}

func (e *Edit) begin() {
	if e.owner == nil {
		e.owner = &owner{}
	}
}

// own gives a node that may be changed.
func (e *Edit) own(n *node) *node {
	if n.owner == e.owner {
		return n
	}
	own := *n
	own.owner = e.owner
	return &own
}

// set gives a node that the Edit owns.
func (e *Edit) set(n *node, key, value []byte) *node {
	if n == nil {
		return &node{key: key, value: value, weight: rand.Uint64(), owner: e.owner}
	}
	n = e.own(n)
	switch c := bytes.Compare(key, n.key); {
	case c < 0:
		child := e.set(n.left, key, value)
		if child.weight <= n.weight {
			n.left = child
			return n
		}
		n.left, child.right = child.right, n
		return child
	case c > 0:
		child := e.set(n.right, key, value)
		if child.weight <= n.weight {
			n.right = child
			return n
		}
		n.right, child.left = child.left, n
		return child
	}
	n.key, n.value = key, value // both: they may share an allocation
	return n
}

// remove is for a key that is there.
func (e *Edit) remove(n *node, key []byte) *node {
	c := bytes.Compare(key, n.key)
	if c == 0 {
		return e.join(n.left, n.right)
	}
	n = e.own(n)
	if c < 0 {
		n.left = e.remove(n.left, key)
	} else {
		n.right = e.remove(n.right, key)
	}
	return n
}

// join puts together two treaps of which every key of low is below those of high.
func (e *Edit) join(low, high *node) *node {
	switch {
	case low == nil:
		return high
	case high == nil:
		return low
	case low.weight > high.weight:
		low = e.own(low)
		low.right = e.join(low.right, high)
		return low
	}
	high = e.own(high)
	high.left = e.join(low, high.left)
	return high
}
