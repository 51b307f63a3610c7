package swarm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

const (
	// maxCandidates take part in one fetch; more would not make it faster.
	maxCandidates = 64
	// maxStrikes failures in a row that are nobody's lie before a holder is dropped; a
	// stall counts as two.
	maxStrikes = 4
	tickEvery  = 250 * time.Millisecond
)

var (
	errOtherPeer  = errors.New("another node answers at the peer's address")
	errNoProgress = errors.New("still fetching it itself, and offers nothing new")
	errLinked     = errors.New("it has opened a connection for this blob itself")
	errNoService  = errors.New("the node does not speak BitTorrent")
)

// hunt is one fetch at work: it finds holders and keeps connections to them until the
// blob is here. One goroutine (run) owns the fields; the others talk to it by channels.
type hunt struct {
	e    *Engine
	a    *transfer.Arrival
	blob transfer.Blob

	turn    chan struct{} // held by who asks for the piece table
	known   chan struct{} // closed once there is one
	learned sync.Once
	s       *swarm // set before known is closed
	w       *want

	answers  chan reply
	drops    chan drop
	verdicts chan verdict
	fatal    chan error
	stirred  chan struct{} // a peer has said how far away the rest is
	marked   chan []int
	checked  chan struct{}
	wg       sync.WaitGroup

	checking bool
	asking   int
	looking  int  // of those, whom it does not know yet
	stale    bool // a holder was dropped since candidates were last asked
	lacking  bool // a candidate does not know the service
	reach    int  // how far away candidates are asked
	active   map[transfer.Peer]*holder
	asked    transfer.NoHolderError // whom, and what came of it
	banned   map[string]bool        // by node id
}

// holder is a peer that answered that it has the blob, whole or in part.
type holder struct {
	peer   transfer.Peer
	all    atomic.Bool
	cancel func()
	hops   atomic.Int32 // of its own fetch, as it says

	mu      sync.Mutex
	dropped *failure
}

func (h *holder) drop(why *failure) {
	h.mu.Lock()
	if h.dropped == nil {
		h.dropped = why
	}
	h.mu.Unlock()
	h.cancel()
}

func (h *holder) fate() *failure {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.dropped
}

type reply struct {
	peer  transfer.Peer
	conn  net.Conn
	all   bool
	err   error
	fresh bool // it was not known before
}

type drop struct {
	h   *holder
	why *failure
}

// Carry implements transfer.Carrier.
func (e *Engine) Carry(ctx context.Context, a *transfer.Arrival) error {
	blob := a.Fetch().Blob()
	if blob.Root == nil {
		return fmt.Errorf("%w: it has no trusted root", transfer.ErrNotCarried)
	}
	if blob.Size == 0 {
		return nil // Commit verifies the digest
	}
	select {
	case <-e.started:
	case <-ctx.Done():
		return ctx.Err()
	}
	h := &hunt{
		e: e, a: a, blob: blob,
		turn: make(chan struct{}, 1), known: make(chan struct{}),
		answers: make(chan reply), drops: make(chan drop), verdicts: make(chan verdict, 64),
		fatal: make(chan error, 1), stirred: make(chan struct{}, 1), marked: make(chan []int, 1), checked: make(chan struct{}, 1),
		active: make(map[transfer.Peer]*holder), asked: transfer.NoHolderError{Digest: blob.Digest}, banned: make(map[string]bool),
	}
	if e.cfg.Distance == nil {
		h.reach = Farthest
	}
	return h.run(ctx)
}

// run returns nil once every piece is here.
func (h *hunt) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer h.end()
	defer h.wg.Wait()
	defer cancel()
	if t, ok := transfer.SinglePiece(h.blob); ok {
		h.learn(t)
	}
	again := time.NewTicker(h.e.cfg.AskAgain)
	defer again.Stop()
	idle := time.NewTimer(h.e.cfg.IdleTimeout)
	defer idle.Stop()
	tick := time.NewTicker(min(tickEvery, max(time.Millisecond, h.e.cfg.StallTimeout/4)))
	defer tick.Stop()
	before := int64(0)
	h.ask(ctx)
	for {
		if h.finished() {
			return nil
		}
		if done, err := h.forsaken(ctx); done {
			return err
		}
		changed := h.a.Changed()
		if h.ready() {
			h.w.look()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-h.complete():
		case err := <-h.fatal:
			return err
		case r := <-h.answers:
			h.asking--
			if r.fresh {
				h.looking--
			}
			h.heard(ctx, r)
		case d := <-h.drops:
			h.lost(d)
		case v := <-h.verdicts:
			if v.peers == nil {
				return v.err
			}
			h.judgeLie(v)
		case marked := <-h.marked:
			h.checking = true
			h.wg.Go(func() { h.recheck(ctx, marked) })
		case <-h.checked:
			h.checking = false
		case <-changed:
		case <-h.stirred:
		case <-tick.C:
			h.tick()
		case <-again.C:
			if h.asking == 0 {
				h.ask(ctx)
			}
		case <-idle.C:
			now := h.a.Fetch().Progress().Held
			if now == before && !h.someComplete() {
				return h.nobody()
			}
			before = now
			idle.Reset(h.e.cfg.IdleTimeout)
		}
	}
}

// end gives up what the fetch has used. Others may go on to use the torrent, unless
// pieces are left half done in it.
func (h *hunt) end() {
	if !h.ready() {
		return
	}
	h.w.end() // nothing is stored any more
	h.s.want.CompareAndSwap(h.w, nil)
	for _, t := range h.s.all() {
		if t.outgoing {
			t.end(errLeft)
		}
	}
	if !h.a.Complete() {
		h.e.abandon(h.s)
	}
	h.e.leave(h.s)
}

func (h *hunt) complete() <-chan struct{} {
	if h.ready() {
		return h.w.done
	}
	return nil
}

func (h *hunt) finished() bool {
	select {
	case <-h.complete():
		return true
	default:
		return false
	}
}

// forsaken says whether nobody is left who could bring the rest, and asks farther away
// and again before it says so.
func (h *hunt) forsaken(ctx context.Context) (bool, error) {
	hops := h.hops()
	h.a.SetHops(hops)
	if h.asking > 0 {
		return false, nil
	}
	if h.reach < Farthest && !h.someComplete() {
		h.reach++
		h.ask(ctx)
		return false, nil
	}
	if hops < transfer.NoHops {
		return false, nil
	}
	if h.stale {
		h.ask(ctx)
		return false, nil
	}
	return true, h.nobody()
}

// hops is how far away the rest of the blob is: see transfer.Arrival.Hops.
func (h *hunt) hops() int {
	if h.looking > 0 || h.checking || len(h.marked) > 0 || h.someComplete() || h.ready() && h.w.offers() {
		return 0
	}
	least := transfer.NoHops
	for _, hd := range h.active {
		least = min(least, int(hd.hops.Load())+1)
	}
	if h.ready() {
		for _, t := range h.s.all() {
			if !t.outgoing && !h.banned[t.peer] {
				least = min(least, int(t.hops.Load())+1)
			}
		}
	}
	return least
}

// stir has the fetch look again how far away the rest is.
func (h *hunt) stir() {
	select {
	case h.stirred <- struct{}{}:
	default:
	}
}

// room says whether the fetch may take in another holder. Those that will bring nothing
// take no place.
func (h *hunt) room() bool {
	n := 0
	for _, hd := range h.active {
		if hd.all.Load() || hd.hops.Load() < transfer.NoHops {
			n++
		}
	}
	return n < h.e.cfg.Holders()
}

// ask asks every candidate that is not a holder already.
func (h *hunt) ask(ctx context.Context) {
	h.stale = false
	candidates := h.e.cfg.Peers.Candidates(ctx, h.blob.Digest)
	for _, p := range candidates[:min(len(candidates), maxCandidates)] {
		if h.banned[p.ID] || h.active[p] != nil || len(h.active)+h.asking >= maxCandidates || h.e.distance(p) > h.reach {
			continue
		}
		h.asking++
		fresh := !slices.ContainsFunc(h.asked.Asked, func(a transfer.Asked) bool { return a.Peer == p })
		if fresh {
			h.looking++
		}
		h.wg.Go(func() {
			conn, all, err := h.hello(ctx, p)
			select {
			case h.answers <- reply{p, conn, all, err, fresh}:
			case <-ctx.Done():
				if conn != nil {
					conn.Close()
				}
			}
		})
	}
}

// hello dials a peer and asks what it has of the blob. The connection is nil with an
// error.
func (h *hunt) hello(ctx context.Context, p transfer.Peer) (conn net.Conn, all bool, err error) {
	ask, cancel := context.WithTimeoutCause(ctx, h.e.cfg.AskTimeout, errStalled)
	defer cancel()
	conn, err = h.e.cfg.Dial(ask, p.Addr)
	switch {
	case err != nil && h.e.cfg.Lacks(err):
		return nil, false, &failure{transfer.Gone, fmt.Errorf("%w: %w", errNoService, err)}
	case err != nil:
		return nil, false, because(ask, err)
	}
	defer func() {
		if err != nil {
			conn.Close()
			conn = nil
		}
	}()
	if id := peerOf(conn); id != p.ID {
		return conn, false, &failure{transfer.Broken, fmt.Errorf("%w: asked for %s, found %s", errOtherPeer, p.ID, id)}
	}
	dialled := conn // conn is nil after an error, while this may still run
	stop := context.AfterFunc(ask, func() { _ = dialled.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := conn.Write(marshalHello(h.blob, h.a.Fetch().Class())); err != nil {
		return conn, false, because(ask, err)
	}
	ans, err := readAnswer(conn)
	switch {
	case err != nil:
		return conn, false, because(ask, err)
	case ans.status == gone:
		return conn, false, &failure{transfer.Gone, transfer.ErrNotHeld}
	case ans.size != h.blob.Size:
		return conn, false, &failure{transfer.BadSize, fmt.Errorf("claims a size of %d bytes, the blob has %d", ans.size, h.blob.Size)}
	case ans.status == busy:
		return conn, false, &failure{transfer.Broken, errBusy}
	case ans.status == linked:
		return conn, false, &failure{transfer.Gone, errLinked}
	}
	if !stop() {
		return conn, false, because(ask, ask.Err())
	}
	return conn, ans.status == complete, nil
}

// because makes a failure of an error of a connection.
func because(ctx context.Context, err error) error {
	var f *failure
	if errors.As(err, &f) {
		return err
	}
	if errors.Is(context.Cause(ctx), errStalled) {
		return &failure{transfer.Stalled, errStalled}
	}
	return &failure{transfer.Broken, err}
}

// heard takes a candidate's answer.
func (h *hunt) heard(ctx context.Context, r reply) {
	h.asked.Heard(r.peer, r.err)
	if r.err != nil {
		var f *failure
		if errors.As(r.err, &f) && f.why.Lie() {
			h.ban(r.peer, f)
		}
		h.lacking = h.lacking || errors.Is(r.err, errNoService)
		return
	}
	if h.banned[r.peer.ID] || !h.room() && (!r.all || h.someComplete()) {
		r.conn.Close()
		return
	}
	hd := &holder{peer: r.peer}
	hd.all.Store(r.all)
	h.active[hd.peer] = hd
	var work context.Context
	work, hd.cancel = context.WithCancel(ctx)
	h.wg.Go(func() {
		defer hd.cancel()
		h.work(work, hd, r.conn)
		if why := hd.fate(); why != nil {
			select {
			case h.drops <- drop{hd, why}:
			case <-ctx.Done():
			}
		}
	})
}

// lost ends a holder's part in the fetch.
func (h *hunt) lost(d drop) {
	if h.active[d.h.peer] == d.h {
		delete(h.active, d.h.peer)
	}
	h.stale = true
	h.asked.Heard(d.h.peer, d.why)
	if d.why.why == transfer.Gone && !d.h.all.Load() { // it may have it another time
		return
	}
	h.ban(d.h.peer, d.why)
}

// ban keeps a peer out of this fetch and reports it.
func (h *hunt) ban(p transfer.Peer, f *failure) {
	if h.banned[p.ID] {
		return
	}
	h.banned[p.ID] = true
	log := h.e.log.Info
	if f.why.Lie() {
		log = h.e.log.Warn
	}
	log("peer dropped for a blob", "peer", p.ID, "addr", p.Addr, "blob", h.blob.Digest, "why", string(f.why), "err", f.err)
	if h.e.cfg.Hooks.Dropped != nil {
		h.e.cfg.Hooks.Dropped(p.ID, h.blob.Digest, f.why)
	}
	if h.ready() {
		for _, t := range h.s.all() {
			if t.peer == p.ID {
				t.end(f)
			}
		}
	}
}

// ready says whether there are a piece table, a torrent and a plan.
func (h *hunt) ready() bool {
	select {
	case <-h.known:
		return true
	default:
		return false
	}
}

// judgeLie drops a peer that alone sent a bad piece. When several had a part in one,
// the piece is taken from one at a time from then on.
func (h *hunt) judgeLie(v verdict) {
	if len(v.peers) != 1 || h.banned[v.peers[0]] {
		return
	}
	f := &failure{v.why, v.err}
	for p, hd := range h.active {
		if p.ID == v.peers[0] {
			hd.drop(f)
			return
		}
	}
	p := transfer.Peer{ID: v.peers[0]} // it has dialled itself
	for _, asked := range h.asked.Asked {
		if asked.Peer.ID == p.ID {
			p = asked.Peer
		}
	}
	h.asked.Heard(p, f)
	h.ban(p, f)
	h.stale = true
}

func (h *hunt) someComplete() bool {
	for _, hd := range h.active {
		if hd.all.Load() {
			return true
		}
	}
	return false
}

// nobody is the error when no holder is left: it names everybody who was asked. When
// some of them do not know the service, they may be asked in another way.
func (h *hunt) nobody() error {
	err := h.asked.Final(errNoProgress)
	if h.lacking {
		return fmt.Errorf("%w: %w", transfer.ErrNotCarried, err)
	}
	return err
}

func (h *hunt) tick() {
	if !h.ready() {
		return
	}
	for _, t := range h.w.tick(h.e.cfg.StallTimeout) {
		t.end(&failure{transfer.Stalled, errStalled})
	}
}

// learn takes the piece table, which has been verified, makes the torrent and sets
// aside the pieces that an earlier attempt marked.
func (h *hunt) learn(t transfer.PieceTable) {
	h.learned.Do(func() {
		marked, err := h.a.SetTable(t)
		if err != nil {
			h.die(err)
			return
		}
		s, err := h.e.open(h.blob, h.a, t)
		if errors.Is(err, errBusy) {
			err = fmt.Errorf("%w: %w", transfer.ErrNotCarried, err)
		}
		if err != nil {
			h.die(err)
			return
		}
		h.s, h.w = s, newWant(s, h.a, h.tell, h.stir)
		h.w.check(marked)
		s.want.Store(h.w)
		h.marked <- marked
		close(h.known)
		for _, tap := range s.all() { // others were quicker
			h.w.join(tap, false, minWindow)
		}
	})
}

// tell takes a verdict from wherever it becomes known.
func (h *hunt) tell(v verdict) {
	select {
	case h.verdicts <- v:
	default:
		h.wg.Go(func() { h.verdicts <- v })
	}
}

// recheck verifies pieces that an earlier attempt marked, those that readers wait for
// first.
func (h *hunt) recheck(ctx context.Context, marked []int) {
	defer func() { h.checked <- struct{}{} }()
	buf := make([]byte, transfer.PieceSize)
	for ctx.Err() == nil {
		i, ok := h.w.nextCheck(h.a.Urgent(urgentWindow), &marked)
		if !ok {
			return
		}
		h.w.checked(i, h.a.Recheck(i, buf))
	}
}

// die ends the fetch with an error that is nobody's but this node's.
func (h *hunt) die(err error) {
	select {
	case h.fatal <- err:
	default:
	}
}
