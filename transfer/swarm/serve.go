package swarm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// tablePatience bounds how long the one who dialled may take between the hello and the
// beginning, and a holder to compute a piece table for the first time.
const tablePatience = 10 * time.Minute

// Serve takes connections of the BitTorrent service until the listener is closed.
func (e *Engine) Serve(ln net.Listener) error {
	<-e.started
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		if !e.cfg.Conns.Try() { // whoever it is tries again, or another node
			c.Close()
			continue
		}
		done := e.cfg.Conns.Give
		if !e.begin(func(ctx context.Context) {
			defer done()
			if err := e.welcome(ctx, c); err != nil {
				e.log.Debug("a peer's BitTorrent connection ended", "peer", peerOf(c), "err", err)
			}
		}) {
			done()
			c.Close()
		}
	}
}

// peerOf is the node id that a connection proves.
func peerOf(c net.Conn) string {
	if p, ok := c.(interface{ PeerID() string }); ok {
		return p.PeerID()
	}
	return ""
}

// welcome hears a hello, answers it and lets BitTorrent begin; it returns when the
// connection has ended.
func (e *Engine) welcome(ctx context.Context, c net.Conn) error {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	peer := peerOf(c)
	_ = c.SetDeadline(time.Now().Add(handshakeTimeout))
	blob, class, err := readHello(c)
	if err != nil {
		return err
	}
	a, ans, err := e.look(ctx, blob, peer)
	if err != nil {
		return err
	}
	if _, err := c.Write(ans.marshal()); err != nil || ans.status != complete && ans.status != partial {
		return err
	}
	for {
		_ = c.SetDeadline(time.Now().Add(tablePatience))
		var ask [1]byte
		if _, err := io.ReadFull(c, ask[:]); err != nil {
			return err
		}
		switch ask[0] {
		case askTable:
			if err := e.giveTable(ctx, c, blob, a); err != nil {
				return err
			}
		case askBegin:
			return e.serveSwarm(ctx, c, wanter{peer, class}, blob, a)
		default:
			return fmt.Errorf("asks for %q", ask[0])
		}
	}
}

// look finds what there is of a blob here. The arrival is nil when it is complete.
func (e *Engine) look(ctx context.Context, b transfer.Blob, peer string) (*transfer.Arrival, answer, error) {
	a, arriving := e.cfg.Arriving(b.Digest) // before the look into the source: it may arrive in between
	content, err := e.cfg.Source.Open(ctx, b.Digest)
	if err == nil {
		size := content.Size()
		return nil, answer{complete, size}, content.Close()
	}
	if !errors.Is(err, transfer.ErrNotHeld) {
		return nil, answer{}, fmt.Errorf("looking for blob %s: %w", b.Digest, err)
	}
	if !arriving {
		return nil, answer{gone, b.Size}, nil
	}
	own := a.Fetch().Blob()
	switch {
	case own.Size != b.Size:
		return nil, answer{partial, own.Size}, nil // the one who asks knows what to think
	case string(own.Root) != string(b.Root):
		return nil, answer{gone, own.Size}, nil
	}
	if e.dialling(Infohash(b), peer) {
		return nil, answer{linked, b.Size}, nil
	}
	return a, answer{partial, b.Size}, nil
}

// giveTable sends the blob's piece table, and signs of life until there is one.
func (e *Engine) giveTable(ctx context.Context, c net.Conn, b transfer.Blob, a *transfer.Arrival) error {
	ctx, cancel := context.WithTimeout(ctx, tablePatience)
	defer cancel()
	type result struct {
		table transfer.PieceTable
		err   error
	}
	done := make(chan result, 1)
	e.wg.Go(func() {
		if a != nil {
			t, ok := a.Fetch().AwaitTable(ctx)
			if !ok {
				done <- result{err: transfer.ErrNotHeld}
				return
			}
			done <- result{table: t}
			return
		}
		t, err := e.cfg.Source.Pieces(ctx, b.Digest)
		done <- result{t, err}
	})
	alive := time.NewTicker(max(time.Millisecond, e.cfg.StallTimeout/4))
	defer alive.Stop()
	for before := 0; ; {
		_ = c.SetWriteDeadline(time.Now().Add(writeTimeout))
		var changed <-chan struct{}
		if a != nil {
			changed = a.Changed()
			if hops := a.Hops(); hops != before {
				before = hops
				if _, err := c.Write([]byte{tableFar, byte(hops)}); err != nil {
					return err
				}
			}
		}
		select {
		case <-changed:
		case <-alive.C:
			if _, err := c.Write([]byte{tableYet}); err != nil {
				return err
			}
		case r := <-done:
			if r.err != nil {
				_, err := c.Write([]byte{tableNot})
				return errors.Join(r.err, err)
			}
			raw, err := r.table.MarshalBinary()
			if err != nil {
				return err
			}
			_ = c.SetWriteDeadline(time.Now().Add(tablePatience))
			_, err = c.Write(append([]byte{tableIs}, raw...))
			return err
		}
	}
}

// wanter is who has said hello, and what it wants the blob for.
type wanter struct {
	peer  string
	class transfer.Class
}

// serveSwarm lets BitTorrent begin on an accepted connection.
func (e *Engine) serveSwarm(ctx context.Context, c net.Conn, from wanter, b transfer.Blob, a *transfer.Arrival) error {
	var table transfer.PieceTable
	if a != nil {
		t, ok := a.Fetch().AwaitTable(ctx)
		if !ok {
			if !a.Fetch().Progress().Done {
				return transfer.ErrNotHeld
			}
			a = nil
		}
		table = t
	}
	if a != nil && a.Ended() && a.Fetch().Progress().Done {
		a = nil
	}
	s, err := e.open(b, a, table)
	if err != nil {
		return err
	}
	defer e.leave(s)
	if len(s.all()) >= maxTaps {
		return errBusy
	}
	_ = c.SetDeadline(time.Time{})
	t := newTap(s, c, from.peer, false)
	t.wants(from.class)
	s.attach(t)
	if w := s.want.Load(); w != nil {
		w.join(t, false, minWindow) // two that fetch the same blob need one connection only
	}
	<-t.done
	return t.err
}

// dialling says whether this node has the better right to the connection with a peer
// about a blob that both are fetching: it has dialled, and the smaller id keeps.
func (e *Engine) dialling(hash [hashSize]byte, peer string) bool {
	if e.cfg.Node > peer {
		return false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.swarms[hash]
	if s == nil {
		return false
	}
	for _, t := range s.all() {
		if t.outgoing && t.peer == peer {
			return true
		}
	}
	return false
}
