package swarm

import (
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

const (
	// urgentWindow is how many pieces a reader gets ahead of the rest.
	urgentWindow = 2
	// A peer is asked for as many pieces at once as it brings within about aim: fewer
	// leave the wire idle, more wait in its queue while others could have brought
	// them. It begins with firstWindow.
	aim         = 300 * time.Millisecond
	minWindow   = 2
	firstWindow = 4
	maxWindow   = 32
	// sample bounds how many missing pieces are looked at for one choice.
	sample = 2048
	// choosing is for how long after an offer the holder is left to choose.
	choosing = time.Second
	// refusalFor is for how long a peer is not asked again for what it has refused.
	refusalFor = 2 * time.Second
	// nudge is when the library is told again of a piece that it does not ask for.
	nudge = 250 * time.Millisecond
)

// state of a piece in a plan.
type state uint8

const (
	missing  state = iota
	checking       // marked by an earlier attempt, to be verified again
	asked
	held
)

// want is a fetch at work: which piece to take from which peer. What is decided is
// shown to the library by the tap of that peer, and the library asks for it. Its lock
// is a leaf but for those of taps.
type want struct {
	e     *Engine
	s     *swarm
	a     *transfer.Arrival
	shout func(verdict) // what a peer has done

	mu      sync.Mutex
	states  []state
	slotted []bool   // has one of the places for pieces
	alone   []bool   // is taken from one peer at a time
	spread  []uint16 // how many peers that do not have all have it
	missing int
	asks    map[int]*ask
	links   map[*tap]*link
	class   transfer.Class // as the peers know it
	over    bool
	done    chan struct{} // closed with the last piece
}

// ask is a piece that was asked for: of whom, the second when the first is slow, and
// since when.
type ask struct {
	of    [2]*link
	since time.Time
}

// link is a connection as the plan sees it.
type link struct {
	t       *tap
	have    transfer.Bitmap
	all     bool
	asked   map[int]time.Time // since when
	refused map[int]time.Time // not to be asked again at once
	offers  []int
	offered time.Time // the last one
	window  int
}

// verdict is what became known of a peer.
type verdict struct {
	peers []string
	why   transfer.Reason
	err   error
}

func newWant(s *swarm, a *transfer.Arrival, shout func(verdict)) *want {
	n := s.shape.pieces
	w := &want{
		e: s.e, s: s, a: a, shout: shout,
		states: make([]state, n), slotted: make([]bool, n), alone: make([]bool, n), spread: make([]uint16, n),
		asks: make(map[int]*ask), links: make(map[*tap]*link), class: a.Fetch().Class(), done: make(chan struct{}),
	}
	for i := range w.states {
		if a.Holds(i) {
			w.states[i] = held
		} else {
			w.missing++
		}
	}
	if a.Complete() {
		close(w.done)
	}
	return w
}

// join takes a connection into the plan; all says that its peer has said hello as one
// that has everything.
func (w *want) join(t *tap, all bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.over || w.links[t] != nil {
		return
	}
	l := &link{t: t, all: all, have: transfer.PiecesBitmap(len(w.states)), asked: make(map[int]time.Time), refused: make(map[int]time.Time), window: minWindow}
	if all {
		l.window = firstWindow
	}
	w.links[t] = l
	t.speak(appendClass(nil, w.class))
	w.learn(l)
	w.assign()
}

// learn takes over what the tap knows of its peer's pieces. mu is held.
func (w *want) learn(l *link) {
	if l.all {
		return
	}
	l.t.mu.Lock()
	defer l.t.mu.Unlock()
	for i := range w.states {
		if l.t.have.Has(i) && !l.have.Has(i) {
			l.have.Add(i)
			w.spread[i]++
		}
	}
}

func (w *want) has(t *tap, piece int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	l := w.links[t]
	if l == nil || l.all || l.have.Has(piece) {
		return
	}
	l.have.Add(piece)
	w.spread[piece]++
	if w.states[piece] == missing {
		w.assignTo(l)
	}
}

func (w *want) hasSome(t *tap) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if l := w.links[t]; l != nil {
		w.learn(l)
		w.assignTo(l)
	}
}

func (w *want) offered(t *tap, piece int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	l := w.links[t]
	if l == nil || len(l.offers) > maxWindow {
		return
	}
	l.offered = time.Now()
	l.offers = append(l.offers, piece)
	w.assignTo(l)
}

// left takes a connection out; what was asked of it is missing again.
func (w *want) left(t *tap) {
	w.mu.Lock()
	defer w.mu.Unlock()
	l := w.links[t]
	if l == nil {
		return
	}
	delete(w.links, t)
	for i := range w.states {
		if !l.all && l.have.Has(i) {
			w.spread[i]--
		}
	}
	for i := range l.asked {
		w.release(l, i)
	}
	w.assign()
}

// release notes that a peer will not bring a piece. mu is held.
func (w *want) release(l *link, i int) {
	delete(l.asked, i)
	r := w.asks[i]
	if r == nil {
		return
	}
	if r.of[0] == l {
		r.of[0], r.of[1] = r.of[1], nil
	}
	if r.of[1] == l {
		r.of[1] = nil
	}
	if r.of[0] == nil {
		delete(w.asks, i)
		if w.states[i] == asked {
			w.states[i] = missing
			w.missing++
			// Half of it may be here: whoever brings it next brings all of it.
			w.s.store.forget(i)
			w.free(i)
		}
	}
}

// refusedBy notes that a peer does not send a piece for now.
func (w *want) refusedBy(t *tap, i int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if l := w.links[t]; l != nil {
		w.release(l, i)
		l.refused[i] = time.Now()
		// To the library the peer has what it is asked for and nothing else; else it
		// would ask for the same again, before all others.
		has := transfer.PiecesBitmap(len(w.states))
		for j := range l.asked {
			has.Add(j)
		}
		t.put(appendBitfield(nil, has))
		w.fill(l, w.a.Urgent(urgentWindow))
	}
}

// narrow asks a peer for as little at once as may be, from now on: a limit here holds
// back what it sends, and what was asked for comes as fast as the wire lets it.
func (w *want) narrow(t *tap) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if l := w.links[t]; l != nil {
		l.window = minWindow
	}
}

// check sets marked pieces aside until they are verified again.
func (w *want) check(pieces []int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, i := range pieces {
		if w.states[i] == missing {
			w.states[i] = checking
			w.missing--
		}
	}
}

// nextCheck chooses the next piece to verify again, one that a reader waits for if
// there is one; marked loses those that need none any more.
func (w *want) nextCheck(urgent []int, marked *[]int) (piece int, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, i := range urgent {
		if w.states[i] == checking {
			return i, true
		}
	}
	for len(*marked) > 0 && w.states[(*marked)[0]] != checking {
		*marked = (*marked)[1:]
	}
	if len(*marked) == 0 {
		return 0, false
	}
	return (*marked)[0], true
}

// look assigns anew: readers may have moved.
func (w *want) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.assign()
}

// checked says what came of a marked piece.
func (w *want) checked(i int, right bool) {
	w.mu.Lock()
	if w.states[i] != checking {
		w.mu.Unlock()
		return
	}
	w.states[i] = missing
	w.missing++
	if !right {
		w.assign()
		w.mu.Unlock()
		return
	}
	w.mu.Unlock()
	w.arrived(i)
}

// arrived notes that a piece is held.
func (w *want) arrived(i int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.states[i] == held {
		return
	}
	if r := w.asks[i]; r != nil {
		for _, l := range r.of {
			if l == nil {
				continue
			}
			took := time.Since(l.asked[i])
			delete(l.asked, i)
			switch {
			case took < aim/2 && l.window < maxWindow:
				l.window++
			case took > 2*aim && l.window > minWindow:
				l.window--
			}
		}
		delete(w.asks, i)
	} else if w.states[i] == missing {
		w.missing--
	}
	w.states[i] = held
	w.free(i)
	if w.a.Complete() && !w.over {
		select {
		case <-w.done:
		default:
			close(w.done)
		}
	}
	w.assign()
}

// again notes that a piece that was put together was not right: it is missing.
func (w *want) again(i int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.states[i] != asked {
		return
	}
	for l := range w.of(i) {
		w.release(l, i)
	}
	w.free(i)
	w.assign()
}

func (w *want) of(i int) map[*link]struct{} {
	out := make(map[*link]struct{}, 2)
	if r := w.asks[i]; r != nil {
		for _, l := range r.of {
			if l != nil {
				out[l] = struct{}{}
			}
		}
	}
	return out
}

// refused hears that a piece could not be stored: a lie, or this node's own trouble.
func (w *want) refused(i int, a *arriving, err error) {
	peers := make([]string, 0, len(a.from))
	for p := range a.from {
		peers = append(peers, p)
	}
	if !errors.Is(err, transfer.ErrBadPiece) {
		w.shout(verdict{err: err})
		return
	}
	w.mu.Lock()
	w.alone[i] = true // if several had a part in it, nobody can say who lied
	w.mu.Unlock()
	w.shout(verdict{peers: peers, why: transfer.BadPiece, err: err})
}

// free gives a piece's slot back. mu is held.
func (w *want) free(i int) {
	if w.slotted[i] {
		w.slotted[i] = false
		w.e.cfg.Pieces.Give()
	}
}

// slot gets one for a piece that has none. mu is held.
func (w *want) slot(i int) bool {
	if w.slotted[i] {
		return true
	}
	w.slotted[i] = w.e.cfg.Pieces.Try()
	return w.slotted[i]
}

// end stops the plan.
func (w *want) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.over = true
	clear(w.links)
	for i := range w.slotted {
		w.free(i)
	}
}

// tick looks after what time alone changes: pieces that are slow to come, pieces that
// the library has not asked for, slots that other fetches have freed. It gives the
// connections that have stalled: none while this node's own disk takes a piece, for
// nothing more is read then.
func (w *want) tick(stall time.Duration) (stalled []*tap) {
	w.mu.Lock()
	defer w.mu.Unlock()
	disk := w.s.storing.Load() > 0
	for t, l := range w.links {
		if len(l.asked) == 0 {
			continue
		}
		if disk {
			t.touch()
		}
		var oldest time.Time
		var again []byte
		for i, since := range l.asked {
			if oldest.IsZero() || since.Before(oldest) {
				oldest = since
			}
			if time.Since(since) > nudge && !t.asksFor(i) {
				again = appendSuggest(again, i)
			}
		}
		if time.Since(oldest) > stall && t.quiet() > stall {
			stalled = append(stalled, t)
			continue
		}
		if len(again) > 0 {
			t.put(again)
		}
	}
	if class := w.a.Fetch().Class(); class != w.class {
		w.class = class
		for t := range w.links {
			t.speak(appendClass(nil, class))
		}
	}
	w.assign()
	return stalled
}

// assign gives every peer something to bring. mu is held.
func (w *want) assign() {
	if w.over || w.missing == 0 && len(w.asks) == 0 {
		return
	}
	urgent := w.a.Urgent(urgentWindow)
	for _, l := range w.links {
		w.fill(l, urgent)
	}
}

func (w *want) assignTo(l *link) {
	if !w.over {
		w.fill(l, w.a.Urgent(urgentWindow))
	}
}

// fill asks a peer for as much as fits its window.
func (w *want) fill(l *link, urgent []int) {
	var show []byte
	var pieces []int
	for len(l.asked) < l.window {
		i := w.pick(l, urgent)
		if i < 0 || !w.slot(i) {
			break
		}
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
		show, pieces = appendSuggest(appendHave(show, i), i), append(pieces, i)
	}
	if len(show) > 0 {
		l.t.put(show, pieces...)
	}
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

// pick chooses a piece to ask of a peer: what readers wait for, what the peer offers,
// what the fewest others have, what another is slow to bring; -1: none.
func (w *want) pick(l *link, urgent []int) int {
	for _, i := range urgent {
		if w.states[i] == missing && l.has(i) {
			return i
		}
	}
	for len(l.offers) > 0 {
		i := l.offers[0]
		l.offers = l.offers[1:]
		if w.states[i] == missing && l.has(i) {
			return i
		}
	}
	if w.missing > 0 && time.Since(l.offered) > choosing {
		if i := w.rarest(l); i >= 0 {
			return i
		}
	}
	if w.missing == 0 || slices.ContainsFunc(urgent, func(i int) bool { return w.states[i] == asked }) {
		return w.slow(l, urgent)
	}
	return -1
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
// one that a reader waits for unless nothing else is missing.
func (w *want) slow(l *link, urgent []int) int {
	best := -1
	for i, r := range w.asks {
		if r.of[0] == l || r.of[1] != nil || w.alone[i] || !l.has(i) || time.Since(r.since) < stealAfter ||
			w.missing > 0 && !slices.Contains(urgent, i) {
			continue
		}
		if best < 0 || r.since.Before(w.asks[best].since) {
			best = i
		}
	}
	return best
}

// asksFor says whether the library has asked the peer for a part of the piece and not
// got it yet.
func (t *tap) asksFor(i int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for c := range t.asks {
		if int(c.piece) == i {
			return true
		}
	}
	return false
}
