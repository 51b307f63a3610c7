package peers

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/fault"
)

// drainEvery is how often a node that is drained counts again what it holds and
// others do not keep yet; a count asks them for every blob.
const drainEvery = 15 * time.Second

// drainWhenDue counts what this node holds and the homes do not keep yet, and has
// them fetch it, when this node is being drained; next is when it wants to be
// called again, zero when it is not drained.
func (p *Peers) drainWhenDue(ctx context.Context, l layout, last *time.Time) (next time.Time) {
	if !p.draining() {
		p.ledger.leave(0, false)
		p.metrics.leaving.Set(0)
		return time.Time{}
	}
	if due := last.Add(drainEvery); time.Now().Before(due) {
		return due
	}
	if last.IsZero() {
		p.ledger.leave(0, false)
	}
	left, err := p.drain(ctx, l, true)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		p.Log.Warn("what this node holds could not be handed over; trying again", "err", err)
	default:
		if was := p.ledger.left(); was != 0 && left == 0 {
			p.Log.Info("this node is drained: other nodes keep all that it holds")
		}
		p.ledger.leave(left, true)
		p.metrics.leaving.Set(float64(left))
	}
	*last = time.Now()
	return last.Add(drainEvery)
}

// draining says that this node is to be taken away.
func (p *Peers) draining() bool {
	self, ok := p.find(p.Roster.Self())
	return ok && self.Draining != 0
}

// drain walks over what this node holds and gives the number of blobs that are not
// on all the homes that they should have. mend has those homes fetch them first.
// Blobs in a storage that all nodes read need no handing over.
func (p *Peers) drain(ctx context.Context, l layout, mend bool) (left int, err error) {
	// While this node counts as a home for want of another, nothing can be handed over.
	l.homes = slices.DeleteFunc(slices.Clone(l.homes), func(id string) bool { return id == l.self })
	l.present = slices.DeleteFunc(slices.Clone(l.present), func(id string) bool { return id == l.self })
	for after := digest.Digest(""); ctx.Err() == nil; {
		held, err := p.Store.List(after, repairPage)
		if err != nil {
			return 0, err
		}
		if len(held) == 0 {
			return left, nil
		}
		after = held[len(held)-1]
		rows, err := p.rowsOf(held, notGone)
		if err != nil {
			return 0, err
		}
		found, err := p.survey(ctx, l, rows, true)
		if err != nil {
			return 0, err
		}
		if mend {
			p.mendElsewhere(ctx, found)
		}
		for _, s := range found {
			if s.here && !s.shelved && s.holders < max(1, l.wanted(s.replicas)) {
				left++
			}
		}
		if mend && left > 0 {
			p.metrics.leaving.Set(float64(left))
		}
	}
	return 0, ctx.Err()
}

// drainQuestion asks a node that is drained to count, now, what it holds and the
// homes do not keep.
type drainQuestion struct{}

type drainAnswer struct {
	Left int `json:"left"`
}

func (p *Peers) answerDrain(ctx context.Context, _ drainQuestion) (any, error) {
	l, err := p.currentLayout()
	if err != nil {
		return nil, err
	}
	left, err := p.drain(ctx, l, false)
	return drainAnswer{left}, err
}

// DrainLeft has a node count, now, the blobs that it holds and that are not on all
// the nodes that should keep them, without it. 0 means that nothing is lost with
// the node, provided that it is drained: a node that is not takes new content.
// fault.Unavailable when the node cannot be asked.
func (p *Peers) DrainLeft(ctx context.Context, node string) (int, error) {
	if node == p.Roster.Self() {
		answer, err := p.answerDrain(ctx, drainQuestion{})
		if err != nil {
			return 0, err
		}
		return answer.(drainAnswer).Left, nil
	}
	if _, ok := p.find(node); !ok {
		return 0, fault.New(fault.Unavailable, "node %s is not up, so what it holds cannot be compared with the others", node)
	}
	var answer drainAnswer
	err := p.whileLive(ctx, node, func(ctx context.Context) error {
		return p.call(ctx, node, "drain", drainQuestion{}, &answer)
	})
	if err != nil {
		return 0, fault.Wrap(err, fault.Unavailable, "node %s could not say what it alone holds", node)
	}
	return answer.Left, nil
}

// Figures is what one node knows of the copies that it sees to. Every blob is seen
// to by one node that is up, so the nodes' figures add up.
type Figures struct {
	Lacking  int  `json:"lacking"`  // blobs on fewer homes than they should be
	Counting bool `json:"counting"` // Lacking is not complete yet
	Leaving  int  `json:"leaving"`  // blobs that a node which is drained must hand over; -1: not known yet
	// Cache is how many bytes a cache holds.
	Cache int64 `json:"cache"`
}

// figures of this node.
func (p *Peers) figures() (Figures, error) {
	l, err := p.currentLayout()
	f := Figures{Lacking: p.ledger.count(), Counting: !p.ledger.isComplete(l), Cache: p.cached.bytes()}
	if p.draining() {
		f.Leaving = p.ledger.left()
	}
	return f, err
}

type figuresQuestion struct{}

// figuresWait is how long a node is waited for.
const figuresWait = 2 * time.Second

// Figures gives those of every node that is up, by its id; a node that does not
// answer is not among them.
func (p *Peers) Figures(ctx context.Context) (map[string]Figures, error) {
	own, err := p.figures()
	if err != nil {
		return nil, fmt.Errorf("reading this node's figures: %w", err)
	}
	all := map[string]Figures{p.Roster.Self(): own}
	ctx, cancel := context.WithTimeout(ctx, figuresWait)
	defer cancel()
	type answer struct {
		id      string
		figures Figures
		err     error
	}
	others := p.others()
	answers := make(chan answer, len(others))
	for _, m := range others {
		go func() {
			a := answer{id: m.ID}
			a.err = p.call(ctx, m.ID, "figures", figuresQuestion{}, &a.figures)
			answers <- a
		}()
	}
	for range others {
		if a := <-answers; a.err != nil {
			p.Log.Debug("a node did not say what its blobs lack", "node", a.id, "err", a.err)
		} else {
			all[a.id] = a.figures
		}
	}
	return all, nil
}

// addFigures adds what the nodes know of the copies of blobs.
func (p *Peers) addFigures(ctx context.Context, out *Status) error {
	figures, err := p.Figures(ctx)
	if err != nil {
		return err
	}
	for i := range out.Nodes {
		n := &out.Nodes[i]
		f, known := figures[n.ID]
		if !known {
			f = Figures{Leaving: -1, Counting: n.Up}
		}
		out.UnderReplicated += f.Lacking
		out.Counting = out.Counting || f.Counting
		n.CacheBytes = f.Cache
		if n.Draining != nil {
			n.Leaving = f.Leaving
		}
	}
	return nil
}
