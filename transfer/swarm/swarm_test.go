package swarm_test

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/stream"
	"github.com/atoll-registry/atoll/transfer/swarm"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// engine is the mover with BitTorrent as its carrier.
type engine struct {
	*stream.Engine
	swarm  *swarm.Engine
	listen func(byte) net.Listener
}

func (e engine) Serve(ln net.Listener) error { return e.Engine.Serve(context.Background(), ln) }

func (e engine) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	ln := e.listen(peernet.ServiceSwarm)
	wg.Go(func() { _ = e.swarm.Serve(ln) })
	torrents, stop := context.WithCancel(context.WithoutCancel(ctx))
	wg.Go(func() { _ = e.swarm.Run(torrents) })
	err := e.Engine.Run(ctx)
	ln.Close()
	stop()
	wg.Wait()
	return err
}

func start(t testing.TB, p transfertest.Parts) transfertest.Engine {
	t.Helper()
	hooks := transfer.Hooks{
		Moved:   p.Moved,
		Dropped: func(peer string, _ digest.Digest, why transfer.Reason) { p.Dropped(peer, why.Lie()) },
	}
	var mover *stream.Engine
	carrier, err := swarm.New(swarm.Config{
		Node: p.Node, Source: p.Source, Peers: p.Peers, Log: p.Log, Hooks: hooks, Limiter: p.Limiter, Incoming: p.Incoming,
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			return p.DialService(ctx, addr, peernet.ServiceSwarm)
		},
		Lacks:    func(err error) bool { return errors.Is(err, peernet.ErrNoService) },
		Arriving: func(d digest.Digest) (*transfer.Arrival, bool) { return mover.Arriving(d) },
		Patience: transfer.Patience{StallTimeout: p.StallTimeout, AskTimeout: 10 * time.Second, AskAgain: 100 * time.Millisecond, Backoff: time.Millisecond},
	})
	if err != nil {
		t.Fatal(err)
	}
	mover, err = stream.New(stream.Config{
		Source: p.Source, Sink: p.Sink, Peers: p.Peers, Dial: p.Dial, Log: p.Log, Limiter: p.Limiter, Incoming: p.Incoming,
		Carrier:  func(transfer.Blob, transfer.Way) transfer.Carrier { return carrier },
		Patience: transfer.Patience{StallTimeout: p.StallTimeout, AskTimeout: 10 * time.Second, AskAgain: 100 * time.Millisecond, Backoff: time.Millisecond},
		Hooks:    hooks,
	})
	if err != nil {
		t.Fatal(err)
	}
	return engine{mover, carrier, p.Listen}
}

func TestMover(t *testing.T) { transfertest.Run(t, start) }
