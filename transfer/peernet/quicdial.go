package peernet

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/quic-go/quic-go"
)

// keptPatience bounds how long a stream of a connection that is there already waits
// for its status, before another connection is tried.
const keptPatience = 3 * time.Second

// overQUIC opens a stream, names the service and awaits the status byte.
func (n *Net) overQUIC(ctx context.Context, k call) (*Conn, error) {
	for {
		c := &Conn{service: k.service, closed: func() {}}
		s, kept, err := n.session(ctx, k, c)
		if err != nil {
			return nil, err
		}
		patience, cancel := ctx, context.CancelFunc(func() {})
		if kept {
			patience, cancel = context.WithTimeout(ctx, keptPatience)
		}
		err = n.openStream(patience, s, c, k.after)
		cancel()
		switch {
		case err == nil:
			return c, nil
		case !pathFailed(err) || ctx.Err() != nil:
			return nil, err
		}
		s.Close() // its path or its peer is gone
		if !kept {
			return nil, err
		}
	}
}

func (n *Net) openStream(ctx context.Context, s *session, c *Conn, after []byte) error {
	s.hold()
	raw, err := s.conn.OpenStreamSync(ctx)
	if err != nil {
		s.release(false, false)
		return refusal(err)
	}
	st := &stream{Stream: raw, session: s}
	c.Conn, c.protocol = st, s.state().NegotiatedProtocol
	stop := context.AfterFunc(ctx, func() {
		st.CancelRead(0)
		st.CancelWrite(0)
	})
	err = n.greet(c, []byte(preface), after)
	if !stop() {
		err = ctx.Err()
	}
	if err != nil {
		st.Close()
		return refusal(err)
	}
	return nil
}

// session finds a connection for the call or makes one.
func (n *Net) session(ctx context.Context, k call, c *Conn) (s *session, kept bool, err error) {
	cfg := k.config(c)
	leaf := ""
	if len(cfg.Certificates) > 0 {
		leaf = string(cfg.Certificates[0].Certificate[0])
	}
	key := sessionKey{k.addr, cmp.Or(k.pool, k.service)}
	n.mu.Lock()
	run := n.served
	if k.kept {
		s = pick(n.sessions[key], leaf, key.service)
	}
	n.mu.Unlock()
	if s != nil {
		if err := cfg.VerifyConnection(s.state()); err == nil {
			return s, true, nil
		}
		s.Close() // what it proved is out of date
	}
	s = &session{net: n, dialled: true, key: key, leaf: leaf, single: !k.kept}
	tr, addr, err := n.socketFor(ctx, run, k.addr)
	if err != nil {
		return nil, false, err
	}
	if run == nil || tr != run.transport {
		s.own = tr
	}
	if s.conn, err = tr.Dial(ctx, addr, cfg, n.quicConfig()); err == nil && !slices.Contains(cfg.NextProtos, s.state().NegotiatedProtocol) {
		err = fmt.Errorf("peer does not speak %s", cfg.NextProtos[0])
		_ = s.conn.CloseWithError(0, "")
	}
	if err != nil {
		if s.own != nil {
			err = errors.Join(err, tr.Close(), tr.Conn.Close())
		}
		return nil, false, err
	}
	context.AfterFunc(s.conn.Context(), func() {
		n.lose(s)
		s.Close()
	})
	if k.kept && s.own == nil {
		n.keep(s, run, c.peer)
	}
	return s, false, nil
}

// pick chooses one of the connections that are there; nil: another is wanted.
func pick(pool []*session, leaf string, service byte) (best *session) {
	alive := 0
	for _, s := range pool {
		if s.alive() && s.leaf == leaf {
			alive++
			if best == nil || s.load() < best.load() {
				best = s
			}
		}
	}
	if service == ServiceBlob && best != nil && best.load() > 0 && alive < bulkSessions {
		return nil
	}
	return best
}

// keep lets further calls take the connection, and the peer open streams over it.
func (n *Net) keep(s *session, run *served, peer string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.served != run || !s.alive() {
		return
	}
	n.sessions[s.key] = append(n.sessions[s.key], s)
	n.conns[s] = peer
	run.streams(s)
}

func (n *Net) lose(s *session) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.conns, s)
	n.sessions[s.key] = slices.DeleteFunc(n.sessions[s.key], func(o *session) bool { return o == s })
	if len(n.sessions[s.key]) == 0 {
		delete(n.sessions, s.key)
	}
}

// socketFor gives the port's own socket, so that one port number is all that a
// firewall or an address translator sees, or one for this connection alone while
// the port is not served.
func (n *Net) socketFor(ctx context.Context, run *served, addr string) (*quic.Transport, *net.UDPAddr, error) {
	host, service, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, nil, err
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil {
		return nil, nil, fmt.Errorf("%s has no port number: %w", addr, err)
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, nil, err
	}
	var tr *quic.Transport
	if run != nil && run.transport != nil {
		tr = run.transport
	} else {
		packets, err := net.ListenUDP("udp", nil)
		if err != nil {
			return nil, nil, err
		}
		tr = &quic.Transport{Conn: packets, ConnectionIDLength: 20}
	}
	ip := ips[0].Unmap()
	if local, ok := tr.Conn.LocalAddr().(*net.UDPAddr); ok && local.AddrPort().Addr().Is4() {
		for _, other := range ips {
			if other.Unmap().Is4() {
				ip = other.Unmap()
				break
			}
		}
	}
	return tr, net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip, uint16(port))), nil
}

// proven looks again at what the peer of a QUIC connection has proved: the
// certificate may be out of date by now, or the authority not trusted any more.
func (n *Net) proven(s *session) (site, peer string, err error) {
	usage := x509.ExtKeyUsageClientAuth
	if s.dialled {
		usage = x509.ExtKeyUsageServerAuth
	}
	return n.verify(s.state(), usage)
}

func readPreface(r io.Reader) error {
	var got [len(preface)]byte
	if _, err := io.ReadFull(r, got[:]); err != nil {
		return err
	}
	if string(got[:]) != preface {
		return errors.New("the stream does not begin as one of this port")
	}
	return nil
}
