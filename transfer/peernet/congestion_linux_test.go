package peernet_test

import (
	"context"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// TestBBROnLongPaths: where the kernel has BBR, a sender on a long path gets it, also
// when it is the one that accepted, and room for what nobody has acknowledged; on a short path
// nothing is changed.
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
			if got := sendBuffer(t, far.(*peernet.Conn)); c.want == peernet.BBR && got < roomiest(t) {
				t.Errorf("the sender may have %d bytes that nobody has acknowledged, and could have %d", got, roomiest(t))
			} else if c.want != peernet.BBR && got > proc(t, "ipv4/tcp_wmem")[2] {
				t.Errorf("the sender may have %d bytes that nobody has acknowledged", got)
			}
		})
	}
}

// sendBuffer is how much the sender may have in the kernel.
func sendBuffer(t *testing.T, c *peernet.Conn) (bytes int) {
	t.Helper()
	raw, err := c.NetConn().(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if failed := raw.Control(func(fd uintptr) { bytes, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF) }); failed != nil || err != nil {
		t.Fatal(failed, err)
	}
	return bytes
}

// roomiest is what a process may ask for on this machine, up to 16 MiB; 0 if the system goes as far by itself.
func roomiest(t *testing.T) int {
	t.Helper()
	if most := min(2*proc(t, "core/wmem_max")[0], 16<<20); most > proc(t, "ipv4/tcp_wmem")[2] {
		return most
	}
	return 0
}

func proc(t *testing.T, name string) (values []int) {
	t.Helper()
	text, err := os.ReadFile("/proc/sys/net/" + name)
	if err != nil {
		t.Fatal(err)
	}
	for word := range strings.FieldsSeq(string(text)) {
		n, err := strconv.Atoi(word)
		if err != nil {
			t.Fatal(err)
		}
		values = append(values, n)
	}
	return values
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
