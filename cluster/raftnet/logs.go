package raftnet

import (
	"io"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/kv"
)

// recentEntries and recentBytes are how much of the log's end is kept in memory: who
// applies it and who sends it to the others comes right behind who wrote it. A
// manifest may have megabytes, so that the number alone bounds nothing.
const (
	recentEntries = 128
	recentBytes   = 4 << 20
)

// Logs is raft's log, the newest entries of it in memory, that takes down with the
// entries up to which of them it is committed.
type Logs struct {
	recent
	log *kv.Log
}

var _ raft.CommitTrackingLogStore = (*Logs)(nil)

// NewLogs gives the log that is written by way of store into log.
func NewLogs(store raft.LogStore, log *kv.Log) *Logs {
	return &Logs{recent{LogStore: store}, log}
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

// recent is a log with its newest entries in memory, which nobody changes.
type recent struct {
	raft.LogStore
	mu     sync.RWMutex
	ring   [recentEntries]*raft.Log // an entry lies at its index modulo their number
	bytes  int                      // of what lies there
	oldest uint64                   // nothing that is older lies there
}

// GetLog implements raft.LogStore.
func (r *recent) GetLog(index uint64, out *raft.Log) error {
	r.mu.RLock()
	entry := r.ring[index%recentEntries]
	r.mu.RUnlock()
	if entry != nil && entry.Index == index {
		*out = *entry
		return nil
	}
	return r.LogStore.GetLog(index, out)
}

// StoreLog implements raft.LogStore.
func (r *recent) StoreLog(entry *raft.Log) error { return r.StoreLogs([]*raft.Log{entry}) }

// StoreLogs implements raft.LogStore.
func (r *recent) StoreLogs(logs []*raft.Log) error {
	if err := r.LogStore.StoreLogs(logs); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, entry := range logs {
		r.keep(entry)
	}
	return nil
}

// keep is for who holds mu. The newest entry stays, however large it is.
func (r *recent) keep(entry *raft.Log) {
	if r.bytes == 0 {
		r.oldest = entry.Index
	}
	if entry.Index >= recentEntries {
		r.oldest = max(r.oldest, entry.Index-recentEntries+1)
	}
	r.put(entry.Index, entry)
	for ; r.bytes > recentBytes && r.oldest < entry.Index; r.oldest++ {
		r.put(r.oldest, nil)
	}
}

func (r *recent) put(index uint64, entry *raft.Log) {
	at := &r.ring[index%recentEntries]
	if *at != nil {
		r.bytes -= sizeOf(*at)
	}
	if *at = entry; entry != nil {
		r.bytes += sizeOf(entry)
	}
}

func sizeOf(entry *raft.Log) int { return 128 + len(entry.Data) + len(entry.Extensions) }

// DeleteRange implements raft.LogStore.
func (r *recent) DeleteRange(first, last uint64) error {
	r.mu.Lock()
	r.ring, r.bytes = [recentEntries]*raft.Log{}, 0
	r.mu.Unlock()
	return r.LogStore.DeleteRange(first, last)
}

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

// Restore implements raft.FSM. The state keeps where in the log it ends and with which
// configuration, so that the snapshot may be lost afterwards.
func (m Machine) Restore(source io.ReadCloser) error {
	if err := m.Machine.Restore(source); err != nil {
		return err
	}
	end := endOf(source)
	if end == nil {
		return nil
	}
	return m.Place(kv.Position{
		Index: end.Index, Term: end.Term, From: end.Index,
		Changed: end.ConfigurationIndex, Members: raft.EncodeConfiguration(end.Configuration),
	})
}
