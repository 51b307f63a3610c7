// Package utp stands in for github.com/anacrolix/go-utp, which the BitTorrent library
// names and Atoll never uses: between nodes there is TLS over the one peer port. It
// has the names that the library compiles against, and every socket is refused. So
// neither libutp nor cgo is in the binary, and a build needs no module that the
// module proxies do not serve.
package utp

import (
	"context"
	"errors"
	"log/slog"
	"net"
)

// Default says which implementation this is.
const Default = "none"

// ErrNone is what every attempt to open a socket gets.
var ErrNone = errors.New("this build has no uTP; peers are reached over the peer port")

// Option of a socket.
type Option func()

// WithLogger does nothing.
func WithLogger(*slog.Logger) Option { return func() {} }

// FirewallCallback decides about a connection that comes in.
type FirewallCallback func(net.Addr) bool

// Socket of uTP. There is none.
type Socket interface {
	net.PacketConn
	Accept() (net.Conn, error)
	Addr() net.Addr
	DialContext(ctx context.Context, network, addr string) (net.Conn, error)
	SetFirewallCallback(FirewallCallback)
}

// NewSocket gives ErrNone.
func NewSocket(string, string, ...Option) (Socket, error) { return nil, ErrNone }

// NewSocketFromPacketConn gives ErrNone.
func NewSocketFromPacketConn(net.PacketConn, ...Option) (Socket, error) { return nil, ErrNone }
