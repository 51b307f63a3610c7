package swarm

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// toll is a Limiter that lets bytes pass only every so often, and a Meter.
type toll struct {
	every time.Duration

	mu       sync.Mutex
	next     time.Time
	passed   int64
	classes  map[transfer.Class]int64 // bytes sent by class
	received map[transfer.Class]int64
}

func (l *toll) Take(_ transfer.Flow, n int) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if wait := l.next.Sub(now); wait > 0 {
		return wait
	}
	l.next = now.Add(l.every)
	l.passed += int64(n)
	return 0
}

func (l *toll) Sent(f transfer.Flow, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.classes[f.Class] += int64(n)
}

func (l *toll) Received(f transfer.Flow, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.received[f.Class] += int64(n)
}

func (l *toll) sentBytes() (n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, bytes := range l.classes {
		n += bytes
	}
	return n
}

func newToll(every time.Duration) *toll {
	return &toll{every: every, classes: make(map[transfer.Class]int64), received: make(map[transfer.Class]int64)}
}

// What comes in and what goes out passes the limiters, byte for byte, and is counted by
// what the wanter wants it for. Nobody is to blame for what a limiter holds back, though
// it takes longer than a stall.
func TestLimitsAndClasses(t *testing.T) {
	content := tide(2*transfer.PieceSize + 7)
	b, _ := blobOf(t, content)
	for name, out := range map[string]bool{"out": true, "in": false} {
		t.Run(name, func(t *testing.T) {
			slow, count := newToll(900*time.Millisecond), newToll(0)
			w := &wire{at: make(map[string]func(string, net.Conn)), stall: 500 * time.Millisecond}
			w.config = func(c *Config) {
				c.Meter = count
				switch {
				case out && c.Node == "from":
					c.Limiter = slow
				case !out && c.Node == "to":
					c.Incoming = slow
				}
			}
			held, store := transfertest.NewStore(), transfertest.NewStore()
			held.Put(content)
			w.engine(t, "from", held)
			to := w.engine(t, "to", store, "from")
			ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
			defer cancel()
			if err := to.fetchFor(ctx, store, b, transfer.Repair); err != nil {
				t.Fatal(err)
			}
			to.mu.Lock()
			defer to.mu.Unlock()
			if len(to.drops) > 0 {
				t.Errorf("dropped: %v", to.drops)
			}
			// The holder counts what it has sent, which may be here before.
			for tick := time.NewTicker(time.Millisecond); count.sentBytes() < b.Size && ctx.Err() == nil; {
				<-tick.C
			}
			for _, l := range []*toll{slow, count} {
				l.mu.Lock()
				defer l.mu.Unlock()
			}
			if slow.passed != b.Size {
				t.Errorf("the limiter let %d of %d bytes pass", slow.passed, b.Size)
			}
			if got := count.classes[transfer.Repair]; got != b.Size || len(count.classes) != 1 {
				t.Errorf("sent by class: %v of %d bytes", count.classes, b.Size)
			}
			if got := count.received[transfer.Repair]; got != b.Size || len(count.received) != 1 {
				t.Errorf("received by class: %v of %d bytes", count.received, b.Size)
			}
		})
	}
}

// disk is where a node keeps blobs.
type disk interface {
	transfer.Source
	transfer.Sink
}

// lateDisk takes so long for each piece.
type lateDisk struct {
	*transfertest.Store
	takes time.Duration
}

type latePartial struct {
	transfer.Partial
	takes time.Duration
}

func (d lateDisk) Create(ctx context.Context, b transfer.Blob) (transfer.Partial, error) {
	p, err := d.Store.Create(ctx, b)
	return latePartial{p, d.takes}, err
}

func (p latePartial) WriteAt(b []byte, off int64) (int, error) {
	<-time.After(p.takes)
	return p.Partial.WriteAt(b, off)
}

// While this node's own disk is late, as for a sync, nothing is read, and the holder is
// not to blame.
func TestALateDiskIsNobodysStall(t *testing.T) {
	content := tide(6*transfer.PieceSize + 7)
	b, _ := blobOf(t, content)
	w := &wire{at: make(map[string]func(string, net.Conn)), stall: 500 * time.Millisecond}
	held, store := transfertest.NewStore(), transfertest.NewStore()
	held.Put(content)
	w.engine(t, "from", held)
	to := w.engine(t, "to", store, "from")
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if err := to.fetchFor(ctx, lateDisk{store, 1200 * time.Millisecond}, b, transfer.Pull); err != nil {
		t.Fatal(err)
	}
	to.mu.Lock()
	defer to.mu.Unlock()
	if len(to.drops) > 0 {
		t.Errorf("dropped: %v", to.drops)
	}
}

// gate lets pulls pass, and says when anything else has asked.
type gate struct {
	once  sync.Once
	asked chan transfer.Class
}

func (g *gate) Take(f transfer.Flow, _ int) time.Duration {
	if f.Class == transfer.Pull {
		return 0
	}
	g.once.Do(func() { g.asked <- f.Class })
	return time.Millisecond
}

// When somebody asks for what was only prefetched, the holder hears of it on the
// connections that there are, and sends it as a pull from then on.
func TestTheHolderHearsOfAnotherClass(t *testing.T) {
	content := tide(4 * transfer.PieceSize)
	b, _ := blobOf(t, content)
	g := &gate{asked: make(chan transfer.Class, 1)}
	w := &wire{at: make(map[string]func(string, net.Conn)), stall: 2 * time.Second}
	w.config = func(c *Config) {
		if c.Node == "from" {
			c.Limiter = g
		}
	}
	held, store := transfertest.NewStore(), transfertest.NewStore()
	held.Put(content)
	w.engine(t, "from", held)
	to := w.engine(t, "to", store, "from")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- to.fetchFor(ctx, store, b, transfer.Prefetch) }()
	select {
	case c := <-g.asked:
		if c != transfer.Prefetch {
			t.Errorf("it is asked for as %s", c)
		}
	case err := <-done:
		t.Fatalf("ended before it was let go: %v", err)
	}
	a, ok := to.cfg.Arriving(b.Digest)
	if !ok {
		t.Fatal("it is not arriving")
	}
	a.Urge(transfer.Pull)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// sluice lets so many bytes pass.
type sluice struct {
	mu         sync.Mutex
	most, took int64
}

func (s *sluice) Take(_ transfer.Flow, n int) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.took+int64(n) > s.most {
		return time.Millisecond
	}
	s.took += int64(n)
	return 0
}

// Of a peer whose bytes have to wait for a limit here little is asked at once, so that
// little is on the way; what was asked for before is taken back.
func TestLittleIsAskedUnderALimit(t *testing.T) {
	content := tide(64 * transfer.PieceSize)
	b, _ := blobOf(t, content)
	in := &sluice{most: 24 * transfer.PieceSize}
	w := &wire{at: make(map[string]func(string, net.Conn)), stall: 10 * time.Second}
	w.config = func(c *Config) {
		if c.Node == "to" {
			c.Incoming = in
		}
	}
	held, store := transfertest.NewStore(), transfertest.NewStore()
	held.Put(content)
	w.engine(t, "from", held)
	to := w.engine(t, "to", store, "from")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- to.fetch(ctx, store, b) }()
	// onTheWay is how many pieces the peer is still to send.
	onTheWay := func() int {
		to.Engine.mu.Lock()
		s := to.swarms[Infohash(b)]
		to.Engine.mu.Unlock()
		if s == nil || s.want.Load() == nil {
			return 0
		}
		pieces := map[uint32]bool{}
		for _, tap := range s.all() {
			tap.mu.Lock()
			for c, cancelled := range tap.asks {
				if !cancelled {
					pieces[c.piece] = true
				}
			}
			tap.mu.Unlock()
		}
		return len(pieces)
	}
	held24 := func() bool {
		in.mu.Lock()
		defer in.mu.Unlock()
		return in.took == in.most
	}
	for tick := time.NewTicker(time.Millisecond); !held24() || onTheWay() > minWindow+1; <-tick.C {
		if ctx.Err() != nil {
			t.Fatalf("%d pieces are on their way at once", onTheWay())
		}
	}
	in.mu.Lock()
	in.most = 1 << 40
	in.mu.Unlock()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// The library asks for nothing: by itself it looks at 64 MiB of wanted pieces and no
// further, and asks for as much at once as its own counters allow. A blob that is larger
// comes as the plan asks for it.
func TestTheLibraryAsksForNothing(t *testing.T) {
	content := tide(66 << 20)
	b, _ := blobOf(t, content)
	in := &sluice{}
	w := &wire{at: make(map[string]func(string, net.Conn)), stall: 5 * time.Second}
	w.config = func(c *Config) {
		if c.Node == "to" {
			c.Incoming = in
		}
	}
	held, store := transfertest.NewStore(), transfertest.NewStore()
	held.Put(content)
	w.engine(t, "from", held)
	to := w.engine(t, "to", store, "from")
	ctx, cancel := context.WithTimeout(t.Context(), 120*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- to.fetch(ctx, store, b) }()
	asking := func() *swarm {
		to.Engine.mu.Lock()
		s := to.swarms[Infohash(b)]
		to.Engine.mu.Unlock()
		if s == nil {
			return nil
		}
		for _, tap := range s.all() {
			tap.mu.Lock()
			n := len(tap.asks)
			tap.mu.Unlock()
			if n > 0 {
				return s
			}
		}
		return nil
	}
	s := asking()
	for tick := time.NewTicker(time.Millisecond); s == nil; s = asking() {
		select {
		case <-tick.C:
		case err := <-done:
			t.Fatalf("ended before anything was asked for: %v", err)
		}
	}
	in.mu.Lock()
	in.most = 1 << 40
	in.mu.Unlock()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if stats := s.torrent.Stats(); stats.BytesReadData.Int64() != 0 {
		t.Errorf("%d bytes of pieces have come through the library", stats.BytesReadData.Int64())
	}
}

// cut is a connection that breaks after so many bytes were written to it.
type cut struct {
	net.Conn
	left int
}

func (c *cut) Write(p []byte) (int, error) {
	if len(p) <= c.left {
		c.left -= len(p)
		return c.Conn.Write(p)
	}
	n, _ := c.Conn.Write(p[:c.left])
	c.left = 0
	c.Conn.Close()
	return n, net.ErrClosed
}

// A piece whose second half does not come is forgotten: its memory is free for others,
// and nobody is blamed when the rest comes from somebody else.
func TestHalfAPieceIsForgotten(t *testing.T) {
	content := tide(3 * transfer.PieceSize)
	b, _ := blobOf(t, content)
	w := &wire{at: make(map[string]func(string, net.Conn))}
	held := transfertest.NewStore()
	held.Put(content)
	w.engine(t, "half", held)
	accept := w.at["half"]
	w.at["half"] = func(from string, c net.Conn) { accept(from, &cut{c, chunkSize + 4096}) }
	alone := w.engine(t, "alone", transfertest.NewStore(), "half")
	if err := alone.fetch(t.Context(), transfertest.NewStore(), b); err == nil {
		t.Error("the blob came from a holder that sends half a piece at most")
	}
	if n, _ := alone.cfg.Pieces.Use(); n != 0 {
		t.Errorf("%d pieces still have memory", n)
	}
	if n, _ := alone.Torrents(); n != 0 {
		t.Error("the torrent of a failed fetch is kept")
	}

	w.engine(t, "honest", held)
	store := transfertest.NewStore()
	to := w.engine(t, "to", store, "half", "honest")
	if err := to.fetch(t.Context(), store, b); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(store.Bytes(b.Digest), content) {
		t.Error("another blob arrived")
	}
	to.mu.Lock()
	defer to.mu.Unlock()
	for peer, why := range to.drops {
		if why.Lie() {
			t.Errorf("%s dropped for %s", peer, why)
		}
	}
	if n, _ := to.cfg.Pieces.Use(); n != 0 {
		t.Errorf("%d pieces still have memory", n)
	}
}

// A holder of which several want a blob at once chooses what it sends to whom, and so it
// sends little more than one copy of all; its peers have the rest from each other.
func TestTheHolderChooses(t *testing.T) {
	const wanters, pieces = 4, 48
	content := make([]byte, pieces*transfer.PieceSize-5)
	rand.NewChaCha8([32]byte{7}).Read(content)
	b, _ := blobOf(t, content)
	w := &wire{at: make(map[string]func(string, net.Conn)), stall: 30 * time.Second, lines: make(map[string]*uplink)}
	names := []string{"source"}
	for i := range wanters {
		names = append(names, fmt.Sprintf("node-%d", i))
	}
	rigs, stores := make(map[string]*rig), make(map[string]*transfertest.Store)
	for _, name := range names {
		w.lines[name] = newUplink(6 << 20)
		stores[name] = transfertest.NewStore()
		if name == "source" {
			stores[name].Put(content)
		}
		others := slices.DeleteFunc(slices.Clone(names), func(o string) bool { return o == name })
		rigs[name] = w.engine(t, name, stores[name], others...)
	}
	var wg sync.WaitGroup
	for _, name := range names[1:] {
		wg.Go(func() {
			if err := rigs[name].fetch(t.Context(), stores[name], b); err != nil || !bytes.Equal(stores[name].Bytes(b.Digest), content) {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	wg.Wait()
	all := int64(0)
	for _, l := range w.lines {
		l.mu.Lock()
		all += l.sent
		l.mu.Unlock()
	}
	if copies := float64(w.lines["source"].sent) / float64(b.Size); copies > 1.5 {
		t.Errorf("the source sent %.2f copies", copies)
	}
	if over := float64(all) / float64(wanters*b.Size); over > 1.15 {
		t.Errorf("all sent %.2f times what was wanted", over)
	}
}
