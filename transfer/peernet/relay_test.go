package peernet_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
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
		for _, service := range []byte{peernet.ServiceRelay, peernet.ServicePassing} {
			c, err := a.left.Dial(within(t), a.open.addr, service)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(c, said); err != nil {
				t.Fatal(err)
			}
			_ = c.SetReadDeadline(time.Now().Add(deadline))
			if answer, err := io.ReadAll(c); err != nil || string(answer) != "\x01" {
				t.Errorf("service %d, %s: answered %q, %v", service, name, answer, err)
			}
			c.Close()
		}
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
		_ = c.SetReadDeadline(time.Now().Add(deadline))
		answer, err := io.ReadAll(c)
		if errors.Is(err, os.ErrDeadlineExceeded) || len(answer) == 0 || answer[0] != 0 || len(answer) > 20 {
			t.Errorf("%q is answered with %q, %v", part, answer, err)
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
	mu            sync.Mutex
	held          map[transfer.Class]bool
	takes, counts map[passing]int
}

func newToll() *toll {
	return &toll{held: map[transfer.Class]bool{}, takes: map[passing]int{}, counts: map[passing]int{}}
}

func (l *toll) Take(f transfer.Flow, n int) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.takes[passing{f.Peer, f.Class}] += n
	if l.held[f.Class] {
		return 5 * time.Millisecond
	}
	return 0
}

func (l *toll) Sent(f transfer.Flow, n int)     { l.count(f, n) }
func (l *toll) Received(f transfer.Flow, n int) { l.count(f, n) }

func (l *toll) count(f transfer.Flow, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.counts[passing{f.Peer, f.Class}] += n
}

func (l *toll) counted(p passing) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.counts[p]
}

func (l *toll) asked(p passing) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.takes[p]
}

// asks is about how many ends and classes it was asked.
func (l *toll) asks() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.takes)
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
	a := newApart(t, nil)
	l := newToll()
	a.open.Bound(peernet.Passing{In: l, Out: l, Meter: l, Patience: time.Hour})
	echo(t, a.right.Listen(peernet.ServiceControl))
	control, err := a.left.Dial(within(t), a.rightAddr, peernet.ServiceControl)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	_ = control.SetDeadline(time.Now().Add(3 * deadline))
	says(t, control, "hello")
	if l.asks() > 0 {
		t.Errorf("asked %d times, about no blob", l.asks())
	}
	p := newPairs(t, a)
	near, far := p.dial(t)
	if via := near.Via() + far.Via(); via != "openopen" {
		t.Errorf("it goes through %s", via)
	}
	// Some are held back with more on their way than may be unread.
	l.hold(transfer.Repair, true)
	bulk := make([]byte, 4<<20)
	for i := range bulk {
		bulk[i] = byte(i >> 3)
	}
	sent := make(chan error, 1)
	near.Mark(transfer.Repair)
	go func() {
		_, err := near.Write(bulk)
		sent <- err
	}()
	for range 3 {
		more, _ := p.dial(t)
		more.Mark(transfer.Repair)
		go func() { _, _ = more.Write(bulk) }()
	}
	waitFor(t, "the limits to be asked", func() bool { return l.asked(passing{"left", transfer.Repair}) > 0 })
	for range 2 {
		says(t, control, "go on")
		pull, answers := p.dial(t)
		go func() { _, _ = io.Copy(answers, answers) }()
		says(t, pull, "and you")
	}
	if n := l.counted(passing{"left", transfer.Repair}); n > 0 {
		t.Errorf("%d bytes went on that were held back", n)
	}
	l.hold(transfer.Repair, false)
	got := make([]byte, len(bulk))
	if _, err := io.ReadFull(far, got); err != nil || !bytes.Equal(got, bulk) {
		t.Fatalf("the bytes did not come as they were, %v", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	far.Mark(transfer.Prefetch)
	go func() { _, _ = far.Write(bulk) }()
	if _, err := io.ReadFull(near, got); err != nil || !bytes.Equal(got, bulk) {
		t.Fatalf("nor the answer, %v", err)
	}
	for _, one := range []passing{{"left", transfer.Repair}, {"right", transfer.Repair}, {"left", transfer.Prefetch}, {"right", transfer.Prefetch}} {
		if n := l.asked(one); n < len(bulk) {
			t.Errorf("asked about %d bytes of %+v", n, one)
		}
		waitFor(t, "the bytes to be counted", func() bool { return l.counted(one) >= len(bulk) })
	}
	// While nothing may go on, a new connection is refused, and only for blobs.
	l.hold(transfer.Pull, true)
	a.onlyRefuses(t, peernet.ServicePassing)
	says(t, control, "still")
	l.hold(transfer.Pull, false)
	// So it is when there are many blobs.
	peernet.Crowd(a.open.Net, peernet.BlobsAtOnce)
	a.onlyRefuses(t, peernet.ServicePassing)
}

// onlyRefuses wants the node between to pass on connections from the left to the right for all
// but one service.
func (a *apart) onlyRefuses(t *testing.T, refused byte) {
	t.Helper()
	for _, service := range []byte{peernet.ServicePassing, peernet.ServiceRelay} {
		c, err := a.left.Dial(within(t), a.open.addr, service)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(deadline))
		answer := []byte{0xff}
		if _, err = io.WriteString(c, "t\x05right"); err == nil {
			_, err = io.ReadFull(c, answer)
		}
		if err != nil || (answer[0] == 1) != (service == refused) {
			t.Errorf("service %d is answered with %d, %v", service, answer[0], err)
		}
		c.Close()
	}
}

// A node of a version that knows no ServicePassing takes part in the old way, whose bytes nobody
// limits.
func TestOlderVersionsPassBlobsOn(t *testing.T) {
	t.Parallel()
	overBoth(t, testOlderVersionsPassBlobsOn)
}

func testOlderVersionsPassBlobsOn(t *testing.T) {
	t.Parallel()
	for _, old := range []string{"open", "right"} {
		t.Run(old, func(t *testing.T) {
			t.Parallel()
			a := newApart(t, nil)
			l := newToll()
			a.open.Bound(peernet.Passing{In: l, Out: l, Meter: l})
			map[string]*port{"open": a.open, "right": a.right}[old].Listen(peernet.ServicePassing).Close()
			p := newPairs(t, a)
			near, far := p.dial(t)
			go func() { _, _ = io.Copy(far, far) }()
			near.Mark(transfer.Repair)
			says(t, near, "hello")
			if n := l.counted(passing{"left", transfer.Repair}); n > 0 {
				t.Errorf("%d bytes are counted", n)
			}
		})
	}
}

// pairs finds the other ends of connections for blobs from the left to the right.
type pairs struct {
	a    *apart
	mu   sync.Mutex
	last byte
	ends map[byte]chan *peernet.Conn
}

func newPairs(t *testing.T, a *apart) *pairs {
	t.Helper()
	p := &pairs{a: a, ends: map[byte]chan *peernet.Conn{}}
	ln := a.right.Listen(peernet.ServiceBlob)
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				_ = c.SetDeadline(time.Now().Add(3 * deadline))
				name := make([]byte, 1)
				if _, err := io.ReadFull(c, name); err != nil {
					c.Close()
					return
				}
				p.end(name[0]) <- c.(*peernet.Conn)
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		all.Wait()
	})
	return p
}

func (p *pairs) end(name byte) chan *peernet.Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ends[name] == nil {
		p.ends[name] = make(chan *peernet.Conn, 1)
	}
	return p.ends[name]
}

// dial gives both ends of a connection, neither of which waits for ever. It is said over it
// which it is: a Dial that comes too late may have an end of its own at the right.
func (p *pairs) dial(t *testing.T) (near, far *peernet.Conn) {
	t.Helper()
	waitFor(t, "a connection", func() bool {
		c, err := p.a.left.Dial(within(t), p.a.rightAddr, peernet.ServiceBlob)
		if err != nil {
			return false // on a busy machine a handshake may take too long
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(3 * deadline))
		p.last++
		if _, err := c.Write([]byte{p.last}); err != nil {
			return false
		}
		select {
		case far = <-p.end(p.last):
		case <-within(t).Done():
			return false
		}
		near = c.(*peernet.Conn)
		t.Cleanup(func() { far.Close() })
		return true
	})
	return near, far
}
