// Command powerloss cuts the power of a real node at every step that it makes on
// its disk. It runs the node under strace while clients push to it, follows the
// system calls to know at each moment what was durable, and starts the node again
// on what a power cut would have left then: without what was not synced, or with a
// torn part of it. The node must start, hold all that it had acknowledged by that
// moment, and take pushes. A recording has snapshots of the state and a log that is
// cut behind them. Then one node of three loses its power while the others go on:
// it must start, catch up, and hold and say what they do.
//
// A moment counts as acknowledged from the system call on that writes the answer.
// That the trace tells everything is checked: what it says of the directory in the
// end is compared with the directory.
package main

import (
	"context"
	"errors"
	"flag"
	"log"
	"math/rand/v2"
	"os"
	"os/signal"
	"runtime"
	"syscall"
)

func main() {
	var p Plan
	flag.StringVar(&p.Binary, "atoll", "bin/atoll", "the binary under test")
	flag.Uint64Var(&p.Seed, "seed", rand.Uint64(), "of the pushes and of what is torn; printed")
	flag.IntVar(&p.Clients, "clients", 2, "clients that push at once")
	flag.IntVar(&p.Pushes, "pushes", 10, "images that each of them pushes in each run of the node")
	flag.IntVar(&p.Samples, "samples", 0, "moments to try, chosen at random; 0: every one")
	flag.IntVar(&p.InSite, "site", 40, "moments to try at one node of three whose others go on; 0: none")
	flag.IntVar(&p.Workers, "workers", 2*runtime.NumCPU(), "nodes that start at once")
	flag.DurationVar(&p.Most, "most", 0, "begin no pass over the recording later; each is spread over all of it. 0: make all")
	scenes := flag.String("scenes", "/dev/shm", "where what a power cut left is laid out and started; in memory no start waits for a disk")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp("", "atoll-powerloss")
	if err != nil {
		log.Fatal(err)
	}
	p.Dir, p.Say = dir, log.Printf
	if p.Scenes, err = os.MkdirTemp(*scenes, "atoll-powerloss"); err != nil {
		log.Fatalf("%v; name another directory with -scenes", err)
	}
	if _, err := run(ctx, p); err != nil {
		log.Fatalf("seed %d, files in %s and %s: %v", p.Seed, dir, p.Scenes, err)
	}
	if err := errors.Join(os.RemoveAll(dir), os.RemoveAll(p.Scenes)); err != nil {
		log.Fatal(err)
	}
}
