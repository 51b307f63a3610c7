package stream_test

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/stream"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

type engine struct{ *stream.Engine }

func (e engine) Serve(ln net.Listener) error { return e.Engine.Serve(context.Background(), ln) }

func start(t testing.TB, p transfertest.Parts) transfertest.Engine {
	t.Helper()
	e, err := stream.New(stream.Config{
		Source: p.Source, Sink: p.Sink, Peers: p.Peers, Dial: p.Dial, Log: p.Log, Limiter: p.Limiter, Incoming: p.Incoming,
		Patience: transfer.Patience{StallTimeout: p.StallTimeout, AskTimeout: 10 * time.Second, AskAgain: 100 * time.Millisecond, Backoff: time.Millisecond},
		Absence:  2 * time.Second,
		Hooks: stream.Hooks{
			Moved:   p.Moved,
			Dropped: func(peer string, _ digest.Digest, why stream.Reason) { p.Dropped(peer, why.Lie()) },
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return engine{e}
}

func TestMover(t *testing.T) { transfertest.Run(t, start) }
