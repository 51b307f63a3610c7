package stream

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/plan"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// crowd is nodes that all know each other, over plain connections that say who dials.
type crowd struct {
	t     *testing.T
	nodes []*one
}

// one is a node of a crowd.
type one struct {
	*Engine
	peer  transfer.Peer
	store *transfertest.Store
	stop  func()

	mu       sync.Mutex
	sent     int64
	received map[string]int64
	classes  map[transfer.Class]int
	hold     func(f transfer.Flow, n int) time.Duration
}

// named is a connection that says who is at the other end.
type named struct {
	net.Conn
	id string
}

func (n named) PeerID() string { return n.id }

// naming reads the dialler's name first.
type naming struct{ net.Listener }

func (l naming) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	var id [2]byte
	if _, err := io.ReadFull(c, id[:]); err != nil {
		return nil, err
	}
	return named{c, string(id[:])}, nil
}

// Take and the others make one a limiter and a meter.
func (n *one) Take(f transfer.Flow, bytes int) time.Duration {
	n.mu.Lock()
	hold := n.hold
	n.mu.Unlock()
	if hold == nil {
		return 0
	}
	return hold(f, bytes)
}

func (n *one) Sent(f transfer.Flow, bytes int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sent += int64(bytes)
	n.classes[f.Class]++
}

// out is how much it has sent.
func (n *one) out() int64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.sent
}

func (n *one) Received(f transfer.Flow, bytes int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.received[f.Peer] += int64(bytes)
}

// add starts a node.
func (c *crowd) add(id string, change func(*Config)) *one {
	c.t.Helper()
	n := &one{store: transfertest.NewStore(), received: map[string]int64{}, classes: map[transfer.Class]int{}}
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(c.t.Context())
	n.stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
	})
	n.Engine = mover(c.t, n.store, others{c, n}, func(cfg *Config) {
		cfg.Self, cfg.Limiter, cfg.Meter = id, n, n
		cfg.StallTimeout = 10 * time.Second
		dial := cfg.Dial
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			conn, err := dial(ctx, addr)
			if err == nil {
				_, err = io.WriteString(conn, id)
			}
			return conn, err
		}
		if change != nil {
			change(cfg)
		}
	})
	n.peer = listening(c.t, id, func(_ context.Context, ln net.Listener) {
		wg.Go(func() { _ = n.Serve(ctx, naming{ln}) })
		wg.Wait()
	})
	c.nodes = append(c.nodes, n)
	return n
}

// others are the rest of the crowd.
type others struct {
	c *crowd
	n *one
}

func (o others) Candidates(context.Context, digest.Digest) []transfer.Peer {
	var list []transfer.Peer
	for _, n := range o.c.nodes {
		if n != o.n {
			list = append(list, n.peer)
		}
	}
	return list
}

func random(size int) ([]byte, transfer.Blob) {
	content := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(size)}).Read(content)
	table, _ := transfer.HashPieces(bytes.NewReader(content), int64(size))
	return content, transfer.Blob{Digest: digest.FromBytes(content), Size: int64(size), Root: table.Root()}
}

// fetchAll has the nodes fetch a blob at once.
func fetchAll(t *testing.T, nodes []*one, blob transfer.Blob) {
	t.Helper()
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() {
			f, err := n.Fetch(t.Context(), blob)
			if err == nil {
				err = f.Wait(t.Context())
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// paced makes a limiter that lets a rate of bytes a second out: an uplink.
func paced(rate float64) func(transfer.Flow, int) time.Duration {
	began, out := time.Now(), 0.0
	return func(_ transfer.Flow, n int) time.Duration {
		if ahead := time.Duration(out/rate*float64(time.Second)) - time.Since(began); ahead > 0 {
			return ahead
		}
		out = max(out, time.Since(began).Seconds()*rate-float64(n)) + float64(n)
		return 0
	}
}

// Eight nodes begin together: the one that holds the blob sends little more than one
// copy, the rest they get from each other.
func TestNodesThatBeginTogetherTrade(t *testing.T) {
	c := &crowd{t: t}
	content, blob := random(32 * transfer.PieceSize)
	source := c.add("00", nil)
	source.store.Put(content)
	for _, id := range []string{"01", "02", "03", "04", "05", "06", "07", "08"} {
		c.add(id, nil)
	}
	for _, n := range c.nodes {
		n.hold = paced(3 << 20)
	}
	fetchAll(t, c.nodes[1:], blob)
	all := int64(0)
	for _, n := range c.nodes {
		all += n.out()
	}
	t.Logf("the holder sent %.2f F, all sent %.2f N F", float64(source.out())/float64(blob.Size), float64(all)/float64(8*blob.Size))
	if source.out() > 3*blob.Size {
		t.Errorf("the holder sent %d bytes of a blob of %d", source.out(), blob.Size)
	}
	if all > 8*blob.Size*125/100 {
		t.Errorf("%d bytes for eight times %d", all, blob.Size)
	}
}

// Two sites, a holder in one: the blob crosses once, and the one that asked for the
// other site dies in the middle.
func TestOneOfASiteAsksBeyondTheLink(t *testing.T) {
	c := &crowd{t: t}
	content, blob := random(40 * transfer.PieceSize)
	far := func(cfg *Config) {
		self := cfg.Self
		cfg.Distance = func(p transfer.Peer) int {
			if (p.ID < "10") == (self < "10") {
				return 1
			}
			return Farthest
		}
	}
	source := c.add("00", far)
	source.store.Put(content)
	site := []*one{c.add("10", far), c.add("11", far), c.add("12", far)}
	source.hold = paced(2 << 20)
	elected := plan.Elect(blob.Digest.String(), []string{"10", "11", "12"})
	k := slices.IndexFunc(site, func(n *one) bool { return n.peer.ID == elected })
	var begun sync.WaitGroup
	begun.Go(func() {
		waitFor(t, "the elected node to have a third", func() bool {
			site[k].mu.Lock()
			defer site[k].mu.Unlock()
			return site[k].received["00"] > blob.Size/3
		})
		for i, n := range site {
			n.mu.Lock()
			if got := n.received["00"]; i != k && got > 6*transfer.PieceSize {
				t.Errorf("%s, which is not elected, got %d bytes from afar", n.peer.ID, got)
			}
			n.mu.Unlock()
		}
		site[k].stop()
	})
	rest := slices.Delete(slices.Clone(site), k, k+1)
	if _, err := site[k].Fetch(t.Context(), blob); err != nil {
		t.Fatal(err)
	}
	fetchAll(t, rest, blob)
	begun.Wait()
	t.Logf("the far holder sent %.2f F", float64(source.out())/float64(blob.Size))
	if source.out() > blob.Size*175/100 {
		t.Errorf("%d bytes crossed for a blob of %d", source.out(), blob.Size)
	}
}

// A reader that joins a fetch which nobody was in a hurry for gets its first bytes
// next, though all the rest was asked for before, and the fetch is as urgent as it.
func TestLateReadersOvertake(t *testing.T) {
	c := &crowd{t: t}
	content, blob := random(64 * transfer.PieceSize)
	source := c.add("00", nil)
	source.store.Put(content)
	to := c.add("01", nil)
	var out atomic.Int64
	gate := transfertest.NewGate()
	rest := transfertest.NewGate()
	source.hold = func(transfer.Flow, int) time.Duration {
		// Eight pieces, four more when the first gate is open, all when the second is.
		most := int64(8)
		select {
		case <-gate.Opened():
			most = 12
		default:
		}
		select {
		case <-rest.Opened():
			most = 1000
		default:
		}
		if out.Load() >= most {
			return time.Millisecond
		}
		out.Add(1)
		return 0
	}
	f, err := to.Fetch(t.Context(), blob, transfer.For(transfer.Repair))
	if err != nil {
		t.Fatal(err)
	}
	held, err := f.More(t.Context(), 7)
	if err != nil {
		t.Fatal(err)
	}
	at := 0
	for held.Has(at) || held.Has(at+1) {
		at++
	}
	if _, err := to.Fetch(t.Context(), blob); err != nil {
		t.Fatal(err)
	}
	r := f.Reader(t.Context())
	defer r.Close()
	if _, err := r.Seek(int64(at)*transfer.PieceSize, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	first := make(chan error, 1)
	go func() {
		_, err := io.ReadFull(r, make([]byte, 1))
		first <- err
	}()
	// The source knows of the reader before anything more goes out.
	waitFor(t, "the source to know", func() bool {
		source.desk.mu.Lock()
		defer source.desk.mu.Unlock()
		for s := range source.desk.offers[blob.Digest].sessions {
			if s.class == transfer.Pull && s.asker.Urgent() > 0 {
				return true
			}
		}
		return false
	})
	gate.Open()
	select {
	case err := <-first:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("four pieces came, and none of them was the one that the reader waits for")
	}
	rest.Open()
	if err := f.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	source.mu.Lock()
	defer source.mu.Unlock()
	if source.classes[transfer.Repair] == 0 || source.classes[transfer.Pull] == 0 {
		t.Errorf("went out as %v", source.classes)
	}
	to.mu.Lock()
	defer to.mu.Unlock()
	if got := to.received["00"]; got != blob.Size {
		t.Errorf("%d bytes were counted for a blob of %d", got, blob.Size)
	}
}
