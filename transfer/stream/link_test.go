package stream

import (
	"net"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// longConn is a connection over a long path.
type longConn struct {
	net.Conn
	trip time.Duration
}

func (c longConn) RoundTrip() time.Duration { return c.trip }

// On a long path as much may wait in the kernel as it carries in a round trip.
func TestWhatWaitsInTheKernel(t *testing.T) {
	for _, c := range []struct {
		piece, trip time.Duration
		want        int
	}{
		{200 * time.Millisecond, 100 * time.Millisecond, transfer.UnsentSlow},
		{20 * time.Millisecond, 0, transfer.Unsent},
		{time.Millisecond, 10 * time.Millisecond, transfer.Unsent}, // a local network that is busy
		{50 * time.Millisecond, 30 * time.Millisecond, transfer.Unsent},
		{24 * time.Millisecond, 100 * time.Millisecond, 1 << 20},
		{time.Millisecond, 100 * time.Millisecond, transfer.UnsentLong},
		{0, 100 * time.Millisecond, transfer.UnsentLong},
	} {
		l := &link{conn: longConn{nil, c.trip}}
		for range 10 {
			l.paced(transfer.PieceSize, c.piece)
		}
		if l.unsent != c.want {
			t.Errorf("a piece in %v, a round trip of %v: %d KiB, want %d", c.piece, c.trip, l.unsent>>10, c.want>>10)
		}
	}
}
