// Package watch looks at what a node stands on (disk, clock, certificates, the
// other voters), acts where that is safe, and says what is wrong and what to do.
//
// Invariants:
//   - Judging never hangs: what may hang has a goroutine of its own, the disk one
//     and whatever reads the tables another, because their pages are on that disk.
//   - A node with a disk that takes no writes does not lead and refuses writes at
//     once; it goes on serving what it can read, and returns by itself. It does not
//     exit: a process whose disk hangs may not even be able to, its successor would
//     hang while it opens its files, and until then nobody could pull what this one
//     has in memory or passes on from other nodes.
//   - What is shown is what holds now: a condition goes when its cause goes.
package watch

import (
	"context"
	"crypto/x509"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/settings"
)

// Cluster is this node as a member of its site.
type Cluster interface {
	// Status is what this node knows of the site; it takes at most a second.
	Status(ctx context.Context) (member.Status, error)
	// Report says how this node is. It must not block.
	Report(r member.Report)
	// Now is the time by which certificates are judged.
	Now() time.Time
}

// Disk is the file system of the data directory. blobs.FS has it.
type Disk interface {
	OpenFile(name string, flag int) (blobs.Handle, error)
	// Space gives the bytes that may still be written and the size of the disk.
	Space() (free, total int64, err error)
}

// Ballast is space that the metadata gets when the disk is full.
type Ballast interface {
	// Held is how many bytes it has to give.
	Held() int64
	// Fill takes them again if there is plenty; ok says that nothing is missing.
	Fill() (ok bool, err error)
	// Waiting names what cannot be written for want of space.
	Waiting() (what []string, since time.Time)
}

// Certificate is one that will expire.
type Certificate struct {
	Code  string // of the condition
	Of    string // what it is for, as a person calls it
	Leaf  *x509.Certificate
	Renew string // what to do when it expires
	// Within is how long before its end it is spoken of.
	Within time.Duration
	// Public: clients see it; else it is between the nodes.
	Public bool
}

// Config of a Watch. All fields are needed but Further and Clock.
type Config struct {
	Cluster Cluster
	Disk    Disk
	Ballast Ballast
	// LowWater is the free space below which pushes are refused, in bytes.
	LowWater     func() int64
	Certificates func() []Certificate
	// Backup is when the site was last backed up, zero when it never was, and when
	// it was founded, zero when that is not known.
	Backup func() (last, founded time.Time)
	// Further are conditions that other parts of the node have found; it may read the
	// tables. Nil: there are none.
	Further    func() []Condition
	Settings   *settings.Settings
	Log        *slog.Logger
	Registerer prometheus.Registerer
	// Clock of the machine; time.Now when nil.
	Clock func() time.Time
}

// look is how often the node looks.
const look = time.Second

// firstBackup is how old a site may be before it is missed that it was never
// backed up.
const firstBackup = 24 * time.Hour

// lastProbe is how long a node that stops waits for the disk.
const lastProbe = 2 * time.Second

// Watch is the room.
type Watch struct {
	Config
	patience *settings.Setting[int]
	skew     *settings.Setting[int]
	backups  *settings.Setting[int]
	board    board
	disk     watchdog
	jumps    jumps

	mu      sync.Mutex
	refusal error
	site    []Condition // what the last look at the site found
}

// New makes the room, with its settings. It starts nothing.
func New(c Config) (*Watch, error) {
	if c.Clock == nil {
		c.Clock = time.Now
	}
	w := &Watch{
		Config: c,
		patience: settings.Define(c.Settings, settings.Spec[int]{
			Name: "watch.disk-patience", Default: "10", Kind: settings.Count(2, 600),
			Summary: "seconds after which a disk that does not finish a small write counts as hung: the node stops leading and refuses writes until it does",
		}),
		skew: settings.Define(c.Settings, settings.Spec[int]{
			Name: "watch.clock-skew", Default: "5", Kind: settings.Count(1, 3600),
			Summary: "seconds by which clocks of nodes may differ, or jump, before it is shown",
		}),
		backups: settings.Define(c.Settings, settings.Spec[int]{
			Name: "watch.backup-days", Default: "7", Kind: settings.Count(0, 3650),
			Summary: "days after which the last backup is called old, and a day after its founding a site without any; 0: never",
		}),
	}
	w.disk.wake = make(chan struct{}, 1)
	return w, c.register(w)
}

// Run looks until ctx ends.
func (w *Watch) Run(ctx context.Context) error {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		w.probe(ctx)
	}()
	var looking sync.WaitGroup
	looking.Go(func() { w.lookAtSite(ctx) })
	tick := time.NewTicker(look)
	defer tick.Stop()
	for ctx.Err() == nil {
		w.judge(ctx)
		select {
		case <-tick.C:
		case <-w.disk.wake: // the disk answered after all
		case <-ctx.Done():
		}
	}
	looking.Wait()
	// A probe may be inside a call that the kernel does not give back. It touches
	// nothing but its file, so it may end later than the node.
	patience := time.NewTimer(lastProbe)
	defer patience.Stop()
	select {
	case <-ended:
	case <-patience.C:
	}
	return nil
}

// lookAtSite looks at all that is not this node's disk, again and again.
func (w *Watch) lookAtSite(ctx context.Context) {
	tick := time.NewTicker(look)
	defer tick.Stop()
	for ctx.Err() == nil {
		found := expiring(w.Certificates(), w.Cluster.Now())
		found = append(found, wrongClock(w.Clock(), w.Cluster.Now(), w.threshold())...)
		if s, err := w.Cluster.Status(ctx); err == nil {
			found = append(found, shape(s)...)
			found = append(found, skews(s, w.threshold())...)
		} else if ctx.Err() == nil {
			w.Log.Debug("looking at the site", "error", err)
		}
		if w.Further != nil {
			found = append(found, w.Further()...)
		}
		found = append(found, w.lookAtBackup(w.Clock())...)
		w.mu.Lock()
		w.site = found
		w.mu.Unlock()
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// judge puts together what was found, shows it and acts on it.
func (w *Watch) judge(ctx context.Context) {
	now := w.Clock()
	found := w.judgeDisk()
	found = append(found, w.judgeClock(now)...)
	w.mu.Lock()
	found = append(found, w.site...)
	w.mu.Unlock()
	for _, c := range w.board.show(found, now) {
		level := slog.LevelWarn
		if c.gone {
			level = slog.LevelInfo
		}
		w.Log.Log(ctx, level, "condition of this node", "code", c.Code, "over", c.gone, "text", c.Text, "remedy", c.Remedy)
	}
	w.act(found)
}

// act tells the consensus how this node is, and the clients' writes.
func (w *Watch) act(found []Condition) {
	r := member.Report{Codes: []string{}}
	for _, c := range found {
		if c.local {
			r.Codes = append(r.Codes, c.Code)
		}
		if c.fitness > r.Fitness {
			r.Fitness = c.fitness
			if c.fitness == member.Unfit {
				r.Refusal = fault.New(fault.Unavailable, "%s; this node takes no writes until then, and pulls go on. Push through another node, or: %s", c.Text, c.Remedy)
			}
		}
	}
	w.mu.Lock()
	w.refusal = r.Refusal
	w.mu.Unlock()
	w.Cluster.Report(r)
}

// Refusal is why this node takes no writes at the moment; nil while it does.
func (w *Watch) Refusal() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.refusal
}

// Conditions are what is wrong at present, the worst first.
func (w *Watch) Conditions() []Condition { return w.board.list() }

// Advice says each of them in a line.
func (w *Watch) Advice() []string {
	var lines []string
	for _, c := range w.Conditions() {
		if c.advised {
			continue // the cluster's status says the same in its own words
		}
		lines = append(lines, c.Text+": "+c.Remedy)
	}
	return lines
}

func (w *Watch) lookAtBackup(now time.Time) []Condition {
	days := w.backups.Value()
	if days == 0 {
		return nil
	}
	last, founded := w.Backup()
	text := "the last backup is of " + last.UTC().Format(time.DateOnly)
	switch {
	case last.IsZero() && (founded.IsZero() || now.Sub(founded) < firstBackup):
		return nil
	case last.IsZero():
		text = "this site was never backed up"
	case now.Sub(last) < time.Duration(days)*24*time.Hour:
		return nil
	}
	return []Condition{{
		Code: "backup-old", Severity: Warning, Text: text,
		Remedy: "make one with atoll backup -o FILE --blobs --recipient AGE-KEY, or change the setting watch.backup-days",
	}}
}
