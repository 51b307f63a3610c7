package gossip

import (
	"context"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/time/rate"
)

// What one peer may take of this node. Both are far above what a site of hundreds of
// nodes needs, and far below what would be felt.
const (
	packetsPerSecond = 100
	packetsAtOnce    = 400
	exchangesAtOnce  = 10
	// connections of one peer that are open here at once.
	connections = 6
	// queued packets for one peer: those of a few seconds.
	queued = 64
)

// peer is a member other than this node.
type peer struct {
	Member
	queue     chan []byte // of packets for it
	stop      context.CancelFunc
	packets   *rate.Limiter // of those that it sends
	exchanges *rate.Limiter

	// under Gossip.mu:
	up    bool      // memberlist believes that it lives
	since time.Time // up changed, or this node learned of it
	asked time.Time // a probe is unanswered since; zero: none is
	meta  []byte    // what it says of itself
	in    int       // connections that it has open here
}

func newPeer(m Member, stop context.CancelFunc) *peer {
	return &peer{
		Member: m, queue: make(chan []byte, queued), stop: stop, since: time.Now(),
		packets:   rate.NewLimiter(packetsPerSecond, packetsAtOnce),
		exchanges: rate.NewLimiter(1, exchangesAtOnce),
	}
}

// dial opens a connection and says what it is for. Whoever answers must be the peer.
func (g *Gossip) dial(ctx context.Context, p *peer, purpose byte) (net.Conn, error) {
	c, err := g.cfg.Network.Dial(ctx, p.Addr, Service)
	if err != nil {
		return nil, err
	}
	if peerOf(c) != p.ID {
		c.Close()
		return nil, fmt.Errorf("%s is not node %s but another one", p.Addr, p.ID)
	}
	_ = c.SetWriteDeadline(time.Now().Add(g.patience()))
	if _, err := c.Write([]byte{purpose}); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// exchange opens a connection for one message each way, which ends with ctx.
func (g *Gossip) exchange(ctx context.Context, id string, timeout time.Duration) (net.Conn, error) {
	p, ok := g.peer(id)
	if !ok {
		return nil, fmt.Errorf("node %s: %w", id, errStranger)
	}
	dialling, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	c, err := g.dial(dialling, p, forExchanges)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	return &exchange{Conn: c, heard: func() { g.heard(id) }, closed: func() { stop() }}, nil
}

// line is the kept connection to a peer.
type line struct {
	net.Conn
	opened time.Time
	broken chan struct{} // closed when the peer has ended it
}

// send carries the queued packets of one peer over a connection that it keeps,
// until ctx ends. While the peer cannot be reached they are dropped.
func (g *Gossip) send(ctx context.Context, p *peer) {
	var l *line
	hang := func() {
		if l != nil {
			l.Close()
			<-l.broken
			l = nil
		}
	}
	defer hang()
	var retry time.Time
	pause := g.cfg.Interval
	for {
		var broken <-chan struct{}
		if l != nil {
			broken = l.broken
		}
		select {
		case <-ctx.Done():
			return
		case <-broken:
			hang()
			continue
		case packet := <-p.queue:
			// A peer that is silent on a connection may still answer on a new one:
			// a path that died tells nobody.
			if l != nil && g.silent(p, 2*g.cfg.Interval) && time.Since(l.opened) > 4*g.cfg.Interval {
				hang()
			}
			if l == nil {
				if time.Now().Before(retry) {
					g.metrics.dropped.WithLabelValues("unreachable").Inc()
					continue
				}
				var err error
				if l, err = g.connect(ctx, p); err != nil {
					g.metrics.dropped.WithLabelValues("unreachable").Inc()
					retry, pause = time.Now().Add(pause), min(2*pause, 2*g.cfg.Interval)
					continue
				}
				retry, pause = time.Time{}, g.cfg.Interval
			}
			frame := appendFrame(nil, packet)
			_ = l.SetWriteDeadline(time.Now().Add(g.cfg.Interval))
			if _, err := l.Write(frame); err != nil {
				hang()
				continue
			}
			g.metrics.sent.Add(float64(len(frame)))
		}
	}
}

// connect dials the kept connection.
func (g *Gossip) connect(ctx context.Context, p *peer) (*line, error) {
	ctx, cancel := context.WithTimeout(ctx, g.patience())
	defer cancel()
	c, err := g.dial(ctx, p, forPackets)
	if err != nil {
		return nil, err
	}
	l := &line{Conn: c, opened: time.Now(), broken: make(chan struct{})}
	g.work.Go(func() {
		defer close(l.broken)
		_, _ = io.CopyN(io.Discard, c, 1) // the peer sends nothing here but its end
	})
	return l, nil
}
