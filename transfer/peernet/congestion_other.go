//go:build !linux

package peernet

import (
	"errors"
	"net"
	"time"
)

func pathOf(net.Conn) (Path, bool) { return Path{}, false }

func setUserTimeout(net.Conn, time.Duration) {}

func setCongestion(net.Conn, string) error { return errors.ErrUnsupported }

func makeRoom(net.Conn, int) {}
