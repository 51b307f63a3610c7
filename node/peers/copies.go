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

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/transfer"
)

// copiesAtOnce bounds the blobs that one request makes this node fetch at once,
// blobsPerRequest those that one request may name: when one of them cannot be
// copied, all of them go to the next candidate.
const (
	copiesAtOnce    = 4
	blobsPerRequest = 256
)

// heldRequest asks a node to hold blobs on its stable storage; the answer comes
// when it does.
type heldRequest struct {
	Blobs []heldBlob `json:"blobs"`
	// Each: the answer is a heldAnswer, or nothing where all are held. Without it, as a
	// version that does not know of it asks and answers, one that is not held is an error.
	Each bool `json:"each,omitempty"`
}

// heldAnswer names the blobs that the node could not come to hold, and why one of them.
type heldAnswer struct {
	Lacking []digest.Digest `json:"lacking"`
	Why     string          `json:"why"`
}

type heldBlob struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
	// Way it is to come, as far as the setting says; who has just been asked for a copy
	// may not know yet in which projects it is.
	Way transfer.Way `json:"way,omitempty"`
}

// Ensure implements blobs.Copies: it has every blob copied until as many live
// nodes as the durability asks for hold all of them, and says how many do. Fewer
// is no error: it is as many as there are. fault.Unavailable when not even one
// holds a blob.
func (p *Peers) Ensure(ctx context.Context, ds []digest.Digest) (int, error) {
	durability := p.Policy.Durability()
	pending, err := p.plan(ds, durability)
	if err != nil {
		return 0, err
	}
	for {
		batches := map[string][]*copyPlan{}
		for _, c := range pending {
			if c.holders < durability && len(c.candidates) > 0 {
				batches[c.candidates[0]] = append(batches[c.candidates[0]], c)
				c.candidates = c.candidates[1:]
			}
		}
		if len(batches) == 0 {
			break
		}
		p.askToHold(ctx, batches)
		if err := ctx.Err(); err != nil {
			return 0, err
		}
	}
	copies := durability
	var absent digest.Digest
	for _, c := range pending {
		if c.holders+c.spare == 0 {
			absent = c.blob.Digest
			p.tellAbsent(absent) // or the client, told that it is here, never pushes it
		}
		copies = min(copies, c.holders+c.spare)
	}
	if absent != "" {
		return 0, fault.New(fault.Unavailable, "no node that is up holds %s; push it again", absent)
	}
	if len(pending) == 0 { // nothing but metadata, which raft copies
		copies = min(durability, 1+len(p.others()))
	}
	return copies, nil
}

// copyPlan is one blob on its way to enough nodes.
type copyPlan struct {
	blob       heldBlob
	holders    int      // nodes that are known to hold it durably, and to keep it
	spare      int      // 1 when this node holds it and is no home: it lets go only once the homes hold it
	candidates []string // nodes to ask next, best first
}

// plan counts this node's own copy of each blob and lists whom to ask for more:
// its homes, then the other nodes that may be home to one.
func (p *Peers) plan(ds []digest.Digest, durability int) ([]*copyPlan, error) {
	var l layout
	replicas := map[digest.Digest]int{}
	err := p.DB.View(func(v *table.View) (err error) {
		if l, err = p.layout(v); err != nil {
			return err
		}
		for _, d := range ds {
			if replicas[d], err = p.replicas(v, d); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	keeps := slices.Contains(l.homes, l.self)
	var plans []*copyPlan
	for _, d := range ds {
		n, fresh := replicas[d]
		if !fresh {
			continue // named twice
		}
		delete(replicas, d)
		c := &copyPlan{blob: heldBlob{Digest: d}}
		plans = append(plans, c)
		info, err := p.Store.Stat(d)
		switch {
		case err == nil:
			c.blob.Size = info.Size
			if keeps {
				c.holders = 1
			} else {
				c.spare = 1
			}
			if p.Store.Shelved(d) {
				c.holders = durability // in a storage that no node's loss takes with it
			}
		case fault.Is(err, fault.NotFound):
			if c.blob.Size, err = p.sizeOf(d); err != nil {
				return nil, err
			}
		default:
			return nil, err
		}
		c.candidates = l.takers(d, n, c.holders > 0)
	}
	return plans, nil
}

// takers are the live nodes to ask to hold a blob, best first; held says that
// this node does, so that the first copy stands apart from it.
func (l layout) takers(d digest.Digest, replicas int, held bool) []string {
	able := make([]string, 0, len(l.homes))
	for _, id := range l.homes {
		if id != l.self && l.isLive(id) {
			able = append(able, id)
		}
	}
	var before []string
	if held {
		before = []string{l.self}
	}
	order := spread(placement(d, able), l.places, before...)
	homes := l.homesOf(d, replicas)
	out := make([]string, 0, len(order))
	for _, home := range []bool{true, false} {
		for _, id := range order {
			if slices.Contains(homes, id) == home {
				out = append(out, id)
			}
		}
	}
	return out
}

func (p *Peers) sizeOf(d digest.Digest) (size int64, err error) {
	err = p.DB.View(func(v *table.View) error {
		row, ok, err := p.Records.Get(v, d)
		if err == nil && !ok {
			err = fault.New(fault.NotFound, "there is no blob %s in this site", d).WithCode("BLOB_UNKNOWN")
		}
		size = row.Size
		return err
	})
	return size, err
}

// askToHold asks each node in parallel for its batch. What a node cannot hold goes to the
// next candidate.
func (p *Peers) askToHold(ctx context.Context, batches map[string][]*copyPlan) {
	var wait sync.WaitGroup
	for id, batch := range batches {
		wait.Go(func() {
			for part := range slices.Chunk(batch, blobsPerRequest) {
				request, answer := heldRequest{Each: true}, heldAnswer{}
				var err error
				for _, c := range part {
					if err == nil {
						c.blob.Way, err = p.engineFor(c.blob.Digest, transfer.Replication)
					}
					request.Blobs = append(request.Blobs, c.blob)
				}
				if err == nil {
					err = p.whileLive(ctx, id, func(ctx context.Context) error {
						return p.call(ctx, id, "held", request, &answer)
					})
				}
				lacking := len(answer.Lacking)
				if err != nil {
					lacking = len(part)
				} else if lacking > 0 {
					err = errors.New(answer.Why)
				}
				p.noteCopies(ctx, id, lacking, err)
				for _, c := range part {
					if lacking < len(part) && !slices.Contains(answer.Lacking, c.blob.Digest) {
						c.holders++ // no other batch of this round has it
					}
				}
			}
		})
	}
	wait.Wait()
}

// noteCopies logs when a node begins to fail, and when it takes copies again.
func (p *Peers) noteCopies(ctx context.Context, id string, blobs int, err error) {
	if ctx.Err() != nil {
		return // whoever asked left
	}
	p.mu.Lock()
	was := p.failing[id]
	p.failing[id] = err != nil
	p.mu.Unlock()
	switch {
	case err != nil && !was:
		p.Log.Warn("a node could not take its copy", "node", id, "blobs", blobs, "err", err)
	case err != nil:
		p.Log.Debug("a node could not take its copy again", "node", id, "blobs", blobs, "err", err)
	case was:
		p.Log.Info("a node takes copies again", "node", id)
	}
}

// whileLive runs a call to a node and gives it up when the node stops being
// live: large blobs take as long as they take, a dead node does not.
func (p *Peers) whileLive(ctx context.Context, id string, call func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel(nil)
	watching.Go(func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if _, live := p.find(id); !live {
					cancel(fmt.Errorf("node %s went away", id))
				}
			}
		}
	})
	err := call(ctx)
	if err != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	return nil
}

// hold answers a peer's heldRequest: it fetches what this node lacks and returns
// once all is on stable storage, or was tried.
func (p *Peers) hold(ctx context.Context, request heldRequest) (any, error) {
	group, grouped := &errgroup.Group{}, ctx
	if !request.Each { // one that fails decides
		group, grouped = errgroup.WithContext(ctx)
	}
	group.SetLimit(copiesAtOnce)
	var mu sync.Mutex
	var lacking []digest.Digest
	for _, b := range request.Blobs {
		group.Go(func() error {
			err := p.obtain(grouped, b, transfer.Replication)
			if err != nil {
				mu.Lock()
				defer mu.Unlock()
				lacking = append(lacking, b.Digest)
			}
			return err
		})
	}
	err := group.Wait()
	if err == nil || !request.Each || ctx.Err() != nil {
		return nil, err
	}
	p.Log.Warn("could not take copies for another node", "blobs", len(lacking), "err", err)
	return heldAnswer{lacking, err.Error()}, nil
}

// Bring makes this node hold a blob durably, fetched from other nodes if it must
// be; transfer.ErrNoHolder when none that is up has it.
func (p *Peers) Bring(ctx context.Context, d digest.Digest, size int64) error {
	return p.obtain(ctx, heldBlob{Digest: d, Size: size}, transfer.Replication)
}

// Prefetch is Bring for what nobody has asked for yet, in a way that may be chosen.
func (p *Peers) Prefetch(ctx context.Context, d digest.Digest, size int64, way transfer.Way) error {
	return p.obtain(ctx, heldBlob{d, size, way}, transfer.Prefetch)
}

// Belongs reports whether this node is one of those that should hold a blob.
func (p *Peers) Belongs(d digest.Digest) (belongs bool, err error) {
	err = p.DB.View(func(v *table.View) error {
		l, err := p.layout(v)
		if err != nil {
			return err
		}
		n, err := p.replicas(v, d)
		belongs = slices.Contains(l.homesOf(d, n), l.self)
		return err
	})
	return belongs, err
}

// obtain makes this node hold a blob durably; class says what for. It goes in the way that
// was chosen, if one was.
func (p *Peers) obtain(ctx context.Context, b heldBlob, class transfer.Class) error {
	if _, err := p.Store.Stat(b.Digest); err == nil || !fault.Is(err, fault.NotFound) {
		return err
	}
	if p.Place != nil && class >= transfer.Repair { // a push does not wait behind these
		release, err := p.Place(ctx)
		if err != nil {
			return err
		}
		defer release()
	}
	root, err := p.root(b.Digest)
	if err == nil && b.Way != transfer.ByStream && b.Way != transfer.ByBitTorrent {
		b.Way, err = p.engineFor(b.Digest, class)
	}
	if err != nil {
		return err
	}
	// Without a root the blob is fetched whole, not by BitTorrent, and a client who comes
	// meanwhile reads nothing before its end. Only a push does not wait for one.
	if root == nil && b.Size > transfer.PieceSize && (class != transfer.Replication || b.Way == transfer.ByBitTorrent) {
		root = p.askForRoot(ctx, b.Digest)
	}
	fetch, err := p.engine.Fetch(ctx, transfer.Blob{Digest: b.Digest, Size: b.Size, Root: root}, transfer.Via(b.Way), transfer.For(class))
	if err == nil {
		err = fetch.Wait(ctx)
	}
	if err != nil {
		p.metrics.copyFailures.Inc()
		return fmt.Errorf("copy %s to this node: %w", b.Digest, err)
	}
	p.metrics.copiesMade.Inc()
	return nil
}
