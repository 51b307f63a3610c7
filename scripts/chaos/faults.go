package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// fault is one way in which a machine fails, and how it is mended. While do
// runs, the box counts as hurt.
type fault struct {
	name string
	// weight is how often it is chosen beside the others.
	weight int
	do     func(a *attack, ctx context.Context, b *box) error
	// alone: no other fault is made meanwhile.
	alone bool
}

// attack makes faults, one or two at a time.
type attack struct {
	*site
	plan  Plan
	dice  *rand.Rand
	judge *client // that tries what must be refused
	made  map[string]int
	took  map[string]time.Duration // the rounds that began with it
	pairs int                      // two faults at once
	// exits are nodes that ended by themselves.
	exits int
}

var faults = [...]fault{
	{"kill -9", 6, (*attack).kill, false},
	{"pause", 4, (*attack).pause, false},
	{"partition", 4, (*attack).partition, false},
	{"deaf to the others", 2, (*attack).deaf, false},
	{"unheard by the others", 2, (*attack).unheard, false},
	{"full disk", 2, (*attack).fill, false},
	{"orderly restart", 1, (*attack).restart, false},
	{"disk lost", 1, (*attack).loseDisk, true},
	{noQuorum, 1, (*attack).killMost, true},
}

const noQuorum = "most nodes killed"

// run makes faults until the time is up; between two of them the site has some
// moments to itself, sometimes too few. In two of three cases another node gets
// a fault as well while the first one has its: of three nodes that leaves no
// quorum for as long as both last.
func (a *attack) run(ctx context.Context) error {
	end := time.NewTimer(a.plan.Length)
	defer end.Stop()
	for {
		if err := a.round(ctx); err != nil {
			return err
		}
		if err := a.revive(ctx); err != nil {
			return err
		}
		a.rest(ctx, time.Second)
		select {
		case <-end.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		default:
		}
	}
}

// round makes one fault, or two that overlap.
func (a *attack) round(ctx context.Context) error {
	f, b := a.choose(), a.victim(ctx)
	began := time.Now()
	defer func() { a.took[f.name] += time.Since(began) }()
	a.made[f.name]++
	if f.alone || a.dice.IntN(3) == 0 {
		return a.strike(ctx, f, b)
	}
	g, other := a.choose(), a.nodes[a.dice.IntN(len(a.nodes))]
	for g.alone {
		g = a.choose()
	}
	for other == b {
		other = a.nodes[a.dice.IntN(len(a.nodes))]
	}
	a.made[g.name]++
	a.pairs++
	own := *a // with dice of its own, so that the schedule follows from the seed
	own.dice = rand.New(rand.NewPCG(a.dice.Uint64(), 0))
	second := make(chan error, 1)
	go func() {
		own.rest(ctx, 3*time.Second)
		second <- own.strike(ctx, g, other)
	}()
	return errors.Join(a.strike(ctx, f, b), <-second)
}

// strike makes a fault and mends it.
func (a *attack) strike(ctx context.Context, f fault, b *box) error {
	a.plan.Say("%s: %s", b.Host.Name, f.name)
	if f.name != noQuorum {
		b.hurt()
		defer b.heal()
	}
	if err := f.do(a, ctx, b); err != nil {
		return fmt.Errorf("%s on %s: %w", f.name, b.Host.Name, err)
	}
	return nil
}

func (a *attack) choose() fault {
	total := 0
	for _, f := range faults {
		total += a.weight(f)
	}
	at := a.dice.IntN(total)
	for _, f := range faults {
		if at -= a.weight(f); at < 0 {
			return f
		}
	}
	return faults[0]
}

// oftenWeight is that of the faults that the plan wants often: about as much as all
// others have together.
const oftenWeight = 24

func (a *attack) weight(f fault) int {
	if slices.Contains(a.plan.Often, f.name) {
		return oftenWeight
	}
	return f.weight
}

// victim is the leader in half of the cases.
func (a *attack) victim(ctx context.Context) *box {
	b := a.nodes[a.dice.IntN(len(a.nodes))]
	if a.dice.IntN(2) == 0 {
		return b
	}
	if s, err := b.Status(ctx); err == nil {
		for _, n := range s.Nodes {
			for _, other := range a.nodes {
				if n.ID == s.Leader && n.Name == other.Host.Name {
					return other
				}
			}
		}
	}
	return b
}

// rest waits for up to d.
func (a *attack) rest(ctx context.Context, d time.Duration) {
	t := time.NewTimer(time.Duration(a.dice.Int64N(int64(d))))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// revive starts nodes that ended by themselves, as whoever runs them would.
func (a *attack) revive(ctx context.Context) error {
	for _, b := range a.nodes {
		select {
		case <-b.Process().Done():
			a.exits++
			a.plan.Say("%s ended by itself and is started again:\n%s", b.Host.Name, last(b.Log(), 3))
			b.hurt()
			err := b.Start(ctx)
			b.heal()
			if err != nil {
				return err
			}
		default:
		}
	}
	return nil
}

func last(text string, lines int) string {
	all := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

func (a *attack) kill(ctx context.Context, b *box) error {
	b.Kill()
	a.rest(ctx, 7*time.Second)
	return b.Start(ctx)
}

// killMost kills so many nodes that the others are no majority, and looks at b,
// which is spared: it acknowledges nothing, and everything can be pulled from it.
func (a *attack) killMost(ctx context.Context, b *box) error {
	var dead []*box
	for i, other := range a.nodes {
		if other != b && len(dead) <= len(a.nodes)/2 {
			other.hurt()
			defer other.heal()
			a.nodes[i].Kill()
			dead = append(dead, other)
		}
	}
	at := slices.Index(a.nodes, b)
	var acked bool
	var pulling sync.WaitGroup
	pulling.Go(func() { _ = within(ctx, func(op context.Context) { a.judge.pullAnchor(op, at) }) }) // its error is the other's
	err := within(ctx, func(op context.Context) { acked = a.judge.push(op, at, "t0") })
	if pulling.Wait(); err != nil {
		return err
	}
	if acked {
		a.judge.fail("%s acknowledged a push while %d of %d nodes were dead", b.Host.Name, len(dead), len(a.nodes))
	}
	var errs []error
	for _, other := range dead {
		errs = append(errs, other.Start(ctx))
	}
	return errors.Join(errs...)
}

// within gives an operation as long as a client waits; the error is that of ctx.
func within(ctx context.Context, do func(context.Context)) error {
	op, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	do(op)
	return ctx.Err()
}

func (a *attack) restart(ctx context.Context, b *box) error {
	stopping, cancel := context.WithTimeout(ctx, settling)
	defer cancel()
	if err := b.Stop(stopping); err != nil {
		return err
	}
	return b.Start(ctx)
}

func (a *attack) pause(ctx context.Context, b *box) error {
	if err := b.Process().Freeze(); err != nil {
		return err
	}
	a.rest(ctx, 10*time.Second)
	return b.Process().Thaw()
}

// partition cuts a node off from the others; clients still reach it.
func (a *attack) partition(ctx context.Context, b *box) error {
	return a.cut(ctx, b, true, true)
}

func (a *attack) deaf(ctx context.Context, b *box) error { return a.cut(ctx, b, true, false) }

func (a *attack) unheard(ctx context.Context, b *box) error { return a.cut(ctx, b, false, true) }

// cut makes a node deaf to the others, or them to it, and takes back no more than
// that: another node may be cut off at the same time.
func (a *attack) cut(ctx context.Context, b *box, in, out bool) error {
	change := func(do func(to, from *lab.Host) error) (err error) {
		for _, other := range a.nodes {
			if other != b && in {
				err = errors.Join(err, do(b.Host, other.Host))
			}
			if other != b && out {
				err = errors.Join(err, do(other.Host, b.Host))
			}
		}
		return err
	}
	if err := change(func(to, from *lab.Host) error { return to.Deafen(ctx, from) }); err != nil {
		return err
	}
	a.rest(ctx, 10*time.Second)
	return change(func(to, from *lab.Host) error { return to.Hear(ctx, from) })
}

// fill takes all that is left of a node's disk for a while.
func (a *attack) fill(ctx context.Context, b *box) error {
	name := filepath.Join(b.disk, "somebody-else's")
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	for size := int64(32 << 20); size >= 4<<10; {
		end, err := f.Seek(0, 2)
		if err != nil {
			return err
		}
		if err := unix.Fallocate(int(f.Fd()), 0, end, size); err != nil {
			size /= 2
		} else if _, err := f.Seek(end+size, 0); err != nil {
			return err
		}
	}
	a.rest(ctx, 7*time.Second)
	return os.Remove(name)
}

// loseDisk destroys all that a node holds. A new machine takes its name. It
// waits until the rest has its copies, before and after: two lost disks at once
// are more than was promised.
func (a *attack) loseDisk(ctx context.Context, b *box) error {
	if err := a.settled(ctx); err != nil {
		return err
	}
	b.Kill()
	if err := os.RemoveAll(b.Data); err != nil {
		return err
	}
	via := a.nodes[0]
	if via == b {
		via = a.nodes[1]
	}
	for {
		err := b.Join(ctx, via.Node)
		if err == nil {
			return a.settled(ctx)
		}
		if ctx.Err() != nil {
			return err
		}
		a.rest(ctx, time.Second/2) // the site takes some seconds to see that it is dead, and to elect
		if err := os.RemoveAll(b.Data); err != nil {
			return err
		}
	}
}
