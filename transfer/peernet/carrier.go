package peernet

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"
)

// Transport says which carriers connections that are dialled may take.
type Transport string

// The ways to choose: whichever works, TCP first, or one of them alone.
const (
	Auto     Transport = "auto"
	OnlyTCP  Transport = "tcp"
	OnlyQUIC Transport = "quic"
)

// ParseTransport reads auto, tcp or quic; "" is auto.
func ParseTransport(text string) (Transport, error) {
	switch t := Transport(text); t {
	case "":
		return Auto, nil
	case Auto, OnlyTCP, OnlyQUIC:
		return t, nil
	}
	return "", fmt.Errorf("the transport between nodes is auto, tcp or quic, not %q", text)
}

const (
	// head is the start that the first carrier has before the other is tried too.
	head = 400 * time.Millisecond
	// surerHead is that when the other is known to work.
	surerHead = 200 * time.Millisecond
	// detour is how long QUIC goes first once it has worked where TCP has not.
	detour = 3 * time.Minute
	// lastHope bounds how long QUIC is tried when the peer's machine has said that
	// nobody listens: most likely nobody does. despair is how long that is not tried again.
	lastHope = time.Second
	despair  = 30 * time.Second
	// maxRoutes bounds what is remembered.
	maxRoutes = 4096
)

// route is what is known about the way to an address.
type route struct {
	carrier Carrier // that worked last
	since   time.Time
	why     string
	detour  time.Time // QUIC first, until then
	despair time.Time // QUIC does not help against a refusal, until then
	through string    // the node's address through which it is reached; "": another way
	// apart is until when nobody passes a connection on, by the service that would; caps
	// may hold back blobs and nothing else.
	apart map[byte]time.Time
}

// Route says how an address is reached.
type Route struct {
	Addr    string
	Carrier Carrier
	Since   time.Time
	Why     string // it is that carrier
}

// Routes are the addresses that were reached, sorted, with the carrier of the last
// connection to each.
func (n *Net) Routes() []Route {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []Route
	for addr, r := range n.routes {
		if r.carrier != "" {
			out = append(out, Route{addr, r.carrier, r.since, r.why})
		}
	}
	slices.SortFunc(out, func(a, b Route) int { return strings.Compare(a.Addr, b.Addr) })
	return out
}

// route to an address; with n.mu held.
func (n *Net) route(addr string) *route {
	r := n.routes[addr]
	if r == nil {
		if len(n.routes) >= maxRoutes {
			clear(n.routes)
		}
		r = &route{apart: map[byte]time.Time{}}
		n.routes[addr] = r
	}
	return r
}

// arrived notes which carrier has brought a connection, and whether the other failed.
func (n *Net) arrived(addr string, by Carrier, why string, lost bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r := n.route(addr)
	r.through = ""
	if r.carrier != by || r.why != why {
		r.carrier, r.since, r.why = by, time.Now(), why
	}
	switch {
	case by == TCP:
		r.detour = time.Time{}
	case lost:
		r.detour = time.Now().Add(detour)
	}
}

// dial carries out a call within the handshake timeout. A node of the site that
// cannot be dialled is called, if it has parked a connection.
func (n *Net) dial(ctx context.Context, k call) (*Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.HandshakeTimeout)
	defer cancel()
	if k.kept && k.service != ServiceBack && k.service != ServiceRelay && n.cfg.Peers != nil {
		return n.eitherWay(ctx, k)
	}
	return n.direct(ctx, k)
}

// direct dials over the carrier that the configuration says, or over whichever lets
// the call through.
func (n *Net) direct(ctx context.Context, k call) (*Conn, error) {
	only := cmp.Or(Transport(k.by), n.cfg.Transport())
	if only == Auto {
		return n.race(ctx, k)
	}
	carrier := Carrier(only)
	c, err := n.over(ctx, carrier, k)
	if err == nil {
		n.arrived(k.addr, carrier, "configured", false)
	}
	return c, err
}

func (n *Net) over(ctx context.Context, by Carrier, k call) (*Conn, error) {
	if by == QUIC {
		return n.overQUIC(ctx, k)
	}
	return n.overTCP(ctx, k)
}

// attempt is how a carrier did.
type attempt struct {
	by   Carrier
	conn *Conn
	err  error
}

// race gives one carrier a start and takes the first connection. The peer's own no
// is an answer whichever carrier brought it.
func (n *Net) race(ctx context.Context, k call) (*Conn, error) {
	order, start := n.order(ctx, k.addr)
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan attempt, len(order))
	running := 0
	begin := func(by Carrier, limit time.Duration) {
		running++
		go func() {
			ctx, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			c, err := n.over(ctx, by, k)
			done <- attempt{by, c, err}
		}()
	}
	defer func() {
		cancel()
		late := running
		go func() {
			for range late {
				if a := <-done; a.err == nil {
					a.conn.Close()
				}
			}
		}()
	}()
	begin(order[0], n.cfg.HandshakeTimeout)
	second := time.NewTimer(start)
	defer second.Stop()
	failed := map[Carrier]error{}
	for {
		select {
		case <-second.C:
			if len(failed) == 0 {
				begin(order[1], n.cfg.HandshakeTimeout)
			}
		case a := <-done:
			running--
			if a.err == nil {
				n.arrived(k.addr, a.by, because(a.by, failed, order), a.by == QUIC)
				return a.conn, nil
			}
			if !pathFailed(a.err) {
				return nil, a.err
			}
			failed[a.by] = a.err
			switch {
			case len(failed) == len(order):
				return nil, n.unreachable(k.addr, failed)
			case running > 0:
			case ctx.Err() != nil || a.by == TCP && n.hopeless(k.addr):
				return nil, a.err
			case a.by == TCP && refusedByHost(a.err):
				begin(QUIC, lastHope)
			default:
				begin(order[1], n.cfg.HandshakeTimeout)
			}
		}
	}
}

// order is which carrier goes first and how long before the other.
func (n *Net) order(ctx context.Context, addr string) (order [2]Carrier, start time.Duration) {
	order, start = [2]Carrier{TCP, QUIC}, head
	n.mu.Lock()
	r := n.routes[addr]
	switch {
	case r == nil:
	case time.Now().Before(r.detour):
		order = [2]Carrier{QUIC, TCP}
	case !r.detour.IsZero():
		start = surerHead
	}
	n.mu.Unlock()
	return order, soon(ctx, start)
}

// soon is the start of one of two ways: who has little time must have tried both.
func soon(ctx context.Context, start time.Duration) time.Duration {
	if by, ok := ctx.Deadline(); ok {
		start = min(start, time.Until(by)/4)
	}
	return start
}

func because(by Carrier, failed map[Carrier]error, order [2]Carrier) string {
	switch {
	case by == TCP && failed[QUIC] == nil:
		return "preferred"
	case by == TCP:
		return "QUIC does not get through"
	case failed[TCP] != nil:
		return "TCP does not get through: " + failed[TCP].Error()
	case order[0] == QUIC:
		return "TCP did not get through a short while ago"
	}
	return "TCP takes longer"
}

// unreachable notes and says that no carrier gets through.
func (n *Net) unreachable(addr string, failed map[Carrier]error) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if errors.Is(failed[TCP], context.Canceled) {
		return failed[TCP] // the other way was faster
	}
	n.route(addr).despair = time.Now().Add(despair)
	if errors.Is(failed[TCP], context.DeadlineExceeded) || errors.Is(failed[TCP], context.Canceled) {
		return failed[TCP]
	}
	return fmt.Errorf("%w; over QUIC: %v", failed[TCP], failed[QUIC])
}

func (n *Net) hopeless(addr string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	r := n.routes[addr]
	return r != nil && time.Now().Before(r.despair)
}

// refusedByHost says whether the machine answered that nobody listens.
func refusedByHost(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF)
}

// pathFailed says whether a call failed between the ends, so that the other carrier
// may do better, and not by what one of them decided.
func pathFailed(err error) bool {
	for _, decided := range []error{ErrOtherSite, ErrRefused, ErrNoService, ErrOtherEpoch, ErrOtherToken, ErrNoCertificate} {
		if errors.Is(err, decided) {
			return false
		}
	}
	var closed *quic.TransportError
	if errors.As(err, &closed) {
		return !closed.ErrorCode.IsCryptoError()
	}
	var header tls.RecordHeaderError
	var op *net.OpError
	switch {
	case errors.As(err, &op):
		return op.Op != "remote error" && op.Op != "local error"
	case errors.As(err, &header), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return true
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.Canceled):
		return true
	}
	return errors.Is(err, net.ErrClosed) // what quic-go calls a connection that broke
}
