package swarm

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"slices"
	"sync"

	g "github.com/anacrolix/generics"
	"github.com/anacrolix/torrent/metainfo"
	"github.com/anacrolix/torrent/storage"

	"github.com/atoll-registry/atoll/transfer"
)

// store is the library's storage of one torrent, and the pieces on their way. The library
// only reads: what is complete comes from the arrival or the source, and a piece that is
// put together goes through Arrival.Store, and nowhere else.
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
	from  map[string]int64    // bytes by peer
	parts map[uint32]struct{} // chunks that are here, by their offset
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

// add takes a part of a piece, and gives the piece when it is whole with it. Nobody
// writes to it then.
func (st *store) add(peer string, c chunk, data []byte) *arriving {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed {
		return nil
	}
	a := st.pieces[int(c.piece)]
	if a == nil {
		_, n := transfer.PieceRange(st.s.shape.size, int(c.piece))
		a = &arriving{data: st.s.e.buffer()[:n], from: make(map[string]int64), parts: make(map[uint32]struct{})}
		st.pieces[int(c.piece)] = a
	}
	if _, twice := a.parts[c.begin]; twice {
		return nil
	}
	copy(a.data[c.begin:], data)
	a.parts[c.begin] = struct{}{}
	a.from[peer] += int64(len(data))
	if len(a.parts) < st.s.shape.chunks(int(c.piece)) {
		return nil
	}
	return a
}

// lacks lists the chunks of a piece that are not here.
func (st *store) lacks(i int) []chunk {
	all := st.s.shape.chunksOf(i)
	st.mu.Lock()
	defer st.mu.Unlock()
	a := st.pieces[i]
	if a == nil {
		return all
	}
	return slices.DeleteFunc(all, func(c chunk) bool { _, here := a.parts[c.begin]; return here })
}

// begun says whether a part of the piece is here.
func (st *store) begun(i int) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.pieces[i] != nil
}

// drop removes a piece from those on their way: it is here, or nobody brings the rest.
func (st *store) drop(i int) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if a := st.pieces[i]; a != nil {
		st.s.e.reuse(a.data)
	}
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

// The library asks for nothing, and so has nothing to write.

func (p piece) WriteAt([]byte, int64) (int, error) { return 0, fs.ErrClosed }
func (p piece) MarkComplete() error                { return nil }
func (p piece) MarkNotComplete() error             { return nil }

// Completion says whether the piece is here, verified.
func (p piece) Completion() storage.Completion {
	return storage.Completion{Ok: true, Complete: p.st.s.holds(p.i)}
}
