package kv

import (
	"io"

	"github.com/hashicorp/raft"
)

// Machine is what raft drives.
type Machine struct{}

var _ raft.BatchingFSM = (*Machine)(nil)

// Apply gives a Result or an error.
func (m *Machine) Apply(l *raft.Log) any { return m.ApplyBatch([]*raft.Log{l})[0] }

// ApplyBatch gives a Result or an error for each entry.
func (m *Machine) ApplyBatch(logs []*raft.Log) []any { return make([]any, len(logs)) }

// Snapshot implements raft.FSM.
func (m *Machine) Snapshot() (raft.FSMSnapshot, error) { return nil, errTodo }

// Restore implements raft.FSM.
func (m *Machine) Restore(io.ReadCloser) error { return errTodo }

// Applied is the revision that the engine holds durably.
func (m *Machine) Applied() uint64 { return 0 }

// Halted is closed when the machine had to stop; Err says why. The node must
// then stop with that error.
func (m *Machine) Halted() <-chan struct{} { return nil }

// Err says why the machine halted; nil while it runs.
func (m *Machine) Err() error { return nil }
