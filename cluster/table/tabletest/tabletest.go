// Package tabletest gives the tests of rooms a database without a cluster: the
// real state machine, driven by a backend that commits everything at once.
package tabletest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/table"
)

// Patience is for how long a started database looks for a leader: a test that
// takes the leader away shall not wait as long as a user does.
const Patience = 300 * time.Millisecond

// Open gives a database in memory. Define tables on it, then Start it.
func Open(t testing.TB) *table.DB {
	t.Helper()
	return open(t, kv.NewMemory())
}

// OpenBolt gives a database in a file in dir, with what an earlier one left
// there. Define tables on it, then Start it. It is closed when the test ends.
func OpenBolt(t testing.TB, dir string) *table.DB {
	t.Helper()
	engine, err := kv.OpenBolt(filepath.Join(dir, "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	return open(t, engine)
}

func open(t testing.TB, engine kv.Engine) *table.DB {
	t.Cleanup(func() {
		if err := engine.Close(); err != nil {
			t.Error(err)
		}
	})
	return table.New(engine, slog.New(slog.DiscardHandler))
}

// Start builds the database and attaches a Backend to it.
func Start(t testing.TB, db *table.DB) *Backend {
	t.Helper()
	if err := db.Build(t.Context()); err != nil {
		t.Fatal(err)
	}
	db.SetPatience(Patience)
	b := NewBackend(db)
	db.Attach(b)
	return b
}

// Backend is a site of one member that commits what it is given at once. Its
// switches play the failures that a room may have to live with.
type Backend struct {
	mu       sync.Mutex
	machine  *kv.Machine
	leader   bool
	lose     int
	drop     int
	sent     int
	before   func()
	lastCall uint64
}

// NewBackend gives a Backend for a database that is built.
func NewBackend(db *table.DB) *Backend {
	return &Backend{machine: db.Machine(), leader: true, lastCall: db.Machine().Applied()}
}

// SetLeader says whether there is a leader; without one every call fails at
// once with table.ErrNoLeader.
func (b *Backend) SetLeader(is bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.leader = is
}

// LoseReplies lets the next n proposals take effect while their answers get
// lost: the proposer is told table.ErrUnknownOutcome.
func (b *Backend) LoseReplies(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lose = n
}

// DropProposals lets the next n proposals get lost on their way: the proposer
// is told table.ErrUnknownOutcome as well.
func (b *Backend) DropProposals(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.drop = n
}

// BeforeNext runs fn once, just before the next proposal is committed: it can
// commit something in between with another Update.
func (b *Backend) BeforeNext(fn func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.before = fn
}

// Proposals is how many proposals there were.
func (b *Backend) Proposals() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.sent
}

// Propose implements table.Backend.
func (b *Backend) Propose(ctx context.Context, txn []byte) (kv.Result, error) {
	b.mu.Lock()
	before := b.before
	b.before = nil
	b.mu.Unlock()
	if before != nil {
		before()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sent++
	if err := ctx.Err(); err != nil {
		return kv.Result{}, err
	}
	if !b.leader {
		return kv.Result{}, table.ErrNoLeader
	}
	if _, err := kv.DecodeTxn(txn); err != nil {
		return kv.Result{}, err
	}
	if b.drop > 0 {
		b.drop--
		return kv.Result{}, fmt.Errorf("%w: the test dropped the proposal", table.ErrUnknownOutcome)
	}
	b.lastCall++
	switch r := b.machine.Apply(&raft.Log{Type: raft.LogCommand, Index: b.lastCall, Data: txn}).(type) {
	case kv.Result:
		if b.lose > 0 {
			b.lose--
			return kv.Result{}, fmt.Errorf("%w: the test lost the answer", table.ErrUnknownOutcome)
		}
		return r, nil
	case error:
		return kv.Result{}, errors.Join(table.ErrUnknownOutcome, r)
	default:
		return kv.Result{}, fmt.Errorf("the state machine answered with a %T", r)
	}
}

// ReadIndex implements table.Backend.
func (b *Backend) ReadIndex(context.Context) (uint64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.leader {
		return 0, table.ErrNoLeader
	}
	return b.lastCall, nil
}

// Snapshot gives the database's state as raft would store it, for
// Machine().Restore of another one.
func Snapshot(t testing.TB, db *table.DB) io.ReadCloser {
	t.Helper()
	s, err := db.Machine().Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	sink := &memorySink{}
	if err := s.Persist(sink); err != nil {
		t.Fatal(err)
	}
	return io.NopCloser(&sink.Buffer)
}

// memorySink is a raft.SnapshotSink.
type memorySink struct{ bytes.Buffer }

func (*memorySink) Close() error  { return nil }
func (*memorySink) Cancel() error { return nil }
func (*memorySink) ID() string    { return "memory" }
