package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// Plan is what a run is to be.
type Plan struct {
	Binary, Dir     string
	Scenes          string // where a scene's directory is; Dir when empty
	Clients, Pushes int
	Seed            uint64
	Samples         int // moments to try; 0 is every one with every loss
	InSite          int // moments to try at one node of three; 0: none
	Workers         int
	Most            time.Duration // no pass over the lone node's recording begins later; 0: all are made
	Say             func(format string, args ...any)
}

// run records a node and cuts its power: first one that is a site of its own, then
// one of three.
func run(ctx context.Context, p Plan) (*recording, error) {
	p.Say("seed %d", p.Seed)
	if err := usable(ctx); err != nil {
		return nil, err
	}
	var err error
	if p.Binary, err = filepath.Abs(p.Binary); err != nil {
		return nil, err
	}
	p.Scenes = cmp.Or(p.Scenes, p.Dir)
	rec, err := runLone(ctx, p)
	if err == nil && p.InSite > 0 {
		err = runInSite(ctx, p)
	}
	return rec, err
}

func runLone(ctx context.Context, p Plan) (*recording, error) {
	rec, err := record(ctx, p)
	if err != nil {
		return nil, err
	}
	var calls []string
	answers := 0
	err = rec.play(newDisk(), visitor{
		func(call string) error { calls = append(calls, call); return nil },
		func(string) error { answers++; return nil },
	})
	if err != nil {
		return nil, err
	}
	if answers < len(rec.deeds) {
		return nil, fmt.Errorf("the trace shows %d answers, the clients got %d", answers, len(rec.deeds))
	}
	p.Say("recorded: %d changes of the disk, %d acknowledgements", len(calls), len(rec.deeds))
	return rec, rec.cutAll(ctx, p, choose(p, calls))
}

// choose gives the losses to try after each change, counted from 1. A sample has
// none of the 512 directories that a new store makes in a row.
func choose(p Plan, calls []string) map[int][]loss {
	chosen := map[int][]loss{}
	var worthy []int
	for i, call := range calls {
		if p.Samples == 0 {
			chosen[i+1] = losses()
		} else if call != "mkdirat" {
			worthy = append(worthy, i+1)
		}
	}
	dice := rand.New(rand.NewPCG(p.Seed, 2))
	for i := range p.Samples {
		m := worthy[dice.IntN(len(worthy))]
		chosen[m] = append(chosen[m], losses()[i%len(losses())])
	}
	return chosen
}

// passes over a recording: each judges one of so many moments, so that what has been
// judged when the time is up is spread over all of it.
const passes = 16

// cutAll judges every scene that was chosen. It stops at the first that is not
// as it should be, and when the plan's time is up.
func (r *recording) cutAll(ctx context.Context, p Plan, chosen map[int][]loss) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	scenes := make(chan scene)
	var workers sync.WaitGroup
	var judged atomic.Int64
	for range p.Workers {
		workers.Go(func() {
			for s := range scenes {
				if ctx.Err() != nil {
					continue
				}
				if err := s.judge(ctx, p.Binary, p.Scenes, r.boot); err != nil {
					cancel(err)
				} else if n := judged.Add(1); n%500 == 0 {
					p.Say("%d scenes judged", n)
				}
			}
		})
	}
	begun := time.Now()
	known, seed := map[uint64]bool{}, maphash.MakeSeed()
	var err error
	pass, passes := 0, passes
	if p.Samples > 0 {
		passes = 1
	}
	for ; pass < passes && err == nil && (p.Most == 0 || time.Since(begun) < p.Most); pass++ {
		d, moment, answered := newDisk(), 0, map[string]bool{}
		err = r.play(d, visitor{
			moved: func(string) error {
				if moment++; moment%passes != pass {
					return nil
				}
				for _, l := range chosen[moment] {
					dice := rand.New(rand.NewPCG(p.Seed, uint64(moment)))
					s := scene{moment, l, d.after(l, dice), holding(r.deeds, maps.Clone(answered))}
					if mark := s.mark(seed); known[mark] {
						continue // a change that was not synced leaves what was there before
					} else {
						known[mark] = true
					}
					select {
					case scenes <- s:
					case <-ctx.Done():
						return context.Cause(ctx)
					}
				}
				return nil
			},
			answered: func(id string) error { answered[id] = true; return nil },
		})
	}
	close(scenes)
	workers.Wait()
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if err == nil && judged.Load() == 0 {
		err = errors.New("nothing was judged")
	}
	if err == nil {
		p.Say("%d scenes judged in %v, in %d of %d passes", judged.Load(), time.Since(begun).Round(time.Second), pass, passes)
	}
	return err
}
