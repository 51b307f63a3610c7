package peernet

import (
	"net"
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
