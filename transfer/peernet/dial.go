package peernet

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"

	"github.com/quic-go/quic-go"
)

// What the server answers to the service byte, before the service's own protocol.
const (
	statusOK        byte = 0
	statusRefused   byte = 1
	statusNoService byte = 2
	statusEpoch     byte = 3
)

// call is one connection that is to be dialled.
type call struct {
	addr    string
	service byte
	kept    bool    // over QUIC the connection stays for further streams
	by      Carrier // the only one that is dialled over; "": as configured
	pool    byte    // which of those connections: those for this service; 0: as service
	after   []byte  // goes out right behind the greeting
	// config for a handshake, which puts what it proves into c.
	config func(c *Conn) *tls.Config
}

// Dial opens a connection for a service of the node at addr (host:port of its peer
// port). It returns once the peer has proved to be a node of this site and has let
// this node in. Errors wrap ErrOtherSite, ErrRefused, ErrOtherEpoch or ErrNoService
// where they apply. The connection is the caller's to close.
func (n *Net) Dial(ctx context.Context, addr string, service byte) (net.Conn, error) {
	if n.cfg.Cert == nil {
		return nil, fmt.Errorf("dialling %s: %w", addr, ErrNoCertificate)
	}
	c, err := n.dial(ctx, n.member(addr, service))
	if err != nil {
		return nil, fmt.Errorf("dialling %s for service %d: %w", addr, service, err)
	}
	return c, nil
}

// DialOver is Dial over one carrier, whatever the configuration says, to find out
// whether it gets through.
func (n *Net) DialOver(ctx context.Context, addr string, service byte, by Carrier) (*Conn, error) {
	if n.cfg.Cert == nil {
		return nil, fmt.Errorf("dialling %s: %w", addr, ErrNoCertificate)
	}
	ctx, cancel := context.WithTimeout(ctx, n.cfg.HandshakeTimeout)
	defer cancel()
	return n.over(ctx, by, n.member(addr, service))
}

// DialBy is Dial over one carrier, whatever the configuration says. A node that cannot
// be dialled is called all the same, and dials back by whatever gets through.
func (n *Net) DialBy(ctx context.Context, addr string, service byte, by Carrier) (net.Conn, error) {
	if n.cfg.Cert == nil {
		return nil, fmt.Errorf("dialling %s: %w", addr, ErrNoCertificate)
	}
	k := n.member(addr, service)
	k.by = by
	c, err := n.dial(ctx, k)
	if err != nil {
		return nil, fmt.Errorf("dialling %s for service %d: %w", addr, service, err)
	}
	return c, nil
}

// member is the call of a node of the site.
func (n *Net) member(addr string, service byte) call {
	// What a cap holds back on a stream would hold back those beside it on its connection.
	kept := service != ServicePassing
	return call{addr: addr, service: service, kept: kept, config: func(c *Conn) *tls.Config {
		return &tls.Config{
			MinVersion:   tls.VersionTLS13,
			NextProtos:   n.protocols(),
			Certificates: []tls.Certificate{n.cfg.Cert()},
			Time:         n.cfg.Now,
			// Nodes are known by the URI of their certificate, not by a host name:
			// VerifyConnection checks everything that the standard way would, and that.
			InsecureSkipVerify: true,
			VerifyConnection: func(cs tls.ConnectionState) (err error) {
				c.site, c.peer, err = n.verify(cs, x509.ExtKeyUsageServerAuth)
				return err
			},
		}
	}}
}

// DialJoin opens a join connection to the node at addr, which must prove to be a
// node of the site whose CA certificate has the pin (see Pin); ErrOtherSite when it
// is not. The connection's PeerID and SiteID say which node and site answered.
func (n *Net) DialJoin(ctx context.Context, addr string, caPin []byte) (net.Conn, error) {
	c, err := n.dial(ctx, call{addr: addr, config: func(c *Conn) *tls.Config {
		return &tls.Config{
			MinVersion:         tls.VersionTLS13,
			NextProtos:         []string{ProtoJoin},
			Time:               n.cfg.Now,
			InsecureSkipVerify: true, // as in Dial: the pin and the URI are checked instead
			VerifyConnection: func(cs tls.ConnectionState) (err error) {
				c.site, c.peer, err = verifyPinned(cs, caPin, n.cfg.Now())
				return err
			},
		}
	}})
	if err != nil {
		return nil, fmt.Errorf("dialling %s to join its site: %w", addr, err)
	}
	return c, nil
}

// DialFounding opens a connection to the machine at addr, which must prove to hold
// the token of Config.Founding; ErrOtherToken when it does not.
func (n *Net) DialFounding(ctx context.Context, addr string) (net.Conn, error) {
	if n.cfg.Founding == nil {
		return nil, fmt.Errorf("dialling %s: %w", addr, ErrNoCertificate)
	}
	c, err := n.dial(ctx, call{addr: addr, config: func(*Conn) *tls.Config {
		return &tls.Config{
			MinVersion:         tls.VersionTLS13,
			NextProtos:         []string{ProtoFound},
			Certificates:       []tls.Certificate{n.cfg.Founding.Cert},
			InsecureSkipVerify: true, // the token says whom to trust: see VerifyConnection
			VerifyConnection:   n.verifyFounding,
		}
	}})
	if err != nil {
		return nil, fmt.Errorf("dialling %s to found a site: %w", addr, err)
	}
	return c, nil
}

// protocols between nodes, the one that is liked best first.
func (n *Net) protocols() []string {
	if n.cfg.Epoch == nil {
		return []string{ProtoNode}
	}
	return []string{ProtoEpoch, ProtoNode}
}

// overTCP connects and does the rest over that.
func (n *Net) overTCP(ctx context.Context, k call) (*Conn, error) {
	var d net.Dialer
	raw, err := d.DialContext(ctx, "tcp", k.addr)
	if err != nil {
		return nil, err
	}
	return n.upon(ctx, raw, k)
}

// upon shakes hands, names the service and awaits the status byte. On an error raw is
// closed.
func (n *Net) upon(ctx context.Context, raw net.Conn, k call) (*Conn, error) {
	c := &Conn{service: k.service, closed: func() {}}
	cfg := k.config(c)
	secure := tls.Client(raw, cfg)
	if err := secure.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	c.Conn, c.protocol = secure, secure.ConnectionState().NegotiatedProtocol
	if !slices.Contains(cfg.NextProtos, c.protocol) {
		raw.Close()
		return nil, fmt.Errorf("peer does not speak %s", cfg.NextProtos[0])
	}
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	err := n.greet(c, nil, k.after)
	if !stop() { // the timeout or ctx closed the connection under it
		return nil, ctx.Err()
	}
	if err != nil {
		raw.Close()
		return nil, err
	}
	c.probe(raw)
	c.tuned(n, raw)
	return c, nil
}

// greet says what this end has to say and hears whether it may go on. A peer's
// epoch is judged whatever its status: an older node learns in this way that the
// site has gone on without it. The hello goes before all else, after goes last.
func (n *Net) greet(c *Conn, hello, after []byte) error {
	switch c.protocol {
	case ProtoNode:
		hello = append(hello, c.service)
	case ProtoEpoch:
		hello = append(append(hello, c.service), n.epoch()...)
	}
	if _, err := c.Conn.Write(append(hello, after...)); err != nil {
		return err
	}
	var status [1]byte
	if _, err := io.ReadFull(c.Conn, status[:]); err != nil {
		return refusal(err)
	}
	if c.protocol != ProtoJoin && c.protocol != ProtoFound {
		if err := n.meet(c); err != nil {
			return err
		}
	}
	switch status[0] {
	case statusOK:
		return nil
	case statusRefused:
		return ErrRefused
	case statusNoService:
		return ErrNoService
	case statusEpoch:
		return ErrOtherEpoch
	}
	return fmt.Errorf("peer answered with the unknown status %d", status[0])
}

// refusal recognizes that the peer has not taken this node's certificate, which in
// TLS 1.3 a client learns only after the handshake.
func refusal(err error) error {
	var alert *net.OpError
	var closed *quic.TransportError
	tcp := errors.As(err, &alert) && alert.Op == "remote error"
	udp := errors.As(err, &closed) && closed.Remote && closed.ErrorCode.IsCryptoError()
	if tcp || udp {
		return fmt.Errorf("%w (%v)", ErrRefused, err)
	}
	return err
}

// epoch is this node's, with its length before it.
func (n *Net) epoch() []byte {
	wire := n.cfg.Epoch()
	return append([]byte{byte(len(wire))}, wire...)
}

// meet reads the peer's epoch, if the protocol has it, and judges it.
func (n *Net) meet(c *Conn) error {
	if n.cfg.Meet == nil {
		return nil
	}
	var wire []byte
	if c.protocol == ProtoEpoch {
		var length [1]byte
		if _, err := io.ReadFull(c.Conn, length[:]); err != nil {
			return fmt.Errorf("node %s told no recovery epoch: %w", c.peer, err)
		}
		wire = make([]byte, length[0])
		if _, err := io.ReadFull(c.Conn, wire); err != nil {
			return fmt.Errorf("node %s told no recovery epoch: %w", c.peer, err)
		}
	}
	if err := n.cfg.Meet(c.peer, string(wire)); err != nil {
		return fmt.Errorf("%w: %w", ErrOtherEpoch, err)
	}
	return nil
}
