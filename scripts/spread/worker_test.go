package spread

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anacrolix/torrent/metainfo"
	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/stream"
	"github.com/atoll-registry/atoll/transfer/swarm"
	"github.com/atoll-registry/atoll/transfer/swarm/swarmtest"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// The ways to spread a blob: the two engines, and what they are compared with, which
// is BitTorrent as its library comes, and nodes that know of nobody but the holder.
const (
	byStream     = "stream"
	byBitTorrent = "bittorrent"
	byDefaults   = "defaults"
	byStar       = "star"
)

// task is what a node, a process of its own, is and does.
type task struct {
	Way   string
	ID    string
	Site  string
	Chain [][]byte // its certificate and the CA's
	Key   []byte
	Blob  transfer.Blob
	Info  []byte // of the blob, for the library
	Holds bool
	Reads bool // a client at the node reads the blob while it arrives
	Mates []mate
	Zones bool // mates have a distance
	Dir   string
}

// mate is another node.
type mate struct {
	transfer.Peer
	Distance int
}

const taskEnv = "ATOLL_SPREAD_NODE"

// peerPort is every node's.
const peerPort = "7000"

// report is what a node says of itself, a line each.
type report struct {
	Held int64 `json:"held"` // verified bytes of the blob
	Sent int64 `json:"sent"` // bytes of pieces
	Far  int64 `json:"far"`  // of those received, what came from beyond a slow link
	Done bool  `json:"done"` // the blob is here
	Err  string
}

// reportEvery is how often a node says how far it is.
const reportEvery = 50 * time.Millisecond

// contentOf is what nodes spread: no two blobs of different sizes are alike.
func contentOf(size int64) []byte {
	content := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(size), byte(size >> 8), byte(size >> 16), 1}).Read(content)
	return content
}

// worker is the node in its process.
type worker struct {
	task
	store *transfertest.Store
	port  *peernet.Net
	mover *stream.Engine
	naive *swarmtest.Naive // instead of it
	sent  atomic.Int64
	far   atomic.Int64
	dist  map[string]int

	tables sync.Mutex
	table  transfer.PieceTable
}

// Sent implements transfer.Meter.
func (w *worker) Sent(_ transfer.Flow, bytes int) { w.sent.Add(int64(bytes)) }

// Received implements transfer.Meter.
func (w *worker) Received(f transfer.Flow, bytes int) {
	if w.dist[f.Peer] == stream.Farthest {
		w.far.Add(int64(bytes))
	}
}

// Open implements transfer.Source.
func (w *worker) Open(ctx context.Context, d digest.Digest) (transfer.Content, error) {
	return w.store.Open(ctx, d)
}

// Pieces implements transfer.Source: it computes the table once, as a node does.
func (w *worker) Pieces(ctx context.Context, d digest.Digest) (transfer.PieceTable, error) {
	w.tables.Lock()
	defer w.tables.Unlock()
	if w.table.Len() > 0 {
		return w.table, nil
	}
	var err error
	w.table, err = w.store.Pieces(ctx, d)
	return w.table, err
}

// Candidates implements transfer.Peers.
func (w *worker) Candidates(context.Context, digest.Digest) []transfer.Peer {
	list := make([]transfer.Peer, len(w.Mates))
	for i, m := range w.Mates {
		list[i] = m.Peer
	}
	return list
}

// work is a node's life: it does what it reads, a line each, until nothing more comes.
func work(ctx context.Context, text string, orders io.Reader, out io.Writer) error {
	w := &worker{store: transfertest.NewStore(), dist: map[string]int{}}
	if err := json.Unmarshal([]byte(text), &w.task); err != nil {
		return err
	}
	for _, m := range w.Mates {
		w.dist[m.ID] = m.Distance
	}
	if err := w.start(ctx); err != nil {
		return err
	}
	if w.Holds {
		if err := w.hold(ctx); err != nil {
			return err
		}
	}
	say := json.NewEncoder(out)
	if err := say.Encode(report{}); err != nil { // it is ready
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	fetched := make(chan error, 1)
	go func() {
		defer stop()
		lines := bufio.NewScanner(orders)
		for lines.Scan() {
			go func() { fetched <- w.fetch(ctx) }()
		}
	}()
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	var r report
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-fetched:
			if r.Done = err == nil; err != nil {
				r.Err = err.Error()
			}
		case <-tick.C:
		}
		r.Held, r.Sent, r.Far = w.held(), w.sent.Load(), w.far.Load()
		if w.naive != nil {
			r.Sent = w.naive.Sent()
		}
		if err := say.Encode(r); err != nil {
			return nil // nobody listens any more
		}
	}
}

func (w *worker) held() int64 {
	if w.mover == nil {
		return 0
	}
	if a, ok := w.mover.Arriving(w.Blob.Digest); ok {
		return a.Fetch().Progress().Held
	}
	return int64(len(w.store.Bytes(w.Blob.Digest)))
}

// start opens the peer port and runs what is behind it; it ends with the process.
func (w *worker) start(ctx context.Context) error {
	key, err := x509.ParsePKCS8PrivateKey(w.Key)
	if err != nil {
		return err
	}
	ca, err := x509.ParseCertificate(w.Chain[len(w.Chain)-1])
	if err != nil {
		return err
	}
	cert, pool := tls.Certificate{Certificate: w.Chain, PrivateKey: key.(crypto.PrivateKey)}, x509.NewCertPool()
	pool.AddCert(ca)
	w.port, err = peernet.New(peernet.Config{
		SiteID: w.Site,
		Cert:   func() tls.Certificate { return cert },
		CA:     func() *x509.CertPool { return pool },
	})
	if err != nil {
		return err
	}
	if w.Way == byDefaults {
		w.naive, err = swarmtest.NewNaive(w.ID, w.Dir, w.dial(peernet.ServiceSwarm), w.port.Listen(peernet.ServiceSwarm))
	} else {
		err = w.engines(ctx)
	}
	if err != nil {
		return err
	}
	raw, err := net.Listen("tcp", ":"+peerPort)
	if err != nil {
		return err
	}
	packets, err := net.ListenPacket("udp", ":"+peerPort)
	if err != nil {
		return err
	}
	go func() { _ = w.port.ServeBoth(ctx, raw, packets) }()
	return nil
}

func (w *worker) dial(service byte) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, addr string) (net.Conn, error) { return w.port.Dial(ctx, addr, service) }
}

// engines makes and runs the mover, and the carrier that it uses for BitTorrent.
func (w *worker) engines(ctx context.Context) error {
	var distance func(transfer.Peer) int
	if w.Zones {
		distance = func(p transfer.Peer) int { return w.dist[p.ID] }
	}
	carrier, err := swarm.New(swarm.Config{
		Node: w.ID, Source: w, Peers: w, Meter: w, Distance: distance, Dial: w.dial(peernet.ServiceSwarm),
		Lacks:    func(err error) bool { return errors.Is(err, peernet.ErrNoService) },
		Arriving: func(d digest.Digest) (*transfer.Arrival, bool) { return w.mover.Arriving(d) },
	})
	if err != nil {
		return err
	}
	w.mover, err = stream.New(stream.Config{
		Source: w, Sink: w.store, Peers: w, Self: w.ID, Meter: w, Distance: distance, Dial: w.dial(peernet.ServiceBlob),
		Carrier: func(transfer.Blob, transfer.Way) transfer.Carrier {
			if w.Way == byBitTorrent {
				return carrier
			}
			return nil
		},
	})
	if err != nil {
		return err
	}
	blobs, torrents := w.port.Listen(peernet.ServiceBlob), w.port.Listen(peernet.ServiceSwarm)
	go func() { _ = w.mover.Serve(ctx, blobs) }()
	go func() { _ = w.mover.Run(ctx) }()
	go func() { _ = carrier.Run(ctx) }()
	go func() { _ = carrier.Serve(torrents) }()
	return nil
}

// hold gives the node the blob.
func (w *worker) hold(ctx context.Context) error {
	content := contentOf(w.Blob.Size)
	if w.naive == nil {
		w.store.Put(content)
		_, err := w.Pieces(ctx, w.Blob.Digest)
		return err
	}
	if err := os.WriteFile(filepath.Join(w.Dir, "blob"), content, 0o600); err != nil {
		return err
	}
	return w.naive.Fetch(ctx, w.info(), nil) // it hashes what it has
}

func (w *worker) info() *metainfo.MetaInfo { return &metainfo.MetaInfo{InfoBytes: w.Info} }

// fetch gets the blob to the node.
func (w *worker) fetch(ctx context.Context) error {
	if w.naive != nil {
		var all []string
		for _, m := range w.Mates {
			all = append(all, m.Addr)
		}
		return w.naive.Fetch(ctx, w.info(), all)
	}
	var options []transfer.Option
	if w.Reads {
		options = append(options, transfer.ReadFrom(0))
	}
	f, err := w.mover.Fetch(ctx, w.Blob, options...)
	if err != nil {
		return err
	}
	if w.Reads {
		r := f.Reader(ctx)
		defer r.Close()
		if n, err := io.Copy(io.Discard, r); err != nil || n != w.Blob.Size {
			return fmt.Errorf("a client read %d bytes of %d: %w", n, w.Blob.Size, err)
		}
	}
	if err := f.Wait(ctx); err != nil {
		return err
	}
	if got := w.store.Bytes(w.Blob.Digest); !bytes.Equal(got, contentOf(w.Blob.Size)) {
		return fmt.Errorf("%d bytes arrived that are not the blob", len(got))
	}
	return nil
}
