package swarm

import (
	"slices"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// readsPerTap is how many chunks are read at once for one peer, or wait to be sent.
const readsPerTap = 4

// showsPerTap is how many of those the library knows of: it sends them in any order, and
// a peer waits for whole pieces.
const showsPerTap = 2

// slowRead is how long a chunk may take to be read before its peer is told not to wait.
const slowRead = time.Second

// ahead are chunks that were read for peers before the library hears that they are
// asked for. The library reads for a connection one chunk after the other, so one that
// the disk is slow to give would hold up all the others.
type ahead struct {
	mu     sync.Mutex
	chunks map[chunk]*readChunk
}

// readChunk is one, and how many peers wait for it.
type readChunk struct {
	data []byte
	refs int
}

// put keeps a chunk for a peer.
func (a *ahead) put(c chunk, data []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r := a.chunks[c]; r != nil {
		r.refs++
		return
	}
	a.chunks[c] = &readChunk{data, 1}
}

// drop ends a peer's wait for a chunk.
func (a *ahead) drop(c chunk) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r := a.chunks[c]; r != nil {
		if r.refs--; r.refs == 0 {
			delete(a.chunks, c)
		}
	}
}

// readAt copies a chunk that was read for a peer.
func (a *ahead) readAt(b []byte, piece int, off int64) bool {
	a.mu.Lock()
	r := a.chunks[chunk{uint32(piece), uint32(off), uint32(len(b))}]
	a.mu.Unlock()
	return r != nil && copy(b, r.data) == len(b)
}

// enqueue has a chunk read in its turn, unless it is being read, for an ask that was taken
// back, or stands there still. t.mu is held.
func (t *tap) enqueue(c chunk) {
	if _, reading := t.inRead[c]; !reading && !slices.Contains(t.queue, c) {
		t.queue = append(t.queue, c)
	}
}

// serve takes up the reading of what the peer has asked for, as much as may be at once.
// t.mu is held.
func (t *tap) serve() {
	for len(t.queue) > 0 && t.reading < readsPerTap {
		c := t.queue[0]
		t.queue = t.queue[1:]
		if !t.asked[c] {
			continue // cancelled
		}
		t.reading++
		t.inRead[c] = time.AfterFunc(slowRead, func() { t.refuse(c) })
		t.reads++
		number := t.reads
		t.s.e.wg.Go(func() { t.read(c, number) })
	}
}

// line is a chunk that was read and that the library does not know of yet.
type line struct {
	chunk
	number int // of the read
}

// show puts before the library what was read, in the order in which it was asked for.
// t.mu is held.
func (t *tap) show() {
	for len(t.lined) > 0 && len(t.showing) < showsPerTap {
		c := t.lined[0].chunk
		t.lined = t.lined[1:]
		t.showing[c] = struct{}{}
		t.shown = appendChunk(t.shown, msgRequest, c)
		t.wakeUp()
	}
}

// read reads a chunk and puts the peer's request before the library.
func (t *tap) read(c chunk, number int) {
	select {
	case t.s.e.reads <- struct{}{}:
	case <-t.done:
		return
	}
	data := make([]byte, c.length)
	_, err := t.s.store.readAt(data, int64(c.piece)*transfer.PieceSize+int64(c.begin))
	<-t.s.e.reads
	if err != nil {
		t.s.unread(t, int(c.piece), err)
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.inRead[c].Stop()
	delete(t.inRead, c)
	if !t.asked[c] || t.ended {
		t.reading--
		t.serve()
		return
	}
	t.s.ahead.put(c, data)
	t.ready[c] = struct{}{}
	k, _ := slices.BinarySearchFunc(t.lined, number, func(l line, n int) int { return l.number - n })
	t.lined = slices.Insert(t.lined, k, line{c, number})
	t.show()
}

// refuse tells the peer that a chunk does not come for now, because the disk is slow to
// give it: else the peer's library would wait for it with all that it could have
// meanwhile.
func (t *tap) refuse(c chunk) {
	t.mu.Lock()
	defer t.mu.Unlock()
	slow, reading := t.inRead[c]
	if !reading || t.ended {
		return
	}
	slow.Reset(slowRead) // the peer may ask again meanwhile
	if t.asked[c] {
		delete(t.asked, c)
		t.unpush(c)
		t.tell(appendReject(nil, c))
	}
}

// served notes that a chunk is on its way to the peer, or not wanted any more. t.mu is
// held.
func (t *tap) served(c chunk) {
	delete(t.asked, c)
	delete(t.showing, c)
	t.lined = slices.DeleteFunc(t.lined, func(l line) bool { return l.chunk == c })
	if _, ok := t.ready[c]; ok {
		delete(t.ready, c)
		t.s.ahead.drop(c)
		t.reading--
	}
	t.show()
	t.serve()
}

// letGo frees the chunks that the peer will not get. t.mu is held.
func (t *tap) letGo() {
	t.ended = true
	for _, slow := range t.inRead {
		slow.Stop()
	}
	for c := range t.ready {
		t.s.ahead.drop(c)
	}
	clear(t.ready)
	t.queue, t.lined = nil, nil
}
