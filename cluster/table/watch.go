package table

import (
	"bytes"
	"context"
	"strings"
)

type watcher struct {
	prefix string
	ch     chan uint64
}

// Watch tells of changes below a prefix: nothing for all, the name of a table
// with parts of a key, a counter's key, or the name of a log. Each number says
// that something changed at or before that revision; changes that come
// faster than they are received are told once. Nothing is said of the state at
// the time of the call: watch first, then read. The channel is closed when ctx
// ends.
func (db *DB) Watch(ctx context.Context, prefix ...string) <-chan uint64 {
	w := &watcher{prefix: strings.Join(prefix, sep), ch: make(chan uint64, 1)}
	p := &db.progress
	p.mu.Lock()
	p.watchers[w] = struct{}{}
	p.mu.Unlock()
	context.AfterFunc(ctx, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.watchers, w)
		close(w.ch)
	})
	return w.ch
}

func (w *watcher) sees(keys [][]byte) bool {
	if keys == nil { // the whole state was replaced
		return true
	}
	for _, k := range keys {
		k = bytes.TrimPrefix(k, []byte("+")) // a counter is watched by its own name
		if w.prefix == "" || len(k) >= len(w.prefix) && string(k[:len(w.prefix)]) == w.prefix &&
			(len(k) == len(w.prefix) || k[len(w.prefix)] == 0) {
			return true
		}
	}
	return false
}

// tell replaces what was not received yet. Only advance calls it, under the
// lock, so the channel has room after the first select.
func (w *watcher) tell(rev uint64) {
	select {
	case <-w.ch:
	default:
	}
	w.ch <- rev
}
