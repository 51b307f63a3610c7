package peernet

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"
)

// Every stream begins with these bytes. They tell nonsense from a stream and make
// its first packet long enough to be answered by a stateless reset (RFC 9000,
// section 10.3): a packet shorter than the reset itself gets none.
const preface = "ATQ1"

const (
	// idleSession is how long a QUIC connection without a stream is kept.
	idleSession = time.Minute
	// lingering is how long a connection of one stream is kept for what the stream
	// has not delivered yet.
	lingering = 2 * time.Second
	// bulkSessions are so many QUIC connections to a peer for a service of bulk:
	// the loss of a packet slows one of them down.
	bulkSessions = 8
)

// quicConfig of both ends. The first packets are of 1,200 bytes, which passes where
// the MTU is 1,280; path MTU discovery finds out whether longer ones do.
func (n *Net) quicConfig() *quic.Config {
	return &quic.Config{
		HandshakeIdleTimeout:  n.cfg.HandshakeTimeout / 2, // the whole handshake: twice that
		MaxIdleTimeout:        20 * time.Second,
		KeepAlivePeriod:       7 * time.Second,
		MaxIncomingStreams:    4096,
		MaxIncomingUniStreams: -1,
		InitialPacketSize:     1200,
	}
}

// transport carries QUIC over a socket. One without a secret cannot tell peers, after
// a restart, that it has forgotten their connections: it only dials.
func (n *Net) transport(packets net.PacketConn) (*quic.Transport, error) {
	tr := &quic.Transport{Conn: packets, ConnectionIDLength: 20}
	if len(n.cfg.Secret) > 0 {
		key, err := hkdf.Key(sha256.New, n.cfg.Secret, nil, "atoll quic stateless reset", 32)
		if err != nil {
			return nil, err
		}
		reset := quic.StatelessResetKey(key)
		tr.StatelessResetKey = &reset
	}
	tr.VerifySourceAddress = func(net.Addr) bool { return n.busy() }
	tr.ConnContext = n.meetStranger
	return tr, nil
}

// session is a QUIC connection with a peer, dialled or accepted. Either end opens
// streams. What its handshake proved is looked at again for each of them, so that it
// is worth no more than a new connection.
type session struct {
	net     *Net
	conn    *quic.Conn
	dialled bool
	key     sessionKey // if dialled
	leaf    string     // of this node's certificate, by which it was dialled
	own     *quic.Transport
	single  bool // it is for one stream

	mu      sync.Mutex
	streams int
	idle    *time.Timer
}

// sessionKey is what a dialled connection is for.
type sessionKey struct {
	addr    string
	service byte
}

func (s *session) alive() bool { return s.conn.Context().Err() == nil }

func (s *session) state() tls.ConnectionState { return s.conn.ConnectionState().TLS }

// Close the connection with all its streams.
func (s *session) Close() error {
	err := s.conn.CloseWithError(0, "")
	if s.own != nil {
		err = errors.Join(err, s.own.Close(), s.own.Conn.Close())
	}
	return err
}

// hold counts a stream.
func (s *session) hold() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.streams++
	if s.idle != nil {
		s.idle.Stop()
	}
}

// release takes a stream out of the count. After a consensus call that was not
// answered in time the connection goes too: the next call must not wait for the
// path that lost this one.
func (s *session) release(late, consensus bool) {
	s.mu.Lock()
	s.streams--
	if s.streams == 0 && s.dialled {
		rest := idleSession
		if s.own != nil || s.single {
			rest = lingering
		}
		s.idle = time.AfterFunc(rest, func() { s.closeIdle() })
	}
	s.mu.Unlock()
	if late && (consensus || s.dialled && s.key.service == ServiceRaft) {
		s.Close()
	}
}

func (s *session) closeIdle() {
	s.mu.Lock()
	idle := s.streams == 0
	s.mu.Unlock()
	if idle {
		s.Close()
	}
}

func (s *session) load() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.streams
}

// strangerKey finds a connection's place in the count of strangers.
type strangerKey struct{}

// stranger is a QUIC connection whose peer has not been let in yet.
type stranger struct {
	net      *Net
	from     netip.Addr
	verified bool        // the address is its own
	shaken   atomic.Bool // the handshake came to its end
	let      sync.Once
	gone     sync.Once
}

// busy says whether a stranger has to show that its address is its own before
// anything is kept for it, which costs it a round trip.
func (n *Net) busy() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.strangers >= n.cfg.MaxStrangers/8
}

// meetStranger counts who begins a handshake. An address that may be forged does
// not count: else whoever forges it would keep its owner out. There are at most so
// many of these as it takes to be busy.
func (n *Net) meetStranger(ctx context.Context, info *quic.ClientInfo) (context.Context, error) {
	s := &stranger{net: n, verified: info.AddrVerified}
	if udp, ok := info.RemoteAddr.(*net.UDPAddr); ok {
		s.from = udp.AddrPort().Addr().Unmap()
	}
	n.mu.Lock()
	crowded := n.closed || n.strangers >= n.cfg.MaxStrangers || s.verified && n.addresses[s.from] >= n.cfg.MaxPerAddress
	if !crowded {
		n.strangers++
		if s.verified {
			n.addresses[s.from]++
		}
	}
	n.mu.Unlock()
	if crowded {
		n.crowded(info.RemoteAddr)
		return nil, errors.New("too many strangers")
	}
	context.AfterFunc(ctx, func() {
		if cause := context.Cause(ctx); !s.shaken.Load() && !n.ended() {
			var late net.Error
			if !errors.As(cause, &late) || !late.Timeout() {
				ctx = context.WithoutCancel(ctx) // it did not just leave
			}
			n.refuse(ctx, info.RemoteAddr, &Conn{}, cause)
		}
		s.letIn()
		s.leave()
	})
	return context.WithValue(ctx, strangerKey{}, s), nil
}

// ended says that the port is not served any more.
func (n *Net) ended() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.closed
}

// letIn takes the connection out of the handshakes' count, leave out of its address's.
func (s *stranger) letIn() {
	s.let.Do(func() {
		s.net.mu.Lock()
		s.net.strangers--
		s.net.mu.Unlock()
	})
}

func (s *stranger) leave() {
	s.gone.Do(func() {
		if s.verified {
			s.net.forgive(s.from)
		}
	})
}

// serveQUIC accepts connections until ctx is done.
func (n *Net) serveQUIC(ctx context.Context, tr *quic.Transport, wg *sync.WaitGroup) error {
	ln, err := tr.Listen(&tls.Config{
		MinVersion:             tls.VersionTLS13,
		Time:                   n.cfg.Now,
		SessionTicketsDisabled: true,
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			return n.serverConfig(hello, &Conn{})
		},
	}, n.quicConfig())
	if err != nil {
		return fmt.Errorf("serving the peer port over UDP: %w", err)
	}
	defer ln.Close()
	for {
		conn, err := ln.Accept(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("serving the peer port over UDP: %w", err)
		}
		s := &session{net: n, conn: conn}
		wg.Go(func() { n.acceptSession(ctx, s, wg) })
	}
}

// acceptSession lets the peer of a connection that it dialled open streams. One of
// them has to be let in before the handshake's time is over.
func (n *Net) acceptSession(ctx context.Context, s *session, wg *sync.WaitGroup) {
	defer s.Close()
	who, ok := s.conn.Context().Value(strangerKey{}).(*stranger)
	if !ok {
		return
	}
	who.shaken.Store(true)
	peer := ""
	if protocol := s.state().NegotiatedProtocol; protocol != ProtoJoin && protocol != ProtoFound {
		var err error
		if _, peer, err = n.proven(s); err != nil {
			n.refuse(ctx, s.conn.RemoteAddr(), &Conn{}, err)
			return
		}
	}
	if !n.remember(s, peer) {
		return
	}
	defer n.leave(s, true)
	late := time.AfterFunc(n.cfg.HandshakeTimeout, func() { s.Close() })
	defer late.Stop()
	n.acceptStreams(ctx, s, wg, func(c *Conn) {
		late.Stop()
		who.letIn()
		if c.peer != "" {
			who.leave()
		}
	})
}

// acceptStreams takes the streams that the peer opens to their services.
func (n *Net) acceptStreams(ctx context.Context, s *session, wg *sync.WaitGroup, admitted func(*Conn)) {
	for {
		raw, err := s.conn.AcceptStream(ctx)
		if err != nil {
			return
		}
		s.hold()
		c := &Conn{Conn: &stream{Stream: raw, session: s}, closed: func() {}, protocol: s.state().NegotiatedProtocol}
		wg.Go(func() { n.acceptStream(ctx, s, c, admitted) })
	}
}

func (n *Net) acceptStream(ctx context.Context, s *session, c *Conn, admitted func(*Conn)) {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.HandshakeTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	l, err := n.receiveStream(s, c)
	if err == nil && !stop() {
		err = ctx.Err()
	}
	if err != nil {
		stop()
		c.Close()
		n.refuse(ctx, c.RemoteAddr(), c, err)
		return
	}
	admitted(c)
	if c.peer == "" {
		expiry := time.AfterFunc(n.cfg.JoinTimeout, func() { s.Close() })
		c.closed = func() { expiry.Stop() }
	}
	n.deliver(ctx, l, c)
}

// receiveStream reads what a new stream is for and answers.
func (n *Net) receiveStream(s *session, c *Conn) (l *listener, err error) {
	if c.protocol != ProtoJoin && c.protocol != ProtoFound {
		if c.site, c.peer, err = n.proven(s); err != nil {
			return nil, err
		}
	}
	if err := readPreface(c.Conn); err != nil {
		return nil, err
	}
	return n.receive(c)
}

// stream is a stream of a QUIC connection as a connection of its own. What TCP does
// it does too: Close may meet a Read and a Write, what was written before is
// delivered, and a peer that is gone is an error of the network.
type stream struct {
	*quic.Stream
	session *session

	writing sync.Mutex // a Write must not meet the stream's Close
	closing atomic.Bool
	late    atomic.Bool // a deadline passed
	end     sync.Once
	// consensus: one whose answer is late takes the connection with it, though that
	// was dialled by the peer.
	consensus bool
}

func (s *stream) LocalAddr() net.Addr  { return s.session.conn.LocalAddr() }
func (s *stream) RemoteAddr() net.Addr { return s.session.conn.RemoteAddr() }

func (s *stream) Read(p []byte) (int, error) {
	n, err := s.Stream.Read(p)
	return n, s.plain("read", err)
}

func (s *stream) Write(p []byte) (int, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.closing.Load() {
		return 0, s.plain("write", net.ErrClosed)
	}
	n, err := s.Stream.Write(p)
	return n, s.plain("write", err)
}

// Close ends both directions. Without CancelRead the peer's bytes would be kept for
// a reader who never comes.
func (s *stream) Close() error {
	s.end.Do(func() {
		s.closing.Store(true)
		s.CancelRead(0)
		if s.writing.TryLock() {
			_ = s.Stream.Close() // a stream that the peer cancelled is what we want
			s.writing.Unlock()
		} else {
			s.CancelWrite(0)
		}
		s.session.release(s.late.Load(), s.consensus)
	})
	return nil
}

// plain gives errors the meaning that those of a TCP connection have.
func (s *stream) plain(op string, err error) error {
	switch {
	case err == nil, errors.Is(err, io.EOF):
		return err
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.late.Store(true)
		return err
	case s.closing.Load():
		err = net.ErrClosed
	default:
		err = broken{err}
	}
	return &net.OpError{Op: op, Net: "quic", Source: s.LocalAddr(), Addr: s.RemoteAddr(), Err: err}
}

// broken is the end of a stream or connection that this end did not want. quic-go
// calls it net.ErrClosed, which here would mean that this end did.
type broken struct{ cause error }

func (b broken) Error() string        { return b.cause.Error() }
func (b broken) Is(target error) bool { return target == syscall.ECONNRESET }
func (b broken) As(target any) bool   { return errors.As(b.cause, target) }
