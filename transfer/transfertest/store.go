package transfertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
)

// Store is a Source and a Sink in memory. It outlives the nodes that use it, so a
// test can restart one.
type Store struct {
	mu       sync.Mutex
	blobs    map[digest.Digest][]byte
	partials map[digest.Digest]*partial
	// WriteErr, when set, is what every WriteAt returns.
	WriteErr error
}

var (
	_ transfer.Source = (*Store)(nil)
	_ transfer.Sink   = (*Store)(nil)
)

// NewStore makes an empty store.
func NewStore() *Store {
	return &Store{blobs: make(map[digest.Digest][]byte), partials: make(map[digest.Digest]*partial)}
}

// Put makes the store hold a blob under its sha256.
func (s *Store) Put(content []byte) { s.PutAs(digest.SHA256, content) }

// PutAs makes the store hold a blob under its digest by the algorithm.
func (s *Store) PutAs(algorithm digest.Algorithm, content []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blobs[algorithm.FromBytes(content)] = content
}

// Bytes of a blob that the store holds; nil when it does not.
func (s *Store) Bytes(d digest.Digest) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.blobs[d]
}

// Marked is how many pieces of a blob that has not arrived are kept.
func (s *Store) Marked(d digest.Digest) int {
	s.mu.Lock()
	p := s.partials[d]
	s.mu.Unlock()
	if p == nil {
		return 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.marks)
}

// Rot flips a bit in the first marked piece of a partial blob, as a bad disk would.
func (s *Store) Rot(d digest.Digest) {
	s.mu.Lock()
	p := s.partials[d]
	s.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.marks {
		off, _ := transfer.PieceRange(int64(len(p.data)), i)
		p.data[off] ^= 1
		return
	}
}

// Open implements transfer.Source.
func (s *Store) Open(_ context.Context, d digest.Digest) (transfer.Content, error) {
	if b := s.Bytes(d); b != nil {
		return Bytes(b), nil
	}
	return nil, fmt.Errorf("store: %s: %w", d, transfer.ErrNotHeld)
}

// Pieces implements transfer.Source.
func (s *Store) Pieces(_ context.Context, d digest.Digest) (transfer.PieceTable, error) {
	if b := s.Bytes(d); b != nil {
		return transfer.HashPieces(bytes.NewReader(b), int64(len(b)))
	}
	return transfer.PieceTable{}, fmt.Errorf("store: %s: %w", d, transfer.ErrNotHeld)
}

// Create implements transfer.Sink.
func (s *Store) Create(_ context.Context, b transfer.Blob) (transfer.Partial, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.partials[b.Digest]
	if p == nil {
		p = &partial{store: s, digest: b.Digest, data: make([]byte, b.Size), marks: make(map[int]bool)}
		s.partials[b.Digest] = p
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open {
		return nil, fmt.Errorf("store: %s is being written already", b.Digest)
	}
	p.open = true
	return p, nil
}

// Content in memory.
type content struct{ *bytes.Reader }

// Bytes makes a Content.
func Bytes(b []byte) transfer.Content { return content{bytes.NewReader(b)} }

func (content) Close() error { return nil }

// partial is a blob that arrives. It checks that it is used as promised.
type partial struct {
	store  *Store
	digest digest.Digest

	mu    sync.Mutex
	data  []byte
	marks map[int]bool
	open  bool
}

var errClosed = errors.New("store: partial blob used after it was closed")

func (p *partial) WriteAt(b []byte, off int64) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case !p.open:
		return 0, errClosed
	case p.store.WriteErr != nil:
		return 0, p.store.WriteErr
	case off < 0 || off+int64(len(b)) > int64(len(p.data)):
		return 0, errors.New("store: write beyond the blob's end")
	}
	return copy(p.data[off:], b), nil
}

func (p *partial) ReadAt(b []byte, off int64) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.open {
		return 0, errClosed
	}
	n := copy(b, p.data[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (p *partial) Have(piece int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.marks[piece]
}

func (p *partial) MarkPiece(piece int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.marks[piece] = true
	return nil
}

func (p *partial) Commit(context.Context) error {
	p.store.mu.Lock()
	defer p.store.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	if got := p.digest.Algorithm().FromBytes(p.data); got != p.digest {
		return fmt.Errorf("store: bytes are %s: %w", got, transfer.ErrDigest)
	}
	p.store.blobs[p.digest] = p.data
	delete(p.store.partials, p.digest)
	return nil
}

func (p *partial) Abort() error {
	p.store.mu.Lock()
	defer p.store.mu.Unlock()
	delete(p.store.partials, p.digest)
	return nil
}

func (p *partial) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.open {
		return errClosed
	}
	p.open = false
	return nil
}
