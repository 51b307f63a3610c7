package swarm

import (
	"errors"
	"maps"
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
	// stealAfter is how long a piece may be without progress before an idle holder is
	// asked for it too, and how long a reader waits before a holder that chooses is asked.
	stealAfter = time.Second
	// starvedAfter is how long a fetch takes what comes, when holders choose, before it asks
	// them all the same.
	starvedAfter = 3 * time.Second
	// refusalFor is for how long a peer is not asked again for what it has refused.
	refusalFor = 2 * time.Second
	// keepAlive is how often a peer hears something, or it would hang up.
	keepAlive = time.Minute
)

// state of a piece in a plan.
type state uint8

const (
	missing  state = iota
	checking       // marked by an earlier attempt, to be verified again
	asked
	storing // whole, and on its way to the disk
	held
)

// want is a fetch at work: which piece to take from which peer. Its lock is a leaf but for
// those of taps and the store.
type want struct {
	e     *Engine
	s     *swarm
	a     *transfer.Arrival
	shout func(verdict) // what a peer has done
	stir  func()        // a peer has said how far away the rest is

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
	done    chan struct{}     // closed with the last piece
	moved   time.Time         // when a piece last came
	waits   map[int]time.Time // since when readers wait for a piece
	stores  sync.WaitGroup
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
	window  int
	open    bool      // it may be asked
	since   time.Time // when it was opened or closed
	spoken  time.Time // when it last heard something for certain
	chooses bool      // it chooses what it sends
	spared  bool      // it has chosen: others have what it gave, and are asked first
}

// verdict is what became known of a peer.
type verdict struct {
	peers []string
	why   transfer.Reason
	err   error
}

func newWant(s *swarm, a *transfer.Arrival, shout func(verdict), stir func()) *want {
	n := s.shape.pieces
	w := &want{
		e: s.e, s: s, a: a, shout: shout, stir: stir,
		states: make([]state, n), slotted: make([]bool, n), alone: make([]bool, n), spread: make([]uint16, n),
		asks: make(map[int]*ask), links: make(map[*tap]*link), class: a.Fetch().Class(), done: make(chan struct{}),
		moved: time.Now(), waits: make(map[int]time.Time),
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
// that has everything, window how much it is asked for at first.
func (w *want) join(t *tap, all bool, window int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.over || w.links[t] != nil {
		return
	}
	now := time.Now()
	l := &link{t: t, all: all, have: transfer.PiecesBitmap(len(w.states)), asked: make(map[int]time.Time), refused: make(map[int]time.Time), window: window, since: now, spoken: now}
	w.links[t] = l
	t.speak(appendInterested(appendClass(nil, w.class)))
	w.learn(l)
	l.hear()
	w.assignTo(l)
}

// told notes whether a peer may be asked, and whether it chooses what it sends.
func (w *want) told(t *tap) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if l := w.links[t]; l != nil {
		l.hear()
		w.assignTo(l)
	}
}

// hear takes over what the tap knows of its peer's mind.
func (l *link) hear() {
	l.t.mu.Lock()
	defer l.t.mu.Unlock()
	if l.open != l.t.opened {
		l.open, l.since = l.t.opened, time.Now()
	}
	l.chooses = l.t.chooses
	l.spared = l.spared || l.chooses
}

// pushed takes a piece that a holder sends without having been asked, or says that it is
// not wanted. What another was asked for and has not begun to bring is taken from it.
func (w *want) pushed(t *tap, i int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	l, r := w.links[t], w.asks[i]
	switch {
	case l == nil || r == nil:
	case r.of[0] == l || r.of[1] == l:
		return
	case r.of[1] == nil && !w.s.store.begun(i):
		other := r.of[0]
		other.t.cancel(i)
		w.release(other, i)
	}
	if l == nil || w.over || w.states[i] != missing || !w.slot(i) {
		t.cancel(i)
		return
	}
	w.take(l, i)
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

// offers says whether any peer has what is not here yet.
func (w *want) offers() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range w.links {
		if l.all {
			return true
		}
		for i, is := range w.states {
			if is != held && l.have.Has(i) {
				return true
			}
		}
	}
	return false
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
			w.s.store.drop(i)
			w.free(i)
		}
	}
}

// refusedBy notes that a peer does not send a piece for now.
func (w *want) refusedBy(t *tap, i int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if l := w.links[t]; l != nil {
		t.cancel(i) // the other half
		w.release(l, i)
		l.refused[i] = time.Now()
		w.assignTo(l)
	}
}

// narrow asks a peer for as little at once as may be, from now on, and takes back what it
// has not begun to send: a limit here holds back what it sends, and what was asked for
// comes as fast as the wire lets it.
func (w *want) narrow(t *tap) {
	w.mu.Lock()
	defer w.mu.Unlock()
	l := w.links[t]
	if l == nil || l.window <= minWindow {
		return
	}
	l.window = minWindow
	newest := slices.SortedFunc(maps.Keys(l.asked), func(a, b int) int { return l.asked[b].Compare(l.asked[a]) })
	for _, i := range newest[:max(0, len(newest)-minWindow)] {
		if !t.begun(i) {
			t.cancel(i)
		}
	}
}

// takenBack notes that a peer will not send what it was asked not to send any more.
func (w *want) takenBack(t *tap, i int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if l := w.links[t]; l != nil {
		if _, waits := l.asked[i]; waits {
			w.release(l, i)
			w.assign()
		}
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

// came takes a part of a piece that was asked for.
func (w *want) came(t *tap, c chunk, data []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	i := int(c.piece)
	if w.over || w.states[i] != asked {
		return
	}
	whole := w.s.store.add(t.peer, c, data)
	if whole == nil {
		return
	}
	t.brought.Store(true)
	w.states[i], w.moved = storing, time.Now()
	of := w.asks[i].of
	delete(w.asks, i)
	for _, l := range of {
		if l == nil {
			continue
		}
		took := time.Since(l.asked[i])
		delete(l.asked, i)
		l.t.cancel(i) // what another has not sent of it
		switch {
		case l.window < minWindow || took < aim/2 && l.window < maxWindow:
			l.window++
		case took > 2*aim && l.window > minWindow:
			l.window--
		}
	}
	w.stores.Go(func() { w.keep(i, whole) })
	for _, l := range of {
		if l != nil {
			w.assignTo(l)
		}
	}
}

// keep verifies and stores a piece that has come.
func (w *want) keep(i int, whole *arriving) {
	err := w.a.Store(i, whole.data)
	if err != nil {
		w.refused(i, whole, err)
		w.s.store.drop(i)
		w.again(i)
		return
	}
	for peer, n := range whole.from {
		w.s.e.received(w.s.inFlow(peer), int(n))
	}
	w.s.store.drop(i)
	w.arrived(i)
}

// arrived notes that a piece is held.
func (w *want) arrived(i int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.states[i] == held {
		return
	}
	if w.states[i] == missing {
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
	if w.states[i] != storing {
		return
	}
	w.states[i] = missing
	w.missing++
	w.free(i)
	w.assign()
}

// refused hears that a piece could not be stored: a lie, or this node's own trouble.
func (w *want) refused(i int, a *arriving, err error) {
	w.mu.Lock()
	over := w.over
	w.alone[i] = true // if several had a part in it, nobody can say who lied
	w.mu.Unlock()
	if over {
		return
	}
	peers := make([]string, 0, len(a.from))
	for p := range a.from {
		peers = append(peers, p)
	}
	if !errors.Is(err, transfer.ErrBadPiece) {
		w.shout(verdict{err: err})
		return
	}
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

// end stops the plan, and returns when nothing is stored any more.
func (w *want) end() {
	w.mu.Lock()
	w.over = true
	clear(w.links)
	w.mu.Unlock()
	w.stores.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range w.slotted {
		w.free(i)
	}
}

// tick looks after what time alone changes: pieces that are slow to come, and slots that
// other fetches have freed. It gives the connections that have stalled.
func (w *want) tick(stall time.Duration) (stalled []*tap) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	for t, l := range w.links {
		oldest := now
		for _, since := range l.asked {
			if since.Before(oldest) {
				oldest = since
			}
		}
		if !l.open {
			oldest = l.since
		}
		if now.Sub(oldest) > stall && t.quiet() > stall {
			stalled = append(stalled, t)
		}
		if now.Sub(l.spoken) > keepAlive {
			l.spoken = now
			t.speak(make([]byte, lengthSize))
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
