package stream

import (
	"math/rand/v2"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// maxRun is how many pieces one request may ask for: 2 MiB.
const maxRun = 8

// state of a piece in a plan.
type state uint8

const (
	missing  state = iota
	checking       // marked by an earlier attempt, to be verified again
	asked          // of one holder, or of two when the first is slow
	arrived
)

// request is a piece that was asked for.
type request struct {
	of    [2]*holder // whom; the second may be nil
	since time.Time  // or since the last sign of progress towards it
}

// plan says which piece to ask of whom. The order: what readers wait for, then on
// from a place chosen at random, so that nodes that fetch the same blob at once
// hold different parts of it and can trade them; then, when nothing else is left,
// what another holder has been asked for and is slow to deliver.
type plan struct {
	mu      sync.Mutex
	states  []state
	asks    map[int]*request
	left    int // pieces missing
	from    int // no piece is missing between start and from, going around
	start   int
	workers int
	changed chan struct{} // closed and replaced when a piece is missing again
	steal   time.Duration
}

func newPlan(pieces int, steal time.Duration) *plan {
	p := &plan{
		states:  make([]state, pieces),
		asks:    make(map[int]*request),
		left:    pieces,
		changed: make(chan struct{}),
		steal:   steal,
	}
	if pieces > 0 {
		p.start = rand.IntN(pieces)
	}
	return p
}

// employ counts workers, so that runs are cut for all of them.
func (p *plan) employ(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.workers += n
}

// check sets a marked piece aside until it is verified again.
func (p *plan) check(pieces []int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, i := range pieces {
		if p.states[i] == missing {
			p.states[i] = checking
			p.left--
		}
	}
}

// nextCheck chooses the next piece to verify again, one that a reader waits for if
// there is one.
func (p *plan) nextCheck(urgent, marked []int) (piece int, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, list := range [][]int{urgent, marked} {
		for _, i := range list {
			if p.states[i] == checking {
				return i, true
			}
		}
	}
	return 0, false
}

// isChecking says whether a marked piece still awaits its verification.
func (p *plan) isChecking(i int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.states[i] == checking
}

// pick chooses a run of pieces to ask of a holder and notes them as asked. When
// there is none, wait says after how long there may be one by time alone; 0 means
// only a change will bring one.
func (p *plan) pick(h *holder, urgent []int) (first, n int, wait time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, i := range urgent {
		if p.states[i] == missing && h.has(i) {
			p.ask(h, i)
			return i, 1, 0
		}
	}
	if first, n = p.pickRun(h); n > 0 {
		return first, n, 0
	}
	return p.pickSlow(h)
}

func (p *plan) pickRun(h *holder) (first, n int) {
	total := len(p.states)
	if p.left == 0 {
		return 0, 0
	}
	run := max(1, min(maxRun, p.left/max(1, 2*p.workers)))
	if h.ailing() {
		run = 1 // what breaks off soon is asked for little
	}
	for p.from < total && p.states[p.place(p.from)] != missing {
		p.from++
	}
	for k := p.from; k < total; k++ {
		first = p.place(k)
		if p.states[first] != missing || !h.has(first) {
			continue
		}
		for n < run && first+n < total && p.states[first+n] == missing && h.has(first+n) {
			p.ask(h, first+n)
			n++
		}
		return first, n
	}
	return 0, 0
}

// pickSlow asks a second holder for the piece that has been awaited longest.
func (p *plan) pickSlow(h *holder) (first, n int, wait time.Duration) {
	now := time.Now()
	oldest := -1
	for i, r := range p.asks {
		if r.of[0] == h || r.of[1] != nil || !h.has(i) {
			continue
		}
		if oldest < 0 || r.since.Before(p.asks[oldest].since) {
			oldest = i
		}
	}
	if oldest < 0 {
		return 0, 0, 0
	}
	r := p.asks[oldest]
	if age := now.Sub(r.since); age < p.steal {
		return 0, 0, p.steal - age
	}
	r.of[1] = h
	return oldest, 1, 0
}

func (p *plan) place(k int) int { return (p.start + k) % len(p.states) }

func (p *plan) ask(h *holder, i int) {
	p.states[i] = asked
	p.asks[i] = &request{of: [2]*holder{h, nil}, since: time.Now()}
	p.left--
}

// touch notes progress of a holder towards the pieces first..first+n-1.
func (p *plan) touch(h *holder, first, n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for i := first; i < first+n; i++ {
		if r := p.asks[i]; r != nil && r.of[0] == h {
			r.since = now
		}
	}
}

// arrive notes that a piece is held.
func (p *plan) arrive(i int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.states[i] == missing {
		p.left--
	}
	p.states[i] = arrived
	delete(p.asks, i)
}

// release notes that a holder will not deliver the pieces first..first+n-1.
func (p *plan) release(h *holder, first, n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := first; i < first+n; i++ {
		r := p.asks[i]
		switch {
		case r == nil:
		case r.of[0] == h && r.of[1] != nil:
			r.of = [2]*holder{r.of[1], nil}
		case r.of[0] == h:
			delete(p.asks, i)
			p.miss(i)
		case r.of[1] == h:
			r.of[1] = nil
		}
	}
}

// unmark notes that a marked piece was not right after all.
func (p *plan) unmark(i int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.states[i] == checking {
		p.miss(i)
	}
}

func (p *plan) miss(i int) {
	p.states[i] = missing
	p.left++
	p.from = min(p.from, (i-p.start+len(p.states))%len(p.states))
	p.wakeLocked()
}

// wake makes idle workers look again.
func (p *plan) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wakeLocked()
}

func (p *plan) wakeLocked() {
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *plan) change() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changed
}

// holder is a peer that answered that it holds the blob, whole or in part.
type holder struct {
	peer   transfer.Peer
	cancel func() // ends all work with it

	mu       sync.Mutex
	complete bool
	have     transfer.Bitmap // when not complete; replaced, never changed
	strikes  int             // failures since it last delivered
	epoch    int             // counts failures
	dropped  *failure
}

// has says whether the holder can be asked for the piece.
func (h *holder) has(piece int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.complete || h.have.Has(piece)
}

func (h *holder) isComplete() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.complete
}

// update notes what the holder says it has; nil means everything.
func (h *holder) update(have transfer.Bitmap) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.complete, h.have = have == nil, have
}

// delivered forgives earlier failures.
func (h *holder) delivered() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.strikes = 0
}

// era is what a request takes note of before it starts.
func (h *holder) era() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.epoch
}

// strike counts a failure of weight n and gives what has come together since the
// holder last delivered. Requests of the same era that fail together, as they do
// when a connection breaks or a node restarts, count as one.
func (h *holder) strike(era, n int) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	if era == h.epoch {
		h.epoch++
		h.strikes += n
	}
	return h.strikes
}

// ailing says whether it has failed since it last delivered.
func (h *holder) ailing() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.strikes > 0
}

// drop ends all work with the holder; the first reason counts.
func (h *holder) drop(why *failure) {
	h.mu.Lock()
	if h.dropped == nil {
		h.dropped = why
	}
	h.mu.Unlock()
	h.cancel()
}

// fate is why it was dropped; nil when it was not.
func (h *holder) fate() *failure {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.dropped
}
