package plan

import (
	"math/rand/v2"
	"slices"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// Slots are how a Queue bounds what is in service; zero values mean the defaults.
type Slots struct {
	// Pieces in service at once. A piece that takes far longer than others waits for
	// its receiver, not for this node's uplink, and counts no more. 4.
	Pieces int
	// Most in service in any case. 32.
	Most int
}

// inOrder is among how many pieces that come next for readers a holder chooses.
const inOrder = 2

// How long others get to pass a piece on before it goes out once more: as long as so many
// pieces are in service, within these bounds.
const (
	passOn     = 4
	passOnSoon = 50 * time.Millisecond
	passOnLate = 2 * time.Second
)

// Queue is everything that others ask of this node. Not safe for concurrent use.
type Queue struct {
	slots  Slots
	rand   *rand.Rand
	offers []*Offer
	served [transfer.Classes]float64 // pieces over the weight
	floor  float64                   // what the class served last had
	peers  map[string]*peer
	turns  []*Turn
	gap    time.Duration // from the end of a piece to that of the next; 0: not known yet
	last   time.Duration // when one last ended, or service began
	clock  int
}

// peer is one node that asks, for however many blobs.
type peer struct {
	askers int
	served float64
}

// Offer is one blob that others ask for.
type Offer struct {
	queue  *Queue
	pieces int
	all    transfer.Bitmap // the set of all pieces
	have   transfer.Bitmap // of them, those held; nil: everything
	askers []*Asker
	sent   []uint16 // times each piece went out; nil while there is one asker
	first  []*Asker // who got a piece first, until somebody else has it
	reader int      // a piece that a reader has waited for; -1: nobody reads
	lately []Turn   // what others may be about to pass on, the last at the end
}

// Asker is one node that wants one blob.
type Asker struct {
	// Owner is the engine's; plan never looks at it.
	Owner any

	offer   *Offer
	peer    *peer
	name    string
	class   transfer.Class
	skip    transfer.Bitmap // what not to choose for it
	credit  int
	queue   []int
	urgent  int // so many of the queue's first are urgent
	burden  int // pieces that only it got and has not passed on
	clock   int // when it had its last turn
	serving bool
	apart   bool
	idle    bool          // there is nothing to choose for it now
	rests   time.Duration // others may pass on until then what there is to choose
	until   time.Duration // the limiter said no until then
	next    int           // of the queue, what goes out next; -1: what is chosen
	hot     bool          // a reader waits for that
}

// Turn is a piece in service.
type Turn struct {
	Asker *Asker
	Piece int
	since time.Duration
	aside bool
}

// NewQueue is empty.
func NewQueue(slots Slots, r *rand.Rand) *Queue {
	if slots.Pieces <= 0 {
		slots.Pieces = 4
	}
	if slots.Most <= 0 {
		slots.Most = 32
	}
	return &Queue{slots: slots, rand: r, peers: make(map[string]*peer)}
}

// Offer makes a blob of so many pieces known; have is nil for one that is held whole.
// It is forgotten with its last asker, see Leave.
func (q *Queue) Offer(pieces int, have transfer.Bitmap) *Offer {
	all := transfer.PiecesBitmap(pieces)
	for i := range pieces {
		all.Add(i)
	}
	return &Offer{queue: q, pieces: pieces, all: all, have: have, reader: -1}
}

// Hold notes that a piece of a blob that is still arriving may be chosen.
func (o *Offer) Hold(piece int) {
	if o.have == nil {
		return
	}
	o.have.Add(piece)
	for _, a := range o.askers {
		a.idle = false
	}
}

// Complete notes that the blob is held whole by now.
func (o *Offer) Complete() {
	o.have = nil
	for _, a := range o.askers {
		a.idle = false
	}
}

// Askers is how many want the blob.
func (o *Offer) Askers() int { return len(o.askers) }

// Join adds one who wants the blob.
func (o *Offer) Join(name string, class transfer.Class) *Asker {
	q := o.queue
	if len(o.askers) == 0 {
		q.offers = append(q.offers, o)
	}
	p := q.peers[name]
	if p == nil {
		p = &peer{}
		q.peers[name] = p
	}
	if p.askers == 0 {
		p.served = q.least()
	}
	p.askers++
	a := &Asker{offer: o, peer: p, name: name, class: min(class, transfer.Prefetch), skip: transfer.PiecesBitmap(o.pieces)}
	o.askers = append(o.askers, a)
	if len(o.askers) == 2 && o.sent == nil {
		o.sent, o.first = make([]uint16, o.pieces), make([]*Asker, o.pieces)
		alone := o.askers[0] // until now; what it has it can pass on
		each(o.all, 0, func(k int) byte { return alone.skip[k] }, func(i int) bool {
			o.sent[i], o.first[i] = 1, alone
			alone.burden++
			return true
		})
	}
	return a
}

// least is the smallest account of a peer that asks, so that a new one neither has
// its turns first for hours nor waits for them.
func (q *Queue) least() float64 {
	least, some := 0.0, false
	for _, p := range q.peers {
		if p.askers > 0 && (!some || p.served < least) {
			least, some = p.served, true
		}
	}
	return least
}

// Leave takes an asker out. What only it has got counts as never sent.
func (q *Queue) Leave(a *Asker) {
	o := a.offer
	k := slices.Index(o.askers, a)
	if k < 0 {
		return
	}
	o.askers = slices.Delete(o.askers, k, k+1)
	for i, f := range o.first {
		if f == a {
			o.first[i], o.sent[i] = nil, 0
		}
	}
	o.lately = slices.DeleteFunc(o.lately, func(t Turn) bool { return t.Asker == a })
	if a.peer.askers--; a.peer.askers == 0 {
		delete(q.peers, a.name)
	}
	if len(o.askers) == 0 {
		q.offers = slices.DeleteFunc(q.offers, func(x *Offer) bool { return x == o })
	}
	q.turns = slices.DeleteFunc(q.turns, func(t *Turn) bool { return t.Asker == a })
}

// Apart says that the asker is far from the others, and gets nothing from them.
func (a *Asker) Apart() { a.apart = true }

// Class changes what the asker wants the blob for.
func (a *Asker) Class(c transfer.Class) { a.class = min(c, transfer.Prefetch) }

// Waiting is how many pieces the asker waits for.
func (a *Asker) Waiting() int { return len(a.queue) + a.credit }

// Urgent is how many of those a reader waits for.
func (a *Asker) Urgent() int { return a.urgent }

// Ask takes what an asker asks for.
func (a *Asker) Ask(ask Ask) {
	if ask.Piece == Any {
		a.credit = min(a.credit+1, maxCredit)
		return
	}
	if k := slices.Index(a.queue, ask.Piece); k >= 0 {
		if !ask.Urgent || k < a.urgent {
			return
		}
		a.queue = slices.Delete(a.queue, k, k+1)
	} else if ask.Again {
		return // it has gone out
	}
	if ask.Urgent {
		a.offer.reader = ask.Piece
	}
	if !ask.Urgent {
		a.queue = append(a.queue, ask.Piece)
		return
	}
	a.queue = slices.Insert(a.queue, a.urgent, ask.Piece)
	a.urgent++
}

// Cancel takes back an ask for a piece that is not in service yet.
func (a *Asker) Cancel(piece int) {
	k := slices.Index(a.queue, piece)
	if k < 0 {
		return
	}
	a.queue = slices.Delete(a.queue, k, k+1)
	if k < a.urgent {
		a.urgent--
	}
}

// Hear takes what an asker says about itself. An engine that cannot be told (nobody
// leaves the choice to it) need not call it.
func (a *Asker) Hear(n Note) {
	if n.Kind == Need {
		a.skip[n.Piece/8] &^= 0x80 >> (n.Piece % 8)
		a.idle, a.rests = false, 0
		return
	}
	a.skip.Add(n.Piece)
	if o := a.offer; o.first != nil && o.first[n.Piece] != nil && o.first[n.Piece] != a {
		o.first[n.Piece].burden--
		o.first[n.Piece] = nil
	}
}

// Next chooses the piece that goes out next. allow is asked last, and may say for how
// long this asker has to wait; others are tried then. When there is no turn, again
// says after how long there may be one by time alone; 0: only by what happens.
func (q *Queue) Next(now time.Duration, allow func(a *Asker, piece int) (wait time.Duration)) (t *Turn, again time.Duration) {
	busy, again := q.busy(now)
	if len(q.turns) >= q.slots.Most {
		return nil, again
	}
	for {
		a, wait := q.choose(now)
		again = sooner(again, wait)
		if a == nil || busy >= q.slots.Pieces && !q.beside(a, q.turns) {
			return nil, again
		}
		piece, wait := a.piece(now)
		if piece < 0 {
			a.idle, a.rests = wait == 0, now+wait // until it needs something again, or nobody has passed it on
			continue
		}
		if allow != nil {
			if wait := allow(a, piece); wait > 0 {
				a.until = now + wait
				continue
			}
		}
		return q.serve(now, a, piece), 0
	}
}

func sooner(a, b time.Duration) time.Duration {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// busy counts the pieces that use the uplink, and says when it may be one less.
func (q *Queue) busy(now time.Duration) (n int, again time.Duration) {
	patience := 3 * q.usual()
	for i, t := range q.turns {
		if q.beside(t.Asker, q.turns[:i]) {
			continue
		}
		if left := t.since + patience - now; left > 0 {
			n++
			again = sooner(again, left)
		}
	}
	return n, again
}

// beside says whether one of the turns is that of another connection of the same node
// about the same blob: it has several because each carries little, and they count once.
func (q *Queue) beside(a *Asker, turns []*Turn) bool {
	return a.peer.askers > 1 && slices.ContainsFunc(turns, func(t *Turn) bool {
		return t.Asker != a && t.Asker.peer == a.peer && t.Asker.offer == a.offer
	})
}

// choose finds whose turn it is: the class by weight, then whom a reader waits at,
// then the peer that has had least, then by the blob's own order.
func (q *Queue) choose(now time.Duration) (best *Asker, again time.Duration) {
	for _, o := range q.offers {
		var first *Asker
		for _, a := range o.askers {
			if a.serving {
				continue
			}
			if a.until > now {
				again = sooner(again, a.until-now)
				continue
			}
			if ok, wait := a.ready(now); !ok {
				again = sooner(again, wait)
				continue
			}
			if first == nil || o.before(a, first) {
				first = a
			}
		}
		if first != nil && (best == nil || q.before(first, best)) {
			best = first
		}
	}
	return best, again
}

// before orders the first askers of two blobs.
func (q *Queue) before(a, b *Asker) bool {
	if a.class != b.class {
		x, y := q.due(a.class), q.due(b.class)
		return x < y || x == y && a.class < b.class
	}
	if a.hot != b.hot {
		return a.hot
	}
	return a.peer.served < b.peer.served
}

// due is when it is a class's turn: stride scheduling. A class that had nothing to
// send saves nothing up.
func (q *Queue) due(c transfer.Class) float64 { return max(q.served[c], q.floor) }

// before orders two askers of one blob.
func (o *Offer) before(a, b *Asker) bool {
	if a.class != b.class {
		return o.queue.before(a, b)
	}
	if a.hot != b.hot {
		return a.hot
	}
	if x, y := a.fresh(), b.fresh(); x != y {
		return x < y
	}
	if a.peer != b.peer && a.peer.served != b.peer.served && (a.links() > 1 || b.links() > 1) {
		return a.peer.served < b.peer.served // several connections give no second share
	}
	if a.burden != b.burden {
		return a.burden < b.burden
	}
	return a.clock < b.clock
}

// links is how many connections about the blob the asker's node has.
func (a *Asker) links() (n int) {
	if a.peer.askers == 1 {
		return 1
	}
	for _, o := range a.offer.askers {
		if o.peer == a.peer {
			n++
		}
	}
	return n
}

// fresh is how often what goes out next to it has gone out; of what is chosen, 0.
func (a *Asker) fresh() uint16 {
	if a.next < 0 || a.offer.sent == nil {
		return 0
	}
	return a.offer.sent[a.queue[a.next]]
}

// ready finds what goes out next to an asker: what a reader there waits for, else what it
// asked for, of that what went out least, else what is chosen for it. When there is nothing
// for now, wait says how long others get to pass on what there is; 0: there is nothing.
func (a *Asker) ready(now time.Duration) (ok bool, wait time.Duration) {
	o := a.offer
	for k, i := range a.queue[:a.urgent] {
		left := o.passing(now, a, i)
		if left == 0 {
			a.next, a.hot = k, true
			return true, 0
		}
		wait = sooner(wait, left)
	}
	a.next, a.hot = -1, false
	for k := a.urgent; k < len(a.queue); k++ {
		if a.next < 0 || o.sent != nil && o.sent[a.queue[k]] < o.sent[a.queue[a.next]] {
			a.next = k
		}
	}
	if a.next >= 0 {
		return true, 0
	}
	if a.credit == 0 || a.idle {
		return false, wait
	}
	if a.rests > now {
		return false, sooner(wait, a.rests-now)
	}
	return true, 0
}

// passing says for how long to leave it to others to pass a piece on to an asker. Those that
// begin together, and clients that read at many nodes at once, want the same pieces at the same
// time: each would have from here what one of them has just got and has said to nobody yet.
func (o *Offer) passing(now time.Duration, a *Asker, piece int) (left time.Duration) {
	if o.have != nil || o.pieces == 1 || a.apart {
		return 0
	}
	for _, t := range o.lately {
		if t.Piece == piece && t.Asker != a && !t.Asker.apart {
			left = max(left, t.since+o.queue.grace()-now)
		}
	}
	return left
}

// grace is how long others get to pass a piece on.
func (q *Queue) grace() time.Duration {
	return min(max(passOn*q.usual(), passOnSoon), passOnLate)
}

// piece takes the one to send it; -1: none. wait is as in ready.
func (a *Asker) piece(now time.Duration) (piece int, wait time.Duration) {
	if a.next >= 0 {
		return a.queue[a.next], 0
	}
	return a.offer.least(now, a)
}

// least is the piece to choose for an asker: the one that went out least; -1: none. Where
// there are readers it is one of the next after them, for they all get on by what comes
// in order; not the very next, which another holder would choose too. wait is as in ready.
func (o *Offer) least(now time.Duration, a *Asker) (best int, wait time.Duration) {
	seen, fresh, ahead := 0, 0, 0
	best = -1
	wanted := func(k int) byte {
		if o.have == nil {
			return ^a.skip[k]
		}
		return ^a.skip[k] & o.have[k]
	}
	start := o.queue.rand.IntN(len(o.all))
	if o.reader >= 0 {
		start, ahead = o.reader/8, o.queue.rand.IntN(inOrder)
	}
	each(o.all, start, wanted, func(i int) bool {
		if o.sent == nil {
			best = i
			return false
		}
		seen++
		if o.sent[i] > 0 {
			if left := o.passing(now, a, i); left > 0 {
				wait = sooner(wait, left)
				return seen < sample
			}
		}
		if best < 0 || o.sent[i] < o.sent[best] || o.sent[i] == 0 {
			best = i
		}
		if o.sent[i] == 0 {
			fresh++
		}
		return seen < sample && fresh <= ahead
	})
	return best, wait
}

// serve puts a piece into service.
func (q *Queue) serve(now time.Duration, a *Asker, piece int) *Turn {
	o := a.offer
	if a.next < 0 {
		a.credit--
	}
	a.Cancel(piece)
	a.skip.Add(piece)
	if o.sent != nil {
		if o.sent[piece] == 0 {
			o.first[piece] = a
			a.burden++
		}
		o.sent[piece]++
	}
	q.clock++
	a.clock, a.serving = q.clock, true
	a.peer.served++
	q.floor = q.due(a.class)
	q.served[a.class] = q.floor + 1/float64(a.class.Weight())
	t := &Turn{Asker: a, Piece: piece, since: now}
	if len(q.turns) == 0 {
		q.last = now
	}
	q.turns = append(q.turns, t)
	past := 0
	for past < len(o.lately) && now-o.lately[past].since >= q.grace() {
		past++
	}
	o.lately = append(o.lately[past:], *t)
	return t
}

// Aside lets the asker have another turn while this one goes on, as when the piece is
// slow to be read. Of one that has ended the asker may have its next turn by now.
func (q *Queue) Aside(t *Turn) {
	if !t.aside && slices.Contains(q.turns, t) {
		t.aside, t.Asker.serving = true, false
	}
}

// Done ends a turn, also that of an asker that has left.
func (q *Queue) Done(now time.Duration, t *Turn) {
	if !t.aside {
		t.Asker.serving = false
	}
	k := slices.Index(q.turns, t)
	if k < 0 {
		return
	}
	q.turns = slices.Delete(q.turns, k, k+1)
	gap := now - q.last
	q.last = now
	switch {
	case t.Piece == t.Asker.offer.pieces-1: // it may be short, and says nothing
	case q.gap == 0:
		q.gap = min(gap, mostGap)
	default:
		q.gap += (min(gap, max(2*q.gap, mostGap)) - q.gap) / 8
	}
}

const (
	// mostGap bounds what one piece says, for it may have waited for a dead receiver alone.
	mostGap = time.Second
	// unknown is how long a piece is taken to be in service before the first has gone out.
	unknown = 200 * time.Millisecond
	// shortest is how long one is taken to be in service at least.
	shortest = 16 * time.Millisecond
)

// usual is how long a piece is in service while as many are as may be. It follows from how fast
// they end, not from how long each takes: that says more of its receiver, and of how many others
// are in service.
func (q *Queue) usual() time.Duration {
	if q.gap == 0 {
		return unknown
	}
	return max(time.Duration(q.slots.Pieces)*q.gap, shortest)
}
