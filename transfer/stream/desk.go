package stream

import (
	"math/rand/v2"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/plan"
)

// desk is the holder's side of an engine: what peers ask for, in the planner's order.
//
// Lock order: desk.mu before link.mu and session.mu.
type desk struct {
	began   time.Time
	limiter transfer.Limiter // may be nil

	mu     sync.Mutex
	queue  *plan.Queue
	offers map[digest.Digest]*offer
	timer  *time.Timer // looks again when time alone may bring a turn
}

// offer is a blob that peers ask for.
type offer struct {
	*plan.Offer
	size     int64
	sessions map[*session]struct{}
}

func newDesk(cfg Config) *desk {
	d := &desk{
		began:   time.Now(),
		limiter: cfg.Limiter,
		queue:   plan.NewQueue(plan.Slots{Pieces: cfg.Slots, Most: maxService}, rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))),
		offers:  make(map[digest.Digest]*offer),
	}
	d.timer = time.AfterFunc(time.Hour, d.dispatch)
	return d
}

// full says that no session of a node may join: as many nodes ask for the blob as may,
// since hundreds would share what little each could get, and pass on nothing; or the node
// has as many sessions as may be.
func (o *offer) full(node string) bool {
	links, nodes := 0, 0
	seen := make(map[string]bool, maxAskers)
	for s := range o.sessions {
		switch peer := s.link.peer; {
		case peer == node && peer != "":
			links++
		case peer == "" || !seen[peer]:
			nodes++
			seen[peer] = true
		}
	}
	return links == 0 && nodes >= maxAskers || links >= maxLinks
}

// join takes a session in and tells the wanter the state. have is nil for a blob that
// is held whole. What is held from now on is told by hold. false when there are enough.
func (d *desk) join(s *session, have func() transfer.Bitmap) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	o := d.offers[s.blob.Digest]
	if o != nil && transfer.Pieces(s.blob.Size) > 1 && o.full(s.link.peer) {
		return false
	}
	var part transfer.Bitmap
	if have != nil {
		part = have()
	}
	if o == nil || o.size != s.blob.Size {
		o = &offer{
			Offer: d.queue.Offer(transfer.Pieces(s.blob.Size), part), size: s.blob.Size,
			sessions: make(map[*session]struct{}),
		}
		d.offers[s.blob.Digest] = o
	}
	if have == nil {
		o.Complete()
	}
	o.sessions[s] = struct{}{}
	s.offer = o
	s.asker = o.Join(s.link.peer, s.class)
	s.asker.Owner = s
	if s.far {
		s.asker.Apart()
	}
	s.link.send(func(to []byte) []byte {
		if have == nil {
			return state{heldComplete, uint64(s.blob.Size)}.append(to)
		}
		to = frame(state{heldPart, uint64(s.blob.Size)}.append(to), kindHaves, part...)
		if hops := s.flight.arrival.Hops(); hops > 0 {
			to = frame(to, kindHops, byte(hops))
		}
		return to
	})
	return true
}

// hops tells everybody who asks for a blob that is arriving how far away the rest of it is.
func (d *desk) hops(dg digest.Digest, hops int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	o := d.offers[dg]
	if o == nil {
		return
	}
	for s := range o.sessions {
		if s.flight != nil {
			s.link.send(func(to []byte) []byte { return frame(to, kindHops, byte(hops)) })
		}
	}
}

// leave takes a session out.
func (d *desk) leave(s *session) {
	d.mu.Lock()
	if s.asker != nil {
		d.queue.Leave(s.asker)
		delete(s.offer.sessions, s)
		if len(s.offer.sessions) == 0 && d.offers[s.blob.Digest] == s.offer {
			delete(d.offers, s.blob.Digest)
		}
		s.asker = nil
	}
	d.mu.Unlock()
	d.dispatch()
}

// tell lets f tell the planner about a session, and puts into service what may go.
func (d *desk) tell(s *session, f func(a *plan.Asker)) {
	d.mu.Lock()
	if s.asker != nil {
		f(s.asker)
	}
	d.mu.Unlock()
	d.dispatch()
}

// held tells everybody who asks for a blob that a piece has come; -1: the fetch has
// ended, well when all is true.
func (d *desk) held(dg digest.Digest, piece int, all bool) {
	d.mu.Lock()
	o := d.offers[dg]
	if o == nil {
		d.mu.Unlock()
		return
	}
	switch {
	case piece >= 0:
		o.Hold(piece)
	case all:
		o.Complete()
	}
	for s := range o.sessions {
		s.link.send(func(to []byte) []byte {
			switch {
			case piece >= 0:
				return appendPieces(to, kindHave, piece)
			case all:
				return frame(to, kindComplete)
			}
			return frame(to, kindGone)
		})
	}
	d.mu.Unlock()
	d.dispatch()
}

// dispatch puts into service what may go.
func (d *desk) dispatch() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		t, again := d.queue.Next(time.Since(d.began), d.allow)
		if t == nil {
			if again > 0 {
				d.timer.Reset(again)
			}
			return
		}
		t.Asker.Owner.(*session).serve(t)
	}
}

// allow asks the limiter.
func (d *desk) allow(a *plan.Asker, piece int) time.Duration {
	if d.limiter == nil {
		return 0
	}
	s := a.Owner.(*session)
	_, n := transfer.PieceRange(s.blob.Size, piece)
	wait := d.limiter.Take(s.flow(), int(n))
	if wait > 0 {
		s.limited.Store(int64(time.Since(d.began) + wait))
	}
	return wait
}

// aside lets a session have another turn while one is slow to be read.
func (d *desk) aside(t *plan.Turn) {
	d.mu.Lock()
	d.queue.Aside(t)
	d.mu.Unlock()
	d.dispatch()
}

// done ends a turn.
func (d *desk) done(t *plan.Turn) {
	d.mu.Lock()
	d.queue.Done(time.Since(d.began), t)
	d.mu.Unlock()
	d.dispatch()
}
