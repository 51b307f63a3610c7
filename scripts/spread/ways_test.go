package spread

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anacrolix/torrent/metainfo"
	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/scripts/lab"
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

// crew is the nodes of one run; the first is the holder.
type crew struct {
	way string
	ground
	blob  transfer.Blob
	info  *metainfo.MetaInfo // of the blob, for the library
	nodes []*member
}

// member is one of the crew.
type member struct {
	host  *lab.Host
	id    string
	store *transfertest.Store
	port  *peernet.Net
	mover *stream.Engine
	naive *swarmtest.Naive // instead of it
	moved atomic.Int64     // bytes of pieces sent
}

// Sent implements transfer.Meter.
func (n *member) Sent(_ transfer.Flow, bytes int) { n.moved.Add(int64(bytes)) }

// Received implements transfer.Meter.
func (n *member) Received(transfer.Flow, int) {}

// sent is how many bytes of pieces the node has sent.
func (n *member) sent() int64 {
	if n.naive != nil {
		return n.naive.Sent()
	}
	return n.moved.Load()
}

// known has the blob's piece table, as a node does that has computed it once.
type known struct {
	*transfertest.Store
	fleet *crew
}

// Pieces implements transfer.Source.
func (s known) Pieces(context.Context, digest.Digest) (transfer.PieceTable, error) {
	return *s.fleet.table, nil
}

// mates are whom a node asks.
type mates struct {
	fleet *crew
	self  *member
}

func (o mates) Candidates(context.Context, digest.Digest) []transfer.Peer {
	var list []transfer.Peer
	for i, n := range o.fleet.nodes {
		if n != o.self && (i == 0 || o.fleet.way != byStar) {
			list = append(list, transfer.Peer{ID: n.id, Addr: n.host.IP + ":7000"})
		}
	}
	return list
}

// dial opens a connection of a service from inside the node's namespace.
func (n *member) dial(service byte) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, addr string) (conn net.Conn, err error) {
		err = n.host.Inside(func() error {
			conn, err = n.port.Dial(ctx, addr, service)
			return err
		})
		return conn, err
	}
}

// add puts a node with a shaped uplink into the fleet and runs it until the test ends.
func (f *crew) add(t *testing.T) {
	t.Helper()
	i := len(f.nodes)
	n := &member{id: fmt.Sprintf("node-%d", i), store: transfertest.NewStore()}
	f.nodes = append(f.nodes, n)
	var err error
	if n.host, err = f.Host(t.Context(), fmt.Sprintf("n%d", i), "s", fmt.Sprintf("10.77.0.%d/24", i+1)); err != nil {
		t.Fatal(err)
	}
	if err := n.host.ShapeOut(t.Context(), f.rate); err != nil {
		t.Fatal(err)
	}
	cert := f.site.Node(t, n.id)
	n.port, err = peernet.New(peernet.Config{
		SiteID: f.site.ID,
		Cert:   func() tls.Certificate { return cert },
		CA:     func() *x509.CertPool { return f.site.Pool },
		// Both would dial in goroutines of their own, and so in another network.
		Transport: func() peernet.Transport { return peernet.OnlyTCP },
	})
	if err != nil {
		t.Fatal(err)
	}
	var raw net.Listener
	err = n.host.Inside(func() error {
		raw, err = net.Listen("tcp", ":7000")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var wg sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	if f.way == byDefaults {
		n.library(t)
	} else {
		n.engines(t, ctx, &wg, f)
	}
	wg.Go(func() { _ = n.port.Serve(ctx, raw) })
}

// engines makes and runs the mover, and the carrier that it uses for BitTorrent.
func (n *member) engines(t *testing.T, ctx context.Context, wg *sync.WaitGroup, f *crew) {
	t.Helper()
	carrier, err := swarm.New(swarm.Config{
		Node: n.id, Source: known{n.store, f}, Peers: mates{f, n}, Meter: n, Dial: n.dial(peernet.ServiceSwarm),
		Lacks:    func(err error) bool { return errors.Is(err, peernet.ErrNoService) },
		Arriving: func(d digest.Digest) (*transfer.Arrival, bool) { return n.mover.Arriving(d) },
	})
	if err != nil {
		t.Fatal(err)
	}
	n.mover, err = stream.New(stream.Config{
		Source: known{n.store, f}, Sink: n.store, Peers: mates{f, n}, Self: n.id, Meter: n, Dial: n.dial(peernet.ServiceBlob),
		Carrier: func(transfer.Blob, transfer.Way) transfer.Carrier {
			if f.way == byBitTorrent {
				return carrier
			}
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	blobs, torrents := n.port.Listen(peernet.ServiceBlob), n.port.Listen(peernet.ServiceSwarm)
	wg.Go(func() { _ = n.mover.Serve(ctx, blobs) })
	wg.Go(func() { _ = n.mover.Run(ctx) })
	wg.Go(func() { _ = carrier.Run(ctx) })
	wg.Go(func() { _ = carrier.Serve(torrents) })
	t.Cleanup(func() { torrents.Close() })
}

// library starts a client of the library with its defaults over the same connections.
func (n *member) library(t *testing.T) {
	t.Helper()
	var err error
	n.naive, err = swarmtest.NewNaive(n.id, t.TempDir(), n.dial(peernet.ServiceSwarm), n.port.Listen(peernet.ServiceSwarm))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.naive.Close)
}

// hold gives the blob to the holder.
func (f *crew) hold(t *testing.T, content []byte) {
	t.Helper()
	if f.way != byDefaults {
		f.nodes[0].store.Put(content)
		return
	}
	if err := os.WriteFile(filepath.Join(f.nodes[0].naive.Dir(), "blob"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := f.nodes[0].naive.Fetch(t.Context(), f.info, nil); err != nil { // it hashes what it has
		t.Fatal(err)
	}
}

// fetch gets the blob to a node.
func (f *crew) fetch(ctx context.Context, n *member) error {
	if f.way == byDefaults {
		var all []string
		for _, o := range f.nodes {
			if o != n {
				all = append(all, o.host.IP+":7000")
			}
		}
		return n.naive.Fetch(ctx, f.info, all)
	}
	fetch, err := n.mover.Fetch(ctx, f.blob)
	if err != nil {
		return err
	}
	return fetch.Wait(ctx)
}

var ways = flag.String("engine", byStream, "of TestWays: some of these, one run after the other")

// One node holds a blob and all the others want it at once: by each engine, by
// BitTorrent's library as it comes, and all from the holder.
func TestWays(t *testing.T) {
	content := make([]byte, *mib<<20)
	rand.NewChaCha8([32]byte{1}).Read(content)
	for way := range strings.SplitSeq(*ways, ",") {
		if !slices.Contains([]string{byStream, byBitTorrent, byDefaults, byStar}, way) {
			t.Fatalf("-engine %q: stream, bittorrent, defaults and star are known", way)
		}
		t.Run(way, func(t *testing.T) { spread(t, way, content) })
	}
}

func spread(t *testing.T, way string, content []byte) {
	f := &crew{way: way, ground: newGround(t, *rate)}
	var err error
	if *f.table, err = transfer.HashPieces(bytes.NewReader(content), int64(len(content))); err != nil {
		t.Fatal(err)
	}
	if f.info, err = swarmtest.MetaInfo(content, transfer.PieceSize); err != nil {
		t.Fatal(err)
	}
	f.blob = transfer.Blob{Digest: digest.FromBytes(content), Size: int64(len(content)), Root: f.table.Root()}
	for range *nodes + 1 {
		f.add(t)
	}
	f.hold(t, content)

	began := time.Now()
	took := make([]time.Duration, len(f.nodes))
	var wg sync.WaitGroup
	for i, n := range f.nodes[1:] {
		wg.Go(func() {
			if err := f.fetch(t.Context(), n); err != nil {
				t.Errorf("%s: %v", n.id, err)
			}
			took[i+1] = time.Since(began)
		})
	}
	wg.Wait()

	// With equal uplinks the holder's is the bound: each byte has to leave it once.
	bound := float64(len(content)) / float64(*rate)
	last, all := slices.Max(took).Seconds(), int64(0)
	for _, n := range f.nodes {
		all += n.sent()
	}
	size, source := float64(len(content)), f.nodes[0].sent()
	t.Logf("%s: %d nodes, %d MiB, %.1f MB/s each: the last had it after %.1f s, %.3f of the bound of %.1f s; the holder sent %.3f F, all sent %.3f N F",
		way, *nodes, *mib, float64(*rate)/1e6, last, last/bound, bound, float64(source)/size, float64(all)/size/float64(*nodes))
	name := fmt.Sprintf("ways_%d_nodes_%s", *nodes, way)
	if way != byStream && way != byBitTorrent {
		row(name, last/bound, "x bound", 0)
		return
	}
	row(name, last/bound, "x bound", *goal)
	row(name+"_source_sent", float64(source)/size, "F", 1.25)
	row(name+"_all_sent", float64(all)/size/float64(*nodes), "N F", 1.02)
	if last/bound > *goal {
		t.Errorf("the goal is %.2f", *goal)
	}
	if most := int64(len(content)) * 5 / 4; source > most {
		t.Errorf("the holder sent %d bytes, %d at most", source, most)
	}
}
