package peernet_test

import (
	"context"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// TestBBROnLongPaths: where the kernel has BBR, a sender on a long path gets it, also
// when it is the one that accepted; on a short path nothing is changed.
func TestBBROnLongPaths(t *testing.T) {
	available, err := os.ReadFile("/proc/sys/net/ipv4/tcp_available_congestion_control")
	if err != nil {
		t.Fatal(err)
	}
	long := "reno"
	if slices.Contains(strings.Fields(string(available)), peernet.BBR) {
		long = peernet.BBR
	}
	s := transfertest.NewSite(t, "site-a")
	for _, c := range []struct {
		name string
		from time.Duration
		off  bool
		want string
	}{
		{"long", time.Nanosecond, false, long},
		{"long, but switched off", time.Nanosecond, true, "reno"},
		{"short", time.Hour, false, "reno"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := config(t, s, "node-a")
			cfg.LongPath, cfg.NoBBR = c.from, c.off
			n, err := peernet.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			// Accepted connections inherit it, whatever the system's default is.
			listen := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
				return raw.Control(func(fd uintptr) {
					if err := unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno"); err != nil {
						t.Error(err)
					}
				})
			}}
			ln, err := listen.Listen(t.Context(), "tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- n.Serve(ctx, ln) }()
			defer func() {
				cancel()
				<-done
			}()
			blobs := n.Listen(peernet.ServiceBlob)
			client := config(t, s, "node-b")
			client.LongPath = c.from
			b, err := peernet.New(client)
			if err != nil {
				t.Fatal(err)
			}
			near, err := b.Dial(within(t), ln.Addr().String(), peernet.ServiceBlob)
			if err != nil {
				t.Fatal(err)
			}
			defer near.Close()
			far, err := blobs.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer far.Close()
			path, ok := far.(*peernet.Conn).Path()
			if !ok || path.Congestion != c.want {
				t.Errorf("the sender has %+v, %v; want %s", path, ok, c.want)
			}
		})
	}
}

// TestLossyPaths: a short path that loses more than a few packets wants BBR too.
func TestLossyPaths(t *testing.T) {
	for _, c := range []struct {
		path peernet.Path
		want bool
	}{
		{peernet.Path{RTT: time.Millisecond}, false},
		{peernet.Path{RTT: 21 * time.Millisecond}, true},
		{peernet.Path{RTT: time.Millisecond, Packets: 10000, Again: 20}, false},
		{peernet.Path{RTT: time.Millisecond, Packets: 10000, Again: 21}, true},
		{peernet.Path{RTT: time.Millisecond, Packets: 100, Again: 50}, false}, // too few to say
	} {
		if got := peernet.Wants(c.path, 20*time.Millisecond); got != c.want {
			t.Errorf("%+v: %v", c.path, got)
		}
	}
}
