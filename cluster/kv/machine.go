package kv

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"
)

// Hooks are what a Machine calls on the node that it runs on. Any may be nil.
type Hooks struct {
	// Derive gives the keys of the Local rows that point at a row; it must
	// depend on nothing but its arguments and keep neither. It is called in
	// the transaction that writes the row, so what is derived is never behind.
	Derive func(key, value []byte) [][]byte
	// Marks gives Local rows that say what Derive does at present. They are
	// written into every state that is restored from a snapshot.
	Marks func() map[string][]byte
	// Applied is called after the state has moved to revision rev, with the
	// rows and logs that changed, which it must not keep. keys is nil when any
	// may have: a snapshot was restored. It must not block.
	Applied func(rev uint64, keys [][]byte)
}

// ErrReplayed is the response to an entry that the engine already holds. Raft
// replays entries when it starts; nobody waits for the response then.
var ErrReplayed = errors.New("this entry was applied before")

// ErrHalted wraps the reason for which a Machine stopped.
var ErrHalted = errors.New("the state machine has halted")

// applyMost entries share one engine transaction where the state is large: what an Engine
// keeps together it has to write together, and there that maps pages for each key. For a small
// state all of a batch do, which costs less.
const applyMost = 4

// Machine applies committed entries to an Engine. It is a raft.BatchingFSM:
// some entries of a batch share one engine transaction, and later ones see what
// earlier ones wrote. The response to an entry is a Result or an error.
//
// Raft may skip restoring its newest snapshot at start
// (Config.NoSnapshotRestoreOnStart) when Applied is at or above that
// snapshot's index; otherwise it has to restore it, because the log before it
// may be gone. Position is what raft needs to begin its replay behind Applied.
type Machine struct {
	engine  Engine
	hooks   Hooks
	applied atomic.Uint64

	mu       sync.Mutex // held while the state moves
	known    map[ID]uint64
	oldest   uint64 // no result of an older revision is in the state
	position Position
	logged   atomic.Int64
	err      error
	halted   chan struct{}
}

var _ raft.BatchingFSM = (*Machine)(nil)

// NewMachine gives a Machine on the state that the engine holds.
func NewMachine(engine Engine, hooks Hooks) (*Machine, error) {
	if hooks.Derive == nil {
		hooks.Derive = func(_, _ []byte) [][]byte { return nil }
	}
	if hooks.Marks == nil {
		hooks.Marks = func() map[string][]byte { return nil }
	}
	if hooks.Applied == nil {
		hooks.Applied = func(uint64, [][]byte) {}
	}
	m := &Machine{engine: engine, hooks: hooks, halted: make(chan struct{})}
	if err := m.load(); err != nil {
		return nil, fmt.Errorf("read the state: %w", err)
	}
	// An engine that fails after it has answered would else be noticed with the next
	// entry only.
	if late, ok := engine.(interface{ OnFailure(func(error)) }); ok {
		late.OnFailure(func(err error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			_ = m.halt(err)
		})
	}
	return m, nil
}

// load takes into memory what the engine's state says.
func (m *Machine) load() error {
	return m.engine.Read(func(c Content) error {
		m.known, m.oldest = make(map[ID]uint64), 0
		for k, v := range c.Ascend(seen, nil, nil) {
			if len(k) != 8 || len(v) < len(ID{}) {
				return fmt.Errorf("a result of %d and %d bytes", len(k), len(v))
			}
			p := parser{rest: v}
			m.known[ID(p.take(16))] = fromBE64(k)
		}
		m.applied.Store(Applied(c))
		m.position = readPosition(c)
		m.logged.Store(readLogged(c))
		return nil
	})
}

// Applied is the revision of the state. It is durable in raft's log, and in the
// engine after its next Sync.
func (m *Machine) Applied() uint64 { return m.applied.Load() }

// Size is about how many bytes the state takes; 0 when that is not known.
func (m *Machine) Size() int64 { return m.engine.Size() }

// Halted is closed when the machine had to stop; Err says why. The node must
// then stop with that error: entries from there on are answered with it and
// not applied, and there are no snapshots, so nothing is lost.
func (m *Machine) Halted() <-chan struct{} { return m.halted }

// Err says why the machine halted; nil while it runs.
func (m *Machine) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

func (m *Machine) halt(err error) error {
	if m.err == nil {
		m.err = fmt.Errorf("%w: %w", ErrHalted, err)
		close(m.halted)
	}
	return m.err
}

// CatchUp applies what the log knows to be committed and the state does not hold:
// the last of what was applied before a process died need not be in the engine, and
// raft, which does not keep what was committed, learns it again from a quorum only.
// It is for before raft starts, and does nothing where it is not certain that the
// log goes on where the state ends.
func (m *Machine) CatchUp(log *Log) error {
	const batch = 64
	at, first := m.Position(), m.Applied()+1
	committed, err := log.Committed()
	if err != nil || committed < first {
		return err
	}
	if first > 1 {
		var last raft.Log
		if err := log.GetLog(at.Index, &last); errors.Is(err, raft.ErrLogNotFound) || err == nil && last.Term != at.Term {
			return nil // raft reads a snapshot first, or the log is of another time
		} else if err != nil {
			return err
		}
	}
	var logs []*raft.Log
	for index := first; index <= committed; index++ {
		var l raft.Log
		if err := log.GetLog(index, &l); errors.Is(err, raft.ErrLogNotFound) {
			committed = index // the rest is behind a snapshot that raft restores
		} else if err != nil {
			return fmt.Errorf("read entry %d of the log: %w", index, err)
		}
		// LogCommand is the zero value.
		if l.Index == index && (l.Type == raft.LogCommand || l.Type == raft.LogConfiguration) { // what raft gives a state machine
			logs = append(logs, &l)
		}
		if len(logs) == batch || index == committed && len(logs) > 0 {
			m.ApplyBatch(logs)
			logs = nil
		}
	}
	return m.Err()
}

// Apply implements raft.FSM.
func (m *Machine) Apply(l *raft.Log) any { return m.ApplyBatch([]*raft.Log{l})[0] }

// ApplyBatch implements raft.BatchingFSM.
func (m *Machine) ApplyBatch(logs []*raft.Log) []any {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]any, len(logs))
	for i := range out {
		out[i] = ErrReplayed
	}
	todo := len(logs)
	for todo > 0 && logs[len(logs)-todo].Index <= m.applied.Load() {
		m.replayed(logs[len(logs)-todo])
		todo--
	}
	if todo == 0 {
		return out
	}
	logs, answers := logs[len(logs)-todo:], out[len(logs)-todo:]
	most := len(logs)
	if m.engine.Large() {
		most = applyMost
	}
	for from := 0; from < len(logs) && m.err == nil; from += most {
		to := min(from+most, len(logs))
		m.applyNew(logs[from:to], answers[from:to])
	}
	if m.err != nil {
		for i, l := range logs {
			if l.Index > m.applied.Load() {
				answers[i] = m.err
			}
		}
	}
	return out
}

// applyNew applies entries that the engine does not hold. When one cannot be
// read, those before it are kept and the machine halts there.
func (m *Machine) applyNew(logs []*raft.Log, answers []any) {
	var b *batch
	var unreadable error
	rev := m.applied.Load()
	position, logged := m.position, int64(0)
	err := m.engine.Update(func(w Writer) error {
		var t Txn // of each entry in turn
		b = &batch{w: w, derive: m.hooks.Derive, known: m.known, oldest: m.oldest, added: map[ID]uint64{}, forgot: map[ID]uint64{}}
		for i, l := range logs {
			// Entries of other kinds change nothing but move the index, so that
			// whoever waits for an index does not wait for ever.
			if l.Type == raft.LogCommand {
				if err := readTxn(l.Data, &t); err != nil {
					unreadable = fmt.Errorf("entry %d: %w", l.Index, err)
					break
				}
				var err error
				if answers[i], err = b.apply(l.Index, &t); err != nil {
					return err
				}
			}
			rev = l.Index
			position.pass(l)
			logged += int64(len(l.Data))
		}
		if err := b.forget(rev); err != nil {
			return err
		}
		if err := position.write(w, m.position, m.logged.Load()+logged); err != nil {
			return err
		}
		return w.Set(meta, []byte(appliedKey), be64(rev))
	})
	if err != nil {
		m.halt(fmt.Errorf("write the state at entry %d: %w", logs[0].Index, err))
		return
	}
	b.merge()
	m.position, m.oldest = position, b.oldest
	m.logged.Add(logged)
	if rev > m.applied.Load() {
		m.applied.Store(rev)
		if b.keys == nil {
			b.keys = [][]byte{}
		}
		m.hooks.Applied(rev, b.keys)
	}
	if unreadable != nil {
		m.halt(unreadable)
	}
}
