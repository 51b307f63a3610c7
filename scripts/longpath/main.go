// Command longpath measures how the peer port carries bulk: over a line of 100 Mbit/s
// with a round trip of 100 ms that loses packets, beside one cubic TCP connection over
// the same line in the same run, and on one machine, beside a bare TLS copy. It prints
// one line a measure, as the benchmark does:
//
//	name <tab> value <tab> unit <tab> goal <tab> met|missed
//
// It makes network namespaces, so it needs root.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/atoll-registry/atoll/scripts/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	var err error
	if len(os.Args) > 1 && os.Args[1] == "end" {
		err = end(ctx, os.Args[2:])
	} else {
		err = measure(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "longpath:", err)
		os.Exit(1)
	}
}

const (
	lineRate  = 100e6 / 8 // bytes a second
	lineDelay = 50 * time.Millisecond
)

// way is a way to carry bulk over the line.
type way struct {
	name  string
	port  string // of the source: see end
	how   string // see end
	conns int
}

func measure(ctx context.Context) error {
	seconds := flag.Int("seconds", 12, "length of a transfer")
	mib := flag.Int64("mib", 2048, "size of a copy on one machine")
	flag.Parse()
	if err := cost(*mib << 20); err != nil {
		return err
	}
	for _, loss := range []float64{0.01, 0.05} {
		if err := overLine(ctx, loss, *seconds); err != nil {
			return fmt.Errorf("loss of %.0f %%: %w", loss*100, err)
		}
	}
	return nil
}

// overLine measures the ways over a line that loses packets.
func overLine(ctx context.Context, loss float64, seconds int) (err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	l := lab.New()
	defer func() { err = errors.Join(err, l.Close(context.WithoutCancel(ctx))) }()
	far, err := l.Host(ctx, "far", "far", "10.78.0.2/24")
	if err != nil {
		return err
	}
	near, err := l.Host(ctx, "near", "near", "10.78.0.1/24")
	if err != nil {
		return err
	}
	line, err := l.Line(ctx, "near", "far", lab.Path{Rate: lineRate, Delay: lineDelay, Loss: loss, Seed: 5, Queue: lineRate / 5})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, line.Close()) }()
	dir, err := os.MkdirTemp("", "longpath")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := writeSite(dir); err != nil {
		return err
	}
	self, err := filepath.Abs(os.Args[0])
	if err != nil {
		return err
	}
	source, err := far.Start(ctx, os.Stderr, nil, self, "end", "source", dir, far.IP)
	if err != nil {
		return err
	}
	defer source.Kill()
	rates := map[string]float64{}
	for _, w := range []way{
		{"cubic", barePort, "bare", 1},
		{"atoll_bbr", bbrPort, "tcp", 1},
		{"atoll_quic_8", plainPort, "quic", 8},
		{"atoll_tcp_8", plainPort, "tcp", 8},
		{"atoll_quic_1", plainPort, "quic", 1},
	} {
		if rates[w.name], err = w.median(func() (string, error) {
			return near.Run(ctx, self, "end", "sink", dir, far.IP, w.port, w.how, strconv.Itoa(w.conns), strconv.Itoa(seconds))
		}); err != nil {
			return err
		}
		goal := 0.0
		if w.name == "atoll_bbr" {
			goal = map[float64]float64{0.01: 80, 0.05: 65}[loss]
		}
		say(fmt.Sprintf("long_%.0f%%_%s", loss*100, w.name), rates[w.name], "Mbit/s", ">=", goal)
	}
	for _, w := range []struct {
		way
		seconds int
	}{
		{way{"blob_bbr", blobPort, "tcp", 1}, seconds},
		{way{"blob_bbr_whole", blobPort, "tcp", 1}, 0},
		{way{"blob_tcp", plainBlobPort, "tcp", 1}, seconds},
		{way{"blob_quic", plainBlobPort, "quic", 1}, seconds},
	} {
		if rates[w.name], err = w.median(func() (string, error) {
			return near.Run(ctx, self, "end", "fetch", dir, far.IP, w.port, w.how, strconv.Itoa(w.seconds))
		}); err != nil {
			return err
		}
		goal := 0.0
		if w.name == "blob_bbr" {
			goal = map[float64]float64{0.01: 80, 0.05: 65}[loss]
		}
		say(fmt.Sprintf("long_%.0f%%_%s", loss*100, w.name), rates[w.name], "Mbit/s", ">=", goal)
	}
	for _, name := range []string{"atoll_quic_8", "atoll_tcp_8", "blob_tcp", "blob_quic"} {
		say(fmt.Sprintf("long_%.0f%%_%s_over_cubic", loss*100, name), rates[name]/rates["cubic"], "x", ">=", 8)
	}
	return nil
}

// median of so many runs, each of which prints its rate. What BBR makes of a path in ten
// seconds depends on which packets are lost, so it has three.
func (w way) median(run func() (string, error)) (float64, error) {
	times := 1
	if strings.HasSuffix(w.name, "_bbr") {
		times = 3
	}
	var rates []float64
	for range times {
		out, err := run()
		if err != nil {
			return 0, err
		}
		rate, err := strconv.ParseFloat(strings.TrimSpace(out), 64)
		if err != nil {
			return 0, err
		}
		rates = append(rates, rate)
	}
	slices.Sort(rates)
	return rates[len(rates)/2], nil
}

// say prints a measure; a goal of 0 is none.
func say(name string, value float64, unit, relation string, goal float64) {
	if goal == 0 {
		fmt.Printf("%s\t%.2f\t%s\n", name, value, unit)
		return
	}
	verdict := "missed"
	if relation == ">=" && value >= goal || relation == "<=" && value <= goal {
		verdict = "met"
	}
	fmt.Printf("%s\t%.2f\t%s\t%s %g\t%s\n", name, value, unit, relation, goal, verdict)
}
