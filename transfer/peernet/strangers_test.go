package peernet_test

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// lines counts what is logged.
type lines struct{ n atomic.Int64 }

func (l *lines) Write(p []byte) (int, error) {
	l.n.Add(1)
	return len(p), nil
}

func (l *lines) count() int64 { return l.n.Load() }

// heap in use after a collection.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

// TestCrowdOfStrangers: of two thousand connections of each kind the port holds as many
// as one address may have, each costs tens of kilobytes at most, and all are counted
// and few logged.
func TestCrowdOfStrangers(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	cfg := config(t, s, "node-a")
	cfg.MaxPerAddress = 64 // they all have one, and the node needs room beside them
	cfg.HandshakeTimeout = 5 * time.Second
	registry, logs := prometheus.NewRegistry(), &lines{}
	cfg.Registry, cfg.Log = registry, slog.New(slog.NewTextHandler(logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
	a := open(t, cfg)
	echo(t, a.Listen(peernet.ServiceBlob))
	b, err := peernet.New(config(t, s, "node-b"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		refused := 0.0
		for _, f := range families {
			for _, m := range f.GetMetric() {
				if f.GetName() == "atoll_peernet_refused_total" {
					refused += m.GetCounter().GetValue()
				}
			}
		}
		if refused < 2000 {
			t.Errorf("%v refused", refused)
		}
		if got := logs.count(); got > 100 || got == 0 {
			t.Errorf("%d lines of log", got)
		}
	}()
	for name, hello := range map[string][]byte{
		"nothing":           nil,
		"garbage":           bytes.Repeat([]byte{0xa5}, 300),
		"half a hello":      {0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3},
		"a huge record":     {0x16, 3, 1, 0xff, 0xff, 1, 0xff, 0xff, 0xff},
		"a hello of 16 MiB": append([]byte{0x16, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff}, make([]byte, 1<<14-4)...),
	} {
		t.Run(name, func(t *testing.T) {
			before := heap()
			var conns []net.Conn
			most := int64(0)
			for i := range 2000 {
				c, err := net.Dial("tcp", a.addr)
				if err != nil {
					t.Fatal(err)
				}
				_, _ = c.Write(hello) // the port may have closed it already
				conns = append(conns, c)
				if i%500 == 499 {
					most = max(most, heap()-before)
					for _, c := range conns {
						c.Close()
					}
					conns = nil
				}
			}
			t.Logf("2000 strangers, 64 at once, hold %d KiB", most>>10)
			// A record that crypto/tls has read, and is reading into, is up to
			// 64 KiB; all 500 would hold five times as much as this.
			if most > 8<<20 {
				t.Errorf("the crowd holds %d bytes", most)
			}
			begun := time.Now()
			c := eventually(t, b, a.addr)
			says(t, c, "hello")
			c.Close()
			t.Logf("a node gets in after %v", time.Since(begun))
		})
	}
}

// eventually dials until the crowd at this test's one address leaves room.
func eventually(t *testing.T, n *peernet.Net, addr string) net.Conn {
	t.Helper()
	ctx := within(t)
	for {
		c, err := n.Dial(ctx, addr, peernet.ServiceBlob)
		if err == nil {
			return c
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
}

// TestOneAddressCannotKeepOthersOut: while one address has as many strangers as it
// may, a node at another gets in at once.
func TestOneAddressCannotKeepOthersOut(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	a := open(t, config(t, s, "node-a"))
	echo(t, a.Listen(peernet.ServiceBlob))
	crowd := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	for range 100 {
		c, err := crowd.DialContext(within(t), "tcp", a.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	b, err := peernet.New(config(t, s, "node-b"))
	if err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	c, err := b.Dial(within(t), a.addr, peernet.ServiceBlob)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	says(t, c, "hello")
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
}

// TestLongChain: a certificate chain of a megabyte is refused by its announced length.
func TestLongChain(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	a := open(t, config(t, s, "node-a"))
	ids := echo(t, a.Listen(peernet.ServiceBlob))
	cert := s.Node(t, "node-b")
	for len(bytes.Join(cert.Certificate, nil)) < 1<<20 {
		cert.Certificate = append(cert.Certificate, cert.Certificate[0])
	}
	before := heap()
	c, err := rawTLS(t, a.addr, &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}, NextProtos: []string{peernet.ProtoNode}})
	if err == nil {
		_, err = fmt.Fprint(c, string(rune(peernet.ServiceBlob)))
		if err == nil {
			_, err = io.ReadFull(c, make([]byte, 1))
		}
	}
	if err == nil {
		t.Error("let in")
	}
	if grown := heap() - before; grown > 8<<20 {
		t.Errorf("it holds %d bytes", grown)
	}
	if len(ids) != 0 {
		t.Error("it got through to the service")
	}
}

// TestSlowService: who has proved itself and names no service is gone in time.
func TestSlowService(t *testing.T) {
	s := transfertest.NewSite(t, "site-a")
	cfg := config(t, s, "node-a")
	cfg.HandshakeTimeout = time.Second
	a := open(t, cfg)
	echo(t, a.Listen(peernet.ServiceBlob))
	cert := s.Node(t, "node-b")
	c, err := rawTLS(t, a.addr, &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}, NextProtos: []string{peernet.ProtoNode}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("answered without a question")
	} else if ne, ok := err.(net.Error); ok && ne.Timeout() {
		t.Error("kept")
	}
}
