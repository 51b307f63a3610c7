package stream

import (
	"context"
	"time"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/plan"
)

// intake is what a limit on what comes in lets a holder send. It is asked before the
// holder is: what was asked for comes as fast as the wire lets it, whatever the limit.
// The hunt's mu guards it.
type intake struct {
	parked *plan.Ask // planned, and not said yet: the limit holds it back
	again  time.Time // when the limit is asked again
	paid   int       // pieces that were let in and have not come
	spare  int       // pieces that were let in and will not come: for others
}

// decide is what to ask of a holder next; mu is held.
func (h *hunt) decide(hd *holder, next func(time.Duration, *plan.Holder) (plan.Ask, bool)) (plan.Ask, bool) {
	a, ok := plan.Ask{}, true
	if hd.in.parked != nil {
		a, hd.in.parked = *hd.in.parked, nil
	} else if a, ok = next(h.now(), hd.planned); !ok {
		return a, false
	}
	if !a.Again && !h.letIn(hd, a.Piece) {
		hd.in.parked = &a
		return a, false
	}
	return a, true
}

// letIn says whether a piece more may come from a holder, or plan.Any. Else nobody is to
// blame, and there is a pump when it is time; mu is held.
func (h *hunt) letIn(hd *holder, piece int) bool {
	if h.e.cfg.Incoming == nil {
		return true
	}
	if hd.in.spare > 0 {
		hd.in.spare--
		hd.in.paid++
		return true
	}
	now := time.Now()
	hd.moved = now
	if h.want != nil {
		h.want.Progress(h.now(), hd.planned)
	}
	if now.Before(hd.in.again) {
		return false
	}
	size := int64(transfer.PieceSize)
	if piece != plan.Any {
		_, size = transfer.PieceRange(h.blob.Size, piece)
	}
	wait := h.e.cfg.Incoming.Take(h.flow(hd), int(size))
	if wait > 0 {
		hd.in.again = now.Add(wait)
		time.AfterFunc(wait, h.pump)
		return false
	}
	hd.in.paid++
	return true
}

// mayPour is letIn for a blob without a root; else it says when to ask again.
func (h *hunt) mayPour(hd *holder, piece int) (wait time.Duration, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	ok = h.letIn(hd, piece)
	return time.Until(hd.in.again), ok
}

// lapse notes that a piece that was asked for will not come; mu is held. It says whether
// the holder has heard of it at all.
func (in *intake) lapse(piece int) (said bool) {
	if in.parked != nil && in.parked.Piece == piece {
		in.parked = nil
		return false
	}
	if in.paid > 0 {
		in.paid--
		in.spare++
	}
	return true
}

// end notes that nothing comes any more; mu is held.
func (in *intake) end() {
	in.parked, in.again = nil, time.Time{}
	in.spare += in.paid
	in.paid = 0
}

// spend says whether a piece that comes was let in.
func (h *hunt) spend(hd *holder) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if hd.in.paid == 0 {
		return false
	}
	hd.in.paid--
	return true
}

// flow is what comes from a holder.
func (h *hunt) flow(hd *holder) transfer.Flow {
	return transfer.Flow{Blob: h.blob, Peer: hd.peer.ID, Class: h.fl.urgency(), Way: transfer.ByStream}
}

// admit waits until a piece may come in that was not let in before. Its sender is not to
// blame meanwhile.
func (h *hunt) admit(ctx context.Context, hd *holder, n int) error {
	if h.e.cfg.Incoming == nil || h.spend(hd) {
		return nil
	}
	for {
		wait := h.e.cfg.Incoming.Take(h.flow(hd), n)
		if wait <= 0 {
			return nil
		}
		if !pause(ctx, wait) {
			return ctx.Err()
		}
		h.excuse(hd)
	}
}

// excuse notes that a holder waits for this node.
func (h *hunt) excuse(hd *holder) {
	h.mu.Lock()
	defer h.mu.Unlock()
	hd.heard = time.Now()
	hd.moved = hd.heard
	if hd.planned != nil {
		h.want.Progress(h.now(), hd.planned)
	}
}
