package transfer

import (
	"net"
	"syscall"
)

const tcpNotSentLowat = 25 // TCP_NOTSENT_LOWAT; package syscall does not name it

// KeepShort bounds how much waits in the kernel before it is on the wire, in bytes, so that a
// piece is in service while it is on the wire, and what is urgent does not stand behind megabytes.
func KeepShort(c net.Conn, unsent int) {
	for { // of a connection through another node it is the one to that
		t, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		c = t.NetConn()
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	// Where the kernel does not know it, queues are longer, that is all.
	_ = raw.Control(func(fd uintptr) {
		_ = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpNotSentLowat, unsent)
	})
}
