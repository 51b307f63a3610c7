package journal

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/fault"
)

// maxTrees bounds the cache: a right edge is a few hundred bytes, and a miss
// costs one hash for each entry of the log.
const maxTrees = 512

// treeCache keeps the newest tree of recently used logs. Committed entries never
// change, so a tree of a smaller size can always be grown from where it is.
type treeCache struct {
	mu    sync.Mutex
	trees map[entry.LogID]*entry.Tree
}

// from gives a copy of the cached tree when it is not larger than size.
func (c *treeCache) from(id entry.LogID, size uint64) *entry.Tree {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.trees[id]; t != nil && t.Size() <= size {
		return t.Clone()
	}
	return new(entry.Tree)
}

func (c *treeCache) keep(id entry.LogID, t *entry.Tree) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if have := c.trees[id]; have != nil && have.Size() >= t.Size() {
		return
	}
	if c.trees == nil {
		c.trees = map[entry.LogID]*entry.Tree{}
	}
	for old := range c.trees { // any one: maps iterate in no order
		if len(c.trees) < maxTrees {
			break
		}
		delete(c.trees, old)
	}
	c.trees[id] = t.Clone()
}

// Tree is the hash tree over a log as the view shows it.
func (j *Journal) Tree(v *table.View, id entry.LogID) (*entry.Tree, error) {
	size, err := j.Size(v, id)
	if err != nil {
		return nil, err
	}
	return j.treeAt(v, id, size)
}

// RootAt is the root of the hash tree over the first size entries of a log.
func (j *Journal) RootAt(v *table.View, id entry.LogID, size uint64) (tlog.Hash, error) {
	t, err := j.treeAt(v, id, size)
	if err != nil {
		return tlog.Hash{}, err
	}
	return t.Root(), nil
}

func (j *Journal) treeAt(v *table.View, id entry.LogID, size uint64) (*entry.Tree, error) {
	t := j.trees.from(id, size)
	for e, err := range j.Entries(v, id, t.Size(), 0) {
		if err != nil {
			return nil, err
		}
		if t.Size() == size {
			break
		}
		leaf, err := entry.Leaf(id, e.Seq, e.Value)
		if err != nil {
			return nil, err
		}
		t.Append(leaf)
	}
	if t.Size() != size {
		return nil, fmt.Errorf("log %s has %d entries, want %d", id, t.Size(), size)
	}
	j.trees.keep(id, t)
	return t, nil
}

// Checkpoint commits to a log as the view shows it. An own log's is signed here
// and now; of another site's log it is the newest that came with it, which may
// be over fewer entries. A fault NotFound says that there is none.
func (j *Journal) Checkpoint(ctx context.Context, v *table.View, id entry.LogID) ([]byte, error) {
	row, _, known, err := j.logs.Get(v, logKey(id)...)
	if err != nil {
		return nil, err
	}
	if !known {
		return nil, fault.New(fault.NotFound, "log %s is not kept here", id)
	}
	if _, err := j.Own(v, id); !row.Own || err != nil {
		kept, _, ok, err := j.checkpoints.Get(v, logKey(id)...)
		if err == nil && !ok {
			err = fault.New(fault.NotFound, "no checkpoint of log %s came with it", id)
		}
		return kept.Signed, err
	}
	tree, err := j.Tree(v, id)
	if err != nil {
		return nil, err
	}
	c := entry.Checkpoint{Log: id, Size: tree.Size(), Root: tree.Root()}
	if c.Size > 0 {
		for last, err := range j.Entries(v, id, c.Size-1, 1) {
			if err != nil {
				return nil, err
			}
			e, err := entry.Decode(last.Value)
			if err != nil {
				return nil, fmt.Errorf("read entry %d of log %s: %w", last.Seq, id, err)
			}
			c.At = e.At
		}
	}
	key, err := j.Signer(ctx, v)
	if err != nil {
		return nil, err
	}
	return c.Sign(key)
}

// KeepCheckpoint stores another site's signed checkpoint, whose signature the
// caller has verified, to be relayed with the log. It is refused with a fault
// Conflict that wraps ErrFork when it does not commit to the entries accepted
// here, and ignored when a newer one is kept.
func (j *Journal) KeepCheckpoint(ctx context.Context, signed []byte) error {
	c, err := entry.ParseCheckpoint(signed)
	if err != nil {
		return fault.Wrap(err, fault.Invalid, "the checkpoint is malformed")
	}
	if err := j.db.ReadIndex(ctx); err != nil {
		return err
	}
	err = j.db.View(func(v *table.View) error {
		size, err := j.Size(v, c.Log)
		if err != nil {
			return err
		}
		if size < c.Size {
			return fault.Wrap(ErrGap, fault.Conflict, "the checkpoint covers %d entries of log %s, %d are here", c.Size, c.Log, size)
		}
		tree, err := j.treeAt(v, c.Log, c.Size)
		if err != nil {
			return err
		}
		if tree.Root() != c.Root {
			return fault.Wrap(ErrFork, fault.Conflict, "the checkpoint over %d entries of log %s does not match the entries here", c.Size, c.Log)
		}
		return nil
	})
	if err != nil {
		return err
	}
	_, err = j.db.Update(ctx, func(tx *table.Tx) error {
		have, _, ok, err := j.checkpoints.Get(tx, logKey(c.Log)...)
		if err != nil || ok && have.Size >= c.Size {
			return err
		}
		return j.checkpoints.Put(tx, checkpointRow{Signed: signed, Size: c.Size}, logKey(c.Log)...)
	})
	return err
}
