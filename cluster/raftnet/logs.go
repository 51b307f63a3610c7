package raftnet

import (
	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/kv"
)

// logCache is how many of the newest entries are kept in memory.
const logCache = 128

// Logs is raft's log, the newest entries of it in memory, that takes down with the
// entries up to which of them it is committed.
type Logs struct {
	*raft.LogCache
	log *kv.Log
}

var _ raft.CommitTrackingLogStore = (*Logs)(nil)

// NewLogs gives the log that is written by way of store into log.
func NewLogs(store raft.LogStore, log *kv.Log) (*Logs, error) {
	cache, err := raft.NewLogCache(logCache, store)
	return &Logs{cache, log}, err
}

// StageCommitIndex implements raft.CommitTrackingLogStore: it is kept with the
// entries that are stored next, in the same write.
func (l *Logs) StageCommitIndex(index uint64) error {
	l.log.Stage(index)
	return nil
}

// GetCommitIndex implements raft.CommitTrackingLogStore. Raft 1.8.0 would hand the
// entries up to there to the state machine before anybody takes them, and hang when
// there are many. kv.Machine.CatchUp has applied them before raft starts, and so
// there is nothing to restore.
func (l *Logs) GetCommitIndex() (uint64, error) { return 0, nil }

// Machine is the state machine as raft drives it. What raft hands to it is committed,
// which the log takes down first.
type Machine struct {
	*kv.Machine
	Log *kv.Log
}

var _ raft.BatchingFSM = Machine{}

// Apply implements raft.FSM.
func (m Machine) Apply(l *raft.Log) any { return m.ApplyBatch([]*raft.Log{l})[0] }

// ApplyBatch implements raft.BatchingFSM.
func (m Machine) ApplyBatch(logs []*raft.Log) []any {
	m.Log.Reached(logs[len(logs)-1])
	return m.Machine.ApplyBatch(logs)
}
