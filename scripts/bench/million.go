package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	millions   = 1_000_000
	largeText  = 45_000 // bytes of a large manifest that do not compress
	largePuts  = 3000   // of them make 180 MB of log: a snapshot is due at 268
	readsApart = 10_000
	burstPuts  = 20_000
)

// million brings the repository to 1,000,000 artifacts and measures starts on
// them, and memory.
func (b *bench) million(ctx context.Context) error {
	if !b.long {
		return nil
	}
	if err := b.populate(ctx); err != nil {
		return err
	}
	if err := b.pushLarge(ctx, 0, largePuts); err != nil {
		return err
	}
	seconds, cpu, err := b.restart(ctx, 3, listTags)
	if err != nil {
		return err
	}
	b.judge(line{"start_1000000_artifacts", seconds, "s"}, "<=", 3)
	b.print("start_1000000_artifacts_cpu", cpu, "cpu-s")
	if err := pause(ctx, 3*time.Second); err != nil {
		return err
	}
	if err := b.printMemory("after_start"); err != nil {
		return err
	}
	s := b.fleet[0]
	if err := together(writers, readsApart, func(i int) error {
		return s.manifest(ctx, large, tagOf(listTags+i*7919%millions), -1)
	}); err != nil {
		return err
	}
	full, err := s.memory("VmRSS")
	if err != nil {
		return err
	}
	b.print("rss_1000000_artifacts_at_the_end_of_10000_reads", full, "MB")
	if err := pause(ctx, 20*time.Second); err != nil { // the node hands pages back every 10 s
		return err
	}
	if err := b.printMemory("after_10000_reads"); err != nil {
		return err
	}
	if err := b.saved(ctx); err != nil {
		return err
	}
	if err := b.smallPuts(ctx); err != nil {
		return err
	}
	return b.among(ctx, listTags, millions)
}

// populate fills the repository and waits until the node has taken it in.
func (b *bench) populate(ctx context.Context) error {
	s := b.fleet[0]
	sample, err := b.teach(ctx, listTags+millions)
	if err != nil {
		return err
	}
	s.stop()
	began := time.Now()
	if err := fill(s.dir, listTags, listTags+millions, sample); err != nil {
		return fmt.Errorf("fill: %w", err)
	}
	fmt.Fprintf(os.Stderr, "bench: filled in %v\n", time.Since(began).Round(time.Second))
	if s.process, err = s.begin(ctx); err != nil {
		return err
	}
	peak := s.watch("VmRSS")
	err = s.awaitFor(ctx, 30*time.Minute, func() error { return s.manifest(ctx, large, tagOf(listTags), -1) })
	highest := peak()
	if err != nil {
		return err
	}
	cpu, err := s.cpu()
	if err != nil {
		return err
	}
	b.print("restore_1000000_artifacts", time.Since(s.began).Seconds(), "s")
	b.print("restore_1000000_artifacts_cpu", cpu, "cpu-s")
	b.judge(line{"restore_1000000_artifacts_peak_rss", highest, "MB"}, "<=", 150)
	info, err := os.Stat(filepath.Join(s.dir, "meta.db"))
	if err != nil {
		return err
	}
	b.print("state_per_manifest_and_tag_at_1000000", float64(info.Size())/millions, "bytes")
	return nil
}

// pushLarge pushes manifests that fill the log.
func (b *bench) pushLarge(ctx context.Context, from, to int) error {
	s := b.fleet[0]
	return together(writers, to-from, func(i int) error {
		data, err := largeManifest(from + i)
		if err != nil {
			return err
		}
		return s.putManifest(ctx, large, fmt.Sprintf("large-%07d", from+i), data)
	})
}

func largeManifest(number int) ([]byte, error) {
	text := make([]byte, largeText)
	if _, err := io.ReadFull(stream(byte(number)), text); err != nil {
		return nil, err
	}
	return json.Marshal(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		ArtifactType: "application/vnd.example.bench", Config: v1.DescriptorEmptyJSON, Layers: []v1.Descriptor{v1.DescriptorEmptyJSON},
		Annotations: map[string]string{"org.example.number": fmt.Sprint(number), "org.example.text": base64.StdEncoding.EncodeToString(text)},
	})
}

// printMemory prints what the node has in memory, and how much of that is its own,
// which nothing but its end gives back. The rest is pages of files that it has
// mapped: the kernel's cache, which goes when anything else wants the room.
func (b *bench) printMemory(when string) error {
	s := b.fleet[0]
	all, err := s.memory("VmRSS")
	if err != nil {
		return err
	}
	own, err := s.memory("RssAnon")
	if err != nil {
		return err
	}
	b.judge(line{"rss_1000000_artifacts_" + when, all, "MB"}, "<=", 150)
	b.print("rss_1000000_artifacts_"+when+"_anonymous", own, "MB")
	return nil
}

// saved pushes until a snapshot is due and measures memory while it is taken.
func (b *bench) saved(ctx context.Context) error {
	s := b.fleet[0]
	dir := filepath.Join(s.dir, "raft", "snapshots")
	before, err := newestSnapshot(dir)
	if err != nil {
		return err
	}
	peak, own := s.watch("VmRSS"), s.watch("RssAnon")
	defer func() { peak(); own() }()
	limit := time.NewTimer(30 * time.Minute)
	defer limit.Stop()
	for n := largePuts; ; n += writers {
		newest, err := newestSnapshot(dir)
		if err != nil {
			return err
		}
		if newest != before {
			break
		}
		if err := b.pushLarge(ctx, n, n+writers); err != nil {
			return err
		}
		select {
		case <-limit.C:
			return fmt.Errorf("no snapshot was taken in half an hour")
		default:
		}
	}
	b.judge(line{"rss_1000000_artifacts_peak_in_snapshot", peak(), "MB"}, "<=", 150)
	b.print("rss_1000000_artifacts_peak_in_snapshot_anonymous", own(), "MB")
	return nil
}

// smallPuts measures memory while manifests come as fast as they can, each with rows at
// places of its own all over the state.
func (b *bench) smallPuts(ctx context.Context) error {
	s := b.fleet[0]
	peak, own := s.watch("VmRSS"), s.watch("RssAnon")
	first := listTags + millions
	perSecond, _, err := rate(writers, burstPuts, func(i int) error {
		data, err := manifest(first + i)
		if err != nil {
			return err
		}
		return s.putManifest(ctx, large, tagOf(first+i), data)
	})
	highest, anonymous := peak(), own()
	if err != nil {
		return err
	}
	b.print("put_rate_on_1000000_artifacts", perSecond, "manifests/s")
	b.judge(line{"rss_1000000_artifacts_peak_in_puts", highest, "MB"}, "<=", 150)
	b.print("rss_1000000_artifacts_peak_in_puts_anonymous", anonymous, "MB")
	return nil
}

// newestSnapshot is the name of the newest snapshot that is complete.
func newestSnapshot(dir string) (newest string, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	var at time.Time
	for _, e := range entries {
		info, err := e.Info()
		if err == nil && !strings.HasSuffix(e.Name(), ".tmp") && info.ModTime().After(at) {
			newest, at = e.Name(), info.ModTime()
		}
	}
	return newest, nil
}

// sizes measures a node of its own with 10,000, 100,000 and, in the long run,
// 1,000,000 artifacts: how it comes by them as a snapshot, its starts, what it has
// in memory then, and a snapshot of all.
func (b *bench) sizes(ctx context.Context) error {
	counts := []int{10_000, 100_000}
	if b.long {
		counts = append(counts, millions)
	}
	for _, count := range counts {
		if err := b.size(ctx, count); err != nil {
			return fmt.Errorf("%d artifacts: %w", count, err)
		}
	}
	return nil
}

func (b *bench) size(ctx context.Context, count int) (err error) {
	p := place{dir: filepath.Join(b.dir, fmt.Sprint("size", count)), atoll: b.atoll}
	s, err := launchAtoll(ctx, p, certificate{}, newClient(p))
	if err != nil {
		return err
	}
	others := b.fleet
	b.fleet = fleet{s}
	defer func() {
		s.stop()
		b.fleet = others
	}()
	if err := s.registry.config(ctx, large); err != nil {
		return err
	}
	sample, err := b.teach(ctx, count)
	if err != nil {
		return err
	}
	s.stop()
	if err := fill(s.dir, 0, count, sample); err != nil {
		return fmt.Errorf("fill: %w", err)
	}
	if s.process, err = s.begin(ctx); err != nil {
		return err
	}
	if err := s.awaitFor(ctx, 30*time.Minute, func() error { return s.manifest(ctx, large, tagOf(0), -1) }); err != nil {
		return err
	}
	name := fmt.Sprint("_with_", count)
	b.print("restore"+name, time.Since(s.began).Seconds(), "s")
	seconds, cpu, err := b.restart(ctx, 3, 0)
	if err != nil {
		return err
	}
	b.judge(line{"start" + name, seconds, "s"}, "<=", 3)
	b.print("start"+name+"_cpu", cpu, "cpu-s")
	if err := pause(ctx, 20*time.Second); err != nil { // the node hands pages back every 10 s
		return err
	}
	rss, err := s.memory("VmRSS")
	if err != nil {
		return err
	}
	own, err := s.memory("RssAnon")
	if err != nil {
		return err
	}
	b.judge(line{"rss_after_start" + name, rss, "MB"}, "<=", 150)
	b.print("rss_after_start"+name+"_anonymous", own, "MB")
	return b.snapshot(ctx, name, count)
}

// snapshot starts the node so that a push makes a snapshot due, and measures it: from
// the time that is in its name to the last change of its directory.
func (b *bench) snapshot(ctx context.Context, name string, count int) error {
	s := b.fleet[0]
	dir := filepath.Join(s.dir, "raft", "snapshots")
	before, err := newestSnapshot(dir)
	if err != nil {
		return err
	}
	s.kill()
	s.program.args = append(slices.Clone(s.program.args), "--snapshot-bytes", "1")
	if s.process, err = s.begin(ctx); err != nil {
		return err
	}
	peak := s.watch("RssAnon")
	defer peak()
	if err := s.await(ctx, func() error { return s.manifest(ctx, large, tagOf(0), -1) }); err != nil {
		return err
	}
	data, err := manifest(count + samples)
	if err != nil {
		return err
	}
	if err := s.putManifest(ctx, large, "one-more", data); err != nil {
		return err
	}
	newest := before
	if err := s.awaitFor(ctx, 10*time.Minute, func() (err error) {
		if newest, err = newestSnapshot(dir); err == nil && newest == before {
			err = fmt.Errorf("no snapshot was taken")
		}
		return err
	}); err != nil {
		return err
	}
	parts := strings.Split(newest, "-")
	begun, err := strconv.ParseInt(parts[len(parts)-1], 10, 64)
	if err != nil {
		return fmt.Errorf("the snapshot %s does not say when it was begun: %w", newest, err)
	}
	var bytes int64
	var ended time.Time
	if err := filepath.WalkDir(filepath.Join(dir, newest), func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err == nil && !e.IsDir() {
			bytes += info.Size()
		}
		if err == nil && info.ModTime().After(ended) {
			ended = info.ModTime()
		}
		return err
	}); err != nil {
		return err
	}
	b.print("snapshot"+name, ended.Sub(time.UnixMilli(begun)).Seconds(), "s")
	b.print("snapshot"+name+"_size", float64(bytes)/1e6, "MB")
	b.print("snapshot"+name+"_peak_anonymous", peak(), "MB")
	return nil
}
