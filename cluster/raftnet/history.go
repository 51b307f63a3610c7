package raftnet

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/kv"
)

// ErrGap: the log does not go on where the state, or any snapshot that can be read,
// ends. What lies between is not here.
var ErrGap = errors.New("the log does not go on where the state ends")

// History is raft's store of snapshots with one more: the state itself. It is on
// disk, whole, at an index of the log, and so as good as a snapshot taken there.
// Raft begins behind its newest snapshot when it starts; told of this one it
// neither looks for configurations in entries that the state has, nor hands
// them to a machine that skips them. Nothing else is told of it, and the log
// itself is as it was: every entry is read, and sent, in full.
//
// Snapshots that are of no use are not shown: those that cannot be read while the state
// is behind them, and those behind which the log does not go on, since nobody who got
// one could be sent what follows.
type History struct {
	raft.SnapshotStore
	// Held: the state is at the newest snapshot or past it, so that none is to
	// be restored. It is behind when the node died while it installed one.
	Held bool
	// state is given to raft once, while it starts; nil when there is no need
	// or no proof.
	state  atomic.Pointer[raft.SnapshotMeta]
	hidden map[string]bool // by ids
	wanted atomic.Bool     // see Wanted
}

// NewHistory puts a state at a position before the stored snapshots. Errors: ErrGap.
func NewHistory(stored raft.SnapshotStore, logs raft.LogStore, at kv.Position) (*History, error) {
	list, err := stored.List()
	if err != nil {
		return nil, fmt.Errorf("listing the snapshots: %w", err)
	}
	h := &History{SnapshotStore: stored, hidden: map[string]bool{}}
	newest := h.readable(list, at)
	h.Held = newest != nil && newest.Index <= at.Index
	begins, whole := uint64(0), newest == nil
	if newest != nil {
		begins, whole = newest.Index, logs.GetLog(newest.Index, new(raft.Log)) == nil
	}
	goes, last, err := goesOn(logs, begins)
	if err != nil {
		return nil, err
	}
	state := stateAsSnapshot(newest, logs, at)
	switch {
	case state == nil && (!goes || at.Index > max(begins, last)):
		// Of a log that ends before the state, which never happens by itself, other
		// nodes were told more than it has.
		return nil, gap(newest, logs, at)
	case !goes:
		// The snapshot that the log was cut behind cannot be read. Another is taken soon.
		for _, s := range list {
			h.hidden[s.ID] = true
		}
		h.wanted.Store(true)
	case !whole:
		// The log begins behind the snapshot: it is that of a node that was brought up
		// by it. A leader sends that snapshot to a node that is far behind and then goes
		// on behind it, for which it needs the entry's term: from the log, or from what
		// it takes for its newest snapshot. If that were the state, it would send the
		// snapshot again, for ever.
		state = nil
	}
	if state != nil {
		h.Held = true
		h.state.Store(state)
	}
	return h, nil
}

// readable is the newest of the snapshots that is not ahead of the state, or that can be
// read. Those before it are hidden: raft would take one for restored that is not.
func (h *History) readable(list []*raft.SnapshotMeta, at kv.Position) *raft.SnapshotMeta {
	for _, s := range list {
		if s.Index <= at.Index {
			return s
		}
		if _, source, err := h.SnapshotStore.Open(s.ID); err == nil {
			_ = source.Close() // it was read only
			return s
		}
		h.hidden[s.ID] = true
		h.wanted.Store(true)
	}
	return nil
}

// goesOn reports whether the log has what follows an index, or nothing that does, and
// where it ends.
func goesOn(logs raft.LogStore, index uint64) (goes bool, last uint64, err error) {
	last, err = logs.LastIndex()
	if err != nil || last <= index {
		return true, last, err
	}
	err = logs.GetLog(index+1, new(raft.Log))
	// One that cannot be read is raft's to complain of.
	return !errors.Is(err, raft.ErrLogNotFound), last, nil
}

// gap says what is there.
func gap(newest *raft.SnapshotMeta, logs raft.LogStore, at kv.Position) error {
	first, err := logs.FirstIndex()
	if err != nil {
		return err
	}
	last, err := logs.LastIndex()
	if err != nil {
		return err
	}
	snapshot := "no snapshot can be read"
	if newest != nil {
		snapshot = fmt.Sprintf("the newest snapshot that can be read ends at %d", newest.Index)
	}
	return fmt.Errorf("%w: the state ends at entry %d, %s, and the log has entries %d to %d", ErrGap, at.Index, snapshot, first, last)
}

// stateAsSnapshot describes the state as a snapshot behind the newest stored one;
// nil when it is not behind it, or when it is not certain that the log goes on
// where the state ends and which configuration was the last up to there. Raft
// then reads the log from the stored snapshot on, which is slow and no less right.
func stateAsSnapshot(newest *raft.SnapshotMeta, logs raft.LogStore, at kv.Position) *raft.SnapshotMeta {
	if at.Index == 0 || newest != nil && newest.Index >= at.Index || !joins(logs, at) {
		return nil
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

// joins reports whether the log holds the entry at which the state ends, of the same
// term: a log of another time, put back by hand, is none of the state's. To a state that
// is as it came, as a snapshot, at a known term, the log has what follows or nothing.
func joins(logs raft.LogStore, at kv.Position) bool {
	var l raft.Log
	if err := logs.GetLog(at.Index, &l); err == nil {
		return l.Term == at.Term
	}
	if at.Term == 0 || at.From != at.Index {
		return false
	}
	if last, err := logs.LastIndex(); err != nil || last < at.Index {
		return err == nil
	}
	return logs.GetLog(at.Index+1, &l) == nil && l.Term >= at.Term
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
	stored = slices.DeleteFunc(stored, func(s *raft.SnapshotMeta) bool { return h.hidden[s.ID] })
	if state := h.state.Swap(nil); state != nil {
		stored = append([]*raft.SnapshotMeta{state}, stored...)
	}
	return stored, nil
}

// Open implements raft.SnapshotStore. What raft cannot open it tries again and again.
func (h *History) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	meta, source, err := h.SnapshotStore.Open(id)
	if err != nil {
		h.wanted.Store(true)
	}
	return meta, source, err
}

// Wanted reports that a snapshot should be taken soon, however short the log is: there is
// none, or the newest cannot be read, and other nodes may need one. Taken ends that.
func (h *History) Wanted() bool { return h.wanted.Load() }

// Taken says that a snapshot was taken.
func (h *History) Taken() { h.wanted.Store(false) }
