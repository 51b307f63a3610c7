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
)

// Serve accepts connections from ln until ctx is done, then closes ln, every
// connection that came through it and every service's listener, and returns nil
// once all its goroutines have ended. A Net is served once.
func (n *Net) Serve(ctx context.Context, ln net.Listener) error {
	if n.cfg.Cert == nil && n.cfg.Founding == nil {
		ln.Close()
		return fmt.Errorf("serving the peer port: %w", ErrNoCertificate)
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer func() {
		stop()
		ln.Close()
		cancel()
		n.shut()
		wg.Wait()
	}()
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
			n.refused.WithLabelValues("crowded").Inc()
			n.said.Do(func() {
				n.log.Warn("peer port has too many strangers, and takes no more for now", "remote", raw.RemoteAddr().String())
			})
			continue
		}
		wg.Go(func() { n.accept(ctx, raw, from) })
	}
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

// Drop closes the accepted connections of a node. Authorize is asked for new
// connections only, so who changes its answer drops those that it let in before.
func (n *Net) Drop(peerID string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for c, peer := range n.conns {
		if peer == peerID && peer != "" {
			c.Close()
		}
	}
}

// forgive takes a connection out of its address's count.
func (n *Net) forgive(from netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.addresses[from]--; n.addresses[from] <= 0 {
		delete(n.addresses, from)
	}
}

func (n *Net) forget(raw net.Conn) {
	n.mu.Lock()
	delete(n.conns, raw)
	n.mu.Unlock()
}

// shut closes all listeners and accepted connections, now and from now on.
func (n *Net) shut() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	for _, l := range n.services {
		l.Close()
	}
	for _, l := range []*listener{n.join, n.found} {
		if l != nil {
			l.Close()
		}
	}
	for c := range n.conns {
		c.Close()
	}
}

// accept takes one connection from its first byte to its service.
func (n *Net) accept(ctx context.Context, raw net.Conn, from netip.Addr) {
	log := n.log.With("remote", raw.RemoteAddr().String())
	ctx, cancel := context.WithTimeout(ctx, n.cfg.HandshakeTimeout)
	defer cancel()
	c := &Conn{}
	c.closed = func() { n.forget(raw) }
	l, err := n.handshake(ctx, raw, c)
	n.known(raw, c.peer)
	joining := err == nil && c.peer == ""
	if !joining {
		n.forgive(from)
	}
	if err != nil {
		raw.Close()
		n.forget(raw)
		level := slog.LevelInfo
		if errors.Is(err, io.EOF) || ctx.Err() != nil {
			level = slog.LevelDebug // a port scan, a health check, a peer that left
		}
		n.refused.WithLabelValues(reason(c, err)).Inc()
		n.said.Do(func() { log.Log(ctx, level, "peer connection refused", "err", err) })
		return
	}
	if joining {
		expiry := time.AfterFunc(n.cfg.JoinTimeout, func() { raw.Close() })
		c.closed = func() {
			expiry.Stop()
			n.forget(raw)
			n.forgive(from)
		}
	}
	select {
	case l.conns <- c:
	case <-l.done:
		c.Close()
	case <-ctx.Done():
		c.Close()
		log.Warn("peer connection dropped: its service accepts too slowly", "peer", c.peer, "service", c.service)
	}
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
	c.Conn = tls.Server(raw, &tls.Config{
		MinVersion: tls.VersionTLS13,
		Time:       n.cfg.Now,
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			return n.serverConfig(hello, c)
		},
	})
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer stop()
	if err := c.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	if protocol := c.ConnectionState().NegotiatedProtocol; protocol == ProtoJoin || protocol == ProtoFound {
		n.mu.Lock()
		l := n.join
		if protocol == ProtoFound {
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
	if !stop() { // the time was up
		return nil, ctx.Err()
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
	if c.ConnectionState().NegotiatedProtocol == ProtoEpoch {
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
