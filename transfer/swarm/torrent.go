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

	g "github.com/anacrolix/generics"
	"github.com/anacrolix/torrent"
	pp "github.com/anacrolix/torrent/peer_protocol"
	infohash_v2 "github.com/anacrolix/torrent/types/infohash-v2"
	"golang.org/x/time/rate"

	"github.com/atoll-registry/atoll/transfer"
)

// swarm is the torrent of one blob and the connections about it. Each has a client of
// the library for itself, so that blobs do not wait for each other's lock and closing
// one leaves nothing behind.
type swarm struct {
	e       *Engine
	blob    transfer.Blob
	hash    [hashSize]byte
	shape   shape
	arrival *transfer.Arrival // nil: the blob was complete here from the start
	life    func() context.Context
	cancel  context.CancelFunc
	closing sync.Once

	client  *torrent.Client
	torrent *torrent.Torrent
	store   *store
	ahead   ahead
	accepts *accepts
	dials   *dials

	users int         // guarded by Engine.mu
	rest  *time.Timer // retires it

	want atomic.Pointer[want] // the fetch that moves the blob here by this torrent

	mu    sync.Mutex
	taps  map[*tap]struct{}
	given []uint16 // how often each piece was given to somebody who is still there
	first []*tap   // who got a piece first, until somebody else has it
	turns int
	extra int           // pieces that this node has chosen to send a second time
	asked int           // a piece that was asked for while this node chose, for a reader; -1: none
	usual time.Duration // that a piece which this node has chosen is in service
}

// newSwarm makes the torrent of a blob, of its arrival and its table when it is not all
// here. It ends with ctx.
func newSwarm(ctx context.Context, e *Engine, b transfer.Blob, a *transfer.Arrival, table transfer.PieceTable) (*swarm, error) {
	ctx, cancel := context.WithCancel(ctx)
	hash := Infohash(b)
	s := &swarm{
		e: e, blob: b, hash: hash, arrival: a, cancel: cancel,
		life:    func() context.Context { return ctx },
		shape:   shape{b.Size, transfer.Pieces(b.Size)},
		accepts: &accepts{conns: make(chan net.Conn), done: make(chan struct{})},
		dials:   &dials{ready: make(map[string]*tap)},
		taps:    make(map[*tap]struct{}),
		ahead:   ahead{chunks: make(map[chunk]*readChunk)},
	}
	s.given, s.first, s.asked = make([]uint16, s.shape.pieces), make([]*tap, s.shape.pieces), -1
	s.store = &store{s: s, pieces: make(map[int]*arriving)}
	var err error
	if s.client, err = torrent.NewClient(s.config()); err != nil {
		cancel()
		return nil, err
	}
	s.client.AddDialer(s.dials)
	s.client.AddListener(s.accepts)
	opts := torrent.AddTorrentOpts{
		InfoHashV2:               g.Some(infohash_v2.T(hash)),
		Storage:                  s.store,
		ChunkSize:                chunkSize,
		InfoBytes:                InfoDict(b),
		DisableInitialPieceCheck: true,
	}
	if a != nil {
		hashes, err := layer(table)
		if err != nil {
			s.close()
			return nil, err
		}
		if hashes != "" {
			opts.PieceLayers = map[string]string{string(b.Root): hashes}
		}
	}
	s.torrent, _ = s.client.AddTorrentOpt(opts)
	if s.torrent.Info() == nil {
		s.close()
		return nil, errors.New("the library does not take the info dictionary and piece layer")
	}
	if a != nil {
		s.torrent.DownloadPieces(0, 1) // without anything to want, or to give, it would not connect to anybody
	}
	s.rest = time.AfterFunc(time.Hour, func() { e.retire(s) })
	s.rest.Stop()
	if a != nil {
		e.wg.Go(func() { s.follow(ctx) })
	}
	return s, nil
}

// config of the library: only what a connection between nodes needs.
func (s *swarm) config() *torrent.ClientConfig {
	c := torrent.NewDefaultClientConfig()
	id := peerID(s.e.cfg.Node)
	c.PeerID = string(id[:])
	c.DefaultStorage = s.store
	c.Seed = true
	c.AlwaysWantConns = true
	c.DisableTrackers, c.NoDHT, c.DisablePEX, c.NoDefaultPortForwarding = true, true, true, true
	c.DisableTCP, c.DisableUTP, c.DisableWebtorrent, c.DisableWebseeds = true, true, true, true
	c.HeaderObfuscationPolicy = torrent.HeaderObfuscationPolicy{RequirePreferred: true}
	c.Extensions = pp.NewPeerExtensionBytes(pp.ExtensionBitFast)
	c.DropMutuallyCompletePeers = false
	c.EstablishedConnsPerTorrent, c.HalfOpenConnsPerTorrent, c.TotalHalfOpenConns = 2*maxTaps, maxTaps, maxTaps
	c.DialRateLimiter = rate.NewLimiter(rate.Inf, 1)
	c.HandshakesTimeout = handshakeTimeout
	c.MaxAllocPeerRequestDataPerConn = 2 * chunkSize
	c.Slogger = slog.New(quiet{s.e.log.Handler()})
	return c
}

// maxTaps bounds the connections about one blob that others have opened.
const maxTaps = 64

// close hangs up on everybody and frees all; it returns once that is done.
func (s *swarm) close() {
	s.closing.Do(func() {
		s.cancel() // first: reads of a disk that hangs, and taps, end with it
		for _, t := range s.all() {
			t.end(transfer.ErrStopped)
		}
		s.client.Close()
		s.accepts.Close()
		s.store.close()
	})
}

func (s *swarm) ctx() context.Context { return s.life() }

// serves says whether the torrent fits a use: of the arrival that is under way, or,
// for nil, of the whole blob. Engine.mu is held.
func (s *swarm) serves(a *transfer.Arrival) bool {
	if s.arrival == nil || s.arrival == a {
		return s.arrival == a || a == nil
	}
	return a == nil && s.arrival.Fetch().Progress().Done
}

// holds says whether a piece is here, verified.
func (s *swarm) holds(piece int) bool { return s.arrival == nil || s.arrival.Holds(piece) }

// follow tells the library of pieces as they arrive, which tells others, tells those too
// how far away the rest is, and closes the torrent when the fetch fails: then its bytes may
// be gone.
func (s *swarm) follow(ctx context.Context) {
	told := s.arrival.Held()
	for i := range s.shape.pieces {
		if told.Has(i) {
			s.torrent.Piece(i).UpdateCompletion()
		}
	}
	for before := 0; ; {
		changed, held := s.arrival.Changed(), s.arrival.Held()
		if hops := s.arrival.Hops(); hops != before {
			before = hops
			for _, t := range s.all() {
				t.speak(appendHops(nil, hops))
			}
		}
		for i := range s.shape.pieces {
			if held.Has(i) && !told.Has(i) {
				told.Add(i)
				s.torrent.Piece(i).UpdateCompletion()
			}
		}
		if s.arrival.Ended() {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
	if s.arrival.Fetch().Progress().Done {
		return
	}
	s.e.mu.Lock()
	if s.e.swarms[s.hash] == s {
		delete(s.e.swarms, s.hash)
	}
	s.e.mu.Unlock()
	s.close()
}

// attach puts a connection to use, on which BitTorrent begins now. The tap is done when
// the connection is.
func (s *swarm) attach(t *tap) {
	transfer.KeepShort(t.Conn, transfer.Unsent)
	s.mu.Lock()
	s.taps[t] = struct{}{}
	s.mu.Unlock()
	ctx := s.ctx()
	if s.arrival != nil {
		if hops := s.arrival.Hops(); hops > 0 {
			t.speak(appendHops(nil, hops))
		}
	}
	if t.outgoing {
		s.dials.put(t)
		s.torrent.AddPeers([]torrent.PeerInfo{{Addr: torrent.StringAddr(t.addr), Source: torrent.PeerSourceDirect, Trusted: true}})
	} else {
		s.e.wg.Go(func() { s.accepts.put(t) })
	}
	s.e.wg.Go(func() {
		t.pump(ctx)
		s.detach(t)
	})
}

// inFlow is what comes in from a peer.
func (s *swarm) inFlow(peer string) transfer.Flow {
	f := transfer.Flow{Blob: s.blob, Peer: peer, Way: transfer.ByBitTorrent}
	if s.arrival != nil {
		f.Class = s.arrival.Fetch().Class()
	}
	return f
}

func (s *swarm) detach(t *tap) {
	s.dials.take(string(t.addr))
	s.mu.Lock()
	delete(s.taps, t)
	t.mu.Lock()
	for i := range t.sent {
		s.given[i]--
		if s.first[i] == t {
			s.first[i] = nil
		}
	}
	clear(t.sent)
	clear(t.pushes)
	t.letGo()
	t.mu.Unlock()
	s.mu.Unlock()
	if w := s.want.Load(); w != nil {
		w.left(t)
	}
	s.offer()
}

// all are the connections of the moment.
func (s *swarm) all() []*tap {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*tap, 0, len(s.taps))
	for t := range s.taps {
		out = append(out, t)
	}
	return out
}

// to says whether there is a connection to a peer.
func (s *swarm) to(peer string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for t := range s.taps {
		if t.peer == peer {
			return true
		}
	}
	return false
}

// What taps tell.

func (s *swarm) has(t *tap, piece int) {
	if w := s.want.Load(); w != nil {
		w.has(t, piece)
	}
	s.passedOn(t, piece)
	s.offer()
}

func (s *swarm) hasSome(t *tap) {
	if w := s.want.Load(); w != nil {
		w.hasSome(t)
	}
	s.offer()
}

// told: the peer has said whether it may be asked, or whether it chooses.
func (s *swarm) told(t *tap) {
	if w := s.want.Load(); w != nil {
		w.told(t)
	}
}

// stir: a peer has said how far away it is from the rest.
func (s *swarm) stir() {
	if w := s.want.Load(); w != nil {
		w.stir()
	}
}

func (s *swarm) pushedBy(t *tap, piece int) {
	if w := s.want.Load(); w != nil {
		w.pushed(t, piece)
		return
	}
	t.cancel(piece)
}

// crowded: what a peer sends has to wait here.
func (s *swarm) crowded(t *tap) {
	if w := s.want.Load(); w != nil {
		w.narrow(t)
	}
}

func (s *swarm) takenBackBy(t *tap, piece int) {
	if w := s.want.Load(); w != nil {
		w.takenBack(t, piece)
	}
}

func (s *swarm) refusedBy(t *tap, piece int) {
	if w := s.want.Load(); w != nil {
		w.refusedBy(t, piece)
	}
}

func (s *swarm) came(t *tap, c chunk, data []byte) {
	if w := s.want.Load(); w != nil {
		w.came(t, c, data)
	}
}

// went: the library has sent something.
func (s *swarm) went(t *tap, w written) {
	if w.bytes > 0 {
		s.e.sent(t.flow(), w.bytes)
	}
	for _, c := range w.chunks {
		s.pushDone(t, c)
	}
	if w.bytes > 0 || w.opened {
		s.offer()
	}
}

// unread ends a connection whose peer cannot be given what it has asked for: what it
// still waits for it has from somebody else, or tries again.
func (s *swarm) unread(t *tap, piece int, err error) {
	if s.ctx().Err() == nil {
		s.e.log.Error("blob cannot be read for a peer", "blob", s.blob.Digest, "peer", t.peer, "piece", piece, "err", err)
	}
	t.end(err)
}

// accepts hands the library connections that others have opened.
type accepts struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (a *accepts) put(t *tap) {
	select {
	case a.conns <- t:
	case <-t.done:
	case <-a.done:
		t.end(transfer.ErrStopped)
	}
}

func (a *accepts) Accept() (net.Conn, error) {
	select {
	case c := <-a.conns:
		return c, nil
	case <-a.done:
		return nil, net.ErrClosed
	}
}

func (a *accepts) Close() error {
	a.once.Do(func() { close(a.done) })
	return nil
}

func (a *accepts) Addr() net.Addr { return peerAddr("here") }

// dials hands the library connections that this node has opened.
type dials struct {
	mu    sync.Mutex
	ready map[string]*tap
}

func (d *dials) put(t *tap) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ready[string(t.addr)] = t
}

func (d *dials) take(addr string) *tap {
	d.mu.Lock()
	defer d.mu.Unlock()
	t := d.ready[addr]
	delete(d.ready, addr)
	return t
}

// Dial implements the library's Dialer.
func (d *dials) Dial(_ context.Context, addr string) (net.Conn, error) {
	if t := d.take(addr); t != nil {
		return t, nil
	}
	return nil, fmt.Errorf("the connection %s is gone", addr)
}

// DialerNetwork implements the library's Dialer.
func (d *dials) DialerNetwork() string { return "tcp" }

// quiet is a log for a library whose warnings are this engine's business, not the
// operator's: whatever it says is for those who debug.
type quiet struct{ slog.Handler }

func (q quiet) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelInfo && q.Handler.Enabled(ctx, slog.LevelDebug)
}

func (q quiet) Handle(ctx context.Context, r slog.Record) error {
	r.Level = slog.LevelDebug
	return q.Handler.Handle(ctx, r)
}

func (q quiet) WithAttrs(attrs []slog.Attr) slog.Handler { return quiet{q.Handler.WithAttrs(attrs)} }
func (q quiet) WithGroup(name string) slog.Handler       { return quiet{q.Handler.WithGroup(name)} }
