package stream

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// stealAfter is how long a piece may be without progress before an idle holder is
// asked for it too.
const stealAfter = time.Second

// trade works with one holder until it is dropped or ctx ends: first the piece
// table, then pieces by several workers; beside them the watch over what a holder
// that is still fetching has by now.
func (h *hunt) trade(ctx context.Context, hd *holder) {
	if !h.fetchTable(ctx, hd) {
		return
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	if !hd.isComplete() {
		wg.Go(func() { h.follow(ctx, hd) })
	}
	h.plan.employ(h.e.cfg.PerHolder)
	defer h.plan.employ(-h.e.cfg.PerHolder)
	for range h.e.cfg.PerHolder {
		wg.Go(func() { h.work(ctx, hd) })
	}
}

// fetchTable makes sure that the piece table is known, asking this holder if need
// be; false means that ctx is done.
func (h *hunt) fetchTable(ctx context.Context, hd *holder) bool {
	if hd.isComplete() {
		// One complete holder at a time, since the others would send the same again;
		// but nobody holds the others up for longer than a stall.
		impatient := time.NewTimer(h.e.cfg.StallTimeout)
		defer impatient.Stop()
		select {
		case <-h.known:
			return true
		case h.turn <- struct{}{}:
			defer func() { <-h.turn }()
		case <-impatient.C:
		case <-ctx.Done():
			return false
		}
	}
	for {
		select {
		case <-h.known:
			return true
		default:
		}
		era := hd.era()
		t, err := h.askTable(ctx, hd)
		if err == nil {
			hd.delivered()
			h.learn(t)
			return true
		}
		select {
		case <-h.known: // from another holder, which is why this one was left
			return true
		default:
		}
		if !h.failed(ctx, hd, era, err) {
			return false
		}
	}
}

// askTable asks for the table until it is known from elsewhere.
func (h *hunt) askTable(ctx context.Context, hd *holder) (transfer.PieceTable, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	asked := make(chan struct{})
	defer close(asked)
	wg.Go(func() {
		select {
		case <-h.known:
			cancel()
		case <-asked:
		}
	})
	return h.e.table(ctx, hd.peer, h.blob)
}

// follow keeps the set of pieces of a holder that is still fetching up to date,
// until it is complete or dropped or ctx ends.
func (h *hunt) follow(ctx context.Context, hd *holder) {
	count := -1
	for ctx.Err() == nil && !hd.isComplete() {
		era := hd.era()
		have, err := h.e.more(ctx, hd.peer, h.blob, count)
		if err != nil {
			if !h.failed(ctx, hd, era, err) {
				return
			}
			continue
		}
		if have != nil && have.Count() <= count {
			pause(ctx, h.e.cfg.Backoff) // whoever answers at once is not asked at once
			continue
		}
		count = have.Count()
		hd.update(have)
		h.plan.wake()
	}
}

// work asks a holder for runs of pieces until it is dropped or ctx ends.
func (h *hunt) work(ctx context.Context, hd *holder) {
	for ctx.Err() == nil {
		moved, changed := h.a.Changed(), h.plan.change()
		first, n, wait := h.plan.pick(hd, h.a.Urgent(urgentWindow))
		if n > 0 {
			era := hd.era()
			if err := h.take(ctx, hd, first, n); err != nil && !h.failed(ctx, hd, era, err) {
				return
			}
			continue
		}
		h.await(ctx, wait, moved, changed)
	}
}

// await returns at one of the changes, after wait unless that is 0, or with ctx.
func (h *hunt) await(ctx context.Context, wait time.Duration, moved, changed <-chan struct{}) {
	var after <-chan time.Time
	if wait > 0 {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		after = timer.C
	}
	select {
	case <-moved:
	case <-changed:
	case <-after:
	case <-ctx.Done():
	}
}

// pause waits for d; false means that ctx was done first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// take asks for the pieces first..first+n-1 and keeps those that are right.
func (h *hunt) take(ctx context.Context, hd *holder, first, n int) error {
	next := first
	defer func() { h.plan.release(hd, next, first+n-next) }()
	buf, err := h.e.buffers.take(ctx)
	if err != nil {
		return err
	}
	defer h.e.buffers.give(buf)
	ctx, watch := h.e.watch(ctx)
	defer watch.stop()
	off, _ := transfer.PieceRange(h.blob.Size, first)
	lastOff, lastLen := transfer.PieceRange(h.blob.Size, first+n-1)
	body, err := h.e.open(ctx, hd.peer, h.blob, off, lastOff+lastLen-off)
	if err != nil {
		return err
	}
	defer body.Close()
	for ; next < first+n; next++ {
		_, size := transfer.PieceRange(h.blob.Size, next)
		data := buf[:size]
		if err := watch.read(ctx, body, data); err != nil {
			return err
		}
		switch err := h.a.Store(next, data); {
		case errors.Is(err, transfer.ErrBadPiece):
			return &failure{BadPiece, err}
		case err != nil:
			h.die(err)
			return err
		}
		hd.delivered()
		if h.e.cfg.Hooks.Moved != nil {
			h.e.cfg.Hooks.Moved(hd.peer.ID, size)
		}
		h.arrived(next)
		h.plan.touch(hd, next+1, first+n-next-1)
	}
	return nil
}

// failed deals with a failure: it drops the holder for a lie or for too many
// failures in a row (then it returns false, as when ctx is done), else it waits a
// while before the next try.
//
// Weights: a broken answer may be a restart, so it takes four; a stall has already
// cost a reader StallTimeout, so it takes two.
func (h *hunt) failed(ctx context.Context, hd *holder, era int, err error) bool {
	if ctx.Err() != nil {
		return false
	}
	var f *failure
	if !errors.As(err, &f) {
		f = &failure{Broken, err}
	}
	// A holder that is still fetching may not have, yet, what it will have.
	final := f.why.Lie() || f.why == Gone && hd.isComplete()
	weight := 1
	if f.why == Stalled {
		weight = maxStrikes / 2
	}
	strikes := hd.strike(era, weight)
	if final || strikes >= maxStrikes {
		hd.drop(f)
		return false
	}
	return pause(ctx, h.e.cfg.Backoff<<max(0, strikes-1))
}
