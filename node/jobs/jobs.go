// Package jobs keeps work that must be done once for the whole site, now, later or
// again and again: a durable queue in rows that every node has. A room registers the
// kind of work that it does; any node that runs the room may get it.
//
// Invariants:
//   - A job that was submitted is done, or says why not, whichever nodes fail: it is
//     a row, and its states are changed under guard.
//   - One node works on a job at a time, as far as nodes can know: the owner counts up
//     a number in the row. Another takes the job over once it has seen the same
//     number for the whole lease, by its own clock that does not jump; an owner
//     that cannot write stops by itself before that. Work may begin again after it
//     was cut anywhere, so kinds are idempotent.
//   - A cancelled job ends, and a failed one is tried again after a pause that doubles,
//     as often as its kind says.
//   - Rows are bounded: payload, progress and log each, and finished jobs are forgotten.
package jobs

import (
	"cmp"
	"context"
	"encoding/json"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/fault"
)

const (
	// lease is how long an owner may be silent, beat how often it says that it works.
	lease = 30 * time.Second
	beat  = 10 * time.Second
	// look is how often a node looks for jobs whose time has come.
	look = time.Second
	// atOnce bounds the jobs that a node works on.
	atOnce = 4
	// pauseLeast is before the first new try, pauseMost the longest.
	pauseLeast = 10 * time.Second
	pauseMost  = time.Hour
	// openMost bounds jobs that are not finished, keepFor and keepMost those that are.
	openMost = 1000
	keepFor  = 30 * 24 * time.Hour
	keepMost = 200
	tidy     = 10 * time.Minute
)

const openIndex = "open"

// Kind of work.
type Kind struct {
	Name string
	// Tries is how often it is tried before it has failed for good; 0: once. A job
	// that is done again and again waits for its next time then.
	Tries int
	// Do does the work. It returns soon after ctx ends, and may be done again. An
	// error that Forever marks is not tried again.
	Do func(ctx context.Context, r *Run) error
}

// forever marks an error that comes again.
type forever struct{ error }

func (f forever) Unwrap() error { return f.error }

// Forever marks an error after which trying again is of no use.
func Forever(err error) error { return forever{err} }

// Config of Jobs. All fields are needed but Clock and Zone.
type Config struct {
	Node string // this node's id
	DB   *table.DB
	Log  *slog.Logger
	// Clock of the wall; time.Now when nil. Zone is that of schedules; UTC when nil.
	Clock func() time.Time
	Zone  func() *time.Location
}

// Jobs is the room. Kinds are registered before Run.
type Jobs struct {
	Config
	rows  *table.Table[row]
	kinds map[string]Kind
	began time.Time

	mu   sync.Mutex
	mine map[string]*Run
	seen map[string]sight // owners at work, as this node sees them
	wake chan struct{}
}

// sight is what was last seen of an owner, and since when.
type sight struct {
	owner string
	beat  uint64
	since time.Duration
}

// New defines the table of jobs.
func New(c Config) *Jobs {
	if c.Clock == nil {
		c.Clock = time.Now
	}
	if c.Zone == nil {
		c.Zone = func() *time.Location { return time.UTC }
	}
	return &Jobs{
		Config: c, kinds: map[string]Kind{}, mine: map[string]*Run{}, seen: map[string]sight{}, began: time.Now(), wake: make(chan struct{}, 1),
		rows: table.Define(c.DB, "job", table.Index[row]{Name: openIndex, Version: 1, Keys: func(_ []string, r row) [][]string {
			if r.State.Final() {
				return nil
			}
			return [][]string{{openIndex}}
		}}),
	}
}

// Register adds a kind of work. A name that is taken is a mistake in the program and
// panics, at start.
func (j *Jobs) Register(k Kind) {
	if _, taken := j.kinds[k.Name]; taken || k.Do == nil {
		panic("jobs: the kind " + k.Name + " is registered twice or does nothing")
	}
	j.kinds[k.Name] = k
}

// Order is a job to be done.
type Order struct {
	Kind    string
	Payload any // as JSON, at most 64 KiB
	By      string
	// At is when it is due; zero: now. With Cron the time follows from that.
	At   time.Time
	Cron string
}

// Submit writes a job down; when it returns the job will be done. fault.Invalid for
// what no node could do, fault.Limit when too many are under way.
func (j *Jobs) Submit(ctx context.Context, o Order) (Job, error) {
	payload, err := json.Marshal(o.Payload)
	if err != nil {
		return Job{}, err
	}
	if _, known := j.kinds[o.Kind]; !known || len(payload) > maxPayload {
		return Job{}, fault.New(fault.Invalid, "a job of the kind %.40q with %d bytes cannot be taken; %d are the most", o.Kind, len(payload), maxPayload)
	}
	now := j.Clock()
	r := row{Kind: o.Kind, Payload: payload, State: Pending, By: o.By, Cron: o.Cron, CreatedAt: now.Unix(), UpdatedAt: now.Unix(), DueAt: now.Unix()}
	switch {
	case o.Cron != "":
		s, err := ParseCron(o.Cron)
		if err != nil {
			return Job{}, fault.New(fault.Invalid, "%v", err)
		}
		next := s.Next(now.In(j.Zone()))
		if next.IsZero() {
			return Job{}, fault.New(fault.Invalid, "the schedule %.60q never comes", o.Cron)
		}
		r.State, r.DueAt = Scheduled, next.Unix()
	case o.At.After(now):
		r.State, r.DueAt = Scheduled, o.At.Unix()
	}
	if open, err := j.open(); err != nil {
		return Job{}, err
	} else if len(open) >= openMost {
		return Job{}, fault.New(fault.Limit, "%d jobs are waiting or under way, as many as a site has; cancel some or wait", len(open))
	}
	id := table.NewID()
	if _, err := j.DB.Update(ctx, func(tx *table.Tx) error { return j.rows.Put(tx, r, id) }); err != nil {
		return Job{}, err
	}
	j.nudge()
	return r.job(id), nil
}

// open are the jobs that are not finished.
func (j *Jobs) open() (all []table.Row[row], err error) {
	err = j.DB.View(func(v *table.View) error {
		for r, err := range j.rows.Lookup(v, openIndex, table.Range{Prefix: []string{openIndex}}) {
			if err == nil {
				all = append(all, r)
			}
		}
		return nil
	})
	return all, err
}

// Get gives one job of a kind; fault.NotFound.
func (j *Jobs) Get(ctx context.Context, kind, id string) (job Job, err error) {
	_, err = j.DB.Confirmed(ctx, func(v *table.View) error {
		r, err := j.find(v, kind, id)
		job = r.job(id)
		return err
	})
	return job, err
}

func (j *Jobs) find(from table.Reader, kind, id string) (row, error) {
	r, _, ok, err := j.rows.Get(from, id)
	if err == nil && (!ok || r.Kind != kind) {
		err = fault.New(fault.NotFound, "there is no %s job %.40q", kind, id)
	}
	return r, err
}

// Live says from local state whether a job is there and was not cancelled.
func (j *Jobs) Live(id string) (live bool, err error) {
	err = j.DB.View(func(v *table.View) error {
		r, _, ok, err := j.rows.Get(v, id)
		live = ok && r.State != Stopped && !r.Cancel
		return err
	})
	return live, err
}

// List gives the jobs of a kind, the newest first, from local state.
func (j *Jobs) List(kind string) (all []Job, err error) {
	all = []Job{}
	err = j.DB.View(func(v *table.View) error {
		for r, err := range j.rows.Scan(v, table.Range{}) {
			if err == nil && r.Value.Kind == kind {
				all = append(all, r.Value.job(r.Key[0]))
			}
		}
		return nil
	})
	slices.SortFunc(all, func(a, b Job) int {
		return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	return all, err
}

// Cancel ends a job of a kind, and one that is done again and again for good. One that
// is finished stays as it is.
func (j *Jobs) Cancel(ctx context.Context, kind, id, by string) (job Job, err error) {
	_, err = j.DB.Update(ctx, func(tx *table.Tx) error {
		r, err := j.find(tx, kind, id)
		if err != nil || r.State.Final() || r.Cancel {
			job = r.job(id)
			return err
		}
		now := j.Clock()
		r.Cancel, r.UpdatedAt = true, now.Unix()
		r.note(line(now, "cancelled by %s", by))
		if r.State != Running {
			r.State, r.Owner = Stopped, ""
		}
		job = r.job(id)
		return j.rows.Put(tx, r, id)
	})
	return job, err
}

func (j *Jobs) nudge() {
	select {
	case j.wake <- struct{}{}:
	default:
	}
}

// pause is how long to wait after so many failures in a row.
func pause(failures int) time.Duration {
	return min(pauseLeast<<min(max(failures-1, 0), 20), pauseMost)
}

// reason is a failure as the row keeps it.
func reason(err error) string {
	text := err.Error()
	if len(text) > 2*maxLine {
		text = text[:2*maxLine] + "..."
	}
	return text
}
