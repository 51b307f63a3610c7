package kv

import (
	"errors"
	"iter"
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
