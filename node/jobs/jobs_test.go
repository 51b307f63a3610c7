package jobs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/node/fault"
)

// crew is several nodes over one table: the real one takes one room only, so each
// node has a view of its own on the same rows.
type crew struct {
	db   *table.DB
	rows *table.Table[row]

	mu    sync.Mutex
	ahead time.Duration // of the clock on the wall
	began []string      // NODE:ID of each run
}

func newCrew(t *testing.T) (*crew, *Jobs) {
	c := &crew{db: tabletest.Open(t)}
	first := New(Config{Node: "a", DB: c.db, Log: slog.New(slog.DiscardHandler), Clock: c.wall})
	c.rows = first.rows
	tabletest.Start(t, c.db)
	return c, first
}

// another makes a node over the same rows.
func (c *crew) another(first *Jobs, id string) *Jobs {
	j := &Jobs{Config: first.Config, rows: first.rows, kinds: map[string]Kind{}, mine: map[string]*Run{}, seen: map[string]sight{}, began: first.began, wake: make(chan struct{}, 1)}
	j.Node = id
	return j
}

// kind registers work on a node.
func (c *crew) kind(j *Jobs, tries int, do func(ctx context.Context, r *Run) error) {
	j.Register(Kind{Name: "work", Tries: tries, Do: func(ctx context.Context, r *Run) error {
		c.mu.Lock()
		c.began = append(c.began, j.Node)
		c.mu.Unlock()
		return do(ctx, r)
	}})
}

func (c *crew) wall() time.Time { c.mu.Lock(); defer c.mu.Unlock(); return time.Now().Add(c.ahead) }

// jump sets the clock on the wall.
func (c *crew) jump(ahead time.Duration) { c.mu.Lock(); defer c.mu.Unlock(); c.ahead = ahead }

func (c *crew) runs() int { c.mu.Lock(); defer c.mu.Unlock(); return len(c.began) }

func start(t *testing.T, js ...*Jobs) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for _, j := range js {
		all.Go(func() {
			if err := j.Run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	return func() { cancel(); all.Wait() }
}

func submit(t *testing.T, j *Jobs, o Order) Job {
	t.Helper()
	o.Kind = "work"
	job, err := j.Submit(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return job
}

func get(t *testing.T, j *Jobs, id string) Job {
	t.Helper()
	job, err := j.Get(t.Context(), "work", id)
	if err != nil {
		t.Fatal(err)
	}
	return job
}

func pass(d time.Duration) { <-time.After(d) }

func TestAJobIsDoneOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := newCrew(t)
		nodes := []*Jobs{a, c.another(a, "b"), c.another(a, "c")}
		for _, j := range nodes {
			c.kind(j, 1, func(ctx context.Context, r *Run) error {
				var text string
				if err := r.Payload(&text); err != nil {
					return err
				}
				r.Logf("did %s", text)
				r.Tell(map[string]int{"done": 1})
				pass(3 * time.Minute) // longer than the lease
				return nil
			})
		}
		defer start(t, nodes...)()
		var ids []string
		for i := range 3 {
			ids = append(ids, submit(t, a, Order{Payload: fmt.Sprint("thing ", i), By: "ann"}).ID)
		}
		pass(10 * time.Second)
		for _, id := range ids {
			if job := get(t, a, id); job.State != Running || string(job.Progress) != `{"done":1}` || len(job.Log) != 1 {
				t.Errorf("under way: %+v", job)
			}
		}
		pass(4 * time.Minute)
		for _, id := range ids {
			if job := get(t, a, id); job.State != Success || job.Runs != 1 || job.By != "ann" || !strings.Contains(job.Log[0], "did thing") {
				t.Errorf("at the end: %+v", job)
			}
		}
		if n := c.runs(); n != 3 {
			t.Errorf("3 jobs were begun %d times", n)
		}
	})
}

func TestFailuresAreTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := newCrew(t)
		var starts []time.Time
		c.kind(a, 4, func(_ context.Context, r *Run) error {
			starts = append(starts, time.Now())
			if r.Attempt != len(starts) {
				t.Errorf("attempt %d is called %d", len(starts), r.Attempt)
			}
			if r.By == "never" {
				return Forever(errors.New("it makes no sense"))
			}
			return fmt.Errorf("the %dth failure", len(starts))
		})
		defer start(t, a)()
		id := submit(t, a, Order{}).ID
		pass(5 * time.Minute)
		job := get(t, a, id)
		if job.State != Error || len(starts) != 4 || job.Failure != "the 4th failure" || job.Runs != 4 {
			t.Fatalf("%d starts, %+v", len(starts), job)
		}
		for i, want := range []time.Duration{10 * time.Second, 20 * time.Second, 40 * time.Second} {
			if got := starts[i+1].Sub(starts[i]); got < want || got > want+3*time.Second {
				t.Errorf("pause %d: %v, want %v", i, got, want)
			}
		}
		starts = nil
		id = submit(t, a, Order{By: "never"}).ID
		pass(5 * time.Minute)
		if job := get(t, a, id); job.State != Error || len(starts) != 1 {
			t.Errorf("what fails for ever was begun %d times: %+v", len(starts), job)
		}
	})
}

// The job of a node that is silent is taken over, after the lease and not before; one
// that stops in order leaves its job at once.
func TestANodeTakesOver(t *testing.T) {
	for _, crash := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			c, a := newCrew(t)
			b := c.another(a, "b")
			hang := make(chan struct{})
			c.kind(a, 1, func(ctx context.Context, _ *Run) error { <-ctx.Done(); return ctx.Err() })
			c.kind(b, 1, func(context.Context, *Run) error { close(hang); return nil })
			stopA := start(t, a)
			id := submit(t, a, Order{}).ID
			pass(5 * time.Second)
			if crash {
				// Its row stays as a crash leaves it.
				stopA()
				if _, err := c.db.Update(t.Context(), func(tx *table.Tx) error {
					r, _, _, err := c.rows.Get(tx, id)
					if err != nil {
						return err
					}
					r.State, r.Owner = Running, "a"
					return c.rows.Put(tx, r, id)
				}); err != nil {
					t.Fatal(err)
				}
			} else {
				stopA()
			}
			began := time.Now()
			defer start(t, b)()
			<-hang
			took := time.Since(began)
			if crash && (took < lease || took > lease+5*time.Second) || !crash && took > 2*time.Second {
				t.Errorf("crash %v: taken over after %v", crash, took)
			}
			pass(time.Second)
			if job := get(t, b, id); job.State != Success {
				t.Errorf("%+v", job)
			}
		})
	}
}

func TestCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := newCrew(t)
		c.kind(a, 9, func(ctx context.Context, _ *Run) error { <-ctx.Done(); return ctx.Err() })
		defer start(t, a)()
		running, later := submit(t, a, Order{}).ID, submit(t, a, Order{At: time.Now().Add(time.Hour)}).ID
		again := submit(t, a, Order{Cron: "0 3 * * *"}).ID
		pass(5 * time.Second)
		for id, was := range map[string]State{running: Running, later: Scheduled, again: Scheduled} {
			if job := get(t, a, id); job.State != was {
				t.Errorf("before: %+v", job)
			}
			if _, err := a.Cancel(t.Context(), "work", id, "ann"); err != nil {
				t.Error(err)
			}
		}
		pass(2 * time.Second)
		for _, id := range []string{running, later, again} {
			if job := get(t, a, id); job.State != Stopped || !strings.Contains(strings.Join(job.Log, "\n"), "cancelled by ann") {
				t.Errorf("after: %+v", job)
			}
			if live, err := a.Live(id); live || err != nil {
				t.Errorf("a cancelled job is live: %v", err)
			}
		}
		c.jump(48 * time.Hour)
		pass(time.Minute)
		if n := c.runs(); n != 1 {
			t.Errorf("%d runs", n)
		}
		if _, err := a.Cancel(t.Context(), "other", running, ""); !fault.Is(err, fault.NotFound) {
			t.Errorf("a job of another kind: %v", err)
		}
	})
}

// A schedule comes at its time in its zone, also when a run fails, and a clock that was
// in 2038 for a while does not put it off until then.
func TestSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := newCrew(t)
		zone := time.FixedZone("there", 2*3600)
		a.Zone = func() *time.Location { return zone }
		var starts []time.Time
		c.kind(a, 1, func(_ context.Context, _ *Run) error {
			starts = append(starts, c.wall().In(zone))
			if len(starts) == 1 {
				return errors.New("once")
			}
			return nil
		})
		stop := start(t, a)
		id := submit(t, a, Order{Cron: "30 5 * * *"}).ID
		began := time.Now() // midnight in UTC
		at := func(day int) {
			c.jump(time.Duration(day)*24*time.Hour + 3*time.Hour + 29*time.Minute + 30*time.Second - time.Since(began))
		}
		for day := range 3 {
			at(day)
			pass(2 * time.Minute)
		}
		if len(starts) != 3 {
			t.Fatalf("in three days: %v", starts)
		}
		for _, s := range starts {
			if s.Hour() != 5 || s.Minute() != 30 {
				t.Errorf("it began at %v", s)
			}
		}
		if job := get(t, a, id); job.State != Scheduled || job.Runs != 3 || job.LastRun != Success {
			t.Errorf("%+v", job)
		}
		c.jump(30 * 365 * 24 * time.Hour)
		pass(time.Minute)
		starts = nil
		at(5)
		pass(3 * time.Minute)
		stop()
		if len(starts) != 1 {
			t.Errorf("after a clock in the future: %v", starts)
		}
		for _, bad := range []string{"", "@every 1s", "TZ=UTC 0 0 * * *", "1 2 3", "0 0 30 2 *"} {
			if bad != "" {
				if _, err := a.Submit(t.Context(), Order{Kind: "work", Cron: bad}); !fault.Is(err, fault.Invalid) {
					t.Errorf("%q was taken: %v", bad, err)
				}
			}
		}
	})
}

// An owner whose word does not reach the others stops before one of them begins.
func TestASilentOwnerStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := newCrew(t)
		stopped := make(chan time.Duration, 1)
		began := time.Now()
		c.kind(a, 1, func(ctx context.Context, _ *Run) error {
			<-ctx.Done()
			stopped <- time.Since(began)
			return ctx.Err()
		})
		defer start(t, a)()
		id := submit(t, a, Order{}).ID
		pass(3 * time.Second)
		// Another node has taken it over.
		if _, err := c.db.Update(t.Context(), func(tx *table.Tx) error {
			r, _, _, err := c.rows.Get(tx, id)
			if err != nil {
				return err
			}
			r.Owner = "b"
			return c.rows.Put(tx, r, id)
		}); err != nil {
			t.Fatal(err)
		}
		if took := <-stopped; took > lease {
			t.Errorf("it went on for %v", took)
		}
		pass(time.Second)
		if job := get(t, a, id); job.State != Running || job.Node != "b" {
			t.Errorf("it changed another's job: %+v", job)
		}
	})
}

func TestRowsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a := newCrew(t)
		c.kind(a, 1, func(_ context.Context, r *Run) error {
			for i := range 1000 {
				r.Logf("%d %s", i, strings.Repeat("x\n", 1000))
			}
			r.Tell(strings.Repeat("x", 2*maxProgress))
			return errors.New(strings.Repeat("y", 10_000))
		})
		defer start(t, a)()
		id := submit(t, a, Order{}).ID
		pass(5 * time.Second)
		job := get(t, a, id)
		if len(job.Log) != maxLines || len(job.Log[0]) > maxLine+40 || strings.Contains(job.Log[0], "\n") || len(job.Failure) > 3*maxLine || job.Progress != nil {
			t.Errorf("%d lines, the first of %d bytes, a failure of %d bytes", len(job.Log), len(job.Log[0]), len(job.Failure))
		}
		if _, err := a.Submit(t.Context(), Order{Kind: "work", Payload: strings.Repeat("x", maxPayload)}); !fault.Is(err, fault.Invalid) {
			t.Errorf("a large payload: %v", err)
		}
		if _, err := a.Submit(t.Context(), Order{Kind: "other"}); !fault.Is(err, fault.Invalid) {
			t.Errorf("an unknown kind: %v", err)
		}
		c.jump(keepFor + time.Hour)
		pass(2 * tidy)
		if all, err := a.List("work"); err != nil || len(all) != 0 {
			t.Errorf("after a month %d are kept, %v", len(all), err)
		}
	})
}
