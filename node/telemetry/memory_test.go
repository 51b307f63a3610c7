package telemetry

import (
	"context"
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
