package gossip

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// The first byte of a connection says what it is for.
const (
	forPackets   byte = 1 // frames of packets, from the caller only
	forExchanges byte = 2 // one message there, one back
)

// nowhere is the address that every node claims in gossip. Nodes are known by their
// ids, and where an id lives is what its row says: an address that travels by
// gossip would be one more thing to lie about.
var nowhere = net.IPv4(127, 0, 0, 1).To4()

const nowherePort = 1

var (
	errStopping = errors.New("gossip is stopping")
	errStranger = errors.New("no member of the site as far as this node knows")
)

// from is who sent a packet, for memberlist's log.
type from string

func (from) Network() string  { return "atoll" }
func (f from) String() string { return string(f) }

// transport carries memberlist's packets and exchanges over the peer port. Packets
// may be lost: whoever sends never waits, and what does not fit into a queue is
// dropped and counted. So they can travel as datagrams as well, once there are any.
//
// It is also where a peer's word is judged: see take.
type transport struct {
	g       *Gossip
	packets chan *memberlist.Packet // unbuffered, from pump
	streams chan net.Conn
	queue   chan *memberlist.Packet // of arrived messages
	// dial opens a connection for one exchange with a member; Run sets it.
	dial func(id string, timeout time.Duration) (net.Conn, error)
}

var _ memberlist.NodeAwareTransport = (*transport)(nil)

// FinalAdvertiseAddr implements memberlist.Transport, and so do the methods below.
func (t *transport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return nowhere, nowherePort, nil
}

func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }
func (t *transport) StreamCh() <-chan net.Conn           { return t.streams }
func (t *transport) Shutdown() error                     { return nil } // Run ends what there is to end

func (t *transport) WriteTo(b []byte, addr string) (time.Time, error) {
	return time.Time{}, fmt.Errorf("%s: nodes are known by id", addr)
}

func (t *transport) DialTimeout(addr string, _ time.Duration) (net.Conn, error) {
	return nil, fmt.Errorf("%s: nodes are known by id", addr)
}

// WriteToAddress queues a packet.
func (t *transport) WriteToAddress(b []byte, to memberlist.Address) (time.Time, error) {
	now := time.Now()
	p, err := t.g.asking(b, to.Name, now)
	if err != nil {
		return now, err
	}
	select {
	case p.queue <- b:
	default:
		t.g.metrics.dropped.WithLabelValues("queue").Inc()
	}
	return now, nil
}

// DialAddressTimeout opens a connection for one exchange.
func (t *transport) DialAddressTimeout(to memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return t.dial(to.Name, timeout)
}

// pump hands what arrived to memberlist until done, and then answers the probes
// that are still out, so that memberlist's goroutines end at once and not when
// their time is up.
func (t *transport) pump(done <-chan struct{}) {
	for {
		select {
		case p := <-t.queue:
			select {
			case t.packets <- p:
				continue
			case <-done:
			}
		case <-done:
		}
		break
	}
	patience := time.NewTimer(time.Second)
	defer patience.Stop()
	// The last one is nobody's: when memberlist takes it, it is through with the others.
	for _, seq := range append(t.g.outstanding(), 0) {
		ack := []byte{byte(kindAck), 0x81, 0xa5, 'S', 'e', 'q', 'N', 'o', 0xce}
		p := &memberlist.Packet{Buf: binary.BigEndian.AppendUint32(ack, seq), From: from(t.g.cfg.Self), Timestamp: time.Now()}
		select {
		case t.packets <- p:
		case <-patience.C:
			return
		}
	}
}

// serve takes one accepted connection from its first byte to its end.
func (t *transport) serve(ctx context.Context, c net.Conn) {
	defer c.Close()
	p, ok := t.g.peer(peerOf(c))
	if !ok {
		return
	}
	_ = c.SetDeadline(time.Now().Add(t.g.patience()))
	var first [1]byte
	if _, err := io.ReadFull(c, first[:]); err != nil {
		return
	}
	switch first[0] {
	case forPackets:
		t.receive(p, c)
	case forExchanges:
		if !p.exchanges.Allow() {
			t.g.metrics.dropped.WithLabelValues("rate").Inc()
			return
		}
		ended := make(chan struct{})
		x := &exchange{Conn: c, heard: func() { t.g.heard(p.ID) }, closed: sync.OnceFunc(func() { close(ended) })}
		select {
		case t.streams <- x:
			<-ended // memberlist closes it after its own time at the latest
		case <-ctx.Done():
		}
	}
}

// silence is how long a connection for packets may be silent. Where there are so
// many members that a probe comes less often, it is opened anew.
const silence = 5 * time.Minute

// receive reads packets until the connection ends. What is malformed ends it, what
// is too much or too bold is dropped and counted.
func (t *transport) receive(p *peer, c net.Conn) {
	buf := make([]byte, maxPacket)
	for {
		_ = c.SetDeadline(time.Now().Add(silence))
		packet, err := readFrame(c, buf)
		if err != nil {
			return
		}
		t.g.metrics.received.Add(float64(2 + len(packet)))
		if !p.packets.Allow() {
			t.g.metrics.dropped.WithLabelValues("rate").Inc()
			continue
		}
		if err := t.take(p, packet); err != nil {
			t.g.metrics.dropped.WithLabelValues("connection").Inc()
			return
		}
	}
}

// take judges a packet of a peer's and queues what is left of it, message by
// message. A peer may tell of others, that is what gossip is; but it asks in its
// own name only, answers only what it was asked, and tells of members only.
func (t *transport) take(p *peer, packet []byte) error {
	if _, ok := t.g.peer(p.ID); !ok {
		return errStranger // since it connected
	}
	now := time.Now()
	return readPacket(packet, func(m message, raw []byte) {
		if !t.g.may(p.ID, m) {
			t.g.metrics.dropped.WithLabelValues("refused").Inc()
			return
		}
		if m.kind == kindAck || m.kind == kindNack {
			t.g.heard(p.ID)
		}
		select {
		case t.queue <- &memberlist.Packet{Buf: bytes.Clone(raw), From: from(p.ID), Timestamp: now}:
		default:
			t.g.metrics.dropped.WithLabelValues("queue").Inc()
		}
	})
}

// exchange is a connection for one message each way. memberlist writes each with
// one call; what it reads has been checked as a whole before its first byte.
type exchange struct {
	net.Conn
	heard, closed func()
	in            *bytes.Reader
}

func (x *exchange) Write(b []byte) (int, error) {
	if _, err := x.Conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (x *exchange) Read(b []byte) (int, error) {
	if x.in == nil {
		raw, err := readExchange(x.Conn)
		if err != nil {
			return 0, err
		}
		x.heard()
		x.in = bytes.NewReader(raw)
	}
	return x.in.Read(b)
}

func (x *exchange) Close() error {
	x.closed()
	return x.Conn.Close()
}
