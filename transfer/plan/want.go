package plan

import (
	"math/bits"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

const (
	// sample bounds how many pieces are looked at for one choice: a choice among more
	// is no better, and a blob may have a million of them.
	sample = 512
	// maxCredit is how many pieces a holder may be left to choose.
	maxCredit = 2
	// ahead is for how long a holder is asked ahead, with at most so many pieces. A packet that is
	// lost and lost again holds up what comes behind it, for several round trips: meanwhile
	// nothing arrives, so nothing is asked for, and who sends would run out of what to send.
	ahead     = 1500 * time.Millisecond
	mostAhead = 64
)

// Any as an Ask's piece leaves the choice to the holder.
const Any = -1

// Ask is what to ask of a holder.
type Ask struct {
	Piece  int  // or Any
	Urgent bool // a reader waits for it
	Again  bool // it was asked for before, and is urgent by now: it overtakes if it is not on its way
}

// Note is what holders should hear about this node; see Holder.Hears.
type Note struct {
	Piece int
	Kind  NoteKind
}

// NoteKind says what became of a piece.
type NoteKind uint8

const (
	Have NoteKind = iota // it is held here now and may be asked for
	Skip                 // it is here or on its way: do not choose it
	Need                 // it is not on its way after all: it may be chosen
)

// Rules of a Want; zero values mean the defaults named beside them.
type Rules struct {
	// Depth is how many pieces to have asked of a holder while nobody else is known
	// to want the blob, at least; of one that is fast as many as come in a while. 16.
	Depth int
	// SwarmDepth is the same of a holder that is still fetching. 2.
	SwarmDepth int
	// Steal is how long a piece may make no progress before another holder is asked
	// for it too. 1 s.
	Steal time.Duration
	// Specific: never leave the choice to a holder.
	Specific bool
}

// Want is a blob that this node fetches. Times are since any fixed moment. Not safe
// for concurrent use.
type Want struct {
	rules   Rules
	rand    *rand.Rand
	missing transfer.Bitmap // to be asked for
	left    int             // how many those are
	held    transfer.Bitmap
	spread  []uint16 // how many near holders that are still fetching have the piece
	asks    map[int]*request
	holders []*Holder
	notes   []Note
	back    []Cancel
	partial int // holders that are still fetching
	choice  int // holders that choose
	near    int // near holders that have everything

	urgent []int // what readers wait for
	rush   int   // the first piece of a reader that has just come; -1: none
	// awaited is the piece that the first reader has been waiting for since awaits.
	awaited int
	awaits  time.Duration

	elected bool
}

// request is a piece that was asked for: of whom (the second only when the first is
// slow) and since when there has been no progress.
type request struct {
	of     [2]*Holder
	since  time.Duration
	urgent bool
	coming bool
}

// Holder is a node that has the blob or a part of it, as a Want knows it.
type Holder struct {
	// Owner is the engine's; plan never looks at it.
	Owner any

	complete bool
	choosing bool
	far      bool
	dry      bool // it has nothing that is missing, as was found not long ago
	gone     bool
	have     transfer.Bitmap
	asked    []int         // in order
	credit   int           // pieces left to it to choose
	last     time.Duration // when a piece last came, or it had nothing to do
	came     int           // pieces from it
	pace     time.Duration // from piece to piece; 0: not known
	moved    time.Duration // when bytes last came from it
}

// NewWant begins a fetch of so many pieces, all of them missing.
func NewWant(pieces int, rules Rules, r *rand.Rand) *Want {
	if rules.Depth <= 0 {
		rules.Depth = 16
	}
	if rules.SwarmDepth <= 0 {
		rules.SwarmDepth = 2
	}
	if rules.Steal <= 0 {
		rules.Steal = time.Second
	}
	w := &Want{
		rules: rules, rand: r, left: pieces,
		missing: transfer.PiecesBitmap(pieces),
		held:    transfer.PiecesBitmap(pieces),
		spread:  make([]uint16, pieces),
		asks:    make(map[int]*request),
		rush:    -1,
		awaited: -1,
		elected: true,
	}
	for i := range pieces {
		w.missing.Add(i)
	}
	return w
}

// SetAside takes pieces out of what is missing until they are verified again.
func (w *Want) SetAside(pieces []int) {
	for _, i := range pieces {
		w.unmiss(i)
	}
}

// PutBack makes a piece that was set aside missing. Holders that choose were told to
// leave it out and hear that it may be chosen after all.
func (w *Want) PutBack(piece int) {
	if !w.held.Has(piece) && w.asks[piece] == nil {
		w.miss(piece)
		w.tell(Note{piece, Need})
	}
}

// Join adds a holder: have is nil for one that has everything, far says that it is
// beyond a slow link. Send it what All gives if it Hears anything.
func (w *Want) Join(have transfer.Bitmap, far bool) *Holder {
	h := &Holder{far: far}
	w.holders = append(w.holders, h)
	if have == nil {
		h.complete = true
	} else {
		h.have = transfer.PiecesBitmap(len(w.spread))
		w.partial++
		for i := range w.spread {
			if have.Has(i) {
				w.Has(h, i)
			}
		}
	}
	w.rank()
	return h
}

// Has notes that a holder has a piece more.
func (w *Want) Has(h *Holder, piece int) {
	if h.complete || h.gone || h.have.Has(piece) {
		return
	}
	h.have.Add(piece)
	h.dry = false
	if !h.far {
		w.spread[piece]++
	}
}

// Offers says whether a holder has anything that is not here yet.
func (w *Want) Offers(h *Holder) bool {
	if h.complete {
		return true
	}
	for i := range h.have {
		if h.have[i]&^w.held[i] != 0 {
			return true
		}
	}
	return false
}

// Completed notes that a holder has everything by now.
func (w *Want) Completed(h *Holder) {
	if h.complete || h.gone {
		return
	}
	w.unspread(h)
	h.complete, h.have = true, nil
	w.rank()
}

// unspread takes a partial holder out of the counts.
func (w *Want) unspread(h *Holder) {
	w.partial--
	for i := range w.spread {
		if !h.far && h.have.Has(i) {
			w.spread[i]--
		}
	}
	for _, o := range w.holders {
		o.dry = false // what a near one had and has no more is asked from afar
	}
}

// rank decides which holders choose: near ones that have everything, once others
// fetch too; it stays so, since they know then what not to choose. Far ones do not:
// they would send what is near already.
func (w *Want) rank() {
	w.choice, w.near = 0, 0
	var chosen []*Holder // from now on
	for _, h := range w.holders {
		if h.complete && !h.far {
			w.near++
		}
		if h.complete && !h.far && w.partial > 0 && !w.rules.Specific {
			if !h.choosing {
				chosen = append(chosen, h)
			}
			h.choosing = true
		}
		if h.choosing {
			w.choice++
		}
	}
	for _, h := range chosen {
		for _, i := range slices.Clone(h.asked) {
			if r := w.asks[i]; r != nil && !r.coming && !r.urgent {
				w.Refused(h, i)
				w.back = append(w.back, Cancel{h, i})
			}
		}
	}
}

// Back takes what was asked of holders that have come to choose since: they would send it beside
// what they choose. Tell them.
func (w *Want) Back() (cancel []Cancel) {
	cancel, w.back = w.back, nil
	return cancel
}

// Elect says whether this node is the one of its site that asks far holders. What
// one that is not any more has asked of them, and is not on its way, is taken back:
// tell the holders.
func (w *Want) Elect(elected bool) (cancel []Cancel) {
	w.elected = elected
	if elected {
		return nil
	}
	for _, h := range w.holders {
		if !h.far {
			continue
		}
		for _, i := range slices.Clone(h.asked) {
			if r := w.asks[i]; r == nil || !r.coming {
				w.Refused(h, i)
				cancel = append(cancel, Cancel{h, i})
			}
		}
	}
	return cancel
}

// Cancel is a piece that is not needed from a holder any more.
type Cancel struct {
	Holder *Holder
	Piece  int
}

// Leave takes a holder out; what was asked of it is missing again.
func (w *Want) Leave(h *Holder) {
	if h.gone {
		return
	}
	h.gone = true
	w.holders = slices.DeleteFunc(w.holders, func(o *Holder) bool { return o == h })
	if !h.complete {
		w.unspread(h)
	}
	w.Forget(h)
	w.rank()
}

// Forget notes that nothing that was asked of a holder will come, as when its
// connection breaks; it may be asked again.
func (w *Want) Forget(h *Holder) {
	for len(h.asked) > 0 {
		w.Refused(h, h.asked[0])
	}
	h.credit = 0
}

// Refused notes that a holder will not send a piece that was asked of it; for Any,
// that it has nothing to choose for now.
func (w *Want) Refused(h *Holder, piece int) {
	if piece == Any {
		h.credit = max(0, h.credit-1)
		return
	}
	h.drop(piece)
	r := w.asks[piece]
	if r == nil {
		return
	}
	switch h {
	case r.of[0]:
		r.of[0], r.of[1] = r.of[1], nil
	case r.of[1]:
		r.of[1] = nil
	}
	if r.of[0] == nil {
		delete(w.asks, piece)
		w.miss(piece)
		w.tell(Note{piece, Need})
	}
}

// Progress notes that a holder sends something, be it a part of a piece: what it was
// asked for is on its way, however long that takes.
func (w *Want) Progress(now time.Duration, h *Holder) { h.moved = now }

// Begun notes that a holder begins to send a piece, and says
// who was asked for it too and should hear that it is not needed from them. ok is
// false for a piece that was neither asked for nor left to the holder to choose.
func (w *Want) Begun(now time.Duration, h *Holder, piece int) (cancel []Cancel, ok bool) {
	h.moved = now
	if slices.Contains(h.asked, piece) {
		if r := w.asks[piece]; r != nil {
			if !r.coming {
				cancel = r.spare(h, piece)
			}
			r.coming = true
		}
		return cancel, true
	}
	if h.credit == 0 {
		return nil, false
	}
	h.credit--
	if w.held.Has(piece) {
		return nil, true
	}
	if r := w.asks[piece]; r != nil {
		cancel = r.takeBack(h, piece)
		r.of, r.since, r.coming = [2]*Holder{h, nil}, now, true
		h.asked = append(h.asked, piece)
		return cancel, true
	}
	w.ask(now, h, piece, false).coming = true
	return nil, true
}

// Arrived notes that a piece is held here, from a holder or, for nil, from an earlier
// attempt; it says who should hear that it is not needed from them any more.
func (w *Want) Arrived(now time.Duration, h *Holder, piece int) (cancel []Cancel) {
	if h != nil {
		h.drop(piece)
		h.timed(now)
	}
	if w.held.Has(piece) {
		return nil
	}
	w.unmiss(piece)
	w.held.Add(piece)
	if piece == w.rush {
		w.rush = -1
	}
	if r := w.asks[piece]; r != nil {
		cancel = r.takeBack(h, piece)
		delete(w.asks, piece)
	} else {
		w.tell(Note{piece, Skip})
	}
	w.tell(Note{piece, Have})
	return cancel
}

// Owes says whether a holder has something to send: what it was asked for, or what it
// may choose.
func (w *Want) Owes(h *Holder) bool { return len(h.asked) > 0 || h.credit > 0 && w.left > 0 }

// Left is how many pieces are neither held, asked for nor set aside.
func (w *Want) Left() int { return w.left }

// Held says whether a piece is here.
func (w *Want) Held(piece int) bool { return w.held.Has(piece) }

// Notes takes what is new for holders to hear.
func (w *Want) Notes() []Note {
	n := w.notes
	w.notes = nil
	return n
}

// All is the set of pieces to tell a holder that has just begun to hear notes of the
// kind, Have or Skip.
func (w *Want) All(kind NoteKind) transfer.Bitmap {
	if kind == Have {
		return w.held.Clone()
	}
	all := transfer.PiecesBitmap(len(w.spread))
	for i := range w.spread {
		if !w.missing.Has(i) {
			all.Add(i)
		}
	}
	return all
}

// Hears says which notes concern a holder: Have those that are still fetching; Skip
// and Need those that choose.
func (h *Holder) Hears(kind NoteKind) bool {
	if kind == Have {
		return !h.complete
	}
	return h.choosing
}

func (w *Want) tell(n Note) {
	if n.Kind == Have && w.partial > 0 || n.Kind != Have && w.choice > 0 {
		w.notes = append(w.notes, n)
	}
}

func (w *Want) miss(i int) {
	if w.missing.Has(i) {
		return
	}
	w.missing.Add(i)
	w.left++
	for _, h := range w.holders {
		h.dry = false
	}
}

func (w *Want) unmiss(i int) {
	if w.missing.Has(i) {
		w.missing[i/8] &^= 0x80 >> (i % 8)
		w.left--
	}
}

func (w *Want) ask(now time.Duration, h *Holder, i int, urgent bool) *request {
	w.unmiss(i)
	r := &request{of: [2]*Holder{h, nil}, since: now, urgent: urgent}
	w.asks[i] = r
	h.took(now, i)
	w.tell(Note{i, Skip})
	return r
}

// takeBack takes the piece back from whoever was asked for it besides h.
func (r *request) takeBack(h *Holder, piece int) (cancel []Cancel) {
	for _, o := range r.of {
		if o != nil && o != h {
			o.drop(piece)
			cancel = append(cancel, Cancel{o, piece})
		}
	}
	return cancel
}

// spare takes the piece back from one who chooses, and was asked before h came to have it.
func (r *request) spare(h *Holder, piece int) (cancel []Cancel) {
	for _, o := range r.of {
		if o != nil && o != h {
			cancel = r.takeBack(h, piece)
			r.of = [2]*Holder{h, nil}
		}
	}
	return cancel
}

func (h *Holder) has(piece int) bool { return h.complete || h.have.Has(piece) }

func (h *Holder) took(now time.Duration, i int) {
	if len(h.asked) == 0 {
		h.last = now
	}
	h.asked = append(h.asked, i)
}

func (h *Holder) drop(i int) {
	if k := slices.Index(h.asked, i); k >= 0 {
		h.asked = slices.Delete(h.asked, k, k+1)
	}
}

// timed measures the holder's pace.
func (h *Holder) timed(now time.Duration) {
	gap := max(now-h.last, time.Microsecond)
	h.last, h.moved = now, now
	h.came++
	if h.came == 1 {
		return // what it began with says nothing
	}
	if h.pace == 0 {
		h.pace = gap
		return
	}
	h.pace += (gap - h.pace) / 4
}

// each calls f with the pieces of the set from the byte start on, going around, until
// f says that it has seen enough.
func each(set transfer.Bitmap, start int, of func(i int) byte, f func(i int) bool) {
	for k := range len(set) {
		at := start + k
		if at >= len(set) {
			at -= len(set)
		}
		for b := set[at] & of(at); b != 0; {
			i := bits.LeadingZeros8(b)
			b &^= 0x80 >> i
			if !f(at*8 + i) {
				return
			}
		}
	}
}
