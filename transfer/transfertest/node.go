package transfertest

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/peernet"
)

// Parts are what the suite gives an engine.
type Parts struct {
	Source transfer.Source
	Sink   transfer.Sink
	Peers  transfer.Peers
	// Dial opens a connection for the blob service at a peer's address.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	// Node is the node's id. DialService and Listen are for engines with a service of
	// their own beside it.
	Node        string
	DialService func(ctx context.Context, addr string, service byte) (net.Conn, error)
	Listen      func(service byte) net.Listener
	Log         *slog.Logger
	// Limiter of what goes out and Incoming of what comes in; nil: no limit.
	Limiter, Incoming transfer.Limiter
	// StallTimeout after which a sender without progress is to be replaced. What
	// else the engine waits for is to be as short.
	StallTimeout time.Duration
	// Moved and Dropped are to be called as the engine goes: verified bytes came from
	// a peer; a peer was dropped for a blob, lie says whether for a proven lie.
	Moved   func(peerID string, bytes int64)
	Dropped func(peerID string, lie bool)
}

// Engine under test.
type Engine interface {
	transfer.Mover
	// Run as Engine.Run of package stream.
	Run(ctx context.Context) error
	// Serve the blob service to peers until the listener is closed.
	Serve(net.Listener) error
}

// Start makes an engine from its parts.
type Start func(t testing.TB, parts Parts) Engine

// fleet is a site of nodes under test.
type fleet struct {
	t     testing.TB
	site  *Site
	start Start
	stall time.Duration
	roll  *roll // nil: nodes only dial
}

// roll is where the nodes of a fleet can be dialled, as each of them believes.
type roll struct {
	mu  sync.Mutex
	all []peernet.Peer
}

func (r *roll) add(p peernet.Peer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, p)
}

func (r *roll) list() ([]peernet.Peer, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.all), nil
}

// node is one of them.
type node struct {
	Engine
	id, addr string
	stop     func() // kill and wait

	mu      sync.Mutex
	asks    []*node
	moved   map[string]int64
	dropped map[string]bool // peer id: for a lie
	drops   chan string
}

// options of a node.
type options struct {
	source func(transfer.Source) transfer.Source // wraps what it serves from
	accept func(net.Conn) net.Conn               // wraps the raw connections that it accepts
	wall   string                                // an address without an answer, by which others know it
	out    transfer.Limiter
	in     transfer.Limiter
}

// node starts a node over a store; it asks the peers given.
func (f *fleet) node(id string, store *Store, opts options, asks ...*node) *node {
	f.t.Helper()
	n := &node{id: id, asks: asks, moved: make(map[string]int64), dropped: make(map[string]bool), drops: make(chan string, 64)}
	cert := f.site.Node(f.t, id)
	cfg := peernet.Config{
		SiteID: f.site.ID,
		Cert:   func() tls.Certificate { return cert },
		CA:     func() *x509.CertPool { return f.site.Pool },
	}
	if f.roll != nil {
		cfg.Peers = f.roll.list
	}
	port, err := peernet.New(cfg)
	if err != nil {
		f.t.Fatal(err)
	}
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		f.t.Fatal(err)
	}
	n.addr = cmp.Or(opts.wall, raw.Addr().String())
	if f.roll != nil {
		f.roll.add(peernet.Peer{ID: id, Addr: n.addr})
	}
	var source transfer.Source = store
	if opts.source != nil {
		source = opts.source(store)
	}
	if opts.accept != nil {
		raw = &wrapped{raw, opts.accept}
	}
	n.Engine = f.start(f.t, Parts{
		Source: source,
		Sink:   store,
		Peers:  n,
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			return port.Dial(ctx, addr, peernet.ServiceBlob)
		},
		Node:         id,
		DialService:  port.Dial,
		Listen:       port.Listen,
		Log:          slog.New(slog.DiscardHandler),
		Limiter:      opts.out,
		Incoming:     opts.in,
		StallTimeout: f.stall,
		Moved:        n.noteMoved,
		Dropped:      n.noteDropped,
	})
	ctx, cancel := context.WithCancel(f.t.Context())
	var wg sync.WaitGroup
	blobs := port.Listen(peernet.ServiceBlob)
	wg.Go(func() { _ = port.Serve(ctx, raw) })
	wg.Go(func() { _ = n.Serve(blobs) })
	wg.Go(func() { _ = n.Run(ctx) })
	n.stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
	})
	f.t.Cleanup(n.stop)
	return n
}

// Candidates implements transfer.Peers.
func (n *node) Candidates(context.Context, digest.Digest) []transfer.Peer {
	n.mu.Lock()
	defer n.mu.Unlock()
	var peers []transfer.Peer
	for _, a := range n.asks {
		peers = append(peers, transfer.Peer{ID: a.id, Addr: a.addr})
	}
	return peers
}

func (n *node) noteMoved(peer string, bytes int64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.moved[peer] += bytes
}

func (n *node) noteDropped(peer string, lie bool) {
	n.mu.Lock()
	n.dropped[peer] = n.dropped[peer] || lie
	n.mu.Unlock()
	select {
	case n.drops <- peer:
	default:
	}
}

// movedFrom is how many verified bytes came from a peer, or from all for "".
func (n *node) movedFrom(peer string) int64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	if peer != "" {
		return n.moved[peer]
	}
	var sum int64
	for _, b := range n.moved {
		sum += b
	}
	return sum
}

// liar says whether the peer was dropped for a lie.
func (n *node) liar(peer string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.dropped[peer]
}

// wrapped is a listener whose connections are not what they seem.
type wrapped struct {
	net.Listener
	wrap func(net.Conn) net.Conn
}

func (w *wrapped) Accept() (net.Conn, error) {
	c, err := w.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return w.wrap(c), nil
}
