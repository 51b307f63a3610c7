package transfer

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
)

// Fetch is one blob on its way to this node, shared by everybody who wants it.
// Safe for concurrent use. Nothing has to be closed but the readers.
type Fetch struct {
	blob  Blob // the root under mu
	class atomic.Int32
	hops  atomic.Int32
	// done is closed when the fetch has ended; err is set before.
	done chan struct{}

	mu sync.Mutex
	// changed is closed and replaced whenever something below changes.
	changed chan struct{}
	err     error
	table   PieceTable
	known   bool // the table is
	held    Bitmap
	count   int   // pieces held
	bytes   int64 // bytes held
	cursors map[*reader]int
	// expected is where a reader is about to begin that has not come yet; -1: none.
	expected int

	// partial is the engine's alone, set by Begin. content is the same for the
	// readers; reopen serves those that come after it was closed.
	partial Partial
	content *shared
	reopen  func(ctx context.Context) (Content, error)
	onHold  func(piece int) // may be nil
	onHops  func(hops int)  // may be nil
}

// Progress of a fetch.
type Progress struct {
	Size int64
	Held int64 // verified bytes on this node
	Done bool  // the blob is complete, durable and visible
}

// Blob that is being fetched. Its root may have become known since it began.
func (f *Fetch) Blob() Blob {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.blob
}

// Class is what the blob is fetched for, as far as the most urgent of those who want
// it says.
func (f *Fetch) Class() Class { return Class(f.class.Load()) }

// Done is closed when the fetch has ended, well or not.
func (f *Fetch) Done() <-chan struct{} { return f.done }

// Wait returns nil once the whole blob is verified, durable and visible, and
// otherwise why the fetch failed (NoHolderError, ErrDigest, ErrStopped, or the
// Sink's error) or ctx's error, which leaves the fetch running.
func (f *Fetch) Wait(ctx context.Context) error {
	select {
	case <-f.done:
		return f.err
	default:
	}
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Progress so far.
func (f *Fetch) Progress() Progress {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := Progress{Size: f.blob.Size, Held: f.bytes}
	select {
	case <-f.done:
		p.Done = f.err == nil
	default:
	}
	return p
}

// Held says whether n bytes from off on are verified and on this node. A range
// that leaves the blob is not.
func (f *Fetch) Held(off, n int64) bool {
	if off < 0 || n < 0 || off > f.blob.Size || n > f.blob.Size-off {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return n == 0 || f.run(off) >= n
}

// AwaitTable blocks until the fetch has its verified piece table, has ended or ctx
// is done; ok is false when there is none.
func (f *Fetch) AwaitTable(ctx context.Context) (t PieceTable, ok bool) {
	for {
		f.mu.Lock()
		t, ok, changed := f.table, f.known, f.changed
		f.mu.Unlock()
		if ok {
			return t, true
		}
		select {
		case <-changed:
		case <-f.done:
			return PieceTable{}, false
		case <-ctx.Done():
			return PieceTable{}, false
		}
	}
}

// More blocks until more than n pieces are held, the fetch has ended or ctx is
// done, and gives the pieces held by then. Its error is the fetch's.
func (f *Fetch) More(ctx context.Context, n int) (Bitmap, error) {
	for {
		f.mu.Lock()
		held, count, changed := f.held.Clone(), f.count, f.changed
		f.mu.Unlock()
		if count > n {
			return held, nil
		}
		select {
		case <-changed:
		case <-f.done:
			if f.err != nil {
				return nil, f.err
			}
			f.mu.Lock()
			defer f.mu.Unlock()
			return f.held.Clone(), nil
		case <-ctx.Done():
			return held, nil
		}
	}
}

// Ready returns nil once the first verified bytes are here, so that somebody who
// must promise the blob before reading it knows that there is a holder; else why the
// fetch failed, or ctx's error. A fetch without a root is ready when it has ended.
func (f *Fetch) Ready(ctx context.Context) error {
	held, err := f.More(ctx, 0)
	if err != nil || held.Count() > 0 {
		return err
	}
	return ctx.Err() // nil: an empty blob has come
}

// Reader reads the blob while it arrives: a Read blocks until the bytes at the
// reader's place are verified, the fetch has failed, or ctx is done. What a reader
// waits for is fetched before the rest. Close it; that never ends the fetch.
func (f *Fetch) Reader(ctx context.Context) io.ReadSeekCloser {
	r := &reader{fetch: f, gone: make(chan struct{})}
	r.stop = context.AfterFunc(ctx, func() { r.leave(context.Cause(ctx)) })
	r.content, r.err = f.share(ctx)
	return r
}

// run is how many bytes from off on are held without a gap; mu is held.
func (f *Fetch) run(off int64) int64 {
	end := off
	for end < f.blob.Size {
		i := int(end / PieceSize)
		if !f.held.Has(i) {
			break
		}
		start, n := PieceRange(f.blob.Size, i)
		end = start + n
	}
	return end - off
}

// announce wakes everybody who waits for a change; mu is held.
func (f *Fetch) announce() {
	close(f.changed)
	f.changed = make(chan struct{})
}
