// Package reserve keeps a node's metadata safe and writable on a disk that is
// full: it holds space that is given up at the moment when the metadata needs
// it, and it stands before the metadata's stores to see that moment.
//
// Invariants:
//   - A write that a full disk refused is repeated only when nothing of the
//     first try can be seen in the store; so nothing is ever half applied or
//     applied twice. Any other failure of the disk ends the node (Broken): after
//     a sync that failed, what is on the disk is not known, and only a new start
//     that reads it again can tell. The node's supervisor makes that start.
//   - What the consensus must not forget (its term) and what it has committed
//     (the state) wait for room, for as long as it takes, and then go on where
//     they were. New entries of the log do not wait: the leader is told and hands
//     over to a node that has room.
//   - A vote is never given without being on the disk.
package reserve

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Most is the largest ballast, in bytes; smaller disks give one part in
// partOfDisk.
const (
	Most       = 64 << 20
	partOfDisk = 100
	// room is how many times its size must be free before the ballast takes its
	// place again, so that it does not come and go.
	room = 4
	// lookAgain is how often those who wait for room try again.
	lookAgain = time.Second
)

// Disk is the file system that the ballast lies on.
type Disk interface {
	// Space gives the bytes that may still be written and the size of the disk.
	Space() (free, total int64, err error)
}

// Reserve is the ballast of one node. It is safe for concurrent use.
type Reserve struct {
	path    string
	disk    Disk
	log     *slog.Logger
	stopped chan struct{}
	once    sync.Once
	broken  chan error
	lied    atomic.Bool // see stable

	mu      sync.Mutex
	held    int64
	waiting map[string]time.Time
}

// Open takes the ballast that lies at path, or none. When hardly anything else
// is free it is given up at once: a start writes a little, and must not fail.
func Open(path string, disk Disk, log *slog.Logger) (*Reserve, error) {
	r := &Reserve{
		path: path, disk: disk, log: log, stopped: make(chan struct{}), broken: make(chan error, 1), waiting: map[string]time.Time{},
	}
	info, err := os.Stat(path)
	if err == nil {
		r.held = info.Size()
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("looking for the ballast: %w", err)
	}
	if free, total, err := disk.Space(); err == nil && free < size(total) {
		r.Release()
	}
	return r, nil
}

// size of the ballast on a disk of so many bytes.
func size(total int64) int64 { return min(Most, total/partOfDisk) }

// Held is how many bytes the ballast can give at the moment.
func (r *Reserve) Held() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.held
}

// Release gives the ballast up. It reports whether there was one.
func (r *Reserve) Release() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.held == 0 {
		return false
	}
	// Cut, not removed: that needs no new entry in a directory.
	if err := os.Truncate(r.path, 0); err != nil {
		r.log.Error("giving up the ballast", "path", r.path, "error", err)
		return false
	}
	r.log.Warn("the disk is full: gave up the ballast, so that the metadata can still be written; free some space", "bytes", r.held)
	r.held = 0
	return true
}

// Fill makes the ballast anew if there is plenty of room for it; ok says that
// it is whole.
func (r *Reserve) Fill() (ok bool, err error) {
	free, total, err := r.disk.Space()
	if err != nil {
		return false, fmt.Errorf("looking for room for the ballast: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	want := size(total)
	if r.held >= want {
		return true, nil
	}
	if free < room*want || len(r.waiting) > 0 {
		return false, nil
	}
	if err := r.fill(want); err != nil {
		return false, errors.Join(fmt.Errorf("making the ballast: %w", err), os.Truncate(r.path, 0))
	}
	r.held = want
	return true, nil
}

func (r *Reserve) fill(want int64) error {
	f, err := os.OpenFile(r.path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = allocate(f, want)
	return errors.Join(err, f.Sync(), f.Close())
}

// write fills a file with bytes that no file system can compress away, for those
// that cannot reserve space otherwise.
func write(f *os.File, want int64) error {
	block := make([]byte, 1<<20)
	seed := uint64(time.Now().UnixNano()) | 1
	for at := int64(0); at < want; at += int64(len(block)) {
		for i := range block {
			seed ^= seed << 13
			seed ^= seed >> 7
			seed ^= seed << 17
			block[i] = byte(seed)
		}
		if _, err := f.WriteAt(block[:min(int64(len(block)), want-at)], at); err != nil {
			return err
		}
	}
	return nil
}

// Waiting names what waits for room, and since when the first of it does.
func (r *Reserve) Waiting() (what []string, since time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, at := range r.waiting {
		what = append(what, name)
		if since.IsZero() || at.Before(since) {
			since = at
		}
	}
	slices.Sort(what)
	return what, since
}

// Broken gives the failure after which the node has to stop.
func (r *Reserve) Broken() <-chan error { return r.broken }

// Stop lets those go that wait for room: the node is stopping.
func (r *Reserve) Stop() { r.once.Do(func() { close(r.stopped) }) }

func (r *Reserve) breaks(what string, err error) {
	select {
	case <-r.stopped: // files are being closed
		return
	default:
	}
	select {
	case r.broken <- fmt.Errorf("the disk refused %s, so what is on it is not known any more: look at the disk (dmesg, smartctl), then start the node again; it goes on from what it reads: %w", what, err):
	default: // one is enough
	}
}

// Full reports whether an error says that the disk had no room, in a way that is
// known to have left the file as it was: the refusal of a write. That of a sync
// comes too late to know.
func Full(err error) bool {
	var at *fs.PathError
	return (errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)) && errors.As(err, &at) && at.Op == "write"
}

// attempt is one change of a store.
type attempt struct {
	what string
	do   func() error
	// unchanged reports whether the store is as it was before do.
	unchanged func() (bool, error)
	wait      bool // for room, if the ballast does not suffice
}

// run makes the attempt until it succeeds, or fails for another reason.
func (r *Reserve) run(a attempt) error {
	for {
		err := a.do()
		if !Full(err) {
			return err
		}
		same, lookErr := a.unchanged()
		switch {
		case lookErr != nil:
			return errors.Join(err, lookErr)
		case !same:
			// Cannot be told from a success that was not synced.
			return fmt.Errorf("a write that the full disk refused can be seen all the same (%v)", err)
		case r.Release():
			continue
		case !a.wait:
			return err
		}
		if !r.await(a.what) {
			return err
		}
	}
}

// await waits a moment for room; false when the node stops.
func (r *Reserve) await(what string) bool {
	r.mu.Lock()
	if _, ok := r.waiting[what]; !ok {
		r.waiting[what] = time.Now()
		r.log.Error("the disk is full: waiting for room; reads go on", "what", what)
	}
	r.mu.Unlock()
	look := time.NewTimer(lookAgain)
	defer look.Stop()
	select {
	case <-look.C:
		return true
	case <-r.stopped:
		return false
	}
}

// served says that what waited has been written, or given up.
func (r *Reserve) served(what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if since, ok := r.waiting[what]; ok {
		delete(r.waiting, what)
		r.log.Info("no longer waiting for room on the disk", "what", what, "waited", time.Since(since), "others", slices.Sorted(maps.Keys(r.waiting)))
	}
}

// Path of the ballast in a data directory.
func Path(dir string) string { return filepath.Join(dir, "ballast") }
