package clustertest

import (
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/reserve"
	"github.com/atoll-registry/atoll/cluster/table"
)

var (
	errFull     error = &os.PathError{Op: "write", Path: "a file", Err: syscall.ENOSPC}
	errBroken   error = &os.PathError{Op: "sync", Path: "a file", Err: syscall.EIO}
	errNoLeader       = table.ErrNoLeader
)

// machine is what a node stands on through all its runs: a disk and a clock that
// can be broken.
type machine struct {
	back     atomic.Int64 // nanoseconds by which the clock is slow
	full     atomic.Bool  // the log takes no entry
	restored atomic.Int64 // snapshots that replaced the state

	mu   sync.Mutex
	next *broken
	held chan struct{} // commits wait until it is closed; nil lets them go
}

// broken is a commit that fails, before or after it has happened.
type broken struct {
	err   error
	after bool
}

func (m *machine) now() time.Time { return time.Now().Add(-time.Duration(m.back.Load())) }

// breakNext breaks the next commit; mend takes that back and reports whether it
// was still to come.
func (m *machine) breakNext(b *broken) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.next = b
}

func (m *machine) mend() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	was := m.next != nil
	m.next = nil
	return was
}

// hang holds commits until release.
func (m *machine) hang() (release func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	held := make(chan struct{})
	m.held = held
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.held = nil
		close(held)
	}
}

// engine is a node's state on its machine.
type engine struct {
	kv.Engine
	m *machine
}

func (e *engine) Update(fn func(kv.Writer) error) error {
	e.m.mu.Lock()
	b, held := e.m.next, e.m.held
	e.m.next = nil
	e.m.mu.Unlock()
	if held != nil {
		<-held
	}
	switch {
	case b == nil:
		return e.Engine.Update(fn)
	case b.after:
		if err := e.Engine.Update(fn); err != nil {
			return err
		}
		return b.err
	}
	return e.Engine.Update(func(w kv.Writer) error {
		if err := fn(w); err != nil {
			return err
		}
		return b.err
	})
}

func (e *engine) Replace(fill func(batch func(func(kv.Writer) error) error) error) error {
	err := e.Engine.Replace(fill)
	if err == nil {
		e.m.restored.Add(1)
	}
	return err
}

// Size is not known, so that snapshots follow from the length of the log alone:
// the file of the smallest state has the size of a large one.
func (e *engine) Size() int64 { return 0 }

func (e *engine) Large() bool { return false }

// logDisk is a machine's disk as raft's log sees it: behind the reserve, as in a node, since
// raft goes wrong where the end of a log was cut and what takes its place is refused.
type logDisk struct {
	*reserve.Reserve
	m *machine
}

var _ member.Disk = logDisk{}

func (d logDisk) Logs(s raft.LogStore) raft.LogStore { return d.Reserve.Logs(logStore{s, d.m}) }

// newLogDisk is for one run of a node.
func newLogDisk(t *testing.T, n *Node, m *machine) member.Disk {
	r, err := reserve.Open(filepath.Join(n.Dir, "ballast"), roomy{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Error(err)
	}
	return logDisk{r, m}
}

// roomy has room for a ballast, which nobody makes.
type roomy struct{}

func (roomy) Space() (free, total int64, err error) { return 1 << 30, 1 << 30, nil }

type logStore struct {
	raft.LogStore
	m *machine
}

func (s logStore) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

func (s logStore) StoreLogs(l []*raft.Log) error {
	if s.m.full.Load() {
		return errFull
	}
	return s.LogStore.StoreLogs(l)
}

// A node whose log is full just when its end gives way to the new leader's entries goes on
// when there is room again.
func TestFullLogBehindACut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var machines sync.Map
		of := func(n *Node) *machine {
			m, _ := machines.LoadOrStore(n, &machine{})
			return m.(*machine)
		}
		c := New(t, Options{Define: withNotes, Disk: func(n *Node) member.Disk { return newLogDisk(t, n, of(n)) }})
		c.Grow(3)
		old := c.Leader()
		c.Isolate(old)
		ended := make(chan error, 1)
		go func() { ended <- old.write(t.Context(), "b", "cut") }()
		if err := c.Others(old)[0].write(t.Context(), "a", "kept"); err != nil {
			t.Fatal(err)
		}
		of(old).full.Store(true)
		c.Rejoin(old)
		<-time.After(10 * time.Second)
		of(old).full.Store(false)
		old.want("a", "kept")
		<-ended // with whatever
	})
}
