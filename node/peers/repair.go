package peers

import (
	"context"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/transfer"
)

// A repair pass follows repairSettle after the last change to a blob row, so
// that a push is not in its own way, and repairInterval after the last pass in
// any case, since a node's coming and going changes no blob row.
const (
	repairSettle   = 2 * time.Second
	repairInterval = time.Minute
	repairPage     = 256
)

// repair brings this node to what the placement wants of it, again and again.
func (p *Peers) repair(ctx context.Context) error {
	changed := p.DB.Watch(ctx, blobs.BlobTable)
	for {
		again := p.repairPass(ctx)
		wait := repairInterval
		if again {
			wait = repairSettle
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		case <-changed:
			timer.Reset(repairSettle)
			select {
			case <-ctx.Done():
				timer.Stop()
				return nil
			case <-timer.C:
			}
		}
	}
}

// repairPass walks over all blob rows once. again says that something could not
// be done and another pass should follow soon.
func (p *Peers) repairPass(ctx context.Context) (again bool) {
	members, err := p.memberIDs()
	if err != nil {
		p.Log.Error("repair cannot read the members", "err", err)
		return true
	}
	lacking, after := 0, digest.Digest("")
	for ctx.Err() == nil {
		page, err := p.page(after)
		if err != nil {
			p.Log.Error("repair cannot read the blob rows", "err", err)
			return true
		}
		for _, b := range page {
			after = b.digest
			if b.State == blobs.Gone {
				continue
			}
			if b.Copies < min(Durability, len(members)) {
				lacking++
			}
			if err := p.repairBlob(ctx, b, members); err != nil {
				p.Log.Warn("repair could not bring a blob here", "blob", b.digest, "err", err)
				again = true
			}
		}
		if len(page) < repairPage {
			break
		}
	}
	p.metrics.underReplicated.Set(float64(lacking))
	return again || lacking > 0
}

// repairBlob fetches one blob when this node should hold it and does not, and
// commits its piece root when that falls to this node.
func (p *Peers) repairBlob(ctx context.Context, b row, members []string) error {
	self := p.Roster.Self()
	_, err := p.Store.Stat(b.digest)
	held := err == nil
	if !held {
		if !slices.Contains(homes(b.digest, members, replicas), self) {
			return nil
		}
		return p.obtain(ctx, heldBlob{b.digest, b.Size})
	}
	if b.Root == nil && b.Size > transfer.PieceSize && p.firstLive(b.digest) == self {
		return p.commitRoot(ctx, b.digest)
	}
	if b.Copies < Durability {
		return p.recount(ctx, b)
	}
	return nil
}

// recount asks for copies of a blob whose row says that it lacks some, when this
// node is the first live one of its placement, and writes down how many there
// are.
func (p *Peers) recount(ctx context.Context, b row) error {
	if p.firstLive(b.digest) != p.Roster.Self() || len(p.others()) == 0 {
		return nil
	}
	copies, err := p.Ensure(ctx, []digest.Digest{b.digest})
	if err != nil || copies <= b.Copies {
		return err
	}
	_, err = p.DB.Update(ctx, func(tx *table.Tx) error {
		return p.Records.SetCopies(tx, b.digest, copies)
	})
	return err
}

// firstLive is the live node that comes first in a blob's placement: the one that
// does what one node should do.
func (p *Peers) firstLive(d digest.Digest) string {
	live := p.Roster.Live()
	ids := make([]string, len(live))
	for i, m := range live {
		ids[i] = m.ID
	}
	if len(ids) == 0 {
		return p.Roster.Self()
	}
	return placement(d, ids)[0]
}

// row is a blob's row with its digest.
type row struct {
	digest digest.Digest
	blobs.Blob
}

func (p *Peers) page(after digest.Digest) (page []row, err error) {
	err = p.DB.View(func(v *table.View) error {
		for r, err := range p.Records.Scan(v, after, repairPage) {
			if err != nil {
				return err
			}
			page = append(page, row{digest.Digest(r.Key[0]), r.Value})
		}
		return nil
	})
	return page, err
}

func (p *Peers) memberIDs() (ids []string, err error) {
	err = p.DB.View(func(v *table.View) error {
		members, err := p.Roster.Members(v)
		for _, m := range members {
			ids = append(ids, m.ID)
		}
		return err
	})
	return ids, err
}
