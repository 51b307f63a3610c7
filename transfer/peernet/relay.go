package peernet

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// Two nodes that nobody can dial do not reach each other: neither end could answer a
// call. Each keeps a connection parked at the nodes that both can dial, and one of
// those passes bytes on. The handshake is between the ends, inside of what is passed
// on: the node between sees who talks to whom, of blobs what they are wanted for, and
// nothing else.

// Blobs go over ServicePassing, where each part of what the ends write says what it is
// for, so that the node between keeps to its caps on traffic. All else goes over
// ServiceRelay, and nothing holds it back.

// The first byte of a connection for either.
const (
	forPassing  byte = 't' // the id of the node to pass it on to follows, its length first; one byte answers
	forArriving byte = 'd' // the caller's handshake follows
)

const (
	passedOn byte = 0
	notHere  byte = 1 // the node keeps no connection parked here, or can be dialled
	// unmarked: the node is of a version that knows no ServicePassing. What is for it has to
	// go over ServiceRelay.
	unmarked byte = 2
)

const (
	// asked are so many nodes at most for one Dial, one after the other.
	asked = 3
	// alone is how long nobody is asked again for a node that nobody calls.
	alone = 3 * time.Second
	// relaysAtOnce bounds what one node passes on, blobsAtOnce the blobs among it: those that a
	// cap slows down must leave places for the rest.
	relaysAtOnce, blobsAtOnce = 256, 192
	// heldMost is Passing.Patience where it is not said. A new connection is given up after
	// heldFirst, when other nodes can still be asked.
	heldMost, heldFirst = 10 * time.Second, time.Second
	// takenWithin is how long an end may take nothing of what is passed on to it, blobs and all
	// else: as long as it may of a blob that is sent to it, and longer where a client that
	// pauses may be behind it. Who is stuck takes a place and memory from others.
	takenWithin, restTakenWithin = 30 * time.Second, 2 * time.Minute
)

// Passing bounds and counts the blobs that a node passes on. What it knows of them is the
// node at either end and the class.
type Passing struct {
	In, Out transfer.Limiter // of what comes from one node, and goes to the other; nil: no limit
	Meter   transfer.Meter   // may be nil
	// Patience is how long limits may let nothing through in one direction before a connection
	// is given up: its ends may do better through another node. 10 s.
	Patience time.Duration
}

// Bound has the node keep to limits in what it passes on from now on.
func (n *Net) Bound(p Passing) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p.Patience = cmp.Or(p.Patience, heldMost)
	n.passing = p
}

func (n *Net) bounds() Passing {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.passing
}

// relayOf is the service that takes another one's connections through a third node.
func relayOf(service byte) byte {
	if service == ServiceBlob || service == ServiceSwarm {
		return ServicePassing
	}
	return ServiceRelay
}

// errNotPassed wraps what pathFailed knows: it says nothing about the peer.
var errNotPassed = fmt.Errorf("and no node that this one reaches passes a connection on to it: %w", io.ErrUnexpectedEOF)

// relay goes through a third node; if known, only when that is how it went last.
func (w *ways) relay(ctx context.Context, known bool) bool {
	if w.relayed {
		return false
	}
	id, through := w.net.between(w.call, known)
	if len(through) == 0 {
		return false
	}
	w.relayed = true
	w.running++
	go func() {
		r := way{via: through[0], err: errNotPassed}
		for i := range through {
			r.via = through[i]
			r.conn, r.err = w.tryThrough(ctx, r.via, id, i == len(through)-1)
			if !errors.Is(r.err, errNotPassed) {
				break
			}
		}
		if errors.Is(r.err, errNotPassed) && ctx.Err() == nil {
			w.net.apart(w.call)
		}
		w.done <- r
	}()
	return true
}

// tryThrough goes through one of several nodes. One that is gone must not take the time
// that the others need.
func (w *ways) tryThrough(ctx context.Context, via, id string, last bool) (*Conn, error) {
	if last {
		return w.net.through(ctx, via, id, w.call)
	}
	try, cancel := context.WithTimeout(ctx, trial)
	defer cancel()
	c, err := w.net.through(try, via, id, w.call)
	if err != nil && try.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w (%s: %v)", errNotPassed, via, err)
	}
	return c, err
}

// between are the node that is called, and nodes that may pass the connection on to it.
func (n *Net) between(k call, known bool) (id string, through []string) {
	addr := k.addr
	n.mu.Lock()
	defer n.mu.Unlock()
	for peer, at := range n.back.fellow {
		if at == addr {
			id = peer
		}
	}
	r := n.routes[addr]
	if id == "" || known && (r == nil || r.through == "") || r != nil && time.Now().Before(r.apart[relayOf(k.service)]) {
		return id, nil
	}
	for at := range n.back.away {
		if at != addr {
			through = append(through, at)
		}
	}
	rand.Shuffle(len(through), func(i, j int) { through[i], through[j] = through[j], through[i] })
	if r != nil {
		if i := slices.Index(through, r.through); i > 0 {
			through[0], through[i] = through[i], through[0]
		}
	}
	return id, through[:min(asked, len(through))]
}

// apart notes that nobody passes such a connection on.
func (n *Net) apart(k call) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r := n.route(k.addr)
	r.apart[relayOf(k.service)] = time.Now().Add(alone)
	if relayOf(k.service) == ServiceRelay {
		r.through = ""
	}
}

// passed notes through which node a connection came; with n.mu held.
func (n *Net) passed(addr string, by way) {
	r := n.route(addr)
	why := "neither of the nodes can dial the other, " + by.via + " passes it on"
	if r.why != why {
		r.carrier, r.since, r.why = by.conn.Carrier(), time.Now(), why
	}
	r.through = by.via
}

// Through is the address of the node through which the one at an address was reached
// last; "" when it is reached without one.
func (n *Net) Through(addr string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if r := n.routes[addr]; r != nil {
		return r.through
	}
	return ""
}

// errUnmarked: one of the nodes is of a version that knows no ServicePassing.
var errUnmarked = errors.New("blobs cannot say there what they are for")

// through carries out a call of the node id over what the node at via passes on.
// Errors that wrap errNotPassed are not the peer's.
func (n *Net) through(ctx context.Context, via, id string, k call) (*Conn, error) {
	below, err := n.askFor(ctx, via, id, relayOf(k.service))
	if errors.Is(err, errUnmarked) {
		below, err = n.askFor(ctx, via, id, ServiceRelay)
	}
	if err != nil {
		return nil, fmt.Errorf("%w (%s: %v)", errNotPassed, via, err)
	}
	raw, m := mark(below)
	c, err := n.upon(ctx, raw, k)
	if err == nil {
		c.marked, c.via = m, below.peer
	}
	if err == nil && c.peer != id {
		c.Close()
		return nil, fmt.Errorf("%w (%s passes it on to %s)", errNotPassed, via, c.peer)
	}
	return c, err
}

// askFor has the node at via pass a connection on to the node id.
func (n *Net) askFor(ctx context.Context, via, id string, service byte) (*Conn, error) {
	below, err := n.direct(ctx, n.member(via, service))
	if service == ServicePassing && errors.Is(err, ErrNoService) {
		return nil, errUnmarked
	}
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { below.Close() })
	status := []byte{notHere}
	if _, err = below.Write(append([]byte{forPassing, byte(len(id))}, id...)); err == nil {
		_, err = io.ReadFull(below, status)
	}
	switch {
	case !stop():
		err = ctx.Err()
	case err != nil:
	case status[0] == unmarked && service == ServicePassing:
		err = errUnmarked
	case status[0] != passedOn:
		err = errors.New("the node is not called there")
	}
	if err != nil {
		below.Close()
		return nil, err
	}
	return below, nil
}

// takeRelay serves one connection for ServiceRelay or ServicePassing.
func (n *Net) takeRelay(ctx context.Context, c *Conn) {
	_ = c.SetReadDeadline(time.Now().Add(firstWord))
	var first [1]byte
	_, err := io.ReadFull(c, first[:])
	switch {
	case err == nil && first[0] == forPassing:
		n.passOn(ctx, c)
	case err == nil && first[0] == forArriving:
		n.arrive(ctx, c)
	default:
		c.Close()
	}
}

// passOn calls the node that is asked for, and passes bytes on until either end closes.
func (n *Net) passOn(ctx context.Context, c *Conn) {
	defer c.Close()
	length := make([]byte, 1)
	if _, err := io.ReadFull(c, length); err != nil {
		return
	}
	id := make([]byte, length[0])
	if _, err := io.ReadFull(c, id); err != nil || c.SetReadDeadline(time.Time{}) != nil {
		return
	}
	to, err := n.callFor(ctx, c, string(id))
	if err != nil {
		n.log.Debug("a connection was not passed on", "from", c.peer, "to", string(id), "err", err)
		status := notHere
		if c.service == ServicePassing && errors.Is(err, ErrNoService) {
			status = unmarked
		}
		_, _ = bounded{c, firstWord}.Write([]byte{status})
		return
	}
	defer func() {
		to.Close()
		n.mu.Lock()
		n.back.passing--
		n.mu.Unlock()
	}()
	if _, err := (bounded{c, firstWord}).Write([]byte{passedOn}); err != nil {
		return
	}
	switch err := n.passBoth(ctx, c, to); {
	case errors.Is(err, errHeld):
		n.log.Info("a connection is not passed on any more: caps on traffic let nothing through", "from", c.peer, "to", to.peer)
	case errors.Is(err, os.ErrDeadlineExceeded):
		n.log.Info("a connection is not passed on any more: one of its ends takes nothing", "from", c.peer, "to", to.peer)
	}
}

// passBoth passes bytes on in both directions, neither of which waits for the other, until
// one of them ends, or ctx does. Both connections are closed then.
func (n *Net) passBoth(ctx context.Context, a, b *Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	closed := make(chan struct{}, 2)
	for _, c := range []*Conn{a, b} { // one that is stuck may take seconds to close
		context.AfterFunc(ctx, func() {
			c.Close()
			closed <- struct{}{}
		})
	}
	ended := make(chan error, 2)
	pass := func(to, from *Conn) {
		var err error
		if from.service == ServicePassing {
			err = n.passMarked(ctx, to, from)
		} else {
			_, err = io.Copy(counting{bounded{to, restTakenWithin}, n}, from)
		}
		cancel() // the other direction has nobody to answer any more
		ended <- err
	}
	go pass(b, a)
	go pass(a, b)
	err := errors.Join(<-ended, <-ended)
	<-closed
	<-closed
	return err
}

// callFor calls a node that cannot be dialled for the sake of another.
func (n *Net) callFor(ctx context.Context, c *Conn, id string) (*Conn, error) {
	from, most := c.peer, relaysAtOnce
	if c.service == ServicePassing {
		most = blobsAtOnce
	}
	n.mu.Lock()
	p := n.back.parked[id]
	full := n.back.passing >= most
	here := p != nil && id != from && n.back.blind[id] == n.back.fellow[id] && n.back.fellow[id] != ""
	if here && !full {
		n.back.passing++
	}
	n.mu.Unlock()
	switch {
	case !here:
		return nil, errors.New("the node keeps no connection here, or can be dialled")
	case full:
		return nil, fmt.Errorf("%d are passed on already", most)
	}
	ctx, cancel := context.WithTimeout(ctx, n.cfg.HandshakeTimeout)
	defer cancel()
	var to *Conn
	var err error
	if c.service == ServicePassing {
		err = n.mayPass(ctx, part{from, id, transfer.Pull, 1}, n.bounds(), heldFirst)
	}
	if err == nil {
		to, err = n.callBack(ctx, p, c.service)
	}
	if err == nil {
		if _, err = (bounded{to, firstWord}).Write([]byte{forArriving}); err == nil {
			return to, nil
		}
		to.Close()
	}
	n.mu.Lock()
	n.back.passing--
	n.mu.Unlock()
	return nil, err
}

// bounded has an end take each write within a time.
type bounded struct {
	net.Conn
	within time.Duration
}

func (b bounded) Write(p []byte) (int, error) {
	if err := b.SetWriteDeadline(time.Now().Add(b.within)); err != nil {
		return 0, err
	}
	return b.Conn.Write(p)
}

// counting counts what is passed on.
type counting struct {
	io.Writer
	net *Net
}

func (w counting) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	w.net.relayed.Add(float64(n))
	return n, err
}

// arrive takes what another node passes on as if its caller had dialled.
func (n *Net) arrive(ctx context.Context, below *Conn) {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.HandshakeTimeout)
	defer cancel()
	raw, m := mark(below)
	c := &Conn{closed: func() { n.forget(below) }, marked: m, via: below.peer}
	n.mu.Lock()
	closed := n.closed
	if !closed {
		n.conns[below] = ""
	}
	n.mu.Unlock()
	if closed {
		below.Close()
		return
	}
	err := below.SetReadDeadline(time.Time{})
	var l *listener
	if err == nil {
		l, err = n.handshake(ctx, raw, c)
	}
	if err == nil && c.peer == "" {
		err = errors.New("who joins or founds is not passed on")
	}
	if err != nil {
		below.Close()
		n.forget(below)
		n.refuse(ctx, below.RemoteAddr(), c, err)
		return
	}
	n.mu.Lock()
	n.conns[below] = c.peer
	n.mu.Unlock()
	n.deliver(ctx, l, c)
}

// marked is the end of a connection for ServicePassing: what is written goes in parts, each
// with its class (1 byte) and its length (2).
type marked struct {
	net.Conn
	class atomic.Uint32
	in    *bufio.Reader
	left  int    // of the part that is being read
	out   []byte // the writer's
}

const (
	partHead = 3
	maxPart  = 17 << 10 // more than a record of TLS has
)

var errPart = errors.New("a part of what is passed on is malformed")

// mark puts the marks on a connection for ServicePassing, nil and the connection itself for
// another.
func mark(below *Conn) (net.Conn, *marked) {
	if below.service != ServicePassing {
		return below, nil
	}
	m := &marked{Conn: below, in: bufio.NewReader(below)}
	return m, m
}

// NetConn is the connection to the node between.
func (m *marked) NetConn() net.Conn { return m.Conn }

// Read reads what the other end has written.
func (m *marked) Read(p []byte) (int, error) {
	if m.left == 0 {
		var head [partHead]byte
		if _, err := io.ReadFull(m.in, head[:]); err != nil {
			return 0, err
		}
		var err error
		if m.left, err = partLength(head[:]); err != nil {
			return 0, err
		}
	}
	n, err := m.in.Read(p[:min(len(p), m.left)])
	m.left -= n
	return n, err
}

func partLength(head []byte) (int, error) {
	n := int(binary.BigEndian.Uint16(head[1:]))
	if n == 0 || n > maxPart {
		return 0, fmt.Errorf("%w: it has %d bytes", errPart, n)
	}
	return n, nil
}

// Write is not called by two at once: TLS is above it.
func (m *marked) Write(p []byte) (written int, err error) {
	for len(p) > 0 {
		n := min(len(p), maxPart)
		m.out = append(m.out[:0], byte(m.class.Load()))
		m.out = binary.BigEndian.AppendUint16(m.out, uint16(n))
		m.out = append(m.out, p[:n]...)
		if _, err := m.Conn.Write(m.out); err != nil {
			return written, err
		}
		written += n
		p = p[n:]
	}
	return written, nil
}

// passMarked passes parts on until an end closes, as fast as the limits let them through.
// Who is not read sends no more.
func (n *Net) passMarked(ctx context.Context, to, from *Conn) error {
	in, out := bufio.NewReader(from), bounded{to, takenWithin}
	buf := make([]byte, partHead+maxPart)
	for {
		if _, err := io.ReadFull(in, buf[:partHead]); err != nil {
			return err
		}
		size, err := partLength(buf)
		if err != nil {
			return err
		}
		whole := buf[:partHead+size]
		if _, err := io.ReadFull(in, whole[partHead:]); err != nil {
			return err
		}
		bounds := n.bounds()
		p := part{from.peer, to.peer, min(transfer.Class(buf[0]), transfer.Prefetch), len(whole)}
		if err := n.mayPass(ctx, p, bounds, bounds.Patience); err != nil {
			return err
		}
		if _, err := out.Write(whole); err != nil {
			return err
		}
		n.relayed.Add(float64(len(whole)))
		if bounds.Meter != nil {
			bounds.Meter.Received(p.flow(p.from), p.bytes)
			bounds.Meter.Sent(p.flow(p.to), p.bytes)
		}
	}
}

// errHeld: limits have let nothing through for too long.
var errHeld = errors.New("the limits of the node between let nothing through")

// part is some bytes that are to be passed on.
type part struct {
	from, to string // node ids
	class    transfer.Class
	bytes    int
}

// flow is what moves from or to one of the ends.
func (p part) flow(peer string) transfer.Flow {
	return transfer.Flow{Peer: peer, Class: p.class, Way: transfer.ByRelay}
}

// mayPass waits until a part may be taken in and sent on, so long at most.
func (n *Net) mayPass(ctx context.Context, p part, bounds Passing, most time.Duration) error {
	late := time.NewTimer(most)
	defer late.Stop()
	for _, one := range []struct {
		limiter transfer.Limiter
		peer    string
	}{{bounds.In, p.from}, {bounds.Out, p.to}} {
		for one.limiter != nil {
			wait := one.limiter.Take(p.flow(one.peer), p.bytes)
			if wait <= 0 {
				break
			}
			again := time.NewTimer(wait)
			select {
			case <-again.C:
			case <-late.C:
				again.Stop()
				return errHeld
			case <-ctx.Done():
				again.Stop()
				return ctx.Err()
			}
		}
	}
	return nil
}
