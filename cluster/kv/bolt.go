package kv

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

const (
	// engineFormat is the version of the file's layout.
	engineFormat = 2
	// formatKey holds engineFormat in the meta space.
	formatKey = "format"
	// mapped is 4 GiB of addresses on a 64-bit machine and 64 MiB on others.
	mapped = 64 << 20 << (bits.UintSize / 64 * 6)
)

// bolt is an Engine over one bbolt file, synced on every commit. The free list
// is kept in the file, so that opening a large one does not read all of it.
type bolt struct {
	path   string
	mapped *mappedPages

	writing sync.Mutex // one Update or Replace at a time; taken before mu
	mu      sync.RWMutex
	db      *bbolt.DB // nil once closed
	growths *growths  // of whoever holds writing
	closing sync.WaitGroup
	readers readers

	replacing atomic.Bool
}

// OpenBolt opens the engine's file at path, which it creates when there is
// none. The file is locked: a second process gets an error.
func OpenBolt(path string) (Engine, error) {
	db, err := openBolt(path)
	if err != nil {
		return nil, err
	}
	// A Replace that did not live to the end may have left its file; with the
	// lock held it is nobody else's.
	err = os.Remove(path + ".new")
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	if err := errors.Join(err, syncDir(filepath.Dir(path))); err != nil {
		return nil, errors.Join(fmt.Errorf("open the state engine: %w", err), db.Close())
	}
	return &bolt{path: path, db: db, growths: newGrowths(), mapped: newMappedPages(stateLeast, largeFile)}, nil
}

func openBolt(path string) (*bbolt.DB, error) {
	options := *bbolt.DefaultOptions
	options.Timeout = time.Second
	options.NoFreelistSync = false
	options.FreelistType = bbolt.FreelistMapType
	// bbolt waits for readers before it maps a grown file, so a reader that
	// waits for a write would wait for ever. Mapping much at once costs only
	// addresses, of which a 64-bit machine has plenty.
	options.InitialMmapSize = mapped
	if err := createBolt(path); err != nil {
		return nil, fmt.Errorf("open the state engine: %w", err)
	}
	db, err := bbolt.Open(path, 0o600, &options)
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, fmt.Errorf("open the state engine %s: another process uses it; stop that one first", path)
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrChecksum), errors.Is(err, bolterrors.ErrVersionMismatch):
		return nil, fmt.Errorf("open the state engine %s: the file is damaged (%w); move it away and start again to rebuild it from the newest snapshot and the log", path, err)
	case err != nil:
		return nil, fmt.Errorf("open the state engine: %w", err)
	}
	if err := prepare(db); err != nil {
		return nil, errors.Join(fmt.Errorf("open the state engine %s: %w", path, err), db.Close())
	}
	return db, nil
}

// createBolt makes a file of bbolt, if there is none, that is whole from when it has its
// name on: bbolt begins one with a write, and what a power cut leaves of that it refuses to
// open ever after.
func createBolt(path string) error {
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	first := path + ".first"
	if err := os.Remove(first); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	options := *bbolt.DefaultOptions
	options.Timeout = time.Second
	db, err := bbolt.Open(first, 0o600, &options)
	if err != nil {
		return err
	}
	if err := db.Close(); err != nil { // it synced what it wrote
		return err
	}
	if err := os.Rename(first, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// prepare makes the buckets of a new file and checks the format of an old one
// before anything else in it is read.
func prepare(db *bbolt.DB) error {
	ready := false
	err := db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte(meta.String()))
		if b == nil {
			return nil
		}
		ready = true
		if v := b.Get([]byte(formatKey)); len(v) != 1 || v[0] != engineFormat {
			return fmt.Errorf("the file has format %x and this version of atoll reads and writes format %d; run the version that wrote it, "+
				"or move the file away and start again to rebuild it from the newest snapshot and the log", v, engineFormat)
		}
		return nil
	})
	if err != nil || ready {
		return err
	}
	return db.Update(func(tx *bbolt.Tx) error {
		for s := range spaces {
			if _, err := tx.CreateBucketIfNotExists([]byte(s.String())); err != nil {
				return err
			}
		}
		return tx.Bucket([]byte(meta.String())).Put([]byte(formatKey), []byte{engineFormat})
	})
}

func (e *bolt) Read(fn func(Content) error) error {
	s, err := e.Open()
	if err != nil {
		return err
	}
	defer s.Release()
	return fn(s)
}

func (e *bolt) Open() (Snapshot, error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.db == nil {
		return nil, ErrClosed
	}
	t, round := e.readers.take()
	if t == nil {
		tx, err := e.db.Begin(false)
		if err != nil {
			return nil, fmt.Errorf("read the state engine: %w", err)
		}
		t = e.newTx(tx)
	}
	return &boltReader{t, &e.readers, round}, nil
}

func (e *bolt) Update(fn func(Writer) error) error {
	e.writing.Lock()
	defer e.writing.Unlock()
	e.mu.RLock()
	db := e.db
	e.mu.RUnlock()
	if db == nil {
		return ErrClosed
	}
	e.readers.stop()
	defer e.readers.start()
	return e.update(db, e.growths, fn)
}

func (e *bolt) update(db *bbolt.DB, growths *growths, fn func(Writer) error) error {
	watched := func() {}
	err := db.Update(func(tx *bbolt.Tx) error {
		t := e.newTx(tx)
		t.growths = growths
		err := fn(t)
		watched = e.mapped.commits(tx)
		return err
	})
	watched()
	return err
}

// Sync has nothing to do: every commit is synced.
func (e *bolt) Sync() error { return nil }

// Replace fills a second file beside the first, syncs it once and renames it
// over the first: a crash leaves either the old state or the new one.
func (e *bolt) Replace(fill func(batch func(func(Writer) error) error) error) error {
	e.writing.Lock()
	defer e.writing.Unlock()
	e.mu.RLock()
	old := e.db
	e.mu.RUnlock()
	if old == nil {
		return ErrClosed
	}
	e.replacing.Store(true)
	defer e.replacing.Store(false)
	path := e.path + ".new"
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("replace the state: %w", err)
	}
	db, err := openBolt(path)
	if err != nil {
		return err
	}
	if err := e.fill(db, fill); err != nil {
		return errors.Join(err, db.Close(), os.Remove(path))
	}
	e.readers.stop() // those of the old file would keep it open
	defer e.readers.start()
	if err := os.Rename(path, e.path); err != nil {
		return errors.Join(fmt.Errorf("replace the state: %w", err), db.Close(), os.Remove(path))
	}
	e.mu.Lock()
	e.db = db
	e.mu.Unlock()
	// Readers may still be in the old file; closing it waits for them. It has
	// no name any more, so there is nothing left to lose in it.
	e.closing.Go(func() { _ = old.Close() })
	if err := syncDir(filepath.Dir(e.path)); err != nil {
		return fmt.Errorf("replace the state: %w", err)
	}
	return nil
}

func (e *bolt) fill(db *bbolt.DB, fill func(batch func(func(Writer) error) error) error) error {
	db.NoSync = true // nobody reads the file before the one sync at the end
	defer func() { db.NoSync = false }()
	growths := newGrowths()
	if err := fill(func(fn func(Writer) error) error { return e.update(db, growths, fn) }); err != nil {
		return err
	}
	if err := db.Sync(); err != nil {
		return fmt.Errorf("replace the state: %w", err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (e *bolt) Size() int64 {
	info, err := os.Stat(e.path)
	if err != nil {
		return 0
	}
	return info.Size()
}

func (e *bolt) Large() bool { return e.replacing.Load() || e.Size() >= largeFile }

func (e *bolt) Close() error {
	e.writing.Lock()
	defer e.writing.Unlock()
	e.mu.Lock()
	db := e.db
	e.db = nil
	e.mu.Unlock()
	if db == nil {
		return nil
	}
	e.readers.stop()
	err := db.Close()
	e.closing.Wait()
	e.mapped.close()
	return err
}

// mappedPages keeps what of a file is mapped within bounds. A fault maps 16
// pages, so that scattered reads soon have all of a large file mapped. The pages
// are the kernel's cache and cost nothing more by being mapped, but they count as
// the process's memory: for who looks at it, for limits that look at the
// working set, and for the kernel when it chooses what to kill.
//
// When the process has grown to residentMost a quarter of the file is taken from it, and
// the next one at the next look if that was not enough; of a large file all. What was in
// use is mapped again then, which is little beside what scattered reads of a large file map
// anew in any case; but of a small one, which is mapped whole soon, it would be most of
// what a busy node does. So some may stay whatever else there is.
type mappedPages struct {
	most    int64 // bytes that the process may have in memory in all
	least   int64 // bytes of files that may be mapped however large the rest is; the program is one of them
	large   int64 // with a file of so many bytes and more both are less (see largeLeast), all goes at once, and its commits are watched
	touched atomic.Int64
	until   atomic.Int64 // what touched has to be before it is worth while to look again
	looking sync.Mutex
	turn    int64 // how many quarters were had in this round
	hand    int64 // where the next one begins
	memory  *memoryFile
}

const (
	residentMost = 132 << 20
	// What a push needs of the state lies all over it. The log is written at its end and
	// hardly read.
	stateLeast = 76 << 20
	logLeast   = 32 << 20
	largeLeast = 30 << 20 // where the file is large
	// touchStep is how many keys are read or written from one look to the next. Each
	// maps 64 KiB or two, so that as much as 4 MiB may come on top.
	touchStep = 32
	// largeFile is so large that what is mapped of it is hardly what is read next.
	largeFile = 256 << 20
	// faultBytes is what one fault maps at most.
	faultBytes = 64 << 10
	// watchPause is as long as a commit takes for some hundred pages.
	watchPause = time.Millisecond
)

func newMappedPages(least, large int64) *mappedPages {
	return &mappedPages{most: residentMost, least: least, large: large, memory: openMemoryFile()}
}

// touch is told of keys that were read or written, each some pages.
func (m *mappedPages) touch(tx *bbolt.Tx, keys int) {
	if now := m.touched.Add(int64(keys)); now/touchStep != (now-int64(keys))/touchStep && now >= m.until.Load() {
		m.look(tx, 0)
	}
}

// look takes pages from the process when it has too many in memory, or would have too many
// with so many bytes more: if need be those of the program too. tx keeps the mapping where it is.
func (m *mappedPages) look(tx *bbolt.Tx, more int64) {
	// Nobody goes on while another one looks: that one may wait for a processor, on a
	// busy machine for as long as it takes to map gigabytes.
	m.looking.Lock()
	defer m.looking.Unlock()
	size, page, most, least := tx.Size(), int64(os.Getpagesize()), m.most, m.least
	large := size >= m.large
	if large {
		most, least = most-max(most/8, more), min(least, largeLeast)
	}
	if resident, files, ok := m.memory.read(); !ok || resident <= most || files <= least {
		// To look costs as much as to read a row. Each key maps two faults at most, and
		// half of the room is left to what else grows.
		m.until.Store(m.touched.Load() + max(most-resident, least-files)/2/(2*faultBytes))
		return
	}
	from, to := int64(0), size
	if !large {
		from, to = m.quarter(size, page)
	}
	unmapPages(tx.DB().Info().Data+uintptr(from), to-from)
	if more == 0 {
		return
	}
	if resident, _, _ := m.memory.read(); resident > most {
		m.memory.unmapProgram()
	}
}

// quarter is the next one of a file, from a whole page on. The file may have grown since the
// last: its end belongs to the fourth. Or it is another one.
func (m *mappedPages) quarter(size, page int64) (from, to int64) {
	if m.turn == 4 || m.hand >= size {
		m.turn, m.hand = 0, 0
	}
	m.turn++
	from, to = m.hand, size
	if m.turn < 4 {
		to = max(from, size/4*m.turn/page*page)
	}
	m.hand = to
	return from, to
}

// commits makes room for what bbolt maps in a commit, and looks while it is at it, until
// that is ended: it reads each page anew that it replaces, hundreds of them where the state
// is large, and calls nobody meanwhile. Who looks meanwhile may come late on a busy machine.
func (m *mappedPages) commits(tx *bbolt.Tx) (end func()) {
	if tx.Size() < m.large {
		return func() {}
	}
	db, stats := tx.DB(), tx.Stats()
	m.look(tx, stats.GetNodeCount()*faultBytes)
	ending, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(watchPause)
		defer tick.Stop()
		for {
			select {
			case <-ending:
				return
			case <-tick.C:
			}
			tx, err := db.Begin(false)
			if err != nil {
				return // it is closed
			}
			m.look(tx, 0)
			_ = tx.Rollback() // fails only when it has ended
		}
	}()
	return func() {
		close(ending)
		<-ended
	}
}

func (m *mappedPages) close() { m.memory.close() }

// boltTx is a bbolt transaction with the buckets that were used so far at hand:
// most reads need two of them, and opening one costs as much as reading a row.
type boltTx struct {
	tx      *bbolt.Tx
	buckets [spaces]*bbolt.Bucket
	cursors [spaces]*bbolt.Cursor // see lookup
	groups  []group
	growths *growths // nil unless it writes
	mapped  *mappedPages
	touched int // keys that mapped was not told of yet
}

func (e *bolt) newTx(tx *bbolt.Tx) *boltTx { return &boltTx{tx: tx, mapped: e.mapped} }

func (t *boltTx) bucket(s Space) *bbolt.Bucket {
	b := t.buckets[s]
	if b == nil {
		b = t.tx.Bucket([]byte(s.String()))
		// These only grow at their end: full pages need no room.
		switch s {
		case seen, entries:
			b.FillPercent = fillGrowth
		}
		t.buckets[s] = b
	}
	return b
}

// boltReader is a boltTx in somebody's hands.
type boltReader struct {
	*boltTx
	readers *readers
	round   uint64
}

func (r *boltReader) Release() {
	t := r.boltTx
	if t == nil {
		return // released before
	}
	r.boltTx = nil
	t.mapped.touch(t.tx, t.touched)
	t.touched = 0
	if !r.readers.keep(t, r.round) {
		_ = t.tx.Rollback() // fails only when it has ended
	}
}

// readers are read transactions of the newest state that nobody uses at the moment,
// with their buckets open: to begin one and open eight buckets costs as much as reading
// as many rows. There are none while something is written, so they neither keep pages
// from being used again nor the mapping from growing, and nobody waits for them.
type readers struct {
	mu      sync.Mutex
	idle    []*boltTx
	round   uint64 // of the state, raised with each write
	stopped bool
}

// idleReaders are kept at most.
const idleReaders = 8

// take gives one, or nil, and the round that one that is begun now belongs to.
func (r *readers) take() (t *boltTx, round uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.idle); n > 0 {
		t, r.idle = r.idle[n-1], r.idle[:n-1]
	}
	return t, r.round
}

// keep takes one back; false when it is to be ended.
func (r *readers) keep(t *boltTx, round uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped || round != r.round || len(r.idle) == idleReaders {
		return false
	}
	r.idle = append(r.idle, t)
	return true
}

// stop ends all that are idle and lets none become it, until start.
func (r *readers) stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.idle {
		_ = t.tx.Rollback() // fails only when it has ended
	}
	r.idle, r.stopped = nil, true
	r.round++
}

func (r *readers) start() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.round++
	r.stopped = false
}

func (t *boltTx) Lookup(s Space, key []byte) []byte {
	t.step()
	if s == rows {
		return t.lookupRow(key)
	}
	return t.lookup(t.bucket(s), &t.cursors[s], key)
}

// lookup is Get of a bucket for which there is a cursor at hand: Get makes one for each
// key, and with it the list of the pages on the way. In a transaction that writes, the
// pages of a cursor are soon those of before.
func (t *boltTx) lookup(b *bbolt.Bucket, at **bbolt.Cursor, key []byte) []byte {
	if t.growths != nil {
		return b.Get(key)
	}
	if *at == nil {
		*at = b.Cursor()
	}
	k, v := (*at).Seek(key)
	if !bytes.Equal(k, key) {
		return nil
	}
	return v
}

func (t *boltTx) Ascend(s Space, from, to []byte) iter.Seq2[[]byte, []byte] {
	if s == rows {
		return t.ascendRows(from, to)
	}
	return func(yield func([]byte, []byte) bool) {
		c := t.bucket(s).Cursor()
		for k, v := c.Seek(from); k != nil && (to == nil || bytes.Compare(k, to) < 0); k, v = c.Next() {
			if !yield(k, v) {
				return
			}
			t.step()
		}
	}
}

// step counts a key that was read or written.
func (t *boltTx) step() {
	if t.touched++; t.touched >= touchStep {
		t.mapped.touch(t.tx, t.touched)
		t.touched = 0
	}
}

func (t *boltTx) Set(s Space, key, value []byte) error {
	t.step()
	if s == rows {
		return t.setRow(key, value)
	}
	return t.bucket(s).Put(key, value)
}

func (t *boltTx) Unset(s Space, key []byte) error {
	t.step()
	if s == rows {
		return t.unsetRow(key)
	}
	return t.bucket(s).Delete(key)
}
