package peernet_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/quic-go/quic-go"

	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// said keeps what is logged.
type said struct {
	mu    sync.Mutex
	lines []string
}

func (s *said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lines = append(s.lines, string(p))
	return len(p), nil
}

func (s *said) all() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lines
}

// TestCrowdOfTheRefused: those who prove to be somebody, but nobody who may come in,
// reach no service, are all counted, and a few times it is logged why; when they are
// gone nothing of them is left.
func TestCrowdOfTheRefused(t *testing.T) { overBoth(t, testCrowdOfTheRefused) }

func testCrowdOfTheRefused(t *testing.T) {
	const crowd, atOnce = 96, 16
	s, forged := transfertest.NewSite(t, "site-a"), transfertest.NewSite(t, "site-a") // same name, another key
	node := func(cfg peernet.Config) func(ctx context.Context, addr string, service byte) error {
		n, err := peernet.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return func(ctx context.Context, addr string, service byte) error {
			c, err := n.Dial(ctx, addr, service)
			if err == nil {
				c.Close()
			}
			return err
		}
	}
	otherCA := config(t, forged, "node-b")
	otherCA.CA = func() *x509.CertPool { return s.Pool } // it takes us for what we are
	by := carried(t)()
	expired := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }
	for _, who := range []struct {
		name, reason, text string
		dial               func(ctx context.Context, addr string, service byte) error
	}{
		{"a certificate of another CA", "handshake", "unknown authority", node(otherCA)},
		{"an expired certificate", "handshake", "has expired", node(config(t, s, "node-b", expired))},
		{"no row in the site", "denied", "no member of the site", node(config(t, s, "unknown"))},
		{"a node that was removed", "denied", "was removed", node(config(t, s, "removed"))},
		{"a joiner that asks for consensus and control", "handshake", "certificate", func(ctx context.Context, addr string, service byte) error {
			return bare(ctx, by, addr, service)
		}},
	} {
		t.Run(who.name, func(t *testing.T) {
			cfg := config(t, s, "node-a")
			cfg.MaxPerAddress, cfg.HandshakeTimeout = 2*crowd, 4*time.Second // they all have one address
			registry, logs := prometheus.NewRegistry(), &said{}
			cfg.Registry, cfg.Log = registry, slog.New(slog.NewTextHandler(logs, nil))
			cfg.Authorize = func(id string, _ byte) error {
				switch id {
				case "unknown":
					return errors.New("the peer is no member of the site")
				case "removed":
					return errors.New("the peer was removed")
				}
				return nil
			}
			a := open(t, cfg)
			services := []byte{peernet.ServiceRaft, peernet.ServiceControl, peernet.ServiceBlob}
			var through []<-chan string
			for _, service := range services {
				through = append(through, echo(t, a.Listen(service)))
			}
			through = append(through, echo(t, a.ListenJoin()))
			before, routines := heap(), runtime.NumGoroutine()
			work := make(chan byte)
			var dialling sync.WaitGroup
			for range atOnce {
				dialling.Go(func() {
					for service := range work {
						if err := who.dial(within(t), a.addr, service); err == nil {
							t.Error("let in")
						}
					}
				})
			}
			for i := range crowd {
				work <- services[i%len(services)]
			}
			close(work)
			dialling.Wait()
			t.Logf("%d of them hold %d KiB, with their own ends of it", crowd, (heap()-before)>>10)
			if held := heap() - before; held > 16<<20 {
				t.Errorf("the crowd holds %d bytes", held)
			}
			waitFor(t, "all to be counted", func() bool { return counted(t, registry, who.reason) >= crowd })
			waitFor(t, "nothing of them to be left", func() bool {
				return peernet.Strangers(a.Net) == 0 && runtime.NumGoroutine() < routines+atOnce && heap()-before < 4<<20
			})
			for _, ids := range through {
				if len(ids) > 0 {
					t.Errorf("%q got through to a service", <-ids)
				}
			}
			lines := logs.all()
			if len(lines) == 0 || len(lines) > 30 || !strings.Contains(lines[0], who.text) || !strings.Contains(lines[0], "127.0.0.1") {
				t.Errorf("%d lines of log, the first is %.1q", len(lines), lines[:min(1, len(lines))])
			}
			// A node gets in as ever.
			if err := node(config(t, s, "node-c"))(within(t), a.addr, peernet.ServiceBlob); err != nil {
				t.Errorf("a node: %v", err)
			}
		})
	}
}

// bare asks for a service without a certificate.
func bare(ctx context.Context, by peernet.Transport, addr string, service byte) error {
	greeting := []byte{service, 0}
	var c io.ReadWriteCloser
	if by == peernet.OnlyQUIC {
		conn, err := quic.DialAddr(ctx, addr, plainTLS(), nil)
		if err != nil {
			return err
		}
		defer func() { _ = conn.CloseWithError(0, "") }()
		st, err := conn.OpenStreamSync(ctx)
		if err != nil {
			return err
		}
		_ = st.SetDeadline(time.Now().Add(deadline))
		c, greeting = st, append([]byte("ATQ1"), greeting...)
	} else {
		d := tls.Dialer{Config: plainTLS()}
		conn, err := d.DialContext(ctx, "tcp", addr)
		if err != nil {
			return err
		}
		_ = conn.SetDeadline(time.Now().Add(deadline))
		c = conn
	}
	defer c.Close()
	if _, err := c.Write(greeting); err != nil {
		return err
	}
	if _, err := c.Read(make([]byte, 1)); err != nil {
		if late, ok := err.(net.Error); ok && late.Timeout() {
			return nil // kept waiting is not refused
		}
		return err
	}
	return nil
}

// counted is how many connections were refused for a reason.
func counted(t *testing.T, registry *prometheus.Registry, reason string) float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "atoll_peernet_refused_total" && m.GetLabel()[0].GetValue() == reason {
				sum += m.GetCounter().GetValue()
			}
		}
	}
	return sum
}

// TestAJoinerReachesTheJoinServiceOnly: whatever it says first, by whichever carrier.
func TestAJoinerReachesTheJoinServiceOnly(t *testing.T) {
	overBoth(t, func(t *testing.T) {
		s := transfertest.NewSite(t, "site-a")
		a := open(t, config(t, s, "node-a"))
		joins := echo(t, a.ListenJoin())
		others := []<-chan string{echo(t, a.Listen(peernet.ServiceRaft)), echo(t, a.Listen(peernet.ServiceControl))}
		joiner, err := peernet.New(peernet.Config{Transport: carried(t)})
		if err != nil {
			t.Fatal(err)
		}
		for _, service := range []byte{peernet.ServiceRaft, peernet.ServiceControl} {
			c, err := joiner.DialJoin(within(t), a.addr, peernet.Pin(s.CA))
			if err != nil {
				t.Fatal(err)
			}
			says(t, c, fmt.Sprintf("%cPOST /v1/txn", service))
			c.Close()
			if id := <-joins; id != "" {
				t.Errorf("a joiner passes for %q", id)
			}
		}
		for _, ids := range others {
			if len(ids) > 0 {
				t.Error("a joiner got through to a service of members")
			}
		}
	})
}
