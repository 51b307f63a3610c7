package swarm

import (
	"math/rand/v2"
	"time"
)

const (
	// offerAhead is how many pieces an asker is offered or being sent at once.
	offerAhead = 2
	// offerFor is how long an offer stands.
	offerFor = 3 * time.Second
)

// offer lets a node that has all of a blob choose, when several want it at once, what
// each of them asks for next: the piece that it has given away least. So they get
// different pieces and have them from each other, and the first copy of all of it is
// out after the time that it takes to send it once.
func (s *swarm) offer() {
	if s.arrival != nil && !s.arrival.Complete() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	askers := make([]*tap, 0, len(s.taps))
	for t := range s.taps {
		if t.lacks(s.shape.pieces) {
			askers = append(askers, t)
		}
	}
	if len(askers) < 2 {
		return
	}
	for _, t := range askers {
		var pieces []int
		for t.room() > len(pieces) {
			i := s.leastGiven(t)
			if i < 0 {
				break
			}
			t.mu.Lock()
			t.offered[i] = time.Now()
			t.mu.Unlock()
			s.give(t, i)
			pieces = append(pieces, i)
		}
		if len(pieces) > 0 {
			t.suggest(pieces)
		}
	}
}

// give notes that a piece goes to a peer. mu is held.
func (s *swarm) give(t *tap, i int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, before := t.sent[i]; !before {
		t.sent[i] = struct{}{}
		s.given[i]++
	}
}

// leastGiven is the piece that was given away least of those that the peer does not
// have and was not given; -1: none. mu is held.
func (s *swarm) leastGiven(t *tap) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	best, ties := -1, 0
	for i := range s.given {
		if t.have.Has(i) {
			continue
		}
		if _, sent := t.sent[i]; sent {
			continue
		}
		switch {
		case best < 0 || s.given[i] < s.given[best]:
			best, ties = i, 1
		case s.given[i] == s.given[best]:
			if ties++; rand.IntN(ties) == 0 {
				best = i
			}
		}
	}
	return best
}

// lacks says whether the peer lacks a piece.
func (t *tap) lacks(pieces int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.shaken.Load() && t.have.Count() < pieces
}

// room is how many more pieces the peer may be offered. Offers that it has not taken
// up for a while are no more.
func (t *tap) room() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, since := range t.offered {
		if t.have.Has(i) || time.Since(since) > offerFor {
			delete(t.offered, i)
		}
	}
	serving := make(map[uint32]struct{}, len(t.asked))
	for c := range t.asked {
		serving[c.piece] = struct{}{}
	}
	return offerAhead - len(t.offered) - len(serving)
}
