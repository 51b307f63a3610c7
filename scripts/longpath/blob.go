package main

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/stream"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// blobSize is more than a line carries while it is measured.
const blobSize = 192 << 20

// theBlob is the same on both ends.
func theBlob() ([]byte, transfer.Blob, error) {
	content := make([]byte, blobSize)
	if _, err := rand.NewChaCha8([32]byte{1}).Read(content); err != nil {
		return nil, transfer.Blob{}, err
	}
	table, err := transfer.HashPieces(bytes.NewReader(content), blobSize)
	return content, transfer.Blob{Digest: digest.FromBytes(content), Size: blobSize, Root: table.Root()}, err
}

// peers are all that an engine asks.
type peers []transfer.Peer

func (p peers) Candidates(context.Context, digest.Digest) []transfer.Peer { return p }

// serveBlob serves the blob by the engine over a port as it is, and over one without BBR.
func serveBlob(ctx context.Context, dir, ip string, failed chan<- error) error {
	content, _, err := theBlob()
	if err != nil {
		return err
	}
	store := transfertest.NewStore()
	store.Put(content)
	for number, plain := range map[string]bool{blobPort: false, plainBlobPort: true} {
		n, err := port(dir, "far", func(c *peernet.Config) { c.NoBBR = plain })
		if err != nil {
			return err
		}
		e, err := stream.New(stream.Config{
			Source: store, Sink: store, Peers: peers(nil),
			Dial: func(context.Context, string) (net.Conn, error) { return nil, errors.New("it only serves") },
		})
		if err != nil {
			return err
		}
		blobs, err := listen(ctx, n, net.JoinHostPort(ip, number), failed)
		if err != nil {
			return err
		}
		go func() { failed <- e.Serve(ctx, blobs) }()
	}
	return nil
}

// fetch fetches the blob by the engine and gives the rate, Mbit/s: that of a while from its first
// piece on, or, for a length of 0, that of all of it, from when it was asked for until it was
// verified, connection and all.
func fetch(ctx context.Context, dir, addr string, l load) (float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	_, blob, err := theBlob()
	if err != nil {
		return 0, err
	}
	n, err := port(dir, "near", func(c *peernet.Config) { c.Transport = func() peernet.Transport { return peernet.Transport(l.how) } })
	if err != nil {
		return 0, err
	}
	// The port is served, so that QUIC connections are kept and shared as in a node.
	ln, err := net.Listen("tcp", ":5001")
	if err != nil {
		return 0, err
	}
	packets, err := net.ListenPacket("udp", ":5001")
	if err != nil {
		return 0, err
	}
	ended := make(chan error, 2)
	go func() { ended <- n.ServeBoth(ctx, ln, packets) }()
	e, err := stream.New(stream.Config{
		Source: transfertest.NewStore(), Sink: transfertest.NewStore(), Peers: peers{{ID: nodeIDs[1].id, Addr: addr}},
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			return n.Dial(ctx, addr, peernet.ServiceBlob)
		},
	})
	if err != nil {
		return 0, err
	}
	go func() { ended <- e.Run(ctx) }()
	defer func() {
		cancel()
		<-ended
		<-ended
	}()
	asked := time.Now()
	f, err := e.Fetch(ctx, blob)
	if err != nil {
		return 0, err
	}
	tries := 0
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var begun time.Time
	for {
		select {
		case <-f.Done():
			err := f.Wait(ctx)
			if err == nil && l.length == 0 {
				return float64(blobSize) * 8 / 1e6 / time.Since(asked).Seconds(), nil
			}
			if err != nil {
				// The first packets of a connection may all be lost.
				if tries++; tries == 10 || !begun.IsZero() || !errors.Is(err, transfer.ErrNoHolder) {
					return 0, err
				}
				if f, err = e.Fetch(ctx, blob); err != nil {
					return 0, err
				}
			}
		case <-tick.C:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
		held := f.Progress().Held
		switch {
		case held == 0 || l.length == 0:
		case begun.IsZero():
			begun = time.Now()
		case held == blobSize || time.Since(begun) > l.length:
			return float64(held) * 8 / 1e6 / time.Since(begun).Seconds(), nil
		}
	}
}
