// Command chaos runs a site of real nodes in network namespaces and breaks it, with
// one fault or two at a time, while clients push and pull over HTTP. At the end it
// mends everything and asks what was promised: tags are linearizable registers,
// everything acknowledged is on every node with the right bytes, all nodes say
// the same, and no pull failed on a node that nothing was done to.
//
// It prints one line a measure, parted by tabs: name, value, unit, goal, met or
// missed; and ends with code 1 when one is missed. The schedule follows from the
// seed, the timing does not.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"math/rand/v2"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	seconds := flag.Int("seconds", 600, "how long faults are made")
	seed := flag.Uint64("seed", rand.Uint64(), "of the schedule; printed, so that it can be played again")
	binary := flag.String("atoll", "bin/atoll", "the binary under test")
	nodes := flag.Int("nodes", 3, "nodes of the site: 3 or 5")
	clients := flag.Int("clients", 6, "clients that push, pull and delete at once")
	often := flag.String("often", "", "faults, by their names and parted by commas, that are made most of the time")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	wanted, err := named(*often)
	if err != nil {
		log.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "atoll-chaos")
	if err != nil {
		log.Fatal(err)
	}
	r, err := play(ctx, Plan{
		Binary: *binary, Dir: dir, Nodes: *nodes, Clients: *clients, Seed: *seed,
		Length: time.Duration(*seconds) * time.Second, Often: wanted, Say: log.Printf,
	})
	if err != nil {
		log.Printf("seed %d: %v; what the nodes held, if there were any yet, is in %s", *seed, err, dir)
		os.Exit(1)
	}
	fmt.Print(r)
	if missed := r.Missed(); len(missed) > 0 {
		log.Printf("seed %d: missed %v; what the nodes held is in %s", *seed, missed, dir)
		os.Exit(1)
	}
	if err := os.RemoveAll(dir); err != nil {
		log.Fatal(err)
	}
}

// named gives the names of faults in a list that commas part.
func named(list string) (names []string, err error) {
	for name := range strings.SplitSeq(list, ",") {
		if name == "" {
			continue
		}
		if !slices.ContainsFunc(faults[:], func(f fault) bool { return f.name == name }) {
			return nil, fmt.Errorf("there is no fault %q", name)
		}
		names = append(names, name)
	}
	return names, nil
}
