package telemetry

import (
	"context"
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

// allocated is how many bytes the process has allocated on the heap so far.
func allocated() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}
