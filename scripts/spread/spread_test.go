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

func (f *fleet) add(t *testing.T, l *lab.Lab, site *transfertest.Site, table *transfer.PieceTable) *node {
	t.Helper()
	i := len(*f)
	id := fmt.Sprintf("node-%d", i)
	host, err := l.Host(t.Context(), fmt.Sprintf("n%d", i), "s", fmt.Sprintf("10.77.0.%d/24", i+1))
	if err != nil {
		t.Fatal(err)
	}
	if err := host.ShapeOut(t.Context(), *rate); err != nil {
		t.Fatal(err)
	}
	cert := site.Node(t, id)
	port, err := peernet.New(peernet.Config{
		SiteID: site.ID,
		Cert:   func() tls.Certificate { return cert },
		CA:     func() *x509.CertPool { return site.Pool },
	})
	if err != nil {
		t.Fatal(err)
	}
	n := &node{host: host, id: id, store: transfertest.NewStore()}
	n.Engine, err = stream.New(stream.Config{
		Source: source{n.store, table}, Sink: n.store, Peers: others{f, n}, Self: id, Meter: n,
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
	if os.Getuid() != 0 {
		t.Fatal("run it as root: it makes network namespaces")
	}
	l := lab.New()
	t.Cleanup(func() {
		if err := l.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	site := transfertest.NewSite(t, "site-a")
	var f fleet
	var table transfer.PieceTable
	for range *nodes + 1 {
		f.add(t, l, site, &table)
	}
	content := make([]byte, *mib<<20)
	rand.NewChaCha8([32]byte{1}).Read(content)
	f[0].store.Put(content)
	var err error
	if table, err = transfer.HashPieces(bytes.NewReader(content), int64(len(content))); err != nil {
		t.Fatal(err)
	}
	blob := transfer.Blob{Digest: digest.FromBytes(content), Size: int64(len(content)), Root: table.Root()}

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
	if !*star && over > *goal {
		t.Errorf("the goal is %.2f", *goal)
	}
	if most := blob.Size * 5 / 4; !*star && f[0].sent.Load() > most {
		t.Errorf("the holder sent %d bytes, %d at most", f[0].sent.Load(), most)
	}
}
