// Package clustertest runs whole sites in one process: real nodes on real
// files, over a network in memory whose links can be cut both ways or one way,
// and nodes that can be killed and started again. Nothing in it sleeps by the
// clock alone, so tests run it inside testing/synctest, where the seconds that
// elections take cost nothing.
package clustertest

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/pki"
)

// Network connects the hosts of one test.
type Network struct {
	mu      sync.Mutex
	hosts   map[string]*host
	cut     map[link]bool
	changed chan struct{} // closed when a link or a host changes; then replaced
}

// link is a direction of travel.
type link struct{ from, to string }

// NewNetwork gives a network without hosts.
func NewNetwork() *Network {
	return &Network{hosts: make(map[string]*host), cut: make(map[link]bool), changed: make(chan struct{})}
}

// Cut loses everything between two hosts, without telling either. Connections
// stay and go on after Heal.
func (n *Network) Cut(a, b string) {
	n.CutOneWay(a, b)
	n.CutOneWay(b, a)
}

// CutOneWay loses everything that from sends to to.
func (n *Network) CutOneWay(from, to string) { n.set(link{from, to}, true) }

// Heal joins two hosts again.
func (n *Network) Heal(a, b string) {
	n.set(link{a, b}, false)
	n.set(link{b, a}, false)
}

func (n *Network) set(l link, cut bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut[l] = cut
	n.wake()
}

// wake is called under mu.
func (n *Network) wake() {
	close(n.changed)
	n.changed = make(chan struct{})
}

// host is one node's end of the network; it implements member.Network.
type host struct {
	network   *Network
	addr      string
	identity  func() member.Identity
	authorize func(peer string, service byte) error
	epoch     *epoch.Guard
	bare      bool // it has an id and no certificate

	// under network.mu:
	services map[byte]*listener
	join     *listener
	conns    map[*conn]struct{}
	down     bool
}

var _ member.Network = (*host)(nil)

// attach adds a host; it takes the place of a dead one with the address.
func (n *Network) attach(h *host) {
	n.mu.Lock()
	defer n.mu.Unlock()
	h.network, h.services, h.conns = n, make(map[byte]*listener), make(map[*conn]struct{})
	n.hosts[h.addr] = h
}

// Visitor is the end of the network of a machine that is no member yet: it can
// DialJoin and nothing else.
func (n *Network) Visitor(addr string) interface {
	DialJoin(ctx context.Context, addr string, caPin []byte) (net.Conn, error)
} {
	return &host{network: n, addr: addr, conns: make(map[*conn]struct{})}
}

// Bare is the end of the network of a node that is nothing but an id and an address:
// for parts of a node that are tested alone. Kill ends it; another may then come at
// its address.
type Bare struct{ *host }

// Bare adds one.
func (n *Network) Bare(id, addr string) Bare {
	b := Bare{&host{
		addr: addr, bare: true,
		identity:  func() member.Identity { return member.Identity{NodeID: id} },
		authorize: func(string, byte) error { return nil },
	}}
	n.attach(b.host)
	return b
}

// Kill resets its connections and refuses new ones.
func (b Bare) Kill() { b.kill() }

// kill resets the host's connections and refuses new ones.
func (h *host) kill() {
	h.network.mu.Lock()
	defer h.network.mu.Unlock()
	h.down = true
	for c := range h.conns {
		c.out.reset, c.in.reset = true, true
	}
	h.network.wake()
}

// Drop implements member.Network.
func (h *host) Drop(peer string) {
	h.network.mu.Lock()
	defer h.network.mu.Unlock()
	for c := range h.conns {
		if c.accepted && c.peer == peer {
			c.out.reset, c.in.reset = true, true
		}
	}
	h.network.wake()
}

// Listen implements member.Network.
func (h *host) Listen(service byte) net.Listener {
	l := h.newListener()
	h.network.mu.Lock()
	defer h.network.mu.Unlock()
	h.services[service] = l
	return l
}

// ListenJoin implements member.Network.
func (h *host) ListenJoin() net.Listener {
	l := h.newListener()
	h.network.mu.Lock()
	defer h.network.mu.Unlock()
	h.join = l
	return l
}

// Dial implements member.Network.
func (h *host) Dial(ctx context.Context, addr string, service byte) (net.Conn, error) {
	self := h.identity().NodeID
	return h.network.dial(ctx, h, addr, self, func(to *host) (*listener, error) {
		theirs, ours := to.epoch.Meet(self, h.epoch.Wire()), h.epoch.Meet(to.identity().NodeID, to.epoch.Wire())
		if err := errors.Join(h.proves(to), to.proves(h), ours, theirs); err != nil {
			return nil, err
		}
		if err := to.authorize(self, service); err != nil {
			return nil, err
		}
		h.network.mu.Lock()
		defer h.network.mu.Unlock()
		return to.services[service], nil
	})
}

// presents is what a host shows in a handshake.
func (h *host) presents() (*x509.Certificate, []byte) {
	id := h.identity()
	cert, err := pki.ParseCert(id.Cert)
	if err != nil {
		panic(err)
	}
	return cert, append(bytes.Clone(id.CA), id.Links...)
}

// proves reports whether to accepts the host's certificate, whatever the time is.
func (h *host) proves(to *host) error {
	if h.bare {
		return nil
	}
	cert, bundle := h.presents()
	trusted, err := pki.ParseCerts(to.identity().CA)
	if err != nil {
		return err
	}
	for _, ca := range trusted {
		if err = pki.VerifyPinned(cert, append(bytes.Clone(bundle), pki.EncodeCert(ca)...), pki.PinOf(ca)); err == nil {
			return nil
		}
	}
	return fmt.Errorf("%s does not trust %s: %w", to.addr, h.addr, err)
}

// DialJoin implements member.Network.
func (h *host) DialJoin(ctx context.Context, addr string, pin []byte) (net.Conn, error) {
	return h.network.dial(ctx, h, addr, "", func(to *host) (*listener, error) {
		cert, bundle := to.presents()
		if err := pki.VerifyPinned(cert, bundle, pin); err != nil {
			return nil, fmt.Errorf("%w: %w", member.ErrOtherSite, err)
		}
		h.network.mu.Lock()
		defer h.network.mu.Unlock()
		return to.join, nil
	})
}

// dial takes until both directions work, as a handshake does.
func (n *Network) dial(ctx context.Context, from *host, addr, peer string, find func(*host) (*listener, error)) (net.Conn, error) {
	n.mu.Lock()
	for n.cut[link{from.addr, addr}] || n.cut[link{addr, from.addr}] {
		changed := n.changed
		n.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("dial %s: %w", addr, ctx.Err())
		}
		n.mu.Lock()
	}
	to := n.hosts[addr]
	if from.down || to == nil || to.down {
		n.mu.Unlock()
		return nil, fmt.Errorf("dial %s: %w", addr, syscall.ECONNREFUSED)
	}
	n.mu.Unlock()
	l, err := find(to) // reads rows: not under mu
	if err == nil && l == nil {
		err = syscall.ECONNREFUSED
	}
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	there, back := newStream(link{from.addr, addr}), newStream(link{addr, from.addr})
	near := &conn{host: from, in: back, out: there, peer: to.identity().NodeID}
	far := &conn{host: to, in: there, out: back, peer: peer, accepted: true}
	select {
	case l.accepted <- far:
	case <-l.closed:
		return nil, fmt.Errorf("dial %s: %w", addr, syscall.ECONNREFUSED)
	case <-ctx.Done():
		return nil, fmt.Errorf("dial %s: %w", addr, ctx.Err())
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if from.down || to.down {
		there.reset, back.reset = true, true
	}
	from.conns[near], to.conns[far] = struct{}{}, struct{}{}
	return near, nil
}

type listener struct {
	host     *host
	accepted chan *conn
	closed   chan struct{}
	once     sync.Once
}

func (h *host) newListener() *listener {
	return &listener{host: h, accepted: make(chan *conn), closed: make(chan struct{})}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accepted:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *listener) Addr() net.Addr { return address(l.host.addr) }

type address string

func (address) Network() string  { return "memory" }
func (a address) String() string { return string(a) }

// window is how much a sender may have under way.
const window = 256 << 10

// stream is one direction of a connection; its fields are under network.mu.
type stream struct {
	changed     chan struct{} // closed when another field changes; then replaced
	link        link
	data        []byte
	ended       bool // the sender closed it
	left        bool // the receiver closed it
	reset       bool // a host died
	readBy, due time.Time
}

func newStream(l link) *stream { return &stream{link: l, changed: make(chan struct{})} }

// wake wakes who waits for this stream, and nobody else: a site of seven has hundreds.
func (s *stream) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// conn is one end of a connection.
type conn struct {
	host     *host
	in, out  *stream
	peer     string
	accepted bool // by host, not dialled
	closed   bool // under network.mu
}

// PeerID is the node at the other end; "" for one that is joining.
func (c *conn) PeerID() string { return c.peer }

func (c *conn) LocalAddr() net.Addr  { return address(c.host.addr) }
func (c *conn) RemoteAddr() net.Addr { return address(c.out.link.to) }

func (c *conn) Read(p []byte) (int, error) {
	s, n := c.in, c.host.network
	var read int
	err := c.await(s, func() (bool, error) {
		switch {
		case s.reset:
			return true, syscall.ECONNRESET
		case n.cut[s.link]:
			return false, nil
		case len(s.data) > 0:
			read = copy(p, s.data)
			s.data = s.data[read:]
			return true, nil
		case s.ended:
			return true, io.EOF
		}
		return len(p) == 0, nil
	}, &s.readBy)
	return read, err
}

func (c *conn) Write(p []byte) (int, error) {
	s, written := c.out, 0
	for written < len(p) {
		err := c.await(s, func() (bool, error) {
			switch {
			case s.reset || s.left:
				return true, syscall.ECONNRESET
			case len(s.data) < window:
				part := p[written:min(len(p), written+window-len(s.data))]
				s.data = append(s.data, part...)
				written += len(part)
				return true, nil
			}
			return false, nil
		}, &s.due)
		if err != nil {
			return written, err
		}
	}
	return written, nil
}

// await runs do under the network's lock at each change of the stream or of the network
// until it is done, the connection is closed here, or the deadline passes.
func (c *conn) await(s *stream, do func() (bool, error), deadline *time.Time) error {
	n := c.host.network
	n.mu.Lock()
	defer n.mu.Unlock()
	for {
		if c.closed {
			return net.ErrClosed
		}
		if done, err := do(); done {
			s.wake()
			return err
		}
		var late <-chan time.Time
		stop := func() bool { return true }
		if !deadline.IsZero() {
			left := time.Until(*deadline)
			if left <= 0 {
				return os.ErrDeadlineExceeded
			}
			t := time.NewTimer(left)
			late, stop = t.C, t.Stop
		}
		changed, network := s.changed, n.changed
		n.mu.Unlock()
		select {
		case <-changed:
		case <-network:
		case <-late:
		}
		stop()
		n.mu.Lock()
	}
}

func (c *conn) Close() error {
	n := c.host.network
	n.mu.Lock()
	defer n.mu.Unlock()
	if c.closed {
		return nil
	}
	c.closed, c.out.ended, c.in.left = true, true, true
	delete(c.host.conns, c)
	c.in.wake()
	c.out.wake()
	return nil
}

func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *conn) SetReadDeadline(t time.Time) error  { return c.deadline(c.in, &c.in.readBy, t) }
func (c *conn) SetWriteDeadline(t time.Time) error { return c.deadline(c.out, &c.out.due, t) }

func (c *conn) deadline(s *stream, at *time.Time, t time.Time) error {
	n := c.host.network
	n.mu.Lock()
	defer n.mu.Unlock()
	*at = t
	s.wake()
	return nil
}
