// Package stream is the plain engine of transfer: pieces in frames over the connections
// of the peer port, in the order of package plan.
//
// One Engine is both sides. As a Mover it asks the candidates in parallel who holds a
// blob, trades with several of them at once, verifies each piece before anything else
// happens to it, and replaces a sender that stalls, breaks off or lies. With Serve it
// sends what the node holds, and the verified pieces of what is still on its way to the
// node. DESIGN.md in the folder above states the protocol and why it is so.
//
// Whoever limits or shows traffic gives Config a transfer.Limiter, which is asked
// before a piece goes out, and a transfer.Meter, which is told of each piece that went
// or came, with the blob, the peer and the class that the fetch was given
// (transfer.For).
package stream

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
)

// Reason and Hooks are every engine's.
type (
	Reason = transfer.Reason
	Hooks  = transfer.Hooks
)

const (
	BadPiece  = transfer.BadPiece
	BadTable  = transfer.BadTable
	BadSize   = transfer.BadSize
	BadDigest = transfer.BadDigest
	Stalled   = transfer.Stalled
	Broken    = transfer.Broken
	Gone      = transfer.Gone
)

// Config of an Engine. Zero values mean the defaults named beside them.
type Config struct {
	Source transfer.Source
	Sink   transfer.Sink
	Peers  transfer.Peers
	// Dial opens a connection for the blob service of the node at addr. When it has
	// a PeerID method, that must be the id of the peer that was meant.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	// Self is this node's id, to elect who asks beyond a slow link; "": every node does.
	Self string
	// Carrier chooses another way to move a blob than the frames of this package; nil, and a nil
	// Carrier, mean none.
	Carrier func(transfer.Blob, transfer.Way) transfer.Carrier
	Log     *slog.Logger // discards
	Hooks   Hooks
	// Limiter is asked before a piece goes out; nil: never. Meter is told what moved; may
	// be nil.
	Limiter transfer.Limiter
	Meter   transfer.Meter
	// Incoming is asked before a piece that comes is read, and so how much its sender has
	// on the way is bounded; nil: never.
	Incoming transfer.Limiter

	transfer.Patience
	transfer.Limits
	// Absence is how long a fetch that makes no progress waits for a holder that has
	// broken off, as one does that restarts. 75 s.
	Absence time.Duration

	// Distance of a peer, 0 for the nearest, at most Farthest; nil: all are near. Who
	// is farther is asked only while none of the nearer holds all of a blob; and of
	// several nodes that fetch a blob and are nearer to each other than Farthest, one
	// asks those that are at Farthest.
	Distance func(transfer.Peer) int
	Slots    int // pieces on their way out at once, to receivers that keep up. 4
}

// Engine moves blobs. Make it with New; fetches start while Run runs, serving needs no
// Run.
type Engine struct {
	cfg   Config
	log   *slog.Logger
	links *links
	desk  *desk

	starts  chan func(context.Context)
	stopped chan struct{}
	buffers *buffers // for pieces that come in
	serving *buffers // for pieces that go out, with their frame's head

	mu      sync.Mutex
	fetches map[digest.Digest]*flight
}

// flight is a fetch in the engine's list.
type flight struct {
	arrival *transfer.Arrival
	way     transfer.Way
	news    chan string   // ids of nodes that have said that they fetch it too
	gone    chan struct{} // closed when it is off the list and its Partial is free
	rooted  chan struct{} // closed when a root has become known since it began
}

// urgency is what the fetch is for, as far as the most urgent of those who want it says.
func (fl *flight) urgency() transfer.Class { return fl.arrival.Fetch().Class() }

// expect notes where somebody is about to read.
func (fl *flight) expect(o transfer.Options) {
	if o.Reads != nil {
		fl.arrival.Expect(*o.Reads)
	}
}

// announced notes that a peer fetches the blob too.
func (fl *flight) announced(peer string) {
	select {
	case fl.news <- peer:
	default: // there are plenty
	}
}

var _ transfer.Mover = (*Engine)(nil)

// New makes an engine; nothing runs yet.
func New(cfg Config) (*Engine, error) {
	if cfg.Source == nil || cfg.Sink == nil || cfg.Peers == nil || cfg.Dial == nil {
		return nil, errors.New("stream: Source, Sink, Peers and Dial are all needed")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Patience, cfg.Limits = cfg.Patience.OrDefault(), cfg.Limits.OrDefault()
	if cfg.Absence <= 0 {
		cfg.Absence = 75 * time.Second
	}
	e := &Engine{
		cfg:     cfg,
		log:     cfg.Log,
		starts:  make(chan func(context.Context)),
		stopped: make(chan struct{}),
		links:   &links{dial: cfg.Dial, keep: keptLinks, idle: make(map[transfer.Peer][]*resting), ending: make(map[transfer.Peer][]*link)},
		desk:    newDesk(cfg),
		buffers: newBuffers(cfg.Pieces, transfer.PieceSize),
		serving: newBuffers(cfg.Sending, frameHeader+pieceHeader+transfer.PieceSize),
		fetches: make(map[digest.Digest]*flight),
	}
	return e, nil
}

// Run lets fetches run until ctx is done, then ends them with ErrStopped, keeping
// what they have verified, and returns nil once they have ended. Call it once.
func (e *Engine) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer e.links.close()
	defer wg.Wait()
	defer close(e.stopped)
	for {
		select {
		case <-ctx.Done():
			return nil
		case run := <-e.starts:
			wg.Go(func() { run(ctx) })
		}
	}
}

// Arriving finds the fetch of a digest that is under way, for a carrier to serve
// from.
func (e *Engine) Arriving(d digest.Digest) (*transfer.Arrival, bool) {
	if fl := e.flying(d); fl != nil {
		return fl.arrival, true
	}
	return nil, false
}

// flying finds the fetch of a digest that is under way.
func (e *Engine) flying(d digest.Digest) *flight {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.fetches[d]
}

// buffers is a bounded pool of piece buffers, made when first needed.
type buffers struct {
	places *transfer.Places
	size   int

	mu   sync.Mutex
	free [][]byte
}

func newBuffers(places *transfer.Places, size int) *buffers {
	return &buffers{places: places, size: size}
}

// take waits for a buffer.
func (b *buffers) take(ctx context.Context) ([]byte, error) {
	if err := b.places.Take(ctx); err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := len(b.free); n > 0 {
		buf := b.free[n-1]
		b.free = b.free[:n-1]
		return buf, nil
	}
	return make([]byte, b.size), nil
}

// give takes a buffer back; more than there may be are not kept.
func (b *buffers) give(buf []byte) {
	b.mu.Lock()
	taken, most := b.places.Use()
	if b.free = append(b.free, buf); taken+len(b.free)-1 > most {
		b.free = b.free[:max(0, most-taken+1)]
	}
	b.mu.Unlock()
	b.places.Give()
}
