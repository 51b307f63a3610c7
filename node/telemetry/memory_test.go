package telemetry

import (
	"context"
	"math"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
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

func TestBoundFor(t *testing.T) {
	const mib = 1 << 20
	for name, row := range map[string]struct {
		live, rest, came int64
		large            bool
		want             bound
	}{
		"little lives, little comes": {16 * mib, 10 * mib, 0, false, bound{200, 128 * mib}},
		"nothing was collected yet":  {0, 10 * mib, 0, false, bound{500, 128 * mib}},
		"much comes":                 {16 * mib, 10 * mib, 256 * mib, false, bound{300, 128 * mib}},
		"more than the most":         {16 * mib, 10 * mib, 4096 * mib, false, bound{400, 128 * mib}},
		"much comes, a large state":  {16 * mib, 10 * mib, 4096 * mib, true, bound{200, 80 * mib}},
		"much lives":                 {160 * mib, 10 * mib, 0, false, bound{110, 250 * mib}},
		"in steps":                   {200*mib + 1, 20 * mib, 0, false, bound{100, 320 * mib}},
		"much lives, a large state":  {40 * mib, 20 * mib, 0, true, bound{140, 84 * mib}},
	} {
		if got := boundFor(row.live, row.rest, row.came, row.large); got != row.want {
			t.Errorf("%s: %d %% and %d MiB, want %d and %d", name, got.percent, got.limit/mib, row.want.percent, row.want.limit/mib)
		}
	}
}

// The bounds follow what lives and how large the state is, and go with the node.
func TestBoundMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		var large atomic.Bool
		go func() { done <- BoundMemory(large.Load)(ctx) }()
		synctest.Wait()
		limit := func() int64 { return debug.SetMemoryLimit(-1) }
		if limit() < heapMost || limit() == math.MaxInt64 || percent() <= goPercent {
			t.Errorf("%d %% and a limit of %d", percent(), limit())
		}
		pass := func() {
			time.Sleep(boundPause)
			synctest.Wait()
		}
		large.Store(true)
		pass()
		if limit() >= heapMost {
			t.Errorf("a limit of %d with a large state", limit())
		}
		keep := make([]byte, 200<<20)
		runtime.GC()
		pass()
		if limit() < 300<<20 || limit() > 400<<20 || percent() > goPercent+10 {
			t.Errorf("%d %% and a limit of %d with %d that live", percent(), limit(), len(keep))
		}
		runtime.KeepAlive(keep)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if limit() != math.MaxInt64 || percent() != goPercent {
			t.Errorf("%d %% and a limit of %d afterwards", percent(), limit())
		}
	})
}

// What the process was started with stays.
func TestBoundMemoryOfTheOperator(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		debug.SetGCPercent(50)
		debug.SetMemoryLimit(1 << 40)
		defer debug.SetGCPercent(goPercent)
		defer debug.SetMemoryLimit(math.MaxInt64)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- BoundMemory(func() bool { return true })(ctx) }()
		check := func(when string) {
			if limit := debug.SetMemoryLimit(-1); limit != 1<<40 || percent() != 50 {
				t.Errorf("%s: %d %% and a limit of %d", when, percent(), limit)
			}
		}
		synctest.Wait()
		check("while it runs")
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		check("afterwards")
	})
}
