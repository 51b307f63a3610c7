// Package prefetch brings images to nodes before anybody asks for them: "these tags
// to these nodes before six". A prefetch is a job (node/jobs) that one node leads; the
// nodes it is for fetch for themselves, with the least urgent class.
//
// Invariants:
//   - A run ends at its deadline at the latest, and then says what is missing where:
//     in the job, as a condition until a later run has brought it, and as an event.
//   - It begins as late as the size and the rates of earlier runs allow, and at a
//     moment of its own before that, so that the runs of many sites do not meet.
//   - What was prefetched is not let go of on its node until it expires or the
//     prefetch is cancelled (pins.go), whatever else the node is short of.
//   - Doing a run again costs nothing but questions: what is held is not moved.
package prefetch

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/node/events"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/jobs"
)

// Kind is the kind of the jobs.
const Kind = "prefetch"

// Blob is what has to be brought.
type Blob struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
}

// Content knows what tags name.
type Content interface {
	// Tags lists the tags of a repository; fault.NotFound when there is none.
	Tags(ctx context.Context, project, repository string) ([]string, error)
	// Blobs gives all that is needed to run what a tag names, for every platform.
	Blobs(ctx context.Context, project, repository, tag string) ([]Blob, error)
}

// Store is what this node holds and can get.
type Store interface {
	Holds(d digest.Digest) bool
	// Bring fetches a blob from other nodes, as prefetch, by the engine that is named or,
	// for "", by the site's.
	Bring(ctx context.Context, b Blob, engine string) error
}

// Nodes are the nodes of the site.
type Nodes interface {
	Self() string
	Live() []member.Member
	// Answer and Ask carry a question by a name from one node to another.
	Answer(name string, answer func(ctx context.Context, question json.RawMessage) (any, error))
	Ask(ctx context.Context, node, name string, question, answer any) error
}

// Config of a Prefetch. All fields are needed but Clock and Zone.
type Config struct {
	Dir     string // where pins are kept
	Jobs    *jobs.Jobs
	Content Content
	Store   Store
	Nodes   Nodes
	Log     *slog.Logger
	Clock   func() time.Time
	Zone    func() *time.Location
}

// Prefetch is the room.
type Prefetch struct {
	Config
	// Missed tells of runs that have not brought everything in time.
	Missed events.Topic[Missing]

	pins pins

	mu      sync.Mutex
	notices []Notice
	looked  time.Time // when they were put together
}

// Missing is what a run had not brought by its deadline.
type Missing struct {
	ID       string         `json:"id"`
	Deadline time.Time      `json:"deadline"`
	Nodes    map[string]int `json:"nodes"` // blobs by node
}

// New makes the room and registers its kind of jobs.
func New(c Config) *Prefetch {
	if c.Clock == nil {
		c.Clock = time.Now
	}
	if c.Zone == nil {
		c.Zone = func() *time.Location { return time.UTC }
	}
	p := &Prefetch{Config: c}
	p.loadPins()
	c.Nodes.Answer(messageName, p.answer)
	c.Jobs.Register(jobs.Kind{Name: Kind, Tries: 5, Do: p.run})
	return p
}

// Spec says what to bring where until when.
type Spec struct {
	Repository string   `json:"repository" required:"true" max:"255"` // project/name
	Tags       []string `json:"tags" required:"true" min:"1" max:"64"`
	// To names nodes, and pairs LABEL=VALUE for all that have one.
	To []string `json:"to" required:"true" min:"1" max:"64"`
	// Before is a time of the day, HH:MM, the next to come, in the site's time zone.
	Before string `json:"before" required:"true" max:"5"`
	// Cron begins it again and again; each run has the next Before as its deadline.
	Cron string `json:"cron,omitempty" max:"100"`
	// KeepHours is for how long what was brought is kept from then on; 0: a week.
	KeepHours int `json:"keep_hours,omitempty" min:"0" max:"8760"`
	// Engine that moves it; when it is not given, that of the setting peers.transfer-engine.
	Engine string `json:"engine,omitempty" enum:"stream,bittorrent"`
}

func (s Spec) check() error {
	project, name, ok := strings.Cut(s.Repository, "/")
	if !ok || project == "" || name == "" {
		return fault.New(fault.Invalid, "%.80q is no repository; write PROJECT/REPOSITORY", s.Repository)
	}
	for _, t := range s.Tags {
		if _, err := path.Match(t, ""); err != nil || t == "" {
			return fault.New(fault.Invalid, "%.80q is no tag nor a pattern of tags such as v1.*", t)
		}
	}
	if _, err := time.Parse("15:04", s.Before); err != nil {
		return fault.New(fault.Invalid, "%.20q is no time of the day; write HH:MM, such as 06:00", s.Before)
	}
	return nil
}

// order is the payload of a job: a prefetch that is done once keeps its deadline,
// whenever a node gets to it.
type order struct {
	Spec
	Until int64 `json:"until,omitempty"` // Unix seconds
}

// deadline is the next time of the day after a moment.
func (s Spec) deadline(now time.Time) time.Time {
	at, _ := time.Parse("15:04", s.Before) // it was checked
	d := time.Date(now.Year(), now.Month(), now.Day(), at.Hour(), at.Minute(), 0, 0, now.Location())
	if !d.After(now) {
		d = time.Date(now.Year(), now.Month(), now.Day()+1, at.Hour(), at.Minute(), 0, 0, now.Location())
	}
	return d
}

// Progress of a run, in its job.
type Progress struct {
	Deadline time.Time `json:"deadline"`
	Start    time.Time `json:"start"` // of moving bytes
	// Nodes by name.
	Nodes map[string]NodeProgress `json:"nodes"`
}

// NodeProgress is how far one node is.
type NodeProgress struct {
	Blobs   int   `json:"blobs"` // that it should hold
	Missing int   `json:"missing"`
	Bytes   int64 `json:"bytes"` // of those missing
	// Rate in bytes per second, of this run or, before it has moved anything, an
	// earlier one; 0: not known.
	Rate  int64  `json:"rate"`
	Cause string `json:"cause,omitempty"` // why it does not go on
}

const (
	// guess is the rate, in bytes per second, before there is a measured one.
	guess = 1 << 20
	// safety is by how much longer than at the measured rate a run may take.
	safety = 2
	// askAgain is after how long a node is asked again that did not answer or lacks
	// something still.
	askAgain = 15 * time.Second
	// batch is how many blobs a node is told of at once.
	batch = 16
	week  = 7 * 24 * time.Hour
)

// Create writes a prefetch down.
func (p *Prefetch) Create(ctx context.Context, s Spec, by string) (jobs.Job, error) {
	if err := s.check(); err != nil {
		return jobs.Job{}, err
	}
	project, name, _ := strings.Cut(s.Repository, "/")
	if _, err := p.Content.Tags(ctx, project, name); err != nil && s.Cron == "" {
		return jobs.Job{}, err
	}
	o := order{Spec: s}
	if s.Cron == "" {
		o.Until = s.deadline(p.Clock().In(p.Zone())).Unix()
	}
	job, err := p.Jobs.Submit(ctx, jobs.Order{Kind: Kind, Payload: o, By: by, Cron: s.Cron})
	if err == nil {
		p.Log.Info("prefetch created", "id", job.ID, "by", by, "repository", s.Repository, "tags", s.Tags, "to", s.To, "before", s.Before, "cron", s.Cron)
	}
	return job, err
}

// work is one run.
type work struct {
	*Prefetch
	spec  Spec
	run   *jobs.Run
	blobs []Blob

	mu       sync.Mutex
	progress Progress
}

// run is the work of a job, on the node that leads it.
func (p *Prefetch) run(ctx context.Context, r *jobs.Run) error {
	w := &work{Prefetch: p, run: r}
	var o order
	if err := r.Payload(&o); err != nil {
		return err
	}
	w.spec = o.Spec
	var last Progress
	r.Last(&last)
	now := p.Clock().In(p.Zone())
	w.progress = Progress{Deadline: w.spec.deadline(now), Nodes: map[string]NodeProgress{}}
	switch {
	case o.Until != 0:
		w.progress.Deadline = time.Unix(o.Until, 0).In(p.Zone())
	case last.Deadline.After(now):
		w.progress.Deadline = last.Deadline // another node began on this run
	}
	var err error
	if w.blobs, err = w.resolve(ctx); err != nil {
		return err
	}
	nodes := p.targets(w.spec.To)
	if len(nodes) == 0 {
		return fmt.Errorf("no node that is up is meant by %s", strings.Join(w.spec.To, ", "))
	}
	for _, n := range nodes {
		w.survey(ctx, n, last.Nodes[n.Name].Rate)
	}
	w.progress.Start = w.start(now, r.ID)
	w.tell()
	r.Logf("%d blobs for %d nodes, from %s, until %s", len(w.blobs), len(nodes), w.progress.Start.Format(time.DateTime), w.progress.Deadline.Format(time.DateTime))
	left := w.progress.Deadline.Sub(now) // measured: the clock on the wall may jump meanwhile
	work, cancel := context.WithTimeout(ctx, left)
	defer cancel()
	if !wait(work, w.progress.Start.Sub(now)) {
		return w.outcome(ctx)
	}
	var all sync.WaitGroup
	for _, n := range nodes {
		all.Go(func() { w.bring(work, n) })
	}
	all.Wait()
	return w.outcome(ctx)
}

// wait says whether the time passed before ctx ended.
func wait(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// resolve lists the blobs of all tags that are meant.
func (w *work) resolve(ctx context.Context) ([]Blob, error) {
	project, name, _ := strings.Cut(w.spec.Repository, "/")
	tags, err := w.Content.Tags(ctx, project, name)
	if err != nil {
		return nil, err
	}
	all := map[digest.Digest]Blob{}
	found := 0
	for _, t := range tags {
		if !slices.ContainsFunc(w.spec.Tags, func(pattern string) bool { ok, _ := path.Match(pattern, t); return ok }) {
			continue
		}
		found++
		blobs, err := w.Content.Blobs(ctx, project, name, t)
		if err != nil {
			return nil, fmt.Errorf("%s:%s: %w", w.spec.Repository, t, err)
		}
		for _, b := range blobs {
			all[b.Digest] = b
		}
	}
	if found == 0 {
		return nil, fmt.Errorf("repository %s has no tag that is meant by %s", w.spec.Repository, strings.Join(w.spec.Tags, ", "))
	}
	list := make([]Blob, 0, len(all))
	for _, b := range all {
		list = append(list, b)
	}
	// The same order on every node: those that fetch at once then trade.
	slices.SortFunc(list, func(a, b Blob) int { return cmp.Compare(a.Digest, b.Digest) })
	return list, nil
}

// targets are the live nodes that are meant.
func (p *Prefetch) targets(to []string) (all []member.Member) {
	for _, m := range p.Nodes.Live() {
		if slices.ContainsFunc(to, func(t string) bool {
			label, value, pair := strings.Cut(t, "=")
			return pair && m.Labels[label] == value || t == m.Name || t == m.ID
		}) {
			all = append(all, m)
		}
	}
	return all
}

// survey finds out what a node lacks.
func (w *work) survey(ctx context.Context, n member.Member, rate int64) {
	np := NodeProgress{Blobs: len(w.blobs), Missing: len(w.blobs), Rate: rate}
	for _, b := range w.blobs {
		np.Bytes += b.Size
	}
	ctx, cancel := context.WithTimeout(ctx, askAgain)
	defer cancel()
	if missing, err := w.ask(ctx, n, w.blobs, false); err == nil {
		np.set(missing)
	}
	w.note(n, np)
}

func (np *NodeProgress) set(missing []Blob) {
	np.Missing, np.Bytes = len(missing), 0
	for _, b := range missing {
		np.Bytes += b.Size
	}
}

// start is when to begin: somewhere between now and the last moment at which the
// slowest node still makes it, by the id of the job.
func (w *work) start(now time.Time, id string) time.Time {
	longest := time.Duration(0)
	for _, np := range w.progress.Nodes {
		rate := cmp.Or(np.Rate, guess)
		longest = max(longest, time.Duration(float64(np.Bytes)/float64(rate)*float64(time.Second)))
	}
	slack := w.progress.Deadline.Sub(now) - safety*longest - time.Minute
	if slack <= 0 {
		return now
	}
	h := fnv.New32a()
	h.Write([]byte(id))
	return now.Add(time.Duration(float64(slack) * float64(h.Sum32()) / (1 << 32)))
}

// bring has a node fetch until it lacks nothing or ctx ends.
func (w *work) bring(ctx context.Context, n member.Member) {
	missing := w.blobs
	for ctx.Err() == nil && len(missing) > 0 {
		var still []Blob
		for part := range slices.Chunk(missing, batch) {
			began, np := time.Now(), w.of(n)
			lacks, err := w.ask(ctx, n, part, true)
			if ctx.Err() != nil {
				return
			}
			np.Cause = ""
			if err != nil {
				np.Cause, lacks = err.Error(), part
			}
			still = append(still, lacks...)
			before := np.Bytes
			np.set(append(still[:len(still):len(still)], missing[min(len(missing), offset(missing, part)):]...))
			if took := time.Since(began).Seconds(); before > np.Bytes && took > 0.1 {
				np.Rate = int64(float64(before-np.Bytes) / took)
			}
			w.note(n, np)
			w.tell()
		}
		missing = still
		if len(missing) > 0 && !wait(ctx, askAgain) {
			return
		}
	}
}

// offset is where in a list what comes after a part of it begins.
func offset(all, part []Blob) int {
	last := part[len(part)-1].Digest
	return 1 + slices.IndexFunc(all, func(b Blob) bool { return b.Digest == last })
}

func (w *work) of(n member.Member) NodeProgress {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.progress.Nodes[cmp.Or(n.Name, n.ID)]
}

func (w *work) note(n member.Member, np NodeProgress) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.progress.Nodes[cmp.Or(n.Name, n.ID)] = np
}

func (w *work) tell() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.run.Tell(w.progress)
}

// outcome ends a run: with an error, an event and a condition when something is
// missing.
func (w *work) outcome(ctx context.Context) error {
	w.tell()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	m := Missing{ID: w.run.ID, Deadline: w.progress.Deadline, Nodes: map[string]int{}}
	for name, np := range w.progress.Nodes {
		if np.Missing > 0 {
			m.Nodes[name] = np.Missing
		}
	}
	if len(m.Nodes) == 0 {
		return nil
	}
	w.Missed.Publish(m)
	return jobs.Forever(errors.New(m.text()))
}

func (m Missing) text() string {
	var parts []string
	for name, n := range m.Nodes {
		parts = append(parts, fmt.Sprintf("%s lacks %d", name, n))
	}
	slices.Sort(parts)
	return fmt.Sprintf("not all was there by %s: blobs: %s", m.Deadline.Format(time.DateTime), strings.Join(parts, ", "))
}

// Notice is something that an operator should know, with what to do.
type Notice struct{ Code, Subject, Text, Remedy string }

// noticed is for how long a run that missed its deadline is spoken of.
const noticed = 24 * time.Hour

// lookEvery is how old notices may be: finding them reads all jobs.
const lookEvery = 15 * time.Second

// Notices are the prefetches whose last run did not bring everything in time.
func (p *Prefetch) Notices() []Notice {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.looked.IsZero() || time.Since(p.looked) >= lookEvery {
		p.notices, p.looked = p.missed(), time.Now()
	}
	return p.notices
}

func (p *Prefetch) missed() (out []Notice) {
	all, err := p.Jobs.List(Kind)
	if err != nil {
		return nil
	}
	for _, j := range all {
		if j.LastRun != jobs.Error || j.State == jobs.Running || p.Clock().Sub(j.UpdatedAt) > noticed {
			continue
		}
		out = append(out, Notice{
			Code: "prefetch-missed", Subject: j.ID,
			Text:   fmt.Sprintf("prefetch %s: %s", j.ID, j.Failure),
			Remedy: "see atoll prefetch show " + j.ID + "; give it more time or a higher cap, or create it again",
		})
	}
	return out
}
