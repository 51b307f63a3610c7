package table

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/atoll-registry/atoll/cluster/kv"
)

const (
	// maxTries is how often an Update runs its function.
	maxTries = 40
	// laneAfter is after how many lost tries an Update waits for its turn.
	laneAfter = 3
	// backoffStep and backoffMax bound the pause between two tries.
	backoffStep = time.Millisecond
	backoffMax  = 64 * time.Millisecond
	// lookAgain is from how long a run on the conditions are checked once more before
	// they travel: it has to be more than a processor that others use makes one wait,
	// or busy nodes check all of them.
	lookAgain = 10 * time.Millisecond
)

// Commit says where an Update took effect.
type Commit struct{ Revision uint64 }

// Update runs fn and commits what it wrote, all or nothing. When something
// that fn read changed meanwhile it runs again, so it must have no effect
// outside its Tx.
//
// An error of fn aborts and is returned as it is, once the state that fn
// decided on is confirmed; fn runs again when that state was behind. The same
// holds for an fn that writes nothing.
//
// ErrConflict, ErrTooLarge, ErrOutOfBounds and ErrNoLeader mean that nothing
// was written. ErrUnknownOutcome means that ctx ended, or the leader was gone,
// before the answer came. With any error a Commit other than zero says that
// the change is committed all the same, but not visible here yet.
func (db *DB) Update(ctx context.Context, fn func(*Tx) error) (Commit, error) {
	b, err := db.attached()
	if err != nil {
		return Commit{}, err
	}
	for try := range maxTries {
		if try == laneAfter {
			select {
			case db.lane <- struct{}{}:
				defer func() { <-db.lane }()
			case <-ctx.Done():
				return Commit{}, ctx.Err()
			}
		}
		commit, again, err := db.attempt(ctx, b, fn)
		if !again {
			return commit, err
		}
		if err := pause(ctx, backoff(try)); err != nil {
			return Commit{}, err
		}
	}
	return Commit{}, fmt.Errorf("%w (%d tries)", ErrConflict, maxTries)
}

// attempt runs fn once; again says that it has to run on a newer state.
func (db *DB) attempt(ctx context.Context, b Backend, fn func(*Tx) error) (c Commit, again bool, err error) {
	start := time.Now()
	tx, err := db.run(fn)
	defer db.release(tx)
	if err != nil || len(tx.ops) == 0 {
		return db.decided(ctx, tx, err)
	}
	txn := kv.Txn{ID: kv.NewID(), Base: tx.view.revision, Conds: tx.conds, Ops: tx.ops}
	data, err := txn.Encode()
	if err != nil {
		return Commit{}, false, tooLarge(err)
	}
	// A transaction that is refused costs a log entry on every node; but the state
	// that it rests on has hardly moved when it was made at once.
	if time.Since(start) > lookAgain {
		if ok, err := db.stillHolds(tx); err != nil || !ok {
			return Commit{}, err == nil, err
		}
	}
	result, resent, err := db.propose(ctx, b, data)
	if err != nil {
		return Commit{}, false, err
	}
	return db.settle(ctx, tx, result, resent)
}

func (db *DB) run(fn func(*Tx) error) (*Tx, error) {
	var tx *Tx
	var failed error
	err := db.View(func(v *View) error {
		tx = db.newTx(v)
		failed = fn(tx)
		if failed == nil {
			failed = tx.failed
		}
		return nil
	})
	if err != nil {
		return db.newTx(&View{ended: true}), err
	}
	return tx, failed
}

// decided confirms a decision that needs no commit: the state that it rests on
// must have been the site's.
func (db *DB) decided(ctx context.Context, tx *Tx, failed error) (Commit, bool, error) {
	commit := Commit{Revision: tx.view.revision}
	if failed != nil {
		commit = Commit{}
	}
	if len(tx.conds) == 0 {
		return commit, false, failed // it rests on nothing
	}
	index, err := db.askLeader(ctx, db.patience)
	if err != nil {
		return Commit{}, false, fmt.Errorf("confirm that nothing is to be changed: %w", err)
	}
	if index <= tx.view.revision {
		return commit, false, failed
	}
	if err := db.WaitApplied(ctx, index); err != nil {
		return Commit{}, false, err
	}
	ok, err := db.stillHolds(tx)
	if err != nil {
		return Commit{}, false, err
	}
	return commit, !ok, failed
}

// stillHolds checks the conditions of a Tx on the newest local state.
func (db *DB) stillHolds(tx *Tx) (ok bool, err error) {
	err = db.View(func(v *View) error {
		ok = v.revision == tx.view.revision || kv.Holds(v.state, tx.conds) < 0
		return nil
	})
	return ok, err
}

// propose sends the bytes until the answer is known. resent says that an
// earlier send may have reached a log.
func (db *DB) propose(ctx context.Context, b Backend, data []byte) (r kv.Result, resent bool, err error) {
	for try := 0; ; try++ {
		start := time.Now()
		r, err := b.Propose(ctx, data)
		switch {
		case err == nil:
			db.heard(start)
			return r, resent, nil
		case errors.Is(err, ErrUnknownOutcome):
			resent = true
		case resent:
			// This send came to nothing; an earlier one may not have.
			return kv.Result{}, resent, fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
		default:
			return kv.Result{}, false, err
		}
		if pauseErr := pause(ctx, backoff(try)); pauseErr != nil {
			return kv.Result{}, resent, errors.Join(err, pauseErr)
		}
	}
}

// settle waits until the local state includes the answer and says what it means.
func (db *DB) settle(ctx context.Context, tx *Tx, r kv.Result, resent bool) (Commit, bool, error) {
	if r.Code == kv.TooOld && resent {
		return Commit{}, false, fmt.Errorf("%w: it was sent again too late", ErrUnknownOutcome)
	}
	if err := db.WaitApplied(ctx, r.Rev); err != nil {
		if r.Code == kv.OK {
			return Commit{Revision: r.Rev}, false, fmt.Errorf("committed, but not visible on this node yet: %w", err)
		}
		return Commit{}, false, err
	}
	switch r.Code {
	case kv.OK:
		tx.number(r.Numbers)
		return Commit{Revision: r.Rev}, false, nil
	case kv.Conflict, kv.TooOld:
		return Commit{}, true, nil
	case kv.OutOfBounds:
		if r.At < len(tx.ops) {
			return Commit{}, false, fmt.Errorf("%w: %q", ErrOutOfBounds, readable(tx.ops[r.At].Key))
		}
	}
	return Commit{}, false, fmt.Errorf("a leader answered %v at %d", r.Code, r.At)
}

// backoff gives a random pause that grows with the tries.
func backoff(try int) time.Duration {
	return backoffStep/2 + rand.N(min(backoffStep<<min(try, 10), backoffMax))
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
