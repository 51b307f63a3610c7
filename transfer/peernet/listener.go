package peernet

import (
	"fmt"
	"net"
	"sync"
)

// Listen gives the listener of a service. Its connections have a PeerID method. A
// second Listen for the same service takes over from the first, which is closed.
// After Serve has ended the listener is closed from the start.
func (n *Net) Listen(service byte) net.Listener {
	l := newListener(serviceAddr(fmt.Sprintf("service %d", service)))
	n.mu.Lock()
	old := n.services[service]
	n.services[service] = l
	closed := n.closed
	n.mu.Unlock()
	if old != nil {
		old.Close()
	}
	if closed {
		l.Close()
	}
	return l
}

// ListenJoin gives the listener for nodes that are joining: nothing is known about
// them, their connections live for JoinTimeout at most.
func (n *Net) ListenJoin() net.Listener { return n.listenFor(&n.join, "join") }

// ListenFounding gives the listener for machines that hold the token of
// Config.Founding. Their connections live for JoinTimeout at most.
func (n *Net) ListenFounding() net.Listener { return n.listenFor(&n.found, "founding") }

func (n *Net) listenFor(at **listener, name serviceAddr) net.Listener {
	l := newListener(name)
	n.mu.Lock()
	old := *at
	*at = l
	closed := n.closed
	n.mu.Unlock()
	if old != nil {
		old.Close()
	}
	if closed {
		l.Close()
	}
	return l
}

// listener hands out connections that the port has accepted.
type listener struct {
	addr  serviceAddr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newListener(addr serviceAddr) *listener {
	return &listener{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.done:
		return nil, net.ErrClosed
	default:
	}
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *listener) isClosed() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

func (l *listener) Addr() net.Addr { return l.addr }

// serviceAddr names a listener; the port's own address is whoever calls Serve's.
type serviceAddr string

func (a serviceAddr) Network() string { return "atoll" }
func (a serviceAddr) String() string  { return string(a) }
