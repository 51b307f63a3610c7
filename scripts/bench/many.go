package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

const (
	manyTags  = 10_000
	quarter   = manyTags / 4
	listTags  = 100_000
	writers   = 16
	fillers   = 64 // clients that fill a repository where the rate is no measure
	manyLabel = "tag-%07d"
)

func tagOf(i int) string { return fmt.Sprintf(manyLabel, i) }

// writes measures the PUT of distinct manifests by 16 clients, then GET by tag
// among them. The peer is given fewer: it would take minutes.
func (b *bench) writes(ctx context.Context) error {
	for _, s := range b.fleet {
		n := manyTags
		if s.name != "atoll" {
			n = quarter
		}
		if err := b.fill(ctx, s, n); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return b.among(ctx, 0, manyTags)
}

// fill pushes n distinct manifests under n tags and prints rate, processor time
// and disk; of Atoll also how the last quarter compares with the first.
func (b *bench) fill(ctx context.Context, s *server, n int) error {
	before, err := occupied(s.dir)
	if err != nil {
		return err
	}
	var rates, costs []float64
	for from := 0; from < n; from += quarter {
		start := time.Now()
		used, err := s.cost(func() error {
			return together(writers, quarter, func(i int) error {
				data, err := manifest(from + i)
				if err != nil {
					return err
				}
				return s.putManifest(ctx, large, tagOf(from+i), data)
			})
		})
		if err != nil {
			return err
		}
		rates = append(rates, quarter/time.Since(start).Seconds())
		costs = append(costs, used*1e6/quarter)
	}
	after, err := occupied(s.dir)
	if err != nil {
		return err
	}
	rate := line{"put_rate_" + s.name, median(rates), "manifests/s"}
	b.print("put_cpu_"+s.name, median(costs), "cpu-us/manifest")
	b.print("disk_per_manifest_and_tag_"+s.name, (after-before)/float64(n), "bytes")
	if s.name != "atoll" {
		b.print(rate.name, rate.value, rate.unit)
		return nil
	}
	b.judge(rate, ">=", 500)
	b.judge(line{"put_rate_last_quarter", rates[len(rates)-1] / rates[0], "x first quarter"}, ">=", 0.85)
	b.judge(line{"put_cpu_last_quarter", costs[len(costs)-1] / costs[0], "x first quarter"}, "<=", 1.15)
	return nil
}

// among compares GET by tag among n tags, from a number on, with that in a small
// repository, both on Atoll. Each request is for another tag.
func (b *bench) among(ctx context.Context, from, n int) error {
	const requests = 2000
	data, err := manifest(0)
	if err != nil {
		return err
	}
	size, s := int64(len(data)), b.fleet[0]
	if err := s.putManifest(ctx, small, "v1", data); err != nil {
		return err
	}
	var few, many, ratios []float64
	for range b.pairs {
		f, err := s.cost(func() error {
			return repeat(requests, func(int) error { return s.manifest(ctx, small, "v1", size) })
		})
		if err != nil {
			return err
		}
		m, err := s.cost(func() error {
			return repeat(requests, func(i int) error { return s.manifest(ctx, large, tagOf(from+i*7919%n), size) })
		})
		if err != nil {
			return err
		}
		few, many, ratios = append(few, f*1e6/requests), append(many, m*1e6/requests), append(ratios, m/f)
	}
	b.print("manifest_get_1_tag", median(few), "cpu-us/request")
	name := fmt.Sprintf("manifest_get_%d_tags", n)
	b.print(name, median(many), "cpu-us/request")
	if n > manyTags { // for what scale costs there is no goal
		b.print(name+"_ratio", median(ratios), "x 1 tag")
		return nil
	}
	b.judge(line{name + "_ratio", median(ratios), "x 1 tag"}, "<=", 1.1)
	return nil
}

// starts measures from the start of the program to the first manifest served,
// after a kill -9, with the 10,000 tags.
func (b *bench) starts(ctx context.Context) error {
	seconds, _, err := b.restart(ctx, 5, 0)
	if err != nil {
		return err
	}
	b.judge(line{"start_10000_tags", seconds, "s"}, "<=", 0.3)
	return nil
}

// restart kills and starts the node and gives the median of the seconds, by the
// clock and of processor time, until it serves the manifest of a number.
func (b *bench) restart(ctx context.Context, times, number int) (seconds, cpu float64, err error) {
	s := b.fleet[0]
	data, err := manifest(number)
	if err != nil {
		return 0, 0, err
	}
	var took, used []float64
	for range times {
		s.kill()
		if s.process, err = s.begin(ctx); err != nil {
			return 0, 0, err
		}
		err := s.await(ctx, func() error { return s.manifest(ctx, large, tagOf(number), int64(len(data))) })
		if err != nil {
			return 0, 0, err
		}
		took = append(took, time.Since(s.began).Seconds())
		spent, err := s.cpu()
		if err != nil {
			return 0, 0, err
		}
		used = append(used, spent)
	}
	return median(took), median(used), nil
}

// list fills the repository to 100,000 tags through the API (of one more
// manifest: only the number of tags matters) and measures pages of it.
func (b *bench) list(ctx context.Context) error {
	perTag, err := b.more(ctx, manyTags, listTags, func(int) ([]byte, error) { return manifest(0) })
	if err != nil {
		return err
	}
	b.judge(line{"disk_per_tag_atoll", perTag, "bytes"}, "<=", 1000)
	const requests, page = 40, 1000
	s := b.fleet[0].registry
	at := []struct {
		name, last      string
		figures, ratios []float64 // ratios to the first page of the same round
	}{{name: "first"}, {name: "middle", last: tagOf(listTags / 2)}, {name: "last", last: tagOf(listTags - page - 1)}}
	for round := range b.pairs {
		for i := range at {
			used, err := b.fleet[0].cost(func() error {
				return repeat(requests, func(int) error { return s.tags(ctx, large, at[i].last, page) })
			})
			if err != nil {
				return err
			}
			at[i].figures = append(at[i].figures, used*1e3/requests)
			at[i].ratios = append(at[i].ratios, at[i].figures[round]/at[0].figures[round])
		}
	}
	var all, ratios []float64
	for _, p := range at {
		all, ratios = append(all, median(p.figures)), append(ratios, median(p.ratios))
		b.print("tags_page_"+p.name, median(p.figures), "cpu-ms/1000 tags")
	}
	b.judge(line{"tags_page_worst", slices.Max(all), "cpu-ms/1000 tags"}, "<=", 2)
	b.judge(line{"tags_page_worst_ratio", slices.Max(ratios), "x first page"}, "<=", 1.15)
	seconds, _, err := b.restart(ctx, 3, 0)
	if err != nil {
		return err
	}
	b.print("start_100000_tags", seconds, "s")
	return nil
}

// more pushes manifests under tags from..to-1 and gives the bytes of disk that
// each took.
func (b *bench) more(ctx context.Context, from, to int, make func(i int) ([]byte, error)) (float64, error) {
	s := b.fleet[0]
	before, err := occupied(s.dir)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	var once sync.Once
	err = together(fillers, to-from, func(i int) error {
		once.Do(func() { start = time.Now() })
		data, err := make(from + i)
		if err != nil {
			return err
		}
		return s.putManifest(ctx, large, tagOf(from+i), data)
	})
	if err != nil {
		return 0, err
	}
	b.print(fmt.Sprintf("fill_rate_to_%d_tags", to), float64(to-from)/time.Since(start).Seconds(), "manifests/s")
	after, err := occupied(s.dir)
	if err != nil {
		return 0, err
	}
	return (after - before) / float64(to-from), nil
}
