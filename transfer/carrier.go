package transfer

import (
	"context"
	"errors"
)

// Carrier moves the pieces of a blob for a Mover in another way than the mover's own.
type Carrier interface {
	// Carry brings all pieces of an arrival that has begun, through Arrival.Store, and
	// returns nil when the arrival is complete. ErrNotCarried: this way is not open for
	// this blob or these peers, and the mover goes on in its own way with the pieces
	// that there are by then. Any other error ends the fetch.
	Carry(ctx context.Context, a *Arrival) error
}

// ErrNotCarried: a carrier cannot bring the blob, or not the rest of it.
var ErrNotCarried = errors.New("the blob cannot be moved in this way")

// Way is a way to move a blob; how a node that fetches it is told to.
type Way string

const (
	ByDefault    Way = ""           // as the mover is set up
	ByStream     Way = "stream"     // piece by piece, as the planner says
	ByBitTorrent Way = "bittorrent" // as one of a swarm
)

// Option of a Fetch.
type Option func(*Options)

// Options that a fetch was given. Whoever joins a fetch has no say in it any more,
// but for its class.
type Options struct {
	Way   Way
	Class Class
}

// Via asks for a way to move the blob.
func Via(way Way) Option { return func(o *Options) { o.Way = way } }

// Chosen puts the options of a fetch together.
func Chosen(options []Option) Options {
	var o Options
	for _, set := range options {
		set(&o)
	}
	return o
}
