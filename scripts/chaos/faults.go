package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// fault is one way in which a machine fails, and how it is mended. While do
// runs, the box counts as hurt.
type fault struct {
	name string
	// weight is how often it is chosen beside the others.
	weight int
	do     func(a *attack, ctx context.Context, b *box) error
}

// attack makes faults one after the other.
type attack struct {
	*site
	plan Plan
	dice *rand.Rand
	made map[string]int
	// exits are nodes that ended by themselves.
	exits int
}

var faults = [...]fault{
	{"kill -9", 6, (*attack).kill},
	{"pause", 4, (*attack).pause},
	{"partition", 4, (*attack).partition},
	{"deaf to the others", 2, (*attack).deaf},
	{"unheard by the others", 2, (*attack).unheard},
	{"full disk", 2, (*attack).fill},
	{"orderly restart", 1, (*attack).restart},
	{"disk lost", 1, (*attack).loseDisk},
}

// run makes faults until the time is up; between two of them the site has some
// moments to itself, sometimes too few.
func (a *attack) run(ctx context.Context) error {
	end := time.NewTimer(a.plan.Length)
	defer end.Stop()
	total := 0
	for _, f := range faults {
		total += f.weight
	}
	for {
		f, b := a.choose(total), a.victim(ctx)
		a.plan.Say("%s: %s", b.Host.Name, f.name)
		b.hurt()
		err := f.do(a, ctx, b)
		b.heal()
		if err != nil {
			return fmt.Errorf("%s on %s: %w", f.name, b.Host.Name, err)
		}
		a.made[f.name]++
		if err := a.revive(ctx); err != nil {
			return err
		}
		a.rest(ctx, 3*time.Second)
		select {
		case <-end.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		default:
		}
	}
}

func (a *attack) choose(total int) fault {
	at := a.dice.IntN(total)
	for _, f := range faults {
		if at -= f.weight; at < 0 {
			return f
		}
	}
	return faults[0]
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
	a.rest(ctx, 9*time.Second)
	return b.Start(ctx)
}

func (a *attack) restart(ctx context.Context, b *box) error {
	if err := b.Stop(ctx); err != nil {
		return err
	}
	return b.Start(ctx)
}

func (a *attack) pause(ctx context.Context, b *box) error {
	if err := b.Process().Freeze(); err != nil {
		return err
	}
	a.rest(ctx, 12*time.Second)
	return b.Process().Thaw()
}

// partition cuts a node off from the others; clients still reach it.
func (a *attack) partition(ctx context.Context, b *box) error {
	return a.cut(ctx, b, true, true)
}

func (a *attack) deaf(ctx context.Context, b *box) error { return a.cut(ctx, b, true, false) }

func (a *attack) unheard(ctx context.Context, b *box) error { return a.cut(ctx, b, false, true) }

func (a *attack) cut(ctx context.Context, b *box, in, out bool) error {
	for _, other := range a.nodes {
		if other == b {
			continue
		}
		if in {
			if err := b.Host.Deafen(ctx, other.Host); err != nil {
				return err
			}
		}
		if out {
			if err := other.Host.Deafen(ctx, b.Host); err != nil {
				return err
			}
		}
	}
	a.rest(ctx, 12*time.Second)
	var errs []error
	for _, n := range a.nodes {
		errs = append(errs, n.Host.Hear(ctx))
	}
	return errors.Join(errs...)
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
	a.rest(ctx, 8*time.Second)
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
		a.rest(ctx, 2*time.Second) // the site takes some seconds to see that it is dead, and to elect
		if err := os.RemoveAll(b.Data); err != nil {
			return err
		}
	}
}
