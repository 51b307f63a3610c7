package stream

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"slices"
	"time"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/plan"
)

// tablePatience bounds how long a peer may take to compute a piece table for the first
// time: it reads the whole blob.
const tablePatience = 10 * time.Minute

// limitPatience bounds how long a peer's limits may hold back what it was asked for.
const limitPatience = 10 * time.Minute

// deal works with one holder, session after session, until the fetch has ended or the
// holder is dropped.
func (h *hunt) deal(ctx context.Context, hd *holder, l *link, st state) {
	for {
		err := h.session(ctx, hd, l, st)
		h.disengage(hd)
		if err == nil {
			h.e.links.put(hd.peer, l)
			return
		}
		h.e.links.drop(hd.peer, l)
		for {
			if !h.failed(ctx, hd, err) {
				return
			}
			l, st, err = h.e.open(ctx, hd.peer, h.hello(hd.peer), nil)
			if err == nil && !st.serves() {
				l.close()
				err = st.failure()
			}
			if err == nil {
				break
			}
		}
	}
}

// disengage takes back what was asked of a holder whose session has ended.
func (h *hunt) disengage(hd *holder) {
	h.mu.Lock()
	hd.link = nil
	if hd.planned != nil {
		h.want.Forget(hd.planned)
	}
	hd.in.end()
	h.mu.Unlock()
	h.pump()
}

// failed deals with the end of a session: false when the holder is dropped for it or
// ctx is done, else it waits a while before the next try.
func (h *hunt) failed(ctx context.Context, hd *holder, err error) bool {
	if ctx.Err() != nil || h.isFinished() {
		return false
	}
	var f *failure
	if !errors.As(err, &f) {
		f = &failure{why: Broken, err: err}
	}
	h.mu.Lock()
	if hd.betrayed != nil {
		f = hd.betrayed
	}
	if f.why == Gone {
		hd.hops = transfer.NoHops
	}
	final := hd.strike(f)
	if final {
		hd.dropped = f
	}
	wait := hd.backoff(h.e.cfg.Backoff)
	h.mu.Unlock()
	return !final && pause(ctx, wait)
}

// session works with a holder until it breaks off (the error), or until the fetch has
// ended and the holder has said bye (nil).
func (h *hunt) session(ctx context.Context, hd *holder, l *link, st state) error {
	stop := context.AfterFunc(ctx, l.close)
	defer stop()
	if h.whole != nil {
		return h.pour(ctx, hd, l, st)
	}
	if err := h.engaged(hd, l, st); err != nil {
		return err
	}
	h.pump()
	for {
		k, n, err := l.header(h.e.cfg.StallTimeout, h.blob.Size)
		if err != nil {
			return err
		}
		switch k {
		case kindPiece:
			if err := h.piece(ctx, hd, l, n); err != nil {
				return err
			}
			continue
		case kindTable:
			if err := h.table(hd, l, n); err != nil {
				return err
			}
			continue
		}
		body, err := l.body(n, h.e.cfg.StallTimeout)
		if err != nil {
			return err
		}
		if k == kindBye && h.isFinished() {
			return nil
		}
		if k == kindThin {
			h.widen(ctx, hd)
			continue
		}
		if k == kindHops {
			if err := h.told(hd, body); err != nil {
				return err
			}
			continue
		}
		if err := h.hear(hd, k, body); err != nil {
			return err
		}
	}
}

// engaged begins a session in the planner's eyes, unless another connection to the same
// node has been its end.
func (h *hunt) engaged(hd *holder, l *link, st state) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if hd.betrayed != nil {
		return hd.betrayed
	}
	if hd.main != nil && (hd.main.betrayed != nil || hd.main.dropped != nil) {
		return net.ErrClosed
	}
	now := time.Now()
	said := hd.words
	hd.words = words{}
	hd.link, hd.told, hd.tabled, hd.excused, hd.hoped = l, false, said.table, 0, nil
	hd.heard, hd.moved, hd.hops = now, now, 0
	hd.complete = hd.complete || st.held == heldComplete
	switch {
	case hd.planned != nil && hd.complete:
		h.want.Completed(hd.planned)
	case hd.planned != nil:
	case hd.complete:
		hd.planned = h.want.Join(nil, hd.far)
	default:
		hd.planned = h.want.Join(transfer.PiecesBitmap(transfer.Pieces(h.blob.Size)), hd.far)
	}
	hd.planned.Owner = hd
	if hd.tabled && h.tableOf == nil {
		h.tableOf, h.tableSince = hd, now
	}
	if hd.complete {
		h.spoken(hd, said.pieces)
	} else { // nobody knows yet which of them it has
		hd.hoped, hd.excused = said.pieces, len(said.pieces)
	}
	if h.isFinished() { // it came too late
		h.e.links.part(hd.peer, l)
		hd.link = nil
	}
	h.electLocked()
	return nil
}

// spoken tells the planner what a holder was asked with the hello; mu is held.
func (h *hunt) spoken(hd *holder, pieces []int) {
	for _, i := range pieces {
		if !h.want.Asked(h.now(), hd.planned, i) {
			hd.excused++
		}
	}
}

// hear takes a frame that brings no bytes.
func (h *hunt) hear(hd *holder, k kind, body []byte) error {
	pieces := transfer.Pieces(h.blob.Size)
	h.mu.Lock()
	hd.heard = time.Now()
	var err error
	switch k {
	case kindBeat, kindWait:
		if k == kindWait {
			hd.limited = hd.heard
		}
		err = h.overdue(hd)
		h.mu.Unlock()
		return err
	case kindHave:
		var list []int
		if list, err = decodePieces(body, pieces); err == nil {
			for _, i := range list {
				h.want.Has(hd.planned, i)
			}
		}
	case kindHaves:
		var set transfer.Bitmap
		if set, err = transfer.DecodeBitmap(body, pieces); err == nil {
			for i := range pieces {
				if set.Has(i) {
					h.want.Has(hd.planned, i)
				}
			}
			has := slices.DeleteFunc(slices.Clone(hd.hoped), func(i int) bool { return !set.Has(i) })
			hd.excused -= len(has)
			hd.hoped = slices.DeleteFunc(hd.hoped, set.Has)
			h.spoken(hd, has)
		}
	case kindComplete:
		hd.complete = true
		h.want.Completed(hd.planned)
		h.electLocked()
	case kindGone:
		err = &failure{why: Gone, err: transfer.ErrNotHeld}
	case kindRefuse:
		var list []int
		if list, err = decodePieces(body, pieces); err == nil {
			err = h.refused(hd, list)
		}
	default:
		err = fail(Broken, "frame of kind %d from a holder: %w", k, errFrame)
	}
	h.mu.Unlock()
	if err != nil {
		return err
	}
	h.pump()
	return nil
}

// overdue says whether a holder that is alive has owed a piece for too long; mu is held.
func (h *hunt) overdue(hd *holder) error {
	now := time.Now()
	patience := 3 * h.e.cfg.StallTimeout
	if hd.tabled && !h.ready {
		patience = tablePatience
	} else if now.Sub(hd.limited) < patience {
		patience = limitPatience
	} else if !h.want.Owes(hd.planned) {
		hd.moved = now
	}
	if now.Sub(hd.moved) > patience {
		return &failure{why: Stalled, err: errStalled}
	}
	return nil
}

// refused takes pieces that a holder cannot send; it rests for a while then, and too
// many in a row end its part. mu is held.
func (h *hunt) refused(hd *holder, list []int) error {
	for _, i := range list {
		h.want.Refused(hd.planned, i)
		hd.in.lapse(i)
	}
	if len(list) > 0 {
		// What was asked with the hello it never said that it has.
		hopes := len(hd.hoped)
		hd.hoped = slices.DeleteFunc(hd.hoped, func(i int) bool { return slices.Contains(list, i) })
		if hopes -= len(hd.hoped); hopes > 0 && hopes == len(list) {
			hd.excused = max(0, hd.excused-hopes)
			return nil
		}
	}
	f := fail(Broken, "cannot send piece %v of what it says it holds", list)
	if len(list) == 0 || hd.strike(f) {
		return f
	}
	wait := hd.backoff(h.e.cfg.Backoff)
	hd.rests = time.Now().Add(wait)
	time.AfterFunc(wait+time.Millisecond, h.pump)
	return nil
}

// piece reads a piece and keeps it if it is right.
func (h *hunt) piece(ctx context.Context, hd *holder, l *link, length int64) error {
	if length < pieceHeader {
		return fail(BadSize, "piece frame of %d bytes: %w", length, errFrame)
	}
	var head [pieceHeader]byte
	if err := l.read(head[:], h.e.cfg.StallTimeout, nil); err != nil {
		return err
	}
	i, n, err := decodePieceHeader(head[:], length, h.blob.Size)
	if err != nil {
		return &failure{why: BadSize, err: err}
	}
	if err := h.begun(hd, i); err != nil {
		return err
	}
	buf, err := h.e.buffers.take(ctx)
	if err != nil {
		return err
	}
	defer h.e.buffers.give(buf)
	if err := h.admit(ctx, hd, int(n)); err != nil {
		return err
	}
	data := buf[:n]
	if err := l.read(data, h.e.cfg.StallTimeout, func() { h.progress(hd) }); err != nil {
		return err
	}
	if h.isFinished() || h.a.Holds(i) {
		h.arrived(hd, i)
		return nil
	}
	switch err := h.a.Store(i, data); {
	case errors.Is(err, transfer.ErrBadPiece):
		return &failure{why: BadPiece, err: err}
	case err != nil:
		h.die(err)
		return err
	}
	if h.e.cfg.Hooks.Moved != nil {
		h.e.cfg.Hooks.Moved(hd.peer.ID, n)
	}
	if h.e.cfg.Meter != nil {
		h.e.cfg.Meter.Received(h.flow(hd), int(n))
	}
	h.arrived(hd, i)
	return nil
}

// begun notes that a piece is on its way from a holder.
func (h *hunt) begun(hd *holder, i int) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	hd.heard = time.Now()
	cancel, ok := h.want.Begun(h.now(), hd.planned, i)
	h.cancel(cancel)
	if !h.ready {
		return fail(Broken, "sent piece %d before the piece table", i)
	}
	if ok {
		return nil
	}
	if hd.excused == 0 {
		return fail(Broken, "sent piece %d, which nobody asked it for", i)
	}
	hd.excused--
	return nil
}

func (h *hunt) progress(hd *holder) {
	h.mu.Lock()
	defer h.mu.Unlock()
	hd.heard = time.Now()
	hd.moved = hd.heard
	h.want.Progress(h.now(), hd.planned)
}

// arrived notes a held piece (hd is nil when it was here before) and, after the last
// one, the end.
func (h *hunt) arrived(hd *holder, i int) {
	h.mu.Lock()
	var planned *plan.Holder
	if hd != nil {
		planned, hd.strikes = hd.planned, 0
	}
	h.cancel(h.want.Arrived(h.now(), planned, i))
	h.mu.Unlock()
	if h.a.Complete() {
		h.finish.Do(func() { close(h.finished) })
		return
	}
	h.pump()
}

// cancel tells holders what is not needed from them; mu is held.
func (h *hunt) cancel(list []plan.Cancel) {
	for _, c := range list {
		hd := c.Holder.Owner.(*holder)
		if hd.in.lapse(c.Piece) && hd.link != nil {
			hd.excused++ // it may be on its way
			hd.link.send(func(to []byte) []byte { return appendPieces(to, kindCancel, c.Piece) })
		}
	}
}

// pump asks everybody for what the planner wants of them.
func (h *hunt) pump() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.whole != nil || h.isFinished() {
		return
	}
	now := time.Now()
	h.cancel(h.want.Back())
	h.askTable()
	// Of those that have what a reader waits for the first one is asked: not always the same.
	first := rand.IntN(max(1, len(h.dealing)))
	for _, hd := range slices.Concat(h.dealing[first:], h.dealing[:first]) {
		if hd.link == nil || hd.planned == nil || !h.ready && !hd.tabled || now.Before(hd.rests) {
			continue
		}
		next := h.want.Next
		if !h.ready { // what it sends comes after the table
			next = h.want.NextUrgent
		}
		var asks []plan.Ask
		owed := h.want.Owes(hd.planned)
		ailing := hd.strikes > 0 // what breaks off soon is asked for one piece at a time
		for !ailing || !owed && len(asks) == 0 {
			a, ok := h.decide(hd, next)
			if !ok {
				break
			}
			asks = append(asks, a)
		}
		if len(asks) == 0 {
			continue
		}
		if !owed {
			hd.moved = now
		}
		// What not to choose has to be there before the choice.
		h.notify()
		hd.link.send(func(to []byte) []byte { return appendAsks(to, asks) })
	}
	h.notify()
}

// notify tells those that choose what not to choose; mu is held. What this node holds
// is told by the desk, to those that ask.
func (h *hunt) notify() {
	notes := h.want.Notes()
	for _, hd := range h.dealing {
		if hd.link == nil || hd.planned == nil || !hd.planned.Hears(plan.Skip) {
			continue
		}
		if !hd.told {
			hd.told = true
			all := h.want.All(plan.Skip)
			hd.link.send(func(to []byte) []byte { return frame(to, kindSkips, all...) })
			continue
		}
		hd.link.send(func(to []byte) []byte { return appendNotes(to, notes) })
	}
}

// appendNotes appends notes in their order: of two about a piece the last one counts.
func appendNotes(to []byte, notes []plan.Note) []byte {
	for len(notes) > 0 {
		k, list := notes[0].Kind, []int(nil)
		for len(notes) > 0 && notes[0].Kind == k {
			list = append(list, notes[0].Piece)
			notes = notes[1:]
		}
		switch k {
		case plan.Skip:
			to = appendPieces(to, kindSkip, list...)
		case plan.Need:
			to = appendPieces(to, kindNeed, list...)
		}
	}
	return to
}

// askTable asks one holder for the piece table, one that has everything if there is
// one: the others would send the same again. But nobody holds the others up for longer
// than a stall. mu is held.
func (h *hunt) askTable() {
	if h.ready {
		return
	}
	now := time.Now()
	var next *holder
	for _, hd := range h.dealing {
		if hd.link != nil && !hd.tabled && (next == nil || hd.complete && !next.complete) {
			next = hd
		}
	}
	if next == nil {
		return
	}
	if of := h.tableOf; of != nil && of.link != nil && of.tabled && (of.complete || !next.complete) && now.Sub(h.tableSince) < h.e.cfg.StallTimeout {
		return
	}
	h.tableOf, h.tableSince = next, now
	next.tabled, next.moved = true, now
	next.link.send(func(to []byte) []byte { return frame(to, kindTables) })
}

// table reads a piece table and verifies it.
func (h *hunt) table(hd *holder, l *link, length int64) error {
	h.mu.Lock()
	tabled := hd.tabled
	hd.tabled = false
	h.mu.Unlock()
	if !tabled || length != transfer.TableSize(h.blob.Size) {
		return fail(BadTable, "piece table of %d bytes, want %d: %w", length, transfer.TableSize(h.blob.Size), errFrame)
	}
	raw := make([]byte, length)
	if err := l.read(raw, h.e.cfg.StallTimeout, func() { h.progress(hd) }); err != nil {
		return err
	}
	t, err := transfer.DecodePieceTable(raw)
	if err == nil {
		err = t.Verify(h.blob)
	}
	if err != nil {
		return &failure{why: BadTable, err: err}
	}
	h.mu.Lock()
	hd.strikes = 0
	h.mu.Unlock()
	h.learn(t)
	h.pump()
	return nil
}
