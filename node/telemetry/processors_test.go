package telemetry

import (
	"context"
	"runtime"
	"testing"
	"testing/synctest"
)

// A process has one processor more than its machine gives it, until the end; but as many
// as it was told when it was told a number.
func TestSpareProcessor(t *testing.T) {
	t.Setenv("GOMAXPROCS", "")
	runtime.SetDefaultGOMAXPROCS()
	given := runtime.GOMAXPROCS(0)
	during := func() (n int) {
		synctest.Test(t, func(t *testing.T) {
			ctx, end := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- SpareProcessor(ctx) }()
			synctest.Wait()
			n = runtime.GOMAXPROCS(0)
			end()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		return n
	}
	if n := during(); n != given+1 {
		t.Errorf("%d processors of %d and a spare one", n, given)
	}
	if n := runtime.GOMAXPROCS(0); n != given {
		t.Errorf("%d processors afterwards, %d before", n, given)
	}
	t.Setenv("GOMAXPROCS", "5")
	if n := during(); n != given {
		t.Errorf("%d processors where a number was set", n)
	}
}
