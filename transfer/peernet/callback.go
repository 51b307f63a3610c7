package peernet

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// A node that nobody can dial, because of a firewall or an address translator, parks
// a connection at each node that it can dial. Whoever wants to dial it sends a call
// over that, and it dials back with the call's nonce; from there on all is as on a
// connection that the caller had dialled.

// The first byte of a connection for ServiceBack. One that ends without it was
// dialled to find out whether that works.
const (
	forParking   byte = 'p' // calls travel to the end that dialled
	forAnswering byte = 'c' // the nonce of a call follows
)

const (
	nonceSize = 16
	// callSize: the service that is wanted, and a nonce. Service 0 says that there is
	// no need to stay: the node can be dialled.
	callSize = 1 + nonceSize
	// callsAtOnce over one parked connection.
	callsAtOnce = 32
	// firstWord bounds how long a connection for ServiceBack may say nothing.
	firstWord = 5 * time.Second
	// trial bounds the try to dial a node that has parked a connection, again how
	// long it counts that this failed.
	trial = 3 * time.Second
	again = 3 * time.Minute
	// fewNodes keep connections parked at each other whether they need them or not: a
	// firewall that comes is noticed by the first Dial. Of more, one that could be dialled
	// asks again after resting, or when the last connection of that peer ends.
	fewNodes = 32
	resting  = 5 * time.Minute
	// shunned is the longest pause at a peer that does not let this node dial it either.
	shunned = time.Minute
	// parkPause is the first pause before a lost connection is parked anew, parkPauses
	// the longest: as often as gossip asks who is down.
	parkPause, parkPauses = 250 * time.Millisecond, 3 * time.Second
	// sumSize bytes tell two lists of members apart; of a list that travels so many are
	// taken, in so many bytes at most.
	sumSize           = 8
	maxTold, maxBytes = 1024, 256 << 10
	// lookAround is how often the members are looked up.
	lookAround = 2 * time.Second
)

// runner runs something until the port is not served any more, which ends its context.
type runner func(func(ctx context.Context))

// Peer is a node of the site, and where it says that it can be dialled.
type Peer struct {
	ID   string `json:"id"` // "": whoever answers there
	Addr string `json:"addr"`
}

type nonce [nonceSize]byte

// callbacks is what a Net knows of connections that are parked, under Net.mu.
type callbacks struct {
	parked  map[string]*parked       // at this node, by peer
	news    chan struct{}            // closed when another is parked
	calls   map[nonce]*answering     // that wait for their connection
	fellow  map[string]string        // members and their addresses
	blind   map[string]string        // those that could not be dialled, and where that was
	told    map[string][]Peer        // members that a peer knows, where they are not those known here
	wakes   map[string]chan struct{} // of those who park, by peer
	away    map[string]bool          // addresses at which this node has parked
	few     int                      // see fewNodes
	served  map[io.Closer]string     // connections dialled for a peer's sake: the peer
	passing int                      // connections that are passed on
}

func newCallbacks() callbacks {
	return callbacks{
		few:    fewNodes,
		parked: make(map[string]*parked), news: make(chan struct{}), calls: make(map[nonce]*answering),
		fellow: make(map[string]string), blind: make(map[string]string), told: make(map[string][]Peer), wakes: make(map[string]chan struct{}), away: make(map[string]bool), served: make(map[io.Closer]string),
	}
}

// parked is a connection over which its peer can be called.
type parked struct {
	conn    *Conn
	done    chan struct{} // closed when it has ended
	places  chan struct{} // of calls that are out
	writing sync.Mutex
	tried   string // the address at which the peer was dialled last; under Net.mu
}

// answering is a call that waits for its connection.
type answering struct {
	peer string
	conn chan *Conn // takes one
}

// CalledBack says that the node at an address cannot be dialled from here, and is
// called over a connection of its own.
func (n *Net) CalledBack(addr string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	p := n.back.at(addr)
	return p != nil && n.back.blind[p.conn.peer] == addr
}

// Parked says that a connection of this node is parked at the node at an address,
// which can call it over that.
func (n *Net) Parked(addr string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.back.away[addr]
}

// at finds what the node at an address has parked; nil: nothing.
func (b *callbacks) at(addr string) *parked {
	for id, p := range b.parked {
		if b.fellow[id] == addr {
			return p
		}
	}
	return nil
}

// callable finds what the node at an address has parked, and what tells when that changes.
func (n *Net) callable(addr string) (p *parked, blind bool, news <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p = n.back.at(addr)
	return p, p != nil && n.back.blind[p.conn.peer] == addr, n.back.news
}

// eitherWay dials a node, or has it dial when that does not get through, or goes
// through a third. What is known to work goes first.
func (n *Net) eitherWay(ctx context.Context, k call) (*Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	w := &ways{net: n, call: k, done: make(chan way, 5)}
	defer w.leave(cancel)
	_, blind, _ := n.callable(k.addr)
	if (!blind || !w.callBack(ctx)) && !w.relay(ctx, true) {
		w.dial(ctx)
	}
	other := time.NewTimer(soon(ctx, head))
	defer other.Stop()
	for {
		select {
		case <-other.C:
			w.dial(ctx)
			w.callBack(ctx)
			w.relay(ctx, false)
		case <-w.news:
			w.callBack(ctx)
		case r := <-w.done:
			w.running--
			switch {
			case r.err == nil:
				n.came(k.addr, r)
				return r.conn, nil
			case !pathFailed(r.err) && (r.over != nil || r.via != "" || !errors.Is(r.err, ErrOtherSite)):
				return nil, r.err // the peer's own answer
			case r.via != "":
				w.alone = r.err
			case r.over == nil:
				w.failed = r.err
			}
			w.dial(ctx)
			w.callBack(ctx)
			w.relay(ctx, false)
			if w.running == 0 && w.alone != nil {
				return nil, fmt.Errorf("%w; %w", w.failed, w.alone)
			} else if w.running == 0 {
				return nil, w.failed
			}
		}
	}
}

// ways are the attempts of one Dial.
type ways struct {
	net     *Net
	call    call
	done    chan way
	running int
	dialled bool
	failed  error // of dialling
	alone   error // of going through a third node
	relayed bool
	over    *parked         // that was called over last
	calls   int             // so far
	news    <-chan struct{} // something may have been parked since
}

// way is how an attempt ended.
type way struct {
	over *parked // called over that
	via  string  // through the node at that address; neither: dialled
	conn *Conn
	err  error
}

func (w *ways) dial(ctx context.Context) {
	if w.dialled {
		return
	}
	w.dialled = true
	w.running++
	go func() {
		c, err := w.net.direct(ctx, w.call)
		w.done <- way{conn: c, err: err}
	}()
}

// callBack calls over what is parked, if that is another than before.
func (w *ways) callBack(ctx context.Context) bool {
	p, _, news := w.net.callable(w.call.addr)
	w.news = news
	if w.calls == 3 || p == w.over || p == nil {
		return false
	}
	w.over = p
	w.calls++
	w.running++
	go func() {
		c, err := w.net.callBack(ctx, p, w.call.service)
		w.done <- way{over: p, conn: c, err: err}
	}()
	return true
}

// leave closes what comes too late.
func (w *ways) leave(cancel context.CancelFunc) {
	cancel()
	late := w.running
	go func() {
		for range late {
			if r := <-w.done; r.err == nil {
				r.conn.Close()
			}
		}
	}()
}

// came notes which way a connection came.
func (n *Net) came(addr string, r way) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if r.via != "" {
		n.passed(addr, r)
	}
	if r.over == nil {
		return // see arrived
	}
	if id := r.over.conn.peer; n.back.parked[id] == r.over {
		n.back.blind[id] = addr // dialling has failed or takes longer
	}
	const why = "the node cannot be dialled, it dials back when it is called"
	if known := n.route(addr); known.carrier != r.conn.Carrier() || known.why != why {
		known.carrier, known.since, known.why = r.conn.Carrier(), time.Now(), why
	}
}

var errUnparked = fmt.Errorf("the node's parked connection ended: %w", io.ErrUnexpectedEOF)

// callBack has the peer of a parked connection dial, and takes what it dials as a
// connection of this node's for the service.
func (n *Net) callBack(ctx context.Context, p *parked, service byte) (*Conn, error) {
	select {
	case p.places <- struct{}{}:
		defer func() { <-p.places }()
	case <-p.done:
		return nil, errUnparked
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	var key nonce
	_, _ = rand.Read(key[:]) // never fails
	a := &answering{peer: p.conn.peer, conn: make(chan *Conn, 1)}
	n.mu.Lock()
	n.back.calls[key] = a
	n.mu.Unlock()
	defer n.giveUp(key, a)
	if err := p.say(service, key); err != nil {
		return nil, errUnparked
	}
	var c *Conn
	select {
	case c = <-a.conn:
	case <-p.done:
		return nil, errUnparked
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err := n.takeOver(ctx, c, service); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// takeOver makes the connection that answers a call one that this node dialled.
func (n *Net) takeOver(ctx context.Context, c *Conn, service byte) error {
	if _, _, err := n.verify(c.state(), x509.ExtKeyUsageServerAuth); err != nil {
		return err
	}
	c.service = service
	stop := context.AfterFunc(ctx, func() { c.Conn.Close() })
	err := n.greet(c, nil, nil)
	if !stop() {
		return ctx.Err()
	}
	c.probe(c.NetConn())
	if s, ok := c.Conn.(*stream); ok {
		s.consensus = service == ServiceRaft
	}
	return err
}

// giveUp forgets a call; a connection that came for it too late is closed.
func (n *Net) giveUp(key nonce, a *answering) {
	n.mu.Lock()
	_, waits := n.back.calls[key]
	delete(n.back.calls, key)
	n.mu.Unlock()
	if !waits { // somebody took it, and hands over the connection just now or has
		select {
		case c := <-a.conn:
			c.Close()
		default:
		}
	}
}

// say sends a call.
func (p *parked) say(service byte, key nonce) error {
	p.writing.Lock()
	defer p.writing.Unlock()
	_ = p.conn.SetWriteDeadline(time.Now().Add(firstWord))
	_, err := p.conn.Write(append([]byte{service}, key[:]...))
	if err != nil {
		p.conn.Close() // half a call may have gone out
	}
	return err
}

// serveBack takes connections until the listener is closed.
func (n *Net) serveBack(ln net.Listener, take func(context.Context, *Conn), run runner) {
	for {
		accepted, err := ln.Accept()
		if err != nil {
			return
		}
		if c, ok := accepted.(*Conn); ok {
			run(func(ctx context.Context) { take(ctx, c) })
		}
	}
}

func (n *Net) takeBack(ctx context.Context, c *Conn) {
	_ = c.SetReadDeadline(time.Now().Add(firstWord))
	var key nonce
	_, err := io.ReadFull(c, key[:1])
	switch {
	case err == nil && key[0] == forParking:
		var sum [sumSize]byte
		if _, err = io.ReadFull(c, sum[:]); err == nil && n.tell(c, sum) == nil {
			n.holdParked(ctx, c)
		}
	case err == nil && key[0] == forAnswering:
		if _, err = io.ReadFull(c, key[:]); err == nil && n.answered(c, key) {
			return
		}
	}
	c.Close()
}

// answered gives a connection to whoever waits for it.
func (n *Net) answered(c *Conn, key nonce) bool {
	if c.SetReadDeadline(time.Time{}) != nil {
		return false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	a := n.back.calls[key]
	if a == nil || a.peer != c.peer {
		return false
	}
	delete(n.back.calls, key)
	a.conn <- c
	return true
}

// holdParked keeps what a peer has parked until it ends, another takes its place, or
// the peer can be dialled.
func (n *Net) holdParked(ctx context.Context, c *Conn) {
	if c.SetReadDeadline(time.Time{}) != nil {
		return
	}
	p := &parked{conn: c, done: make(chan struct{}), places: make(chan struct{}, callsAtOnce)}
	n.mu.Lock()
	old := n.back.parked[c.peer]
	n.back.parked[c.peer] = p
	close(n.back.news)
	n.back.news = make(chan struct{})
	n.mu.Unlock()
	if old != nil {
		old.conn.Close()
	}
	go func() {
		_, _ = io.CopyN(io.Discard, c, 1) // the peer says nothing here but that it ends
		n.unpark(p)
		close(p.done)
		c.Close()
	}()
	for n.mustStay(ctx, p) {
		next := time.NewTimer(again)
		select {
		case <-next.C:
		case <-p.done:
		case <-ctx.Done():
		}
		next.Stop()
	}
	c.Close()
	<-p.done
}

// unpark forgets a parked connection. It had shown that this node can be dialled.
func (n *Net) unpark(p *parked) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.back.parked[p.conn.peer] == p {
		delete(n.back.parked, p.conn.peer)
		n.wakeFor(p.conn.peer)
	}
}

// mustStay finds out whether the peer of a parked connection can be dialled. If it can,
// and there are many nodes, it hears that it is not needed.
func (n *Net) mustStay(ctx context.Context, p *parked) bool {
	n.mu.Lock()
	addr, member := n.back.fellow[p.conn.peer]
	few := len(n.back.fellow) <= n.back.few
	known := p.tried == addr && n.back.blind[p.conn.peer] != addr
	p.tried = addr
	n.mu.Unlock()
	select {
	case <-p.done:
		return false
	case <-ctx.Done():
		return false
	default:
	}
	if !member || known {
		return member && few
	}
	trying, cancel := context.WithTimeout(ctx, trial)
	defer cancel()
	c, err := n.direct(trying, n.member(addr, ServiceBack))
	if err == nil {
		c.Close()
		if c.peer != p.conn.peer {
			err = fmt.Errorf("%s is node %s", addr, c.peer)
		}
	}
	n.mu.Lock()
	first := n.back.blind[p.conn.peer] != addr
	// A new node refuses others until it has read their rows, but it answers.
	if errors.Is(err, ErrRefused) || errors.Is(err, ErrNoService) {
		p.tried = ""
		n.mu.Unlock()
		return true
	}
	if err != nil && ctx.Err() == nil {
		n.back.blind[p.conn.peer] = addr
	} else {
		delete(n.back.blind, p.conn.peer)
	}
	n.mu.Unlock()
	if err == nil && few {
		return true
	}
	if err == nil {
		if p.say(0, nonce{}) == nil {
			leaving := time.NewTimer(firstWord)
			defer leaving.Stop()
			select {
			case <-p.done:
			case <-leaving.C:
			case <-ctx.Done():
			}
		}
		return false
	}
	if first && ctx.Err() == nil {
		n.log.Info("a node cannot be dialled: it is called over a connection of its own", "node", p.conn.peer, "address", addr, "err", err)
	}
	return true
}

// serveFor keeps a dialled connection that serves its peer, so that Drop and the end
// find it.
func (n *Net) serveFor(c *Conn) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return false
	}
	raw := c.Conn
	n.back.served[raw] = c.peer
	c.closed = func() {
		n.mu.Lock()
		delete(n.back.served, raw)
		n.mu.Unlock()
	}
	return true
}

// wakeFor makes this node find out whether a peer can dial it, when none of the
// peer's connections is left; with n.mu held.
func (n *Net) wakeFor(peer string) {
	if peer == "" {
		return
	}
	for c, id := range n.conns {
		if s, ok := c.(*session); id == peer && !(ok && s.dialled) {
			return
		}
	}
	if wake := n.back.wakes[peer]; wake != nil {
		select {
		case wake <- struct{}{}:
		default:
		}
	}
}

// state is what the handshake proved.
func (c *Conn) state() tls.ConnectionState {
	switch s := c.Conn.(type) {
	case *tls.Conn:
		return s.ConnectionState()
	case *stream:
		return s.session.state()
	}
	return tls.ConnectionState{}
}
