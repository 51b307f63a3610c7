package prefetch

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"path/filepath"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/atomicfile"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/node/fault"
)

// messageName is by which the leader of a prefetch speaks to a node.
const messageName = "prefetch"

// question has a node say which of some blobs it lacks, after it has fetched and
// pinned them if it should.
type question struct {
	Job     string `json:"job"`
	Blobs   []Blob `json:"blobs"`
	Fetch   bool   `json:"fetch"`
	Expires int64  `json:"expires"` // Unix seconds, of the pins
	Engine  string `json:"engine,omitempty"`
}

type answer struct {
	Missing []Blob `json:"missing"`
	// Cause is why the first of them is.
	Cause string `json:"cause,omitempty"`
}

// maxBlobs bounds the blobs of a question.
const maxBlobs = 20_000

func (w *work) ask(ctx context.Context, n member.Member, blobs []Blob, fetch bool) ([]Blob, error) {
	keep := time.Duration(w.spec.KeepHours) * time.Hour
	if keep == 0 {
		keep = week
	}
	q := question{Job: w.run.ID, Blobs: blobs, Fetch: fetch, Expires: w.progress.Deadline.Add(keep).Unix(), Engine: w.spec.Engine}
	var a answer
	var err error
	if n.ID == w.Nodes.Self() {
		a, err = w.serve(ctx, q)
	} else {
		err = w.Nodes.Ask(ctx, n.ID, messageName, q, &a)
	}
	if err == nil && a.Cause != "" {
		w.run.Logf("node %s: %s", n.Name, a.Cause)
	}
	return a.Missing, err
}

// answer serves the leader.
func (p *Prefetch) answer(ctx context.Context, raw json.RawMessage) (any, error) {
	var q question
	if err := json.Unmarshal(raw, &q); err != nil {
		return nil, err
	}
	if len(q.Blobs) > maxBlobs {
		return nil, fault.New(fault.Invalid, "a prefetch names %d blobs at once; at most %d are taken", len(q.Blobs), maxBlobs)
	}
	for _, b := range q.Blobs {
		if _, err := entry.ParseDigest(b.Digest.String()); err != nil || b.Size < 0 {
			return nil, fault.New(fault.Invalid, "a prefetch names %.80q of %d bytes, which is no blob", b.Digest, b.Size)
		}
	}
	return p.serve(ctx, q)
}

// serve fetches one blob after the other: the class is the least urgent, and each
// comes from as many nodes as have it.
func (p *Prefetch) serve(ctx context.Context, q question) (a answer, err error) {
	a.Missing = []Blob{}
	if q.Fetch {
		// First, so that what is here already stays.
		if err := p.pin(q); err != nil {
			return a, err
		}
	}
	for _, b := range q.Blobs {
		if p.Store.Holds(b.Digest) {
			continue
		}
		if q.Fetch {
			err := p.Store.Bring(ctx, b, q.Engine)
			if err == nil {
				continue
			}
			if ctx.Err() != nil {
				return a, ctx.Err()
			}
			if a.Cause == "" {
				a.Cause = err.Error()
			}
		}
		a.Missing = append(a.Missing, b)
	}
	return a, nil
}

// pins are the blobs that this node keeps, by prefetch.
type pins struct {
	mu    sync.Mutex
	byJob map[string]pinned
	jobs  map[digest.Digest]map[string]bool
}

type pinned struct {
	Expires int64           `json:"expires"`
	Blobs   []digest.Digest `json:"blobs"`
}

const (
	pinsName = "prefetch-pins.json"
	pinsMost = 100_000 // blobs
)

func (p *Prefetch) loadPins() {
	p.pins.byJob, p.pins.jobs = map[string]pinned{}, map[digest.Digest]map[string]bool{}
	err := atomicfile.ReadJSON(filepath.Join(p.Dir, pinsName), &p.pins.byJob)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		p.Log.Warn("which blobs were prefetched cannot be read; the cache may let go of them", "file", pinsName, "err", err)
	}
	for job, one := range p.pins.byJob {
		for _, d := range one.Blobs {
			p.pins.add(d, job)
		}
	}
}

func (s *pins) add(d digest.Digest, job string) {
	if s.jobs[d] == nil {
		s.jobs[d] = map[string]bool{}
	}
	s.jobs[d][job] = true
}

// pin keeps blobs for a prefetch, durably, and forgets the pins that have ended.
func (p *Prefetch) pin(q question) error {
	p.pins.mu.Lock()
	defer p.pins.mu.Unlock()
	p.sweep()
	one := p.pins.byJob[q.Job]
	changed := one.Expires != q.Expires
	one.Expires = q.Expires
	for _, b := range q.Blobs {
		if p.pins.jobs[b.Digest][q.Job] {
			continue
		}
		if len(p.pins.jobs) >= pinsMost {
			return fault.New(fault.Limit, "this node keeps %d prefetched blobs, as many as it can; cancel a prefetch", len(p.pins.jobs))
		}
		one.Blobs, changed = append(one.Blobs, b.Digest), true
		p.pins.add(b.Digest, q.Job)
	}
	p.pins.byJob[q.Job] = one
	if !changed {
		return nil
	}
	return atomicfile.WriteJSON(filepath.Join(p.Dir, pinsName), p.pins.byJob)
}

// sweep forgets the pins of prefetches that have ended; p.pins.mu is held.
func (p *Prefetch) sweep() {
	for job, one := range p.pins.byJob {
		if p.holds(job, one) {
			continue
		}
		for _, d := range one.Blobs {
			if delete(p.pins.jobs[d], job); len(p.pins.jobs[d]) == 0 {
				delete(p.pins.jobs, d)
			}
		}
		delete(p.pins.byJob, job)
	}
}

// holds says whether the pins of a prefetch count: until they expire or it is
// cancelled. When that cannot be told they do.
func (p *Prefetch) holds(job string, one pinned) bool {
	if p.Clock().Unix() >= one.Expires {
		return false
	}
	live, err := p.Jobs.Live(job)
	return live || err != nil
}

// Pinned says whether this node keeps a blob for a prefetch.
func (p *Prefetch) Pinned(d digest.Digest) bool {
	p.pins.mu.Lock()
	defer p.pins.mu.Unlock()
	for job := range p.pins.jobs[d] {
		if p.holds(job, p.pins.byJob[job]) {
			return true
		}
	}
	return false
}
