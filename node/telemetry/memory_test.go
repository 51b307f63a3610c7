package telemetry

import (
	"context"
	"math"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"
	"testing/synctest"
	"time"
)

// collections is how many garbage collections somebody asked for so far.
func collections() uint64 {
	s := []metrics.Sample{{Name: "/gc/cycles/forced:gc-cycles"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// burst allocates n bytes, touches them and drops them.
func burst(n int) {
	b := make([]byte, n)
	for i := 0; i < n; i += 1 << 10 {
		b[i] = 1
	}
}

func TestGiveBackMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- GiveBackMemory(ctx) }()
		pass := func() uint64 {
			before := collections()
			time.Sleep(memoryPause)
			synctest.Wait()
			return collections() - before
		}
		// What the process allocated before is given back first.
		burst(2 * busyBytes)
		pass()
		pass()
		if n := pass(); n != 0 {
			t.Fatalf("%d collections with nothing to give back", n)
		}
		for range 4 { // busy: more than quietBytes at every tick
			burst(busyBytes)
			if n := pass(); n != 0 {
				t.Errorf("%d collections while the process was busy", n)
			}
		}
		if n := pass(); n == 0 {
			t.Error("memory was not given back when the process was quiet")
		}
		burst(quietBytes / 2)
		pass()
		if n := pass(); n != 0 {
			t.Errorf("%d collections for little", n)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestMemoryLimit(t *testing.T) {
	const mib = 1 << 20
	for _, row := range []struct{ live, rest, want int64 }{
		{20 * mib, 10 * mib, 96 * mib},         // little lives: Go collects before
		{48 * mib, 10 * mib, 96 * mib},         // and here at the same time
		{60 * mib, 10 * mib, 100 * mib},        // half of it
		{80 * mib, 10 * mib, 130 * mib},        // half of it
		{200*mib + 1, 20 * mib, 320 * mib},     // in steps
		{70 * mib, 40 * mib, (110 + 35) * mib}, // what is no heap has room of its own
	} {
		if got := memoryLimit(row.live, row.rest); got != row.want {
			t.Errorf("%d MiB live and %d besides: a limit of %d MiB, want %d", row.live/mib, row.rest/mib, got/mib, row.want/mib)
		}
	}
}

// The limit follows what lives, and goes with the node.
func TestBoundMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- BoundMemory(ctx) }()
		synctest.Wait()
		if limit := debug.SetMemoryLimit(-1); limit < heapMost || limit == math.MaxInt64 {
			t.Errorf("a limit of %d", limit)
		}
		keep := make([]byte, 200<<20)
		runtime.GC()
		time.Sleep(boundPause)
		synctest.Wait()
		if limit := debug.SetMemoryLimit(-1); limit < 300<<20 || limit > 400<<20 {
			t.Errorf("a limit of %d with %d that live", limit, len(keep))
		}
		runtime.KeepAlive(keep)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if limit := debug.SetMemoryLimit(-1); limit != math.MaxInt64 {
			t.Errorf("a limit of %d afterwards", limit)
		}
	})
}
