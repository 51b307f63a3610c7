package raftnet

import (
	"fmt"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/kv"
)

// History is raft's store of snapshots with one more: the state itself. It is on
// disk, whole, at an index of the log, and so as good as a snapshot taken there.
// Raft begins behind its newest snapshot when it starts; told of this one it
// neither looks for configurations in entries that the state has, nor hands
// them to a machine that skips them. Nothing else is told of it, and the log
// itself is as it was: every entry is read, and sent, in full.
type History struct {
	raft.SnapshotStore
	// Held: the state is at the newest snapshot or past it, so that none is to
	// be restored. It is behind when the node died while it installed one.
	Held bool
	// state is given to raft once, while it starts; nil when there is no need
	// or no proof.
	state atomic.Pointer[raft.SnapshotMeta]
}

// NewHistory puts a state at a position before the stored snapshots.
func NewHistory(stored raft.SnapshotStore, logs raft.LogStore, at kv.Position) (*History, error) {
	list, err := stored.List()
	if err != nil {
		return nil, fmt.Errorf("listing the snapshots: %w", err)
	}
	var newest *raft.SnapshotMeta
	if len(list) > 0 {
		newest = list[0]
	}
	h := &History{SnapshotStore: stored, Held: newest != nil && newest.Index <= at.Index}
	if meta := stateAsSnapshot(newest, logs, at); meta != nil {
		h.Held = true
		h.state.Store(meta)
	}
	return h, nil
}

// stateAsSnapshot describes the state as a snapshot behind the newest stored one;
// nil when it is not behind it, or when it is not certain that the log goes on
// where the state ends and which configuration was the last up to there. Raft
// then reads the log from the stored snapshot on, which is slow and no less right.
func stateAsSnapshot(newest *raft.SnapshotMeta, logs raft.LogStore, at kv.Position) *raft.SnapshotMeta {
	if at.Index == 0 || newest != nil && newest.Index >= at.Index {
		return nil
	}
	// The log must hold the entry at which the state ends, of the same term: a
	// log of another time, put back by hand, is none of the state's.
	var last raft.Log
	if err := logs.GetLog(at.Index, &last); err != nil || last.Term != at.Term {
		return nil
	}
	// It must hold the entry of the newest stored snapshot as well. A leader sends
	// that snapshot to a node that is far behind and then goes on behind it, for
	// which it needs the entry's term: from the log, or from what it takes for its
	// newest snapshot, which is the state now. Without either it would send the
	// snapshot again, for ever. A log that begins behind a snapshot is that of a
	// node that was brought up by it.
	if newest != nil {
		var at raft.Log
		if err := logs.GetLog(newest.Index, &at); err != nil {
			return nil
		}
	}
	meta := &raft.SnapshotMeta{
		Version: raft.SnapshotVersionMax, ID: "state", Index: at.Index, Term: at.Term, ConfigurationIndex: at.Changed,
	}
	switch {
	case at.Changed != 0:
		members, err := decodeConfiguration(at.Members)
		if err != nil {
			return nil
		}
		meta.Configuration = members
	case newest != nil && newest.Index >= at.From:
		// None between the snapshot and the state: the snapshot's still holds.
		meta.Configuration, meta.ConfigurationIndex = newest.Configuration, newest.ConfigurationIndex
	default:
		return nil
	}
	return meta
}

// decodeConfiguration is raft's, which panics on what it cannot read.
func decodeConfiguration(data []byte) (c raft.Configuration, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("the stored configuration: %v", r)
		}
	}()
	return raft.DecodeConfiguration(data), nil
}

// List implements raft.SnapshotStore. Raft lists once while it starts; after
// that it wants what it can send to another node.
func (h *History) List() ([]*raft.SnapshotMeta, error) {
	stored, err := h.SnapshotStore.List()
	if err != nil {
		return nil, err
	}
	if state := h.state.Swap(nil); state != nil {
		stored = append([]*raft.SnapshotMeta{state}, stored...)
	}
	return stored, nil
}
