package peernet

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	mathrand "math/rand/v2"
	"net"
	"slices"
	"strings"
	"time"
)

// park keeps a connection of this node parked at every other that cannot dial it.
func (n *Net) park(ctx context.Context, run runner) {
	running := map[Peer]context.CancelFunc{}
	defer func() {
		for _, stop := range running {
			stop()
		}
	}()
	tick := time.NewTicker(lookAround)
	defer tick.Stop()
	for {
		if now, err := n.others(); err != nil {
			n.log.Warn("looking up the members", "err", err)
		} else {
			for p, stop := range running {
				if !now[p] {
					stop()
					delete(running, p)
				}
			}
			for p := range now {
				if running[p] == nil {
					parking, stop := context.WithCancel(ctx)
					running[p] = stop
					run(func(context.Context) { n.parkAt(parking, p, run) })
				}
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// others are where to park: at the other members, and at those of which they tell.
func (n *Net) others() (map[Peer]bool, error) {
	self := ""
	cert := n.cfg.Cert()
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err == nil {
		_, self, err = Identity(leaf)
	}
	if err != nil {
		return nil, err
	}
	all, err := n.look()
	if err != nil {
		return nil, err
	}
	now := make(map[Peer]bool, len(all))
	n.mu.Lock()
	defer n.mu.Unlock()
	for by, told := range n.back.told {
		if _, member := n.back.fellow[by]; !member && len(n.back.fellow) > 0 {
			delete(n.back.told, by)
			continue
		}
		all = append(all, told...)
	}
	for _, p := range all {
		if p.ID != self {
			now[p] = true
		}
	}
	return now, nil
}

// parkAt parks a connection at one peer again and again, while the peer says that it
// cannot dial this node.
func (n *Net) parkAt(ctx context.Context, peer Peer, run runner) {
	wake := make(chan struct{}, 1)
	n.mu.Lock()
	n.back.wakes[peer.ID] = wake
	n.mu.Unlock()
	defer func() {
		n.mu.Lock()
		if n.back.wakes[peer.ID] == wake {
			delete(n.back.wakes, peer.ID)
		}
		n.mu.Unlock()
	}()
	pause := parkPause
	for ctx.Err() == nil {
		rest := resting
		n.mu.Lock()
		proven := n.back.parked[peer.ID] != nil // it dials this node
		many := len(n.back.fellow) > n.back.few
		n.mu.Unlock()
		if !proven || !many {
			begun := time.Now()
			err := n.parkOnce(ctx, peer, run)
			if err == nil || time.Since(begun) > again {
				pause = parkPause
			}
			if err != nil {
				rest = pause
				if pause *= 2; pause > parkPauses && !proven {
					pause = parkPauses
				}
				pause = min(pause, shunned)
				n.log.Debug("no connection is parked", "node", peer.ID, "address", peer.Addr, "err", err)
			}
			if errors.Is(err, ErrNoService) { // an older version
				rest = resting
			}
		}
		next := time.NewTimer(rest/2 + mathrand.N(rest/2))
		select {
		case <-next.C:
		case <-wake:
		case <-ctx.Done():
		}
		next.Stop()
	}
}

// parkOnce parks a connection and answers its calls until it ends; nil: the peer can
// dial this node.
func (n *Net) parkOnce(ctx context.Context, peer Peer, run runner) error {
	dialling, cancel := context.WithTimeout(ctx, n.cfg.HandshakeTimeout)
	defer cancel()
	c, err := n.direct(dialling, n.member(peer.Addr, ServiceBack))
	if err != nil {
		return err
	}
	defer c.Close()
	if peer.ID != "" && c.peer != peer.ID {
		return fmt.Errorf("%s is not node %s but %s", peer.Addr, peer.ID, c.peer)
	}
	peer.ID = c.peer
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if !n.serveFor(c) {
		return net.ErrClosed
	}
	known, err := n.cfg.Peers()
	if err != nil {
		return err
	}
	s := sum(known)
	if _, err := c.Write(append([]byte{forParking}, s[:]...)); err != nil {
		return err
	}
	if err := n.hear(c); err != nil {
		return err
	}
	n.parkedAt(peer.Addr, true)
	defer n.parkedAt(peer.Addr, false)
	places := make(chan struct{}, callsAtOnce)
	for {
		var said [callSize]byte
		if _, err := io.ReadFull(c, said[:]); err != nil {
			return err
		}
		switch service := said[0]; service {
		case 0:
			return nil
		case ServiceBack:
			return errors.New("the peer calls for a connection for calls")
		default:
			select {
			case places <- struct{}{}:
			default:
				return fmt.Errorf("the peer has more than %d calls out", callsAtOnce)
			}
			run(func(ctx context.Context) { // a call outlives the parked connection
				defer func() { <-places }()
				n.answerCall(ctx, peer, c.Carrier(), service, said[1:])
			})
		}
	}
}

func (n *Net) parkedAt(addr string, is bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if is {
		n.back.away[addr] = true
	} else {
		delete(n.back.away, addr)
	}
}

// answerCall dials the peer that called, over the carrier that brought the call, and
// serves it as if it had dialled: it is asked what for, whether it may, and of which
// epoch it is.
func (n *Net) answerCall(ctx context.Context, peer Peer, by Carrier, service byte, key []byte) {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.HandshakeTimeout)
	defer cancel()
	k := n.member(peer.Addr, ServiceBack)
	k.kept = service != ServicePassing // as in member
	k.pool, k.after = service, append([]byte{forAnswering}, key...)
	c, err := n.over(ctx, by, k)
	if err != nil {
		n.log.Debug("a call was not answered", "node", peer.ID, "address", peer.Addr, "err", err)
		return
	}
	stop := context.AfterFunc(ctx, func() { c.Conn.Close() })
	var l *listener
	if _, _, err = n.verify(c.state(), x509.ExtKeyUsageClientAuth); err == nil && c.peer != peer.ID {
		err = fmt.Errorf("%s is not node %s but %s", peer.Addr, peer.ID, c.peer)
	}
	if err == nil && !n.serveFor(c) {
		err = net.ErrClosed
	}
	if err == nil {
		c.service = 0
		l, err = n.receive(c)
	}
	if err == nil && !stop() {
		err = ctx.Err()
	}
	if err != nil {
		stop()
		c.Close()
		n.refuse(ctx, c.RemoteAddr(), c, err)
		return
	}
	c.probe(c.NetConn())
	n.deliver(ctx, l, c)
}

// look looks up the members, this node among them, and notes who they are. What others
// have parked ends.
func (n *Net) look() (all []Peer, err error) {
	if all, err = n.cfg.Peers(); err != nil {
		return nil, err
	}
	fellow := make(map[string]string, len(all))
	for _, p := range all {
		if p.ID != "" {
			fellow[p.ID] = p.Addr
		}
	}
	var strange []*Conn
	n.mu.Lock()
	n.back.fellow = fellow
	for id, p := range n.back.parked {
		if _, ok := fellow[id]; !ok {
			strange = append(strange, p.conn)
		}
	}
	maps.DeleteFunc(n.back.blind, func(id, addr string) bool { return fellow[id] != addr })
	n.mu.Unlock()
	for _, c := range strange {
		c.Close()
	}
	return all, nil
}

// sum tells two lists of members apart.
func sum(all []Peer) (s [sumSize]byte) {
	all = slices.SortedFunc(slices.Values(all), func(a, b Peer) int { return strings.Compare(a.ID+" "+a.Addr, b.ID+" "+b.Addr) })
	h := sha256.New()
	for _, p := range all {
		fmt.Fprintf(h, "%s %s\n", p.ID, p.Addr)
	}
	copy(s[:], h.Sum(nil))
	return s
}

// tell tells a member which others there are, if its own list is another one: a node
// that has just joined, or was away, may not know who wants to call it.
func (n *Net) tell(c *Conn, theirs [sumSize]byte) error {
	all, err := n.look()
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(all, func(p Peer) bool { return p.ID == c.peer }) {
		return errors.New("not a member") // as far as this node knows yet: it comes again
	}
	var text []byte
	if sum(all) != theirs {
		if text, err = json.Marshal(all[:min(maxTold, len(all))]); err != nil {
			return err
		}
	}
	_ = c.SetWriteDeadline(time.Now().Add(firstWord))
	_, err = c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...))
	return err
}

// hear takes what a peer tells of the members.
func (n *Net) hear(c *Conn) error {
	_ = c.SetReadDeadline(time.Now().Add(n.cfg.HandshakeTimeout))
	var head [4]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return err
	}
	var told []Peer
	if size := binary.BigEndian.Uint32(head[:]); size > maxBytes {
		return fmt.Errorf("the peer tells %d bytes of members", size)
	} else if size > 0 {
		text := make([]byte, size)
		if _, err := io.ReadFull(c, text); err != nil {
			return err
		}
		if err := json.Unmarshal(text, &told); err != nil {
			return fmt.Errorf("what the peer tells of members: %w", err)
		}
		told = slices.DeleteFunc(told[:min(maxTold, len(told))], func(p Peer) bool { return p.ID == "" })
	}
	n.mu.Lock()
	n.back.told[c.peer] = told
	n.mu.Unlock()
	return c.SetReadDeadline(time.Time{})
}
