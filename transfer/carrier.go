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
	ByRelay      Way = "relay"      // passed on for two other nodes; no fetch can ask for it
)

// Option of a Fetch.
type Option func(*Options)

// Options that a fetch was given. Whoever joins a fetch has no say in it any more,
// but for its class and for where it reads.
type Options struct {
	Way   Way
	Class Class
	Reads *int64 // where somebody is about to read; nil: nobody is
}

// Via asks for a way to move the blob.
func Via(way Way) Option { return func(o *Options) { o.Way = way } }

// ReadFrom says that somebody is about to read the blob from off on, so that these bytes
// are asked for first of all. A fetch that is joined hears it too.
func ReadFrom(off int64) Option { return func(o *Options) { o.Reads = &off } }

// Chosen puts the options of a fetch together.
func Chosen(options []Option) Options {
	var o Options
	for _, set := range options {
		set(&o)
	}
	return o
}
