package table

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atoll-registry/atoll/cluster/kv"
)

// Backend carries transactions to the leader. Both methods may be called from
// any goroutine.
type Backend interface {
	// Propose hands the bytes to the leader, waits until they are committed and
	// gives the state machine's answer. It waits a bounded time for a leader
	// and then returns ErrNoLeader. Once the bytes may have reached a log it
	// returns an error that wraps ErrUnknownOutcome, whatever went wrong; any
	// other error promises that they will never take effect. A leader refuses
	// bytes that kv.CheckTxn refuses.
	Propose(ctx context.Context, txn []byte) (kv.Result, error)
	// ReadIndex gives an index such that every transaction committed before
	// the call is at or below it, and that a transaction or a change of the
	// configuration has (raft's own entries never reach the engine). It need
	// not wait for the engine. ErrNoLeader when no leader confirms it in time.
	ReadIndex(ctx context.Context) (uint64, error)
}

// contact is what a Backend may also have: the last time that a leader was
// heard of, before this process began if not since; zero when that is not known.
type contact interface{ LastContact() time.Time }

// ownIndexer is what a Backend may also have: a read index that takes no message
// to anybody, since this node alone decides what is committed. Reads then need
// no round that they share.
type ownIndexer interface{ OwnIndex() (uint64, bool) }

// DB is a node's copy of the site's state and the way to change the site's.
type DB struct {
	engine kv.Engine
	log    *slog.Logger
	codec  codec
	// patience is how long a call that needs a leader waits for one.
	patience time.Duration
	tables   map[string]*definition

	machine atomic.Pointer[kv.Machine] // from Build on
	backend atomic.Pointer[Backend]    // from Attach on

	progress progress
	rounds   rounds
	lists    sync.Pool // of *lists
	// lane lets Updates that lost several times go one at a time.
	lane    chan struct{}
	contact atomic.Pointer[time.Time] // when a leader last confirmed something; zero: not yet
	began   time.Time
}

// New gives a DB over an engine. Tables are defined on it, then it is built.
func New(engine kv.Engine, log *slog.Logger) *DB {
	db := &DB{
		engine:   engine,
		log:      log,
		codec:    newCodec(),
		patience: leaderWait,
		tables:   make(map[string]*definition),
		lane:     make(chan struct{}, 1),
		began:    time.Now(),
	}
	db.lists.New = func() any { return newLists() }
	db.progress.init()
	db.heard(time.Time{})
	return db
}

// Build reads the state and brings the indexes up to date: those that are new
// or of another version are built from the rows, those that no table defines
// any more are dropped. It ends before raft starts.
func (db *DB) Build(ctx context.Context) error {
	if db.machine.Load() != nil {
		return fmt.Errorf("table: Build was called twice")
	}
	m, err := kv.NewMachine(db.engine, kv.Hooks{Derive: db.derive, Marks: db.marks, Applied: db.progress.advance})
	if err != nil {
		return err
	}
	if err := db.buildIndexes(ctx); err != nil {
		return fmt.Errorf("build the indexes: %w", err)
	}
	db.progress.advance(m.Applied(), [][]byte{})
	db.machine.Store(m)
	return nil
}

// Machine is what raft drives; nil before Build.
func (db *DB) Machine() *kv.Machine { return db.machine.Load() }

// Attach names the way to the leader. Update, Confirmed and ReadIndex work
// from then on.
func (db *DB) Attach(b Backend) { db.backend.Store(&b) }

// SetPatience changes for how long ReadIndex, and an Update that writes
// nothing, wait for a leader: 15 s unless it is set before Attach. How long a
// proposal waits is the Backend's matter.
func (db *DB) SetPatience(d time.Duration) { db.patience = d }

func (db *DB) attached() (Backend, error) {
	b := db.backend.Load()
	if b == nil || db.machine.Load() == nil {
		return nil, errNotBuilt
	}
	return *b, nil
}

// View runs fn on the newest local state, which may be behind the site's.
func (db *DB) View(fn func(*View) error) error {
	return db.engine.Read(func(c kv.Content) error {
		v := &View{state: c, codec: &db.codec, revision: kv.Applied(c)}
		defer func() { v.ended = true }()
		return fn(v)
	})
}

// WaitApplied waits until the local state has reached a revision.
func (db *DB) WaitApplied(ctx context.Context, rev uint64) error {
	m := db.machine.Load()
	if m == nil {
		return errNotBuilt
	}
	for {
		moved, ok := db.progress.reached(rev)
		if ok {
			return nil
		}
		select {
		case <-moved:
		case <-m.Halted():
			return m.Err()
		case <-ctx.Done():
			return fmt.Errorf("wait for revision %d: %w", rev, ctx.Err())
		}
	}
}

// heard notes that a leader confirmed something that was asked at a time,
// which has a monotonic reading: ages survive a clock that is set.
func (db *DB) heard(at time.Time) { db.contact.Store(&at) }

// NewID gives 16 random bytes in hex.
func NewID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails: crypto/rand crashes the program instead
	return hex.EncodeToString(b[:])
}

// progress knows how far the local state is and tells those who wait for it.
type progress struct {
	mu       sync.Mutex
	rev      uint64
	moved    chan struct{} // closed at the next advance; nil when nobody waits
	watchers map[*watcher]struct{}
	// collecting are those who want to know what has changed.
	collecting map[*Changes]struct{}
}

func (p *progress) init() {
	p.watchers, p.collecting = make(map[*watcher]struct{}), make(map[*Changes]struct{})
}

// reached reports whether the state is at rev; when not, the channel is closed
// at its next move.
func (p *progress) reached(rev uint64) (<-chan struct{}, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rev >= rev {
		return nil, true
	}
	if p.moved == nil {
		p.moved = make(chan struct{})
	}
	return p.moved, false
}

// advance is the machine's Applied hook.
func (p *progress) advance(rev uint64, keys [][]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rev = rev // not the maximum: a restored snapshot may be older
	if p.moved != nil {
		close(p.moved)
		p.moved = nil
	}
	for w := range p.watchers {
		if w.sees(keys) {
			w.tell(rev)
		}
	}
	for c := range p.collecting {
		c.note(keys)
	}
}
