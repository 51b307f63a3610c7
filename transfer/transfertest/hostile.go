package transfertest

import (
	"context"
	"errors"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
)

// Hostile is a Source that changes what an honest one says. Nil fields change
// nothing.
type Hostile struct {
	transfer.Source
	// Size of the content instead of its own.
	Size func(honest int64) int64
	// Read is called for each ReadAt; it may block, fail, and change p after it was
	// filled with the right bytes by read.
	Read func(ctx context.Context, p []byte, off int64, read func() (int, error)) (int, error)
	// Table instead of the right one.
	Table func(ctx context.Context, honest transfer.PieceTable) (transfer.PieceTable, error)
}

// Open implements transfer.Source.
func (h *Hostile) Open(ctx context.Context, d digest.Digest) (transfer.Content, error) {
	c, err := h.Source.Open(ctx, d)
	if err != nil {
		return nil, err
	}
	return &hostileContent{Content: c, h: h, left: func() context.Context { return ctx }}, nil
}

// Pieces implements transfer.Source.
func (h *Hostile) Pieces(ctx context.Context, d digest.Digest) (transfer.PieceTable, error) {
	t, err := h.Source.Pieces(ctx, d)
	if err != nil || h.Table == nil {
		return t, err
	}
	return h.Table(ctx, t)
}

type hostileContent struct {
	transfer.Content
	h    *Hostile
	left func() context.Context // the request's, so that what blocks ends with it
}

func (c *hostileContent) Size() int64 {
	if c.h.Size != nil {
		return c.h.Size(c.Content.Size())
	}
	return c.Content.Size()
}

func (c *hostileContent) ReadAt(p []byte, off int64) (int, error) {
	read := func() (int, error) { return c.Content.ReadAt(p, off) }
	if c.h.Read == nil {
		return read()
	}
	return c.h.Read(c.left(), p, off, read)
}

// Gate is closed until it is opened. It blocks whoever passes meanwhile.
type Gate struct {
	once sync.Once
	ch   chan struct{}
}

// NewGate makes a closed gate.
func NewGate() *Gate { return &Gate{ch: make(chan struct{})} }

// Open lets everybody pass from now on.
func (g *Gate) Open() { g.once.Do(func() { close(g.ch) }) }

// Opened is closed when the gate is open.
func (g *Gate) Opened() <-chan struct{} { return g.ch }

var errLeft = errors.New("the peer left before the gate was opened")

// Pass waits until the gate is open or ctx is done.
func (g *Gate) Pass(ctx context.Context) error {
	select {
	case <-g.ch:
		return nil
	case <-ctx.Done():
		return errLeft
	}
}
