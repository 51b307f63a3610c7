package stream

import (
	"context"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/plan"
)

// words are what a candidate is asked in the same breath as whether it holds the blob,
// so that a reader waits for one round trip less or two.
type words struct {
	table  bool
	pieces []int
}

func (w words) append(to []byte) []byte {
	if w.table {
		to = frame(to, kindTables)
	}
	asks := make([]plan.Ask, len(w.pieces))
	for i, piece := range w.pieces {
		asks[i] = plan.Ask{Piece: piece, Urgent: true}
	}
	return appendAsks(to, asks)
}

// ask asks every candidate that is not a holder already. The nearest, the first time, is
// asked for what readers wait for in the same breath.
func (h *hunt) ask(ctx context.Context, first bool) {
	h.stale = false
	for _, p := range h.choice(ctx) {
		var w words
		if first {
			w = h.words(p)
		}
		if h.askOne(ctx, p, w) {
			first = false
		}
	}
}

// words are for the nearest candidate.
func (h *hunt) words(p transfer.Peer) (w words) {
	if h.want == nil {
		return w
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if transfer.Pieces(h.blob.Size) == 1 {
		return words{pieces: []int{0}}
	}
	if far := h.e.cfg.Distance != nil && h.e.distance(p) == Farthest; far && len(h.dealing) > 0 {
		return w // another of this site may be elected
	}
	// Not all of the window: others may begin to read at the same time, and each would have
	// from there what they could have from each other.
	for _, i := range h.a.Urgent(urgentWindow) {
		if h.want.Missing(i) {
			w.pieces = []int{i}
			break
		}
	}
	// Where nobody waits, who else wants the blob is better known before the first choice.
	w.table = !h.ready && len(w.pieces) > 0
	return w
}

// choice is which candidates to ask: of very many the first, who may hold the blob, and
// any of the others, who may be fetching it, so that not all ask the same.
func (h *hunt) choice(ctx context.Context) []transfer.Peer {
	list := h.e.cfg.Peers.Candidates(ctx, h.blob.Digest)
	if len(list) <= maxAsked {
		return list
	}
	list = slices.Clone(list)
	rest := list[firstAsked:]
	rand.Shuffle(len(rest), func(i, j int) { rest[i], rest[j] = rest[j], rest[i] })
	return list[:maxAsked]
}

// askOne asks a candidate unless it takes part already.
func (h *hunt) askOne(ctx context.Context, p transfer.Peer, w words) bool {
	if _, asks := h.asking[p]; asks || h.banned[p] || h.active[p] != nil || h.e.distance(p) > h.reach ||
		slices.ContainsFunc(h.reserve, func(r reply) bool { return r.peer == p }) {
		return false
	}
	if a := h.absent[p]; a != nil && time.Now().Before(a.next) {
		return false
	}
	h.asking[p] = !slices.ContainsFunc(h.asked.Asked, func(a transfer.Asked) bool { return a.Peer == p })
	h.wg.Go(func() {
		l, st, err := h.e.open(ctx, p, h.hello(p), w.append)
		if err == nil && !st.serves() {
			h.e.release(p, l, h.blob.Size)
			l, err = nil, st.failure()
		}
		select {
		case h.answers <- reply{p, l, st, w, err}:
		case <-h.finished:
			if l != nil {
				h.e.release(p, l, h.blob.Size)
			}
		case <-ctx.Done():
			if l != nil {
				l.close()
			}
		}
	})
	return true
}

// announced asks a node that has just said that it fetches the blob too.
func (h *hunt) announced(ctx context.Context, id string) {
	for _, p := range h.e.cfg.Peers.Candidates(ctx, h.blob.Digest) {
		if p.ID == id && h.room() {
			if h.askOne(ctx, p, words{}) {
				h.asking[p] = true
			}
			return
		}
	}
}
