package peernet

import (
	"cmp"
	"net"
	"time"
)

// BBR is the congestion control for long and lossy paths: it goes by what arrives,
// not by what is lost.
const BBR = "bbr"

const (
	// longPath is the round trip above which a path is long by default.
	longPath = 20 * time.Millisecond
	// lossy is the share of packets sent again from which a path is lossy, once so
	// many of them went.
	lossy        = 0.002
	lossyPackets = 500
	// tuneEvery is how many bytes are written between two looks at the path.
	tuneEvery = 1 << 20
	// someLost are so many packets sent again that it was not one mishap.
	someLost = 3
	// sendRoom is what a connection with BBR may have sent and not heard of, and more. One
	// packet that is lost twice holds up what four round trips carry behind it.
	sendRoom = 16 << 20
)

// probing finds out within some ten seconds that the path of a connection on which
// nothing happens is gone. Else whoever kept it would learn that with the next call.
var probing = net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3}

// unanswered is how long bytes of a service that talks in short messages may stay
// unacknowledged. Some of them write without a deadline, and would into a path that
// is gone for a quarter of an hour. Not for bulk, where a receiver may be slow.
const unanswered = 20 * time.Second

// probe makes a TCP connection notice that its path is gone.
func (c *Conn) probe(raw net.Conn) {
	tcp, ok := raw.(*net.TCPConn)
	if !ok {
		return
	}
	_ = tcp.SetKeepAliveConfig(probing) // one that is closed already needs none
	switch c.service {
	case ServiceRaft, ServiceControl, ServiceGossip:
		setUserTimeout(tcp, unanswered)
	}
}

// Path is what the system knows of a TCP connection's way.
type Path struct {
	Congestion string        // the congestion control, such as cubic or bbr
	RTT        time.Duration // smoothed
	Packets    int64         // of data that were sent, again or for the first time
	Again      int64         // those that were sent again
	MTU        int           // of the path, bytes; 0: unknown
}

// wants says whether the path is one for BBR.
func (p Path) wants(long time.Duration) bool {
	return p.RTT > long || p.Packets >= lossyPackets && float64(p.Again) > lossy*float64(p.Packets)
}

// Path of the connection; false where the system does not say, and over QUIC.
func (c *Conn) Path() (Path, bool) { return pathOf(c.NetConn()) }

// RoundTrip of the path, as smoothed by the system; 0: it does not say.
func (c *Conn) RoundTrip() time.Duration {
	p, _ := c.Path()
	return p.RTT
}

// Thin says that what this end sends goes a long and lossy way without BBR: a second
// connection would carry as much again.
func (c *Conn) Thin() bool {
	var p Path
	if s, ok := c.Conn.(*stream); ok {
		stats := s.session.conn.ConnectionStats()
		p = Path{RTT: stats.SmoothedRTT, Packets: int64(stats.PacketsSent), Again: int64(stats.PacketsLost)}
	} else if p, ok = c.Path(); !ok {
		return false
	}
	return p.thin(c.long)
}

// thin says whether one connection carries little, from a round trip on; 0 is the usual one.
func (p Path) thin(long time.Duration) bool {
	return p.Congestion != BBR && p.RTT > cmp.Or(long, longPath) && p.Again >= someLost && float64(p.Again) > lossy*float64(p.Packets)
}

// tune gives a connection BBR if its path is one for it. It is asked now and then on
// both ends, because it is the sender's choice that counts and the loss shows while
// data flows.
func (n *Net) tune(raw net.Conn) (done bool) {
	if n.cfg.NoBBR {
		return true
	}
	p, ok := pathOf(raw)
	if !ok || p.Congestion == BBR {
		return true
	}
	if !p.wants(n.cfg.LongPath) {
		return false
	}
	if err := setCongestion(raw, BBR); err == nil {
		makeRoom(raw, sendRoom)
	} else {
		n.slow.Do(func() {
			n.log.Info("no BBR on this machine: long or lossy paths between nodes carry less; atoll doctor says what to do", "err", err)
		})
	}
	return true
}
