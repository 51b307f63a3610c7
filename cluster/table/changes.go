package table

import (
	"context"
	"strings"
)

// Changes collects the keys of rows that change, for those who would otherwise
// read a whole table to find them. It is safe for concurrent use.
type Changes struct {
	progress *progress
	tables   []string // each with a separator behind it
	limit    int
	some     chan struct{}

	// Under progress.mu.
	keys map[string]struct{}
	lost bool
}

// Collect begins to collect the keys of rows of some tables, at most limit of
// them at a time, until ctx ends. Nothing is said of the state at the time of the
// call: collect first, then read.
func (db *DB) Collect(ctx context.Context, limit int, tables ...string) *Changes {
	c := &Changes{progress: &db.progress, limit: limit, some: make(chan struct{}, 1), keys: map[string]struct{}{}}
	for _, t := range tables {
		c.tables = append(c.tables, t+sep)
	}
	p := c.progress
	p.mu.Lock()
	p.collecting[c] = struct{}{}
	p.mu.Unlock()
	context.AfterFunc(ctx, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.collecting, c)
	})
	return c
}

// Some has a value when Take has something to give.
func (c *Changes) Some() <-chan struct{} { return c.some }

// Take gives the keys that have changed since the last Take, as table and parts,
// in no order. lost says that there were more than the limit, or that the whole
// state was replaced: any row may have changed, and no keys are given.
func (c *Changes) Take() (keys []Key, lost bool) {
	p := c.progress
	p.mu.Lock()
	taken, lost := c.keys, c.lost
	c.keys, c.lost = map[string]struct{}{}, false
	select {
	case <-c.some:
	default:
	}
	p.mu.Unlock()
	if lost {
		return nil, true
	}
	for k := range taken {
		name, parts := splitKey([]byte(k))
		keys = append(keys, Key{name, parts})
	}
	return keys, false
}

// Key names a row.
type Key struct {
	Table string
	Parts []string
}

// note takes the keys of an advance, nil when the whole state was replaced. Only
// advance calls it, under the lock.
func (c *Changes) note(keys [][]byte) {
	told := keys == nil
	c.lost = c.lost || told
	for _, k := range keys {
		if !c.wants(k) {
			continue
		}
		told = true
		if !c.lost {
			c.keys[string(k)] = struct{}{}
		}
	}
	if len(c.keys) > c.limit {
		c.lost = true
	}
	if c.lost {
		clear(c.keys)
	}
	if told {
		select {
		case c.some <- struct{}{}:
		default:
		}
	}
}

func (c *Changes) wants(key []byte) bool {
	for _, t := range c.tables {
		if len(key) > len(t) && strings.HasPrefix(string(key[:len(t)]), t) {
			return true
		}
	}
	return false
}
