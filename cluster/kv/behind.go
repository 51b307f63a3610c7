package kv

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"iter"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atoll-registry/atoll/cluster/kv/treap"
)

const (
	// flushPause is the least time between two flushes.
	flushPause = 400 * time.Millisecond
	// flushShare: a flush is followed by a pause of so many times its own length,
	// so that a slow disk is not kept busy by flushes alone; at most flushPauseMost.
	flushShare     = 3
	flushPauseMost = time.Second
	// layerBytes and layerUpdates are when a layer is full. Two of them are the
	// most that there is.
	layerBytes   = 8 << 20
	layerUpdates = 8192
	// layerKeysLarge and layerBytesLarge are for a state of largeFile and more: a flush maps a
	// page of it, and those beside it, for almost each key, which hardly any two share. How
	// long their values are hardly matters.
	layerKeysLarge  = 128
	layerBytesLarge = 1 << 20
	// layerPair is about what a pair takes in a layer beside its key and value.
	layerPair = 96
)

// behind is an Engine that answers an Update when it is in memory and moves what
// was written into the Engine below soon after, many Updates in one. Raft's log is
// durable before anything is applied, and a start goes on from what the Engine
// below holds.
//
// What was written and is not below yet lies in two layers over it: the active one,
// which Updates go to, and the frozen one, which is on its way. A layer holds what
// was set, and nil for what was unset.
type behind struct {
	below Engine
	pause time.Duration
	most  layerSize
	seed  maphash.Seed // of the sums of keys

	writing sync.Mutex // one Update or Replace at a time; taken before mu

	// mu: the layers and the state below change together, so that who holds it
	// finds them at one point in time. The frozen layer may be below already, and
	// over itself changes nothing.
	mu             sync.RWMutex
	active, frozen *layer      // never nil, never changed in place
	asked          *asked      // rows that were looked for below; replaced with each flush
	work           *sync.Cond  // of mu: wakes the flusher
	free           *sync.Cond  // of mu: wakes who waits for the flusher
	updating       bool        // an Update stands on the active layer
	wanted         bool        // the flusher waits for it to end
	hurry          bool        // flush now, not after the pause
	rested         bool        // the pause is over
	rest           *time.Timer // ends the pause; nil before the first
	closing        bool
	err            error       // of a flush; for good
	fails          func(error) // is told of it; may be nil
	made, kept     uint64      // Updates, and those of them that are below
	ended          chan struct{}
}

// layer is immutable, but for its filter, which those that follow it share.
type layer struct {
	roots
	layerSize
	filter *filter // of its rows; nil while it is empty
	upto   uint64  // the last of all Updates that is in it
}

type layerSize struct{ bytes, updates, keys int }

func (l *layer) empty() bool { return l.updates == 0 }

// row gives what the layer says of a row, whose key has this sum: nil, true when it has
// none.
func (l *layer) row(key []byte, sum uint64) ([]byte, bool) {
	if !l.filter.may(sum) {
		return nil, false
	}
	return l.roots[rows].Get(key)
}

// filter is a Bloom filter, which knows of most rows that a layer says nothing of them: of
// those that a push looks for nearly all. What is put into it is in none of the layers yet
// that somebody reads, so that he misses nothing.
type filter [filterBits / 64]atomic.Uint64

// filterBits is a power of two. The 18,000 rows of a layer full of pushes are in doubt with one
// of sixty others.
const filterBits = 1 << 18

func (f *filter) add(sum uint64) {
	for _, bit := range filterPlaces(sum) {
		f[bit/64].Or(1 << (bit % 64))
	}
}

func (f *filter) may(sum uint64) bool {
	if f == nil {
		return false
	}
	for _, bit := range filterPlaces(sum) {
		if f[bit/64].Load()&(1<<(bit%64)) == 0 {
			return false
		}
	}
	return true
}

func filterPlaces(sum uint64) [2]uint64 { return [...]uint64{sum % filterBits, sum >> 32 % filterBits} }

// WriteBehind gives an Engine that is durable some milliseconds after an Update,
// or after Sync or Close, and costs the Engine below one Update for all that were
// made meanwhile. When one of those fails, no more Updates are taken: the state
// goes on being read, the error comes back from every other call, and a Machine on
// the Engine halts.
func WriteBehind(below Engine) Engine {
	return newBehind(below, flushPause, layerSize{bytes: layerBytes, updates: layerUpdates})
}

func newBehind(below Engine, pause time.Duration, most layerSize) *behind {
	e := &behind{below: below, pause: pause, most: most, seed: maphash.MakeSeed(), rested: true, ended: make(chan struct{})}
	e.active, e.frozen, e.asked = &layer{}, &layer{}, &asked{}
	e.work, e.free = sync.NewCond(&e.mu), sync.NewCond(&e.mu)
	go e.run()
	return e
}

func (e *behind) Read(fn func(Content) error) error {
	s, err := e.Open()
	if err != nil {
		return err
	}
	defer s.Release()
	return fn(s)
}

func (e *behind) Open() (Snapshot, error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.closing {
		return nil, ErrClosed
	}
	return e.open()
}

// open is for who holds mu.
func (e *behind) open() (Snapshot, error) {
	below, err := e.below.Open()
	if err != nil || e.active.empty() && e.frozen.empty() {
		return below, err
	}
	return &layered{below, [2]*layer{e.active, e.frozen}, e.asked, e.seed}, nil
}

func (e *behind) Update(fn func(Writer) error) error {
	e.writing.Lock()
	defer e.writing.Unlock()
	base, below, err := e.begin()
	if err != nil {
		return err
	}
	next := base
	defer func() {
		below.Release()
		e.end(next)
	}()
	tx := &layeredEdit{below: below, edit: editRoots(base.roots), filter: base.filter, size: base.layerSize}
	if tx.filter == nil {
		tx.filter = &filter{}
	}
	if err := fn(tx); err != nil {
		return err
	}
	tx.size.updates++
	next = &layer{tx.edit.roots(), tx.size, tx.filter, e.made + 1}
	return nil
}

// begin waits until there is room, and gives the active layer and what is below
// it. While an Update stands on the active layer it is not frozen.
func (e *behind) begin() (*layer, *layered, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for e.err == nil && !e.closing && e.full() {
		e.hasten()
		e.free.Wait()
	}
	switch {
	case e.closing:
		return nil, nil, ErrClosed
	case e.err != nil:
		return nil, nil, e.err
	}
	below, err := e.below.Open()
	if err != nil {
		return nil, nil, err
	}
	e.updating = true
	return e.active, &layered{below, [2]*layer{{}, e.frozen}, e.asked, e.seed}, nil
}

// full reports whether the active layer takes no more. It is for who holds mu.
func (e *behind) full() bool {
	if e.active.bytes >= e.most.bytes || e.active.updates >= e.most.updates {
		return true
	}
	return (e.active.keys >= layerKeysLarge || e.active.bytes >= layerBytesLarge) && e.below.Large()
}

// end puts the next layer in place of the active one.
func (e *behind) end(next *layer) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.updating = false
	e.active, e.made = next, max(e.made, next.upto)
	switch {
	case e.wanted && !next.empty():
		e.freeze()
	case e.rested || e.hurry || e.closing:
		e.work.Signal()
	}
}

// freeze is for who holds mu, with no Update under way.
func (e *behind) freeze() {
	e.active, e.frozen = &layer{}, e.active
	e.wanted, e.hurry = false, false
	e.work.Signal()
	e.free.Broadcast() // there is room
}

// hasten is for who holds mu.
func (e *behind) hasten() {
	e.hurry = true
	e.work.Signal()
}

// run is the flusher. It ends at Close, or with a flush that fails.
func (e *behind) run() {
	defer close(e.ended)
	for e.due() {
		start := time.Now()
		err := e.below.Update(e.frozen.writeTo) // nobody else changes frozen
		if fails, err := e.flushed(err, time.Since(start)); err != nil {
			if fails != nil {
				fails(err)
			}
			return
		}
	}
}

// OnFailure names who is told, once, that a flush has failed.
func (e *behind) OnFailure(fails func(error)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.fails = fails
}

// due waits until there is something to flush, and time, and freezes it; false
// when there is nothing left at Close.
func (e *behind) due() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for e.frozen.empty() {
		switch ready := e.rested || e.hurry || e.closing; {
		case !e.active.empty() && ready && !e.updating:
			e.freeze()
			continue
		case !e.active.empty() && ready:
			e.wanted = true
		case e.closing && !e.updating:
			return false
		}
		e.work.Wait()
	}
	return true
}

// flushed tells all that the frozen layer is below, or why not.
func (e *behind) flushed(err error, took time.Duration) (fails func(error), _ error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	defer e.free.Broadcast()
	if err != nil {
		e.err = fmt.Errorf("keep the state on disk: %w", err)
		return e.fails, e.err
	}
	e.kept, e.frozen, e.asked = e.frozen.upto, &layer{}, &asked{}
	e.rested = false
	e.rest = time.AfterFunc(max(e.pause, min(flushShare*took, flushPauseMost)), func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.rested = true
		e.work.Signal()
	})
	return nil, nil
}

// writeTo gives the engine below a layer, in the order of keys.
func (l *layer) writeTo(w Writer) error {
	for s, m := range l.roots {
		for k, v := range m.Ascend(nil, nil) {
			var err error
			if v == nil {
				err = w.Unset(Space(s), k)
			} else {
				err = w.Set(Space(s), k, v)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// Sync waits until all Updates that were made are below.
func (e *behind) Sync() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for made := e.made; e.kept < made; e.free.Wait() {
		if e.err != nil {
			return e.err
		}
		if e.frozen.upto < made {
			e.hasten()
		}
	}
	return nil
}

// Replace first moves the layers below: when it fails, all that there was stays.
func (e *behind) Replace(fill func(batch func(func(Writer) error) error) error) error {
	e.writing.Lock()
	defer e.writing.Unlock()
	if err := e.Sync(); err != nil {
		return err
	}
	defer func() {
		// Meanwhile the layers were empty, and nobody asked.
		e.mu.Lock()
		defer e.mu.Unlock()
		e.asked = &asked{}
	}()
	return e.below.Replace(fill)
}

func (e *behind) Size() int64 { return e.below.Size() }

func (e *behind) Large() bool { return e.below.Large() }

// Close makes all durable first.
func (e *behind) Close() error {
	e.mu.Lock()
	e.closing = true
	if e.rest != nil {
		e.rest.Stop()
	}
	e.work.Signal()
	e.free.Broadcast()
	e.mu.Unlock()
	<-e.ended
	return errors.Join(e.err, e.below.Close())
}

// layered is a state below with an active and a frozen layer over it.
type layered struct {
	Snapshot
	layers [2]*layer
	asked  *asked
	seed   maphash.Seed
}

func (l *layered) Lookup(s Space, key []byte) []byte {
	if s == rows {
		return l.row(key, maphash.Bytes(l.seed, key))
	}
	for _, layer := range l.layers {
		if v, ok := layer.roots[s].Get(key); ok {
			return v
		}
	}
	return l.Snapshot.Lookup(s, key)
}

// row is Lookup for a row whose key has this sum.
func (l *layered) row(key []byte, sum uint64) []byte {
	for _, layer := range l.layers {
		if v, ok := layer.row(key, sum); ok {
			return v
		}
	}
	if v, ok := l.asked.find(key, sum); ok {
		return v
	}
	v := l.Snapshot.Lookup(rows, key)
	l.asked.add(key, v, sum)
	return v
}

// asked are rows that were looked for below: those that are not there, and the last ones
// that are. Most of what a push looks for is not there, and is looked for once more when
// its conditions are judged; and what is there, its repository and the blobs that others
// share, is what the push before looked for. They hold from one flush to the next: what the
// flush between makes of them is in the frozen layer, which is looked at before.
type asked struct {
	lacks lacking
	found [foundMost]atomic.Pointer[foundRow] // each at its sum
}

// lacking are in parts, by the sum of the key: with one lock for all, busy processors wait
// for who holds it and has none.
type lacking [lackingParts]struct {
	mu   sync.Mutex
	keys map[string]struct{}
}

type foundRow struct{ key, value []byte }

const (
	lackingParts = 64
	// lackingMost bounds the keys of a part.
	lackingMost = 256
	foundMost   = 1024
	// foundBytes is how long a row is at most that is kept.
	foundBytes = 512
)

// find gives what is below, nil for no row; ok is false when that is not known.
func (a *asked) find(key []byte, sum uint64) (value []byte, ok bool) {
	if row := a.found[sum%foundMost].Load(); row != nil && bytes.Equal(row.key, key) {
		return row.value, true
	}
	return nil, a.lacks.has(key, sum)
}

// add keeps neither.
func (a *asked) add(key, value []byte, sum uint64) {
	switch {
	case value == nil:
		a.lacks.add(key, sum)
	case len(key)+len(value) <= foundBytes:
		both := slices.Concat(key, value)
		a.found[sum%foundMost].Store(&foundRow{both[:len(key):len(key)], both[len(key):]})
	}
}

func (l *lacking) has(key []byte, sum uint64) bool {
	p := &l[sum%lackingParts]
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.keys[string(key)]
	return ok
}

func (l *lacking) add(key []byte, sum uint64) {
	p := &l[sum%lackingParts]
	own := string(key)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.keys == nil {
		p.keys = map[string]struct{}{}
	}
	if len(p.keys) < lackingMost {
		p.keys[own] = struct{}{}
	}
}

func (l *layered) Ascend(s Space, from, to []byte) iter.Seq2[[]byte, []byte] {
	return over(l.layers[0].roots[s], over(l.layers[1].roots[s], l.Snapshot.Ascend(s, from, to), from, to), from, to)
}

// over gives a layer's pairs and those below that it says nothing of, in order.
func over(layer treap.Map, below iter.Seq2[[]byte, []byte], from, to []byte) iter.Seq2[[]byte, []byte] {
	if layer.Empty() {
		return below
	}
	return func(yield func([]byte, []byte) bool) {
		c := layer.Seek(from)
		// give yields the layer's pairs below a key; a nil key means all.
		give := func(key []byte) bool {
			for ; c.Valid() && (key == nil || bytes.Compare(c.Key(), key) < 0); c.Next() {
				if c.Value() != nil && !yield(c.Key(), c.Value()) {
					return false
				}
			}
			return true
		}
		for k, v := range below {
			if !give(k) {
				return
			}
			if c.Valid() && bytes.Equal(c.Key(), k) {
				continue // the layer knows better
			}
			if !yield(k, v) {
				return
			}
		}
		give(to)
	}
}

// layeredEdit is an active layer to be, over what is below it.
type layeredEdit struct {
	below  *layered
	edit   memoryEdit
	filter *filter
	size   layerSize
}

func (t *layeredEdit) Lookup(s Space, key []byte) []byte {
	if s != rows {
		if v, ok := t.edit[s].Get(key); ok {
			return v
		}
		return t.below.Lookup(s, key)
	}
	sum := maphash.Bytes(t.below.seed, key)
	if t.filter.may(sum) {
		if v, ok := t.edit[s].Get(key); ok {
			return v
		}
	}
	return t.below.row(key, sum)
}

func (t *layeredEdit) Ascend(s Space, from, to []byte) iter.Seq2[[]byte, []byte] {
	return over(t.edit[s].Map(), t.below.Ascend(s, from, to), from, to)
}

func (t *layeredEdit) Set(s Space, key, value []byte) error {
	t.size.bytes += len(key) + len(value) + layerPair
	t.size.keys++
	if s == rows {
		t.filter.add(maphash.Bytes(t.below.seed, key))
	}
	return t.edit.Set(s, key, value)
}

func (t *layeredEdit) Unset(s Space, key []byte) error {
	if t.Lookup(s, key) != nil {
		t.size.bytes += len(key) + layerPair
		t.size.keys++
		if s == rows {
			t.filter.add(maphash.Bytes(t.below.seed, key))
		}
		t.edit[s].Set(bytes.Clone(key), nil)
	}
	return nil
}
