// Package blobs keeps content by digest: the files (Store) and the rows that
// say which blobs the site has, who may see them and what refers to them
// (Records).
//
// What the store promises, whatever stops the machine: a blob is visible only
// whole, verified against its digest and synced, and a success that was
// reported stays true. DESIGN.md has the steps and the reasons.
package blobs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/singleflight"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/node/fault"
)

// Options of a store; the zero value is usable.
type Options struct {
	FS FS // nil: the operating system's, below the directory given to Open
	// MinFree is the low-water mark in bytes: with less free space writes are
	// refused and reads go on. 0 is none.
	MinFree int64
	// LowWater, if it is set, is asked before each look at the free space and
	// wins over MinFree: a mark that moves while the store is open.
	LowWater func() int64
	// MaxUpload bounds one blob in bytes; 0 is unbounded.
	MaxUpload int64
	// MaxSessions bounds the upload sessions under way; 0 is 4096.
	MaxSessions int
	// Boot identifies the run of the kernel; "" asks the kernel.
	Boot string
	// Opened, if it is set, is told of every blob that OpenBlob opens.
	Opened func(digest.Digest)
	// Backend is where committed blobs go; nil: the store's directory.
	Backend Backend
	Log     *slog.Logger // nil discards
}

// Info is what the store knows of a blob that it holds.
type Info struct {
	Digest digest.Digest
	Size   int64
}

// Usage is what the store occupies of the node's disk, in bytes: not what is in a
// Backend.
type Usage struct {
	Blobs    int   // number of blobs held
	Bytes    int64 // by blobs held
	Uploads  int64 // by upload sessions
	Partials int64 // by fetches under way, holes included
	Staging  int64 // by imports under way
	Free     int64 // still free for the store
	Total    int64 // size of the disk
}

// CodeNoSpace is the code of a fault.Limit for want of disk space: the OCI
// Distribution specification has no name for it.
const CodeNoSpace = "INSUFFICIENT_STORAGE"

const (
	format       = "atoll-blobs 1\n"
	bufferSize   = 256 << 10
	spaceEvery   = 16 << 20 // bytes written between two looks at the free space
	maxSessions  = 4096
	kernelBootID = "/proc/sys/kernel/random/boot_id"
)

// Store is a content store in one directory, which must be its alone, and in a
// Backend if there is one. It is safe for concurrent use.
type Store struct {
	fs      FS
	o       Options
	log     *slog.Logger
	boot    string
	locks   locks
	shards  []shard // shardsEach for each algorithm
	buffers sync.Pool

	shelves  atomic.Pointer[shelves]
	moving   sync.RWMutex       // taken alone to change the home, shared by commits
	shipping singleflight.Group // of blobs into the backend

	mu       sync.Mutex
	sessions map[string]*Upload
	partials map[key]bool // open ones
	unfit    map[key]bool // damaged and still in their place
}

// Open opens the store in dir, making it when there is none, and puts in order
// what a crash has left: nothing of it was ever visible or acknowledged.
func Open(dir string, o Options) (*Store, error) {
	s := &Store{fs: o.FS, o: o, log: o.Log, boot: o.Boot, sessions: map[string]*Upload{}, partials: map[key]bool{}, unfit: map[key]bool{}}
	s.shards = make([]shard, shardsEach*len(entry.Algorithms()))
	s.shelves.Store(&shelves{home: o.Backend})
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.o.MaxSessions <= 0 {
		s.o.MaxSessions = maxSessions
	}
	s.buffers.New = func() any { return new([bufferSize]byte) }
	if s.boot == "" {
		if b, err := os.ReadFile(kernelBootID); err == nil {
			s.boot = strings.TrimSpace(string(b))
		}
	}
	if s.fs == nil {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("opening the blob store: %w", err)
		}
		if err := (disk{filepath.Dir(dir)}).SyncDir("."); err != nil {
			return nil, fmt.Errorf("opening the blob store: %w", err)
		}
		s.fs = disk{dir}
	}
	if err := s.recover(); err != nil {
		return nil, fmt.Errorf("opening the blob store in %s: %w", dir, err)
	}
	return s, nil
}

func (s *Store) recover() error {
	if err := s.checkFormat(); err != nil {
		return err
	}
	for i := range s.shards {
		s.shards[i].renamed = 1 // an earlier process may have renamed and not synced
	}
	last, err := s.read(bootName)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	sameBoot := s.boot != "" && string(last) == s.boot
	if err := s.recoverUploads(sameBoot); err != nil {
		return err
	}
	if err := s.recoverPartials(sameBoot); err != nil {
		return err
	}
	if !sameBoot {
		if err := s.replace(bootName, []byte(s.boot)); err != nil {
			return err
		}
	}
	return s.recoverStaging()
}

// checkFormat reads the version of the layout, or lays out an empty store. The
// format file comes last, so that a store with one is complete.
func (s *Store) checkFormat() error {
	got, err := s.read(formatName)
	if err == nil {
		if string(got) != format {
			return fmt.Errorf("its format is %.40q and this version of atoll reads %q: use the version that wrote it, or a newer one", got, format)
		}
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parents := []string{blobsDir}
	for _, algorithm := range entry.Algorithms() {
		parents = append(parents, blobsDir+"/"+algorithm.String())
	}
	for _, dir := range slices.Concat(parents, []string{uploadsDir, partialsDir, stagingDir}) {
		if err := s.fs.Mkdir(dir); err != nil {
			return err
		}
	}
	for i := range s.shards {
		if err := s.fs.Mkdir(shardName(i)); err != nil {
			return err
		}
	}
	for i := range s.shards {
		names, err := s.fs.ReadDir(shardName(i))
		if err != nil {
			return err
		}
		if len(names) > 0 {
			return fmt.Errorf("it holds blobs but no file %q to say in what format: restore that file, or give another directory", formatName)
		}
	}
	slices.Reverse(parents)
	for _, dir := range append(parents, ".") {
		if err := s.fs.SyncDir(dir); err != nil {
			return err
		}
	}
	return s.replace(formatName, []byte(format))
}

// Close saves what the upload sessions have taken in. The store must not be in
// use any more.
func (s *Store) Close() error {
	var errs []error
	for _, u := range s.allSessions() {
		if u.tryAcquire() {
			errs = append(errs, u.park())
			u.release()
		}
	}
	return errors.Join(errs...)
}

// Stat tells whether the store holds a blob durably; fault.NotFound with code
// BLOB_UNKNOWN when it does not.
func (s *Store) Stat(d digest.Digest) (Info, error) {
	k, err := keyOf(d)
	if err != nil {
		return Info{}, err
	}
	unlock := s.locks.read(k)
	defer unlock()
	info := Info{Digest: d}
	if err := s.find(func(from shelf) (err error) {
		info.Size, err = from.Stat(d)
		return err
	}); err != nil {
		return Info{}, s.failed(err, d, "looking at")
	}
	return info, nil
}

// Keeps reports whether the store holds a blob durably and nobody is about to
// remove it (RemoveIf). Where Stat waits for the removal, it says no at once, so
// that nodes which ask each other before they remove neither wait for each other
// nor both take the other's copy for one that stays.
func (s *Store) Keeps(d digest.Digest) (bool, error) {
	k, err := keyOf(d)
	if err != nil {
		return false, err
	}
	unlock, ok := s.locks.tryRead(k)
	if !ok {
		return false, nil
	}
	defer unlock()
	err = s.find(func(from shelf) error {
		_, err := from.Stat(d)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, s.failed(err, d, "looking at")
	}
	return true, nil
}

// OpenBlob opens a blob for reading; fault.NotFound with code BLOB_UNKNOWN when
// the store does not hold it. A blob that is removed stays readable for those
// who have it open.
func (s *Store) OpenBlob(d digest.Digest) (f File, size int64, err error) {
	k, err := keyOf(d)
	if err != nil {
		return nil, 0, err
	}
	unlock := s.locks.read(k)
	defer unlock()
	if err := s.find(func(from shelf) (err error) {
		f, size, err = from.Open(d)
		return err
	}); err != nil {
		return nil, 0, s.failed(err, d, "opening")
	}
	if s.o.Opened != nil {
		s.o.Opened(d)
	}
	return f, size, nil
}

func (s *Store) open(name string, d digest.Digest) (File, int64, error) {
	f, err := s.fs.OpenFile(name, os.O_RDONLY)
	if err != nil {
		return nil, 0, s.failed(err, d, "opening")
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, errors.Join(s.failed(err, d, "opening"), f.Close())
	}
	return f, fi.Size(), nil
}

// List gives up to n held blobs in the order of their digests, after the one
// given ("" begins). It reads one of the directories of blobs at a time.
func (s *Store) List(after digest.Digest, n int) ([]digest.Digest, error) {
	return merge(s.all(), after, n)
}

func (s *Store) listOwn(after digest.Digest, n int) ([]digest.Digest, error) {
	first := 0
	if after != "" {
		k, err := keyOf(after)
		if err != nil {
			return nil, err
		}
		first = k.shard()
	}
	var found []digest.Digest
	for i := first; i < len(s.shards) && len(found) < n; i++ {
		keys, err := s.blobsIn(i)
		if err != nil {
			return nil, err
		}
		at, _ := slices.BinarySearch(keys, key(after)+"\x00")
		for _, k := range keys[at:] {
			if len(found) == n {
				break
			}
			found = append(found, k.digest())
		}
	}
	return found, nil
}

// blobsIn lists the blobs of one directory, in order. What is not ours is left
// alone and not shown, and what is damaged is not shown either.
func (s *Store) blobsIn(i int) ([]key, error) {
	names, err := s.fs.ReadDir(shardName(i))
	if err != nil {
		return nil, fmt.Errorf("listing blobs: %w", err)
	}
	keys := make([]key, 0, len(names))
	for _, name := range names {
		if k, ok := keyIn(i, name); ok && !s.isUnfit(k) {
			keys = append(keys, k)
		}
	}
	return keys, nil
}

// Remove removes a blob; see RemoveIf.
func (s *Store) Remove(d digest.Digest) error {
	k, err := keyOf(d)
	if err != nil {
		return err
	}
	return s.remove(k, func() error { return nil })
}

// RemoveIf removes a blob if allowed, asked under the blob's lock, answers nil:
// no Commit, Stat or OpenBlob of the blob runs between the answer and the
// unlink. A pinned blob is fault.Conflict, one not held fault.NotFound. The
// unlink is not synced: after a power cut the blob may be held again.
//
// Pins and locks are this node's, so in a Backend, where other nodes push too,
// nothing is removed: fault.Conflict.
func (s *Store) RemoveIf(ctx context.Context, d digest.Digest, allowed func(context.Context) error) error {
	k, err := keyOf(d)
	if err != nil {
		return err
	}
	if s.Shared() {
		return fault.New(fault.Conflict, "blob %s stays: it is in a storage that other nodes may be pushing it to", d)
	}
	return s.remove(k, func() error { return allowed(ctx) })
}

func (s *Store) remove(k key, allowed func() error) error {
	unlock, pinned := s.locks.write(k)
	defer unlock()
	if pinned {
		return fault.New(fault.Conflict, "blob %s is being pushed", k)
	}
	if err := allowed(); err != nil {
		return err
	}
	if err := s.removeAll(k.digest()); err != nil {
		return s.failed(err, k.digest(), "removing")
	}
	return nil
}

// Pin keeps a blob from being removed until release is called, held or not. A
// push pins before Commit and releases once the row is live, so that no
// collection which saw the older row can unlink the file in between.
func (s *Store) Pin(d digest.Digest) (release func()) {
	k, err := keyOf(d)
	if err != nil {
		return func() {}
	}
	return s.locks.pin(k)
}

// Put stores what r gives as one blob; the failures are those of Upload. Nothing
// of it can be resumed.
func (s *Store) Put(ctx context.Context, d digest.Digest, r io.Reader) (Info, error) {
	k, err := keyOf(d)
	if err != nil {
		return Info{}, err
	}
	u, err := s.NewUpload(ctx)
	if err != nil {
		return Info{}, err
	}
	u.Expect(k.algorithm())
	if _, err := u.Append(ctx, r, 0); err != nil {
		return Info{}, errors.Join(err, u.Cancel())
	}
	info, err := u.Commit(ctx, d)
	if err != nil {
		return Info{}, errors.Join(err, u.Cancel())
	}
	return info, nil
}

// Expire ends upload sessions and closed partials that nobody has touched for
// longer than olderThan, frees their space and gives their number. Sessions left
// by an earlier process count from Open. Call it now and then: it also saves
// and closes the files of sessions that pause.
func (s *Store) Expire(ctx context.Context, olderThan time.Duration) (int, error) {
	n := 0
	var errs []error
	for _, u := range s.allSessions() {
		if ctx.Err() != nil {
			return n, ctx.Err()
		}
		_, at := u.Progress()
		idle := time.Since(at)
		if idle <= min(olderThan, parkAfter) || !u.tryAcquire() {
			continue
		}
		if idle > olderThan {
			u.end()
			n++
		} else {
			errs = append(errs, u.park())
		}
		u.release()
	}
	more, err := s.expirePartials(ctx, olderThan)
	return n + more, errors.Join(append(errs, err)...)
}

// failed turns a failure of the file system into the user's terms.
func (s *Store) failed(err error, d digest.Digest, doing string) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fault.New(fault.NotFound, "blob %s is not held here", d).WithCode("BLOB_UNKNOWN")
	case full(err):
		return noSpace(err)
	}
	return fmt.Errorf("%s blob %s: %w", doing, d, err)
}

func full(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

func noSpace(err error) error {
	return fault.Wrap(err, fault.Limit, "the disk of this node is full: nothing can be pushed until space is freed; pulls go on").WithCode(CodeNoSpace)
}

// room refuses a write of need bytes that would take the disk below the
// low-water mark.
func (s *Store) room(need int64) error {
	least := s.o.MinFree
	if s.o.LowWater != nil {
		least = s.o.LowWater()
	}
	if least <= 0 {
		return nil
	}
	free, _, err := s.fs.Space()
	if err != nil {
		return fmt.Errorf("asking for the free space: %w", err)
	}
	if free-need >= least {
		return nil
	}
	return fault.New(fault.Limit, "the disk of this node has %d MiB free and %d MiB of them are kept in reserve: "+
		"nothing this large can be pushed until space is freed; pulls go on", free>>20, least>>20).WithCode(CodeNoSpace)
}

func (s *Store) read(name string) ([]byte, error) {
	f, err := s.fs.OpenFile(name, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, 16<<20))
	return b, errors.Join(err, f.Close())
}

// replace replaces a small file atomically and durably, names that are new in
// its directory included.
func (s *Store) replace(name string, b []byte) error {
	f, err := s.fs.OpenFile(name+tempSuffix, os.O_WRONLY|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return err
	}
	n, err := f.WriteAt(b, 0)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, s.fs.Remove(name+tempSuffix))
	}
	if err := s.fs.Rename(name+tempSuffix, name); err != nil {
		return err
	}
	return s.fs.SyncDir(path.Dir(name))
}

// sweep removes a file that nothing needs any more; the next Open tries again.
func (s *Store) sweep(name string) {
	if err := s.fs.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("a file that is not needed could not be removed", "file", name, "err", err)
	}
}
