package peernet

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
)

// served is what runs while the port is served.
type served struct {
	transport *quic.Transport // nil: TCP alone
	// streams takes those that the peer of a dialled connection opens, until the end.
	streams func(s *session)
}

// Serve accepts connections from ln until ctx is done, then closes ln, every
// connection that came through it and every service's listener, and returns nil
// once all its goroutines have ended. A Net is served once.
func (n *Net) Serve(ctx context.Context, ln net.Listener) error {
	return n.ServeBoth(ctx, ln, nil)
}

// ServeBoth is Serve with a UDP socket beside ln, which is closed too. Either may be
// nil. Connections over UDP that were dialled meanwhile end as well.
func (n *Net) ServeBoth(ctx context.Context, ln net.Listener, packets net.PacketConn) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	run := &served{streams: func(s *session) {
		wg.Go(func() { n.acceptStreams(ctx, s, &wg, func(*Conn) {}) })
	}}
	defer func() {
		cancel()
		n.shut()
		if run.transport != nil {
			run.transport.Close()
		}
		for _, c := range []io.Closer{ln, packets} {
			if c != nil {
				c.Close()
			}
		}
		wg.Wait()
	}()
	if n.cfg.Cert == nil && n.cfg.Founding == nil {
		return fmt.Errorf("serving the peer port: %w", ErrNoCertificate)
	}
	ended := make(chan error, 2)
	running := 0
	if packets != nil {
		if run.transport, err = n.transport(packets); err != nil {
			return err
		}
		running++
		wg.Go(func() { ended <- n.serveQUIC(ctx, run.transport, &wg) })
	}
	n.mu.Lock()
	n.served = run
	n.mu.Unlock()
	if n.cfg.Peers != nil {
		back := n.Listen(ServiceBack)
		spawn := func(f func(context.Context)) { wg.Go(func() { f(ctx) }) }
		wg.Go(func() { n.serveBack(back, n.takeBack, spawn) })
		for _, service := range []byte{ServiceRelay, ServicePassing} {
			relay := n.Listen(service)
			wg.Go(func() { n.serveBack(relay, n.takeRelay, spawn) })
		}
		wg.Go(func() { n.park(ctx, spawn) })
	}
	if ln != nil {
		running++
		wg.Go(func() { ended <- n.serveTCP(ctx, ln, &wg) })
	}
	for range running {
		err = errors.Join(err, <-ended)
		cancel() // one carrier has ended: so does the other
	}
	return err
}

// serveTCP accepts connections until ctx is done.
func (n *Net) serveTCP(ctx context.Context, ln net.Listener, wg *sync.WaitGroup) error {
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		raw, err := ln.Accept()
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("serving the peer port: %w", err)
		default: // out of file descriptors, or the peer left already
			n.log.Warn("peer port cannot accept a connection", "err", err)
			pause.Reset(100 * time.Millisecond)
			select {
			case <-pause.C:
			case <-ctx.Done():
			}
			continue
		}
		from := addressOf(raw)
		if !n.admit(raw, from) {
			raw.Close()
			n.crowded(raw.RemoteAddr())
			continue
		}
		wg.Go(func() { n.accept(ctx, raw, from) })
	}
}

func (n *Net) crowded(remote net.Addr) {
	n.refused.WithLabelValues("crowded").Inc()
	n.said.Do(func() {
		n.log.Warn("peer port has too many strangers, and takes no more for now", "remote", remote.String())
	})
}

// admit counts a stranger, or says that there are too many.
func (n *Net) admit(raw net.Conn, from netip.Addr) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed || n.strangers >= n.cfg.MaxStrangers || n.addresses[from] >= n.cfg.MaxPerAddress {
		return false
	}
	n.strangers++
	n.addresses[from]++
	n.conns[raw] = ""
	return true
}

// known takes a connection out of the handshakes' count.
func (n *Net) known(raw net.Conn, peer string) {
	n.mu.Lock()
	n.strangers--
	n.conns[raw] = peer
	n.mu.Unlock()
}

// Drop closes the connections that serve a node. Authorize is asked for new
// connections only, so who changes its answer drops those that it let in before.
func (n *Net) Drop(peerID string) {
	var drop []io.Closer
	n.mu.Lock()
	for c, peer := range n.conns {
		if peer == peerID && peer != "" {
			drop = append(drop, c)
		}
	}
	for c, peer := range n.back.served {
		if peer == peerID {
			drop = append(drop, c)
		}
	}
	n.mu.Unlock()
	for _, c := range drop {
		c.Close()
	}
}

// remember keeps a QUIC connection so that Drop and the end find it.
func (n *Net) remember(s *session, peer string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.closed {
		n.conns[s] = peer
	}
	return !n.closed
}

// forgive takes a connection out of its address's count.
func (n *Net) forgive(from netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.addresses[from]--; n.addresses[from] <= 0 {
		delete(n.addresses, from)
	}
}

func (n *Net) forget(c io.Closer) {
	n.mu.Lock()
	delete(n.conns, c)
	n.mu.Unlock()
}

// leave forgets what a peer dialled. If it was the last, it may be that the peer
// cannot dial this node any more.
func (n *Net) leave(c io.Closer, news bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	peer := n.conns[c]
	delete(n.conns, c)
	if news {
		n.wakeFor(peer)
	}
}

// shut closes all listeners, accepted connections and QUIC connections, now and
// from now on.
func (n *Net) shut() {
	var all []io.Closer
	n.mu.Lock()
	n.closed, n.served = true, nil
	for _, l := range n.services {
		all = append(all, l)
	}
	for _, l := range []*listener{n.join, n.found} {
		if l != nil {
			all = append(all, l)
		}
	}
	for c := range n.conns {
		all = append(all, c)
	}
	for c := range n.back.served {
		all = append(all, c)
	}
	clear(n.sessions)
	n.mu.Unlock()
	for _, c := range all {
		c.Close()
	}
}

// accept takes one connection from its first byte to its service.
func (n *Net) accept(ctx context.Context, raw net.Conn, from netip.Addr) {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.HandshakeTimeout)
	defer cancel()
	c := &Conn{}
	c.closed = func() { n.leave(raw, c.service != ServiceBack) }
	l, err := n.handshake(ctx, raw, c)
	n.known(raw, c.peer)
	joining := err == nil && c.peer == ""
	if !joining {
		n.forgive(from)
	}
	if err != nil {
		raw.Close()
		n.forget(raw)
		n.refuse(ctx, raw.RemoteAddr(), c, err)
		return
	}
	c.probe(raw)
	c.tuned(n, raw)
	if joining {
		expiry := time.AfterFunc(n.cfg.JoinTimeout, func() { raw.Close() })
		c.closed = func() {
			expiry.Stop()
			n.forget(raw)
			n.forgive(from)
		}
	}
	n.deliver(ctx, l, c)
}

// deliver hands a connection to its service.
func (n *Net) deliver(ctx context.Context, l *listener, c *Conn) {
	select {
	case l.conns <- c:
	case <-l.done:
		c.Close()
	case <-ctx.Done():
		c.Close()
		n.log.Warn("peer connection dropped: its service accepts too slowly", "remote", c.RemoteAddr().String(), "peer", c.peer, "service", c.service)
	}
}

// refuse counts and logs a connection that was not let in.
func (n *Net) refuse(ctx context.Context, remote net.Addr, c *Conn, err error) {
	level := slog.LevelInfo
	if errors.Is(err, io.EOF) || ctx.Err() != nil {
		level = slog.LevelDebug // a port scan, a health check, a peer that left
	}
	n.refused.WithLabelValues(reason(c, err)).Inc()
	n.said.Do(func() {
		n.log.Log(ctx, level, "peer connection refused", "remote", remote.String(), "err", err)
	})
}

// reason is why a connection was refused, in a word.
func reason(c *Conn, err error) string {
	switch {
	case c.peer == "":
		return "handshake"
	case errors.Is(err, ErrNoService):
		return "service"
	case c.service == 0:
		return "silent"
	}
	return "denied"
}

// handshake authenticates the peer, reads which service it wants and answers.
func (n *Net) handshake(ctx context.Context, raw net.Conn, c *Conn) (*listener, error) {
	secure := tls.Server(raw, &tls.Config{
		MinVersion: tls.VersionTLS13,
		Time:       n.cfg.Now,
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			return n.serverConfig(hello, c)
		},
	})
	c.Conn = secure
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer stop()
	if err := secure.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	c.protocol = secure.ConnectionState().NegotiatedProtocol
	l, err := n.receive(c)
	if err == nil && !stop() { // the time was up
		err = ctx.Err()
	}
	return l, err
}

// receive reads which service a proven peer wants and answers.
func (n *Net) receive(c *Conn) (*listener, error) {
	if c.protocol == ProtoJoin || c.protocol == ProtoFound {
		n.mu.Lock()
		l := n.join
		if c.protocol == ProtoFound {
			l = n.found
		}
		n.mu.Unlock()
		return l, n.answer(c, l, nil)
	}
	var service [1]byte
	if _, err := io.ReadFull(c.Conn, service[:]); err != nil {
		return nil, fmt.Errorf("node %s named no service: %w", c.peer, err)
	}
	c.service = service[0]
	n.mu.Lock()
	l := n.services[c.service]
	n.mu.Unlock()
	denied := n.meet(c)
	if denied == nil {
		denied = n.cfg.Authorize(c.peer, c.service)
	}
	if err := n.answer(c, l, denied); err != nil {
		return nil, fmt.Errorf("node %s, service %d: %w", c.peer, c.service, err)
	}
	return l, nil
}

// answer tells the peer whether it may go on; the error says why not.
func (n *Net) answer(c *Conn, l *listener, denied error) error {
	status := statusOK
	err := denied
	switch {
	case errors.Is(denied, ErrOtherEpoch):
		status = statusEpoch
	case denied != nil:
		status = statusRefused
	case l == nil || l.isClosed():
		status, err = statusNoService, ErrNoService
	}
	reply := []byte{status}
	if c.protocol == ProtoEpoch {
		reply = append(reply, n.epoch()...)
	}
	if _, werr := c.Conn.Write(reply); werr != nil && err == nil {
		err = werr
	}
	return err
}

// serverConfig answers a hello: a node proves itself, a joiner cannot yet.
func (n *Net) serverConfig(hello *tls.ClientHelloInfo, c *Conn) (*tls.Config, error) {
	cfg := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Time:                   n.cfg.Now,
		SessionTicketsDisabled: true, // each connection proves its peer anew
	}
	switch {
	case n.cfg.Founding != nil && slices.Contains(hello.SupportedProtos, ProtoFound):
		cfg.NextProtos = []string{ProtoFound}
		cfg.Certificates = []tls.Certificate{n.cfg.Founding.Cert}
		cfg.ClientAuth = tls.RequireAnyClientCert
		cfg.VerifyConnection = n.verifyFounding
		return cfg, nil
	case n.cfg.Cert == nil:
		return nil, ErrNoCertificate
	case slices.Contains(hello.SupportedProtos, ProtoNode):
		cfg.NextProtos = n.protocols()
		cfg.ClientAuth = tls.RequireAnyClientCert
		cfg.VerifyConnection = func(cs tls.ConnectionState) (err error) {
			c.site, c.peer, err = n.verify(cs, x509.ExtKeyUsageClientAuth)
			return err
		}
	case slices.Contains(hello.SupportedProtos, ProtoJoin):
		cfg.NextProtos = []string{ProtoJoin}
	default:
		return nil, fmt.Errorf("client speaks neither %s nor %s", ProtoNode, ProtoJoin)
	}
	cfg.Certificates = []tls.Certificate{n.cfg.Cert()}
	return cfg, nil
}

func addressOf(c net.Conn) netip.Addr {
	if ap, err := netip.ParseAddrPort(c.RemoteAddr().String()); err == nil {
		return ap.Addr().Unmap()
	}
	return netip.Addr{}
}
