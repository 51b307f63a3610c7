package kv

import (
	"bytes"
	"errors"
	"hash/maphash"
	"iter"
	"sync"
	"sync/atomic"
)

// Space is one of the ordered maps that an Engine keeps apart.
type Space byte

const (
	rows    Space = iota // replicated: key -> created, revision, value
	lengths              // replicated: log name -> length, first entry
	entries              // replicated: log name, sequence -> value
	seen                 // replicated: revision -> ID and result
	meta                 // the applied index and the format
	// Local holds what this node derives from the rows for itself. It is never
	// replicated and never in a snapshot.
	Local
	spaces // how many there are
)

func (s Space) String() string {
	return [...]string{"rows", "lengths", "entries", "seen", "meta", "local"}[s]
}

// Content reads one consistent state. The slices that it gives are valid until
// the transaction ends and must not be changed.
type Content interface {
	// Lookup gives the value of a key; nil when there is none.
	Lookup(s Space, key []byte) []byte
	// Ascend gives the pairs with from <= key < to in order; a nil to means to
	// the end. The space must not be written while it runs.
	Ascend(s Space, from, to []byte) iter.Seq2[[]byte, []byte]
}

// Writer changes a state. It copies neither keys nor values: they must stay
// unchanged until the transaction ends.
type Writer interface {
	Content
	Set(s Space, key, value []byte) error
	Unset(s Space, key []byte) error
}

// Snapshot is a state held open for reading until Release, which may be called
// more than once.
type Snapshot interface {
	Content
	Release()
}

// ErrClosed is what a closed Engine answers.
var ErrClosed = errors.New("the state engine is closed")

// Engine stores the state of a Machine. Every method may be called from any
// goroutine; Update and Replace take turns.
type Engine interface {
	// Read runs fn on the newest committed state. fn must not wait for a write.
	Read(fn func(Content) error) error
	// Open gives the newest committed state, to be released by the caller. One
	// that stays open keeps old pages from being used again.
	Open() (Snapshot, error)
	// Update runs fn and commits what it wrote, all or nothing; with nil
	// returned it is durable.
	Update(fn func(Writer) error) error
	// Replace builds a whole new state and puts it in place of the old one at
	// once; when fill fails, or the process dies before the end, the old one
	// stays. fill calls batch as often as it likes: each call is one bounded
	// transaction on the new state.
	Replace(fill func(batch func(func(Writer) error) error) error) error
	// Size is about how many bytes the state takes; 0 when that is not known.
	Size() int64
	// Close waits for open reads to end.
	Close() error
}

// memory is an Engine whose states are immutable treaps: a writer copies the
// path that it changes, so a reader holds a whole state by holding its roots.
type memory struct {
	writing sync.Mutex
	current atomic.Pointer[roots] // nil once closed
	seed    maphash.Seed
}

type roots [spaces]*node

// node is never changed once it is reachable from a committed root.
type node struct {
	key, value  []byte
	weight      uint64 // a heap by weight, which is a hash of the key
	left, right *node
}

// NewMemory gives an empty Engine that keeps everything in memory, for tests.
func NewMemory() Engine {
	m := &memory{seed: maphash.MakeSeed()}
	m.current.Store(&roots{})
	return m
}

func (m *memory) Read(fn func(Content) error) error {
	s, err := m.Open()
	if err != nil {
		return err
	}
	return fn(s)
}

func (m *memory) Open() (Snapshot, error) {
	r := m.current.Load()
	if r == nil {
		return nil, ErrClosed
	}
	return &memoryTx{roots: *r}, nil
}

func (m *memory) Update(fn func(Writer) error) error {
	m.writing.Lock()
	defer m.writing.Unlock()
	r := m.current.Load()
	if r == nil {
		return ErrClosed
	}
	return m.commit(&memoryTx{roots: *r, seed: m.seed}, fn)
}

func (m *memory) commit(tx *memoryTx, fn func(Writer) error) error {
	if err := fn(tx); err != nil {
		return err
	}
	m.current.Store(&tx.roots)
	return nil
}

func (m *memory) Replace(fill func(batch func(func(Writer) error) error) error) error {
	m.writing.Lock()
	defer m.writing.Unlock()
	if m.current.Load() == nil {
		return ErrClosed
	}
	tx := &memoryTx{seed: m.seed}
	err := fill(func(fn func(Writer) error) error { return fn(tx) })
	if err != nil {
		return err
	}
	m.current.Store(&tx.roots)
	return nil
}

func (m *memory) Size() int64 { return 0 }

func (m *memory) Close() error {
	m.writing.Lock()
	defer m.writing.Unlock()
	m.current.Store(nil)
	return nil
}

// memoryTx is a state and, for a writer, the state to be.
type memoryTx struct {
	roots roots
	seed  maphash.Seed
}

func (tx *memoryTx) Release() {}

func (tx *memoryTx) Lookup(s Space, key []byte) []byte {
	n := tx.roots[s]
	for n != nil {
		switch c := bytes.Compare(key, n.key); {
		case c < 0:
			n = n.left
		case c > 0:
			n = n.right
		default:
			return n.value
		}
	}
	return nil
}

func (tx *memoryTx) Ascend(s Space, from, to []byte) iter.Seq2[[]byte, []byte] {
	root := tx.roots[s]
	return func(yield func([]byte, []byte) bool) { ascend(root, from, to, yield) }
}

func ascend(n *node, from, to []byte, yield func([]byte, []byte) bool) bool {
	if n == nil {
		return true
	}
	above := bytes.Compare(n.key, from) >= 0
	if above && !ascend(n.left, from, to, yield) {
		return false
	}
	if to != nil && bytes.Compare(n.key, to) >= 0 {
		return true // the left side has been given; this and the right are past the end
	}
	if above && !yield(n.key, n.value) {
		return false
	}
	return ascend(n.right, from, to, yield)
}

func (tx *memoryTx) Set(s Space, key, value []byte) error {
	// The caller's bytes may be those of a log entry: a treap outlives them.
	n := &node{key: bytes.Clone(key), value: append([]byte{}, value...), weight: maphash.Bytes(tx.seed, key)}
	low, high := split(tx.roots[s], key)
	tx.roots[s] = join(join(low, n), high)
	return nil
}

func (tx *memoryTx) Unset(s Space, key []byte) error {
	if tx.Lookup(s, key) != nil {
		low, high := split(tx.roots[s], key)
		tx.roots[s] = join(low, high)
	}
	return nil
}

// split gives the nodes below and those above key; the key itself is dropped.
func split(n *node, key []byte) (low, high *node) {
	if n == nil {
		return nil, nil
	}
	switch c := bytes.Compare(key, n.key); {
	case c < 0:
		low, high = split(n.left, key)
		return low, &node{n.key, n.value, n.weight, high, n.right}
	case c > 0:
		low, high = split(n.right, key)
		return &node{n.key, n.value, n.weight, n.left, low}, high
	}
	return n.left, n.right
}

// join puts together two treaps of which every key of low is below those of high.
func join(low, high *node) *node {
	switch {
	case low == nil:
		return high
	case high == nil:
		return low
	case low.weight > high.weight:
		return &node{low.key, low.value, low.weight, low.left, join(low.right, high)}
	}
	return &node{high.key, high.value, high.weight, join(low, high.left), high.right}
}
