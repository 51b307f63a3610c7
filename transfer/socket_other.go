//go:build !linux

package transfer

import "net"

// KeepShort is for kernels that can be told how much may wait in them.
func KeepShort(net.Conn, int) {}
