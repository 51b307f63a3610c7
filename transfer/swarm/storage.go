package swarm

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"sync"

	g "github.com/anacrolix/generics"
	"github.com/anacrolix/torrent/metainfo"
	"github.com/anacrolix/torrent/storage"

	"github.com/atoll-registry/atoll/transfer"
)

// store is the library's storage of one torrent. It has no bytes of its own but the
// pieces on their way: those that are complete are read from the arrival or the source,
// and a piece that is put together goes through Arrival.Store, and nowhere else.
type store struct {
	s *swarm

	mu      sync.Mutex
	pieces  map[int]*arriving
	content transfer.Content // of the source, once it was needed
	closed  bool
}

// arriving is a piece on its way.
type arriving struct {
	data  []byte
	from  map[string]int64   // bytes by peer
	parts map[int64]struct{} // chunks that are here, by their offset
}

var _ storage.ClientImpl = (*store)(nil)

// OpenTorrent implements storage.ClientImpl.
func (st *store) OpenTorrent(context.Context, *metainfo.Info, metainfo.Hash) (storage.TorrentImpl, error) {
	return storage.TorrentImpl{
		PieceWithHash: func(p metainfo.Piece, _ g.Option[[]byte]) storage.PieceImpl {
			return piece{st, p.Index()}
		},
		Close: func() error { return nil },
	}, nil
}

// close frees the source's content and the pieces that will not be complete any more.
func (st *store) close() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.closed = true
	clear(st.pieces)
	if st.content != nil {
		_ = st.content.Close() // it was only read
		st.content = nil
	}
}

// came notes who sends a part of a piece, before the library writes it.
func (st *store) came(peer string, c chunk) {
	if st.s.holds(int(c.piece)) {
		return
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	a := st.pieces[int(c.piece)]
	if a == nil {
		a = &arriving{from: make(map[string]int64), parts: make(map[int64]struct{})}
		st.pieces[int(c.piece)] = a
	}
	a.from[peer] += int64(c.length)
}

// has says whether the piece is on its way by this torrent.
func (st *store) has(i int) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.pieces[i] != nil
}

// drop removes a piece from those on their way.
func (st *store) drop(i int) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if a := st.pieces[i]; a != nil && a.data != nil {
		st.s.e.reuse(a.data)
	}
	delete(st.pieces, i)
}

// forget removes a piece of which nobody brings the rest. Its buffer is not used again,
// for the library may be about to hash it.
func (st *store) forget(i int) {
	st.mu.Lock()
	defer st.mu.Unlock()
	delete(st.pieces, i)
}

// open gives the source's content.
func (st *store) open() (transfer.Content, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed {
		return nil, fs.ErrClosed
	}
	if st.content == nil {
		c, err := st.s.e.cfg.Source.Open(st.s.ctx(), st.s.blob.Digest)
		if err != nil {
			return nil, err
		}
		st.content = c
	}
	return st.content, nil
}

// readAt reads what is complete, all of p or an error.
func (st *store) readAt(p []byte, off int64) (int, error) {
	n, err := 0, fs.ErrClosed
	if a := st.s.arrival; a != nil {
		n, err = a.ReadAt(p, off)
	}
	if errors.Is(err, fs.ErrClosed) {
		c, err := st.open()
		if err != nil {
			return 0, err
		}
		n, err = c.ReadAt(p, off)
		return n, whole(n, len(p), err)
	}
	return n, whole(n, len(p), err)
}

// whole makes an error of a short read, and none of the end after all.
func whole(n, want int, err error) error {
	switch {
	case n == want:
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return io.ErrUnexpectedEOF
	}
	return err
}

// piece is the library's view of one.
type piece struct {
	st *store
	i  int
}

// ReadAt gives what was read for a peer beforehand.
func (p piece) ReadAt(b []byte, off int64) (int, error) {
	if p.st.s.ahead.readAt(b, p.i, off) {
		return len(b), nil
	}
	// Not the end of the file: to the library that would mean that the piece is lost.
	return 0, fs.ErrClosed
}

// WriteAt takes a chunk of a piece on its way.
func (p piece) WriteAt(b []byte, off int64) (int, error) {
	_, n := transfer.PieceRange(p.st.s.shape.size, p.i)
	p.st.mu.Lock()
	defer p.st.mu.Unlock()
	a := p.st.pieces[p.i]
	if a == nil || p.st.closed {
		return 0, fs.ErrClosed // the fetch has ended
	}
	if a.data == nil {
		a.data = p.st.s.e.buffer()[:n]
	}
	a.parts[off] = struct{}{}
	return copy(a.data[off:], b), nil
}

// WriteTo gives the library the bytes of a piece to hash, all of whose chunks are here.
// This is where they are verified: what the trusted root does not vouch for is not
// given on, and an error keeps the library from judging whose fault that is.
func (p piece) WriteTo(w io.Writer) (int64, error) {
	st, s := p.st, p.st.s
	st.mu.Lock()
	a := st.pieces[p.i]
	whole := a != nil && len(a.parts) == s.shape.chunks(p.i)
	st.mu.Unlock()
	if !whole || s.arrival == nil {
		return 0, fs.ErrClosed // a part was forgotten: it begins anew
	}
	want := s.want.Load()
	if want == nil {
		return 0, fs.ErrClosed
	}
	s.storing.Add(1)
	err := s.arrival.Store(p.i, a.data)
	s.storing.Add(-1)
	if err != nil {
		want.refused(p.i, a, err)
		return 0, err
	}
	for peer, n := range a.from {
		s.e.received(s.inFlow(peer), int(n))
	}
	n, err := w.Write(a.data)
	return int64(n), err
}

// MarkComplete is called after WriteTo.
func (p piece) MarkComplete() error {
	p.st.drop(p.i)
	if w := p.st.s.want.Load(); w != nil {
		w.arrived(p.i)
	}
	return nil
}

// MarkNotComplete is called after WriteTo has failed: the piece begins anew.
func (p piece) MarkNotComplete() error {
	p.st.drop(p.i)
	if w := p.st.s.want.Load(); w != nil {
		w.again(p.i)
	}
	return nil
}

// Completion says whether the piece is here, verified.
func (p piece) Completion() storage.Completion {
	return storage.Completion{Ok: true, Complete: p.st.s.holds(p.i)}
}
