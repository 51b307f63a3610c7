package swarm

import (
	"math/bits"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

const (
	// inService is how many pieces a holder that chooses sends at once, as in package
	// plan. One that takes far longer than usual waits for its receiver and counts no more.
	inService = 4
	// leastPatience is for how long one counts in any case.
	leastPatience = 50 * time.Millisecond
	// again is the part of the blob, one in so many pieces, that is sent a second time: what
	// only one has when all has gone out, and the others wait for.
	again = 6
	// inOrder is among how many pieces that come next for readers a holder chooses.
	inOrder = 2
)

// push is a piece on its way to a peer that has not asked for it.
type push struct {
	left  int // chunks
	since time.Time
}

// offer lets a node that has all of a blob choose, when several want it at once, what it
// sends to whom: pieces that nobody has got yet, to whoever has passed on what it got
// before. So they get different pieces and have them from each other, and the first copy
// of all of it is out after the time that it takes to send it once. It sends without being
// asked: an offer and the request that takes it up would wait in two uplinks that are
// full of pieces.
func (s *swarm) offer() {
	if s.arrival != nil && !s.arrival.Complete() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	askers, fresh := s.askers()
	first := fresh.Count() > 0
	if !first && s.extra < s.shape.pieces/again {
		for i, f := range s.first {
			if f != nil && s.given[i] == 1 {
				fresh.Add(i)
			}
		}
	}
	on := len(askers) > 1 && fresh.Count() > 0
	for _, t := range askers {
		if t.choosing != on {
			t.choosing = on
			t.speak(appendChoose(nil, on))
		}
	}
	if !on {
		return
	}
	for busy := s.busy(askers); busy < inService; {
		t := nextAsker(askers)
		if t == nil {
			return
		}
		i := s.choose(t.lacking(fresh))
		if i < 0 {
			askers = slices.DeleteFunc(askers, func(o *tap) bool { return o == t })
			continue
		}
		busy++
		s.turns++
		t.turn = s.turns
		fresh[i/8] &^= 0x80 >> (i % 8)
		if first {
			t.burden++
			s.first[i] = t
		} else {
			s.extra++
		}
		t.push(i)
	}
}

// askers are those who want something and take what they are sent, and the pieces that
// were given to nobody and that nobody has. mu is held.
func (s *swarm) askers() (askers []*tap, fresh transfer.Bitmap) {
	fresh = transfer.PiecesBitmap(s.shape.pieces)
	for i, n := range s.given {
		if n == 0 {
			fresh.Add(i)
		}
	}
	for t := range s.taps {
		t.mu.Lock()
		for k, b := range t.have {
			fresh[k] &^= b
		}
		if t.takes.Load() && !t.ended && t.have.Count() < s.shape.pieces {
			askers = append(askers, t)
		}
		t.mu.Unlock()
	}
	return askers, fresh
}

// busy counts the pieces that use the uplink. mu is held.
func (s *swarm) busy(askers []*tap) (n int) {
	patience := max(3*s.usual, leastPatience)
	for _, t := range askers {
		t.mu.Lock()
		for _, p := range t.pushes {
			if s.usual == 0 || time.Since(p.since) < patience {
				n++
			}
		}
		t.mu.Unlock()
	}
	return n
}

// nextAsker is whose turn it is: of those to whom nothing is on its way that was chosen,
// the one with the fewest pieces that only it has, and then the one whose turn is longest ago.
func nextAsker(askers []*tap) (best *tap) {
	for _, t := range askers {
		t.mu.Lock()
		free := t.open && len(t.pushes) == 0
		t.mu.Unlock()
		if free && (best == nil || t.burden < best.burden || t.burden == best.burden && t.turn < best.turn) {
			best = t
		}
	}
	return best
}

// lacking are those of the pieces that the peer neither has nor was sent.
func (t *tap) lacking(of transfer.Bitmap) transfer.Bitmap {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := of.Clone()
	for k, b := range t.have {
		out[k] &^= b
	}
	for i := range t.sent {
		out[i/8] &^= 0x80 >> (i % 8)
	}
	return out
}

// choose takes one of the pieces, at random; where readers have asked for one it is one of
// the next after that, for they all get on by what comes in order; -1: there is none. mu is held.
func (s *swarm) choose(of transfer.Bitmap) int {
	start, skip := rand.IntN(len(of)), 0
	if s.asked >= 0 {
		start, skip = s.asked/8, rand.IntN(inOrder)
	}
	best := -1
	for k := range of {
		k = (start + k) % len(of)
		for b := of[k]; b != 0; skip-- {
			bit := bits.LeadingZeros8(b)
			b &^= 0x80 >> bit
			if best = 8*k + bit; skip == 0 {
				return best
			}
		}
	}
	return best
}

// push sends the peer a piece that it has not asked for. swarm.mu is held.
func (t *tap) push(i int) {
	t.s.give(t, i)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.tell(appendPush(nil, i))
	chunks := t.s.shape.chunksOf(i)
	t.pushes[i] = &push{left: len(chunks), since: time.Now()}
	for _, c := range chunks {
		t.asked[c] = true
		t.enqueue(c)
	}
	t.serve()
}

// unpush notes that a chunk of a piece that was chosen will not be sent. t.mu is held.
func (t *tap) unpush(c chunk) {
	p := t.pushes[int(c.piece)]
	if p == nil {
		return
	}
	if p.left--; p.left > 0 {
		return
	}
	delete(t.pushes, int(c.piece))
	t.s.e.wg.Go(func() { t.s.takeBack(t, int(c.piece)) })
}

// takeBack notes that a piece which was chosen for a peer does not go there.
func (s *swarm) takeBack(t *tap, i int) {
	s.mu.Lock()
	t.mu.Lock()
	if _, given := t.sent[i]; given {
		delete(t.sent, i)
		s.given[i]--
	}
	t.mu.Unlock()
	if s.first[i] == t {
		s.first[i] = nil
		t.burden--
	}
	s.mu.Unlock()
	s.offer()
}

// pushDone notes that a chunk has gone out.
func (s *swarm) pushDone(t *tap, c chunk) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.pushes[int(c.piece)]
	if p == nil {
		return
	}
	if p.left--; p.left > 0 {
		return
	}
	delete(t.pushes, int(c.piece))
	took := time.Since(p.since)
	if s.usual == 0 {
		s.usual = took
	}
	// One that waits for a slow receiver does not make slowness usual.
	s.usual += (min(took, 2*s.usual) - s.usual) / 8
}

// passedOn notes that a peer has a piece: whoever got it first has passed it on, if it is
// another one.
func (s *swarm) passedOn(t *tap, piece int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.first[piece]; f != nil && f != t {
		f.burden--
		s.first[piece] = nil
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
