package jobs

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/cluster/table"
)

// Run is one job being worked on. Safe for concurrent use.
type Run struct {
	ID      string
	Attempt int // 1 for the first
	By      string
	payload []byte
	last    []byte // progress of the run before
	now     func() time.Time
	cancel  context.CancelCauseFunc

	mu       sync.Mutex
	lines    []string
	progress []byte
	dirty    bool
}

// Payload reads what the job is about.
func (r *Run) Payload(into any) error {
	if err := json.Unmarshal(r.payload, into); err != nil {
		return Forever(err)
	}
	return nil
}

// Last reads the progress that an earlier run of the job told last; false when none.
func (r *Run) Last(into any) bool { return len(r.last) > 0 && json.Unmarshal(r.last, into) == nil }

// Logf adds a line to the job's log, which keeps the newest.
func (r *Run) Logf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines, r.dirty = append(r.lines, line(r.now(), format, args...)), true
	if n := len(r.lines); n > maxLines {
		r.lines = r.lines[n-maxLines:]
	}
}

// Tell says how far the job is, as JSON of at most 64 KiB; more is not kept. It
// reaches the others within seconds.
func (r *Run) Tell(progress any) {
	b, err := json.Marshal(progress)
	if err != nil || len(b) > maxProgress {
		return // a job never fails for what it tells
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.progress, r.dirty = b, true
}

// news moves what is to be told into a row.
func (r *Run) news(into *row) {
	r.mu.Lock()
	defer r.mu.Unlock()
	into.note(r.lines...)
	if r.progress != nil {
		into.Progress = slices.Clone(r.progress)
	}
}

// told forgets the lines that have been written down.
func (r *Run) told(lines int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = r.lines[min(lines, len(r.lines)):]
	r.dirty = len(r.lines) > 0
}

func (r *Run) pending() (lines int, dirty bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.lines), r.dirty
}

// Why the context of a run ends.
var (
	errCancelled = errors.New("the job was cancelled")
	errLost      = errors.New("this node could not say in time that it works on the job; another may do it")
	errStopping  = errors.New("this node stops")
)

// Run works on jobs until ctx ends; what is under way then is left to other nodes.
func (j *Jobs) Run(ctx context.Context) error {
	changes := j.DB.Watch(ctx, "job")
	tick := time.NewTicker(look)
	defer tick.Stop()
	var working sync.WaitGroup
	tidied := time.Duration(0)
	for ctx.Err() == nil {
		if now := time.Since(j.began); tidied == 0 || now-tidied > tidy {
			j.tidy(ctx)
			tidied = max(now, 1)
		}
		j.choose(ctx, &working)
		select {
		case <-ctx.Done():
		case <-tick.C:
		case <-j.wake:
		case _, more := <-changes:
			if !more {
				changes = nil
			}
		}
	}
	working.Wait()
	return nil
}

// choose claims jobs that are due, and passes on to the runs of this node what has
// become of theirs.
func (j *Jobs) choose(ctx context.Context, working *sync.WaitGroup) {
	open, err := j.open()
	if err != nil {
		j.Log.Warn("the jobs could not be read; trying again", "err", err)
		return
	}
	now := time.Since(j.began)
	here := map[string]bool{}
	for _, o := range open {
		id, r := o.Key[0], o.Value
		here[id] = true
		j.mu.Lock()
		own := j.mine[id]
		full := len(j.mine) >= atOnce
		j.mu.Unlock()
		if own != nil {
			if r.Cancel {
				own.cancel(errCancelled)
			}
			continue
		}
		if _, can := j.kinds[r.Kind]; !can || full || !j.due(ctx, id, r, now) {
			continue
		}
		if run, ok := j.claim(ctx, id, o.Meta.Revision); ok {
			j.begin(ctx, run, working)
		}
	}
	for id := range j.seen {
		if !here[id] {
			delete(j.seen, id)
		}
	}
}

// due says whether this node should take a job: its time has come, or its owner has
// been silent for the lease.
func (j *Jobs) due(ctx context.Context, id string, r row, now time.Duration) bool {
	wall := j.Clock()
	if r.State != Running {
		delete(j.seen, id)
		if r.Cron != "" && r.Attempt == 0 {
			// A clock that was wrong may have put the time far away.
			if s, err := ParseCron(r.Cron); err == nil {
				if next := s.Next(wall.In(j.Zone())).Unix(); next < r.DueAt {
					return j.again(ctx, id, r, next)
				}
			}
		}
		return r.DueAt <= wall.Unix()
	}
	s, known := j.seen[id]
	if !known || s.owner != r.Owner || s.beat != r.Beat {
		j.seen[id] = sight{r.Owner, r.Beat, now}
		return false
	}
	return now-s.since > lease
}

// again leaves a job to its new time; it is not due.
func (j *Jobs) again(ctx context.Context, id string, r row, next int64) bool {
	_, err := j.DB.Update(ctx, func(tx *table.Tx) error {
		now, err := j.find(tx, r.Kind, id)
		if err != nil || now.State != Scheduled || now.DueAt != r.DueAt {
			return err
		}
		now.DueAt = next
		return j.rows.Put(tx, now, id)
	})
	if err != nil {
		j.Log.Debug("a schedule could not be put right", "job", id, "err", err)
	}
	return false
}

// claim makes this node the owner of a job that is as it was seen.
func (j *Jobs) claim(ctx context.Context, id string, revision uint64) (*Run, bool) {
	var run *Run
	_, err := j.DB.Update(ctx, func(tx *table.Tx) error {
		run = nil
		r, meta, ok, err := j.rows.Get(tx, id)
		if err != nil || !ok || meta.Revision != revision {
			return err
		}
		now := j.Clock()
		if r.State == Running {
			r.note(line(now, "node %s is silent; node %s takes over", r.Owner, j.Node))
		}
		if r.Cancel {
			r.State, r.Owner, r.UpdatedAt = Stopped, "", now.Unix()
			return j.rows.Put(tx, r, id)
		}
		r.State, r.Owner, r.UpdatedAt = Running, j.Node, now.Unix()
		r.Beat++
		run = &Run{ID: id, Attempt: r.Attempt + 1, By: r.By, payload: r.Payload, last: r.Progress, now: j.Clock}
		return j.rows.Put(tx, r, id)
	})
	if err != nil && ctx.Err() == nil {
		j.Log.Debug("a job could not be claimed", "job", id, "err", err)
	}
	return run, err == nil && run != nil
}

// begin works on a claimed job in goroutines of its own.
func (j *Jobs) begin(ctx context.Context, run *Run, working *sync.WaitGroup) {
	work, cancel := context.WithCancelCause(ctx)
	run.cancel = cancel
	j.mu.Lock()
	j.mine[run.ID] = run
	j.mu.Unlock()
	working.Go(func() {
		ended := make(chan error, 1)
		go func() { ended <- j.do(work, run) }()
		err := j.attend(ctx, run, ended)
		cancel(nil)
		if ctx.Err() != nil {
			err = errStopping
		} else if cause := context.Cause(work); err != nil && (errors.Is(cause, errCancelled) || errors.Is(cause, errLost)) {
			err = cause
		}
		j.end(ctx, run, err)
		j.mu.Lock()
		delete(j.mine, run.ID)
		j.mu.Unlock()
		j.nudge()
	})
}

// do is the kind's work.
func (j *Jobs) do(ctx context.Context, run *Run) error {
	kind := ""
	err := j.DB.View(func(v *table.View) error {
		r, _, _, err := j.rows.Get(v, run.ID)
		kind = r.Kind
		return err
	})
	if err != nil {
		return err
	}
	return j.kinds[kind].Do(ctx, run)
}

// attend says now and then that this node works on a job, and what it tells, until the
// work has ended. A node that cannot say so stops working before another begins.
func (j *Jobs) attend(ctx context.Context, run *Run, ended <-chan error) error {
	tick := time.NewTicker(beat / 5)
	defer tick.Stop()
	heard := time.Since(j.began)
	for {
		select {
		case err := <-ended:
			return err
		case <-tick.C:
		}
		now := time.Since(j.began)
		if _, dirty := run.pending(); !dirty && now-heard < beat {
			continue
		}
		said, cancel := context.WithTimeout(ctx, beat/2)
		lost, err := j.say(said, run)
		cancel()
		switch {
		case err == nil && !lost:
			heard = now
		case lost, now-heard > lease-beat:
			run.cancel(errLost)
			return errors.Join(errLost, <-ended)
		}
	}
}

// say writes down that this node works on a job; lost: it is another's by now.
func (j *Jobs) say(ctx context.Context, run *Run) (lost bool, err error) {
	lines := 0
	_, err = j.DB.Update(ctx, func(tx *table.Tx) error {
		r, _, ok, err := j.rows.Get(tx, run.ID)
		if lost = err == nil && (!ok || r.State != Running || r.Owner != j.Node); err != nil || lost {
			return err
		}
		lines, _ = run.pending()
		run.news(&r)
		r.Beat++
		r.UpdatedAt = j.Clock().Unix()
		return j.rows.Put(tx, r, run.ID)
	})
	if err == nil && !lost {
		run.told(lines)
	}
	return lost, err
}

// endPatience bounds how long a node that stops tries to give its jobs back.
const endPatience = 2 * time.Second

// end writes down how a run has ended, and when the job is next due if it is.
func (j *Jobs) end(ctx context.Context, run *Run, failure error) {
	if errors.Is(failure, errLost) {
		return // it is not this node's to say
	}
	patience := lease
	if errors.Is(failure, errStopping) {
		patience = endPatience
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	_, err := j.DB.Update(ctx, func(tx *table.Tx) error {
		r, _, ok, err := j.rows.Get(tx, run.ID)
		if err != nil || !ok || r.State != Running || r.Owner != j.Node {
			return err
		}
		run.news(&r)
		j.settle(&r, failure)
		return j.rows.Put(tx, r, run.ID)
	})
	if err != nil {
		j.Log.Warn("how a job ended could not be written down; a node does it again", "job", run.ID, "err", err)
	}
}

// settle is what becomes of a job after a run.
func (j *Jobs) settle(r *row, failure error) {
	now := j.Clock()
	r.UpdatedAt, r.Owner = now.Unix(), ""
	if errors.Is(failure, errStopping) {
		r.State, r.DueAt = Pending, now.Unix()
		r.note(line(now, "the node stops; another goes on"))
		return
	}
	r.Runs++
	r.Failure = ""
	if failure != nil {
		r.Failure = reason(failure)
		r.note(line(now, "%v", failure))
	}
	cause := errors.Is(failure, errCancelled) || r.Cancel
	final := forever{}
	switch {
	case cause:
		r.State, r.LastRun = Stopped, Stopped
		return
	case failure == nil:
		r.LastRun, r.Attempt = Success, 0
	case !errors.As(failure, &final) && r.Attempt+1 < j.kinds[r.Kind].Tries:
		r.Attempt++
		r.State, r.LastRun, r.DueAt = Scheduled, Error, now.Add(pause(r.Attempt)).Unix()
		return
	default:
		r.LastRun, r.Attempt = Error, 0
	}
	r.State = r.LastRun
	if r.Cron == "" {
		return
	}
	if s, err := ParseCron(r.Cron); err == nil {
		if next := s.Next(now.In(j.Zone())); !next.IsZero() {
			r.State, r.DueAt = Scheduled, next.Unix()
		}
	}
}

// tidy forgets finished jobs that are old or too many.
func (j *Jobs) tidy(ctx context.Context) {
	type done struct {
		id string
		at int64
	}
	var all []done
	err := j.DB.View(func(v *table.View) error {
		for r, err := range j.rows.Scan(v, table.Range{}) {
			if err == nil && r.Value.State.Final() {
				all = append(all, done{r.Key[0], r.Value.UpdatedAt})
			}
		}
		return nil
	})
	if err != nil {
		return // the next time
	}
	slices.SortFunc(all, func(a, b done) int { return int(b.at - a.at) })
	old := j.Clock().Add(-keepFor).Unix()
	for i, d := range all {
		if ctx.Err() != nil || i < keepMost && d.at > old {
			continue
		}
		if _, err := j.DB.Update(ctx, func(tx *table.Tx) error {
			r, _, ok, err := j.rows.Get(tx, d.id)
			if err != nil || !ok || !r.State.Final() {
				return err
			}
			return j.rows.Delete(tx, d.id)
		}); err != nil {
			return
		}
	}
}
