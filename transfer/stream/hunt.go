package stream

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/plan"
)

const (
	// maxAsked candidates take part in one fetch; more would not make it faster. Of more
	// the first so many are asked, and others at random.
	maxAsked   = 64
	firstAsked = 16
	// maxStrikes failures in a row that are nobody's lie before a holder is dropped.
	maxStrikes = 4
	// urgentWindow is how many pieces a reader gets ahead of the rest.
	urgentWindow = 2
	// lookAgain is how often the planner is asked whether time alone changes anything.
	lookAgain = 100 * time.Millisecond
	// signOfLife is how often holders say that they are there; those beyond a slow link say it
	// seldom, for nobody is elected among them.
	signOfLife, farSign = 150 * time.Millisecond, 500 * time.Millisecond
	// silence after which a node of this site does not count where one is elected. The next one
	// is to have the next piece within two seconds, half of which that piece takes.
	silence = 5 * signOfLife
	// byeTimeout bounds how long holders may take to end their sessions.
	byeTimeout = 2 * time.Second
)

// hunt is one fetch at work: it finds holders and trades with them until the blob is
// here. One goroutine (run) owns the fields at the end; what mu guards is everybody's.
//
// Lock order: mu before the arrival's and the links'; the desk's never with mu.
type hunt struct {
	e     *Engine
	fl    *flight
	a     *transfer.Arrival
	blob  transfer.Blob
	whole *whole // instead of want when there is no root
	began time.Time

	mu         sync.Mutex
	want       *plan.Want
	dealing    []*holder
	class      transfer.Class
	ready      bool  // the piece table is known
	set        []int // pieces that an earlier attempt marked, to be verified again
	tableOf    *holder
	tableSince time.Time

	// turn is held by the one holder that sends a blob without a root.
	turn    chan struct{}
	learned sync.Once
	// finished is closed once all bytes are here.
	finished chan struct{}
	finish   sync.Once

	answers chan reply
	drops   chan *holder
	fatal   chan error
	stirred chan struct{} // a holder has said how far away the rest is
	marked  chan []int    // pieces to verify again, once
	checked chan struct{}
	wg      sync.WaitGroup

	checking bool                   // recheck runs
	asking   map[transfer.Peer]bool // true: whom it does not know yet
	stale    bool                   // a holder was dropped since candidates were last asked
	reach    int                    // how far away candidates are asked
	active   map[transfer.Peer]*holder
	reserve  []reply
	asked    transfer.NoHolderError // whom, and what came of it
	banned   map[transfer.Peer]bool
	absent   map[transfer.Peer]*absent
	most     int64     // how far the fetch had come when it last advanced
	advanced time.Time // when that was
}

// reply is a candidate's answer; the link is that of the session which it began.
type reply struct {
	peer  transfer.Peer
	link  *link
	state state
	words words
	err   error
}

func newHunt(e *Engine, fl *flight) *hunt {
	blob := fl.arrival.Fetch().Blob()
	h := &hunt{
		e: e, fl: fl, a: fl.arrival, blob: blob, began: time.Now(), class: fl.urgency(),
		turn:     make(chan struct{}, 1),
		finished: make(chan struct{}),
		answers:  make(chan reply),
		drops:    make(chan *holder),
		fatal:    make(chan error, 1),
		stirred:  make(chan struct{}, 1),
		marked:   make(chan []int, 1),
		checked:  make(chan struct{}, 1),
		asking:   make(map[transfer.Peer]bool),
		active:   make(map[transfer.Peer]*holder),
		asked:    transfer.NoHolderError{Digest: blob.Digest},
		banned:   make(map[transfer.Peer]bool),
		absent:   make(map[transfer.Peer]*absent),
		advanced: time.Now(),
	}
	if e.cfg.Distance == nil {
		h.reach = Farthest
	}
	if blob.Root == nil {
		h.whole = newWhole(blob)
	} else {
		h.want = plan.NewWant(transfer.Pieces(blob.Size), plan.Rules{}, rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())))
		h.set = h.a.Marked()
		h.want.SetAside(h.set)
		h.want.Cursors(h.a.Urgent(urgentWindow))
	}
	return h
}

func (h *hunt) now() time.Duration { return time.Since(h.began) }

func (h *hunt) isFinished() bool {
	select {
	case <-h.finished:
		return true
	default:
		return false
	}
}

func (h *hunt) hello(to transfer.Peer) hello {
	patience := signOfLife
	if h.e.distance(to) == Farthest {
		patience = farSign
	}
	return hello{
		digest: h.blob.Digest, size: h.blob.Size, class: h.fl.urgency(),
		patience: min(patience, h.e.cfg.StallTimeout/4),
	}
}

// run returns nil once every byte is here and verified.
func (h *hunt) run(ctx context.Context) error {
	if h.blob.Size == 0 {
		return nil // Commit verifies the digest
	}
	work, cancel := context.WithCancel(ctx)
	err := h.seek(work)
	if err != nil {
		cancel()
		h.wg.Wait()
		for _, r := range h.reserve {
			r.link.close()
		}
		return err
	}
	// The blob does not wait for holders to say bye.
	part := func(ctx context.Context) {
		defer cancel()
		timer := time.AfterFunc(byeTimeout, cancel)
		defer timer.Stop()
		stop := context.AfterFunc(ctx, cancel)
		defer stop()
		h.wg.Wait()
	}
	h.part()
	select {
	case h.e.starts <- part:
	case <-ctx.Done():
		cancel()
		h.wg.Wait()
	}
	return nil
}

// part ends all sessions.
func (h *hunt) part() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, hd := range h.dealing {
		if hd.link != nil {
			h.e.links.part(hd.peer, hd.link)
			hd.link = nil // the next session may have it by now
		}
	}
	for _, r := range h.reserve {
		h.e.release(r.peer, r.link, h.blob.Size)
	}
	h.reserve = nil
}

// seek finds holders until the blob is here.
func (h *hunt) seek(ctx context.Context) error {
	if t, ok := transfer.SinglePiece(h.blob); ok {
		h.learn(t)
	}
	again := time.NewTicker(h.e.cfg.AskAgain)
	defer again.Stop()
	idle := time.NewTimer(h.e.cfg.IdleTimeout)
	defer idle.Stop()
	look := time.NewTicker(lookAgain)
	defer look.Stop()
	held := int64(0)
	if h.want != nil {
		h.wg.Go(func() { h.followReaders(ctx) })
	}
	h.ask(ctx, true)
	for {
		if h.isFinished() { // first of all: the last holder may have left after its last piece
			return nil
		}
		if len(h.asking) == 0 && h.reach < Farthest && !h.someComplete() {
			h.reach++
			h.ask(ctx, true)
			continue
		}
		h.admitReserve(ctx)
		hops := h.hops()
		h.a.SetHops(hops)
		if hops >= transfer.NoHops && len(h.asking) == 0 {
			if h.stale {
				h.ask(ctx, false)
				continue
			}
			return h.forsaken()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-h.finished:
			return nil
		case err := <-h.fatal:
			return err
		case r := <-h.answers:
			delete(h.asking, r.peer)
			h.heard(ctx, r)
		case hd := <-h.drops:
			h.lost(ctx, hd)
		case id := <-h.fl.news:
			h.announced(ctx, id)
		case marked := <-h.marked:
			h.checking = true
			h.wg.Go(func() { h.recheck(ctx, marked) })
		case <-h.checked:
			h.checking = false
		case <-h.stirred:
		case <-look.C:
			h.look()
			h.recall(ctx)
		case <-again.C:
			if len(h.asking) == 0 {
				h.ask(ctx, false)
			}
		case <-idle.C:
			now := h.a.Fetch().Progress().Held
			if now == held && !h.someComplete() && !h.expects() {
				return h.forsaken()
			}
			held = now
			idle.Reset(h.e.cfg.IdleTimeout)
		}
	}
}

// look does what time alone may change.
func (h *hunt) look() {
	if h.whole != nil {
		return
	}
	h.mu.Lock()
	h.electLocked()
	if c := h.fl.urgency(); c != h.class {
		h.class = c
		for _, hd := range h.dealing {
			if hd.link != nil {
				transfer.Mark(hd.link.conn, c)
				hd.link.send(func(to []byte) []byte { return frame(to, kindClass, byte(c)) })
			}
		}
	}
	h.mu.Unlock()
	h.pump()
}

// electLocked decides whether this node asks beyond a slow link: it does unless others
// of its site fetch the blob too and another one of them is elected. Who gives no sign
// of life is not counted. mu is held.
func (h *hunt) electLocked() {
	if h.want == nil || h.e.cfg.Self == "" {
		return
	}
	near := []string{h.e.cfg.Self}
	for _, hd := range h.dealing {
		if !hd.far && !hd.complete && hd.link != nil && time.Since(hd.heard) < silence {
			near = append(near, hd.peer.ID)
		}
	}
	h.cancel(h.want.Elect(plan.Elect(h.blob.Digest.String(), near) == h.e.cfg.Self))
}

// followReaders keeps the planner up to date with what readers wait for.
func (h *hunt) followReaders(ctx context.Context) {
	var last []int
	for ctx.Err() == nil && !h.isFinished() {
		changed := h.a.Changed()
		if urgent := h.a.Urgent(urgentWindow); !slices.Equal(urgent, last) {
			last = urgent
			h.mu.Lock()
			h.want.Cursors(urgent)
			h.mu.Unlock()
			h.pump()
		}
		select {
		case <-changed:
		case <-h.finished:
		case <-ctx.Done():
		}
	}
}

// Farthest is the largest Distance.
const Farthest = 2

func (e *Engine) distance(p transfer.Peer) int {
	if e.cfg.Distance == nil {
		return 0
	}
	return min(max(e.cfg.Distance(p), 0), Farthest)
}

// heard takes a candidate's answer.
func (h *hunt) heard(ctx context.Context, r reply) {
	h.asked.Heard(r.peer, r.err)
	if r.err != nil {
		var f *failure
		if !errors.As(r.err, &f) {
			return
		}
		switch {
		case f.why.Lie():
			h.ban(r.peer, f)
		case errors.Is(f, errBusy), f.why != Gone && h.absent[r.peer] != nil:
			h.away(r.peer, f)
		case f.why == Gone:
			delete(h.absent, r.peer)
		}
		return
	}
	delete(h.absent, r.peer)
	// One that holds everything takes part however many do that do not.
	if !h.room() && (r.state.held != heldComplete || h.someComplete()) {
		h.reserve = append(h.reserve, r)
		return
	}
	h.engage(ctx, r)
}

// engage puts a holder to work.
func (h *hunt) engage(ctx context.Context, r reply) {
	hd := &holder{
		peer: r.peer, complete: r.state.held == heldComplete, words: r.words,
		far: h.e.cfg.Distance != nil && h.e.distance(r.peer) == Farthest,
	}
	h.active[hd.peer] = hd
	h.mu.Lock()
	h.dealing = append(h.dealing, hd)
	h.mu.Unlock()
	h.wg.Go(func() {
		h.deal(ctx, hd, r.link, r.state)
		if h.fate(hd) == nil {
			return
		}
		select {
		case h.drops <- hd:
		case <-h.finished:
		case <-ctx.Done():
		}
	})
}

func (h *hunt) fate(hd *holder) *failure {
	h.mu.Lock()
	defer h.mu.Unlock()
	return hd.dropped
}

// lost ends a holder's part in the fetch and lets a reserve take its place.
func (h *hunt) lost(ctx context.Context, hd *holder) {
	delete(h.active, hd.peer)
	h.mu.Lock()
	h.dealing = slices.DeleteFunc(h.dealing, func(o *holder) bool { return o == hd })
	if hd.planned != nil {
		h.want.Leave(hd.planned)
	}
	for _, beside := range h.dealing {
		if beside.main == hd && beside.link != nil {
			beside.link.close()
		}
	}
	h.electLocked()
	why := hd.dropped
	h.mu.Unlock()
	h.asked.Heard(hd.peer, why)
	h.stale = true
	if why.away || errors.Is(why, errBusy) {
		h.dropped(hd.peer, why)
		h.away(hd.peer, why)
	} else {
		h.ban(hd.peer, why)
	}
	h.pump()
}

// ban keeps a peer out of this fetch and reports it.
func (h *hunt) ban(p transfer.Peer, f *failure) {
	h.banned[p] = true
	delete(h.absent, p)
	h.dropped(p, f)
}

// dropped reports that a peer takes no part any more, for good or until it is back.
func (h *hunt) dropped(p transfer.Peer, f *failure) {
	log := h.e.log.Info
	if f.why.Lie() {
		log = h.e.log.Warn
	}
	log("peer dropped for a blob", "peer", p.ID, "addr", p.Addr, "blob", h.blob.Digest, "why", string(f.why), "err", f.err)
	if h.e.cfg.Hooks.Dropped != nil {
		h.e.cfg.Hooks.Dropped(p.ID, h.blob.Digest, f.why)
	}
}

func (h *hunt) someComplete() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.ContainsFunc(h.dealing, func(hd *holder) bool { return hd.complete })
}

// forsaken is the error that names everybody who was asked.
func (h *hunt) forsaken() error { return h.asked.Final(errNoProgress) }

// learn takes the piece table, which has been verified; by it the pieces that an earlier
// attempt marked can be verified again.
func (h *hunt) learn(t transfer.PieceTable) {
	h.learned.Do(func() {
		if _, err := h.a.SetTable(t); err != nil {
			h.die(err)
			return
		}
		h.mu.Lock()
		h.ready = true
		h.mu.Unlock()
		h.marked <- h.set
	})
}

// recheck verifies pieces that an earlier attempt marked, those first that readers
// wait for.
func (h *hunt) recheck(ctx context.Context, marked []int) {
	defer func() { h.checked <- struct{}{} }()
	buf, err := h.e.buffers.take(ctx)
	if err != nil {
		return
	}
	defer h.e.buffers.give(buf)
	waiting := make(map[int]bool, len(marked))
	for _, i := range marked {
		waiting[i] = true
	}
	for ctx.Err() == nil && len(waiting) > 0 {
		i := -1
		for _, u := range h.a.Urgent(urgentWindow) {
			if waiting[u] {
				i = u
				break
			}
		}
		if i < 0 {
			i, marked = marked[0], marked[1:]
			if !waiting[i] {
				continue
			}
		}
		delete(waiting, i)
		if h.a.Recheck(i, buf) {
			h.arrived(nil, i)
			continue
		}
		h.mu.Lock()
		h.want.PutBack(i)
		h.mu.Unlock()
		h.pump()
	}
}

// die ends the fetch with an error that is nobody's but this node's.
func (h *hunt) die(err error) {
	select {
	case h.fatal <- err:
	default:
	}
}
