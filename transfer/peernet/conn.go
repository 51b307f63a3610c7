package peernet

import (
	"crypto/tls"
	"net"
	"sync"
	"sync/atomic"
	"time"
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
