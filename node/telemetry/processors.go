package telemetry

import (
	"context"
	"os"
	"runtime"
	"time"
)

// processorsPause is how long a number of processors stays as it is.
const processorsPause = time.Minute

// SpareProcessor lets Go use one processor more than the machine has for the process. A
// goroutine that syncs a file keeps its processor until the runtime notices, which looks
// the more rarely the less it finds: with two processors and syncs of a millisecond one
// of the two is lost to all that could run. It runs until ctx ends; once for a process is
// enough. A number that the process was started with (GOMAXPROCS) stays as it is.
func SpareProcessor(ctx context.Context) error {
	if os.Getenv("GOMAXPROCS") != "" {
		<-ctx.Done()
		return nil
	}
	defer runtime.SetDefaultGOMAXPROCS()
	tick := time.NewTicker(processorsPause)
	defer tick.Stop()
	for {
		// The runtime follows a share that is changed, but not once a number is set.
		runtime.SetDefaultGOMAXPROCS()
		runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 1)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
