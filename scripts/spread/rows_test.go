package spread

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/scripts/lab"
	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/stream"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// row prints a figure with its goal, which it is to be at most; a goal of 0 is none. A
// missed goal is for the reader to judge: the machine may have been busy.
func row(name string, value float64, unit string, goal float64) {
	if goal == 0 {
		fmt.Printf("%s\t%.3g\t%s\t-\t-\n", name, value, unit)
		return
	}
	verdict := "met"
	if value > goal {
		verdict = "missed"
	}
	fmt.Printf("%s\t%.3g\t%s\t<= %.4g\t%s\n", name, value, unit, goal, verdict)
}

// rowAtLeast prints a figure that is to be at least its goal.
func rowAtLeast(name string, value float64, unit string, goal float64) {
	verdict := "met"
	if value < goal {
		verdict = "missed"
	}
	fmt.Printf("%s\t%.3g\t%s\t>= %.4g\t%s\n", name, value, unit, goal, verdict)
}

// limits of a figure: what it is to be, and what it may be on a busy machine.
type limits struct{ goal, most float64 }

// judge prints a figure with its goal, and fails the test when it is worse than a busy
// machine explains.
func judge(t *testing.T, name string, value float64, unit string, l limits) {
	t.Helper()
	row(name, value, unit, l.goal)
	if value > l.most {
		t.Errorf("%s is %.3g %s, %.3g at most", name, value, unit, l.most)
	}
}

func median(values []float64) float64 { return slices.Sorted(slices.Values(values))[len(values)/2] }

// reads has a client read n bytes at a node, and says how long that took.
func reads(t *testing.T, n *node, blob transfer.Blob, bytes int64) time.Duration {
	t.Helper()
	began := time.Now()
	f, err := n.Fetch(t.Context(), blob, transfer.ReadFrom(0))
	if err == nil {
		r := f.Reader(t.Context())
		defer r.Close()
		_, err = io.CopyN(io.Discard, r, bytes)
	}
	if err != nil {
		t.Fatal(err)
	}
	return time.Since(began)
}

// A client reads at a node that has nothing; the holder is 50 ms away and back.
func TestFirstByte(t *testing.T) {
	const trip = 50 * time.Millisecond
	g := newGround(t, 0)
	var f fleet
	holder, here := f.add(t, g, "near"), f.add(t, g, "far")
	line, err := g.Line(t.Context(), "near", "far", lab.Path{Delay: trip / 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { line.Close() })
	rounds := func(name string, size int, goal float64) transfer.Blob {
		_, blob := g.blob(t, size, holder)
		took := reads(t, here, blob, 1)
		row("first_byte_"+name, float64(took)/float64(trip), "round trips", goal)
		whole, err := here.Fetch(t.Context(), blob)
		if err == nil {
			err = whole.Wait(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
		return blob
	}
	rounds("connecting", 8<<20+1, 0)
	var blob transfer.Blob
	for i := range 3 {
		blob = rounds("connected", 8<<20+2+i, 2.5) // with half of one for the first piece
	}
	var hits, misses []float64
	for range 20 {
		hits = append(hits, reads(t, here, blob, 1).Seconds()*1000)
	}
	row("local_hit", median(hits), "ms", 5)
	for i := range 5 {
		absent := blob
		absent.Digest = digest.FromString(fmt.Sprint(i))
		began := time.Now()
		missing, err := here.Fetch(t.Context(), absent)
		if err != nil {
			t.Fatal(err)
		}
		if err := missing.Wait(t.Context()); !errors.Is(err, transfer.ErrNoHolder) {
			t.Fatal(err)
		}
		misses = append(misses, (time.Since(began)-trip).Seconds()*1000)
	}
	row("miss_decided_over_a_round_trip", median(misses), "ms", 50)
}

// A client reads through a node that has nothing, and directly at the holder, whose uplink
// is the limit; once with a node whose own is not, and once with one whose own is as slow,
// so that what it asks for and acknowledges stands behind what it sends to the client.
func TestThroughANode(t *testing.T) {
	g := newGround(t, 2_000_000)
	var f fleet
	holder, equal := f.add(t, g, "s"), f.add(t, g, "s")
	g.rate = 0
	near := f.add(t, g, "s")
	client, err := g.Host(t.Context(), "client", "s", "10.77.0.99/24")
	if err != nil {
		t.Fatal(err)
	}
	read := func(n *node, blob transfer.Blob) float64 {
		var ln net.Listener
		if err := n.host.Inside(func() error {
			ln, err = net.Listen("tcp", n.host.IP+":7001")
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(func() {
			conn, err := ln.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			fetch, err := n.Fetch(t.Context(), blob, transfer.ReadFrom(0))
			if err != nil {
				t.Error(err)
				return
			}
			r := fetch.Reader(t.Context())
			defer r.Close()
			if _, err := io.Copy(conn, r); err != nil {
				t.Error(err)
			}
		})
		began := time.Now()
		conn, err := client.Dial(t.Context(), "tcp", n.host.IP+":7001")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if got, err := io.Copy(io.Discard, conn); err != nil || got != blob.Size {
			t.Fatalf("%d bytes, %v", got, err)
		}
		return time.Since(began).Seconds()
	}
	var through, slow []float64
	for i := range 3 {
		_, blob := g.blob(t, *mib<<20+i, holder)
		direct := read(holder, blob)
		f = fleet{holder, near} // they know of nobody else
		through = append(through, read(near, blob)/direct)
		f = fleet{holder, equal}
		slow = append(slow, read(equal, blob)/direct)
	}
	row("through_a_node", median(through), "x directly", 1.05)
	row("through_a_node_with_a_full_uplink", median(slow), "x directly", 1.05)
}

// used is the processor time of this process so far.
func used() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // cannot fail with these arguments
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// The processor time of both ends beside that of a bare TLS connection.
func TestProcessorTime(t *testing.T) {
	g := newGround(t, 0)
	var f fleet
	holder, here := f.add(t, g, "s"), f.add(t, g, "s")
	var bare, hashed, ours []float64
	gib := float64(*mib) / 1024
	for i := range 5 {
		content, blob := g.blob(t, *mib<<20+i, holder)
		before := used()
		bareCopy(t, g, f, content, false)
		bare = append(bare, (used()-before).Seconds()/gib)
		before = used()
		bareCopy(t, g, f, content, true)
		hashed = append(hashed, (used()-before).Seconds()/gib)
		before = used()
		fetch, err := here.Fetch(t.Context(), blob)
		if err == nil {
			err = fetch.Wait(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
		ours = append(ours, (used()-before).Seconds()/gib)
	}
	row("bulk_cpu", median(ours), "cpu-s/GiB, both ends", 0)
	row("bulk_cpu_tls", median(bare), "cpu-s/GiB, both ends", 0)
	row("bulk_cpu_tls_and_hashes", median(hashed), "cpu-s/GiB, both ends", 0)
	row("bulk_cpu_over_tls", median(ours)/median(bare), "x", 0)
	row("bulk_cpu_ratio", median(ours)/median(hashed), "x TLS and the two hashes", 1.15)
}

// bareCopy moves content over one TLS connection into memory; with hash it is verified
// twice as it has to be: by pieces when they come, and as a whole in the end.
func bareCopy(t *testing.T, g ground, f fleet, content []byte, hash bool) {
	t.Helper()
	cert := g.site.Node(t, "bare")
	var ln net.Listener
	err := f[0].host.Inside(func() (err error) {
		ln, err = net.Listen("tcp", f[0].host.IP+":7002")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		raw, err := ln.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		conn := tls.Server(raw, &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}})
		defer conn.Close()
		buf := make([]byte, transfer.PieceSize)
		for from := content; len(from) > 0; {
			n := copy(buf, from) // as from a file
			from = from[n:]
			if _, err := conn.Write(buf[:n]); err != nil {
				t.Error(err)
				return
			}
		}
	})
	raw, err := f[1].host.Dial(t.Context(), "tcp", f[0].host.IP+":7002")
	if err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(raw, &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true}) // the floor proves nobody's name
	defer conn.Close()
	got, buf := make([]byte, len(content)), make([]byte, transfer.PieceSize)
	for off := 0; off < len(got); {
		piece := buf[:min(transfer.PieceSize, len(got)-off)]
		if _, err := io.ReadFull(conn, piece); err != nil {
			t.Fatal(err)
		}
		if hash {
			sha256.Sum256(piece)
		}
		off += copy(got[off:], piece) // as to a file
	}
	if hash {
		sha256.Sum256(got)
	}
}

// many are blobs that are held.
type many map[digest.Digest]int64

func (m many) Open(_ context.Context, d digest.Digest) (transfer.Content, error) {
	if _, ok := m[d]; ok {
		return transfertest.Bytes([]byte(d)), nil
	}
	return nil, transfer.ErrNotHeld
}

func (m many) Pieces(context.Context, digest.Digest) (transfer.PieceTable, error) {
	return transfer.PieceTable{}, transfer.ErrNotHeld
}

// What is held and offered costs nothing until somebody asks.
func TestMemoryOfWhatIsHeld(t *testing.T) {
	held := many{}
	for i := range 50_000 {
		held[digest.FromString(fmt.Sprint(i))] = int64(i)
	}
	heap := func() float64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc) / 1e6
	}
	before := heap()
	e, err := stream.New(stream.Config{Source: held, Sink: transfertest.NewStore(), Peers: others{&fleet{}, nil}, Dial: func(context.Context, string) (net.Conn, error) {
		return nil, net.ErrClosed
	}})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = e.Serve(ctx, ln) })
	wg.Go(func() { _ = e.Run(ctx) })
	growth := heap() - before
	row("offered_50000_blobs", max(0, growth), "MB", 5)
	if growth > 5 {
		t.Errorf("50,000 blobs that are held cost %.1f MB", growth)
	}
	cancel()
	wg.Wait()
	runtime.KeepAlive(held)
}
