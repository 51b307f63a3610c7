package scrub

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/transfer"
)

// Kind of a finding.
type Kind string

const (
	// Damaged: the file had other bytes than its digest says, or the disk could
	// not read it.
	Damaged Kind = "damaged"
	// Missing: there was no file.
	Missing Kind = "missing"
)

// State of a finding.
type State string

const (
	// Healed: this node holds the blob again.
	Healed State = "healed"
	// Waiting: the blob could not be fetched yet; it is tried again.
	Waiting State = "waiting"
	// Lost: no node that is up holds the blob. A push mends it, or a node that
	// comes back.
	Lost State = "lost"
)

// Finding is a blob of this node that was not as it should be.
type Finding struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
	Kind   Kind          `json:"kind"`
	State  State         `json:"state"`
	At     time.Time     `json:"at"` // found
	Why    string        `json:"why"`
	// Repositories are some of those that show the blob, with their projects.
	Repositories []string `json:"repositories"`
}

// Bounds of what is remembered: findings, and repositories of each.
const (
	findingsMax     = 1000
	repositoriesMax = 10
)

// check looks at one blob; an error ends the pass for now.
func (s *Scrub) check(ctx context.Context, b row, held int64) error {
	pace := func(ctx context.Context, n int) error {
		s.metrics.bytes.Add(float64(n))
		return s.pacer.wait(ctx, n, s.speed(held))
	}
	if err := s.pacer.wait(ctx, perBlob, s.speed(held)); err != nil {
		return err
	}
	if b.State == blobs.Gone {
		return nil
	}
	info, err := s.Store.Verify(ctx, b.digest, pace)
	switch {
	case err == nil:
		s.metrics.checked.WithLabelValues("whole").Inc()
		s.count(func(p *Pass) { p.Blobs++; p.Bytes += info.Size })
		if b.Lost != 0 {
			return s.Records.Found(ctx, b.digest)
		}
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, blobs.ErrDamaged):
		s.metrics.checked.WithLabelValues("damaged").Inc()
		s.count(func(p *Pass) { p.Blobs++; p.Bytes += b.Size; p.Damaged++ })
		s.found(b.digest, Damaged, err)
		return s.heal(ctx, b, true)
	case fault.Is(err, fault.NotFound):
		return s.absent(ctx, b)
	}
	// Nothing that speaks of this blob; the others are worth looking at.
	s.metrics.checked.WithLabelValues("unknown").Inc()
	s.Log.Warn("a blob could not be checked", "blob", b.digest, "err", err)
	return s.pacer.wait(ctx, slowest, s.speed(held))
}

// absent looks at a blob of which this node has no file. That is as it should be
// for most blobs of a large site; where it is not, the blob is fetched, and only
// what cannot be is a finding: a node that is new, or was away, lacks much that
// repair is about to bring.
func (s *Scrub) absent(ctx context.Context, b row) error {
	belongs, err := s.Peers.Belongs(b.digest)
	if err != nil || !belongs || b.State != blobs.Live {
		return err
	}
	s.metrics.checked.WithLabelValues("missing").Inc()
	s.count(func(p *Pass) { p.Missing++ })
	return s.heal(ctx, b, true)
}

func (s *Scrub) count(change func(*Pass)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.state.Pass)
}

// found remembers a finding and tells of it, once for a blob until it is healed.
func (s *Scrub) found(d digest.Digest, kind Kind, why error) {
	f := Finding{Digest: d, Kind: kind, State: Waiting, At: time.Now().UTC(), Why: why.Error(), Repositories: []string{}}
	err := s.DB.View(func(v *table.View) error {
		b, _, err := s.Records.Get(v, d)
		if err != nil {
			return err
		}
		f.Size = b.Size
		places, err := s.Records.Places(v, d, repositoriesMax)
		for _, p := range places {
			f.Repositories = append(f.Repositories, p.Project+"/"+p.Repository)
		}
		return err
	})
	if err != nil {
		s.Log.Warn("what a damaged blob is part of could not be read", "blob", d, "err", err)
	}
	s.mu.Lock()
	old, known := s.state.Findings[d]
	if known && old.State != Healed {
		s.mu.Unlock()
		return
	}
	s.makeRoom()
	s.state.Findings[d] = f
	s.keep()
	s.mu.Unlock()
	s.measure()
	s.Log.Error("a blob on this node's disk is "+string(kind)+"; it is not served from here any more and fetched from another node",
		"blob", d, "size", f.Size, "repositories", f.Repositories, "err", why)
	s.Found.Publish(f)
}

// makeRoom forgets the oldest finding when there are too many, a healed one if
// there is any. The caller holds s.mu.
func (s *Scrub) makeRoom() {
	if len(s.state.Findings) < findingsMax {
		return
	}
	oldest := slices.MinFunc(sorted(s.state.Findings), func(a, b Finding) int {
		if a.State == Healed != (b.State == Healed) {
			if a.State == Healed {
				return -1
			}
			return 1
		}
		return a.At.Compare(b.At)
	})
	delete(s.state.Findings, oldest.Digest)
}

// settle gives a finding its state and tells of a change. A blob that is healed
// without ever having been reported is no finding.
func (s *Scrub) settle(d digest.Digest, to State, why error) {
	s.mu.Lock()
	f, known := s.state.Findings[d]
	if !known || f.State == to {
		s.mu.Unlock()
		return
	}
	f.State = to
	s.state.Findings[d] = f
	s.keep()
	s.mu.Unlock()
	s.measure()
	switch to {
	case Healed:
		s.metrics.healed.Inc()
		s.Log.Info("a blob that was "+string(f.Kind)+" is held again", "blob", d)
	case Lost:
		s.Log.Error("a blob is lost: no node that is up holds it; bring back the nodes that are down, or push it again",
			"blob", d, "size", f.Size, "repositories", f.Repositories, "err", why)
	}
	s.Found.Publish(f)
}

// heal gets a blob back that this node does not hold: from other nodes, else
// from the file in quarantine, should that be readable after all (reread). An
// error says that the attempt itself was cut short.
func (s *Scrub) heal(ctx context.Context, b row, reread bool) error {
	err := s.Peers.Bring(ctx, b.digest, b.Size)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if reread && errors.Is(err, transfer.ErrNoHolder) {
		if _, again := s.Store.Reclaim(ctx, b.digest, s.mendPace); again == nil {
			err = nil
		} else if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	switch {
	case err == nil:
		s.settle(b.digest, Healed, nil)
		if b.Lost != 0 {
			if err := s.Records.Found(ctx, b.digest); err != nil {
				return err
			}
		}
		return s.Store.Discard(b.digest)
	case errors.Is(err, transfer.ErrNoHolder):
		s.found(b.digest, Missing, err)
		// The mark first: what is reported as lost is not promised to anybody.
		if err := s.Records.MarkLost(ctx, b.digest); err != nil {
			return err
		}
		s.settle(b.digest, Lost, err)
	default:
		s.found(b.digest, Missing, err)
		s.settle(b.digest, Waiting, err)
	}
	return nil
}

// mendPace is how fast a quarantined file is read.
func (s *Scrub) mendPace(ctx context.Context, n int) error {
	var p pacer
	return p.wait(ctx, n, s.rate.Value())
}

// mend looks at suspects as they come and tries again what is not healed.
func (s *Scrub) mend(ctx context.Context) error {
	retry := time.NewTicker(retryEvery)
	defer retry.Stop()
	for {
		var due []digest.Digest
		select {
		case <-ctx.Done():
			return nil
		case d := <-s.suspects:
			due = []digest.Digest{d}
		case <-retry.C:
			due = s.unhealed()
		}
		for _, d := range due {
			if err := s.look(ctx, d); err != nil && ctx.Err() == nil {
				s.Log.Warn("a blob could not be mended now; it is tried again", "blob", d, "err", err)
			}
		}
	}
}

// look mends one blob if it needs to be.
func (s *Scrub) look(ctx context.Context, d digest.Digest) error {
	b, ok, err := s.row(d)
	if err != nil {
		return err
	}
	if !ok { // collected: nothing needs it
		s.forget(d)
		return s.Store.Discard(d)
	}
	_, err = s.Store.Stat(d)
	switch {
	case fault.Is(err, fault.NotFound):
		return s.heal(ctx, b, b.Lost == 0) // of a lost one each pass reads the file again
	case err != nil:
		return err
	}
	s.settle(d, Healed, nil)
	if b.Lost != 0 {
		if err := s.Records.Found(ctx, d); err != nil {
			return err
		}
	}
	return s.Store.Discard(d)
}

func (s *Scrub) unhealed() (due []digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range sorted(s.state.Findings) {
		if f.State != Healed {
			due = append(due, f.Digest)
		}
	}
	return due
}

func (s *Scrub) forget(d digest.Digest) {
	s.mu.Lock()
	delete(s.state.Findings, d)
	s.mu.Unlock()
	s.measure()
}

// tidy frees the space of quarantined blobs that nothing needs.
func (s *Scrub) tidy() error {
	all, err := s.Store.Quarantined()
	if err != nil {
		return err
	}
	for _, d := range all {
		_, wanted, err := s.row(d)
		if err != nil {
			return err
		}
		if _, err := s.Store.Stat(d); wanted && err != nil {
			continue
		}
		if err := s.Store.Discard(d); err != nil {
			return err
		}
	}
	return nil
}

// measure sets the gauges.
func (s *Scrub) measure() {
	s.mu.Lock()
	defer s.mu.Unlock()
	counts := map[State]int{}
	for _, f := range s.state.Findings {
		counts[f.State]++
	}
	for _, state := range []State{Waiting, Lost} {
		s.metrics.open.WithLabelValues(string(state)).Set(float64(counts[state]))
	}
	if last := s.state.Last.Finished; !last.IsZero() {
		s.metrics.finished.Set(float64(last.Unix()))
	}
}
