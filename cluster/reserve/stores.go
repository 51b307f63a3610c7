package reserve

import (
	"bytes"
	"errors"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/kv"
)

// Engine stands before the engine of the state. What is applied is committed: on
// a full disk it waits.
func (r *Reserve) Engine(e kv.Engine) kv.Engine { return engine{e, r} }

type engine struct {
	kv.Engine
	r *Reserve
}

const theState = "the state"

// Update implements kv.Engine. fn may run more than once, each time on the same
// state.
func (e engine) Update(fn func(kv.Writer) error) error {
	defer e.r.served(theState)
	var before uint64
	applied := func(into *uint64) error {
		return e.Read(func(c kv.Content) error {
			*into = kv.Applied(c)
			return nil
		})
	}
	if err := applied(&before); err != nil {
		return err
	}
	return e.r.run(attempt{
		what: theState, wait: true,
		do: func() error { return e.Engine.Update(fn) },
		unchanged: func() (bool, error) {
			var after uint64
			err := applied(&after)
			return after == before, err
		},
	})
}

// Logs stands before raft's log. It does not wait: raft steps down, or answers
// the leader that it has no room. Only what takes the place of entries that were cut
// off the end waits: raft 1.8.0 goes on believing in the end that it has cut when the
// new entries are refused (its appendEntries says so), takes none from then on, and
// as a leader would leave a hole in its log.
func (r *Reserve) Logs(s raft.LogStore) raft.LogStore { return &logs{LogStore: s, r: r} }

type logs struct {
	raft.LogStore
	r   *Reserve
	cut atomic.Bool // since the last cut of the end nothing was stored
}

const theLog = "an entry of the log"

var errLied = errors.New("this node is stopping on a full or broken disk")

// StoreLog implements raft.LogStore.
func (l *logs) StoreLog(entry *raft.Log) error { return l.StoreLogs([]*raft.Log{entry}) }

// StoreLogs implements raft.LogStore.
func (l *logs) StoreLogs(entries []*raft.Log) error {
	if l.r.lied.Load() {
		return errLied
	}
	defer l.r.served(theLog)
	err := l.change(theLog, l.cut.Load(), func() error { return l.LogStore.StoreLogs(entries) })
	if err == nil {
		l.cut.Store(false)
	}
	return err
}

// DeleteRange implements raft.LogStore.
func (l *logs) DeleteRange(first, last uint64) error {
	_, end, err := l.ends()
	if err != nil {
		return err
	}
	err = l.change("a cut of the log", false, func() error { return l.LogStore.DeleteRange(first, last) })
	if err == nil && last >= end {
		l.cut.Store(true)
	}
	return err
}

func (l *logs) change(what string, wait bool, do func() error) error {
	// Two reads of the ends of a file that is in memory.
	first, last, err := l.ends()
	if err != nil {
		return err
	}
	err = l.r.run(attempt{
		what: what, do: do, wait: wait,
		unchanged: func() (bool, error) {
			f, l, err := l.ends()
			return f == first && l == last, err
		},
	})
	if err != nil && !Full(err) {
		l.r.breaks(what, err)
	}
	return err
}

func (l *logs) ends() (first, last uint64, err error) {
	if first, err = l.FirstIndex(); err != nil {
		return 0, 0, err
	}
	last, err = l.LastIndex()
	return first, last, err
}

// Stable stands before what raft must not forget: its term and its vote.
func (r *Reserve) Stable(s raft.StableStore) raft.StableStore { return stable{s, r} }

type stable struct {
	raft.StableStore
	r *Reserve
}

// keyTerm is the one value whose loss raft answers with a panic.
const keyTerm = "CurrentTerm"

// Set implements raft.StableStore.
func (s stable) Set(key, value []byte) error {
	return s.change(key, func() error { return s.StableStore.Set(key, value) })
}

// SetUint64 implements raft.StableStore.
func (s stable) SetUint64(key []byte, value uint64) error {
	return s.change(key, func() error { return s.StableStore.SetUint64(key, value) })
}

// change writes one value. Raft ends the process when its term cannot be
// written, with all that it serves. So such a failure is held back until the
// node stops in order, and then called a success: raft's loop goes on for a few
// steps. From then on every other write fails, votes and entries before all, so
// that it promises nobody anything in that term; the next start is back in the
// old one, as after a power cut.
func (s stable) change(key []byte, do func() error) error {
	if s.r.lied.Load() && string(key) != keyTerm {
		return errLied
	}
	what := "raft's " + string(key)
	defer s.r.served(what)
	before, err := s.get(key)
	if err == nil {
		err = s.r.run(attempt{
			what: what, wait: true, do: do,
			unchanged: func() (bool, error) {
				after, err := s.get(key)
				return bytes.Equal(before, after), err
			},
		})
	}
	if err == nil {
		return nil
	}
	if !Full(err) {
		s.r.breaks(what, err)
	}
	if string(key) != keyTerm {
		return err
	}
	<-s.r.stopped
	s.r.lied.Store(true)
	return nil
}

// get gives nil for a value that was never set.
func (s stable) get(key []byte) ([]byte, error) {
	value, err := s.Get(key)
	if err != nil && err.Error() == "not found" { // what raft itself compares with
		return nil, nil
	}
	return bytes.Clone(value), err
}
