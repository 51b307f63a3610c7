package peernet

import (
	"crypto/tls"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// Carrier is what takes a connection's bytes to the peer.
type Carrier string

// The carriers: TLS over TCP, a stream of a QUIC connection over UDP.
const (
	TCP  Carrier = "tcp"
	QUIC Carrier = "quic"
)

// Conn is an authenticated connection.
type Conn struct {
	net.Conn   // *tls.Conn or *stream
	site, peer string
	protocol   string // that the ends agreed on
	service    byte
	closed     func()
	once       sync.Once

	long time.Duration // see Config.LongPath

	// Of a connection that a third node passes on.
	via    string  // its id
	marked *marked // nil unless blobs go over it

	// Over TCP: what looks at the path; nil once there is no need to.
	tune    atomic.Pointer[func() (done bool)]
	written atomic.Int64
}

// Write writes, and looks at the path now and then.
func (c *Conn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if tune := c.tune.Load(); tune != nil && c.written.Add(int64(n)) >= tuneEvery {
		c.written.Store(0)
		if (*tune)() {
			c.tune.Store(nil)
		}
	}
	return n, err
}

// tuned makes the connection look after the congestion control of the TCP
// connection below it, from now on.
func (c *Conn) tuned(n *Net, raw net.Conn) {
	c.long = n.cfg.LongPath
	tune := func() bool { return n.tune(raw) }
	if !tune() {
		c.tune.Store(&tune)
	}
}

// PeerID is the node id that the peer's certificate proves; "" for a node that is
// joining and has no certificate yet.
func (c *Conn) PeerID() string { return c.peer }

// SiteID is the site that the peer's certificate names; "" as with PeerID.
func (c *Conn) SiteID() string { return c.site }

// Via is the id of the node that passes the connection on; "" when none does.
func (c *Conn) Via() string { return c.via }

// Mark says what that is for which is written from now on. The node that passes the
// connection on hears it; without one it changes nothing.
func (c *Conn) Mark(class transfer.Class) {
	if c.marked != nil {
		c.marked.class.Store(uint32(class))
	}
}

// Service of the connection; 0 on a join connection.
func (c *Conn) Service() byte { return c.service }

// Carrier of the connection.
func (c *Conn) Carrier() Carrier {
	if _, ok := c.Conn.(*stream); ok {
		return QUIC
	}
	return TCP
}

// NetConn is the connection below the encryption; with QUIC the stream itself.
func (c *Conn) NetConn() net.Conn {
	if t, ok := c.Conn.(*tls.Conn); ok {
		return t.NetConn()
	}
	return c.Conn
}

// Close the connection at once.
func (c *Conn) Close() error {
	c.once.Do(c.closed)
	return c.Conn.Close()
}

// Listen gives the listener of a service. Its connections have a PeerID method. A
// second Listen for the same service takes over from the first, which is closed.
// After Serve has ended the listener is closed from the start.
func (n *Net) Listen(service byte) net.Listener {
	l := newListener(serviceAddr(fmt.Sprintf("service %d", service)))
	n.mu.Lock()
	old := n.services[service]
	n.services[service] = l
	closed := n.closed
	n.mu.Unlock()
	if old != nil {
		old.Close()
	}
	if closed {
		l.Close()
	}
	return l
}

// ListenJoin gives the listener for nodes that are joining: nothing is known about
// them, their connections live for JoinTimeout at most.
func (n *Net) ListenJoin() net.Listener { return n.listenFor(&n.join, "join") }

// ListenFounding gives the listener for machines that hold the token of
// Config.Founding. Their connections live for JoinTimeout at most.
func (n *Net) ListenFounding() net.Listener { return n.listenFor(&n.found, "founding") }

func (n *Net) listenFor(at **listener, name serviceAddr) net.Listener {
	l := newListener(name)
	n.mu.Lock()
	old := *at
	*at = l
	closed := n.closed
	n.mu.Unlock()
	if old != nil {
		old.Close()
	}
	if closed {
		l.Close()
	}
	return l
}

// listener hands out connections that the port has accepted.
type listener struct {
	addr  serviceAddr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newListener(addr serviceAddr) *listener {
	return &listener{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.done:
		return nil, net.ErrClosed
	default:
	}
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *listener) isClosed() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

func (l *listener) Addr() net.Addr { return l.addr }

// serviceAddr names a listener; the port's own address is whoever calls Serve's.
type serviceAddr string

func (a serviceAddr) Network() string { return "atoll" }
func (a serviceAddr) String() string  { return string(a) }
