package peernet_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// relay is a network path for UDP: what it is told to do to packets, it does.
type relay struct {
	t      *testing.T
	front  *net.UDPConn // what clients send to
	target *net.UDPAddr

	mu     sync.Mutex
	back   *net.UDPConn // what the server sees
	client *net.UDPAddr
	most   int // bytes of a packet; longer ones vanish
	passed atomic.Int64
	wg     sync.WaitGroup
}

func newRelay(t *testing.T, target string, most int) *relay {
	t.Helper()
	addr, err := net.ResolveUDPAddr("udp", target)
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{t: t, target: addr, most: most}
	if r.front, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
		t.Fatal(err)
	}
	r.rebind()
	r.wg.Go(func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := r.front.ReadFromUDP(buf)
			if err != nil {
				return
			}
			r.mu.Lock()
			r.client = from
			back, target := r.back, r.target
			r.mu.Unlock()
			if n <= r.most {
				r.passed.Add(1)
				_, _ = back.WriteToUDP(buf[:n], target)
			}
		}
	})
	t.Cleanup(func() {
		r.front.Close()
		r.mu.Lock()
		r.back.Close()
		r.mu.Unlock()
		r.wg.Wait()
	})
	return r
}

// rebind makes the client seem to come from another port, as an address translator
// does that has forgotten it; nothing more arrives by the old one.
func (r *relay) rebind() {
	r.t.Helper()
	back, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		r.t.Fatal(err)
	}
	r.mu.Lock()
	old := r.back
	r.back = back
	r.mu.Unlock()
	if old != nil {
		old.Close()
	}
	r.wg.Go(func() {
		buf := make([]byte, 2048)
		for {
			n, _, err := back.ReadFromUDP(buf)
			if err != nil {
				return
			}
			r.mu.Lock()
			client := r.client
			r.mu.Unlock()
			if n <= r.most && client != nil {
				_, _ = r.front.WriteToUDP(buf[:n], client)
			}
		}
	})
}

func (r *relay) addr() string { return r.front.LocalAddr().String() }

// quicOnly is a config whose calls go over QUIC.
func quicOnly(cfg peernet.Config) peernet.Config {
	cfg.Transport = func() peernet.Transport { return peernet.OnlyQUIC }
	return cfg
}

func carrierOf(c net.Conn) peernet.Carrier { return c.(*peernet.Conn).Carrier() }

// TestRebinding: a client whose address changes midway keeps its connections.
func TestRebinding(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	a := open(t, config(t, s, "node-a"))
	echo(t, a.Listen(peernet.ServiceBlob))
	b := open(t, quicOnly(config(t, s, "node-b")))
	path := newRelay(t, a.addr, 1500)
	c, err := b.Dial(within(t), path.addr(), peernet.ServiceBlob)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(deadline))
	says(t, c, "from here")
	for range 3 {
		path.rebind()
		says(t, c, "and from there")
	}
}

// TestSmallPackets: where the MTU is 1,280 and nobody says so, the handshake and
// megabytes both ways get through.
func TestSmallPackets(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	a := open(t, config(t, s, "node-a"))
	echo(t, a.Listen(peernet.ServiceBlob))
	b := open(t, quicOnly(config(t, s, "node-b")))
	path := newRelay(t, a.addr, 1280-28) // without the headers of IPv4 and UDP
	c, err := b.Dial(within(t), path.addr(), peernet.ServiceBlob)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(deadline))
	sent := make([]byte, 4<<20)
	_, _ = rand.Read(sent)
	go func() { _, _ = c.Write(sent) }()
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("4 MiB did not come back as they went: %v", err)
	}
}

// TestRestartIsNoticed: when a peer is killed and comes back, whoever waits for it
// hears so with the next packet, not after the idle timeout.
func TestRestartIsNoticed(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	cfg := config(t, s, "node-a")
	a := open(t, cfg)
	echo(t, a.Listen(peernet.ServiceRaft))
	b := open(t, quicOnly(config(t, s, "node-b")))
	path := newRelay(t, a.addr, 1500)
	c, err := b.Dial(within(t), path.addr(), peernet.ServiceRaft)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	says(t, c, "hello")
	// Killed: nobody says goodbye. The relay goes to the next life of the node.
	reborn := open(t, cfg)
	echo(t, reborn.Listen(peernet.ServiceRaft))
	target, err := net.ResolveUDPAddr("udp", reborn.addr)
	if err != nil {
		t.Fatal(err)
	}
	path.mu.Lock()
	path.target = target
	path.mu.Unlock()
	begun := time.Now()
	_ = c.SetDeadline(begun.Add(deadline))
	if _, err = io.WriteString(c, "are you still the same, who had so many things to answer me?"); err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the restart shows as %v", err)
	}
	if took := time.Since(begun); took > 3*time.Second {
		t.Errorf("it took %v to notice", took)
	}
	again, err := b.Dial(within(t), path.addr(), peernet.ServiceRaft)
	if err != nil {
		t.Fatal(err)
	}
	says(t, again, "hello")
	again.Close()
}

// TestDialAfterRestart: a kept connection that the peer has forgotten costs the next
// call no failure.
func TestDialAfterRestart(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	cfg := config(t, s, "node-a")
	a := open(t, cfg)
	echo(t, a.Listen(peernet.ServiceControl))
	b := open(t, quicOnly(config(t, s, "node-b")))
	path := newRelay(t, a.addr, 1500)
	c, err := b.Dial(within(t), path.addr(), peernet.ServiceControl)
	if err != nil {
		t.Fatal(err)
	}
	says(t, c, "hello")
	c.Close()
	reborn := open(t, cfg)
	echo(t, reborn.Listen(peernet.ServiceControl))
	target, err := net.ResolveUDPAddr("udp", reborn.addr)
	if err != nil {
		t.Fatal(err)
	}
	path.mu.Lock()
	path.target = target
	path.mu.Unlock()
	begun := time.Now()
	if c, err = b.Dial(within(t), path.addr(), peernet.ServiceControl); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	says(t, c, "hello again")
	if took := time.Since(begun); took > 2*time.Second {
		t.Errorf("it took %v", took)
	}
}

// TestStreamsShareAConnection: calls for one service share a connection, those for
// blobs have up to eight, and ending one ends no other.
func TestStreamsShareAConnection(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	a := open(t, config(t, s, "node-a"))
	ends := make(chan net.Conn, 64)
	for _, service := range []byte{peernet.ServiceControl, peernet.ServiceBlob} {
		ln := a.Listen(service)
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				ends <- c
				go func() { _, _ = io.Copy(c, c) }()
			}
		}()
	}
	// Each QUIC connection has a path of its own only if the caller has no port of its
	// own, so connections are told apart by what closing one does to the others.
	b := open(t, quicOnly(config(t, s, "node-b")))
	for service, want := range map[byte]int{peernet.ServiceControl: 1, peernet.ServiceBlob: 8} {
		var conns []net.Conn
		for range 12 {
			c, err := b.Dial(within(t), a.addr, service)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(deadline))
			says(t, c, "hello")
			conns = append(conns, c)
			<-ends
		}
		if got := peernet.Sessions(b.Net, a.addr, service); got != want {
			t.Errorf("service %d has %d connections, want %d", service, got, want)
		}
		conns[0].Close()
		for _, c := range conns[1:] {
			says(t, c, "still here")
		}
	}
}

// TestLateCallOfConsensus: a call of the consensus that is not answered in time takes
// its QUIC connection with it, others keep it.
func TestLateCallOfConsensus(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	a := open(t, config(t, s, "node-a"))
	echo(t, a.Listen(peernet.ServiceRaft))
	echo(t, a.Listen(peernet.ServiceControl))
	b := open(t, quicOnly(config(t, s, "node-b")))
	for service, want := range map[byte]int{peernet.ServiceRaft: 0, peernet.ServiceControl: 1} {
		c, err := b.Dial(within(t), a.addr, service)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("error is %v", err)
		}
		c.Close()
		waitFor(t, "the connection to end or stay", func() bool { return peernet.Sessions(b.Net, a.addr, service) == want })
	}
}

// TestCloseWhileWriting: Close ends a Write that the peer does not take, and what was
// written before a Close arrives.
func TestCloseWhileWriting(t *testing.T) { overBoth(t, testCloseWhileWriting) }

func testCloseWhileWriting(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	a := open(t, config(t, s, "node-a"))
	ln := a.Listen(peernet.ServiceBlob)
	b := open(t, config(t, s, "node-b"))
	c, err := b.Dial(within(t), a.addr, peernet.ServiceBlob)
	if err != nil {
		t.Fatal(err)
	}
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	ended := make(chan error, 1)
	go func() {
		for {
			if _, err := c.Write(make([]byte, 1<<20)); err != nil {
				ended <- err
				return
			}
		}
	}()
	if _, err := io.ReadFull(far, make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	select {
	case err := <-ended:
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("the write ended with %v", err)
		}
	case <-within(t).Done():
		t.Fatal("a write outlives its connection")
	}
	if c, err = b.Dial(within(t), a.addr, peernet.ServiceBlob); err != nil {
		t.Fatal(err)
	}
	if far, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	last := bytes.Repeat([]byte("x"), 100<<10)
	if _, err := c.Write(last); err != nil {
		t.Fatal(err)
	}
	c.Close()
	_ = far.SetDeadline(time.Now().Add(deadline))
	if got, err := io.ReadAll(far); err != nil || !bytes.Equal(got, last) {
		t.Errorf("of %d bytes %d came, %v", len(last), len(got), err)
	}
	far.Close()
}

// half is a port with one carrier.
func half(t *testing.T, cfg peernet.Config, by peernet.Carrier) *port {
	t.Helper()
	n, err := peernet.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	packets, err := net.ListenPacket("udp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	if by == peernet.QUIC {
		ln.Close()
		ln = nil
	} else {
		packets.Close()
		packets = nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.ServeBoth(ctx, ln, packets) }()
	stop := sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() { _ = stop() })
	waitFor(t, "the port to be served", func() bool { return peernet.Served(n) })
	return &port{n, addr, stop}
}

// TestEitherCarrier: with the choice left open a call goes over TCP; where that does
// not get through, over QUIC, at once from the second call on.
func TestEitherCarrier(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	for _, open := range []peernet.Carrier{peernet.TCP, peernet.QUIC} {
		t.Run(string(open), func(t *testing.T) {
			a := half(t, config(t, s, "node-a"), open)
			echo(t, a.Listen(peernet.ServiceControl))
			b := half(t, config(t, s, "node-b"), peernet.QUIC)
			for range 2 {
				begun := time.Now()
				c, err := b.Dial(within(t), a.addr, peernet.ServiceControl)
				if err != nil {
					t.Fatal(err)
				}
				says(t, c, "hello")
				if got := carrierOf(c); got != open {
					t.Errorf("it went over %s", got)
				}
				c.Close()
				if took := time.Since(begun); took > 5*time.Second {
					t.Errorf("it took %v", took)
				}
			}
			routes := b.Routes()
			if len(routes) != 1 || routes[0].Addr != a.addr || routes[0].Carrier != open {
				t.Errorf("routes are %+v", routes)
			}
			// The peer's no is an answer whichever carrier brings it.
			if _, err := b.Dial(within(t), a.addr, 0xee); !errors.Is(err, peernet.ErrNoService) {
				t.Errorf("error is %v", err)
			}
		})
	}
}

// TestNobodyAtAll: where nobody listens the failure says so as before, and soon.
func TestNobodyAtAll(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	a := open(t, config(t, s, "node-a"))
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	b := open(t, config(t, s, "node-b"))
	for i, most := range []time.Duration{5 * time.Second, 500 * time.Millisecond} {
		begun := time.Now()
		_, err := b.Dial(within(t), a.addr, peernet.ServiceControl)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("error is %v", err)
		}
		if took := time.Since(begun); took > most {
			t.Errorf("call %d took %v", i+1, took)
		}
	}
}

// TestCrowdOverUDP: first packets of strangers, with true and with forged addresses,
// leave nothing behind that grows with their number, and a node gets in meanwhile.
func TestCrowdOverUDP(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	cfg := config(t, s, "node-a")
	cfg.HandshakeTimeout = 4 * time.Second
	a := open(t, cfg)
	echo(t, a.Listen(peernet.ServiceBlob))
	b := open(t, quicOnly(config(t, s, "node-b")))
	first := initial(t)
	target, err := net.ResolveUDPAddr("udp", a.addr)
	if err != nil {
		t.Fatal(err)
	}
	before, most := heap(), int64(0)
	for round := range 20 {
		// Another port is what another, forged, address is to the server.
		crowd, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 3)})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 250 {
			packet := bytes.Clone(first)
			_, _ = rand.Read(packet[6 : 6+packet[5]]) // each is of another connection
			switch i % 3 {
			case 1: // garbage after the header
				_, _ = rand.Read(packet[40:])
			case 2: // of no known version: an answer, and no state
				packet[4] = 0xfa
			}
			_, _ = crowd.WriteToUDP(packet, target)
		}
		crowd.Close()
		waitFor(t, "the first packets to be read", func() bool { return peernet.Strangers(a.Net) > 0 })
		// With as many as make it busy, the next ones first have to show an address.
		if got := peernet.Strangers(a.Net); got > 256/8 {
			t.Fatalf("%d who have shown no address are kept", got)
		}
		if round%5 == 4 {
			most = max(most, heap()-before)
		}
	}
	// quic-go pools its packets' buffers and queues at most 1,024 of them.
	if most > 12<<20 {
		t.Errorf("the crowd holds %d KiB", most>>10)
	}
	t.Logf("5000 first packets hold %d KiB", most>>10)
	begun := time.Now()
	c := eventually(t, b.Net, a.addr)
	says(t, c, "hello")
	c.Close()
	t.Logf("a node gets in after %v", time.Since(begun))
	waitFor(t, "the strangers' time to run out", func() bool { return peernet.Strangers(a.Net) == 0 })
}

// waitFor waits until something is so.
func waitFor(t *testing.T, what string, so func() bool) {
	t.Helper()
	ctx := within(t)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !so() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// initial is the first packet of a client of QUIC.
func initial(t *testing.T) []byte {
	t.Helper()
	sink, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer sink.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		if c, err := quic.DialAddr(ctx, sink.LocalAddr().String(), plainTLS(), nil); err == nil {
			_ = c.CloseWithError(0, "")
		}
	}()
	buf := make([]byte, 2048)
	_ = sink.SetReadDeadline(time.Now().Add(deadline))
	n, err := sink.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return buf[:n]
}

// TestStrangersOverQUIC: nobody without a node's certificate reaches a service.
func TestStrangersOverQUIC(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	cfg := config(t, s, "node-a")
	cfg.HandshakeTimeout = time.Second
	a := open(t, cfg)
	ids := echo(t, a.Listen(peernet.ServiceBlob))
	good := s.Node(t, "node-b")
	for name, change := range map[string]func(*tlsConfig){
		"no ALPN":        func(c *tlsConfig) { c.NextProtos = []string{"h3"} },
		"no certificate": func(c *tlsConfig) { c.Certificates = nil },
		"silent":         func(*tlsConfig) {},
		"nonsense":       func(*tlsConfig) {},
	} {
		conf := plainTLS()
		conf.Certificates = append(conf.Certificates, good)
		change(conf)
		c, err := quic.DialAddr(within(t), a.addr, conf, nil)
		if err != nil {
			continue
		}
		st, err := c.OpenStreamSync(within(t))
		if err == nil && name != "silent" {
			_, _ = st.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
		}
		if err == nil {
			_ = st.SetReadDeadline(time.Now().Add(deadline))
			_, err = st.Read(make([]byte, 1))
		}
		if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: kept, %v", name, err)
		}
		_ = c.CloseWithError(0, "")
	}
	if len(ids) != 0 {
		t.Error("somebody got through")
	}
}
