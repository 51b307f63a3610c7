package peernet

import (
	"bytes"
	"net"
	"time"
)

// Served says whether the port is served by now.
func Served(n *Net) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.served != nil
}

// Sessions counts the QUIC connections that are kept for a service at an address.
func Sessions(n *Net, addr string, service byte) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.sessions[sessionKey{addr, service}])
}

// Crowd has a node pass on so many connections more.
func Crowd(n *Net, more int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.back.passing += more
}

// BlobsAtOnce is how many connections for blobs a node passes on.
const BlobsAtOnce = blobsAtOnce

// Wants says whether a path is one for BBR, from a round trip on.
func Wants(p Path, long time.Duration) bool { return p.wants(long) }

// Strangers counts those in a handshake.
func Strangers(n *Net) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.strangers
}

// scripted is a connection on which the peer says what is given.
type scripted struct {
	net.Conn
	in *bytes.Reader
}

func (s scripted) Read(p []byte) (int, error)  { return s.in.Read(p) }
func (s scripted) Write(p []byte) (int, error) { return len(p), nil }

// Greet runs the accepting or the dialling end of the greeting against what a peer
// says, and gives how many of its bytes are left.
func Greet(n *Net, accept, overQUIC bool, said []byte) (left int, err error) {
	in := bytes.NewReader(said)
	c := &Conn{Conn: scripted{in: in}, peer: "node-b", protocol: n.protocols()[0], closed: func() {}}
	switch {
	case !accept:
		err = n.greet(c, nil, nil)
	case overQUIC:
		if err = readPreface(c.Conn); err == nil {
			_, err = n.receive(c)
		}
	default:
		_, err = n.receive(c)
	}
	return in.Len(), err
}

// ParkedHere counts the connections that peers have parked.
func ParkedHere(n *Net) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.back.parked)
}

// Few says how many nodes keep connections parked without need.
func Few(n *Net, nodes int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.back.few = nodes
}

// Mislead has a node believe that it has parked at one which is gone, and that it last went
// through that to reach an address.
func Mislead(n *Net, gone, addr string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.back.away[gone] = true
	n.route(addr).through = gone
}
