package stream

import (
	"context"
	"errors"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// absent is a peer that holds the blob, as far as is known, and cannot be traded with
// now: it broke off and may come back, or it serves as many as it wants to.
type absent struct {
	busy bool
	next time.Time     // when it is asked again
	wait time.Duration // before the time after that
}

// mostAbsence is the longest pause between two attempts.
const mostAbsence = 2 * time.Second

// away notes that a holder has gone and may come back, or is busy.
func (h *hunt) away(p transfer.Peer, f *failure) {
	a := h.absent[p]
	if a == nil {
		a = &absent{wait: h.e.cfg.Backoff}
		h.absent[p] = a
	}
	a.busy = errors.Is(f, errBusy)
	if a.busy && len(h.active) > 0 { // there is no hurry
		a.wait = h.e.cfg.AskAgain
	}
	a.next = time.Now().Add(a.wait)
	a.wait = min(2*a.wait, mostAbsence)
}

// recall asks again those whose pause is over.
func (h *hunt) recall(ctx context.Context) {
	if reached := h.reached(); reached > h.most {
		h.most, h.advanced = reached, time.Now()
	}
	if len(h.active) >= h.e.cfg.Holders() {
		return
	}
	for p := range h.absent {
		h.askOne(ctx, p, words{})
	}
}

// reached is how far the fetch has come, in bytes.
func (h *hunt) reached() int64 {
	if h.whole != nil {
		return h.whole.most.Load()
	}
	return h.a.Fetch().Progress().Held
}

// expects says whether to wait for a holder that is absent.
func (h *hunt) expects() bool {
	for _, a := range h.absent {
		patience := h.e.cfg.Absence
		if a.busy {
			patience = limitPatience
		}
		if time.Since(h.advanced) < patience {
			return true
		}
	}
	return false
}
