package transfer

import (
	"fmt"
	"net"
	"time"
)

// Class of a transfer, the most urgent first. Classes share a holder's uplink by
// weight when they compete, and each gets all of it when it is alone; none starves.
type Class uint8

const (
	Pull        Class = iota // somebody waits for it
	Replication              // copies that a push or another site asked for
	Repair                   // copies that were lost
	Prefetch                 // before anybody asked

	// Classes is how many there are.
	Classes = 4
)

// Weight is a class's share where classes compete.
func (c Class) Weight() int { return [Classes]int{8, 4, 2, 1}[min(c, Prefetch)] }

func (c Class) String() string {
	if c >= Classes {
		return fmt.Sprintf("class %d", uint8(c))
	}
	return [Classes]string{"pull", "replication", "repair", "prefetch"}[c]
}

// For says what a fetch is for; Pull when it is not said. A fetch that is joined for
// something more urgent becomes as urgent.
func For(class Class) Option { return func(o *Options) { o.Class = class } }

// Flow is what moves between this node and a peer: what a Limiter decides on and a
// Meter counts.
type Flow struct {
	Blob  Blob   // empty when it is passed on for others
	Peer  string // node id
	Via   string // of the node that passes it on to the peer; "": it goes there itself
	Class Class
	Way   Way // that it takes
}

// Passed is a connection that a third node may pass on. Engines tell it what they write for.
type Passed interface {
	// Via is the id of that node; "" when there is none.
	Via() string
	// Mark says what that is for which is written from now on.
	Mark(Class)
}

// Mark tells a connection what is written to it for, if it wants to know.
func Mark(c net.Conn, class Class) {
	if p, ok := c.(Passed); ok {
		p.Mark(class)
	}
}

// ViaOf is the node that passes a connection on; "" when none does.
func ViaOf(c net.Conn) string {
	if p, ok := c.(Passed); ok {
		return p.Via()
	}
	return ""
}

// Limiter decides when bytes may leave this node. It is asked once for each piece,
// before the piece goes out. Safe for concurrent use; it must not block.
type Limiter interface {
	// Take asks to send n bytes. 0: they are counted and may go. Else nothing is
	// counted, and the same is asked again after about so long; other flows go on
	// meanwhile.
	Take(f Flow, n int) (wait time.Duration)
}

// Meter hears what moved, after each piece, from many goroutines; it must not block.
type Meter interface {
	// Sent: n bytes of a blob went to the peer.
	Sent(f Flow, n int)
	// Received: n verified bytes of a blob came from the peer.
	Received(f Flow, n int)
}
