package peers

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/transfer"
)

// A pass over the blob rows that have changed follows repairSettle after the last
// change, so that a push is not in its own way. A pass over all rows follows when a
// node has come or gone, which changes no blob row, and after repairInterval in
// any case, or later when there are so many rows that it would take more than a
// twentieth of a processor. What could not be repaired is tried again after
// repairSettle, then twice as long, up to repairInterval, or later likewise.
const (
	repairSettle   = 2 * time.Second
	repairInterval = time.Minute
	repairPage     = 256
	repairRow      = 200 * time.Microsecond // 20 times what a look at a row costs
	liveInterval   = time.Second            // between two looks at who is live
)

// schedule says when repair looks at what.
type schedule struct {
	since   uint64        // revision up to which rows were looked at
	backoff time.Duration // until the next full pass, should this one fail
	full    time.Time     // when the next full pass is due
}

// plan takes the result of a pass into account.
func (s *schedule) plan(pass result, now time.Time) {
	s.since = pass.revision
	dear := time.Duration(pass.looked) * repairRow
	next := now.Add(max(repairInterval, dear))
	switch {
	case pass.failed > 0:
		next = now.Add(max(s.backoff, dear))
		s.backoff = min(2*s.backoff, repairInterval)
	case pass.full:
		s.backoff = repairSettle
	}
	if pass.full || next.Before(s.full) {
		s.full = next
	}
}

// repair brings this node to what the placement wants of it, again and again.
func (p *Peers) repair(ctx context.Context) error {
	changed := p.DB.Watch(ctx, blobs.BlobTable)
	s := schedule{backoff: repairSettle}
	for ctx.Err() == nil {
		live := p.liveIDs()
		from := s.since
		if !time.Now().Before(s.full) {
			from = 0
		}
		pass := p.repairPass(ctx, from)
		p.noteRepair(pass)
		s.plan(pass, time.Now())
		if p.awaitRepair(ctx, changed, live, time.Until(s.full)) {
			s.full, s.backoff = time.Time{}, repairSettle
		}
	}
	return nil
}

// awaitRepair waits until there is something to do; moved says that other nodes
// are live than those given.
func (p *Peers) awaitRepair(ctx context.Context, changed <-chan uint64, live []string, wait time.Duration) (moved bool) {
	due, look := time.NewTimer(wait), time.NewTicker(liveInterval)
	defer due.Stop()
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-due.C:
			return false
		case <-changed:
			changed = nil // one is enough
			due.Reset(min(wait, repairSettle))
		case <-look.C:
			if !slices.Equal(live, p.liveIDs()) {
				return true
			}
		}
	}
}

// result of a pass.
type result struct {
	full     bool   // over all rows
	alone    bool   // no other node was live: nothing could be done
	revision uint64 // of the state that was looked at
	failed   int    // blobs for which something could not be done
	example  error  // why, for one of them
	looked   int    // rows that were read
}

// repairPass walks over the rows of live blobs that have changed after a revision,
// over all when it is 0.
func (p *Peers) repairPass(ctx context.Context, since uint64) result {
	r := result{full: since == 0, revision: since}
	if err := p.repairRows(ctx, since, &r); err != nil {
		r.failed, r.example = r.failed+1, err
	}
	if ctx.Err() != nil {
		r.failed = 0 // not for want of anything
	}
	return r
}

func (p *Peers) repairRows(ctx context.Context, since uint64, r *result) error {
	view, err := p.look()
	if err != nil {
		return err
	}
	r.revision = view.revision
	p.metrics.underReplicated.Set(float64(view.lacking))
	var mu sync.Mutex
	for after := digest.Digest(""); ctx.Err() == nil; {
		rows, err := p.page(since, after)
		if err != nil {
			return err
		}
		r.looked += len(rows)
		view.live = p.liveIDs()
		if len(view.live) < 2 {
			r.alone = true
			break
		}
		var group errgroup.Group
		group.SetLimit(copiesAtOnce)
		for _, b := range rows {
			if b.State != blobs.Live {
				continue // on its way out: whoever wants it revives it
			}
			group.Go(func() error {
				if err := p.repairBlob(ctx, b, view); err != nil {
					mu.Lock()
					defer mu.Unlock()
					r.failed++
					r.example = fmt.Errorf("blob %s: %w", b.digest, err)
				}
				return nil
			})
		}
		_ = group.Wait() // failures are in r
		if len(rows) < repairPage {
			break
		}
		after = rows[len(rows)-1].digest
	}
	return nil
}

// noteRepair logs when repair begins to fail, fails for more blobs, or has caught
// up; not once more for each pass over the same missing blob.
func (p *Peers) noteRepair(r result) {
	switch {
	case r.alone:
	case r.failed > p.unrepaired:
		p.Log.Warn("blobs lack copies that cannot be made now; they are made when nodes that hold them are up", "blobs", r.failed, "err", r.example)
		p.unrepaired = r.failed
	case r.full && r.failed == 0 && p.unrepaired > 0:
		p.Log.Info("repair has caught up", "blobs", p.unrepaired)
		p.unrepaired = 0
	case r.full:
		p.unrepaired = r.failed
	}
}

// repairBlob fetches one blob when this node should hold it and does not, commits
// its piece root and sees to its copies when that falls to this node: to the live
// one that comes first in the blob's placement.
func (p *Peers) repairBlob(ctx context.Context, b row, view overview) error {
	self := p.Roster.Self()
	first := placement(b.digest, view.live)[0] == self
	lacking := b.Copies < Durability
	home := slices.Contains(homes(b.digest, view.members, replicas), self) || first && lacking
	if _, err := p.Store.Stat(b.digest); err != nil {
		if !home {
			return nil
		}
		if err := p.obtain(ctx, heldBlob{b.digest, b.Size}); err != nil {
			return err
		}
	}
	if b.Lost != 0 {
		if err := p.Records.Found(ctx, b.digest); err != nil {
			return err
		}
	}
	if !first {
		return nil
	}
	// What all nodes read from one storage does not travel between them.
	if b.Root == nil && b.Size > transfer.PieceSize && !p.Store.Shelved(b.digest) {
		if err := p.commitRoot(ctx, b.digest); err != nil {
			return err
		}
	}
	if lacking {
		return p.recount(ctx, b)
	}
	return nil
}

// recount has a blob copied whose row says that it lacks copies, and writes down
// how many there are.
func (p *Peers) recount(ctx context.Context, b row) error {
	copies, err := p.Ensure(ctx, []digest.Digest{b.digest})
	if err != nil {
		return err
	}
	if copies <= b.Copies {
		return fmt.Errorf("no other node could take a copy")
	}
	_, err = p.DB.Update(ctx, func(tx *table.Tx) error {
		return p.Records.SetCopies(tx, b.digest, copies)
	})
	return err
}

// liveIDs are the ids of the live nodes in their order.
func (p *Peers) liveIDs() []string { return ids(p.Roster.Live()) }

func ids(members []member.Member) []string {
	out := make([]string, len(members))
	for i, m := range members {
		out[i] = m.ID
	}
	slices.Sort(out)
	return out
}

// row is a blob's row with its digest.
type row struct {
	digest digest.Digest
	blobs.Blob
}

// page gives the next blobs whose rows were written after a revision.
func (p *Peers) page(since uint64, after digest.Digest) (page []row, err error) {
	err = p.DB.View(func(v *table.View) error {
		for r, err := range p.Records.Changed(v, since, after, repairPage) {
			if err != nil {
				return err
			}
			page = append(page, row{digest.Digest(r.Key[0]), r.Value})
		}
		return nil
	})
	return page, err
}

// overview is the state at the start of a pass.
type overview struct {
	revision uint64
	members  []string
	live     []string // at the present page
	lacking  int      // blobs that lack copies
}

func (p *Peers) look() (o overview, err error) {
	err = p.DB.View(func(v *table.View) error {
		members, err := p.Roster.Members(v)
		if err != nil {
			return err
		}
		o.revision, o.members = v.Revision(), ids(members)
		o.lacking, err = p.Records.CountUnderReplicated(v, min(Durability, len(members)))
		return err
	})
	return o, err
}
