package peernet_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// apart is a site of an open node and two behind firewalls of their own.
type apart struct {
	open, left, right   *port
	leftAddr, rightAddr string // at which nobody gets an answer
	passed              *prometheus.Registry
}

func newApart(t *testing.T, change func(id string, cfg *peernet.Config)) *apart {
	t.Helper()
	s := transfertest.NewSite(t, "site-a")
	a := &apart{leftAddr: wall(t), rightAddr: wall(t), passed: prometheus.NewRegistry()}
	r := &roll{}
	a.open = r.node(t, s, "open", func(id string, cfg *peernet.Config) {
		cfg.Registry = a.passed
		if change != nil {
			change(id, cfg)
		}
	})
	r.set(peernet.Peer{ID: "open", Addr: a.open.addr}, peernet.Peer{ID: "left", Addr: a.leftAddr}, peernet.Peer{ID: "right", Addr: a.rightAddr})
	a.left, a.right = r.node(t, s, "left", change), r.node(t, s, "right", change)
	waitFor(t, "both to be called", func() bool {
		return a.open.CalledBack(a.leftAddr) && a.open.CalledBack(a.rightAddr) && a.left.Parked(a.open.addr) && a.right.Parked(a.open.addr)
	})
	return a
}

func (a *apart) bytes(t *testing.T) float64 {
	t.Helper()
	all, err := a.passed.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if m.GetName() == "atoll_peernet_relayed_bytes_total" {
			return m.GetMetric()[0].GetCounter().GetValue()
		}
	}
	t.Fatal("nobody counts what is passed on")
	return 0
}

// Two nodes that nobody can dial reach each other through one that both dial, know each
// other as if they had dialled, and the one between is asked for no more than that.
func TestPassedOn(t *testing.T) {
	t.Parallel()
	overBoth(t, testPassedOn)
}

func testPassedOn(t *testing.T) {
	t.Parallel()
	var between atomic.Int32
	a := newApart(t, func(id string, cfg *peernet.Config) {
		cfg.Authorize = func(peer string, service byte) error {
			if id == "open" && service == peernet.ServiceBlob {
				between.Add(1)
			}
			if id == "right" && peer == "left" && service == peernet.ServiceControl {
				return errors.New("not this one")
			}
			return nil
		}
	})
	ids := echo(t, a.right.Listen(peernet.ServiceBlob))
	echo(t, a.right.Listen(peernet.ServiceControl))
	for i := range 3 {
		begun := time.Now()
		c, err := a.left.Dial(within(t), a.rightAddr, peernet.ServiceBlob)
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun); took > 3*time.Second {
			t.Errorf("dial %d took %v", i, took)
		}
		says(t, c, "hello")
		if got := c.(*peernet.Conn); got.PeerID() != "right" || got.SiteID() != "site-a" || got.Service() != peernet.ServiceBlob {
			t.Errorf("dialled %q of %q for %d", got.PeerID(), got.SiteID(), got.Service())
		}
		if got := <-ids; got != "left" {
			t.Errorf("accepted %q", got)
		}
		c.Close()
	}
	if got := a.left.Through(a.rightAddr); got != a.open.addr {
		t.Errorf("it went through %q", got)
	}
	if n := a.bytes(t); n < 3*2*5 {
		t.Errorf("%v bytes are counted", n)
	}
	if between.Load() != 0 {
		t.Error("the node between took part")
	}
	// What the end refuses is refused, at once.
	if _, err := a.left.Dial(within(t), a.rightAddr, peernet.ServiceControl); !errors.Is(err, peernet.ErrRefused) {
		t.Errorf("error is %v", err)
	}
	if _, err := a.left.Dial(within(t), a.rightAddr, 0xee); !errors.Is(err, peernet.ErrNoService) {
		t.Errorf("error is %v", err)
	}
	// Many at once, and who is dropped is dropped.
	go func() {
		for range 13 {
			<-ids
		}
	}()
	var all sync.WaitGroup
	for range 12 { // of strangers from one address a port takes few
		all.Go(func() {
			c, err := a.left.Dial(within(t), a.rightAddr, peernet.ServiceBlob)
			if err != nil {
				t.Error(err)
				return
			}
			says(t, c, "x")
			c.Close()
		})
	}
	all.Wait()
	c, err := a.left.Dial(within(t), a.rightAddr, peernet.ServiceBlob)
	if err != nil {
		t.Fatal(err)
	}
	says(t, c, "hello")
	a.right.Drop("left")
	_ = c.SetReadDeadline(time.Now().Add(deadline))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("after Drop: %v", err)
	}
}

// Nobody between them: a dial fails and says so. When somebody is there again it works.
func TestNobodyPassesOn(t *testing.T) {
	t.Parallel()
	overBoth(t, testNobodyPassesOn)
}

func testNobodyPassesOn(t *testing.T) {
	t.Parallel()
	var closed atomic.Bool
	a := newApart(t, func(id string, cfg *peernet.Config) {
		cfg.HandshakeTimeout = 2 * time.Second
		cfg.Authorize = func(_ string, service byte) error {
			if id == "open" && service == peernet.ServicePassing && closed.Load() {
				return errors.New("not now")
			}
			return nil
		}
	})
	ids := echo(t, a.right.Listen(peernet.ServiceBlob))
	closed.Store(true)
	_, err := a.left.Dial(t.Context(), a.rightAddr, peernet.ServiceBlob)
	if err == nil || errors.Is(err, peernet.ErrRefused) || !strings.Contains(err.Error(), "no node that this one reaches passes a connection on") {
		t.Errorf("error is %v", err)
	}
	closed.Store(false)
	waitFor(t, "the connection to be passed on", func() bool {
		c, err := a.left.Dial(t.Context(), a.rightAddr, peernet.ServiceBlob)
		if err != nil {
			return false
		}
		c.Close()
		return true
	})
	<-ids
}

// The node through which it went is gone, and does not even say so: another is asked in time.
func TestPassedOnByAnother(t *testing.T) {
	t.Parallel()
	overBoth(t, testPassedOnByAnother)
}

func testPassedOnByAnother(t *testing.T) {
	t.Parallel()
	a := newApart(t, nil)
	ids := echo(t, a.right.Listen(peernet.ServiceBlob))
	peernet.Mislead(a.left.Net, wall(t), a.rightAddr)
	c, err := a.left.Dial(t.Context(), a.rightAddr, peernet.ServiceBlob)
	if err != nil {
		t.Fatal(err)
	}
	says(t, c, "hello")
	<-ids
	c.Close()
	if got := a.left.Through(a.rightAddr); got != a.open.addr {
		t.Errorf("it went through %q", got)
	}
}

// Who asks for nonsense gets a no, and the port lives.
func TestHostileRelays(t *testing.T) {
	t.Parallel()
	a := newApart(t, nil)
	ids := echo(t, a.right.Listen(peernet.ServiceBlob))
	for name, said := range map[string]string{
		"nobody": "t\x06nobody", "itself": "t\x04left", "one that can be dialled": "t\x04open", "an empty id": "t\x00",
	} {
		service := peernet.ServiceRelay
		if len(name)%2 == 0 {
			service = peernet.ServicePassing
		}
		c, err := a.left.Dial(within(t), a.open.addr, service)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, said); err != nil {
			t.Fatal(err)
		}
		if answer, err := io.ReadAll(c); err != nil || string(answer) != "\x01" {
			t.Errorf("%s: answered %q, %v", name, answer, err)
		}
		c.Close()
	}
	for _, said := range []string{"x", "dGET / HTTP/1.1\r\n\r\n"} {
		c, err := a.left.Dial(within(t), a.open.addr, peernet.ServiceRelay)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, said); err != nil {
			t.Fatal(err)
		}
		if answer, _ := io.ReadAll(c); len(answer) > 7 { // an alert of TLS at most
			t.Errorf("%q is answered with %q", said, answer)
		}
		c.Close()
	}
	// Parts of no bytes, or of too many, end a connection for blobs, whoever sends them.
	for _, part := range []string{"\x00\x00\x00", "\x00\xff\xff", "\x09\x00\x01x"} {
		c, err := a.left.Dial(within(t), a.open.addr, peernet.ServicePassing)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, "t\x05right"+part); err != nil {
			t.Fatal(err)
		}
		if answer, _ := io.ReadAll(c); len(answer) == 0 || answer[0] != 0 || len(answer) > 20 {
			t.Errorf("%q is answered with %q", part, answer)
		}
		c.Close()
	}
	c, err := a.left.Dial(within(t), a.rightAddr, peernet.ServiceBlob)
	if err != nil {
		t.Fatal(err)
	}
	says(t, c, "hello")
	<-ids
	c.Close()
}

// passing is what a node knows of what it passes on.
type passing struct {
	peer  string
	class transfer.Class
}

// toll is a limiter of what is passed on, and hears what was.
type toll struct {
	mu     sync.Mutex
	held   map[transfer.Class]bool
	asked  map[passing]int
	counts map[string]int
}

func (l *toll) Take(f transfer.Flow, n int) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.asked[passing{f.Peer, f.Class}] += n
	if l.held[f.Class] {
		return 5 * time.Millisecond
	}
	return 0
}

func (l *toll) Sent(f transfer.Flow, n int)     { l.count("to "+f.Peer, n) }
func (l *toll) Received(f transfer.Flow, n int) { l.count("from "+f.Peer, n) }

func (l *toll) count(what string, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.counts[what] += n
}

func (l *toll) counted(what string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.counts[what]
}

func (l *toll) hold(c transfer.Class, is bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held[c] = is
}

// Blobs that are passed on keep to the limits of the node between, by what they are for;
// what is held back holds up nothing else, and no other service is asked about.
func TestBlobsPassedOnKeepToLimits(t *testing.T) {
	t.Parallel()
	overBoth(t, testBlobsPassedOnKeepToLimits)
}

func testBlobsPassedOnKeepToLimits(t *testing.T) {
	t.Parallel()
	a := newApart(t, func(_ string, cfg *peernet.Config) { cfg.HandshakeTimeout = 5 * time.Second })
	l := &toll{held: map[transfer.Class]bool{}, asked: map[passing]int{}, counts: map[string]int{}}
	a.open.Bound(peernet.Passing{In: l, Out: l, Meter: l})
	echo(t, a.right.Listen(peernet.ServiceControl))
	blobs := a.right.Listen(peernet.ServiceBlob)
	dial := func(service byte) *peernet.Conn {
		t.Helper()
		c, err := a.left.Dial(within(t), a.rightAddr, service)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c.(*peernet.Conn)
	}
	control := dial(peernet.ServiceControl)
	says(t, control, "hello")
	if len(l.asked) > 0 {
		t.Errorf("asked about %v, which is no blob's", l.asked)
	}
	// Some are held back with more on their way than may be unread.
	accept := func() net.Conn {
		t.Helper()
		c, err := blobs.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	repair := dial(peernet.ServiceBlob)
	far := accept()
	if via := repair.Via() + far.(*peernet.Conn).Via(); via != "openopen" {
		t.Errorf("it goes through %s", via)
	}
	l.hold(transfer.Repair, true)
	repair.Mark(transfer.Repair)
	bulk := make([]byte, 4<<20)
	for i := range bulk {
		bulk[i] = byte(i >> 3)
	}
	sent := make(chan error, 1)
	go func() {
		_, err := repair.Write(bulk)
		sent <- err
	}()
	for range 3 {
		more := dial(peernet.ServiceBlob)
		accept()
		more.Mark(transfer.Repair)
		go func() { _, _ = more.Write(bulk) }()
	}
	waitFor(t, "the limits to be asked", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.asked[passing{"left", transfer.Repair}] > 0
	})
	for range 3 {
		begun := time.Now()
		says(t, control, "go on")
		pull := dial(peernet.ServiceBlob)
		go func() { _, _ = io.Copy(pull, pull) }()
		says(t, accept(), "and you")
		if took := time.Since(begun); took > 3*time.Second {
			t.Errorf("what is held back holds up others, for %v", took)
		}
	}
	if n := l.counted("from left"); n > 64<<10 {
		t.Errorf("%d bytes went on, what was held back among them", n)
	}
	select {
	case err := <-sent:
		t.Errorf("all was taken though nothing may go on: %v", err)
	default:
	}
	l.hold(transfer.Repair, false)
	got := make([]byte, len(bulk))
	if _, err := io.ReadFull(far, got); err != nil || !bytes.Equal(got, bulk) {
		t.Fatalf("the bytes did not come as they were, %v", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	far.(*peernet.Conn).Mark(transfer.Prefetch)
	go func() { _, _ = far.Write(bulk) }()
	if _, err := io.ReadFull(repair, got); err != nil || !bytes.Equal(got, bulk) {
		t.Fatalf("nor the answer, %v", err)
	}
	for _, want := range []string{"from left", "to right", "from right", "to left"} {
		if n := l.counted(want); n < len(bulk) {
			t.Errorf("%d bytes are counted %s, for %d", n, want, len(bulk))
		}
	}
	l.mu.Lock()
	for _, p := range []passing{{"right", transfer.Repair}, {"left", transfer.Prefetch}, {"right", transfer.Prefetch}} {
		if l.asked[p] < len(bulk) {
			t.Errorf("asked about %d bytes of %+v", l.asked[p], p)
		}
	}
	l.mu.Unlock()
	// While nothing may go on, a new connection is refused, and only for blobs.
	l.hold(transfer.Pull, true)
	if _, err := a.left.Dial(within(t), a.rightAddr, peernet.ServiceBlob); err == nil || !strings.Contains(err.Error(), "passes a connection on") {
		t.Errorf("a blob's connection is passed on though nothing may go over it: %v", err)
	}
	says(t, dial(peernet.ServiceControl), "still")
}
