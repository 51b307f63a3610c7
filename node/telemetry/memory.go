package telemetry

import (
	"context"
	"math"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// What makes a process quiet: in memoryPause it has allocated less than quietBytes,
// which is far more than a scrape of the metrics does. Giving memory back costs a
// garbage collection, so it is done only for busyBytes allocated since the last
// time: a process that is never quite quiet pays about as often as the runtime
// collects by itself, every two minutes.
const (
	memoryPause = 15 * time.Second
	quietBytes  = 4 << 20
	busyBytes   = 32 << 20
)

// GiveBackMemory returns to the kernel what a burst of work has left behind, once
// the process has become quiet. The runtime alone takes several collections for
// that, two minutes apart, and keeps as much as the burst's heap was: twice what is
// live. It runs until ctx ends; once for a process is enough.
func GiveBackMemory(ctx context.Context) error {
	tick := time.NewTicker(memoryPause)
	defer tick.Stop()
	var given, last uint64 // bytes that had been allocated when memory was given back, and at the last tick
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := allocated()
		if now-last < quietBytes && now-given >= busyBytes {
			debug.FreeOSMemory()
			given = now
		}
		last = now
	}
}

const (
	// spareGarbage is how much a process may leave between two garbage collections
	// besides as much as lives, with which Go alone collects a busy one every few hundred
	// requests. It stays the same when there is more to remember.
	spareGarbage = 16 << 20
	// While there is room it is more for who leaves so much often: what comes in
	// collectPause, busyGarbage at most.
	busyGarbage  = 48 << 20
	collectPause = time.Second / 8
	// heapMost is up to which size of all that Go has it collects no earlier than that;
	// heapMostLarge where the state is large, whose pages need the room. Above it the
	// garbage may be half of what lives, and leastGarbage in any case.
	heapMost      = 128 << 20
	heapMostLarge = 80 << 20
	leastGarbage  = 24 << 20
	// boundPause is how long the bounds stay as they are.
	boundPause = time.Second
	// goPercent is GOGC when nobody has set it, of goLeast at least.
	goPercent = 100
	goLeast   = 4 << 20
)

// BoundMemory sets how often the process collects its garbage: more rarely than Go
// does by itself while little lives, and more often while much does or the node's state
// is large. What it gives runs until ctx ends; once for a process is enough. What the
// process was started with (GOGC, GOMEMLIMIT) stays as it is.
func BoundMemory(large func() bool) func(ctx context.Context) error {
	return func(ctx context.Context) error {
		ours := bounds{percent: percent() == goPercent, limit: debug.SetMemoryLimit(-1) == math.MaxInt64}
		usual := bound{goPercent, math.MaxInt64}
		defer func() { ours.set(usual) }()
		tick := time.NewTicker(boundPause)
		defer tick.Stop()
		last := allocated()
		for set := usual; ; {
			now := allocated()
			live, rest := living()
			// To set it stops the process for a moment.
			if next := boundFor(live, rest, int64(now-last), large()); next != set {
				ours.set(next)
				set = next
			}
			last = now
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
			}
		}
	}
}

// bound is when the process collects its garbage.
type bound struct {
	percent int   // of what lives, as GOGC
	limit   int64 // of all that Go has, as GOMEMLIMIT
}

// bounds are which of the two nobody else has set.
type bounds struct{ percent, limit bool }

func (b bounds) set(to bound) {
	if b.percent {
		debug.SetGCPercent(to.percent)
	}
	if b.limit {
		debug.SetMemoryLimit(to.limit)
	}
}

// boundFor is for a process of which so many bytes lived at the last collection, whose
// runtime has so many besides its heap, and which allocated so many in the last
// boundPause. It is in steps.
func boundFor(live, rest, came int64, large bool) bound {
	spare, most := int64(spareGarbage), int64(heapMostLarge)
	if !large {
		spare = min(max(spare, came/int64(boundPause/collectPause)), busyGarbage)
		most = heapMost
	}
	return bound{
		percent: goPercent + int(10*spare/max(live, goLeast)*10),
		limit:   max(most, (rest+live+max(live/2, leastGarbage))&^(1<<20-1)),
	}
}

func percent() uint64 {
	s := []metrics.Sample{{Name: "/gc/gogc:percent"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

func living() (live, rest int64) {
	s := []metrics.Sample{
		{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"},
		{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/unused:bytes"}, {Name: "/memory/classes/heap/free:bytes"},
	}
	metrics.Read(s)
	rest = int64(s[1].Value.Uint64())
	for _, heap := range s[2:] {
		rest -= int64(heap.Value.Uint64())
	}
	return int64(s[0].Value.Uint64()), rest
}

// allocated is how many bytes the process has allocated on the heap so far.
func allocated() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}
