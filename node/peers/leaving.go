package peers

import (
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
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

// lacksRequest asks a node which of some blobs it does not hold.
type lacksRequest struct {
	Blobs []digest.Digest `json:"blobs"`
}

type lacksAnswer struct {
	Blobs []digest.Digest `json:"blobs"`
}

func (q lacksRequest) check() error {
	for _, d := range q.Blobs {
		if _, err := entry.ParseDigest(d.String()); err != nil {
			return fmt.Errorf("blob %q: %w", d, err)
		}
	}
	return nil
}

func (p *Peers) answerLacks(_ context.Context, q lacksRequest) (any, error) {
	lacks, err := p.lacks(q.Blobs)
	return lacksAnswer{lacks}, err
}

// lacks are those blobs that this node does not hold.
func (p *Peers) lacks(ds []digest.Digest) (lacking []digest.Digest, err error) {
	for _, d := range ds {
		if _, err := p.Store.Stat(d); fault.Is(err, fault.NotFound) {
			lacking = append(lacking, d)
		} else if err != nil {
			return nil, err
		}
	}
	return lacking, nil
}

// theirs are those blobs that a node says it does not hold.
func (p *Peers) theirs(ctx context.Context, id string, ds []digest.Digest) ([]digest.Digest, error) {
	if id == p.Roster.Self() {
		return p.lacks(ds)
	}
	var answer lacksAnswer
	err := p.whileLive(ctx, id, func(ctx context.Context) error {
		return p.call(ctx, id, "lacks", lacksRequest{ds}, &answer)
	})
	return answer.Blobs, err
}

// stranded are the blobs that would be lost with a node: no other node that is up
// holds them.
type stranded struct {
	blobs   int
	example digest.Digest
	// known: the node is up and says that it holds them; else it may.
	known bool
}

// strands asks the other nodes that are up for every blob of the site.
func (p *Peers) strands(ctx context.Context, id string) (stranded, error) {
	_, up := p.find(id)
	s := stranded{known: up}
	for after := digest.Digest(""); ; {
		rows, err := p.page(after)
		if err != nil {
			return s, err
		}
		var rest []digest.Digest
		for _, b := range rows {
			if b.State == blobs.Live && b.Lost == 0 && !p.Store.Shelved(b.digest) {
				rest = append(rest, b.digest)
			}
		}
		for _, m := range p.Roster.Live() {
			if m.ID == id || len(rest) == 0 {
				continue
			}
			lacking, err := p.theirs(ctx, m.ID, rest)
			if ctx.Err() != nil {
				return s, ctx.Err()
			}
			if err != nil {
				p.Log.Info("a node did not say which blobs it holds", "node", m.ID, "err", err)
				continue // as if it were down
			}
			rest = lacking
		}
		if up && len(rest) > 0 {
			lacking, err := p.theirs(ctx, id, rest)
			if err != nil {
				return s, err
			}
			rest = without(rest, lacking)
		}
		if s.blobs += len(rest); s.example == "" && len(rest) > 0 {
			s.example = rest[0]
		}
		if len(rows) < repairPage {
			return s, nil
		}
		after = rows[len(rows)-1].digest
	}
}

func without(ds, lacking []digest.Digest) (held []digest.Digest) {
	no := make(map[digest.Digest]bool, len(lacking))
	for _, d := range lacking {
		no[d] = true
	}
	for _, d := range ds {
		if !no[d] {
			held = append(held, d)
		}
	}
	return held
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
