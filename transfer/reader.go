package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
)

// shared is what the readers of a fetch read. Whoever joined keeps it open; the
// last to leave closes it, and shut closes it under everybody.
type shared struct {
	mu     sync.RWMutex
	at     io.ReaderAt // nil until it is there
	close  func() error
	refs   int
	closed bool
}

func (s *shared) ReadAt(p []byte, off int64) (int, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed || s.at == nil {
		return 0, fs.ErrClosed
	}
	return s.at.ReadAt(p, off)
}

// begin gives it its bytes.
func (s *shared) begin(at io.ReaderAt, close func() error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at, s.close = at, close
}

// join takes a reference, unless it is closed.
func (s *shared) join() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.refs++
	return true
}

// leave drops a reference.
func (s *shared) leave() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refs--
	if s.refs > 0 || s.closed {
		return nil
	}
	return s.shutLocked()
}

// shut closes it now.
func (s *shared) shut() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	return s.shutLocked()
}

func (s *shared) shutLocked() error {
	s.closed = true
	if s.close == nil {
		return nil
	}
	return s.close()
}

// share gives a new reader what it reads.
func (f *Fetch) share(ctx context.Context) (*shared, error) {
	if f.content.join() {
		return f.content, nil
	}
	// Closed: the fetch has ended, and its readers have left.
	<-f.done
	if f.err != nil {
		return nil, f.err
	}
	content, err := f.reopen(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading blob %s after its arrival: %w", f.blob.Digest, err)
	}
	return &shared{at: content, close: content.Close, refs: 1}, nil
}

// reader is one reader's place in a blob that arrives. Read and Seek are
// its user's to serialise; Close may come at any time.
type reader struct {
	fetch *Fetch
	stop  func() bool   // ends the watch over the reader's context
	gone  chan struct{} // closed when the reader leaves

	mu      sync.Mutex // guards what follows, and keeps Close apart from Read
	pos     int64
	content *shared
	err     error

	leaving sync.Once
	why     error // set before gone is closed
}

// leave makes a blocked Read return why.
func (r *reader) leave(why error) {
	r.leaving.Do(func() {
		r.why = why
		close(r.gone)
	})
}

func (r *reader) Read(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return 0, r.err
	}
	if r.pos >= r.fetch.blob.Size {
		return 0, io.EOF
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := r.await(int64(len(p)))
	if err != nil {
		return 0, err
	}
	k, err := r.content.ReadAt(p[:n], r.pos)
	r.pos += int64(k)
	switch {
	case k == int(n):
		err = nil
	case errors.Is(err, fs.ErrClosed):
		err = r.failure(err)
	case err == nil || errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	return k, err
}

// failure is why the fetch failed, if it did, else err.
func (r *reader) failure(err error) error {
	select {
	case <-r.fetch.done:
		if r.fetch.err != nil {
			return r.fetch.err
		}
	default:
	}
	return err
}

// await blocks until bytes at the reader's place are held and says how many of want.
func (r *reader) await(want int64) (int64, error) {
	f := r.fetch
	for {
		select {
		case <-r.gone:
			return 0, r.why
		default:
		}
		if err := r.failure(nil); err != nil {
			return 0, err
		}
		f.mu.Lock()
		n, place := f.run(r.pos), int(r.pos/PieceSize)
		if old, ok := f.cursors[r]; !ok || old != place {
			f.cursors[r] = place
			f.expected = -1
			if n == 0 {
				f.announce() // the engine may want to change its order
			}
		}
		changed := f.changed
		f.mu.Unlock()
		if n > 0 {
			return min(n, want), nil
		}
		select {
		case <-changed:
		case <-r.gone:
		}
	}
}

func (r *reader) Seek(offset int64, whence int) (int64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if errors.Is(r.err, fs.ErrClosed) {
		return 0, r.err
	}
	switch whence {
	case io.SeekStart:
	case io.SeekCurrent:
		offset += r.pos
	case io.SeekEnd:
		offset += r.fetch.blob.Size
	default:
		return 0, fmt.Errorf("seek in blob %s: there is no whence %d", r.fetch.blob.Digest, whence)
	}
	if offset < 0 {
		return 0, fmt.Errorf("seek in blob %s: %d is before its start", r.fetch.blob.Digest, offset)
	}
	r.pos = offset
	return offset, nil
}

// Close releases what the reader holds; a Read that is blocked returns.
func (r *reader) Close() error {
	r.stop()
	r.leave(fs.ErrClosed)
	r.mu.Lock()
	defer r.mu.Unlock()
	if errors.Is(r.err, fs.ErrClosed) {
		return nil
	}
	r.err = fs.ErrClosed
	r.fetch.mu.Lock()
	delete(r.fetch.cursors, r)
	r.fetch.mu.Unlock()
	if r.content == nil {
		return nil
	}
	return r.content.leave()
}
