package table_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
)

var errNoBoat = errors.New("no such boat")

// behind is a backend whose leader is ahead of this node: catchUp runs when
// the node asks for the read index.
type behind struct {
	*tabletest.Backend
	catchUp func()
}

func (b *behind) ReadIndex(ctx context.Context) (uint64, error) {
	if f := b.catchUp; f != nil {
		b.catchUp = nil
		f()
	}
	return b.Backend.ReadIndex(ctx)
}

func TestAbortIsConfirmed(t *testing.T) {
	for _, c := range []struct {
		name, changed string
		runs          int
		want          error
	}{
		{"nothing changed", "", 1, errNoBoat},
		{"something else changed", "bob", 1, errNoBoat},
		{"what was read changed", "ada", 2, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			db := tabletest.Open(t)
			boats := table.Define[boat](db, "boat")
			b := &behind{Backend: tabletest.Start(t, db)}
			db.Attach(b)
			if c.changed != "" {
				b.catchUp = func() { put(t, db, boats, boat{}, c.changed) }
			}
			runs := 0
			_, err := db.Update(t.Context(), func(tx *table.Tx) error {
				runs++
				if _, _, ok, err := boats.Get(tx, "ada"); err != nil || !ok {
					return errors.Join(err, errNoBoat)
				}
				return nil
			})
			if !errors.Is(err, c.want) || runs != c.runs {
				t.Errorf("%d runs, %v", runs, err)
			}
		})
	}
}

func TestAbortWithoutLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := tabletest.Open(t)
		boats := table.Define[boat](db, "boat")
		b := tabletest.Start(t, db)
		db.SetPatience(15 * time.Second)
		b.SetLeader(false)
		absent := func(tx *table.Tx) error {
			_, _, _, err := boats.Get(tx, "ada")
			return errors.Join(err, errNoBoat)
		}
		start := time.Now()
		_, err := db.Update(t.Context(), absent)
		if !errors.Is(err, table.ErrNoLeader) || errors.Is(err, errNoBoat) {
			t.Errorf("an absence that nobody confirmed: %v", err)
		}
		if took := time.Since(start); took < 15*time.Second || took > 16*time.Second {
			t.Errorf("gave up after %v", took)
		}
		// What rests on no read needs no leader.
		if _, err := db.Update(t.Context(), func(*table.Tx) error { return errNoBoat }); !errors.Is(err, errNoBoat) {
			t.Error(err)
		}
		// A leader that comes back in time is in time.
		time.AfterFunc(5*time.Second, func() { b.SetLeader(true) })
		if _, err := db.Update(t.Context(), absent); !errors.Is(err, errNoBoat) {
			t.Error(err)
		}
	})
}

// script is a backend that a test answers by hand.
type script struct {
	mu      sync.Mutex
	rounds  int
	index   func(ctx context.Context, round int) (uint64, error)
	propose func(ctx context.Context, txn []byte) (kv.Result, error)
}

func (s *script) ReadIndex(ctx context.Context) (uint64, error) {
	s.mu.Lock()
	s.rounds++
	n := s.rounds
	s.mu.Unlock()
	return s.index(ctx, n)
}

func (s *script) Propose(ctx context.Context, txn []byte) (kv.Result, error) {
	return s.propose(ctx, txn)
}

func TestConfirmedFallsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := tabletest.Open(t)
		tabletest.Start(t, db)
		db.SetPatience(15 * time.Second)
		see := func(*table.View) error { return nil }
		fresh, err := db.Confirmed(t.Context(), see)
		if err != nil || fresh.Stale || fresh.Age != 0 {
			t.Errorf("with a leader: %+v %v", fresh, err)
		}
		db.Attach(&script{index: func(ctx context.Context, _ int) (uint64, error) {
			<-ctx.Done()
			return 0, table.ErrNoLeader
		}})
		<-time.After(10 * time.Second)
		start := time.Now()
		fresh, err = db.Confirmed(t.Context(), see)
		if took := time.Since(start); took != 200*time.Millisecond || err != nil {
			t.Errorf("fell back after %v, %v", took, err)
		}
		if !fresh.Stale || fresh.Age < 10*time.Second || fresh.Age > 11*time.Second {
			t.Errorf("without a leader: %+v", fresh)
		}
		if err := db.ReadIndex(t.Context()); !errors.Is(err, table.ErrNoLeader) {
			t.Errorf("ReadIndex never falls back: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := db.Confirmed(ctx, see); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a caller that is gone: %v", err)
		}
		<-time.After(time.Minute) // until the rounds that hang have ended
		// A backend that says at once that there is no leader.
		local := tabletest.NewBackend(db)
		db.Attach(local)
		local.SetLeader(false)
		start = time.Now()
		fresh, err = db.Confirmed(t.Context(), see)
		if took := time.Since(start); took != 0 || err != nil || !fresh.Stale {
			t.Errorf("after a long time without one: %v %+v %v", took, fresh, err)
		}
		local.SetLeader(true)
		if fresh, err = db.Confirmed(t.Context(), see); err != nil || fresh.Stale {
			t.Errorf("it is back: %+v %v", fresh, err)
		}
		local.SetLeader(false)
		time.AfterFunc(100*time.Millisecond, func() { local.SetLeader(true) })
		if fresh, err = db.Confirmed(t.Context(), see); err != nil || fresh.Stale {
			t.Errorf("a short election: %+v %v", fresh, err)
		}
		synctest.Wait()
	})
}

// An absence that nobody confirmed is looked for again when a leader comes, and one
// that is there but slow counts as that. What is found is given after 200 ms.
func TestSoughtWaitsForALeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := tabletest.Open(t)
		boats := table.Define[boat](db, "boat")
		b := tabletest.Start(t, db)
		db.SetPatience(15 * time.Second)
		put(t, db, boats, boat{}, "ada")
		seek := func(name string) (found bool, took time.Duration, fresh table.Freshness) {
			t.Helper()
			start := time.Now()
			fresh, err := db.Sought(t.Context(), func(v *table.View) (_ bool, err error) {
				_, _, found, err = boats.Get(v, name)
				return found, err
			})
			if err != nil {
				t.Fatal(err)
			}
			return found, time.Since(start), fresh
		}
		b.SetLeader(false)
		if found, took, fresh := seek("ada"); !found || !fresh.Stale || took > 250*time.Millisecond {
			t.Errorf("what is here: %v after %v, %+v", found, took, fresh)
		}
		time.AfterFunc(5*time.Second, func() {
			b.SetLeader(true)
			put(t, db, boats, boat{}, "bob")
		})
		found, took, fresh := seek("bob")
		if !found { // it was asked for between the leader and the row
			synctest.Wait()
			found, _, _ = seek("bob")
		}
		if !found || fresh.Stale || took < 5*time.Second || took > 6*time.Second {
			t.Errorf("what a new leader brings: %v after %v, %+v", found, took, fresh)
		}
		db.Attach(&script{index: func(ctx context.Context, _ int) (uint64, error) {
			<-time.After(time.Second)
			put(t, db, boats, boat{}, "cleo")
			return b.ReadIndex(ctx)
		}, propose: b.Propose})
		if found, took, fresh := seek("cleo"); !found || fresh.Stale || took > 3*time.Second {
			t.Errorf("what a slow leader brings: %v after %v, %+v", found, took, fresh)
		}
		db.Attach(b)
		b.SetLeader(false)
		if found, took, fresh := seek("dora"); found || !fresh.Stale || took < 15*time.Second || took > 16*time.Second {
			t.Errorf("no leader comes: %v after %v, %+v", found, took, fresh)
		}
		if found, took, fresh := seek("dora"); found || !fresh.Stale || took != 0 {
			t.Errorf("none has been there for long: %v after %v, %+v", found, took, fresh)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 0)
		defer cancel()
		if _, err := db.Sought(ctx, func(*table.View) (bool, error) { return false, nil }); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a caller that is gone: %v", err)
		}
		synctest.Wait()
	})
}

// TestReadsJoinOnlyARoundThatHasNotStarted: of many reads during one round,
// none takes that round's answer and all share the next one.
func TestReadsJoinOnlyARoundThatHasNotStarted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := tabletest.Open(t)
		tabletest.Start(t, db)
		s := &script{index: func(context.Context, int) (uint64, error) {
			<-time.After(10 * time.Millisecond)
			return 0, nil
		}}
		db.Attach(s)
		start := time.Now()
		var late atomic.Int64
		var all sync.WaitGroup
		read := func() {
			if err := db.ReadIndex(t.Context()); err != nil {
				t.Error(err)
			}
		}
		all.Go(read)
		synctest.Wait() // the first round runs
		for range 50 {
			all.Go(func() {
				read()
				late.Store(int64(time.Since(start)))
			})
		}
		all.Wait()
		if s.rounds != 2 || time.Duration(late.Load()) != 20*time.Millisecond {
			t.Errorf("%d rounds, the last read after %v", s.rounds, time.Duration(late.Load()))
		}
	})
}

func TestARoundThatHangsHoldsUpOthersForASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := tabletest.Open(t)
		tabletest.Start(t, db)
		db.Attach(&script{index: func(ctx context.Context, round int) (uint64, error) {
			if round == 1 {
				<-ctx.Done()
				return 0, table.ErrNoLeader
			}
			return 0, nil
		}})
		var all sync.WaitGroup
		all.Go(func() {
			if err := db.ReadIndex(t.Context()); !errors.Is(err, table.ErrNoLeader) {
				t.Error(err)
			}
		})
		synctest.Wait()
		start := time.Now()
		if err := db.ReadIndex(t.Context()); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took > 1100*time.Millisecond {
			t.Errorf("took %v", took)
		}
		all.Wait()
	})
}

func TestUnknownOutcomeEndsWithTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := tabletest.Open(t)
		b := tabletest.Start(t, db)
		write := func(tx *table.Tx) error { tx.Append("log", nil); return nil }
		b.DropProposals(1 << 30)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := db.Update(ctx, write); !errors.Is(err, table.ErrUnknownOutcome) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		// Lost first, then no leader: still unknown, and it says so.
		b.DropProposals(0)
		b.LoseReplies(1)
		db.Attach(&script{propose: func(ctx context.Context, txn []byte) (kv.Result, error) {
			r, err := b.Propose(ctx, txn)
			b.SetLeader(false)
			return r, err
		}})
		_, err := db.Update(t.Context(), write)
		if !errors.Is(err, table.ErrUnknownOutcome) || !errors.Is(err, table.ErrNoLeader) {
			t.Errorf("got %v", err)
		}
	})
}

func TestGivesUpAfterManyConflicts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := tabletest.Open(t)
		tabletest.Start(t, db)
		db.Attach(&script{propose: func(context.Context, []byte) (kv.Result, error) {
			return kv.Result{Code: kv.Conflict}, nil
		}})
		runs := 0
		_, err := db.Update(t.Context(), func(tx *table.Tx) error { runs++; tx.Append("log", nil); return nil })
		if !errors.Is(err, table.ErrConflict) || runs < 10 || runs > 100 {
			t.Errorf("%d runs, %v", runs, err)
		}
	})
}

func TestRetriableFailuresSaySo(t *testing.T) {
	for _, err := range []error{table.ErrNoLeader, table.ErrUnknownOutcome, table.ErrConflict} {
		var u interface{ Unavailable() bool }
		if !errors.As(err, &u) || !u.Unavailable() {
			t.Errorf("%v", err)
		}
	}
}

func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := tabletest.Open(t)
		boats := table.Define[boat](db, "boat")
		boathouses := table.Define[boat](db, "boathouse")
		tabletest.Start(t, db)
		ctx, cancel := context.WithCancel(t.Context())
		all, fleet, ada := db.Watch(ctx), db.Watch(ctx, "boat"), db.Watch(ctx, "boat", "ada")
		trips, quota := db.Watch(ctx, "trips"), db.Watch(ctx, "quota")
		next := func(ch <-chan uint64) uint64 {
			select {
			case rev := <-ch:
				return rev
			default:
				return 0
			}
		}
		put(t, db, boathouses, boat{}, "ada") // 1
		put(t, db, boats, boat{}, "bob")      // 2
		if a, f, x := next(all), next(fleet), next(ada); a != 2 || f != 2 || x != 0 {
			t.Errorf("told %d %d %d", a, f, x)
		}
		put(t, db, boats, boat{}, "ada", "deck") // 3
		if f, x := next(fleet), next(ada); f != 3 || x != 3 {
			t.Errorf("told %d %d", f, x)
		}
		if _, err := db.Update(ctx, func(tx *table.Tx) error { // 4
			tx.Append("trips", nil)
			return tx.Add(1, 9, "quota", "acme")
		}); err != nil {
			t.Fatal(err)
		}
		if l, q, f := next(trips), next(quota), next(fleet); l != 4 || q != 4 || f != 0 {
			t.Errorf("told %d %d %d", l, q, f)
		}
		cancel()
		synctest.Wait()
		if _, open := <-ada; open {
			t.Error("the channel is not closed")
		}
		put(t, db, boats, boat{}, "ada")
	})
}

func TestWaitApplied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := tabletest.Open(t)
		boats := table.Define[boat](db, "boat")
		tabletest.Start(t, db)
		done := make(chan error, 1)
		go func() { done <- db.WaitApplied(t.Context(), 2) }()
		put(t, db, boats, boat{}, "a")
		synctest.Wait()
		select {
		case err := <-done:
			t.Fatalf("too early: %v", err)
		default:
		}
		put(t, db, boats, boat{}, "a")
		if err := <-done; err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := db.WaitApplied(ctx, 99); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

func TestCallsBeforeBuild(t *testing.T) {
	db := tabletest.Open(t)
	if _, err := db.Update(t.Context(), func(*table.Tx) error { return nil }); err == nil {
		t.Error("Update works before Build")
	}
	if err := db.ReadIndex(t.Context()); err == nil {
		t.Error("ReadIndex works before Build")
	}
	if _, err := db.Confirmed(t.Context(), nil); err == nil {
		t.Error("Confirmed works before Build")
	}
}
