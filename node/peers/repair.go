package peers

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/transfer"
)

// What changed is looked at repairSettle after the change, so that a push is not in
// its own way. All blobs are looked at when a node has come or gone or stands
// differently, which changes no row of a blob; and every repairInterval in any case,
// but then in strides, a page every strideEvery, so that neither pushes nor what is
// due wait for a million rows. What could not be mended is tried again after
// repairSettle, then twice as long, up to retryMost.
const (
	repairSettle   = 2 * time.Second
	retryMost      = time.Minute
	retryApart     = 4 // a try comes earlier by up to this part of its pause
	repairInterval = time.Hour
	strideEvery    = time.Second
	repairPage     = blobsAsked
	liveInterval   = time.Second // between two looks at who is live
	changesKept    = 8192        // keys of changed rows between two looks
	retryKept      = 4096        // blobs to try again; with more, all are looked at
)

// schedule says when repair looks at what.
type schedule struct {
	full    time.Time                  // when all blobs are due at once
	stride  time.Time                  // when the next page of all blobs is due
	after   digest.Digest              // the last of the page before
	again   time.Time                  // when retry is due
	backoff time.Duration              // until it is after that
	retry   map[digest.Digest]struct{} // what could not be mended
}

// plan takes the result of a pass into account.
func (s *schedule) plan(pass result, now time.Time) {
	switch {
	case pass.full:
		s.full, s.retry = time.Time{}, nil
		s.stride, s.after = now.Add(repairInterval), ""
	case pass.strode && pass.after == "":
		s.stride, s.after = now.Add(repairInterval), ""
	case pass.strode:
		s.stride, s.after = now.Add(strideEvery), pass.after
	}
	for _, d := range pass.looked {
		delete(s.retry, d)
	}
	if s.retry == nil {
		s.retry = map[digest.Digest]struct{}{}
	}
	for _, d := range pass.failed {
		s.retry[d] = struct{}{}
	}
	failed := len(pass.failed) > 0 || pass.cause != nil
	switch next := now.Add(s.backoff); {
	case pass.cause != nil || len(s.retry) > retryKept:
		s.full = earlier(s.full, next) // it was no look at all, or too much to remember
	case failed && (s.again.IsZero() || !s.again.After(now) || next.Before(s.again)):
		// Not all homes at once: one that asks for a blob tells the others that it may have it soon.
		s.again = next.Add(-rand.N(s.backoff / retryApart))
	}
	switch {
	case failed && (pass.full || pass.again):
		s.backoff = min(2*s.backoff, retryMost)
	case len(s.retry) == 0 && !failed:
		s.again, s.backoff = time.Time{}, repairSettle
	}
}

// earlier of two times, of which zero is never.
func earlier(a, b time.Time) time.Time {
	if b.IsZero() || !a.IsZero() && a.Before(b) {
		return a
	}
	return b
}

// next is when something is due without a change.
func (s *schedule) next() time.Time {
	due := earlier(s.full, s.stride)
	if len(s.retry) == 0 {
		return due
	}
	return earlier(due, s.again)
}

// repair brings this node, and the homes of the blobs that it leads, to what the
// placement wants of them, again and again.
func (p *Peers) repair(ctx context.Context) error {
	changes := p.DB.Collect(ctx, changesKept, blobs.BlobTable, blobs.LinkTable)
	s := schedule{backoff: repairSettle}
	var looked layout // for which all blobs were looked at last
	var drained time.Time
	for ctx.Err() == nil {
		l, err := p.currentLayout()
		if err != nil {
			p.Log.Warn("the site's nodes could not be read; trying again", "err", err)
			p.awaitRepair(ctx, changes, looked, time.Now().Add(repairSettle))
			continue
		}
		keys, lost := changes.Take()
		var pass result
		now := time.Now()
		switch {
		case lost || !l.equal(looked) || !s.full.IsZero() && !now.Before(s.full):
			if !l.equal(looked) {
				s.backoff, drained = repairSettle, time.Time{}
			}
			looked = l
			pass = p.repairAll(ctx, l)
			if pass.moved {
				looked = layout{} // though the site may be by now what it was before
			}
		case len(keys) == 0 && !now.Before(s.stride):
			pass = p.stride(ctx, l, s.after)
		default:
			ds := digestsOf(keys)
			again := !s.again.IsZero() && !now.Before(s.again)
			if again {
				for d := range s.retry {
					ds[d] = struct{}{}
				}
			}
			pass = p.repairSome(ctx, l, ds)
			pass.again = again
		}
		if ctx.Err() != nil {
			return nil // what failed, failed for that
		}
		s.plan(pass, time.Now())
		p.noteRepair(pass, len(s.retry))
		wait := s.next()
		if due := p.drainWhenDue(ctx, l, &drained); !due.IsZero() {
			wait = earlier(wait, due)
		}
		p.awaitRepair(ctx, changes, looked, wait)
	}
	return nil
}

// digestsOf names the blobs that changed rows are about: a new link may want more
// copies of a blob than there are.
func digestsOf(keys []table.Key) map[digest.Digest]struct{} {
	ds := map[digest.Digest]struct{}{}
	for _, k := range keys {
		ds[digest.Digest(k.Parts[len(k.Parts)-1])] = struct{}{}
	}
	return ds
}

// currentLayout is the site as it stands in the newest local state.
func (p *Peers) currentLayout() (l layout, err error) {
	err = p.DB.View(func(v *table.View) error {
		l, err = p.layout(v)
		return err
	})
	return l, err
}

// awaitRepair waits until there is something to do: a change, another layout than
// the given one, or the time.
func (p *Peers) awaitRepair(ctx context.Context, changes *table.Changes, looked layout, until time.Time) {
	due, look := time.NewTimer(time.Until(until)), time.NewTicker(liveInterval)
	defer due.Stop()
	defer look.Stop()
	some := changes.Some()
	for {
		select {
		case <-ctx.Done():
			return
		case <-due.C:
			return
		case <-some:
			some = nil // one is enough
			due.Reset(min(time.Until(until), repairSettle))
		case <-look.C:
			if l, err := p.currentLayout(); err == nil && !l.equal(looked) {
				return
			}
		}
	}
}

// result of a pass.
type result struct {
	full    bool            // over all blobs
	moved   bool            // the site changed meanwhile, so that it ended early
	strode  bool            // over one page of them
	after   digest.Digest   // its last; "" when there is no more
	again   bool            // over what had failed before, too
	looked  []digest.Digest // by a pass that was not full
	failed  []digest.Digest // for which something could not be done
	example error           // why, for one of them
	cause   error           // why the pass itself ended early
}

func (r *result) fail(d digest.Digest, err error) {
	r.failed = append(r.failed, d)
	r.example = fmt.Errorf("blob %s: %w", d, err)
}

// repairSome looks at some blobs and mends what they lack.
func (p *Peers) repairSome(ctx context.Context, l layout, ds map[digest.Digest]struct{}) (r result) {
	for d := range ds {
		r.looked = append(r.looked, d)
	}
	slices.Sort(r.looked)
	for part := range slices.Chunk(r.looked, repairPage) {
		rows, err := p.rowsOf(part, isLiveState)
		if err == nil {
			gone := slices.DeleteFunc(slices.Clone(part), func(d digest.Digest) bool {
				return slices.ContainsFunc(rows, func(r row) bool { return r.digest == d })
			})
			for _, d := range gone {
				p.ledger.set(d, false)
			}
			err = p.mend(ctx, l, rows, &r)
		}
		if err != nil {
			r.cause = err
			break
		}
	}
	p.metrics.underReplicated.Set(float64(p.ledger.count()))
	return r
}

// repairAll counts first what lacks copies, so that the figure is right from the
// beginning of what may take hours, and then mends it.
func (p *Peers) repairAll(ctx context.Context, l layout) result {
	r := result{full: true}
	p.ledger.begin()
	if l.lonely() {
		p.ledger.end(l) // nobody to copy to or from
		p.metrics.underReplicated.Set(0)
		return r
	}
	todo := map[uint64]struct{}{}
	r.cause = p.walk(ctx, func(rows []row) error {
		found, err := p.survey(ctx, l, rows, false)
		for _, s := range found {
			p.ledger.set(s.digest, s.lacks(l))
			if s.needs(l) {
				todo[mark(s.digest)] = struct{}{}
			}
		}
		p.metrics.underReplicated.Set(float64(p.ledger.count()))
		return err
	})
	if r.cause != nil {
		return r
	}
	p.ledger.end(l)
	if len(todo) == 0 {
		return r
	}
	r.cause = p.walk(ctx, func(rows []row) error {
		rows = slices.DeleteFunc(rows, func(r row) bool { _, due := todo[mark(r.digest)]; return !due })
		if len(rows) == 0 {
			return nil
		}
		if now, err := p.currentLayout(); err != nil || !now.equal(l) {
			return errMoved
		}
		defer func() { p.metrics.underReplicated.Set(float64(p.ledger.count())) }()
		return p.mend(ctx, l, rows, &r)
	})
	if errors.Is(r.cause, errMoved) {
		r.cause, r.moved = nil, true // the next pass begins at once
	}
	return r
}

// stride looks at the page of blobs after a digest, and mends what they lack.
func (p *Peers) stride(ctx context.Context, l layout, after digest.Digest) result {
	r := result{strode: true}
	if l.lonely() {
		return r
	}
	var rows []row
	if rows, r.cause = p.page(after); r.cause != nil || len(rows) == 0 {
		return r
	}
	r.after = rows[len(rows)-1].digest
	for _, row := range rows {
		r.looked = append(r.looked, row.digest)
	}
	r.cause = p.mend(ctx, l, slices.DeleteFunc(rows, func(r row) bool { return !isLiveState(r.State) }), &r)
	p.metrics.underReplicated.Set(float64(p.ledger.count()))
	return r
}

// errMoved: the site is another one than at the beginning of a walk.
var errMoved = errors.New("nodes have come or gone")

// walk calls see with all rows of live blobs, some at a time.
func (p *Peers) walk(ctx context.Context, see func([]row) error) error {
	for after := digest.Digest(""); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		rows, err := p.page(after)
		if err != nil {
			return err
		}
		if len(rows) == 0 {
			return nil
		}
		after = rows[len(rows)-1].digest
		rows = slices.DeleteFunc(rows, func(r row) bool { return !isLiveState(r.State) })
		if err := see(rows); err != nil {
			return err
		}
	}
}

// needs says that there is something for this node to do.
func (s *standing) needs(l layout) bool {
	short := s.leads && !s.shelved && s.holders < l.floor && len(l.takers(s.digest, s.replicas, s.here)) > 0
	unknown := s.leads && s.Copies < l.floor && (s.holders > s.Copies || s.shelved)
	standsIn := s.leads && !s.here && s.holders < l.floor && slices.Contains(l.homes, l.self)
	return s.absent(l) || standsIn || len(s.missing) > 0 || s.unsure != nil || short || unknown ||
		s.rootless(l, transfer.PieceSize) || s.Lost != 0 && s.here
}

// mend looks at blobs and does what this node can for their copies: it fetches
// those that it should hold, has the other homes fetch theirs, commits piece roots
// and writes down how many copies there are.
func (p *Peers) mend(ctx context.Context, l layout, rows []row, r *result) error {
	found, err := p.survey(ctx, l, rows, false)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	fail := func(s *standing, err error) {
		mu.Lock()
		defer mu.Unlock()
		r.fail(s.digest, err)
	}
	var group errgroup.Group
	group.SetLimit(copiesAtOnce)
	for _, s := range found {
		p.ledger.set(s.digest, s.lacks(l))
		if !s.needs(l) {
			continue
		}
		group.Go(func() error {
			if err := p.mendHere(ctx, l, s); err != nil {
				fail(s, err)
			}
			return nil
		})
	}
	_ = group.Wait() // failures are in r
	p.mendElsewhere(ctx, found)
	for _, s := range found {
		if !s.leads || !s.here {
			continue
		}
		if err := p.record(ctx, l, s); err != nil {
			fail(s, err)
		} else if len(s.missing) > 0 {
			fail(s, fmt.Errorf("node %s could not take a copy", s.missing[0]))
		} else if s.unsure != nil {
			fail(s, s.unsure)
		}
		p.ledger.set(s.digest, s.lacks(l))
	}
	return ctx.Err()
}

// mendHere does what needs no other home: this node's own copy, and its root.
func (p *Peers) mendHere(ctx context.Context, l layout, s *standing) error {
	standsIn := s.leads && s.holders < l.floor && slices.Contains(l.homes, l.self)
	if !s.here && (s.absent(l) || standsIn) {
		if err := p.obtain(ctx, heldBlob{Digest: s.digest, Size: s.Size}, transfer.Repair); err != nil {
			var none *transfer.NoHolderError
			if s.leads && s.Lost == 0 && l.whole && errors.As(err, &none) && none.Nowhere(len(l.live)-1) {
				p.tellAbsent(s.digest)
			}
			return err
		}
		s.here = true
		if slices.Contains(s.homes, l.self) {
			s.holders++
		}
	}
	if s.Lost != 0 && s.here {
		if err := p.Records.Found(ctx, s.digest); err != nil {
			return err
		}
	}
	// What all nodes read from one storage does not travel between them.
	if s.rootless(l, transfer.PieceSize) {
		return p.commitRoot(ctx, s.digest)
	}
	return nil
}

// mendElsewhere has other homes fetch what they said that they lack, and takes
// those that did off the missing.
func (p *Peers) mendElsewhere(ctx context.Context, found []*standing) {
	batches := map[string][]*copyPlan{}
	for _, s := range found {
		if !s.leads || !s.here && s.holders == 0 {
			continue // they would find nobody
		}
		for _, id := range s.missing {
			batches[id] = append(batches[id], &copyPlan{blob: heldBlob{Digest: s.digest, Size: s.Size}})
		}
	}
	if len(batches) == 0 {
		return
	}
	p.askToHold(ctx, batches)
	took := map[string]map[digest.Digest]bool{}
	for id, batch := range batches {
		took[id] = map[digest.Digest]bool{}
		for _, c := range batch {
			took[id][c.blob.Digest] = c.holders > 0
		}
	}
	for _, s := range found {
		s.missing = slices.DeleteFunc(s.missing, func(id string) bool {
			if took[id][s.digest] {
				s.holders++
				return true
			}
			return false
		})
	}
}

// record writes down how many copies there are of a blob whose row knows of fewer
// than a push waits for. When its homes are too few, other nodes take copies.
func (p *Peers) record(ctx context.Context, l layout, s *standing) error {
	copies := s.holders
	if s.shelved {
		copies = l.floor
	}
	if copies < l.floor && len(l.takers(s.digest, s.replicas, s.here)) > 0 {
		n, err := p.Ensure(ctx, []digest.Digest{s.digest})
		if err != nil {
			return err
		}
		copies = max(copies, n)
	}
	if s.Copies >= l.floor || copies <= s.Copies {
		return nil
	}
	_, err := p.DB.Update(ctx, func(tx *table.Tx) error {
		return p.Records.SetCopies(tx, s.digest, min(copies, l.floor))
	})
	return err
}

// noteRepair logs when repair begins to fail, fails for more blobs, or has caught
// up; not once more for each pass over the same missing blob.
func (p *Peers) noteRepair(r result, failing int) {
	switch {
	case r.cause != nil:
		p.Log.Warn("the copies of blobs could not be looked at; trying again", "err", r.cause)
	case failing > p.unrepaired:
		p.Log.Warn("blobs lack copies that cannot be made now; they are made when nodes that hold them are up", "blobs", failing, "err", r.example)
	case failing == 0 && p.unrepaired > 0:
		p.Log.Info("repair has caught up", "blobs", p.unrepaired)
	}
	if r.cause == nil {
		p.unrepaired = failing
	}
}
