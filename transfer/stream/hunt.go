package stream

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

const (
	// maxAsked candidates take part in one fetch; more would not make it faster.
	maxAsked = 64
	// maxStrikes failures in a row that are nobody's lie before a holder is dropped.
	maxStrikes = 4
	// urgentWindow is how many pieces a reader gets ahead of the rest.
	urgentWindow = 2
)

// hunt is one fetch at work: it finds holders and keeps them busy until the blob is
// here. One goroutine (run) owns the fields; workers talk to it by channels, by the
// plan and by the arrival.
type hunt struct {
	e     *Engine
	a     *transfer.Arrival
	blob  transfer.Blob
	plan  *plan
	whole *whole // instead of the plan when there is no root

	// turn is held by the one complete holder that is asked for the piece table,
	// or, without a root, for the blob.
	turn chan struct{}
	// known is closed once the arrival has its piece table.
	known   chan struct{}
	learned sync.Once
	// finished is closed once all bytes are here.
	finished chan struct{}
	finish   sync.Once

	answers chan reply
	drops   chan dropped
	fatal   chan error
	marked  chan []int // pieces to verify again, once
	checked chan struct{}
	wg      sync.WaitGroup

	checking bool // recheck runs
	asking   int
	stale    bool // a holder was dropped since candidates were last asked
	reach    int  // how far away candidates are asked
	active   map[transfer.Peer]*holder
	reserve  []*holder
	verdict  map[transfer.Peer]*transfer.Asked
	order    []transfer.Peer
	banned   map[transfer.Peer]bool
}

// reply is a candidate's answer.
type reply struct {
	peer transfer.Peer
	have transfer.Bitmap
	err  error
}

// dropped is the end of a holder.
type dropped struct {
	h   *holder
	why *failure
}

func newHunt(e *Engine, a *transfer.Arrival) *hunt {
	blob := a.Fetch().Blob()
	h := &hunt{
		e: e, a: a, blob: blob,
		plan:     newPlan(0, stealAfter),
		turn:     make(chan struct{}, 1),
		known:    make(chan struct{}),
		finished: make(chan struct{}),
		answers:  make(chan reply),
		drops:    make(chan dropped),
		fatal:    make(chan error, 1),
		marked:   make(chan []int, 1),
		checked:  make(chan struct{}, 1),
		active:   make(map[transfer.Peer]*holder),
		verdict:  make(map[transfer.Peer]*transfer.Asked),
		banned:   make(map[transfer.Peer]bool),
	}
	if e.cfg.Distance == nil {
		h.reach = Farthest
	}
	if blob.Root == nil {
		h.whole = newWhole(blob)
	} else {
		h.plan = newPlan(transfer.Pieces(blob.Size), stealAfter)
	}
	return h
}

// run returns nil once every byte is here and verified.
func (h *hunt) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer h.wg.Wait()
	defer cancel()
	if h.blob.Size == 0 {
		return nil // Commit verifies the digest
	}
	if t, ok := transfer.SinglePiece(h.blob); ok {
		h.learn(t)
	}
	again := time.NewTicker(h.e.cfg.AskAgain)
	defer again.Stop()
	idle := time.NewTimer(h.e.cfg.IdleTimeout)
	defer idle.Stop()
	held := int64(0)
	h.ask(ctx)
	for {
		select { // first of all: the last holder may have left after its last piece
		case <-h.finished:
			return nil
		default:
		}
		if h.asking == 0 && h.reach < Farthest && !h.someComplete() {
			h.reach++
			h.ask(ctx)
			continue
		}
		if h.asking == 0 && len(h.active) == 0 && !h.checking && len(h.marked) == 0 {
			if !h.stale {
				return h.forsaken()
			}
			h.ask(ctx)
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-h.finished:
			return nil
		case err := <-h.fatal:
			return err
		case r := <-h.answers:
			h.asking--
			h.heard(ctx, r)
		case d := <-h.drops:
			h.lost(ctx, d)
		case marked := <-h.marked:
			h.checking = true
			h.wg.Go(func() { h.recheck(ctx, marked) })
		case <-h.checked:
			h.checking = false
		case <-again.C:
			if h.asking == 0 {
				h.ask(ctx)
			}
		case <-idle.C:
			now := h.a.Fetch().Progress().Held
			if now == held && !h.someComplete() {
				return h.forsaken()
			}
			held = now
			idle.Reset(h.e.cfg.IdleTimeout)
		}
	}
}

// ask asks every candidate that is not a holder already.
func (h *hunt) ask(ctx context.Context) {
	h.stale = false
	candidates := h.e.cfg.Peers.Candidates(ctx, h.blob.Digest)
	for _, p := range candidates[:min(len(candidates), maxAsked)] {
		if h.banned[p] || h.active[p] != nil || h.reserved(p) || h.e.distance(p) > h.reach {
			continue
		}
		h.asking++
		h.wg.Go(func() {
			have, err := h.e.head(ctx, p, h.blob)
			select {
			case h.answers <- reply{p, have, err}:
			case <-ctx.Done():
			}
		})
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

func (h *hunt) reserved(p transfer.Peer) bool {
	for _, r := range h.reserve {
		if r.peer == p {
			return true
		}
	}
	return false
}

// heard takes a candidate's answer.
func (h *hunt) heard(ctx context.Context, r reply) {
	h.judge(r.peer, r.err)
	if r.err != nil {
		var f *failure
		if errors.As(r.err, &f) && f.why.Lie() {
			h.ban(r.peer, f)
		}
		return
	}
	hd := &holder{peer: r.peer}
	hd.update(r.have)
	if len(h.active) >= h.e.cfg.MaxHolders {
		h.reserve = append(h.reserve, hd)
		return
	}
	h.engage(ctx, hd)
}

// engage puts a holder to work.
func (h *hunt) engage(ctx context.Context, hd *holder) {
	h.active[hd.peer] = hd
	var work context.Context
	work, hd.cancel = context.WithCancel(ctx)
	h.wg.Go(func() {
		defer hd.cancel()
		if h.whole != nil {
			h.stream(work, hd)
		} else {
			h.trade(work, hd)
		}
		if why := hd.fate(); why != nil {
			select {
			case h.drops <- dropped{hd, why}:
			case <-ctx.Done():
			}
		}
	})
}

// lost ends a holder's part in the fetch and lets a reserve take its place.
func (h *hunt) lost(ctx context.Context, d dropped) {
	delete(h.active, d.h.peer)
	h.judge(d.h.peer, d.why)
	h.stale = true
	h.ban(d.h.peer, d.why)
	if len(h.reserve) > 0 && len(h.active) < h.e.cfg.MaxHolders {
		next := h.reserve[0]
		h.reserve = h.reserve[1:]
		h.engage(ctx, next)
	}
}

// judge remembers what came of a peer.
func (h *hunt) judge(p transfer.Peer, err error) {
	v := h.verdict[p]
	if v == nil {
		v = &transfer.Asked{Peer: p}
		h.verdict[p] = v
		h.order = append(h.order, p)
	}
	v.Reason = err
}

// ban keeps a peer out of this fetch and reports it.
func (h *hunt) ban(p transfer.Peer, f *failure) {
	h.banned[p] = true
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
	for _, hd := range h.active {
		if hd.isComplete() {
			return true
		}
	}
	return false
}

// forsaken is the error that names everybody who was asked.
func (h *hunt) forsaken() error {
	err := &transfer.NoHolderError{Digest: h.blob.Digest}
	for _, p := range h.order {
		v := *h.verdict[p]
		if v.Reason == nil {
			v.Reason = errNoProgress
		}
		err.Asked = append(err.Asked, v)
	}
	return err
}

// learn takes the piece table, which has been verified, and sets aside the pieces
// that an earlier attempt marked.
func (h *hunt) learn(t transfer.PieceTable) {
	h.learned.Do(func() {
		marked, err := h.a.SetTable(t)
		if err != nil {
			h.die(err)
			return
		}
		h.plan.check(marked)
		h.marked <- marked
		close(h.known)
	})
}

// recheck verifies pieces that an earlier attempt marked.
func (h *hunt) recheck(ctx context.Context, marked []int) {
	buf, err := h.e.buffers.take(ctx)
	if err != nil {
		return
	}
	defer h.e.buffers.give(buf)
	defer func() { h.checked <- struct{}{} }()
	done := 0
	for ctx.Err() == nil {
		for done < len(marked) && !h.plan.isChecking(marked[done]) {
			done++
		}
		i, ok := h.plan.nextCheck(h.a.Urgent(urgentWindow), marked[done:])
		if !ok {
			return
		}
		if h.a.Recheck(i, buf) {
			h.arrived(i)
		} else {
			h.plan.unmark(i)
		}
	}
}

// arrived notes a held piece and, after the last one, the end.
func (h *hunt) arrived(i int) {
	h.plan.arrive(i)
	if h.a.Complete() {
		h.finish.Do(func() { close(h.finished) })
	}
}

// die ends the fetch with an error that is nobody's but this node's.
func (h *hunt) die(err error) {
	select {
	case h.fatal <- err:
	default:
	}
}
