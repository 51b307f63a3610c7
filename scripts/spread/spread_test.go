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
	for _, n := range *o.fleet {
		if n != o.self {
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
