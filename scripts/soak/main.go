// Command soak puts one node under mixed load (pushes, pulls, lists, deletes) by
// many clients for some minutes and says whether it stayed as it was: memory,
// file descriptors and goroutines flat, no request failed, nothing acknowledged
// missing or wrong. It runs on the loopback interface alone, in a directory that
// it removes, and prints a line for each figure: name, value, unit, goal, met.
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
)

const mib = 1 << 20

// idleGrowth is what an idle node may keep of a load, in bytes: the window of
// transactions that it remembers, the free lists of its files.
const idleGrowth = 24 * mib

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
	l.rest() // the connections of the preparation are no part of what is idle
	idle, err := n.settled(ctx)
	if err != nil {
		return false, err
	}
	samples, err := watch(ctx, n, l, time.Duration(o.seconds)*time.Second)
	if err != nil {
		return false, err
	}
	checked, wrong := l.verify(ctx)
	l.rest()
	// Memory goes back to the kernel after the next collection, which an idle
	// process makes every two minutes.
	after, err := n.settled(ctx)
	for range 15 {
		if err != nil || after.memory <= idle.memory+idleGrowth {
			break
		}
		after, err = n.settled(ctx)
	}
	if err != nil {
		return false, err
	}
	r := &report{w: tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0), met: true}
	r.line("name", "value", "unit", "goal", "met")
	r.load(l, o, checked, wrong)
	r.flat(samples, idle, after)
	return r.met, r.w.Flush()
}

// watch runs the load and takes samples of the node.
func watch(ctx context.Context, n *node, l *load, lasts time.Duration) (samples []sample, err error) {
	run, cancel := context.WithTimeout(ctx, lasts)
	defer cancel()
	done := make(chan struct{})
	go func() { defer close(done); l.run(run) }()
	defer func() { <-done }()
	every := max(lasts/200, 250*time.Millisecond)
	tick := time.NewTicker(every)
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

func (r *report) load(l *load, o options, checked, wrong int) {
	r.figure("clients", float64(o.clients), "")
	r.figure("time", float64(o.seconds), "s")
	r.figure("requests", float64(l.requests.Load()), "")
	r.figure("requests per second", float64(l.requests.Load())/float64(o.seconds), "1/s")
	for i, name := range kinds {
		r.figure(name, float64(l.done[i].Load()), "")
	}
	r.goal("failed requests", float64(l.failed.Load()), "", 0)
	if checked == 0 {
		r.met = false
	}
	r.figure("images checked at the end", float64(checked), "")
	r.goal("images missing or wrong", float64(wrong), "", 0)
	for _, example := range l.examples() {
		fmt.Fprintln(os.Stderr, "soak: failed:", example)
	}
}

// flat compares the time after the start, when caches fill, with the end: the
// second fifth with the last. What grows with the number of requests shows; what
// the collector of garbage does from one second to the next does not.
func (r *report) flat(samples []sample, idle, after sample) {
	if len(samples) < 20 {
		r.line("samples", fmt.Sprint(len(samples)), "", ">= 20", "NO")
		r.met = false
		return
	}
	fifth := len(samples) / 5
	early, late := samples[fifth:2*fifth], samples[len(samples)-fifth:]
	for _, m := range []struct {
		name, unit string
		of         func(sample) float64
		scale      float64
		share      float64 // that it may grow by
		least      float64 // that it may grow by in any case
	}{
		{"memory under load (anonymous)", "MiB", func(s sample) float64 { return s.memory }, mib, 0.15, 16},
		{"descriptors under load", "", func(s sample) float64 { return s.files }, 1, 0.05, 20},
		{"goroutines under load", "", func(s sample) float64 { return s.goroutines }, 1, 0.05, 50},
	} {
		a, b := middle(early, m.of)/m.scale, middle(late, m.of)/m.scale
		r.figure(m.name+", early", a, m.unit)
		r.goal(m.name+", late", b, m.unit, a+max(a*m.share, m.least))
	}
	r.figure("heap objects live, late", middle(late, func(s sample) float64 { return s.heap })/mib, "MiB")
	r.figure("memory idle, before", idle.memory/mib, "MiB")
	r.goal("memory idle, after", after.memory/mib, "MiB", (idle.memory+idleGrowth)/mib)
	r.figure("descriptors idle, before", idle.files, "")
	r.goal("descriptors idle, after", after.files, "", idle.files+8)
	r.figure("goroutines idle, before", idle.goroutines, "")
	r.goal("goroutines idle, after", after.goroutines, "", idle.goroutines+16)
	r.figure("unfinished uploads left on disk", after.unfinished, "")
}

func middle(samples []sample, of func(sample) float64) float64 {
	values := make([]float64, len(samples))
	for i, s := range samples {
		values[i] = of(s)
	}
	slices.Sort(values)
	return values[len(values)/2]
}
