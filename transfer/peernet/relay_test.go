package peernet_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

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
			if id == "open" && service == peernet.ServiceRelay && closed.Load() {
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
		c, err := a.left.Dial(within(t), a.open.addr, peernet.ServiceRelay)
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
	c, err := a.left.Dial(within(t), a.rightAddr, peernet.ServiceBlob)
	if err != nil {
		t.Fatal(err)
	}
	says(t, c, "hello")
	<-ids
	c.Close()
}
