package peernet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"time"
)

// Two nodes that nobody can dial do not reach each other: neither end could answer a
// call. Each keeps a connection parked at the nodes that both can dial, and one of
// those passes bytes on. The handshake is between the ends, inside of what is passed
// on: the node between sees who talks to whom, and nothing of what.

// The first byte of a connection for ServiceRelay.
const (
	forPassing  byte = 't' // the id of the node to pass it on to follows, its length first; one byte answers
	forArriving byte = 'd' // the caller's handshake follows
)

const (
	passedOn byte = 0
	notHere  byte = 1 // the node keeps no connection parked here, or can be dialled
)

const (
	// asked are so many nodes at most for one Dial, one after the other.
	asked = 3
	// alone is how long nobody is asked again for a node that nobody calls.
	alone = 3 * time.Second
	// relaysAtOnce bounds what one node passes on.
	relaysAtOnce = 256
)

// errNotPassed wraps what pathFailed knows: it says nothing about the peer.
var errNotPassed = fmt.Errorf("and no node that this one reaches passes a connection on to it: %w", io.ErrUnexpectedEOF)

// relay goes through a third node; if known, only when that is how it went last.
func (w *ways) relay(ctx context.Context, known bool) bool {
	if w.relayed {
		return false
	}
	id, through := w.net.between(w.call.addr, known)
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
			w.net.apart(w.call.addr)
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

// between are the node at an address, and nodes that may pass a connection on to it.
func (n *Net) between(addr string, known bool) (id string, through []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for peer, at := range n.back.fellow {
		if at == addr {
			id = peer
		}
	}
	r := n.routes[addr]
	if id == "" || known && (r == nil || r.through == "") || r != nil && time.Now().Before(r.apart) {
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

// apart notes that nobody passes connections on to an address.
func (n *Net) apart(addr string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r := n.route(addr)
	r.through, r.apart = "", time.Now().Add(alone)
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

// through carries out a call of the node id over what the node at via passes on.
// Errors that wrap errNotPassed are not the peer's.
func (n *Net) through(ctx context.Context, via, id string, k call) (*Conn, error) {
	below, err := n.direct(ctx, n.member(via, ServiceRelay))
	if err != nil {
		return nil, fmt.Errorf("%w (%s: %v)", errNotPassed, via, err)
	}
	stop := context.AfterFunc(ctx, func() { below.Close() })
	status := []byte{notHere}
	if _, err = below.Write(append([]byte{forPassing, byte(len(id))}, id...)); err == nil {
		_, err = io.ReadFull(below, status)
	}
	if !stop() {
		err = ctx.Err()
	}
	if err == nil && status[0] != passedOn {
		err = errors.New("the node is not called there")
	}
	if err != nil {
		below.Close()
		return nil, fmt.Errorf("%w (%s: %v)", errNotPassed, via, err)
	}
	c, err := n.upon(ctx, below, k)
	if err == nil && c.peer != id {
		c.Close()
		return nil, fmt.Errorf("%w (%s passes it on to %s)", errNotPassed, via, c.peer)
	}
	return c, err
}

// takeRelay serves one connection for ServiceRelay.
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
	to, err := n.callFor(ctx, c.peer, string(id))
	if err != nil {
		n.log.Debug("a connection was not passed on", "from", c.peer, "to", string(id), "err", err)
		_, _ = c.Write([]byte{notHere})
		return
	}
	defer func() {
		to.Close()
		n.mu.Lock()
		n.back.passing--
		n.mu.Unlock()
	}()
	if _, err := c.Write([]byte{passedOn}); err != nil {
		return
	}
	ended := make(chan struct{}, 2)
	pass := func(to, from *Conn) {
		_, _ = io.Copy(counting{to, n}, from)
		to.Close() // the other direction has nobody to answer any more
		ended <- struct{}{}
	}
	go pass(to, c)
	go pass(c, to)
	<-ended
	<-ended
}

// callFor calls a node that cannot be dialled for the sake of another.
func (n *Net) callFor(ctx context.Context, from, id string) (*Conn, error) {
	n.mu.Lock()
	p := n.back.parked[id]
	full := n.back.passing >= relaysAtOnce
	here := p != nil && id != from && n.back.blind[id] == n.back.fellow[id] && n.back.fellow[id] != ""
	if here && !full {
		n.back.passing++
	}
	n.mu.Unlock()
	switch {
	case !here:
		return nil, errors.New("the node keeps no connection here, or can be dialled")
	case full:
		return nil, fmt.Errorf("%d are passed on already", relaysAtOnce)
	}
	ctx, cancel := context.WithTimeout(ctx, n.cfg.HandshakeTimeout)
	defer cancel()
	to, err := n.callBack(ctx, p, ServiceRelay)
	if err == nil {
		if _, err = to.Write([]byte{forArriving}); err == nil {
			return to, nil
		}
		to.Close()
	}
	n.mu.Lock()
	n.back.passing--
	n.mu.Unlock()
	return nil, err
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
	c := &Conn{closed: func() { n.forget(below) }}
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
		l, err = n.handshake(ctx, below, c)
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
