// Command bench measures Atoll beside the floor, a server that does the least
// that must be done, and distribution's registry, in one run and in turns, and
// prints one line a measure:
//
//	name <tab> value <tab> unit <tab> goal <tab> met|missed
//
// Lines without a goal are the anchors. Processor time is the server process's
// own. A ratio is the median over the pairs; the machine's speed does not matter
// to it. Every request to a registry carries a token, and every write is synced
// by Atoll and the floor before it is answered.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"
)

func main() {
	if len(os.Args) >= 4 && os.Args[1] == "floor" {
		var pair certificate
		if len(os.Args) == 6 {
			pair = certificate{os.Args[4], os.Args[5]}
		}
		fmt.Fprintln(os.Stderr, floor(os.Args[2], os.Args[3], pair))
		os.Exit(1)
	}
	if len(os.Args) == 5 && os.Args[1] == "inside" {
		if err := serveInside(context.Background(), os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	var b bench
	write := flag.String("write", "", "file of the figures to bring up to date")
	flag.StringVar(&b.only, "only", "", "the groups of rows to run, parted by commas, for work on them: "+groupNames())
	flag.IntVar(&b.pairs, "pairs", 10, "how often each measure is taken on each side")
	flag.Int64Var(&b.mib, "mib", 128, "size of the big blob")
	flag.Float64Var(&b.repairGB, "gb", 10, "how much is repaired after the loss of a node, in GB")
	flag.Float64Var(&b.linkMB, "link", 100, "speed of the link over which that comes, in MB/s")
	flag.BoolVar(&b.long, "long", false, "run the rows that take an hour, too")
	flag.StringVar(&b.atoll, "atoll", "bin/atoll", "the program to measure")
	flag.StringVar(&b.peer, "peer", ".cache/bin/registry", "distribution's registry, which scripts/testdeps/install installs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	limit := 20 * time.Minute
	if b.long {
		limit = 3 * time.Hour
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := b.run(ctx)
	if err == nil && *write != "" {
		err = b.record(*write)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench holds the servers and the lines so far.
type bench struct {
	pairs int
	mib   int64
	long  bool
	only  string // the one group to run
	atoll string
	peer  string
	dir   string
	fleet fleet
	lines []string
	began time.Time

	repairGB, linkMB float64
}

// group is rows that belong together.
type group struct {
	name string
	run  func(*bench, context.Context) error
}

// groups are in the order in which they run: each finds what those before it
// have pushed.
func groups() []group {
	return []group{
		{"idle", (*bench).idle},
		{"blobs", (*bench).blobs},
		{"tls", (*bench).secure},
		{"manifests", (*bench).manifests},
		{"writes", (*bench).writes},
		{"start", (*bench).starts},
		{"list", (*bench).list},
		{"sizes", (*bench).sizes},
		{"million", (*bench).million},
		{"cluster", (*bench).cluster},
		{"repair", (*bench).repair},
		{"failover", (*bench).failover},
	}
}

func groupNames() (names string) {
	for _, g := range groups() {
		names += " " + g.name
	}
	return names
}

func (b *bench) run(ctx context.Context) error {
	b.began = time.Now()
	dir, err := os.MkdirTemp("", "atoll-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b.dir = dir
	if _, err := os.Stat(b.peer); errors.Is(err, os.ErrNotExist) {
		fmt.Fprintf(os.Stderr, "bench: there is no %s, so distribution's registry is left out; scripts/testdeps/install .cache/bin bench installs it\n", b.peer)
		b.peer = ""
	}
	if b.fleet, err = launch(ctx, place{dir: dir, atoll: b.atoll, peer: b.peer}); err != nil {
		return err
	}
	defer func() { b.fleet.stop() }()
	for _, g := range groups() {
		if b.only != "" && !slices.Contains(strings.Split(b.only, ","), g.name) || b.only == "" && slices.Contains([]string{"cluster", "repair", "failover"}, g.name) {
			continue // sites of several nodes have a run of their own
		}
		if err := g.run(b, ctx); err != nil {
			return fmt.Errorf("%s: %w", g.name, err)
		}
		fmt.Fprintf(os.Stderr, "bench: %s ended after %v\n", g.name, time.Since(b.began).Round(time.Second))
	}
	return nil
}
