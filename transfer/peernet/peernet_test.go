package peernet_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

const deadline = 20 * time.Second

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	t.Cleanup(cancel)
	return ctx
}

// overBoth runs a test over each carrier: what dials in it takes that one alone.
func overBoth(t *testing.T, test func(t *testing.T)) {
	t.Run(overTCP, test)
	t.Run(overQUIC, test)
}

const overTCP, overQUIC = "over_tcp", "over_quic"

// carried gives the carrier under which a test runs, or the choice between them.
func carried(t *testing.T) func() peernet.Transport {
	by := peernet.Auto
	for part := range strings.SplitSeq(t.Name(), "/") {
		switch part {
		case overTCP:
			by = peernet.OnlyTCP
		case overQUIC:
			by = peernet.OnlyQUIC
		}
	}
	return func() peernet.Transport { return by }
}

// port is a served Net.
type port struct {
	*peernet.Net
	addr string
	stop func() error
}

func open(t *testing.T, cfg peernet.Config) *port {
	t.Helper()
	n, err := peernet.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	packets, err := net.ListenPacket("udp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	go func() { done <- n.ServeBoth(ctx, ln, packets) }()
	stop := sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() { _ = stop() })
	waitFor(t, "the port to be served", func() bool { return peernet.Served(n) })
	return &port{n, ln.Addr().String(), stop}
}

func config(t *testing.T, s *transfertest.Site, id string, changes ...func(*x509.Certificate)) peernet.Config {
	cert := s.Node(t, id, changes...)
	return peernet.Config{
		SiteID: s.ID,
		Cert:   func() tls.Certificate { return cert },
		CA:     func() *x509.CertPool { return s.Pool },

		Transport: carried(t),
		Secret:    []byte("secret of " + id),
	}
}

// echo accepts on a listener, sends back what comes, and reports each peer's id.
func echo(t *testing.T, ln net.Listener) <-chan string {
	ids := make(chan string, 16)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			ids <- c.(interface{ PeerID() string }).PeerID()
			wg.Go(func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			})
		}
	})
	t.Cleanup(wg.Wait)
	return ids
}

func says(t *testing.T, c net.Conn, word string) {
	t.Helper()
	if _, err := io.WriteString(c, word); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(word))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != word {
		t.Fatalf("%q came back as %q, %v", word, got, err)
	}
}

func TestServicesKnowTheirPeers(t *testing.T) { overBoth(t, testServicesKnowTheirPeers) }

func testServicesKnowTheirPeers(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	a, b := open(t, config(t, s, "node-a")), open(t, config(t, s, "node-b"))
	raft, blobs := echo(t, a.Listen(peernet.ServiceRaft)), echo(t, a.Listen(peernet.ServiceBlob))
	for service, ids := range map[byte]<-chan string{peernet.ServiceRaft: raft, peernet.ServiceBlob: blobs} {
		c, err := b.Dial(within(t), a.addr, service)
		if err != nil {
			t.Fatal(err)
		}
		says(t, c, "hello")
		if got := c.(interface{ PeerID() string }).PeerID(); got != "node-a" {
			t.Errorf("dialled %q", got)
		}
		if got := <-ids; got != "node-b" {
			t.Errorf("service %d accepted %q", service, got)
		}
		c.Close()
	}
}

func TestWhoIsRefused(t *testing.T) { overBoth(t, testWhoIsRefused) }

func testWhoIsRefused(t *testing.T) {
	s, other := transfertest.NewSite(t, "site-a"), transfertest.NewSite(t, "site-b")
	cfg := config(t, s, "node-a")
	cfg.Authorize = func(id string, service byte) error {
		if id == "removed" || service == peernet.ServiceRaft {
			return errors.New("not a voter")
		}
		return nil
	}
	a := open(t, cfg)
	ids := echo(t, a.Listen(peernet.ServiceBlob))
	echo(t, a.Listen(peernet.ServiceRaft))
	forged := transfertest.NewSite(t, "site-a") // same name, another key
	for _, c := range []struct {
		name    string
		cfg     peernet.Config
		service byte
		want    error
	}{
		{"member", config(t, s, "node-b"), peernet.ServiceBlob, nil},
		{"removed", config(t, s, "removed"), peernet.ServiceBlob, peernet.ErrRefused},
		{"service not allowed", config(t, s, "node-b"), peernet.ServiceRaft, peernet.ErrRefused},
		{"service unknown", config(t, s, "node-b"), 0xee, peernet.ErrNoService},
		{"another site", config(t, other, "node-b"), peernet.ServiceBlob, peernet.ErrOtherSite},
		{"expired", config(t, s, "node-b", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), peernet.ServiceBlob, peernet.ErrRefused},
		{"not yet valid", config(t, s, "node-b", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), peernet.ServiceBlob, peernet.ErrRefused},
		{"no URI", config(t, s, "node-b", func(c *x509.Certificate) { c.URIs = nil }), peernet.ServiceBlob, peernet.ErrRefused},
		{"two URIs", config(t, s, "node-b", func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }), peernet.ServiceBlob, peernet.ErrRefused},
		{"no node", config(t, s, "node-b", func(c *x509.Certificate) { c.URIs[0].Path = "/node/" }), peernet.ServiceBlob, peernet.ErrRefused},
		{"a node below", config(t, s, "node-b", func(c *x509.Certificate) { c.URIs[0].Path = "/node/b/c" }), peernet.ServiceBlob, peernet.ErrRefused},
		{"another scheme", config(t, s, "node-b", func(c *x509.Certificate) { c.URIs[0].Scheme = "spiffe" }), peernet.ServiceBlob, peernet.ErrRefused},
		{"a server's certificate", config(t, s, "node-b", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }), peernet.ServiceBlob, peernet.ErrRefused},
	} {
		t.Run(c.name, func(t *testing.T) {
			n, err := peernet.New(c.cfg)
			if err != nil {
				t.Fatal(err)
			}
			conn, err := n.Dial(within(t), a.addr, c.service)
			if !errors.Is(err, c.want) {
				t.Fatalf("error is %v", err)
			}
			if err == nil {
				says(t, conn, "hello")
				conn.Close()
			}
		})
	}
	t.Run("forged", func(t *testing.T) {
		cfg := config(t, forged, "node-b")
		cfg.CA = func() *x509.CertPool { return s.Pool } // it takes us for what we are
		n, err := peernet.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.Dial(within(t), a.addr, peernet.ServiceBlob); !errors.Is(err, peernet.ErrRefused) {
			t.Errorf("error is %v", err)
		}
	})
	if len(ids) != 1 || <-ids != "node-b" {
		t.Error("somebody else got through")
	}
}

// A certificate is asked for at each handshake, so a renewal needs no restart.
func TestRenewal(t *testing.T) { overBoth(t, testRenewal) }

func testRenewal(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	expired := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }
	var mu sync.Mutex
	cert := s.Node(t, "node-a", expired)
	cfg := config(t, s, "node-a")
	cfg.Cert = func() tls.Certificate {
		mu.Lock()
		defer mu.Unlock()
		return cert
	}
	a := open(t, cfg)
	echo(t, a.Listen(peernet.ServiceBlob))
	b, err := peernet.New(config(t, s, "node-b"))
	if err != nil {
		t.Fatal(err)
	}
	var invalid x509.CertificateInvalidError
	if _, err := b.Dial(within(t), a.addr, peernet.ServiceBlob); !errors.As(err, &invalid) {
		t.Fatalf("error is %v", err)
	}
	renewed := s.Node(t, "node-a")
	mu.Lock()
	cert = renewed
	mu.Unlock()
	c, err := b.Dial(within(t), a.addr, peernet.ServiceBlob)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestJoin(t *testing.T) { overBoth(t, testJoin) }

func testJoin(t *testing.T) {
	s, other := transfertest.NewSite(t, "site-a"), transfertest.NewSite(t, "site-b")
	a := open(t, config(t, s, "node-a"))
	joiner, err := peernet.New(peernet.Config{Transport: carried(t)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := joiner.DialJoin(within(t), a.addr, peernet.Pin(s.CA)); !errors.Is(err, peernet.ErrNoService) {
		t.Fatalf("nobody listens, but the error is %v", err)
	}
	ids := echo(t, a.ListenJoin())
	c, err := joiner.DialJoin(within(t), a.addr, peernet.Pin(s.CA))
	if err != nil {
		t.Fatal(err)
	}
	says(t, c, "let me in")
	if conn := c.(*peernet.Conn); conn.PeerID() != "node-a" || conn.SiteID() != "site-a" {
		t.Errorf("joins %s of %s", conn.PeerID(), conn.SiteID())
	}
	if got := <-ids; got != "" {
		t.Errorf("a stranger is called %q", got)
	}
	c.Close()
	for _, pin := range [][]byte{peernet.Pin(other.CA), nil, make([]byte, 32)} {
		if _, err := joiner.DialJoin(within(t), a.addr, pin); !errors.Is(err, peernet.ErrOtherSite) {
			t.Errorf("pin %x: error is %v", pin, err)
		}
	}
	if _, err := joiner.Dial(within(t), a.addr, peernet.ServiceRaft); !errors.Is(err, peernet.ErrNoCertificate) {
		t.Errorf("error is %v", err)
	}
}

// A site that sends another's CA along with its own chain is still another site.
func TestJoinPinIsNotFooledByABorrowedCA(t *testing.T) {
	overBoth(t, testJoinPinIsNotFooledByABorrowedCA)
}

func testJoinPinIsNotFooledByABorrowedCA(t *testing.T) {
	s, other := transfertest.NewSite(t, "site-a"), transfertest.NewSite(t, "site-a")
	cert := other.Node(t, "node-x")
	cert.Certificate = append(cert.Certificate, s.CA.Raw)
	cfg := config(t, other, "node-x")
	cfg.Cert = func() tls.Certificate { return cert }
	a := open(t, cfg)
	a.ListenJoin()
	joiner, err := peernet.New(peernet.Config{Transport: carried(t)})
	if err != nil {
		t.Fatal(err)
	}
	var unknown x509.UnknownAuthorityError
	if _, err := joiner.DialJoin(within(t), a.addr, peernet.Pin(s.CA)); !errors.As(err, &unknown) {
		t.Errorf("error is %v", err)
	}
}

// A joiner that woke up in 1970 can join; a member follows the clock it is given.
func TestWrongClocks(t *testing.T) { overBoth(t, testWrongClocks) }

func testWrongClocks(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	a := open(t, config(t, s, "node-a"))
	echo(t, a.ListenJoin())
	echo(t, a.Listen(peernet.ServiceBlob))
	epoch := func() time.Time { return time.Unix(0, 0) }
	joiner, err := peernet.New(peernet.Config{Now: epoch, Transport: carried(t)})
	if err != nil {
		t.Fatal(err)
	}
	c, err := joiner.DialJoin(within(t), a.addr, peernet.Pin(s.CA))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	cfg := config(t, s, "node-b")
	cfg.Now = epoch
	b, err := peernet.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Dial(within(t), a.addr, peernet.ServiceBlob); err == nil {
		t.Error("a certificate from the future was taken")
	}
}

func rawTLS(t *testing.T, addr string, cfg *tls.Config) (*tls.Conn, error) {
	t.Helper()
	d := tls.Dialer{Config: cfg}
	c, err := d.DialContext(within(t), "tcp", addr)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(deadline))
	return c.(*tls.Conn), nil
}

func TestStrangers(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	a := open(t, config(t, s, "node-a"))
	ids := echo(t, a.Listen(peernet.ServiceBlob))
	cert := s.Node(t, "node-b")
	node := tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}, NextProtos: []string{"atoll/1"}}
	for name, change := range map[string]func(*tls.Config){
		"no ALPN":        func(c *tls.Config) { c.NextProtos = nil },
		"another ALPN":   func(c *tls.Config) { c.NextProtos = []string{"h2"} },
		"TLS 1.2":        func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
		"no certificate": func(c *tls.Config) { c.Certificates = nil },
	} {
		cfg := node.Clone()
		change(cfg)
		c, err := rawTLS(t, a.addr, cfg)
		if err == nil { // TLS 1.3 tells the client only when it reads
			_, _ = c.Write([]byte{peernet.ServiceBlob})
			_, err = c.Read(make([]byte, 1))
		}
		if err == nil {
			t.Errorf("%s: let in", name)
		}
	}
	c, err := rawTLS(t, a.addr, &node)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte{0xee}); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(c); err != nil || !bytes.Equal(rest, []byte{2}) {
		t.Errorf("an unknown service gets %x, %v; want its status and the end", rest, err)
	}
	if len(ids) != 0 {
		t.Error("somebody got through to the service")
	}
}

// Silent connections are bounded in number and in time.
func TestSlowStrangers(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	cfg := config(t, s, "node-a")
	cfg.HandshakeTimeout = 400 * time.Millisecond
	cfg.MaxPerAddress = 2
	a := open(t, cfg)
	echo(t, a.Listen(peernet.ServiceBlob))
	var silent []net.Conn
	for range 3 {
		c, err := net.Dial("tcp", a.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(deadline))
		silent = append(silent, c)
	}
	// The third is one too many, the others' time runs out: all see the end.
	for i, c := range silent {
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("silent connection %d: %v", i, err)
		} else if ne, ok := err.(net.Error); ok && ne.Timeout() {
			t.Errorf("silent connection %d is kept", i)
		}
	}
	b, err := peernet.New(config(t, s, "node-b"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := b.Dial(within(t), a.addr, peernet.ServiceBlob)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestJoinConnectionsEnd(t *testing.T) { overBoth(t, testJoinConnectionsEnd) }

func testJoinConnectionsEnd(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	cfg := config(t, s, "node-a")
	cfg.JoinTimeout = 200 * time.Millisecond
	a := open(t, cfg)
	echo(t, a.ListenJoin())
	joiner, err := peernet.New(peernet.Config{Transport: carried(t)})
	if err != nil {
		t.Fatal(err)
	}
	c, err := joiner.DialJoin(within(t), a.addr, peernet.Pin(s.CA))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(deadline))
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a stranger's connection is kept")
	} else if ne, ok := err.(net.Error); ok && ne.Timeout() {
		t.Error("a stranger's connection is kept")
	}
}

func TestServeClosesEverything(t *testing.T) { overBoth(t, testServeClosesEverything) }

func testServeClosesEverything(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	a := open(t, config(t, s, "node-a"))
	ln := a.Listen(peernet.ServiceBlob)
	accepted := make(chan net.Conn, 1)
	go func() {
		c, err := ln.Accept()
		if err == nil {
			accepted <- c
		}
	}()
	b, err := peernet.New(config(t, s, "node-b"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := b.Dial(within(t), a.addr, peernet.ServiceBlob)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	server := <-accepted
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the listener: %v", err)
	}
	if _, err := a.Listen(9).Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a listener made afterwards: %v", err)
	}
	if _, err := server.Read(make([]byte, 1)); err == nil {
		t.Error("an accepted connection lives on")
	}
	_ = c.SetDeadline(time.Now().Add(deadline))
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the peer's end lives on")
	}
	if _, err := net.Dial("tcp", a.addr); err == nil {
		t.Error("the port is open")
	}
}

// Raft restarts in the process: its second listener takes over from the first.
func TestListenAgain(t *testing.T) { overBoth(t, testListenAgain) }

func testListenAgain(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	a := open(t, config(t, s, "node-a"))
	first := a.Listen(peernet.ServiceRaft)
	b, err := peernet.New(config(t, s, "node-b"))
	if err != nil {
		t.Fatal(err)
	}
	first.Close()
	if _, err := b.Dial(within(t), a.addr, peernet.ServiceRaft); !errors.Is(err, peernet.ErrNoService) {
		t.Errorf("error is %v", err)
	}
	stale := a.Listen(peernet.ServiceRaft)
	ids := echo(t, a.Listen(peernet.ServiceRaft))
	if _, err := stale.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the older listener: %v", err)
	}
	c, err := b.Dial(within(t), a.addr, peernet.ServiceRaft)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := <-ids; got != "node-b" {
		t.Errorf("accepted %q", got)
	}
}

// FuzzNodeURI: whatever passes for a node is written in the one way.
func FuzzNodeURI(f *testing.F) {
	for _, u := range []string{"atoll://s/node/n", "atoll://s/node/", "atoll:///node/n", "atoll://s:1/node/n", "atoll://u@s/node/n?q#f", "atoll:s/node/n", "atoll://s/node/a%2Fb"} {
		f.Add(u)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := url.Parse(s)
		if err != nil {
			return
		}
		site, node, err := peernet.Identity(&x509.Certificate{URIs: []*url.URL{u}})
		if err != nil {
			return
		}
		if site == "" || node == "" {
			t.Fatalf("%q names nobody", s)
		}
		want := url.URL{Scheme: "atoll", Host: site, Path: "/node/" + node}
		if want.String() != u.String() {
			t.Fatalf("%q passes for %q", s, want.String())
		}
	})
}

// Drop ends what was let in before; others are not touched.
func TestDrop(t *testing.T) { overBoth(t, testDrop) }

func testDrop(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	a := open(t, config(t, s, "node-a"))
	echo(t, a.Listen(peernet.ServiceBlob))
	conns := map[string]net.Conn{}
	for _, id := range []string{"node-b", "node-c"} {
		n, err := peernet.New(config(t, s, id))
		if err != nil {
			t.Fatal(err)
		}
		c, err := n.Dial(within(t), a.addr, peernet.ServiceBlob)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(deadline))
		says(t, c, "hello")
		conns[id] = c
	}
	a.Drop("node-b")
	a.Drop("")
	if _, err := conns["node-b"].Read(make([]byte, 1)); err == nil {
		t.Error("the dropped node's connection is kept")
	} else if ne, ok := err.(net.Error); ok && ne.Timeout() {
		t.Error("the dropped node's connection is kept")
	}
	says(t, conns["node-c"], "hello again")
}
