package peers

import (
	"bufio"
	"bytes"
	"container/list"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/node/fault"
)

// Cache says whether and how a node is one: it serves pulls and takes pushes, is no
// home for blobs, and lets go of what was not read for longest.
type Cache struct {
	On bool
	// Size is what the blobs may take, in bytes; 0: as much as leaves a tenth of the
	// disk free.
	Size int64
	// File remembers over a restart what was read when.
	File string
}

const (
	cacheLook = 5 * time.Second  // between two looks at the size
	cacheSave = 10 * time.Minute // between two writes of the file
	cacheKeep = 0.9              // of the size is left after an eviction
)

// cached is the order in which a cache's blobs were read. It is safe for concurrent
// use.
type cached struct {
	mu    sync.Mutex
	order list.List // of digests, the one read last at the front
	at    map[digest.Digest]*list.Element
	size  atomic.Int64
}

func (c *cached) bytes() int64 { return c.size.Load() }

// read notes that a blob was read just now.
func (c *cached) read(d digest.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.at[d]; e != nil {
		c.order.MoveToFront(e)
		return
	}
	c.enter(d)
}

// enter puts a blob that is not there at the front. c.mu is held.
func (c *cached) enter(d digest.Digest) {
	if c.at == nil {
		c.at = map[digest.Digest]*list.Element{}
	}
	c.at[d] = c.order.PushFront(d)
}

// sync makes the order one of exactly these blobs: those that are new to it have
// just arrived.
func (c *cached) sync(held map[digest.Digest]struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for d, e := range c.at {
		if _, ok := held[d]; !ok {
			c.order.Remove(e)
			delete(c.at, d)
		}
	}
	for d := range held {
		if c.at[d] == nil {
			c.enter(d)
		}
	}
}

// oldest lists all blobs, the one that was not read for longest first.
func (c *cached) oldest() []digest.Digest {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]digest.Digest, 0, c.order.Len())
	for e := c.order.Back(); e != nil; e = e.Prev() {
		out = append(out, e.Value.(digest.Digest))
	}
	return out
}

// Read notes that a blob of this node was read; it is cheap.
func (p *Peers) Read(d digest.Digest) {
	if p.Cache.On {
		p.cached.read(d)
	} else {
		p.surplus.read(d)
	}
}

// keepCache keeps a cache within its size until ctx ends.
func (p *Peers) keepCache(ctx context.Context) error {
	if !p.Cache.On {
		return nil
	}
	p.recall()
	look, save := time.NewTicker(cacheLook), time.NewTicker(cacheSave)
	defer look.Stop()
	defer save.Stop()
	for {
		if err := p.evict(ctx); err != nil && ctx.Err() == nil {
			p.Log.Warn("the cache could not be kept within its size; trying again", "err", err)
		}
		select {
		case <-ctx.Done():
			p.remember()
			return nil
		case <-save.C:
			p.remember()
		case <-look.C:
		}
	}
}

// evict lets go of blobs, if the cache is above its size, until a tenth of it is
// free again.
func (p *Peers) evict(ctx context.Context) error {
	excess, err := p.excess(ctx)
	if err != nil || excess <= 0 {
		return err
	}
	held := map[digest.Digest]struct{}{}
	for after := digest.Digest(""); ; {
		page, err := p.Store.List(after, 1000)
		if err != nil {
			return err
		}
		if len(page) == 0 {
			break
		}
		for _, d := range page {
			held[d] = struct{}{}
		}
		after = page[len(page)-1]
	}
	p.cached.sync(held)
	evicted, kept := 0, 0
	for _, d := range p.cached.oldest() {
		if excess <= 0 || ctx.Err() != nil {
			break
		}
		info, err := p.Store.Stat(d)
		if err != nil {
			continue // somebody else took it away
		}
		err = p.Store.RemoveIf(ctx, d, func(ctx context.Context) error { return p.keptByHomes(ctx, d, false) })
		switch {
		case err == nil:
			evicted++
			excess -= info.Size
			p.metrics.evicted.Inc()
		case fault.Is(err, fault.Precondition), fault.Is(err, fault.Conflict), fault.Is(err, fault.Unavailable):
			kept++
		default:
			return fmt.Errorf("evict %s: %w", d, err)
		}
	}
	if evicted > 0 || kept > 0 {
		p.Log.Info("the cache let go of what was not read for longest", "blobs", evicted, "kept_for_want_of_homes", kept)
	}
	_, err = p.excess(ctx)
	return err
}

// excess is by how many bytes the cache must shrink; 0 while it is within its size.
func (p *Peers) excess(ctx context.Context) (int64, error) {
	u, err := p.Store.Usage(ctx)
	if err != nil {
		return 0, err
	}
	p.cached.size.Store(u.Bytes)
	p.metrics.cacheBytes.Set(float64(u.Bytes))
	size := p.Cache.Size
	if size == 0 {
		size = u.Bytes + u.Partials + u.Free - u.Total/10
	}
	if used := u.Bytes + u.Partials; used > size {
		return used - int64(cacheKeep*float64(size)), nil
	}
	return 0, nil
}

// remember writes down in what order blobs were read, the oldest first.
func (p *Peers) remember() {
	if p.Cache.File == "" {
		return
	}
	var b bytes.Buffer
	for _, d := range p.cached.oldest() {
		b.WriteString(d.String() + "\n")
	}
	next := p.Cache.File + ".tmp"
	err := os.WriteFile(next, b.Bytes(), 0o600)
	if err == nil {
		err = os.Rename(next, p.Cache.File)
	}
	if err != nil { // it costs no more than a worse choice after the next start
		p.Log.Warn("what the cache's blobs were last read could not be written down", "file", filepath.Base(p.Cache.File), "err", err)
	}
}

// recall reads what remember wrote.
func (p *Peers) recall() {
	if p.Cache.File == "" {
		return
	}
	data, err := os.ReadFile(p.Cache.File)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		p.Log.Warn("what the cache's blobs were last read could not be read", "file", filepath.Base(p.Cache.File), "err", err)
	}
	var order []digest.Digest
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		if d, err := entry.ParseDigest(lines.Text()); err == nil {
			order = append(order, d)
		}
	}
	for _, d := range slices.Compact(order) {
		p.cached.read(d)
	}
}
