package peers

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
)

// A copy is surplus when the blob's homes are other nodes: one was added, fewer
// replicas are wanted, a drain ended, or a push came in here. This node lets go of
// it when it has been surplus, and read by nobody, for as long as the policy says,
// the placement has not changed meanwhile, and every one of the homes that should
// hold the blob has said that it does, and that by its own reckoning it is to keep
// it.
//
// The last answers are given under the blob's lock, between them and the unlink
// nothing happens, and whoever is asked while it holds that lock itself says no.
// So of any nodes that let go of a blob, the one that began last counted nodes
// which had not begun, and do not after it: as many as are wanted hold the blob at
// every moment, however much the nodes differ over who they are.
const (
	surplusPause = time.Second      // between two pages of a walk
	surplusAgain = time.Minute      // until the next walk, while there is surplus
	surplusIdle  = 30 * time.Minute // and while there is none
	surplusKept  = 1 << 17          // blobs remembered; with more, the rest has its turn later
	releases     = 4                // at once
)

// surplus is what this node holds beyond what it should. It is safe for concurrent
// use.
type surplus struct {
	mu    sync.Mutex
	since map[uint64]time.Time // by mark
	of    layout               // for which since is right
	blobs int                  // of the last walk, less those that went
	bytes int64
}

// read puts the release of a blob off: somebody wants it from here.
func (s *surplus) read(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, known := s.since[mark(d)]; known {
		s.since[mark(d)] = time.Now()
	}
}

// begin forgets everything when the homes of blobs are others than before.
func (s *surplus) begin(l layout) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.since == nil || !s.of.sameHomes(l) {
		s.since, s.of = map[uint64]time.Time{}, l
	}
}

// age is for how long a blob has been surplus and unread.
func (s *surplus) age(d digest.Digest) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, known := s.since[mark(d)]
	switch {
	case known:
		return time.Since(at)
	case len(s.since) < surplusKept:
		s.since[mark(d)] = time.Now()
	}
	return 0
}

// end keeps only what a walk has seen, and its sum.
func (s *surplus) end(seen map[uint64]struct{}, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for m := range s.since {
		if _, still := seen[m]; !still {
			delete(s.since, m)
		}
	}
	s.blobs, s.bytes = len(seen), bytes
}

// gone takes a blob off the sum.
func (s *surplus) gone(d digest.Digest, size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.since, mark(d))
	s.blobs, s.bytes = max(0, s.blobs-1), max(0, s.bytes-size)
}

func (s *surplus) sum() (blobs int, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.blobs, s.bytes
}

// shed walks over what this node holds, again and again, and lets go of what is
// surplus, until ctx ends. A cache has its eviction instead.
func (p *Peers) shed(ctx context.Context) error {
	if p.Cache.On {
		return nil
	}
	var last layout
	var due time.Time
	tick := time.NewTicker(liveInterval)
	defer tick.Stop()
	for {
		l, err := p.currentLayout()
		if err == nil && (!l.sameHomes(last) || !time.Now().Before(due)) {
			last = l
			err = p.shedAll(ctx, l)
			due = time.Now().Add(surplusIdle)
			if n, _ := p.surplus.sum(); n > 0 || err != nil {
				due = time.Now().Add(surplusAgain)
			}
		}
		if err != nil && ctx.Err() == nil {
			p.Log.Warn("what this node holds beyond what it should could not be let go of; trying again", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// shedAll walks once. A node that is drained hands over what it holds, and keeps it
// until it is taken away.
func (p *Peers) shedAll(ctx context.Context, l layout) error {
	p.surplus.begin(l)
	seen, bytes := map[uint64]struct{}{}, int64(0)
	show := func() {
		n, b := p.surplus.sum()
		p.metrics.surplusBlobs.Set(float64(n))
		p.metrics.surplusBytes.Set(float64(b))
	}
	defer show()
	if p.Store.Shared() || l.lonely() || !slices.Contains(l.homes, l.self) {
		p.surplus.end(seen, 0)
		return nil
	}
	for after := digest.Digest(""); ; {
		held, err := p.Store.List(after, repairPage)
		if err != nil {
			return err
		}
		if len(held) == 0 {
			break
		}
		after = held[len(held)-1]
		rows, err := p.rowsOf(held, isLiveState)
		if err != nil {
			return err
		}
		var due []row
		for _, r := range rows {
			if r.Lost != 0 || slices.Contains(l.homesOf(r.digest, r.replicas), l.self) {
				continue
			}
			seen[mark(r.digest)] = struct{}{}
			bytes += r.Size
			if age, after := p.surplus.age(r.digest), p.Policy.release(); after > 0 && age >= after {
				due = append(due, r)
			}
		}
		for _, r := range p.release(ctx, l, due) {
			delete(seen, mark(r.digest))
			bytes -= r.Size
			show()
		}
		pause := time.NewTimer(surplusPause)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return ctx.Err()
		}
		if now, err := p.currentLayout(); err != nil || !now.sameHomes(l) {
			return err // the next walk begins at once
		}
	}
	p.surplus.end(seen, bytes)
	return nil
}

func (y Policy) release() time.Duration {
	if y.Release == nil {
		return 0
	}
	return y.Release()
}

// release lets go of those of up to blobsAsked blobs that all their homes hold and
// keep, and gives them. They are asked for all at once first, then, under its
// lock, for each.
func (p *Peers) release(ctx context.Context, l layout, rows []row) (released []row) {
	asked := map[string][]int{}
	for i, r := range rows {
		for _, id := range l.homesOf(r.digest, r.replicas) {
			asked[id] = append(asked[id], i)
		}
	}
	kept := make([]int, len(rows))
	for id, about := range asked {
		ds := make([]digest.Digest, len(about))
		for i, at := range about {
			ds[i] = rows[at].digest
		}
		answer, err := p.askHave(ctx, id, ds, haveQuestion{Keep: true})
		if err != nil {
			p.Log.Debug("a home did not say what it keeps", "node", id, "err", err)
			continue
		}
		for i, at := range about {
			if answer.Kept.has(i) {
				kept[at]++
			}
		}
	}
	var mu sync.Mutex
	var group errgroup.Group
	group.SetLimit(releases)
	for i, r := range rows {
		if kept[i] < max(1, l.wanted(r.replicas)) || ctx.Err() != nil {
			continue
		}
		group.Go(func() error {
			err := p.Store.RemoveIf(ctx, r.digest, func(ctx context.Context) error { return p.keptByHomes(ctx, r.digest, true) })
			if err != nil {
				p.Log.Debug("a surplus copy stays", "blob", r.digest, "err", err)
				return nil
			}
			p.surplus.gone(r.digest, r.Size)
			p.metrics.released.Inc()
			mu.Lock()
			defer mu.Unlock()
			released = append(released, r)
			return nil
		})
	}
	_ = group.Wait() // what stays is tried again
	if len(released) > 0 {
		p.Log.Info("let go of copies that other nodes keep", "blobs", len(released))
	}
	return released
}

// keptByHomes is nil when as many homes of a blob as have to say, now, that they
// hold it and are to keep it: as many as a push waits for, so that a cache may let
// go of it; all of them when this node may be a home of others (surplus), and is
// none of this one, which must be live. It is called under the blob's lock.
func (p *Peers) keptByHomes(ctx context.Context, d digest.Digest, surplus bool) error {
	if p.pinned != nil && p.pinned(d) {
		return fault.New(fault.Precondition, "blob %s stays: it was prefetched", d)
	}
	var homes []string
	var l layout
	want := 0
	err := p.DB.View(func(v *table.View) (err error) {
		if l, err = p.layout(v); err != nil {
			return err
		}
		n, err := p.replicas(v, d)
		if err != nil {
			return err
		}
		homes, want = l.homesOf(d, n), l.wanted(l.floor)
		if !surplus {
			return nil
		}
		want = l.wanted(n)
		row, ok, err := p.Records.Get(v, d)
		if err == nil && (!ok || row.State != blobs.Live || row.Lost != 0) {
			err = fault.New(fault.Precondition, "blob %s stays: its row does not say that the site keeps it", d)
		}
		return err
	})
	if err != nil {
		return err
	}
	if slices.Contains(homes, l.self) {
		return fault.New(fault.Precondition, "blob %s stays: this node is one of its homes", d)
	}
	var group errgroup.Group
	var holders atomic.Int64
	for _, id := range homes {
		if !l.isLive(id) {
			continue
		}
		group.Go(func() error {
			answer, err := p.askHave(ctx, id, []digest.Digest{d}, haveQuestion{Keep: true})
			if err == nil && answer.Kept.has(0) {
				holders.Add(1)
			}
			return err
		})
	}
	err = group.Wait()
	if want = max(1, want); int(holders.Load()) < want {
		return fault.Wrap(err, fault.Precondition, "blob %s stays: %d of its homes hold it, %d must", d, holders.Load(), want)
	}
	return nil
}
