package swarm

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/swarm/swarmtest"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// uplink shapes what a node sends.
type uplink struct {
	*rate.Limiter
	mu   sync.Mutex
	sent int64
}

func newUplink(bytes int) *uplink {
	const burst = 32 << 10
	return &uplink{Limiter: rate.NewLimiter(rate.Limit(bytes), burst)}
}

// shaped is a connection of a node whose uplink all of its connections share.
type shaped struct {
	net.Conn
	up *uplink
}

func (s shaped) Write(p []byte) (int, error) {
	for at := 0; at < len(p); {
		n := min(16<<10, len(p)-at)
		if err := s.up.WaitN(context.Background(), n); err != nil {
			return at, err
		}
		k, err := s.Conn.Write(p[at : at+n])
		s.up.mu.Lock()
		s.up.sent += int64(k)
		s.up.mu.Unlock()
		if at += k; err != nil {
			return at, err
		}
	}
	return len(p), nil
}

const (
	spreadNodes = 8
	spreadSize  = 32 << 20
	spreadRate  = 2 << 20 // bytes a second, each node's uplink and the source's
)

// bound is the fluid bound of the time to spread the blob, in seconds.
func bound() float64 {
	f, u, n := float64(spreadSize), float64(spreadRate), float64(spreadNodes)
	return max(f/u, n*f/((n+1)*u))
}

func spreadContent() []byte {
	b := make([]byte, spreadSize)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

// BenchmarkSpread has one source give a blob to eight nodes that ask at once over
// equal uplinks, and gives the time until the last has it over the fluid bound, and
// what was sent; then the same with the library as it comes.
//
//	go test -run '^$' -bench Spread -benchtime 1x ./transfer/swarm
func BenchmarkSpread(b *testing.B) {
	b.Run("engine", func(b *testing.B) {
		for range b.N {
			w := &wire{at: make(map[string]func(string, net.Conn)), stall: 30 * time.Second, lines: make(map[string]*uplink)}
			content := spreadContent()
			blob, _ := blobOf(b, content)
			names := []string{"source"}
			for i := range spreadNodes {
				names = append(names, fmt.Sprintf("node-%d", i))
			}
			rigs := make([]*rig, len(names))
			stores := make([]*transfertest.Store, len(names))
			for i, name := range names {
				w.lines[name] = newUplink(spreadRate)
				stores[i] = transfertest.NewStore()
				var peers []string
				for _, other := range names {
					if other != name {
						peers = append(peers, other)
					}
				}
				if i == 0 {
					stores[i].Put(content)
				}
				rigs[i] = w.engine(b, name, stores[i], peers...)
			}
			report(b, w.lines, func(i int) error { return rigs[i].fetch(b.Context(), stores[i], blob) })
		}
	})
	b.Run("library", func(b *testing.B) {
		for range b.N {
			w := &wire{at: make(map[string]func(string, net.Conn)), lines: make(map[string]*uplink)}
			content := spreadContent()
			mi, err := swarmtest.MetaInfo(content, transfer.PieceSize)
			if err != nil {
				b.Fatal(err)
			}
			var clients []*swarmtest.Naive
			var names []string
			for i := range 1 + spreadNodes {
				name := fmt.Sprintf("10.0.0.%d:1", i+1)
				if i == 0 {
					name = "source"
				}
				names = append(names, name)
				w.lines[name] = newUplink(spreadRate)
				dir := b.TempDir()
				if i == 0 {
					if err := os.WriteFile(filepath.Join(dir, "blob"), content, 0o600); err != nil {
						b.Fatal(err)
					}
				}
				ln := &queue{conns: make(chan net.Conn), done: make(chan struct{})}
				w.at[name] = func(from string, c net.Conn) { ln.conns <- c }
				n, err := swarmtest.NewNaive(name, dir, swarmtest.Dialer(w.dial(name)), ln)
				if err != nil {
					b.Fatal(err)
				}
				b.Cleanup(func() { n.Close(); ln.Close() })
				clients = append(clients, n)
			}
			if err := clients[0].Fetch(b.Context(), mi, nil); err != nil { // hashes what it has
				b.Fatal(err)
			}
			report(b, w.lines, func(i int) error { return clients[i].Fetch(b.Context(), mi, names) })
		}
	})
}

// report has all nodes fetch at once and reports time and bytes.
func report(b *testing.B, lines map[string]*uplink, fetch func(i int) error) {
	began := time.Now()
	var wg sync.WaitGroup
	for i := 1; i <= spreadNodes; i++ {
		wg.Go(func() {
			if err := fetch(i); err != nil {
				b.Error(err)
			}
		})
	}
	wg.Wait()
	took := time.Since(began).Seconds()
	var all int64
	for _, l := range lines {
		l.mu.Lock()
		all += l.sent
		l.mu.Unlock()
	}
	b.ReportMetric(took/bound(), "of-bound")
	b.ReportMetric(float64(lines["source"].sent)/spreadSize, "source-copies")
	b.ReportMetric(float64(all)/(spreadNodes*spreadSize), "sent-per-byte")
}
