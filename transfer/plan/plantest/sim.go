// Package plantest runs fleets of planners against each other over simulated links:
// nodes with an uplink and a downlink, latency, a slow link between sites, nodes that
// come late, are slow or die. Hundreds of nodes take seconds, and the same seed gives
// the same run.
//
// The links are fluid. A holder's uplink is shared by the pieces in service as TCP
// would share it: evenly, and what one receiver cannot take the others get. A
// receiver's downlink, and a site's link, is cut in equal parts for the pieces on
// their way through it, whether all use theirs or not; so a result is worse than the
// truth where downlinks are the bound, never better.
package plantest

import (
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/plan"
)

// Node of a simulated fleet.
type Node struct {
	Up, Down float64       // bytes a second
	Joins    time.Duration // when it begins
	Dies     time.Duration // 0: never
	Holds    bool          // the blob, from the start; else it wants it
	Site     int           // below 16
	Reads    bool          // a client there reads the blob from its beginning on
}

// Fleet to simulate.
type Fleet struct {
	Nodes   []Node
	Pieces  int
	Latency time.Duration // one way
	Degree  int           // neighbours of a node, at random, at most; 0: all know all
	Slots   plan.Slots
	Rules   plan.Rules
	Seed    uint64
	// WAN is what a site takes in from others, bytes a second, at most; 0: no limit.
	WAN        float64
	WANLatency time.Duration // between nodes of two sites
}

// Result of a run.
type Result struct {
	Done     []float64 // when each node had the blob, in seconds; 0: never
	Finished bool      // all that wanted it and did not die have it
	Sent     []float64 // bytes, by node
	Holders  float64   // bytes that those sent who held it, over the blob's size
	All      float64   // bytes that all sent, over what all wanted
	Crossed  []float64 // bytes into each site from others
	Stalled  float64   // the longest that a reader waited for its next piece, seconds
}

// deathNoticed is how long the others take a dead node for a slow one.
const deathNoticed = time.Second

// flow is a piece in service.
type flow struct {
	to    int
	piece int
	left  float64 // bytes
	rate  float64
	turn  *plan.Turn
}

type simNode struct {
	Node
	id      int
	alive   bool
	want    *plan.Want // nil for one that holds the blob
	offer   *plan.Offer
	queue   *plan.Queue
	waiting bool                 // for the time that its queue named
	holders map[int]*plan.Holder // whom it asks
	askers  map[int]*plan.Asker  // who asks it
	peers   []int                // neighbours
	flows   []flow
	version int32   // of the flows' rates
	last    float64 // when the flows were last brought up to date
	in      int     // flows towards it
	have    transfer.Bitmap
	got     int
	done    float64
	sent    float64

	at      int     // where its reader is
	moved   float64 // when that last changed
	stalled float64 // the longest that it waited
}

type sim struct {
	f       Fleet
	now     float64 // seconds
	heap    []event
	seq     uint64
	nodes   []*simNode
	rand    *rand.Rand
	open    int       // nodes that have to finish
	cross   []int     // flows into each site
	crossed []float64 // bytes into each site
}

const pieceBytes = transfer.PieceSize

// Run simulates a fleet until all have the blob.
func Run(f Fleet) Result {
	s := &sim{f: f, rand: rand.New(rand.NewPCG(f.Seed, 7)), cross: make([]int, 16), crossed: make([]float64, 16)}
	for i, n := range f.Nodes {
		s.nodes = append(s.nodes, &simNode{Node: n, id: i, holders: map[int]*plan.Holder{}, askers: map[int]*plan.Asker{}, have: transfer.PiecesBitmap(f.Pieces)})
		s.push(event{at: n.Joins.Seconds(), kind: evJoin, a: int32(i)})
		if n.Dies > 0 {
			s.push(event{at: n.Dies.Seconds(), kind: evDie, a: int32(i)})
		}
		if !n.Holds && n.Dies == 0 {
			s.open++
		}
	}
	s.graph()
	for s.open > 0 && len(s.heap) > 0 && s.now < 1e5 {
		e := s.pop()
		s.now = e.at
		s.handle(e)
	}
	return s.result()
}

func (s *sim) result() Result {
	r := Result{Crossed: s.crossed, Finished: s.open == 0}
	size := float64(s.f.Pieces) * pieceBytes
	wanted := 0.0
	for _, n := range s.nodes {
		r.Done = append(r.Done, n.done)
		r.Sent = append(r.Sent, n.sent)
		r.All += n.sent
		r.Stalled = max(r.Stalled, n.stalled)
		if n.Holds {
			r.Holders += n.sent / size
		} else {
			wanted += size
		}
	}
	r.All /= wanted
	return r
}

// graph links neighbours.
func (s *sim) graph() {
	n := len(s.nodes)
	link := func(a, b int) {
		s.nodes[a].peers = append(s.nodes[a].peers, b)
		s.nodes[b].peers = append(s.nodes[b].peers, a)
	}
	if s.f.Degree == 0 || n <= s.f.Degree+1 {
		for a := range n {
			for b := a + 1; b < n; b++ {
				link(a, b)
			}
		}
		return
	}
	linked := func(a, b int) bool {
		for _, p := range s.nodes[a].peers {
			if p == b {
				return true
			}
		}
		return false
	}
	for range 4 * s.f.Degree {
		for _, a := range s.rand.Perm(n) {
			b := s.rand.IntN(n)
			if a != b && !linked(a, b) && len(s.nodes[a].peers) < s.f.Degree && len(s.nodes[b].peers) < s.f.Degree {
				link(a, b)
			}
		}
	}
}

// dur is the time as the planner wants it.
func (s *sim) dur() time.Duration { return time.Duration(s.now * 1e9) }

// later sends a message.
func (s *sim) later(e event) {
	e.at = s.now + s.f.Latency.Seconds()
	if s.f.WANLatency > 0 && s.nodes[e.a].Site != s.nodes[e.b].Site {
		e.at = s.now + s.f.WANLatency.Seconds()
	}
	s.push(e)
}

// handle lets an event happen.
func (s *sim) handle(e event) {
	n := s.nodes[e.a]
	switch e.kind {
	case evJoin:
		s.join(n)
	case evDie:
		s.die(n)
	case evTick:
		if n.alive && n.want != nil {
			s.pump(n)
			s.push(event{at: s.now + 0.1, kind: evTick, a: e.a})
		}
	case evNote: // of a, to all
		if !n.alive {
			return
		}
		k := plan.NoteKind(e.x)
		for _, p := range n.peers {
			m := s.nodes[p]
			if !m.alive {
				continue
			}
			if a := m.askers[n.id]; a != nil && k != plan.Have && n.holders[p] != nil && n.holders[p].Hears(k) {
				a.Hear(plan.Note{Piece: int(e.piece), Kind: k})
			}
			if h := m.holders[n.id]; h != nil && k == plan.Have {
				m.want.Has(h, int(e.piece))
				s.pumpOne(m, n.id)
			}
		}
	case evAsk:
		if a := n.askers[int(e.b)]; n.alive && a != nil {
			a.Ask(plan.Ask{Piece: int(e.piece), Urgent: e.x > 0, Again: e.x > 1})
			s.serve(n)
		}
	case evCancel:
		if a := n.askers[int(e.b)]; n.alive && a != nil {
			a.Cancel(int(e.piece))
		}
	case evBegun:
		if h := n.holders[int(e.b)]; n.alive && h != nil {
			cancel, _ := n.want.Begun(s.dur(), h, int(e.piece))
			s.cancel(n, cancel)
			s.notes(n)
		}
	case evGone:
		s.gone(n)
	case evServe:
		n.waiting = false
		if n.alive {
			s.serve(n)
		}
	case evDone:
		if e.x == n.version && n.alive {
			s.complete(n)
		}
	}
}

// cancel tells holders that a piece is not needed from them.
func (s *sim) cancel(n *simNode, of []plan.Cancel) {
	for _, c := range of {
		s.later(event{kind: evCancel, a: int32(c.Holder.Owner.(int)), b: int32(n.id), piece: int32(c.Piece)})
	}
}

// join starts a node.
func (s *sim) join(n *simNode) {
	n.alive = true
	n.queue = plan.NewQueue(s.f.Slots, s.rand)
	if n.Holds {
		n.offer = n.queue.Offer(s.f.Pieces, nil)
	} else {
		n.offer = n.queue.Offer(s.f.Pieces, transfer.PiecesBitmap(s.f.Pieces))
	}
	if !n.Holds {
		n.want = plan.NewWant(s.f.Pieces, s.f.Rules, s.rand)
		if n.Reads {
			n.moved = s.now
			s.read(n)
		}
		s.push(event{at: s.now + 0.1, kind: evTick, a: int32(n.id)})
	} else {
		for i := range s.f.Pieces {
			n.have.Add(i)
		}
	}
	for _, p := range n.peers {
		m := s.nodes[p]
		if !m.alive {
			continue
		}
		s.connect(n, m)
		s.connect(m, n)
	}
	for _, m := range s.nodes {
		if m.alive && m.want != nil {
			s.pump(m)
		}
	}
}

// connect lets a ask b.
func (s *sim) connect(a, b *simNode) {
	if a.want == nil {
		return
	}
	var have transfer.Bitmap
	if !b.Holds {
		have = b.have.Clone()
	}
	h := a.want.Join(have, a.Site != b.Site)
	h.Owner = b.id
	a.holders[b.id] = h
	k := b.offer.Join(strconv.Itoa(a.id), transfer.Pull)
	k.Owner = a.id
	if a.Site != b.Site {
		k.Apart()
	}
	b.askers[a.id] = k
	s.cancel(a, a.want.Back())
	s.elect(a)
}

// elect says to a node whether it asks other sites.
func (s *sim) elect(n *simNode) {
	if n.want == nil {
		return
	}
	near := []string{strconv.Itoa(n.id)}
	for _, p := range n.peers {
		if m := s.nodes[p]; n.holders[p] != nil && m.Site == n.Site && !m.Holds {
			near = append(near, strconv.Itoa(p))
		}
	}
	s.cancel(n, n.want.Elect(plan.Elect("blob", near) == strconv.Itoa(n.id)))
}

// die ends a node in the middle of what it does.
func (s *sim) die(n *simNode) {
	n.alive = false
	s.advance(n)
	for _, f := range n.flows {
		s.nodes[f.to].in--
		s.crossing(n, s.nodes[f.to], -1)
	}
	n.flows = nil
	s.push(event{at: s.now + deathNoticed.Seconds(), kind: evGone, a: int32(n.id)})
}

// gone is when the others notice a death.
func (s *sim) gone(n *simNode) {
	for _, p := range n.peers {
		m := s.nodes[p]
		if !m.alive {
			continue
		}
		if h := m.holders[n.id]; h != nil {
			m.want.Leave(h)
			delete(m.holders, n.id)
		}
		if a := m.askers[n.id]; a != nil {
			m.queue.Leave(a)
			delete(m.askers, n.id)
		}
		s.advance(m)
		for i := 0; i < len(m.flows); i++ {
			if m.flows[i].to == n.id {
				s.crossing(m, n, -1)
				m.flows = append(m.flows[:i], m.flows[i+1:]...)
				i--
			}
		}
		s.reschedule(m)
		s.serve(m)
		s.elect(m)
	}
	for _, p := range n.peers {
		if m := s.nodes[p]; m.alive && m.want != nil {
			s.pump(m)
		}
	}
}

// pump lets a node ask all whom it may ask something.
func (s *sim) pump(n *simNode) {
	for k, first := 0, s.rand.IntN(len(n.peers)); k < len(n.peers); k++ {
		s.pumpOne(n, n.peers[(first+k)%len(n.peers)])
	}
	s.notes(n)
}

// pumpOne is pump for one holder.
func (s *sim) pumpOne(n *simNode, p int) {
	h := n.holders[p]
	if h == nil {
		return
	}
	for {
		a, ok := n.want.Next(s.dur(), h)
		if !ok {
			break
		}
		how := int32(0)
		if a.Urgent {
			how = 1
		}
		if a.Again {
			how = 2
		}
		s.later(event{kind: evAsk, a: int32(p), b: int32(n.id), piece: int32(a.Piece), x: how})
	}
	s.notes(n)
}

// notes sends what is new with a node.
func (s *sim) notes(n *simNode) {
	for _, note := range n.want.Notes() {
		s.later(event{kind: evNote, a: int32(n.id), b: int32(n.id), piece: int32(note.Piece), x: int32(note.Kind)})
	}
}

// serve puts pieces into service.
func (s *sim) serve(n *simNode) {
	changed := false
	for {
		t, again := n.queue.Next(s.dur(), nil)
		if t == nil {
			if again > 0 && !n.waiting {
				n.waiting = true
				s.push(event{at: s.now + again.Seconds(), kind: evServe, a: int32(n.id)})
			}
			break
		}
		to := t.Asker.Owner.(int)
		if !changed {
			s.advance(n)
			changed = true
		}
		m := s.nodes[to]
		m.in++
		s.crossing(n, m, 1)
		n.flows = append(n.flows, flow{to: to, piece: t.Piece, left: pieceBytes, turn: t})
		s.later(event{kind: evBegun, a: int32(to), b: int32(n.id), piece: int32(t.Piece)})
		s.touchSenders(m, n)
	}
	if changed {
		s.reschedule(n)
	}
}

// complete ends the pieces that are out.
func (s *sim) complete(n *simNode) {
	s.advance(n)
	for i := 0; i < len(n.flows); i++ {
		f := n.flows[i]
		if f.left > 1 {
			continue
		}
		n.flows = append(n.flows[:i], n.flows[i+1:]...)
		i--
		m := s.nodes[f.to]
		m.in--
		s.crossing(n, m, -1)
		n.queue.Done(s.dur(), f.turn)
		s.touchSenders(m, n)
		s.arrive(m, n, f.piece)
	}
	s.reschedule(n)
	s.serve(n)
}

// arrive takes a piece.
func (s *sim) arrive(m, from *simNode, piece int) {
	h := m.holders[from.id]
	if h == nil {
		return
	}
	s.cancel(m, m.want.Arrived(s.dur(), h, piece))
	if !m.have.Has(piece) {
		m.have.Add(piece)
		m.offer.Hold(piece)
		m.got++
		if m.got == s.f.Pieces {
			m.done = s.now
			if m.Dies == 0 {
				s.open--
			}
		}
	}
	if m.Reads {
		s.read(m)
		s.pump(m)
		return
	}
	s.pumpOne(m, from.id)
	s.notes(m)
}

// readAhead is how many pieces a reader gets ahead of the rest.
const readAhead = 2

// read tells the planner what the node's reader waits for.
func (s *sim) read(n *simNode) {
	for n.at < s.f.Pieces && n.have.Has(n.at) {
		n.at++
		n.stalled = max(n.stalled, s.now-n.moved)
		n.moved = s.now
	}
	var next []int
	for i := n.at; i < min(n.at+readAhead, s.f.Pieces); i++ {
		if !n.have.Has(i) {
			next = append(next, i)
		}
	}
	n.want.Cursors(next)
}
