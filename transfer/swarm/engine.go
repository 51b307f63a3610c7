// Package swarm is the BitTorrent engine of transfer: a carrier of pieces over
// connections of the peer port, by anacrolix/torrent.
//
// The library speaks the peer protocol: it asks for chunks, sends them, puts pieces
// together. Everything else is decided here. Before BitTorrent begins the two ends say
// hello about one blob (hello.go), so a torrent exists only while somebody moves it. A
// tap on every connection (tap.go) lets nothing through but well-formed messages that
// fit the blob, and shows the library of each peer only the pieces that the plan
// (plan.go) takes from it. Pieces pass transfer.Arrival before the library hears that
// they are complete (storage.go). There is no DHT, no peer exchange, no tracker, no
// metadata exchange, no encryption but the peer port's. DESIGN.md in the folder above
// says why it is so.
package swarm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
)

// Farthest is the largest Distance.
const Farthest = 2

// maxFree bounds the buffers that are kept for further pieces.
const maxFree = 128

// maxReads bounds the chunks that are read for peers at once, in all.
const maxReads = 128

// Config of an Engine. Zero values mean the defaults named beside them.
type Config struct {
	// Node is this node's id, as its certificate says it.
	Node   string
	Source transfer.Source
	Peers  transfer.Peers
	// Dial opens a connection for the BitTorrent service of the node at addr. Its
	// PeerID method says whose it is.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	// Lacks says of an error of Dial that the node does not know the service.
	Lacks func(error) bool
	// Arriving finds the fetch of a blob that this node has under way, whoever moves it.
	Arriving func(digest.Digest) (*transfer.Arrival, bool)
	// Limiter is asked before a chunk goes out, Incoming before one that comes is read,
	// and so how much its sender has on the way; nil: never. Meter is told what moved; may
	// be nil.
	Limiter  transfer.Limiter
	Incoming transfer.Limiter
	Meter    transfer.Meter
	Log      *slog.Logger // discards
	Hooks    transfer.Hooks

	transfer.Patience
	transfer.Limits
	// Linger is how long a torrent is kept when nobody uses it any more. 10 s.
	Linger time.Duration

	// Distance of a peer, 0 for the nearest, at most Farthest; nil: all are near. Who
	// is farther is asked only while none of the nearer holds all of a blob.
	Distance    func(transfer.Peer) int
	MaxTorrents int // in use at once. 64
}

// Engine moves blobs by BitTorrent. Make it with New; it carries and serves while Run
// runs.
type Engine struct {
	cfg    Config
	log    *slog.Logger
	free   chan []byte   // buffers of pieces that are used again
	reads  chan struct{} // one per chunk being read
	serial atomic.Uint64 // numbers connections
	wg     sync.WaitGroup

	started chan struct{}

	mu     sync.Mutex
	run    func() context.Context // Run's; nil before and after
	closed bool
	swarms map[[hashSize]byte]*swarm
}

var _ transfer.Carrier = (*Engine)(nil)

// New makes an engine; nothing runs yet.
func New(cfg Config) (*Engine, error) {
	if cfg.Node == "" || cfg.Source == nil || cfg.Peers == nil || cfg.Dial == nil || cfg.Arriving == nil {
		return nil, errors.New("swarm: Node, Source, Peers, Dial and Arriving are all needed")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Lacks == nil {
		cfg.Lacks = func(error) bool { return false }
	}
	cfg.Patience, cfg.Limits = cfg.Patience.OrDefault(), cfg.Limits.OrDefault()
	if cfg.Linger <= 0 {
		cfg.Linger = 10 * time.Second
	}
	if cfg.MaxTorrents <= 0 {
		cfg.MaxTorrents = 64
	}
	return &Engine{
		cfg: cfg, log: cfg.Log,
		free:   make(chan []byte, maxFree),
		reads:  make(chan struct{}, maxReads),
		swarms: make(map[[hashSize]byte]*swarm),

		started: make(chan struct{}),
	}, nil
}

// Run keeps the engine going until ctx is done; then it hangs up on everybody and
// returns nil once all is closed. Call it once; Serve and Carry wait for it.
func (e *Engine) Run(ctx context.Context) error {
	e.mu.Lock()
	e.run = func() context.Context { return ctx }
	e.mu.Unlock()
	close(e.started)
	<-ctx.Done()
	e.mu.Lock()
	e.closed = true
	all := make([]*swarm, 0, len(e.swarms))
	for _, s := range e.swarms {
		all = append(all, s)
	}
	clear(e.swarms)
	e.mu.Unlock()
	for _, s := range all {
		s.close()
	}
	e.wg.Wait()
	return nil
}

// begin does something that ends before Run does; false when the engine does not run.
func (e *Engine) begin(do func(ctx context.Context)) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.run == nil || e.closed {
		return false
	}
	ctx := e.run()
	e.wg.Go(func() { do(ctx) })
	return true
}

// sent and received tell the meter and the hooks.
func (e *Engine) sent(f transfer.Flow, n int) {
	if e.cfg.Meter != nil {
		e.cfg.Meter.Sent(f, n)
	}
	if e.cfg.Hooks.Served != nil {
		e.cfg.Hooks.Served(f.Peer, int64(n))
	}
}

func (e *Engine) received(f transfer.Flow, n int) {
	if e.cfg.Meter != nil {
		e.cfg.Meter.Received(f, n)
	}
	if e.cfg.Hooks.Moved != nil {
		e.cfg.Hooks.Moved(f.Peer, int64(n))
	}
}

// buffer gives one of PieceSize bytes; reuse takes it back.
func (e *Engine) buffer() []byte {
	select {
	case b := <-e.free:
		return b
	default:
		return make([]byte, transfer.PieceSize)
	}
}

func (e *Engine) reuse(b []byte) {
	select {
	case e.free <- b[:transfer.PieceSize]:
	default:
	}
}

func (e *Engine) distance(p transfer.Peer) int {
	if e.cfg.Distance == nil {
		return 0
	}
	return min(max(e.cfg.Distance(p), 0), Farthest)
}

var errBusy = errors.New("too many blobs are moved by BitTorrent at the moment")

// open finds the torrent of a blob or makes one, of which the caller is a user; leave
// ends that. table is the blob's when it is not all here.
func (e *Engine) open(b transfer.Blob, a *transfer.Arrival, table transfer.PieceTable) (*swarm, error) {
	hash := Infohash(b)
	e.mu.Lock()
	defer e.mu.Unlock()
	if s := e.swarms[hash]; s != nil && s.serves(a) {
		s.users++
		return s, nil
	}
	switch {
	case e.run == nil || e.closed:
		return nil, transfer.ErrStopped
	case len(e.swarms) >= e.cfg.MaxTorrents && !e.expire():
		return nil, errBusy
	}
	if s := e.swarms[hash]; s != nil { // of a fetch that has failed
		delete(e.swarms, hash)
		e.wg.Go(s.close)
	}
	s, err := newSwarm(e.run(), e, b, a, table)
	if err != nil {
		return nil, fmt.Errorf("torrent of blob %s: %w", b.Digest, err)
	}
	s.users = 1
	e.swarms[hash] = s
	return s, nil
}

// expire closes a torrent that nobody uses. mu is held.
func (e *Engine) expire() bool {
	for hash, s := range e.swarms {
		if s.users == 0 {
			delete(e.swarms, hash)
			s.rest.Stop()
			e.wg.Go(s.close)
			return true
		}
	}
	return false
}

// leave ends the use of a torrent. Nobody else may want it for a while, then it goes.
func (e *Engine) leave(s *swarm) {
	e.mu.Lock()
	defer e.mu.Unlock()
	s.users--
	if s.users > 0 || e.swarms[s.hash] != s {
		return
	}
	s.rest.Reset(e.cfg.Linger)
}

// abandon closes a torrent whose blob does not arrive by it; who is served from it may
// ask again.
func (e *Engine) abandon(s *swarm) {
	e.mu.Lock()
	ours := e.swarms[s.hash] == s
	if ours {
		delete(e.swarms, s.hash)
		e.wg.Add(1)
	}
	e.mu.Unlock()
	if ours {
		defer e.wg.Done()
		s.close()
	}
}

// retire closes a torrent if nobody has come to use it since.
func (e *Engine) retire(s *swarm) {
	e.mu.Lock()
	if s.users > 0 || e.swarms[s.hash] != s || e.closed {
		e.mu.Unlock()
		return
	}
	delete(e.swarms, s.hash)
	e.wg.Add(1)
	e.mu.Unlock()
	defer e.wg.Done()
	s.close()
}

// Torrents that exist at the moment, and connections of them.
func (e *Engine) Torrents() (torrents, conns int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, s := range e.swarms {
		conns += len(s.all())
	}
	return len(e.swarms), conns
}
