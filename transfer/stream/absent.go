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
	if !h.room() {
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

// A fetch waits for nodes that are still fetching the blob themselves, since they may have
// it sooner. That is of use only while one of them gets it from somebody: nodes that all
// look for a blob which nobody holds would wait for each other. So each tells those that
// ask it how far away the rest is (transfer.Arrival.Hops), and a fetch ends that hears of
// nobody who has it. Where a holder was lost they count up, each from what the other has
// said, and are through in a few round trips.

// hops is how far away the rest of the blob is.
func (h *hunt) hops() int {
	if len(h.fl.news) > 0 || h.checking || len(h.marked) > 0 || h.expects() {
		return 0
	}
	for _, fresh := range h.asking { // to ask again those that held nothing is no reason to wait
		if fresh {
			return 0
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	least := transfer.NoHops
	for _, hd := range h.dealing {
		if hd.complete || hd.planned != nil && h.want.Offers(hd.planned) {
			return 0
		}
		least = min(least, hd.hops+1)
	}
	return least
}

// told takes what a holder says of its own fetch.
func (h *hunt) told(hd *holder, body []byte) error {
	if len(body) != 1 {
		return fail(Broken, "hops in %d bytes: %w", len(body), errFrame)
	}
	h.mu.Lock()
	hd.heard, hd.hops = time.Now(), int(body[0])
	h.mu.Unlock()
	select {
	case h.stirred <- struct{}{}:
	default:
	}
	return nil
}

// room says whether the fetch may take in another holder. Those that will bring nothing
// take no place.
func (h *hunt) room() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := 0
	for _, hd := range h.active {
		if hd.complete || hd.hops < transfer.NoHops {
			n++
		}
	}
	return n < h.e.cfg.Holders()
}

// admitReserve lets those take part that had to wait for a place.
func (h *hunt) admitReserve(ctx context.Context) {
	for len(h.reserve) > 0 && h.room() {
		next := h.reserve[0]
		h.reserve = h.reserve[1:]
		h.engage(ctx, next)
	}
}
