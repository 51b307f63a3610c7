package telemetry

import (
	"context"
	"math"
	"runtime"
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
	// besides what Go allows for its live memory, which is a few MB: without it a busy
	// one collects every few hundred requests. Unlike a higher GOGC it stays the same
	// when there is more to remember.
	spareGarbage = 16 << 20
	// heapMost is up to which size of all that Go has, spareGarbage included, it
	// collects no earlier than by itself. Above it the garbage may be half of what
	// lives instead of as much, and leastGarbage in any case.
	heapMost     = 96 << 20
	leastGarbage = 24 << 20
	// boundPause is how long a bound stays as it is.
	boundPause = time.Second
)

// BoundMemory sets how often the process collects its garbage: more rarely than Go
// does by itself while little lives, and more often while much does. It runs until ctx
// ends; once for a process is enough. A limit that the process was started with
// (GOMEMLIMIT) stays as it is.
func BoundMemory(ctx context.Context) error {
	spare := make([]byte, spareGarbage) // never touched, so only addresses
	defer runtime.KeepAlive(spare)
	if debug.SetMemoryLimit(-1) != math.MaxInt64 {
		<-ctx.Done()
		return nil
	}
	defer debug.SetMemoryLimit(math.MaxInt64)
	tick := time.NewTicker(boundPause)
	defer tick.Stop()
	for set := int64(0); ; {
		live, rest := living()
		// To set it stops the process for a moment.
		if limit := memoryLimit(live, rest); limit != set {
			debug.SetMemoryLimit(limit)
			set = limit
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// memoryLimit is for a process of which so many bytes lived at the last collection, and
// whose runtime has so many besides its heap. It is in steps of 1 MiB.
func memoryLimit(live, rest int64) int64 {
	return max(heapMost, (rest+live+max(live/2, leastGarbage))&^(1<<20-1))
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
