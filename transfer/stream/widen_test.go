package stream

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// thinConn is a connection with a peer that is proven, over a path that loses packets.
type thinConn struct {
	net.Conn
	ended func()
}

func (c thinConn) PeerID() string { return "wanter" }
func (c thinConn) Thin() bool     { return true }

func (c thinConn) Close() error {
	c.ended()
	return c.Conn.Close()
}

// thinned is a listener of such connections; serve takes the first, others the rest.
type thinned struct {
	net.Listener
	accepted atomic.Int32
	open     atomic.Int32
	others   chan net.Conn // nil: there is one who serves
}

func (l *thinned) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		l.open.Add(1)
		c = thinConn{c, sync.OnceFunc(func() { l.open.Add(-1) })}
		if l.accepted.Add(1) == 1 || l.others == nil {
			return c, nil
		}
		l.others <- c
	}
}

// A holder at the end of a long and lossy path is traded with over several connections,
// which take one place.
func TestSeveralConnectionsOnALossyPath(t *testing.T) {
	content, blob, _ := sample(t, 64*transfer.PieceSize)
	store := transfertest.NewStore()
	store.Put(content)
	var ln *thinned
	var sent atomic.Int32
	enough := func(transfer.Flow, int) time.Duration {
		// Only with all connections does it go on.
		if sent.Load() >= 4 && ln.accepted.Load() < wide {
			return 5 * time.Millisecond
		}
		sent.Add(1)
		return 0
	}
	holder := mover(t, store, peers(nil), func(cfg *Config) { cfg.Limiter = takes(enough) })
	p := listening(t, "holder", func(ctx context.Context, raw net.Listener) {
		ln = &thinned{Listener: raw}
		_ = holder.Serve(ctx, ln)
	})
	got := transfertest.NewStore()
	e := mover(t, got, peers{p}, func(cfg *Config) { cfg.Limits.Holders, cfg.StallTimeout = func() int { return 1 }, 20*time.Second })
	f, err := e.Fetch(t.Context(), blob)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := ln.accepted.Load(); n != wide {
		t.Errorf("%d connections, want %d", n, wide)
	}
	if string(got.Bytes(blob.Digest)) != string(content) {
		t.Error("other bytes arrived")
	}
}

type takes func(transfer.Flow, int) time.Duration

func (l takes) Take(f transfer.Flow, n int) time.Duration { return l(f, n) }

// A lie over one of them is the node's, and ends them all.
func TestALieOverOneOfSeveralConnections(t *testing.T) {
	content, blob, _ := sample(t, 64*transfer.PieceSize)
	store, lies := transfertest.NewStore(), transfertest.NewStore()
	store.Put(content)
	lies.Put(content)
	dropped := make(chan transfer.Reason, 16)
	var caught atomic.Bool
	ln := &thinned{others: make(chan net.Conn)}
	slow := takes(func(transfer.Flow, int) time.Duration {
		if caught.Load() && ln.open.Load() == 0 { // only without them does it go on
			return 0
		}
		return 20 * time.Millisecond
	})
	honest := mover(t, store, peers(nil), func(cfg *Config) { cfg.Limiter = slow })
	front := mover(t, store, peers(nil), func(cfg *Config) {
		var n atomic.Int32
		cfg.Limiter = takes(func(transfer.Flow, int) time.Duration {
			if n.Add(1) > 2 {
				return 5 * time.Millisecond
			}
			return 0
		})
	})
	liar := mover(t, lies, peers(nil), func(cfg *Config) {
		cfg.Source = &transfertest.Hostile{Source: lies, Read: func(_ context.Context, p []byte, _ int64, read func() (int, error)) (int, error) {
			n, err := read()
			p[0]++
			return n, err
		}}
	})
	two := listening(t, "two-faced", func(ctx context.Context, raw net.Listener) {
		ln.Listener = raw
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(func() { _ = liar.Serve(ctx, given{ln, ln.others, ctx.Done()}) })
		_ = front.Serve(ctx, ln)
	})
	other := serving(t, honest)
	e := mover(t, transfertest.NewStore(), peers{two, other}, func(cfg *Config) {
		cfg.StallTimeout = 20 * time.Second
		cfg.Hooks.Dropped = func(peer string, _ digest.Digest, why transfer.Reason) {
			if peer != "two-faced" {
				t.Errorf("%s is dropped: %s", peer, why)
				return
			}
			caught.Store(true)
			dropped <- why
		}
	})
	f, err := e.Fetch(t.Context(), blob)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(dropped) != 1 || <-dropped != BadPiece {
		t.Error("the node is not dropped once for its lie")
	}
}

// given is a listener of connections that come over a channel.
type given struct {
	net.Listener
	conns chan net.Conn
	ended <-chan struct{}
}

func (g given) Accept() (net.Conn, error) {
	select {
	case c := <-g.conns:
		return c, nil
	case <-g.ended:
		return nil, net.ErrClosed
	}
}

// The bound of those that are served counts nodes, and each may have so many connections.
func TestConnectionsOfOneNodeTakeOnePlace(t *testing.T) {
	o := &offer{sessions: map[*session]struct{}{}}
	join := func(node string) bool {
		if o.full(node) {
			return false
		}
		o.sessions[&session{link: &link{peer: node}}] = struct{}{}
		return true
	}
	got := map[string]int{}
	for range 2 * maxLinks {
		for i := range maxAskers + 2 {
			if node := fmt.Sprint(i); join(node) {
				got[node]++
			}
		}
	}
	if len(got) != maxAskers {
		t.Errorf("%d nodes are served, want %d", len(got), maxAskers)
	}
	for node, n := range got {
		if n != maxLinks {
			t.Errorf("node %s has %d connections, want %d", node, n, maxLinks)
		}
	}
}
