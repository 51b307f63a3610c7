package identity

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"io"
	"sync"
	"time"
)

// cache remembers for a while what was found about secrets, by a keyed MAC of
// them: whoever reads this memory, or a dump of it, does not find the secrets.
// It holds at most size entries; when it is full, some other entry goes.
type cache[V any] struct {
	macs sync.Pool // of hash.Hash, keyed: to key one costs more than to use it
	size int

	mu      sync.Mutex
	entries map[cacheKey]cached[V]
}

type cacheKey [sha256.Size]byte

type cached[V any] struct {
	value V
	until time.Time
}

func newCache[V any](secret [32]byte, size int) *cache[V] {
	return &cache[V]{
		macs: sync.Pool{New: func() any { return hmac.New(sha256.New, secret[:]) }},
		size: size, entries: make(map[cacheKey]cached[V]),
	}
}

// key is the MAC of the parts, each with its length in front.
func (c *cache[V]) key(parts ...string) (k cacheKey) {
	mac := c.macs.Get().(hash.Hash)
	defer c.macs.Put(mac)
	mac.Reset()
	var length [8]byte
	for _, part := range parts {
		binary.BigEndian.PutUint64(length[:], uint64(len(part)))
		mac.Write(length[:])
		io.WriteString(mac, part)
	}
	mac.Sum(k[:0])
	return k
}

func (c *cache[V]) get(k cacheKey, now time.Time) (V, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.entries[k]
	if ok && !now.Before(e.until) {
		delete(c.entries, k)
		ok = false
	}
	if !ok {
		var none V
		return none, false
	}
	return e.value, true
}

func (c *cache[V]) put(k cacheKey, value V, until time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.entries[k]; !ok && len(c.entries) >= c.size {
		for other := range c.entries { // any: the order of a map is random
			delete(c.entries, other)
			break
		}
	}
	c.entries[k] = cached[V]{value, until}
}
