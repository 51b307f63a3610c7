package stream

import (
	"context"
	"time"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/plan"
)

// holder is a peer that answered that it holds the blob, whole or in part. The hunt's
// mu guards it.
type holder struct {
	peer     transfer.Peer
	far      bool
	complete bool
	hops     int          // of its own fetch, as it says; see Arrival.Hops
	planned  *plan.Holder // nil before the first session, and without a root
	link     *link        // nil between sessions
	told     bool         // what not to choose, in this session
	tabled   bool         // asked for the piece table, in this session
	words    words        // said with the hello of its first session, until that begins
	hoped    []int        // of those pieces, the ones that it may not have
	excused  int          // pieces that it may send though nobody waits for them now
	strikes  int          // failures since it last delivered
	rests    time.Time    // not asked for anything before
	heard    time.Time    // last sign of life
	moved    time.Time    // last piece, or since when it owes one
	limited  time.Time    // when a limit last held back what it owes
	dropped  *failure
	in       intake
	// Several connections to one node: main is the holder that the node is, nil for that
	// itself; betrayed is what another connection than this one did that ends them all.
	main     *holder
	betrayed *failure
}

// strike counts a failure. Weights: a broken answer may be a restart, so it takes four;
// a stall has already cost a reader StallTimeout, so it takes two.
func (hd *holder) strike(f *failure) (final bool) {
	weight := 1
	if f.why == Stalled {
		weight = maxStrikes / 2
	}
	hd.strikes += weight
	// One that is still fetching may not have, yet, what it will have.
	return f.why.Lie() || f.why == Gone && hd.complete || hd.strikes >= maxStrikes
}

// backoff before the holder is tried again.
func (hd *holder) backoff(first time.Duration) time.Duration {
	return first << max(0, hd.strikes-1)
}

// pause waits for d; false means that ctx was done first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
