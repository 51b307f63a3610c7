package peernet_test

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// wall is an address that a firewall guards: nobody gets an answer, over TCP or UDP.
func wall(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	packets, err := net.ListenPacket("udp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close(); packets.Close() })
	return ln.Addr().String()
}

// roll is the members of a site, which may change.
type roll struct {
	mu  sync.Mutex
	all []peernet.Peer
}

func (r *roll) set(all ...peernet.Peer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = all
}

func (r *roll) list() ([]peernet.Peer, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.all), nil
}

// node opens a node of a site whose members are on the roll; change may be nil.
func (r *roll) node(t *testing.T, s *transfertest.Site, id string, change func(id string, cfg *peernet.Config)) *port {
	t.Helper()
	cfg := config(t, s, id)
	cfg.Peers = r.list
	if change != nil {
		change(id, &cfg)
	}
	return open(t, cfg)
}

// walled is a site of an open node and one behind a firewall, which has parked a
// connection.
type walled struct {
	site       *transfertest.Site
	open, shut *port
	addr       string // at which the others would dial the one that is shut
	roll       *roll
}

func newWalled(t *testing.T, change func(id string, cfg *peernet.Config)) *walled {
	t.Helper()
	s := transfertest.NewSite(t, "site-a")
	w := &walled{site: s, addr: wall(t), roll: &roll{}}
	w.open = w.roll.node(t, s, "open", change)
	w.roll.set(peernet.Peer{ID: "open", Addr: w.open.addr}, peernet.Peer{ID: "shut", Addr: w.addr})
	w.shut = w.roll.node(t, s, "shut", change)
	waitFor(t, "a connection to be parked", func() bool { return w.shut.Parked(w.open.addr) && w.open.CalledBack(w.addr) })
	return w
}

// A node that cannot be dialled serves over what it dials, and the ends know each
// other as if it had been dialled.
func TestCalledBack(t *testing.T) {
	t.Parallel()
	overBoth(t, testCalledBack)
}

func testCalledBack(t *testing.T) {
	t.Parallel()
	var asked atomic.Int32
	w := newWalled(t, func(id string, cfg *peernet.Config) {
		cfg.Authorize = func(peer string, service byte) error {
			if id == "shut" && peer == "open" && service == peernet.ServiceControl {
				asked.Add(1)
				return errors.New("not this one")
			}
			return nil
		}
	})
	ids := echo(t, w.shut.Listen(peernet.ServiceBlob))
	echo(t, w.shut.Listen(peernet.ServiceControl))
	for range 3 {
		begun := time.Now()
		c, err := w.open.Dial(within(t), w.addr, peernet.ServiceBlob)
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun); took > 2*time.Second {
			t.Errorf("a call took %v", took)
		}
		says(t, c, "hello")
		if got := c.(*peernet.Conn); got.PeerID() != "shut" || got.SiteID() != "site-a" || got.Service() != peernet.ServiceBlob {
			t.Errorf("dialled %q of %q for %d", got.PeerID(), got.SiteID(), got.Service())
		}
		if got := <-ids; got != "open" {
			t.Errorf("accepted %q", got)
		}
		c.Close()
	}
	for _, by := range []peernet.Carrier{peernet.TCP, peernet.QUIC} { // whichever is asked for
		c, err := w.open.DialBy(within(t), w.addr, peernet.ServiceBlob, by)
		if err != nil {
			t.Fatal(err)
		}
		says(t, c, "hello")
		<-ids
		c.Close()
	}
	// What may not be dialled may not be called for either, and both ends say so at once.
	if _, err := w.open.Dial(within(t), w.addr, peernet.ServiceControl); !errors.Is(err, peernet.ErrRefused) || asked.Load() == 0 {
		t.Errorf("error is %v", err)
	}
	if _, err := w.open.Dial(within(t), w.addr, 0xee); !errors.Is(err, peernet.ErrNoService) {
		t.Errorf("error is %v", err)
	}
	if c, err := w.open.Dial(within(t), w.addr, peernet.ServiceBlob); err != nil {
		t.Errorf("after calls that were refused: %v", err)
	} else {
		c.Close()
	}
}

// Many at once, more than may be out over one connection.
func TestManyCalls(t *testing.T) {
	t.Parallel()
	overBoth(t, testManyCalls)
}

func testManyCalls(t *testing.T) {
	t.Parallel()
	w := newWalled(t, nil)
	ids := echo(t, w.shut.Listen(peernet.ServiceBlob))
	go func() {
		for range 80 {
			<-ids
		}
	}()
	var wg sync.WaitGroup
	for range 80 {
		wg.Go(func() {
			c, err := w.open.Dial(within(t), w.addr, peernet.ServiceBlob)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			if _, err := io.WriteString(c, "x"); err != nil {
				t.Error(err)
			}
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// Epochs are told and judged on a call as on a dial.
func TestCallsKnowEpochs(t *testing.T) {
	t.Parallel()
	overBoth(t, testCallsKnowEpochs)
}

func testCallsKnowEpochs(t *testing.T) {
	t.Parallel()
	var later atomic.Bool
	w := newWalled(t, func(id string, cfg *peernet.Config) {
		cfg.Epoch = func() string { return "1" }
		cfg.Meet = func(peer, epoch string) error {
			if epoch != "1" || id == "shut" && later.Load() {
				return errors.New("another epoch")
			}
			return nil
		}
	})
	echo(t, w.shut.Listen(peernet.ServiceRaft))
	c, err := w.open.Dial(within(t), w.addr, peernet.ServiceRaft)
	if err != nil {
		t.Fatal(err)
	}
	says(t, c, "hello")
	c.Close()
	later.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if c, err := w.open.Dial(ctx, w.addr, peernet.ServiceRaft); err == nil {
		c.Close()
		t.Error("a node of another epoch is served")
	}
}

// A restart of the one that calls, and of the one that is called, costs a moment.
func TestParkedAnew(t *testing.T) {
	t.Parallel()
	overBoth(t, testParkedAnew)
}

func testParkedAnew(t *testing.T) {
	t.Parallel()
	w := newWalled(t, nil)
	echo(t, w.shut.Listen(peernet.ServiceBlob))
	w.open.Drop("shut") // as good as a break
	waitFor(t, "a connection to be parked anew", func() bool { return w.open.CalledBack(w.addr) && w.shut.Parked(w.open.addr) })
	c, err := w.open.Dial(within(t), w.addr, peernet.ServiceBlob)
	if err != nil {
		t.Fatal(err)
	}
	says(t, c, "hello")
	// The end of the one that dialled takes with it what it serves.
	if err := w.shut.stop(); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(deadline))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("after the end: %v", err)
	}
	waitFor(t, "the parked connection to be gone", func() bool { return !w.open.CalledBack(w.addr) })
}

// Who is no member any more has nothing parked, and what it was served ends.
func TestRemovedIsNotCalled(t *testing.T) {
	t.Parallel()
	overBoth(t, testRemovedIsNotCalled)
}

func testRemovedIsNotCalled(t *testing.T) {
	t.Parallel()
	var removed atomic.Bool
	w := newWalled(t, func(_ string, cfg *peernet.Config) {
		cfg.Authorize = func(string, byte) error {
			if removed.Load() {
				return errors.New("removed")
			}
			return nil
		}
	})
	echo(t, w.shut.Listen(peernet.ServiceBlob))
	c, err := w.open.Dial(within(t), w.addr, peernet.ServiceBlob)
	if err != nil {
		t.Fatal(err)
	}
	says(t, c, "hello")
	removed.Store(true)
	// The one that serves lets go of its caller as it would of one that had dialled.
	w.shut.Drop("open")
	_ = c.SetReadDeadline(time.Now().Add(deadline))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("after Drop: %v", err)
	}
	waitFor(t, "nothing to be parked", func() bool { return !w.open.CalledBack(w.addr) && !w.shut.Parked(w.open.addr) })
	removed.Store(false)
	waitFor(t, "a connection to be parked", func() bool { return w.open.CalledBack(w.addr) })
	w.roll.set(peernet.Peer{ID: "open", Addr: w.open.addr}) // its row is gone
	waitFor(t, "nothing to be parked", func() bool { return peernet.ParkedHere(w.open.Net) == 0 })
}

// Many nodes that can dial each other keep nothing parked.
func TestNothingIsParkedWithoutNeed(t *testing.T) {
	t.Parallel()
	overBoth(t, testNothingIsParkedWithoutNeed)
}

func testNothingIsParkedWithoutNeed(t *testing.T) {
	t.Parallel()
	s := transfertest.NewSite(t, "site-a")
	r := &roll{}
	make := func(id string) (*port, *atomic.Int32) {
		tried := &atomic.Int32{}
		p := r.node(t, s, id, func(_ string, cfg *peernet.Config) {
			cfg.Authorize = func(_ string, service byte) error {
				if service == peernet.ServiceBack {
					tried.Add(1)
				}
				return nil
			}
		})
		peernet.Few(p.Net, 1)
		return p, tried
	}
	a, triedA := make("node-a")
	b, triedB := make("node-b")
	r.set(peernet.Peer{ID: "node-a", Addr: a.addr}, peernet.Peer{ID: "node-b", Addr: b.addr})
	idle := func() bool {
		return triedA.Load() > 0 && triedB.Load() > 0 && peernet.ParkedHere(a.Net)+peernet.ParkedHere(b.Net) == 0 && !a.Parked(b.addr) && !b.Parked(a.addr)
	}
	waitFor(t, "both to have found out", idle)
	echo(t, b.Listen(peernet.ServiceBlob))
	c, err := a.Dial(within(t), b.addr, peernet.ServiceBlob)
	if err != nil {
		t.Fatal(err)
	}
	says(t, c, "hello")
	c.Close()
	waitFor(t, "nothing to be parked", idle)
	if n := triedA.Load() + triedB.Load(); n > 8 {
		t.Errorf("they asked each other %d times", n)
	}
}

// Lies about parking: a stranger cannot, a nonce is worth nothing to another peer, and
// who says nonsense loses its connection.
func TestHostileCallbacks(t *testing.T) {
	t.Parallel()
	overBoth(t, testHostileCallbacks)
}

func testHostileCallbacks(t *testing.T) {
	t.Parallel()
	w := newWalled(t, func(_ string, cfg *peernet.Config) {
		cfg.Authorize = func(peer string, _ byte) error {
			if peer == "gone" {
				return errors.New("removed")
			}
			return nil
		}
	})
	s := w.open
	ends := func(name string, cfg peernet.Config, said string) {
		t.Helper()
		n, err := peernet.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		c, err := n.Dial(within(t), s.addr, peernet.ServiceBack)
		if err != nil {
			if name != "removed" {
				t.Errorf("%s: %v", name, err)
			}
			return
		}
		defer c.Close()
		if _, err := io.WriteString(c, said); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		_ = c.SetReadDeadline(time.Now().Add(deadline))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", name, err)
		}
	}
	cfg := func(id string) peernet.Config { return config(t, w.site, id) }
	ends("no member", cfg("nobody"), "p01234567")
	ends("removed", cfg("gone"), "p01234567")
	ends("an invented nonce", cfg("shut"), "c0123456789abcdef")
	ends("nonsense", cfg("shut"), "x")
	ends("silence", cfg("shut"), "")
	if !w.open.CalledBack(w.addr) {
		t.Error("lies of others ended what was parked")
	}
}

// A node that has just joined knows one other, and not yet the one that wants to call it.
func TestToldWhereToPark(t *testing.T) {
	t.Parallel()
	overBoth(t, testToldWhereToPark)
}

func testToldWhereToPark(t *testing.T) {
	t.Parallel()
	s := transfertest.NewSite(t, "site-a")
	r, addr := &roll{}, wall(t)
	first, leader := r.node(t, s, "first", nil), r.node(t, s, "leader", nil)
	r.set(peernet.Peer{ID: "first", Addr: first.addr}, peernet.Peer{ID: "leader", Addr: leader.addr}, peernet.Peer{ID: "shut", Addr: addr})
	shut := r.node(t, s, "shut", func(_ string, cfg *peernet.Config) {
		cfg.Peers = func() ([]peernet.Peer, error) { return []peernet.Peer{{Addr: first.addr}}, nil }
	})
	echo(t, shut.Listen(peernet.ServiceRaft))
	waitFor(t, "a connection to be parked at a node that was told of", func() bool { return leader.CalledBack(addr) })
	c, err := leader.Dial(within(t), addr, peernet.ServiceRaft)
	if err != nil {
		t.Fatal(err)
	}
	says(t, c, "hello")
	c.Close()
}

// A firewall that comes while nodes run, and lets go on what is open: the first Dial that
// it swallows is carried by a call.
func TestWallThatComes(t *testing.T) {
	t.Parallel()
	overBoth(t, testWallThatComes)
}

func testWallThatComes(t *testing.T) {
	t.Parallel()
	s := transfertest.NewSite(t, "site-a")
	r, addr := &roll{}, wall(t)
	a, b := r.node(t, s, "node-a", nil), r.node(t, s, "node-b", nil)
	r.set(peernet.Peer{ID: "node-a", Addr: a.addr}, peernet.Peer{ID: "node-b", Addr: b.addr})
	echo(t, b.Listen(peernet.ServiceBlob))
	waitFor(t, "both to have parked", func() bool { return a.Parked(b.addr) && b.Parked(a.addr) })
	if a.CalledBack(b.addr) {
		t.Error("a node that can be dialled is called")
	}
	// As a firewall would: b's parked connection stays, and who dials b gets no answer.
	r.set(peernet.Peer{ID: "node-a", Addr: a.addr}, peernet.Peer{ID: "node-b", Addr: addr})
	var c net.Conn
	waitFor(t, "the node to be called", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		var err error
		c, err = a.Dial(ctx, addr, peernet.ServiceBlob)
		return err == nil
	})
	says(t, c, "hello")
	c.Close()
	if !a.CalledBack(addr) {
		t.Error("the next one dials in vain again")
	}
}
