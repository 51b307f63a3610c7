//go:build !linux

package stream

import "net"

// keepShort is for kernels that can be told how much may wait in them.
func keepShort(net.Conn) {}
