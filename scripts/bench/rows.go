package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
)

const maxBinary = 45 // MB, as much as an idle node may take

// idle reads what the servers take before anything is asked of them, and the
// size of what is installed.
func (b *bench) idle(ctx context.Context) error {
	if err := pause(ctx, 3*time.Second); err != nil {
		return err
	}
	for _, s := range b.fleet {
		rss, err := s.memory("VmRSS")
		if err != nil {
			return err
		}
		if s.name == "atoll" {
			b.judge(line{"idle_rss_atoll", rss, "MB"}, "<=", 45)
			continue
		}
		b.print("idle_rss_"+s.name, rss, "MB")
	}
	for _, s := range b.fleet {
		info, err := os.Stat(s.path)
		if err != nil {
			return err
		}
		switch size := float64(info.Size()) / 1e6; s.name {
		case "atoll":
			b.judge(line{"binary_atoll", size, "MB"}, "<=", maxBinary)
		case "distribution":
			b.print("binary_distribution", size, "MB")
		}
	}
	return nil
}

func (b *bench) bytes() int64       { return b.mib << 20 }
func (b *bench) gigabytes() float64 { return float64(b.bytes()) / 1e9 }

// blobs measures pushing and pulling content over plain HTTP.
func (b *bench) blobs(ctx context.Context) error {
	err := b.compare(ctx, b.fleet, measure{"push_cpu", "cpu-s/GB", 1 / b.gigabytes(), 1.15, func(ctx context.Context, s *server, round int) error {
		return s.push(ctx, small, newBody(b.bytes(), byte(round)))
	}})
	if err != nil {
		return err
	}
	if err := b.pull(ctx, b.fleet, "pull_cpu", 1.3); err != nil {
		return err
	}
	if err := b.crowd(ctx); err != nil {
		return err
	}
	return b.tiny(ctx)
}

// big is the blob that is pulled.
func (b *bench) big(ctx context.Context, f fleet) (digest.Digest, error) {
	var d digest.Digest
	for _, s := range f {
		body := newBody(b.bytes(), 200)
		d = body.digest
		if err := s.push(ctx, small, body); err != nil {
			return d, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return d, nil
}

func (b *bench) pull(ctx context.Context, f fleet, name string, goal float64) error {
	const pulls = 3 // a round
	d, err := b.big(ctx, f)
	if err != nil {
		return err
	}
	return b.compare(ctx, f, measure{name, "cpu-s/GB", 1 / b.gigabytes() / pulls, goal, func(ctx context.Context, s *server, _ int) error {
		return repeat(pulls, func(int) error { return s.pull(ctx, small, d, b.bytes()) })
	}})
}

// crowd reads the peak of 50 pulls at once above what the server took before.
func (b *bench) crowd(ctx context.Context) error {
	const pulls = 50
	d, err := b.big(ctx, b.fleet)
	if err != nil {
		return err
	}
	for _, s := range b.fleet {
		before, err := s.memory("VmRSS")
		if err != nil {
			return err
		}
		if err := s.forgetPeak(); err != nil {
			return err
		}
		if err := together(pulls, pulls, func(int) error { return s.pull(ctx, small, d, b.bytes()) }); err != nil {
			return err
		}
		peak, err := s.memory("VmHWM")
		if err != nil {
			return err
		}
		b.print("pulls50_peak_rss_"+s.name, peak, "MB")
		if s.name == "atoll" {
			b.judge(line{"pulls50_growth_atoll", peak - before, "MB"}, "<=", 20)
			continue
		}
		b.print("pulls50_growth_"+s.name, peak-before, "MB")
	}
	return nil
}

// tiny measures a pull of 2 KB.
func (b *bench) tiny(ctx context.Context) error {
	const requests, size = 1000, 2 << 10
	var d digest.Digest
	for _, s := range b.fleet {
		body := newBody(size, 201)
		d = body.digest
		if err := s.push(ctx, small, body); err != nil {
			return err
		}
	}
	return b.compare(ctx, b.fleet, measure{"blob_2k_cpu", "cpu-us/request", 1e6 / requests, 2, func(ctx context.Context, s *server, _ int) error {
		return repeat(requests, func(int) error { return s.pull(ctx, small, d, size) })
	}})
}

// secure measures the pull of a big blob over TLS, with servers of its own.
func (b *bench) secure(ctx context.Context) error {
	for _, way := range []struct {
		name  string
		http2 bool
	}{{"pull_tls_cpu", false}, {"pull_tls_http2_cpu", true}} {
		dir := filepath.Join(b.dir, way.name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		f, err := launch(ctx, place{dir: dir, tls: true, http2: way.http2, atoll: b.atoll, peer: b.peer})
		if err != nil {
			return err
		}
		err = b.pull(ctx, f, way.name, 1.1)
		f.stop()
		if err != nil {
			return err
		}
	}
	return nil
}

// manifests measures a GET by tag in a repository with one tag.
func (b *bench) manifests(ctx context.Context) error {
	const requests = 2000
	data, err := manifest(0)
	if err != nil {
		return err
	}
	for _, s := range b.fleet {
		if err := s.putManifest(ctx, small, "v1", data); err != nil {
			return err
		}
	}
	return b.compare(ctx, b.fleet, measure{"manifest_get_cpu", "cpu-us/request", 1e6 / requests, 2, func(ctx context.Context, s *server, _ int) error {
		return repeat(requests, func(int) error { return s.manifest(ctx, small, "v1", int64(len(data))) })
	}})
}
