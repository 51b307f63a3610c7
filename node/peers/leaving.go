package peers

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
)

// Leaving says how a node is to be taken out of the site.
type Leaving struct {
	Node string `path:"node" max:"64"` // its id or name
	// Force gives up blobs of which it holds, or may hold, the only copy.
	Force bool `query:"force"`
	// Stolen: strangers may have it; all that it held is replaced, whatever blobs
	// go with it.
	Stolen bool `query:"stolen"`
}

// Left says which node left.
type Left struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	// Before: it had been removed before.
	Before bool `json:"before"`
}

// stranded are the blobs that would be lost with a node: no other node that is up
// holds them.
type stranded struct {
	blobs   int
	example digest.Digest
	// known: the node is up and says that it holds them; else it may.
	known bool
}

// strandsAtOnce bounds the pages of blobs that are asked about at once.
const strandsAtOnce = 4

// strands asks the other nodes that are up for the blobs of the site: first this
// one, and the next ones only for what those before it do not hold.
func (p *Peers) strands(ctx context.Context, id string) (stranded, error) {
	_, up := p.find(id)
	var mu sync.Mutex
	s := stranded{known: up}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(strandsAtOnce)
	for after := digest.Digest(""); ctx.Err() == nil; {
		rows, err := p.page(after)
		if err != nil {
			return s, errors.Join(err, group.Wait())
		}
		if len(rows) == 0 {
			break
		}
		after = rows[len(rows)-1].digest
		group.Go(func() error {
			alone, err := p.alone(ctx, id, up, rows)
			mu.Lock()
			defer mu.Unlock()
			if s.blobs += len(alone); len(alone) > 0 && (s.example == "" || alone[0] < s.example) {
				s.example = alone[0]
			}
			return err
		})
	}
	err := group.Wait()
	return s, err
}

// alone are those of a page of blobs that no other node which is up holds, and,
// while the node itself is up, that it says it holds. While it is up, another
// node's copy counts only if that node is to keep it: others may be about to let
// go of theirs for the very one that leaves.
func (p *Peers) alone(ctx context.Context, id string, up bool, rows []row) ([]digest.Digest, error) {
	var rest []digest.Digest
	for _, b := range rows {
		if b.State == blobs.Live && b.Lost == 0 && !p.Store.Shelved(b.digest) {
			rest = append(rest, b.digest)
		}
	}
	others := p.others()
	if self := p.Roster.Self(); self != id {
		others = append([]member.Member{{ID: self}}, others...)
	}
	for _, m := range others {
		if m.ID == id || len(rest) == 0 {
			continue
		}
		answer, err := p.askHave(ctx, m.ID, rest, haveQuestion{Any: true, Keep: up})
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			p.Log.Info("a node did not say which blobs it holds", "node", m.ID, "err", err)
			continue // as if it were down
		}
		safe := answer.Held
		if up {
			safe = answer.Kept
		}
		rest = those(rest, func(i int) bool { return !safe.has(i) })
	}
	if !up || len(rest) == 0 {
		return rest, nil
	}
	answer, err := p.askHave(ctx, id, rest, haveQuestion{Any: true})
	return those(rest, answer.Held.has), err
}

// those are those of some digests for whose place in the list is says yes.
func those(ds []digest.Digest, is func(i int) bool) (some []digest.Digest) {
	for i, d := range ds {
		if is(i) {
			some = append(some, d)
		}
	}
	return some
}

// who finds the member that a request names by id or name.
func (p *Peers) who(ctx context.Context, ref string) (m member.Member, err error) {
	_, err = p.DB.Confirmed(ctx, func(v *table.View) error {
		m, err = p.Cluster.Find(v, ref)
		return err
	})
	return m, refused(err, ref)
}

// Remove takes a node out of the site. It is refused when that would lose the
// quorum, or, unless forced, the last copy of a blob.
func (p *Peers) Remove(ctx context.Context, l Leaving) (Left, error) {
	m, err := p.who(ctx, l.Node)
	if err != nil {
		return Left{}, err
	}
	left := Left{ID: m.ID, Name: m.Name, Before: m.Removed != 0}
	if left.Before && !l.Stolen {
		return left, nil
	}
	if l.Stolen {
		if err := p.betray(ctx, m); err != nil {
			return Left{}, err
		}
		return left, nil
	}
	if !l.Force {
		if err := p.spare(ctx, m); err != nil {
			return Left{}, err
		}
	}
	if err := p.Cluster.Remove(ctx, m.ID); err != nil {
		return Left{}, refused(err, m.Name)
	}
	p.Log.Info("a node was removed from the site", "node", m.ID, "name", m.Name, "forced", l.Force)
	return left, nil
}

// betray removes a stolen node and replaces what it held.
func (p *Peers) betray(ctx context.Context, m member.Member) error {
	if m.ID == p.Roster.Self() {
		return fault.New(fault.Invalid, "this command went to the node that is said to be stolen; ask another one")
	}
	if err := p.Cluster.Betray(ctx, m.ID); err != nil {
		return refused(err, m.Name)
	}
	p.Log.Warn("a stolen node was removed; what it held is being replaced", "node", m.ID, "name", m.Name)
	return nil
}

// spare refuses to lose the last copy of a blob with a node; with one that is
// drained, any copy that its homes lack.
func (p *Peers) spare(ctx context.Context, m member.Member) error {
	if _, up := p.find(m.ID); up && m.Draining != 0 {
		left, err := p.DrainLeft(ctx, m.ID)
		if err == nil && left > 0 {
			err = fault.New(fault.Precondition, "%s is being drained and must still hand over %d blob(s): wait until atoll cluster status says that it is drained, or go on with --force, which keeps fewer copies and may lose some", m.Name, left)
		}
		if err != nil {
			return err
		}
	}
	s, err := p.strands(ctx, m.ID)
	switch {
	case err != nil:
		return fault.Wrap(err, fault.Unavailable, "whether %s holds the last copy of a blob could not be found out; try again, or give such blobs up with --force", m.Name)
	case s.blobs == 0:
		return nil
	case s.known:
		return fault.New(fault.Precondition, "%s holds the only copy of %d blob(s), %s among them: drain it first (atoll cluster drain %s), or give them up with --force", m.Name, s.blobs, s.example, m.Name)
	}
	return fault.New(fault.Precondition, "%s is down and may hold the only copy of %d blob(s), %s among them, that no node which is up holds: start it and drain it first (atoll cluster drain %s), or give them up with --force", m.Name, s.blobs, s.example, m.Name)
}

// Drain takes a node out of service, or back into it.
func (p *Peers) Drain(ctx context.Context, ref string, undo bool) (NodeStatus, error) {
	m, err := p.who(ctx, ref)
	if err == nil && m.Removed != 0 {
		err = fault.New(fault.NotFound, "node %s was removed from the site", ref)
	}
	if err != nil {
		return NodeStatus{}, err
	}
	if err := p.Cluster.Drain(ctx, m.ID, undo); err != nil {
		return NodeStatus{}, refused(err, m.Name)
	}
	return p.one(ctx, m.ID)
}

// Lead moves the leadership to a node.
func (p *Peers) Lead(ctx context.Context, ref string) (NodeStatus, error) {
	m, err := p.who(ctx, ref)
	if err != nil {
		return NodeStatus{}, err
	}
	if err := p.Cluster.Lead(ctx, m.ID); err != nil {
		return NodeStatus{}, refused(err, m.Name)
	}
	return p.one(ctx, m.ID)
}

func (p *Peers) one(ctx context.Context, id string) (NodeStatus, error) {
	s, err := p.Cluster.Status(ctx)
	if err != nil {
		return NodeStatus{}, err
	}
	for _, m := range s.Members {
		if m.ID == id {
			return nodeStatus(m), nil
		}
	}
	return NodeStatus{}, fault.New(fault.NotFound, "node %s left the site", id)
}

// refused gives the refusals of the membership their kinds.
func refused(err error, name string) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, member.ErrNoMember):
		return fault.New(fault.NotFound, "there is no node %s in this site; atoll cluster status lists the nodes", name)
	case errors.Is(err, member.ErrQuorum), errors.Is(err, member.ErrNoVote):
		return fault.New(fault.Precondition, "%s: %v", name, err)
	}
	return err
}

// drained says in words how far a node that is drained is.
func drained(n NodeStatus) string {
	switch {
	case n.Leaving > 0:
		return fmt.Sprintf("node %s is being drained: %d blobs are still to be handed over to other nodes", n.Name, n.Leaving)
	case n.Leaving < 0:
		return fmt.Sprintf("node %s is being drained and counts what is still to be handed over; ask again in a few seconds", n.Name)
	case n.Voter:
		return fmt.Sprintf("node %s is being drained and keeps its vote until another node can take it", n.Name)
	}
	return fmt.Sprintf("node %s is drained: stop it for maintenance, remove it (atoll cluster remove %s), or take it back (atoll cluster drain %s --undo)", n.Name, n.Name, n.Name)
}

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
