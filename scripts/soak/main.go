// Command soak puts one node under mixed load (pushes, pulls, lists, deletes) by
// many clients for some minutes and says whether it stayed as it was: memory,
// file descriptors and goroutines flat, no request failed, nothing acknowledged
// missing or wrong. It runs on the loopback interface alone, in a directory that
// it removes, and prints a line for each figure: name, value, unit, goal, met.
//
// Before what counts comes a warm-up: writes until the node remembers as many
// transactions as it ever does, and a tenth of the run's time of the mixed load.
// Then: under load, the trend over the second half of the run; idle, the end of the
// run beside the end of the warm-up.
//
//	go run ./scripts/soak -seconds 600 -clients 200
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/atoll-registry/atoll/cluster/kv"
)

const mib = 1 << 20

// What memory may grow by: noise in bytes, and a share of what the files of the
// state and of the log grew by. bbolt remembers of every page which transaction
// wrote it and which pages are free, in maps of 25 to 75 bytes a page of 4 KiB, and
// the collector lets the heap reach twice what is live. A leak that is a hundredth
// of what is stored would be lost in that; one by request or connection is not.
const (
	memoryNoise = 4 * mib
	memoryShare = 0.02
)

// windowPatience bounds the first part of the warm-up, which takes a minute on an
// idle machine.
const windowPatience = 20 * time.Minute

type options struct {
	binary  string
	seconds int
	clients int
	keep    bool
}

func main() {
	var o options
	flag.StringVar(&o.binary, "atoll", "bin/atoll", "the binary to run")
	flag.IntVar(&o.seconds, "seconds", 600, "how long the load lasts")
	flag.IntVar(&o.clients, "clients", 200, "how many clients there are")
	flag.BoolVar(&o.keep, "keep", false, "keep the node's directory and log")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	met, err := soak(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
	}
	if err != nil || !met {
		os.Exit(1)
	}
}

func soak(ctx context.Context, o options) (met bool, err error) {
	dir, err := os.MkdirTemp("", "atoll-soak-")
	if err != nil {
		return false, err
	}
	if o.keep {
		fmt.Fprintln(os.Stderr, "soak: the node's directory is", dir)
	} else {
		defer os.RemoveAll(dir)
	}
	n, err := startNode(ctx, o.binary, dir)
	if err != nil {
		return false, err
	}
	defer n.stop()
	l := newLoad(n, o.clients)
	if err := l.prepare(ctx); err != nil {
		return false, fmt.Errorf("preparing: %w", err)
	}
	if err := warmUp(ctx, n, l, time.Duration(o.seconds)*time.Second/10); err != nil {
		return false, fmt.Errorf("warming up: %w", err)
	}
	before := l.requests.Load()
	idle, err := n.settled(ctx, l)
	if err != nil {
		return false, err
	}
	samples, err := watch(ctx, n, l, phase{lasts: time.Duration(o.seconds) * time.Second, work: (*client).mixed})
	if err != nil {
		return false, err
	}
	r := &report{w: tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0), met: true}
	r.line("name", "value", "unit", "goal", "met")
	r.figure("requests of the warm-up", float64(before), "")
	r.load(l, o, float64(l.requests.Load()-before))
	r.verified(l.verify(ctx))
	after, err := n.settled(ctx, l)
	if err != nil {
		return false, err
	}
	r.loaded(samples)
	r.idle(idle, after)
	for _, example := range l.examples() {
		fmt.Fprintln(os.Stderr, "soak: failed:", example)
	}
	return r.met, r.w.Flush()
}

// warmUp fills what a node fills by work, however long it is up.
func warmUp(ctx context.Context, n *node, l *load, mixed time.Duration) error {
	full := func(s sample) bool { return s.applied > kv.Window }
	samples, err := watch(ctx, n, l, phase{lasts: windowPatience, work: (*client).retag, until: full})
	if err != nil {
		return err
	}
	if last := samples[len(samples)-1]; !full(last) {
		return fmt.Errorf("in %v the node made %.0f of %d transactions: the machine is too busy", windowPatience, last.applied, kv.Window)
	}
	_, err = watch(ctx, n, l, phase{lasts: mixed, work: (*client).mixed})
	return err
}

// phase is some time of load.
type phase struct {
	lasts time.Duration
	work  func(*client, context.Context)
	until func(sample) bool // ends it early; may be nil
}

// watch runs the load and takes samples of the node.
func watch(ctx context.Context, n *node, l *load, p phase) (samples []sample, err error) {
	run, cancel := context.WithTimeout(ctx, p.lasts)
	defer cancel()
	done := make(chan struct{})
	go func() { defer close(done); l.run(run, p.work) }()
	defer func() { <-done }()
	tick := time.NewTicker(min(max(p.lasts/200, 250*time.Millisecond), 3*time.Second))
	defer tick.Stop()
	told := time.Now()
	for {
		select {
		case <-run.Done():
			<-done
			return samples, ctx.Err()
		case <-n.ended:
			cancel()
			return nil, fmt.Errorf("the node ended under load:\n%s", n.tail())
		case <-tick.C:
		}
		s, err := n.sample()
		if err != nil {
			cancel()
			return nil, err
		}
		samples = append(samples, s)
		if p.until != nil && p.until(s) {
			cancel()
		}
		if time.Since(told) >= 15*time.Second {
			told = time.Now()
			fmt.Fprintf(os.Stderr, "soak: %d requests, %d failed, %.1f MiB, %d descriptors\n", l.requests.Load(), l.failed.Load(), s.memory/mib, int(s.files))
		}
	}
}

// report prints figures and remembers whether all goals were met.
type report struct {
	w   *tabwriter.Writer
	met bool
}

func (r *report) line(cells ...string) { fmt.Fprintln(r.w, strings.Join(cells, "\t")) }

func (r *report) figure(name string, value float64, unit string) {
	r.line(name, format(value), unit, "-", "-")
}

// goal prints a figure that must not exceed a limit.
func (r *report) goal(name string, value float64, unit string, most float64) {
	met := "yes"
	if value > most {
		met, r.met = "NO", false
	}
	r.line(name, format(value), unit, "<= "+format(most), met)
}

func format(v float64) string { return strings.TrimSuffix(fmt.Sprintf("%.1f", v), ".0") }

func (r *report) load(l *load, o options, requests float64) {
	r.figure("clients", float64(o.clients), "")
	r.figure("time", float64(o.seconds), "s")
	r.figure("requests", requests, "")
	r.figure("requests per second", requests/float64(o.seconds), "1/s")
	for i, name := range kinds {
		r.figure(name+", with the warm-up", float64(l.done[i].Load()), "")
	}
	r.goal("failed requests", float64(l.failed.Load()), "", 0)
}

func (r *report) verified(checked, wrong int) {
	if checked == 0 {
		r.met = false
	}
	r.figure("images checked at the end", float64(checked), "")
	r.goal("images missing or wrong", float64(wrong), "", 0)
}

// loaded holds the second half of the run to its trend.
func (r *report) loaded(samples []sample) {
	if len(samples) < 40 {
		r.line("samples", fmt.Sprint(len(samples)), "", ">= 40", "NO")
		r.met = false
		return
	}
	half := samples[len(samples)/2:]
	stored := max(0, half[len(half)-1].stored-half[0].stored)
	r.figure("state and log on disk, growth in the second half", stored/mib, "MiB")
	for _, m := range []struct {
		name, unit string
		of         func(sample) float64
		scale      float64
		most       float64 // that it may grow by
	}{
		{"memory under load (anonymous)", "MiB", func(s sample) float64 { return s.memory }, mib, memoryNoise + memoryShare*stored},
		{"descriptors under load", "", func(s sample) float64 { return s.files }, 1, 10},
		{"goroutines under load", "", func(s sample) float64 { return s.goroutines }, 1, 20},
	} {
		r.figure(m.name, middle(half, m.of)/m.scale, m.unit)
		r.goal(m.name+", growth in the second half", trend(half, m.of)/m.scale, m.unit, m.most/m.scale)
	}
	r.figure("heap objects live", middle(half, func(s sample) float64 { return s.heap })/mib, "MiB")
}

// idle compares the quiet node after the run with the quiet node before it.
func (r *report) idle(before, after sample) {
	stored := max(0, after.stored-before.stored)
	r.figure("state and log on disk, growth in the run", stored/mib, "MiB")
	r.figure("memory idle, after the warm-up", before.memory/mib, "MiB")
	r.goal("memory idle, after the run", after.memory/mib, "MiB", (before.memory+memoryNoise+memoryShare*stored)/mib)
	r.figure("descriptors idle, after the warm-up", before.files, "")
	r.goal("descriptors idle, after the run", after.files, "", before.files+4)
	r.figure("goroutines idle, after the warm-up", before.goroutines, "")
	r.goal("goroutines idle, after the run", after.goroutines, "", before.goroutines+8)
	r.goal("unfinished uploads left on disk", after.unfinished, "", 0)
}

func middle(samples []sample, of func(sample) float64) float64 {
	values := make([]float64, len(samples))
	for i, s := range samples {
		values[i] = of(s)
	}
	return median(values)
}

// trend is by how much a value grew from the first sample to the last, by the
// median of the slopes between all pairs: what the collector of garbage does from
// one second to the next has no say in it.
func trend(samples []sample, of func(sample) float64) float64 {
	var slopes []float64
	for i, a := range samples {
		for j, b := range samples[:i] {
			slopes = append(slopes, (of(a)-of(b))/float64(i-j))
		}
	}
	return median(slopes) * float64(len(samples)-1)
}

func median(values []float64) float64 {
	slices.Sort(values)
	return values[len(values)/2]
}
