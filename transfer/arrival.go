package transfer

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// Arrival is the engine's side of a Fetch: the one gate that bytes pass on their
// way in. An engine makes it, gives it the Partial and the piece table, stores what
// it received, and ends it with Commit or Fail. Safe for concurrent use.
type Arrival struct{ f *Fetch }

// NewArrival starts the account of a blob that is to be fetched. reopen gives the
// blob to readers who come after a good end.
func NewArrival(blob Blob, reopen func(context.Context) (Content, error)) *Arrival {
	return &Arrival{&Fetch{
		blob:    blob,
		done:    make(chan struct{}),
		changed: make(chan struct{}),
		held:    PiecesBitmap(Pieces(blob.Size)),
		cursors: make(map[*reader]int), expected: -1,
		content: &shared{refs: 1},
		reopen:  reopen,
	}}
}

// Present ends the fetch well without having begun: the node holds the blob. The
// content belongs to the arrival from here on.
func (a *Arrival) Present(content Content) {
	a.f.content.begin(content, content.Close)
	a.holdAll()
	a.end(nil)
	_ = a.f.content.leave()
}

// For says what the blob is wanted for, before anybody joins; else it is for a pull.
func (a *Arrival) For(c Class) { a.f.class.Store(int32(c)) }

// Urge makes the fetch as urgent as the class, if it is less.
func (a *Arrival) Urge(c Class) {
	for was := a.f.class.Load(); int32(c) < was; was = a.f.class.Load() {
		if a.f.class.CompareAndSwap(was, int32(c)) {
			return
		}
	}
}

// Adopt gives a blob that is fetched without a root one, which is trusted, so that its
// pieces can be read as soon as they are verified. The engine goes on by it. false when
// there is one already, or the fetch has ended.
func (a *Arrival) Adopt(root []byte) bool {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	if a.f.blob.Root != nil || a.Ended() {
		return false
	}
	a.f.blob.Root = slices.Clone(root)
	return true
}

// Suppose marks a piece that was put down by Write, for a later attempt by a root to
// verify it.
func (a *Arrival) Suppose(piece int) error {
	if err := a.f.partial.MarkPiece(piece); err != nil {
		return fmt.Errorf("blob %s: marking piece %d as supposed: %w", a.f.blob.Digest, piece, err)
	}
	return nil
}

// OnHold has f called for each piece after it is held, and with -1 after the end of
// the fetch. Call it before Begin; f must not block.
func (a *Arrival) OnHold(f func(piece int)) { a.f.onHold = f }

// NoHops is so far away that nobody waits for it. Fetches that have nobody but each other
// count up to it, and then they end.
const NoHops = 8

// Hops is how many nodes that are still fetching the blob themselves are between this one
// and one that has what is missing here: 0 while this node knows such a one or is looking
// for it, and NoHops when it knows of none.
func (a *Arrival) Hops() int { return int(a.f.hops.Load()) }

// SetHops says what Hops is from now on. Its callers take turns.
func (a *Arrival) SetHops(hops int) {
	hops = min(hops, NoHops)
	if int(a.f.hops.Swap(int32(hops))) == hops {
		return
	}
	a.f.mu.Lock()
	a.f.announce()
	a.f.mu.Unlock()
	if a.f.onHops != nil {
		a.f.onHops(hops)
	}
}

// OnHops has f called when Hops has changed. Call it before Begin; f must not block.
func (a *Arrival) OnHops(f func(hops int)) { a.f.onHops = f }

// Expect notes that a reader is about to come and begin at off: what it will wait for is
// urgent from now on, until it has come or the first of it is here.
func (a *Arrival) Expect(off int64) {
	if off < 0 || off >= a.f.blob.Size {
		return
	}
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	if place := int(off / PieceSize); !a.f.held.Has(place) {
		a.f.expected = place
		a.f.announce()
	}
}

// Marked lists the pieces that the Partial remembers from an earlier attempt.
func (a *Arrival) Marked() (marked []int) {
	if a.f.partial == nil {
		return nil
	}
	for i := range Pieces(a.f.blob.Size) {
		if a.f.partial.Have(i) {
			marked = append(marked, i)
		}
	}
	return marked
}

// Fetch is what those who want the blob get.
func (a *Arrival) Fetch() *Fetch { return a.f }

// Begin gives the arrival its Partial, which belongs to it from here on.
func (a *Arrival) Begin(p Partial) {
	a.f.partial = p
	a.f.content.begin(p, p.Close)
}

// SetTable accepts the blob's piece table if it is that of the trusted root, and
// lists the pieces that the Partial remembers; Recheck them before use.
func (a *Arrival) SetTable(t PieceTable) (marked []int, err error) {
	if err := t.Verify(a.f.Blob()); err != nil {
		return nil, err
	}
	a.f.mu.Lock()
	a.f.table, a.f.known = t, true
	a.f.announce()
	a.f.mu.Unlock()
	return a.Marked(), nil
}

// Recheck reads a marked piece back and holds it if it is right; false means that
// it has to be fetched again. buf has PieceSize bytes.
func (a *Arrival) Recheck(piece int, buf []byte) bool {
	f := a.f
	off, n := PieceRange(f.blob.Size, piece)
	if k, err := f.partial.ReadAt(buf[:n], off); k != int(n) {
		_ = err // short or unreadable, it makes no difference
		return false
	}
	if f.table.VerifyPiece(piece, buf[:n]) != nil {
		return false
	}
	a.hold(piece)
	return true
}

// Store verifies a piece that a peer sent, writes it and lets readers have it.
// ErrBadPiece blames the peer; any other error is the Sink's and ends the fetch.
func (a *Arrival) Store(piece int, data []byte) error {
	f := a.f
	f.mu.Lock()
	t, known, held := f.table, f.known, f.held.Has(piece)
	f.mu.Unlock()
	if !known {
		return fmt.Errorf("blob %s: piece %d came before the piece table", f.blob.Digest, piece)
	}
	if err := t.VerifyPiece(piece, data); err != nil {
		return err
	}
	if held {
		return nil
	}
	if err := a.Write(int64(piece)*PieceSize, data); err != nil {
		return err
	}
	if err := f.partial.MarkPiece(piece); err != nil {
		return fmt.Errorf("blob %s: marking piece %d as arrived: %w", f.blob.Digest, piece, err)
	}
	a.hold(piece)
	return nil
}

// Write puts down bytes that nobody has verified; no reader sees them before
// Commit. It is for blobs without a root.
func (a *Arrival) Write(off int64, data []byte) error {
	if _, err := a.f.partial.WriteAt(data, off); err != nil {
		return fmt.Errorf("blob %s: writing %d bytes at %d: %w", a.f.blob.Digest, len(data), off, err)
	}
	return nil
}

// Holds says whether a piece is held now.
func (a *Arrival) Holds(piece int) bool {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	return a.f.held.Has(piece)
}

// ReadAt reads verified bytes; ErrNotHeld when not all of them are here, and
// fs.ErrClosed once the blob's readers and the fetch have left it.
func (a *Arrival) ReadAt(p []byte, off int64) (int, error) {
	if !a.f.Held(off, int64(len(p))) {
		return 0, fmt.Errorf("this part of blob %s: %w", a.f.blob.Digest, ErrNotHeld)
	}
	return a.f.content.ReadAt(p, off)
}

// Held is the set of pieces held now, a copy.
func (a *Arrival) Held() Bitmap {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	return a.f.held.Clone()
}

// Complete says whether every piece is held.
func (a *Arrival) Complete() bool {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	return a.f.count == Pieces(a.f.blob.Size)
}

// Ended says whether the fetch has ended.
func (a *Arrival) Ended() bool {
	select {
	case <-a.f.done:
		return true
	default:
		return false
	}
}

// Changed is closed at the next change: a piece held, a cursor moved, other Hops, the end.
func (a *Arrival) Changed() <-chan struct{} {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	return a.f.changed
}

// Urgent lists the first window missing pieces at or after each reader's place, the
// nearest of each reader first.
func (a *Arrival) Urgent(window int) []int {
	f := a.f
	f.mu.Lock()
	defer f.mu.Unlock()
	pieces := Pieces(f.blob.Size)
	var urgent []int
	for place := range f.cursorPlaces() {
		for i, found := place, 0; i < pieces && found < window; i++ {
			if !f.held.Has(i) {
				found++
				if !slices.Contains(urgent, i) {
					urgent = append(urgent, i)
				}
			}
		}
	}
	return urgent
}

func (f *Fetch) cursorPlaces() map[int]struct{} {
	places := make(map[int]struct{}, len(f.cursors))
	for _, place := range f.cursors {
		places[place] = struct{}{}
	}
	if f.expected >= 0 {
		places[f.expected] = struct{}{}
	}
	return places
}

// Commit makes the blob durable and visible and ends the fetch well, or ends it
// with the error that it returns. Bytes that are not the blob's are discarded.
func (a *Arrival) Commit(ctx context.Context) error {
	f := a.f
	err := f.partial.Commit(ctx)
	if err == nil {
		a.holdAll()
		a.end(nil)
		// Those who read go on, and the last of them closes the partial. Nothing can be
		// lost by closing any more, so how that goes does not matter.
		_ = f.content.leave()
		return nil
	}
	err = fmt.Errorf("blob %s has arrived but could not be kept: %w", f.blob.Digest, err)
	if errors.Is(err, ErrDigest) {
		err = errors.Join(err, f.partial.Abort())
	}
	a.Fail(err)
	return err
}

// Fail ends the fetch. What was verified stays with the Sink for the next attempt.
func (a *Arrival) Fail(err error) {
	a.end(err)
	// A failed blob's readers do not keep it open: the next attempt wants it.
	_ = a.f.content.shut()
}

func (a *Arrival) end(err error) {
	a.f.err = err
	close(a.f.done)
	a.f.mu.Lock()
	a.f.announce()
	a.f.mu.Unlock()
	if a.f.onHold != nil {
		a.f.onHold(-1)
	}
}

func (a *Arrival) hold(piece int) {
	if a.f.hold(piece) && a.f.onHold != nil {
		a.f.onHold(piece)
	}
}

// hold adds a piece; false when it is held already.
func (f *Fetch) hold(piece int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.held.Has(piece) {
		return false
	}
	f.held.Add(piece)
	if piece == f.expected {
		f.expected = -1
	}
	f.count++
	_, n := PieceRange(f.blob.Size, piece)
	f.bytes += n
	f.announce()
	return true
}

func (a *Arrival) holdAll() {
	f := a.f
	f.mu.Lock()
	defer f.mu.Unlock()
	f.count, f.bytes = Pieces(f.blob.Size), f.blob.Size
	for i := range f.count {
		f.held.Add(i)
	}
	f.announce()
}
