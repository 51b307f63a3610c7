package spread

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/scripts/lab"
	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/stream"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

var (
	nodes = flag.Int("nodes", 8, "nodes that want the blob at once")
	mib   = flag.Int("mib", 16, "size of the blob")
	rate  = flag.Int64("rate", 3_300_000, "uplink of each node, bytes a second")
	star  = flag.Bool("star", false, "let the nodes know of nobody but the holder, to compare")
	goal  = flag.Float64("goal", 2.5, "of the bound, at most")
)

// node is one of the fleet.
type node struct {
	*stream.Engine
	host  *lab.Host
	id    string
	store *transfertest.Store
	sent  atomic.Int64
}

type fleet []*node

// source computes a blob's piece table once, as a node does.
type source struct {
	*transfertest.Store
	table *transfer.PieceTable
}

// Pieces implements transfer.Source.
func (s source) Pieces(ctx context.Context, d digest.Digest) (transfer.PieceTable, error) {
	if s.table.Len() > 0 {
		return *s.table, nil
	}
	return s.Store.Pieces(ctx, d)
}

// others are whom a node asks.
type others struct {
	fleet *fleet
	self  *node
}

func (o others) Candidates(context.Context, digest.Digest) []transfer.Peer {
	var list []transfer.Peer
	for i, n := range *o.fleet {
		if n != o.self && (i == 0 || !*star) {
			list = append(list, transfer.Peer{ID: n.id, Addr: n.host.IP + ":7000"})
		}
	}
	return list
}

// Sent implements transfer.Meter.
func (n *node) Sent(_ transfer.Flow, bytes int) { n.sent.Add(int64(bytes)) }

// Received implements transfer.Meter.
func (n *node) Received(transfer.Flow, int) {}

// ground is where the nodes of a fleet stand.
type ground struct {
	*lab.Lab
	site  *transfertest.Site
	table *transfer.PieceTable // of the blob
	rate  int64                // of an uplink; 0: as fast as it goes
}

func newGround(t *testing.T, rate int64) ground {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("run it as root: it makes network namespaces")
	}
	l := lab.New()
	t.Cleanup(func() {
		if err := l.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return ground{l, transfertest.NewSite(t, "site-a"), &transfer.PieceTable{}, rate}
}

// blob makes one and says who holds it.
func (g ground) blob(t *testing.T, size int, holders ...*node) ([]byte, transfer.Blob) {
	t.Helper()
	content := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(size)}).Read(content)
	for _, n := range holders {
		n.store.Put(content)
	}
	table, err := transfer.HashPieces(bytes.NewReader(content), int64(size))
	if err != nil {
		t.Fatal(err)
	}
	*g.table = table
	return content, transfer.Blob{Digest: digest.FromBytes(content), Size: int64(size), Root: table.Root()}
}

// add starts a node on a switch.
func (f *fleet) add(t *testing.T, g ground, sw string) *node {
	t.Helper()
	i := len(*f)
	id := fmt.Sprintf("node-%d", i)
	host, err := g.Host(t.Context(), fmt.Sprintf("n%d", i), sw, fmt.Sprintf("10.77.0.%d/24", i+1))
	if err != nil {
		t.Fatal(err)
	}
	if g.rate > 0 {
		if err := host.ShapeOut(t.Context(), g.rate); err != nil {
			t.Fatal(err)
		}
	}
	cert := g.site.Node(t, id)
	port, err := peernet.New(peernet.Config{
		SiteID: g.site.ID,
		Cert:   func() tls.Certificate { return cert },
		CA:     func() *x509.CertPool { return g.site.Pool },
		// Both would dial in goroutines of their own, and so in another network.
		Transport: func() peernet.Transport { return peernet.OnlyTCP },
	})
	if err != nil {
		t.Fatal(err)
	}
	n := &node{host: host, id: id, store: transfertest.NewStore()}
	n.Engine, err = stream.New(stream.Config{
		Source: source{n.store, g.table}, Sink: n.store, Peers: others{f, n}, Self: id, Meter: n,
		Dial: func(ctx context.Context, addr string) (conn net.Conn, err error) {
			err = host.Inside(func() error {
				conn, err = port.Dial(ctx, addr, peernet.ServiceBlob)
				return err
			})
			return conn, err
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	var raw net.Listener
	err = host.Inside(func() error {
		raw, err = net.Listen("tcp", ":7000")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	blobs := port.Listen(peernet.ServiceBlob)
	wg.Go(func() { _ = port.Serve(ctx, raw) })
	wg.Go(func() { _ = n.Serve(ctx, blobs) })
	wg.Go(func() { _ = n.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	*f = append(*f, n)
	return n
}

// One node holds a blob and all the others want it at once.
func TestSpread(t *testing.T) {
	g := newGround(t, *rate)
	var f fleet
	for range *nodes + 1 {
		f.add(t, g, "s")
	}
	_, blob := g.blob(t, *mib<<20, f[0])

	began := time.Now()
	took := make([]time.Duration, len(f))
	var wg sync.WaitGroup
	for i, n := range f[1:] {
		wg.Go(func() {
			fetch, err := n.Fetch(t.Context(), blob)
			if err == nil {
				err = fetch.Wait(t.Context())
			}
			if err != nil {
				t.Errorf("%s: %v", n.id, err)
			}
			took[i+1] = time.Since(began)
		})
	}
	wg.Wait()

	// With equal uplinks the holder's is the bound: each byte has to leave it once.
	bound := float64(blob.Size) / float64(*rate)
	last, all := 0.0, int64(0)
	for i, n := range f {
		last = max(last, took[i].Seconds())
		all += n.sent.Load()
	}
	over := last / bound
	t.Logf("%d nodes, %d MiB, %.1f MB/s each: the last had it after %.1f s, %.3f of the bound of %.1f s; the holder sent %.3f F, all sent %.3f N F",
		*nodes, *mib, float64(*rate)/1e6, last, over, bound,
		float64(f[0].sent.Load())/float64(blob.Size), float64(all)/float64(blob.Size)/float64(*nodes))
	if *star {
		row(fmt.Sprintf("star_%d_nodes", *nodes), over, "x bound", 0)
		return
	}
	name := fmt.Sprintf("spread_%d_nodes", *nodes)
	row(name, over, "x bound", *goal)
	row(name+"_source_sent", float64(f[0].sent.Load())/float64(blob.Size), "F", 1.25)
	row(name+"_all_sent", float64(all)/float64(blob.Size)/float64(*nodes), "N F", 1.02)
	if over > *goal {
		t.Errorf("the goal is %.2f", *goal)
	}
	if most := blob.Size * 5 / 4; f[0].sent.Load() > most {
		t.Errorf("the holder sent %d bytes, %d at most", f[0].sent.Load(), most)
	}
}
