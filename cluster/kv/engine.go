package kv

import (
	"errors"
	"iter"
	"sync"
	"sync/atomic"

	"github.com/atoll-registry/atoll/cluster/kv/treap"
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

// Writer changes a state. Set keeps what it is given, also after the transaction:
// nobody may change it any more, and what is part of something larger keeps all of it
// in memory.
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
	// Update runs fn and commits what it wrote, all or nothing. What a crash
	// leaves is the state after some Update, with all before and none behind it.
	Update(fn func(Writer) error) error
	// Sync returns when all that was committed before is durable. An Engine may
	// let that take some milliseconds of its own accord: what it lost raft's log
	// has.
	Sync() error
	// Replace builds a whole new state and puts it in place of the old one at
	// once; when fill fails, or the process dies before the end, the old one
	// stays. fill calls batch as often as it likes: each call is one bounded
	// transaction on the new state.
	Replace(fill func(batch func(func(Writer) error) error) error) error
	// Size is about how many bytes the state takes; 0 when that is not known.
	Size() int64
	// Large says that hardly two of the keys that are wanted share a page of the state, so
	// that memory is better left to those pages; and while Replace fills one, that it may
	// become so.
	Large() bool
	// Close waits for open reads to end.
	Close() error
}

// memory is an Engine whose states are immutable maps: a reader holds a whole
// state by holding its roots.
type memory struct {
	writing sync.Mutex
	current atomic.Pointer[roots] // nil once closed
}

type roots [spaces]treap.Map

// NewMemory gives an empty Engine that keeps everything in memory, for tests.
func NewMemory() Engine {
	m := &memory{}
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
	return memoryTx(*r), nil
}

func (m *memory) Update(fn func(Writer) error) error {
	m.writing.Lock()
	defer m.writing.Unlock()
	r := m.current.Load()
	if r == nil {
		return ErrClosed
	}
	return m.commit(*r, fn)
}

func (m *memory) commit(r roots, fn func(Writer) error) error {
	tx := editRoots(r)
	if err := fn(tx); err != nil {
		return err
	}
	r = tx.roots()
	m.current.Store(&r)
	return nil
}

func (m *memory) Replace(fill func(batch func(func(Writer) error) error) error) error {
	m.writing.Lock()
	defer m.writing.Unlock()
	if m.current.Load() == nil {
		return ErrClosed
	}
	tx := editRoots(roots{})
	if err := fill(func(fn func(Writer) error) error { return fn(tx) }); err != nil {
		return err
	}
	r := tx.roots()
	m.current.Store(&r)
	return nil
}

func (m *memory) Sync() error { return nil }

func (m *memory) Size() int64 { return 0 }

func (m *memory) Large() bool { return false }

func (m *memory) Close() error {
	m.writing.Lock()
	defer m.writing.Unlock()
	m.current.Store(nil)
	return nil
}

// memoryTx is a state to read.
type memoryTx roots

func (memoryTx) Release() {}

func (tx memoryTx) Lookup(s Space, key []byte) []byte {
	v, _ := tx[s].Get(key)
	return v
}

func (tx memoryTx) Ascend(s Space, from, to []byte) iter.Seq2[[]byte, []byte] {
	return tx[s].Ascend(from, to)
}

// memoryEdit is a state to be.
type memoryEdit [spaces]*treap.Edit

func editRoots(r roots) (tx memoryEdit) {
	for s := range r {
		tx[s] = r[s].Edit()
	}
	return tx
}

func (tx memoryEdit) roots() (r roots) {
	for s, e := range tx {
		r[s] = e.Map()
	}
	return r
}

func (tx memoryEdit) Lookup(s Space, key []byte) []byte {
	v, _ := tx[s].Get(key)
	return v
}

func (tx memoryEdit) Ascend(s Space, from, to []byte) iter.Seq2[[]byte, []byte] {
	return tx[s].Map().Ascend(from, to)
}

func (tx memoryEdit) Set(s Space, key, value []byte) error {
	if value == nil {
		value = []byte{} // nil would be no value
	}
	tx[s].Set(key, value)
	return nil
}

func (tx memoryEdit) Unset(s Space, key []byte) error {
	tx[s].Remove(key)
	return nil
}
