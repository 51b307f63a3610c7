package table

import (
	"context"
	"errors"
	"sync"
	"time"
)

const (
	// confirmWait is how long a read waits for a leader before it makes do with
	// the local state.
	confirmWait = 200 * time.Millisecond
	// leaderWait is how long everything else waits for a leader, as a write does.
	leaderWait = 15 * time.Second
	// askAgain is the pause after an answer that there is no leader.
	askAgain = 25 * time.Millisecond
	// catchUpWait is how long a read waits for the local state to reach what a
	// leader has confirmed.
	catchUpWait = 5 * time.Second
	// roundLimit ends a round that nothing answers.
	roundLimit = 15 * time.Second
	// roundOverlap is when the next round stops waiting for the one before it:
	// that may hang on a leader that is gone.
	roundOverlap = time.Second
)

// Freshness says how well a read was confirmed.
type Freshness struct {
	// Stale: no leader confirmed the read in time; it ran on the local state.
	Stale bool
	// Age is for how long no leader has confirmed anything, 0 unless Stale.
	Age      time.Duration
	Revision uint64 // of the state that the read saw
}

// Confirmed runs fn on a state that includes everything committed at the site
// before the call. When no leader confirms that within 200 ms (at once, when
// there has been none for 15 s and none is known) fn runs on the local state
// instead and Freshness is Stale: what fn finds was true, what it misses may
// exist. For reads that must not fall back call ReadIndex, then View; for those
// whose answer may be that there is nothing, Sought.
func (db *DB) Confirmed(ctx context.Context, fn func(*View) error) (Freshness, error) {
	if _, err := db.attached(); err != nil {
		return Freshness{}, err
	}
	var fresh Freshness
	if err := db.confirm(ctx); err != nil {
		if ctx.Err() != nil {
			return Freshness{}, ctx.Err()
		}
		fresh.Stale = true
		fresh.Age = time.Since(db.lastContact())
		db.log.Debug("a read was not confirmed", "error", err, "age", fresh.Age)
	}
	err := db.View(func(v *View) error {
		fresh.Revision = v.Revision()
		return fn(v)
	})
	return fresh, err
}

// Sought is Confirmed for what may be missing, which fn says. What it misses on a
// state that no leader has confirmed it looks for again once one does: such an
// absence is no answer, and a node that has just started, or a leader whose link is
// full, is late by more than 200 ms. It waits for that as long as a write does
// (see SetPatience), and not at all when there has been no leader for so long.
func (db *DB) Sought(ctx context.Context, fn func(*View) (found bool, err error)) (Freshness, error) {
	found := false
	look := func(v *View) (err error) {
		found, err = fn(v)
		return err
	}
	fresh, err := db.Confirmed(ctx, look)
	if !fresh.Stale || found || time.Since(db.lastContact()) >= db.patience {
		return fresh, err
	}
	wait, cancel := context.WithTimeout(ctx, db.patience)
	defer cancel()
	if db.ReadIndex(wait) != nil {
		return fresh, errors.Join(err, ctx.Err())
	}
	err = db.View(func(v *View) error {
		fresh = Freshness{Revision: v.Revision()}
		return look(v)
	})
	return fresh, err
}

func (db *DB) confirm(ctx context.Context) error {
	if index, ok := db.ownIndex(); ok {
		if _, reached := db.progress.reached(index); reached {
			return nil
		}
		return db.catchUp(ctx, index)
	}
	ask, cancel := context.WithTimeout(ctx, confirmWait)
	defer cancel()
	var patience time.Duration
	if time.Since(db.lastContact()) < db.patience || time.Since(db.began) < db.patience {
		patience = confirmWait // an election may be about to end
	}
	index, err := db.askLeader(ask, patience)
	if err != nil {
		return err
	}
	return db.catchUp(ctx, index)
}

func (db *DB) catchUp(ctx context.Context, index uint64) error {
	wait, cancel := context.WithTimeout(ctx, catchUpWait)
	defer cancel()
	return db.WaitApplied(wait, index)
}

// ownIndex gives a read index without asking anybody, where the backend can.
func (db *DB) ownIndex() (uint64, bool) {
	b := db.backend.Load()
	if b == nil {
		return 0, false
	}
	own, ok := (*b).(ownIndexer)
	if !ok {
		return 0, false
	}
	index, ok := own.OwnIndex()
	if ok && time.Since(*db.contact.Load()) > time.Second { // its age is given in seconds
		db.heard(time.Now())
	}
	return index, ok
}

// ReadIndex waits until the local state includes everything committed at the
// site before the call; ErrNoLeader when no leader confirms it within 15 s
// (see SetPatience).
func (db *DB) ReadIndex(ctx context.Context) error {
	if _, err := db.attached(); err != nil {
		return err
	}
	index, err := db.askLeader(ctx, db.patience)
	if err != nil {
		return err
	}
	return db.WaitApplied(ctx, index)
}

// askLeader is readIndex that asks again, for as long as patience goes, when
// there is no leader.
func (db *DB) askLeader(ctx context.Context, patience time.Duration) (uint64, error) {
	if index, ok := db.ownIndex(); ok {
		return index, nil
	}
	start := time.Now()
	for {
		index, err := db.readIndex(ctx)
		if !errors.Is(err, ErrNoLeader) || time.Since(start) >= patience || pause(ctx, askAgain) != nil {
			return index, err
		}
	}
}

// lastContact is when a leader was last heard of. A process to which nobody says so has
// heard of one when it began: it cannot know better.
func (db *DB) lastContact() time.Time {
	last := *db.contact.Load()
	if b := db.backend.Load(); b != nil {
		if c, ok := (*b).(contact); ok {
			if t := c.LastContact(); t.After(last) {
				last = t
			}
		}
	}
	if last.IsZero() {
		return db.began
	}
	return last
}

// rounds lets reads share read indexes. A read joins only a round that has not
// started: one that has may have taken its index before what the read must see
// was committed.
type rounds struct {
	mu      sync.Mutex
	next    *round // being joined, not started
	running int
	started time.Time // of the youngest that runs
}

type round struct {
	done  chan struct{}
	index uint64
	err   error
}

// readIndex asks the backend, together with the other reads that wait.
func (db *DB) readIndex(ctx context.Context) (uint64, error) {
	r := db.rounds.join()
	again := time.NewTicker(roundOverlap)
	defer again.Stop()
	for {
		if db.rounds.may() {
			// A round outlives the read that starts it: others have joined.
			go db.runRounds(context.WithoutCancel(ctx))
		}
		select {
		case <-r.done:
			return r.index, r.err
		case <-again.C:
		case <-ctx.Done():
			return 0, errors.Join(ErrNoLeader, ctx.Err())
		}
	}
}

// runRounds runs rounds until nobody waits for one.
func (db *DB) runRounds(ctx context.Context) {
	for r := db.rounds.take(); r != nil; r = db.rounds.take() {
		start := time.Now()
		r.index, r.err = db.askIndex(ctx)
		if r.err == nil {
			db.heard(start)
		}
		close(r.done)
	}
}

func (db *DB) askIndex(ctx context.Context) (uint64, error) {
	b, err := db.attached()
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, roundLimit)
	defer cancel()
	return b.ReadIndex(ctx)
}

func (r *rounds) join() *round {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.next == nil {
		r.next = &round{done: make(chan struct{})}
	}
	return r.next
}

// may reports whether the caller shall start a runner, which counts as running
// from now on.
func (r *rounds) may() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.next == nil || r.running > 0 && time.Since(r.started) < roundOverlap {
		return false
	}
	r.running++
	r.started = time.Now()
	return true
}

// take starts the next round; nil when there is none, and the runner has ended.
func (r *rounds) take() *round {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := r.next
	r.next = nil
	if next == nil {
		r.running--
		return nil
	}
	r.started = time.Now()
	return next
}
