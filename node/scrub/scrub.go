// Package scrub reads every blob that this node holds again and again, slowly,
// and sees to it that what the disk has lost comes back.
//
// Invariants:
//   - A blob that does not pass is out of everybody's sight before it is
//     reported (blobs.Store.Verify).
//   - A blob is called lost only after every node that is up was asked and the
//     damaged file itself was read once more. The mark is in the blob's row, so
//     that every node tells clients the truth: the blob is unknown, push it.
//     Whoever holds the blob after all takes the mark away.
//   - Nothing is ever removed but what is in quarantine and not needed any more.
//   - Scrubbing is background: it reads at a set rate, past the page cache, and
//     goes on where it was after a restart. Losing its state costs one pass.
package scrub

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/events"
	"github.com/atoll-registry/atoll/node/settings"
)

// Peers are the other nodes of the site. Both methods are safe for concurrent
// use.
type Peers interface {
	// Bring makes this node hold a blob durably, from whichever node that is up
	// has it; transfer.ErrNoHolder in the error's chain when none has.
	Bring(ctx context.Context, d digest.Digest, size int64) error
	// Belongs reports whether this node should hold a blob.
	Belongs(d digest.Digest) (bool, error)
}

// Config of a Scrub. All fields are needed.
type Config struct {
	Node       string // this node's id, for reports
	Dir        string // where the state is kept
	DB         *table.DB
	Store      *blobs.Store
	Records    *blobs.Records
	Peers      Peers
	Settings   *settings.Settings
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

const (
	slowest     = 1 << 20 // bytes per second; a small store is read in one go
	page        = 256     // rows that are read at once
	perBlob     = 4 << 10 // bytes that looking at a blob counts for
	saveEvery   = 30 * time.Second
	retryEvery  = time.Minute
	suspectsMax = 256
)

// Scrub is the room.
type Scrub struct {
	Config
	// Found carries what was found wrong, and once more each change of its state.
	Found events.Topic[Finding]

	rate     *settings.Setting[int64]
	days     *settings.Setting[int]
	start    chan struct{}
	suspects chan digest.Digest
	pacer    pacer
	metrics  metrics

	mu    sync.Mutex
	state state
	saved time.Time
}

type metrics struct {
	bytes    prometheus.Counter
	checked  *prometheus.CounterVec
	healed   prometheus.Counter
	open     *prometheus.GaugeVec
	finished prometheus.Gauge
}

// New makes the room, with its settings. It starts nothing.
func New(c Config) (*Scrub, error) {
	s := &Scrub{
		Config: c, start: make(chan struct{}, 1), suspects: make(chan digest.Digest, suspectsMax),
		rate: settings.Define(c.Settings, settings.Spec[int64]{
			Name: "scrub.rate", Default: "10MiB", Kind: settings.Bytes(64<<10, 1<<40, false),
			Summary: "the most bytes a second that a node reads to check its blobs",
		}),
		days: settings.Define(c.Settings, settings.Spec[int]{
			Name: "scrub.days", Default: "7", Kind: settings.Count(0, 365),
			Summary: "days from one check of all blobs to the next; 0 checks only on atoll scrub start",
		}),
		metrics: metrics{
			bytes: prometheus.NewCounter(prometheus.CounterOpts{Name: "atoll_scrub_read_bytes_total", Help: "Bytes of blobs read to check them."}),
			checked: prometheus.NewCounterVec(prometheus.CounterOpts{
				Name: "atoll_scrub_blobs_total", Help: "Blobs checked, by outcome (whole, damaged, missing, unknown)."}, []string{"outcome"}),
			healed: prometheus.NewCounter(prometheus.CounterOpts{Name: "atoll_scrub_healed_total", Help: "Damaged or missing blobs that this node holds again."}),
			open: prometheus.NewGaugeVec(prometheus.GaugeOpts{
				Name: "atoll_scrub_findings", Help: "Damaged or missing blobs of this node that are not mended, by state (waiting, lost)."}, []string{"state"}),
			finished: prometheus.NewGauge(prometheus.GaugeOpts{Name: "atoll_scrub_finished_timestamp_seconds", Help: "When all blobs of this node were last checked; 0 is never."}),
		},
	}
	s.state = s.load()
	m := s.metrics
	for _, collector := range []prometheus.Collector{m.bytes, m.checked, m.healed, m.open, m.finished} {
		if err := c.Registerer.Register(collector); err != nil {
			return nil, fmt.Errorf("scrub: %w", err)
		}
	}
	s.measure()
	return s, nil
}

// Run checks blobs and mends what it finds until ctx ends.
func (s *Scrub) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.scrub(ctx) })
	group.Go(func() error { return s.mend(ctx) })
	err := group.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return errors.Join(err, s.save())
}

// Start begins a pass over all blobs at the full rate, or brings the one that is
// under way to it.
func (s *Scrub) Start() {
	s.mu.Lock()
	s.state.Asked = true
	s.mu.Unlock()
	select {
	case s.start <- struct{}{}:
	default: // it is about to begin
	}
}

// Unreadable is told by whoever met a broken disk in the file that OpenBlob gave:
// the blob is quarantined at once and mended soon.
func (s *Scrub) Unreadable(d digest.Digest, f blobs.File, cause error) {
	if err := s.Store.Quarantine(d, f); err != nil {
		s.Log.Error("a blob that cannot be read could not be put aside", "blob", d, "err", err)
	}
	s.found(d, Damaged, cause)
	s.Suspect(d)
}

// Suspect has a blob looked at soon that this node was asked for and could not
// give.
func (s *Scrub) Suspect(d digest.Digest) {
	select {
	case s.suspects <- d:
	default: // the next pass finds it
	}
}

// scrub makes pass after pass.
func (s *Scrub) scrub(ctx context.Context) error {
	for ctx.Err() == nil {
		if s.underWay() || s.due() <= 0 {
			if err := s.pass(ctx); err != nil && ctx.Err() == nil {
				s.Log.Warn("checking the blobs was interrupted; it goes on soon", "err", err)
				s.await(ctx, retryEvery)
			}
			continue
		}
		s.await(ctx, min(s.due(), time.Hour)) // the setting may change meanwhile
	}
	return nil
}

// await waits for a time or for Start.
func (s *Scrub) await(ctx context.Context, wait time.Duration) {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-s.start:
	}
}

func (s *Scrub) underWay() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.state.Pass.Started.IsZero() || s.state.Asked
}

// due is how long the next pass has time.
func (s *Scrub) due() time.Duration {
	days := time.Duration(s.days.Value()) * 24 * time.Hour
	if days == 0 {
		return time.Hour
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Until(s.state.Last.Started.Add(days))
}

// pass checks all blobs, from where the last pass was left.
func (s *Scrub) pass(ctx context.Context) error {
	use, err := s.Store.Usage(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	if s.state.Pass.Started.IsZero() {
		s.state.Pass = Pass{Started: time.Now()}
	}
	after := s.state.Pass.After
	s.mu.Unlock()
	for {
		rows, err := s.rows(after)
		if err != nil {
			return err
		}
		for _, b := range rows {
			if err := s.check(ctx, b, use.Bytes); err != nil {
				return err
			}
			s.advance(b.digest)
		}
		if len(rows) < page {
			break
		}
		after = rows[len(rows)-1].digest
	}
	if err := s.tidy(); err != nil {
		return err
	}
	s.finish()
	return nil
}

type row struct {
	digest digest.Digest
	blobs.Blob
}

func (s *Scrub) rows(after digest.Digest) (rows []row, err error) {
	err = s.DB.View(func(v *table.View) error {
		for r, err := range s.Records.Scan(v, after, page) {
			if err != nil {
				return err
			}
			rows = append(rows, row{digest.Digest(r.Key[0]), r.Value})
		}
		return nil
	})
	return rows, err
}

func (s *Scrub) row(d digest.Digest) (b row, ok bool, err error) {
	b.digest = d
	err = s.DB.View(func(v *table.View) (err error) {
		b.Blob, ok, err = s.Records.Get(v, d)
		return err
	})
	return b, ok && b.State != blobs.Gone, err
}

// finish ends a pass.
func (s *Scrub) finish() {
	s.mu.Lock()
	defer s.mu.Unlock()
	pass := s.state.Pass
	pass.Finished, pass.After = time.Now(), ""
	s.state.Last, s.state.Pass, s.state.Asked = pass, Pass{}, false
	s.metrics.finished.Set(float64(pass.Finished.Unix()))
	s.Log.Info("all blobs were checked", "blobs", pass.Blobs, "bytes", pass.Bytes, "damaged", pass.Damaged, "missing", pass.Missing)
	s.keep()
}

// advance notes how far the pass has come.
func (s *Scrub) advance(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state.Pass.After = d
	if time.Since(s.saved) >= saveEvery {
		s.keep()
	}
}
