package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// measure is a cost in processor time that is compared with the floor's.
type measure struct {
	name  string
	unit  string
	scale float64 // turns the processor seconds of a round into the unit
	goal  float64 // at most so many times the floor
	work  func(ctx context.Context, s *server, round int) error
}

// compare takes a measure on all servers in turns and prints the medians and
// the ratio to the floor.
func (b *bench) compare(ctx context.Context, f fleet, m measure) error {
	figures := make([][]float64, len(f))
	var ratios []float64
	for round := range b.pairs {
		for i, s := range f {
			used, err := s.cost(func() error { return m.work(ctx, s, round) })
			if err != nil {
				return fmt.Errorf("%s, %s: %w", m.name, s.name, err)
			}
			figures[i] = append(figures[i], used*m.scale)
		}
		ratios = append(ratios, figures[0][round]/figures[1][round])
	}
	for i, s := range f {
		b.print(m.name+"_"+s.name, median(figures[i]), m.unit)
	}
	b.judge(line{m.name + "_ratio", median(ratios), "x floor"}, "<=", m.goal)
	return nil
}

// line is a figure with its name.
type line struct {
	name  string
	value float64
	unit  string
}

func (b *bench) print(name string, value float64, unit string) {
	b.say(fmt.Sprintf("%s\t%s\t%s\t-\t-", name, figure(value), unit))
}

// judge prints a figure with its goal, which it is to be at most ("<=") or at
// least (">=").
func (b *bench) judge(l line, how string, goal float64) {
	met := l.value <= goal
	if how == ">=" {
		met = l.value >= goal
	}
	verdict := "missed"
	if met {
		verdict = "met"
	}
	b.say(fmt.Sprintf("%s\t%s\t%s\t%s %s\t%s", l.name, figure(l.value), l.unit, how, figure(goal), verdict))
}

func (b *bench) say(text string) {
	fmt.Println(text)
	b.lines = append(b.lines, text)
}

// figure shows three digits, and whole numbers whole.
func figure(v float64) string {
	if v >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 0 {
		return (sorted[middle-1] + sorted[middle]) / 2
	}
	return sorted[middle]
}

func repeat(n int, work func(i int) error) error {
	for i := range n {
		if err := work(i); err != nil {
			return err
		}
	}
	return nil
}

// together runs work for 0..n-1 by several clients at once, each of which goes on by
// itself: one who hands out the work would be waited for.
func together(clients, n int, work func(i int) error) error {
	var next atomic.Int64
	ended := make(chan error, clients)
	for range clients {
		go func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					ended <- nil
					return
				}
				if err := work(i); err != nil {
					ended <- err
					return
				}
			}
		}()
	}
	var err error
	for range clients {
		err = errors.Join(err, <-ended)
	}
	return err
}

const heading = "# Benchmarks\n\nThe runs below are written by `make bench` and `make bench-long`, the newest first.\n"

// endOfNotes parts what people write about the figures from the runs.
const endOfNotes = "<!-- runs -->\n"

// record puts the run on top of the runs of earlier days, below the notes.
func (b *bench) record(name string) error {
	old, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	notes, runs, ok := strings.Cut(string(old), endOfNotes)
	if !ok {
		notes, runs = heading+"\n", ""
	}
	kind := "make bench"
	switch {
	case b.only != "":
		kind = "make bench-" + b.only
	case b.long:
		kind = "make bench-long"
	}
	var out strings.Builder
	fmt.Fprintf(&out, "%s%s\n## %s, `%s`, %s\n\n```\n%s\n```\n", notes, endOfNotes, time.Now().UTC().Format(time.DateOnly), kind, machine(), strings.Join(b.lines, "\n"))
	out.WriteString(runs)
	return os.WriteFile(name, []byte(out.String()), 0o644)
}

func machine() string {
	model := "unknown processor"
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for text := range strings.Lines(string(data)) {
			if name, ok := strings.CutPrefix(text, "model name\t: "); ok {
				model = strings.TrimSpace(name)
				break
			}
		}
	}
	load := "unknown"
	if data, err := os.ReadFile("/proc/loadavg"); err == nil {
		load, _, _ = strings.Cut(string(data), " ")
	}
	return fmt.Sprintf("%d x %s, load %s at the end", runtime.NumCPU(), model, load)
}
