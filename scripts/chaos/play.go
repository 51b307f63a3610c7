package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// settling bounds how long a mended site may take until it has all its nodes,
// voters and copies again.
const settling = 3 * time.Minute

// Report is the measures of a run.
type Report struct{ lines []line }

type line struct {
	name  string
	value float64
	unit  string
	goal  string
	met   bool
}

func (r *Report) add(name string, value float64, unit, goal string, met bool) {
	r.lines = append(r.lines, line{name, value, unit, goal, met})
}

// none adds a measure that has to be 0.
func (r *Report) none(name string, count int) { r.add(name, float64(count), "", "0", count == 0) }

// String gives one line a measure, parted by tabs.
func (r *Report) String() string {
	var b strings.Builder
	for _, l := range r.lines {
		verdict := "-"
		if l.goal != "-" {
			verdict = map[bool]string{true: "met", false: "missed"}[l.met]
		}
		fmt.Fprintf(&b, "%s\t%.4g\t%s\t%s\t%s\n", l.name, l.value, l.unit, l.goal, verdict)
	}
	return b.String()
}

// Missed names the measures that missed their goal.
func (r *Report) Missed() (names []string) {
	for _, l := range r.lines {
		if !l.met {
			names = append(names, l.name)
		}
	}
	return names
}

// play makes a site, breaks it for as long as the plan says, mends it and judges.
func play(ctx context.Context, p Plan) (r *Report, err error) {
	p.Say("seed %d", p.Seed)
	starting, cancel := context.WithTimeout(ctx, settling)
	defer cancel()
	s, err := newSite(starting, p)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.close(context.WithoutCancel(ctx))) }()
	if _, err := lab.Clients(ctx, p.Dir, s.nodes[0].Node); err != nil {
		return nil, err
	}
	l := newLoad(s, filepath.Join(p.Dir, "ca.pem"))
	judge, err := l.client(0, p.Seed)
	if err != nil {
		return nil, err
	}
	if !judge.push(ctx, 0, "anchor") {
		return nil, errors.New("the first push was refused")
	}
	if err := errors.Join(s.settled(starting), judge.served(starting)); err != nil {
		return nil, err
	}

	working, stop := context.WithCancel(ctx)
	defer stop()
	var clients sync.WaitGroup
	for i := 1; i <= p.Clients; i++ {
		c, err := l.client(i, p.Seed)
		if err != nil {
			return nil, err
		}
		clients.Go(func() { c.work(working) })
	}
	a := &attack{site: s, plan: p, dice: rand.New(rand.NewPCG(p.Seed, 0)), judge: judge, made: map[string]int{}, took: map[string]time.Duration{}}
	err = a.run(ctx)
	stop()
	clients.Wait()
	if err != nil {
		return nil, errors.Join(err, s.keep(p))
	}
	p.Say("mended; waiting for all nodes, voters and copies")
	mending, cancel := context.WithTimeout(ctx, settling)
	defer cancel()
	began := time.Now()
	if err := errors.Join(a.revive(mending), s.settled(mending)); err != nil {
		return nil, errors.Join(err, s.keep(p))
	}
	took := time.Since(began)
	r, err = judge.judge(ctx, a, took)
	if err == nil && len(r.Missed()) > 0 {
		err = s.keep(p)
	}
	return r, err
}

// served waits until every node serves the anchor: one that has just joined may
// have no state of the site yet, and what it does not know it cannot serve when the
// others are gone.
func (c *client) served(ctx context.Context) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for node, b := range c.site.nodes {
		for err := c.pull(ctx, node, "anchor"); err != nil; err = c.pull(ctx, node, "anchor") {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return fmt.Errorf("%s does not serve the first image: %w", b.Host.Name, err)
			}
		}
	}
	return nil
}

// keep stops the nodes and copies what they hold out of their disks, which go with
// the site.
func (s *site) keep(p Plan) error {
	for _, b := range s.nodes {
		b.Kill()
		if err := os.RemoveAll(filepath.Join(b.Data, "atoll.sock")); err != nil { // no file to copy
			return err
		}
		to := filepath.Join(p.Dir, "kept-"+b.Host.Name)
		if err := os.CopyFS(to, os.DirFS(b.Data)); err != nil {
			return err
		}
		if err := os.WriteFile(to+".log", []byte(b.Log()), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// judge asks every node for everything.
func (c *client) judge(ctx context.Context, a *attack, took time.Duration) (*Report, error) {
	r := &Report{}
	total := 0
	for _, f := range faults {
		r.add("faults "+f.name, float64(a.made[f.name]), "", "-", true)
		r.add("time with it first "+f.name, a.took[f.name].Seconds(), "s", "-", true)
		total += a.made[f.name]
	}
	r.add("faults", float64(total), "", "-", true)
	r.add("pairs of faults at once", float64(a.pairs), "", "-", true)
	r.add("nodes that ended by themselves", float64(a.exits), "", "-", true)
	for i := range tags {
		for node := range c.site.nodes {
			c.read(ctx, node, fmt.Sprint("t", i))
		}
	}
	c.mu.Lock()
	acked, failures := c.acked, c.failures
	c.mu.Unlock()
	r.add("operations in the history", float64(c.history.Len()), "", "-", true)
	r.add("outcomes not known", float64(c.lost.Load()), "", "-", true)
	r.add("reads marked stale", 100*float64(c.stale.Load())/float64(max(1, c.reads.Load())), "%", "-", true)
	r.add("pushes acknowledged", float64(len(acked)), "", "> 0", len(acked) > 1)
	r.add("pulls judged", float64(c.judged.Load()), "", "> 0", c.judged.Load() > 0)
	r.none("pulls failed on nodes to which nothing was done", int(c.failedPulls.Load()))
	linearizable := 1
	if c.history.Linearizable() {
		linearizable = 0
	}
	r.none("histories that no order explains", linearizable)
	missing := 0
	for node, b := range c.site.nodes {
		for i, image := range acked {
			if err := c.pull(ctx, node, image.manifest.String()); err != nil {
				missing++
				again := c.pull(ctx, node, image.manifest.String())
				failures = append(failures, fmt.Sprintf("%s lacks what was acknowledged (%d of %d): %v; asked again: %v", b.Host.Name, i+1, len(acked), err, again))
			}
		}
	}
	r.none("acknowledged images missing or wrong, over all nodes", missing)
	differ, err := c.compare(ctx)
	r.none("nodes that list other tags than the first", differ)
	r.none("answers that should not have been given", len(failures))
	r.add("until mended", took.Seconds(), "s", "-", true)
	for _, text := range failures[:min(100, len(failures))] {
		a.plan.Say("%s", text)
	}
	return r, err
}

// compare counts the nodes whose tags and digests are not those of the first.
func (c *client) compare(ctx context.Context) (differ int, err error) {
	var first string
	for node := range c.site.nodes {
		a, err := c.get(ctx, node, "/tags/list")
		if err != nil {
			return 0, err
		}
		var list struct{ Tags []string }
		if err := json.Unmarshal(a.body, &list); err != nil {
			return 0, fmt.Errorf("tags of %s: %d %.200s", c.site.nodes[node].Host.Name, a.status, a.body)
		}
		var all strings.Builder
		for _, tag := range list.Tags {
			a, err := c.do(ctx, node, question{method: http.MethodHead, path: "/manifests/" + tag})
			if err != nil {
				return 0, err
			}
			fmt.Fprintln(&all, tag, a.header.Get("Docker-Content-Digest"))
		}
		if node == 0 {
			first = all.String()
		} else if all.String() != first {
			differ++
		}
	}
	return differ, nil
}
