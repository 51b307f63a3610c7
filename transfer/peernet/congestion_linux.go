package peernet

import (
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func pathOf(c net.Conn) (p Path, ok bool) {
	control(c, func(fd int) {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return
		}
		name, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		if err != nil {
			return
		}
		p = Path{
			Congestion: name, RTT: time.Duration(info.Rtt) * time.Microsecond,
			Packets: int64(info.Data_segs_out), Again: int64(info.Total_retrans), MTU: int(info.Pmtu),
		}
		ok = true
	})
	return p, ok
}

func setCongestion(c net.Conn, name string) error {
	err := net.ErrClosed
	control(c, func(fd int) { err = unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, name) })
	return err
}

// makeRoom gives what a connection sends so many bytes in the kernel, if the system lets it and would
// not go so far by itself: then it is left to the system, which has taken care of a size that was
// asked for once and for all.
func makeRoom(c net.Conn, bytes int) {
	most, own := setting("core/wmem_max"), setting("ipv4/tcp_wmem")
	half := bytes / 2 // the kernel doubles it
	if len(most) != 1 || len(own) != 3 || 2*min(half, most[0]) <= own[2] {
		return
	}
	control(c, func(fd int) { _ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, half) })
}

// setting is what a file of /proc/sys/net holds; nil when that is not known.
func setting(name string) (values []int) {
	text, err := os.ReadFile("/proc/sys/net/" + name)
	if err != nil {
		return nil
	}
	for word := range strings.FieldsSeq(string(text)) {
		n, err := strconv.Atoi(word)
		if err != nil {
			return nil
		}
		values = append(values, n)
	}
	return values
}

func setUserTimeout(c net.Conn, d time.Duration) {
	control(c, func(fd int) {
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(d.Milliseconds()))
	})
}

func control(c net.Conn, fn func(fd int)) {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) { fn(int(fd)) }) // a closed connection has no path
}
