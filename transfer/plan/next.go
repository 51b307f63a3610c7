package plan

import (
	"slices"
	"time"
)

// Cursors says what readers wait for: the next missing pieces of each, the nearest
// first. A reader that has just come, or jumped, stops all that is not for readers
// until its first piece is here.
func (w *Want) Cursors(urgent []int) {
	for _, i := range urgent {
		if w.rush < 0 && !w.follows(urgent, i) {
			w.rush = i
		}
	}
	if !slices.Contains(urgent, w.rush) {
		w.rush = -1
	}
	w.urgent = slices.Clone(urgent)
}

// follows says whether a reader that waited for one of the urgent pieces gets to this one
// by going on: what lies between is here, or urgent too.
func (w *Want) follows(urgent []int, i int) bool {
	for j := i; j >= 0; j-- {
		if slices.Contains(w.urgent, j) || j < i && slices.Contains(urgent, j) {
			return true
		}
		if j < i && !w.held.Has(j) {
			return false
		}
	}
	return false
}

// NextUrgent is the part of Next that is for readers: all that may be asked for while
// nothing that comes can be verified yet.
func (w *Want) NextUrgent(now time.Duration, h *Holder) (a Ask, ok bool) {
	if h.gone || h.far && (!w.elected || w.near > 0) {
		return Ask{}, false
	}
	return w.nextUrgent(now, h)
}

// Asked notes that a holder was asked for a piece before it joined, in the same breath as
// whether it has the blob; false when the piece is not missing and may come in vain.
func (w *Want) Asked(now time.Duration, h *Holder, piece int) bool {
	if !w.missing.Has(piece) {
		return false
	}
	w.ask(now, h, piece, true)
	return true
}

// Missing says whether a piece is neither here, nor asked for, nor set aside.
func (w *Want) Missing(piece int) bool { return w.missing.Has(piece) }

// Next says what to ask of a holder now; call it until ok is false, and again when
// anything has happened and now and then.
func (w *Want) Next(now time.Duration, h *Holder) (a Ask, ok bool) {
	if h.gone || h.far && (!w.elected || w.near > 0) {
		return Ask{}, false
	}
	if a, ok := w.nextUrgent(now, h); ok {
		return a, true
	}
	if w.rush >= 0 && w.choice == 0 { // who chooses knows whether somebody else brings it sooner
		return Ask{}, false
	}
	if h.choosing {
		if h.credit >= maxCredit || w.choices() >= w.mayChoose() {
			return Ask{}, false
		}
		h.credit++
		return Ask{Piece: Any}, true
	}
	if len(h.asked) >= w.depth(h) {
		return Ask{}, false
	}
	if !h.dry {
		if i := w.rarest(h); i >= 0 {
			w.ask(now, h, i, false)
			return Ask{Piece: i}, true
		}
		h.dry = true
	}
	if i := w.slowest(now, h); i >= 0 {
		r := w.asks[i]
		r.of[1] = h
		r.since = now
		h.took(now, i)
		return Ask{Piece: i}, true
	}
	return Ask{}, false
}

// depth is how many pieces to have asked of a holder.
func (w *Want) depth(h *Holder) int {
	if !h.complete {
		return w.rules.SwarmDepth
	}
	depth, n := w.rules.Depth, len(w.holders)
	if h.pace > 0 {
		depth = max(depth, min(int(ahead/h.pace), mostAhead/n))
	}
	if n > 1 {
		// Towards the end no holder should sit on what another could send sooner.
		depth = max(1, min(depth, w.left/n))
	}
	return depth
}

// choices is how many pieces holders are left to choose by now.
func (w *Want) choices() (n int) {
	for _, h := range w.holders {
		n += h.credit
	}
	return n
}

// mayChoose is how many it may be. Of few that are missing several holders would choose
// the same ones, and what has gone out comes.
func (w *Want) mayChoose() int {
	if w.choice < 2 {
		return w.left
	}
	return min(w.left, max(1, w.left/4))
}

// nextUrgent is a piece that a reader waits for and that this holder should hear
// about.
func (w *Want) nextUrgent(now time.Duration, h *Holder) (a Ask, ok bool) {
	for _, i := range w.urgent {
		if !h.has(i) || w.held.Has(i) || h.far && w.spread[i] > 0 {
			continue
		}
		r := w.asks[i]
		switch {
		case r == nil && w.missing.Has(i):
			if h.choosing && !w.starves(now, i) || w.faster(h, i) {
				continue
			}
			w.ask(now, h, i, true)
			return Ask{Piece: i, Urgent: true}, true
		case r == nil: // set aside, to be verified again
		case r.of[0] == h || r.of[1] == h:
			if r.urgent {
				continue
			}
			r.urgent = true
			return Ask{Piece: i, Urgent: true, Again: true}, true
		case r.of[1] == nil && (w.late(now, h, r) || r.of[0].choosing && !r.coming && !h.choosing && !h.far):
			r.of[1], r.since, r.urgent = h, now, true
			h.took(now, i)
			return Ask{Piece: i, Urgent: true}, true
		}
	}
	return Ask{}, false
}

// starves says whether to ask a holder that chooses for a piece that a reader waits for:
// all who read at once wait for the same pieces, and would have all of them from there.
// The first piece of a reader is asked for unless another has it; later ones are chosen
// soon, or come from others, and are asked for only when that takes too long.
func (w *Want) starves(now time.Duration, i int) bool {
	if i == w.rush && w.spread[i] == 0 {
		return true
	}
	if len(w.urgent) == 0 || i != w.urgent[0] {
		return false
	}
	if i != w.awaited {
		w.awaited, w.awaits = i, now
	}
	return now-w.awaits >= w.rules.Steal
}

// faster says whether another holder would send the piece in half the time.
func (w *Want) faster(h *Holder, i int) bool {
	if h.pace == 0 {
		return false
	}
	for _, o := range w.holders {
		if o != h && !o.choosing && o.pace > 0 && 2*o.pace < h.pace && o.has(i) && (!o.far || w.elected && w.near == 0) {
			return true
		}
	}
	return false
}

// late says whether an urgent piece is so late that this holder may be asked for it
// too: a reader waits, so it is less patient than the rest.
func (w *Want) late(now time.Duration, h *Holder, r *request) bool {
	patience := w.rules.Steal
	if h.pace > 0 && !r.coming {
		patience = min(patience, max(4*h.pace, patience/4))
	}
	return now-max(r.since, r.of[0].moved) >= patience
}

// rarest is the missing piece of the holder's that the fewest have; -1: none. While nobody
// else fetches the blob none is rarer than another, and a reader gets on fastest in order.
func (w *Want) rarest(h *Holder) int {
	if w.left == 0 {
		return -1
	}
	of := func(int) byte { return 0xff }
	if !h.complete {
		of = func(k int) byte { return h.have[k] }
	}
	best, seen, start := -1, 0, w.rand.IntN(len(w.missing))
	if w.partial == 0 && len(w.urgent) > 0 {
		start = w.urgent[0] / 8
	}
	each(w.missing, start, of, func(i int) bool {
		seen++
		if h.far && w.spread[i] > 0 {
			return seen < sample // somebody near has it
		}
		if best < 0 || w.spread[i] < w.spread[best] {
			best = i
		}
		return seen < sample && w.spread[best] > 1
	})
	return best
}

// slowest is the piece to ask of a second holder when nothing is missing: the one
// without progress for longest, or one whose holder is far slower than h; -1: none.
func (w *Want) slowest(now time.Duration, h *Holder) int {
	if w.left > 0 || len(h.asked) > 0 {
		return -1
	}
	worst, longest := -1, time.Duration(0)
	for i, r := range w.asks {
		o := r.of[0]
		if o == h || r.of[1] != nil || !h.has(i) {
			continue
		}
		age := now - max(r.since, o.moved)
		due := age >= w.rules.Steal || w.choice > 0 && !r.coming && age >= w.rules.Steal/4
		if !due && h.pace > 0 && o.pace > 0 && !h.far {
			// Its turn comes after those asked before it.
			ahead := time.Duration(slices.Index(o.asked, i) + 1)
			due = ahead*o.pace > 4*h.pace+w.rules.Steal/2 && o.pace > 2*h.pace && now-r.since > 2*h.pace
		}
		if due && (age > longest || age == longest && i < worst) {
			worst, longest = i, age
		}
	}
	return worst
}
