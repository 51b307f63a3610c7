// Command bench measures Atoll beside the floor, a server that does the least
// that must be done, in one run and in turns, and prints one line a measure:
//
//	name <tab> value <tab> unit <tab> goal <tab> met|missed
//
// Processor time is the server process's own. A ratio is the median over the
// pairs; the machine's speed does not matter to it.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

func main() {
	if len(os.Args) == 3 && os.Args[1] == "floor" {
		fmt.Fprintln(os.Stderr, floor(os.Args[2]))
		os.Exit(1)
	}
	write := flag.String("write", "", "file of the figures to bring up to date")
	pairs := flag.Int("pairs", 5, "how often each measure is taken on both sides")
	mib := flag.Int64("mib", 256, "size of the big blob")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 15*time.Minute)
	defer cancel()
	b := &bench{pairs: *pairs, size: *mib << 20}
	err := b.run(ctx)
	if err == nil && *write != "" {
		err = b.record(*write)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench holds both servers and the lines so far.
type bench struct {
	pairs int
	size  int64
	atoll *process
	floor *process
	user  *client
	lines []string
}

func (b *bench) run(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "atoll-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := b.start(ctx, dir); err != nil {
		return err
	}
	defer b.atoll.stop()
	defer b.floor.stop()
	if b.user, err = login(ctx, b.atoll.addr); err != nil {
		return err
	}
	for _, take := range []func(context.Context) error{b.push, b.pull, b.manifest, b.memory} {
		if err := take(ctx); err != nil {
			return err
		}
	}
	return nil
}

const password = "Bench-Password-1"

func (b *bench) start(ctx context.Context, dir string) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	floorDir := filepath.Join(dir, "floor")
	if err := os.Mkdir(floorDir, 0o700); err != nil {
		return err
	}
	whole := func(line string) (string, bool) { return line, true }
	if b.floor, err = start(ctx, whole, nil, self, "floor", floorDir); err != nil {
		return err
	}
	served := func(line string) (string, bool) {
		_, rest, ok := strings.Cut(line, "http://")
		addr, _, _ := strings.Cut(rest, " ")
		return addr, ok
	}
	b.atoll, err = start(ctx, served, []string{"ATOLL_ADMIN_PASSWORD=" + password}, "bin/atoll", "serve", "--init",
		"--data", filepath.Join(dir, "atoll"), "--listen", "127.0.0.1:5099", "--peer-listen", "127.0.0.1:5098", "--log-level", "warn")
	return err
}

// cost runs work and gives the processor seconds that the server spent on it.
func cost(p *process, work func() error) (float64, error) {
	before, err := p.cpu()
	if err != nil {
		return 0, err
	}
	if err := work(); err != nil {
		return 0, err
	}
	after, err := p.cpu()
	return after - before, err
}

// measure is work that both sides do and that costs processor time.
type measure struct {
	name, unit string
	scale      float64 // from processor seconds to the unit
	goal       float64 // the highest ratio to the floor that is good
	ours       func(round int) error
	floors     func(round int) error
}

// compare takes a measure on both sides in turns and prints the medians and
// their ratio.
func (b *bench) compare(m measure) error {
	var mine, theirs, ratios []float64
	for round := range b.pairs {
		our, err := cost(b.atoll, func() error { return m.ours(round) })
		if err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		floor, err := cost(b.floor, func() error { return m.floors(round) })
		if err != nil {
			return fmt.Errorf("%s, floor: %w", m.name, err)
		}
		mine, theirs, ratios = append(mine, our*m.scale), append(theirs, floor*m.scale), append(ratios, our/floor)
	}
	b.print(m.name+"_atoll", median(mine), m.unit, "-", "-")
	b.print(m.name+"_floor", median(theirs), m.unit, "-", "-")
	ratio := median(ratios)
	b.print(m.name+"_ratio", ratio, "x floor", fmt.Sprintf("<= %.2f", m.goal), verdict(ratio <= m.goal))
	return nil
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}

func verdict(met bool) string {
	if met {
		return "met"
	}
	return "missed"
}

func (b *bench) print(name string, value float64, unit, goal, verdict string) {
	line := fmt.Sprintf("%s\t%.3g\t%s\t%s\t%s", name, value, unit, goal, verdict)
	fmt.Println(line)
	b.lines = append(b.lines, line)
}

func (b *bench) gigabytes() float64 { return float64(b.size) / 1e9 }

func (b *bench) push(ctx context.Context) error {
	ours := func(round int) error {
		body := newBody(b.size, byte(round))
		return b.user.push(ctx, "library/bench", body)
	}
	floors := func(round int) error {
		body := newBody(b.size, byte(round)+128)
		return put(ctx, "http://"+b.floor.addr+"/"+body.digest.Encoded(), body)
	}
	return b.compare(measure{"push_cpu", "cpu-s/GB", 1 / b.gigabytes(), 1.15, ours, floors})
}

func repeat(n int, work func() error) error {
	for range n {
		if err := work(); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) pull(ctx context.Context) error {
	const pulls = 4 // a round
	body := newBody(b.size, 200)
	if err := b.user.push(ctx, "library/bench", body); err != nil {
		return err
	}
	if err := put(ctx, "http://"+b.floor.addr+"/"+body.digest.Encoded(), newBody(b.size, 200)); err != nil {
		return err
	}
	ours := func(int) error {
		return repeat(pulls, func() error { return b.user.pull(ctx, "library/bench", body.digest, b.size) })
	}
	floors := func(int) error {
		return repeat(pulls, func() error { return get(ctx, "http://"+b.floor.addr+"/"+body.digest.Encoded(), "", b.size) })
	}
	return b.compare(measure{"pull_cpu", "cpu-s/GB", 1 / b.gigabytes() / pulls, 1.3, ours, floors})
}

func (b *bench) manifest(ctx context.Context) error {
	const requests = 4000
	data, err := b.user.pushManifest(ctx, "library/bench", "v1")
	if err != nil {
		return err
	}
	if err := put(ctx, "http://"+b.floor.addr+"/manifest", body{Reader: bytes.NewReader(data), size: int64(len(data))}); err != nil {
		return err
	}
	ours := func(int) error {
		return repeat(requests, func() error { return b.user.manifest(ctx, "library/bench", "v1", int64(len(data))) })
	}
	floors := func(int) error {
		return repeat(requests, func() error { return get(ctx, "http://"+b.floor.addr+"/manifest", "", int64(len(data))) })
	}
	return b.compare(measure{"manifest_get_cpu", "cpu-us/request", 1e6 / requests, 2, ours, floors})
}

// memory reads the peak of 50 pulls at once above what the server takes idle.
func (b *bench) memory(ctx context.Context) error {
	const pulls, goal = 50, 20.0
	body := newBody(16<<20, 201)
	if err := b.user.push(ctx, "library/bench", body); err != nil {
		return err
	}
	idle, err := b.atoll.memory("VmRSS")
	if err != nil {
		return err
	}
	if err := b.atoll.forgetPeak(); err != nil {
		return err
	}
	errs := make(chan error, pulls)
	for range pulls {
		go func() { errs <- b.user.pull(ctx, "library/bench", body.digest, body.size) }()
	}
	for range pulls {
		err = errors.Join(err, <-errs)
	}
	if err != nil {
		return err
	}
	peak, err := b.atoll.memory("VmHWM")
	if err != nil {
		return err
	}
	b.print("rss_idle", idle, "MB", "-", "-")
	b.print("rss_peak_50_pulls", peak, "MB", fmt.Sprintf("<= idle + %.0f", goal), verdict(peak <= idle+goal))
	return nil
}

const heading = "# Benchmarks\n\nWritten by `make bench`. Ratios are medians over interleaved pairs and hold on other\nmachines; absolute figures are those of the machine named.\n"

// record puts the run on top of the runs of earlier days.
func (b *bench) record(name string) error {
	old, err := os.ReadFile(name)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	rest := strings.TrimPrefix(string(old), heading)
	var out strings.Builder
	fmt.Fprintf(&out, "%s\n## %s, %s\n\n```\n%s\n```\n", heading, time.Now().UTC().Format(time.DateOnly), machine(), strings.Join(b.lines, "\n"))
	out.WriteString(rest)
	return os.WriteFile(name, []byte(out.String()), 0o644)
}

func machine() string {
	model := "unknown processor"
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		cores := strings.Count(string(data), "processor\t")
		for line := range strings.Lines(string(data)) {
			if name, ok := strings.CutPrefix(line, "model name\t: "); ok {
				model = fmt.Sprintf("%d x %s", cores, strings.TrimSpace(name))
				break
			}
		}
	}
	return model
}

var _ io.Reader = body{}
