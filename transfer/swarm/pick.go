package swarm

import (
	"math/rand/v2"
	"slices"
	"time"
)

// assign gives every peer something to bring. mu is held.
func (w *want) assign() {
	if w.over || w.missing == 0 && len(w.asks) == 0 {
		return
	}
	urgent := w.urgent()
	for _, l := range w.links {
		w.fill(l, urgent)
	}
}

func (w *want) assignTo(l *link) {
	if !w.over {
		w.fill(l, w.urgent())
	}
}

// urgent is what readers wait for. mu is held.
func (w *want) urgent() []int {
	urgent := w.a.Urgent(urgentWindow)
	for i := range w.waits {
		if !slices.Contains(urgent, i) {
			delete(w.waits, i)
		}
	}
	for _, i := range urgent {
		if _, known := w.waits[i]; !known {
			w.waits[i] = time.Now()
		}
	}
	return urgent
}

// fill asks a peer for as much as fits its window.
func (w *want) fill(l *link, urgent []int) {
	for l.open && len(l.asked) < l.window {
		i := w.pick(l, urgent)
		if i < 0 {
			return
		}
		if l.t.owes(i) {
			l.refused[i] = time.Now()
			continue
		}
		if !w.slot(i) {
			return
		}
		w.take(l, i)
		l.t.ask(w.s.store.lacks(i))
	}
}

// take notes that a peer is to bring a piece, which has a slot.
func (w *want) take(l *link, i int) {
	now := time.Now()
	if r := w.asks[i]; r != nil {
		r.of[1] = l
	} else {
		w.asks[i] = &ask{of: [2]*link{l, nil}, since: now}
		w.states[i] = asked
		w.missing--
	}
	if len(l.asked) == 0 {
		l.t.touch() // it has had nothing to send until now
	}
	l.asked[i] = now
}

// has says whether the peer can be asked for a piece.
func (l *link) has(i int) bool {
	if since, ok := l.refused[i]; ok {
		if time.Since(since) < refusalFor {
			return false
		}
		delete(l.refused, i)
	}
	return l.all || l.have.Has(i)
}

// pick chooses a piece to ask of a peer: what readers wait for, what the fewest others
// have, what another is slow to bring; -1: none. A holder that chooses is asked for next
// to nothing, and one that has chosen for what others do not bring.
func (w *want) pick(l *link, urgent []int) int {
	for _, i := range urgent {
		if w.states[i] == missing && l.has(i) && w.mayUrge(l, i) {
			return i
		}
	}
	quiet := time.Since(w.moved)
	if l.chooses && quiet < starvedAfter {
		return -1
	}
	if w.missing > 0 && (!l.spared || quiet >= stealAfter) {
		if i := w.rarest(l); i >= 0 {
			return i
		}
	}
	if w.missing == 0 || slices.ContainsFunc(urgent, func(i int) bool { return w.states[i] == asked }) {
		return w.slow(l, urgent)
	}
	return -1
}

// mayUrge says whether a peer may be asked for a piece because a reader waits for it. One
// that chooses would be asked for the same pieces by all who have readers: it is asked for
// the first, and for one that has not come for a while.
func (w *want) mayUrge(l *link, i int) bool {
	if !l.chooses {
		return true
	}
	return len(w.asks) == 0 && w.a.Fetch().Progress().Held == 0 || time.Since(w.waits[i]) > stealAfter
}

// rarest is the missing piece that the fewest have, at random among equals.
func (w *want) rarest(l *link) int {
	best, ties, seen := -1, 0, 0
	n := len(w.states)
	start := rand.IntN(n)
	for k := range n {
		i := start + k
		if i >= n {
			i -= n
		}
		if w.states[i] != missing || !l.has(i) {
			continue
		}
		switch {
		case best < 0 || w.spread[i] < w.spread[best]:
			best, ties = i, 1
		case w.spread[i] == w.spread[best]:
			if ties++; rand.IntN(ties) == 0 {
				best = i
			}
		}
		if seen++; seen >= sample {
			break
		}
	}
	return best
}

// slow is the piece that another has been asked for longest and is slow to bring; only
// one that a reader waits for unless nothing else is missing. What nobody waits for may
// take its time, as long as its peer brings anything: in a swarm each has a queue.
func (w *want) slow(l *link, urgent []int) int {
	best := -1
	for i, r := range w.asks {
		waits, read := time.Since(r.since), slices.Contains(urgent, i)
		if r.of[0] == l || r.of[1] != nil || w.alone[i] || !l.has(i) || waits < stealAfter ||
			!read && (w.missing > 0 || waits < starvedAfter && r.of[0].t.quiet() < stealAfter) {
			continue
		}
		if best < 0 || r.since.Before(w.asks[best].since) {
			best = i
		}
	}
	return best
}
