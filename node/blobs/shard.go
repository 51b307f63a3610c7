package blobs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
)

// shard is one of the directories of blobs.
type shard struct {
	mu sync.Mutex
	// renamed counts the renames into the directory and synced how many of them
	// are known to be durable.
	renamed, synced uint64
	// counted says that blobs and bytes are right.
	counted bool
	blobs   int
	bytes   int64
}

// place gives a verified file its durable place among the blobs, or drops it when
// the blob is held. It is synced first, by sync when not nil, else it has been;
// of pushes of one blob at once only one has to. After a failure the blob is not
// visible, unless it was before. It holds the blob's lock to the end, so that
// nobody acknowledges a blob which a failed sync is about to take back.
func (s *Store) place(from string, k key, size int64, sync func() error) error {
	s.moving.RLock()
	defer s.moving.RUnlock()
	if sync == nil {
		sync = func() error { return nil }
	}
	if home := s.shelves.Load().home; home != nil {
		if err := sync(); err != nil {
			return err
		}
		return s.ship(home, from, k, size)
	}
	unlock, _ := s.locks.write(k)
	defer unlock()
	if held, err := s.fs.Stat(k.blob()); err != nil || held.Size() != size || s.isUnfit(k) {
		if err := sync(); err != nil {
			return err
		}
	}
	entered, err := s.enter(from, k, size)
	if err != nil {
		return err
	}
	err = s.settle(k.shard())
	if err != nil && entered {
		err = errors.Join(err, s.unlink(k))
	}
	return err
}

// enter makes a verified and synced file visible and says whether it did: not
// when the blob is held. It is durable once its shard is settled. The caller
// holds the blob's lock.
func (s *Store) enter(from string, k key, size int64) (entered bool, err error) {
	sh := &s.shards[k.shard()]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	held, err := s.fs.Stat(k.blob())
	switch {
	case err == nil && s.isUnfit(k):
		// Damaged where it is; the new file is verified.
	case err == nil && held.Size() == size:
		s.sweep(from)
		return false, nil
	case err == nil:
		// Not what was stored here: a broken file system. The new file is verified.
		s.log.Error("a held blob had the wrong size and was replaced", "blob", k.digest(), "size", held.Size(), "want", size)
	case !errors.Is(err, fs.ErrNotExist):
		return false, err
	}
	if err := s.fs.Rename(from, k.blob()); err != nil {
		return false, err
	}
	s.refit(k)
	sh.renamed++
	if sh.counted {
		sh.bytes += size
		sh.blobs++
		if held != nil {
			sh.blobs, sh.bytes = sh.blobs-1, sh.bytes-held.Size()
		}
	}
	return true, nil
}

// settle makes every rename into the shard durable that was done before the
// call, by this process or by the one before it. It costs nothing when they are.
func (s *Store) settle(i int) error {
	sh := &s.shards[i]
	sh.mu.Lock()
	target := sh.renamed
	settled := sh.synced >= target
	sh.mu.Unlock()
	if settled {
		return nil
	}
	if err := s.fs.SyncDir(shardName(i)); err != nil {
		return err
	}
	sh.mu.Lock()
	sh.synced = max(sh.synced, target)
	sh.mu.Unlock()
	return nil
}

// unlink removes a blob's file; the caller holds the blob's lock.
func (s *Store) unlink(k key) error {
	sh := &s.shards[k.shard()]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	held, err := s.fs.Stat(k.blob())
	if err != nil {
		return err
	}
	if err := s.fs.Remove(k.blob()); err != nil {
		return err
	}
	s.refit(k)
	if sh.counted {
		sh.blobs, sh.bytes = sh.blobs-1, sh.bytes-held.Size()
	}
	return nil
}

// Free gives the bytes that the store may still write, the reserve of
// Options.MinFree included, and the size of the disk. It is cheap.
func (s *Store) Free() (free, total int64, err error) { return s.fs.Space() }

// Usage tells what the store occupies. The first call reads every directory of
// blobs; later ones only those of unfinished work.
func (s *Store) Usage(ctx context.Context) (Usage, error) {
	var u Usage
	for i := range s.shards {
		if err := ctx.Err(); err != nil {
			return Usage{}, err
		}
		if err := s.count(i, &u); err != nil {
			return Usage{}, err
		}
	}
	for dir, sum := range map[string]*int64{uploadsDir: &u.Uploads, partialsDir: &u.Partials, stagingDir: &u.Staging} {
		if err := s.sizes(dir, sum, 1); err != nil {
			return Usage{}, fmt.Errorf("measuring %s: %w", dir, err)
		}
	}
	var err error
	u.Free, u.Total, err = s.fs.Space()
	return u, err
}

func (s *Store) count(i int, u *Usage) error {
	sh := &s.shards[i]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if !sh.counted {
		keys, err := s.blobsIn(i)
		if err != nil {
			return err
		}
		var bytes int64
		for _, k := range keys {
			fi, err := s.fs.Stat(k.blob())
			if err != nil {
				return fmt.Errorf("measuring blobs: %w", err)
			}
			bytes += fi.Size()
		}
		sh.counted, sh.blobs, sh.bytes = true, len(keys), bytes
	}
	u.Blobs += sh.blobs
	u.Bytes += sh.bytes
	return nil
}

// sizes adds up the files in a directory, and in those below it down to depth.
func (s *Store) sizes(dir string, sum *int64, depth int) error {
	names, err := s.fs.ReadDir(dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // ended meanwhile
		}
		return err
	}
	for _, name := range names {
		name = dir + "/" + name
		fi, err := s.fs.Stat(name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return err
		case !fi.IsDir():
			*sum += fi.Size()
		case depth > 0:
			if err := s.sizes(name, sum, depth-1); err != nil {
				return err
			}
		}
	}
	return nil
}

// locks has one lock for each digest in use.
type locks struct {
	mu  sync.Mutex
	all map[key]*lock
}

type lock struct {
	sync.RWMutex
	users int // holders, waiters and pins
	pins  int // changed only while holding the read lock and locks.mu
}

func (l *locks) use(d key) *lock {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all == nil {
		l.all = map[key]*lock{}
	}
	k := l.all[d]
	if k == nil {
		k = &lock{}
		l.all[d] = k
	}
	k.users++
	return k
}

func (l *locks) leave(d key, k *lock, pins int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	k.pins -= pins
	if k.users--; k.users == 0 {
		delete(l.all, d)
	}
}

func (l *locks) read(d key) (unlock func()) {
	k := l.use(d)
	k.RLock()
	return func() { k.RUnlock(); l.leave(d, k, 0) }
}

// tryRead is read unless somebody has the lock alone, or waits for that.
func (l *locks) tryRead(d key) (unlock func(), ok bool) {
	k := l.use(d)
	if !k.TryRLock() {
		l.leave(d, k, 0)
		return nil, false
	}
	return func() { k.RUnlock(); l.leave(d, k, 0) }, true
}

func (l *locks) write(d key) (unlock func(), pinned bool) {
	k := l.use(d)
	k.Lock()
	l.mu.Lock()
	pinned = k.pins > 0
	l.mu.Unlock()
	return func() { k.Unlock(); l.leave(d, k, 0) }, pinned
}

// pin waits for a removal under way, then forbids others.
func (l *locks) pin(d key) (release func()) {
	k := l.use(d)
	k.RLock()
	l.mu.Lock()
	k.pins++
	l.mu.Unlock()
	k.RUnlock()
	return sync.OnceFunc(func() { l.leave(d, k, 1) })
}
