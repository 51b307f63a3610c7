package blobs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/blobs/cold"
)

// ErrDamaged is in the error of a blob whose file holds other bytes than its
// digest says, or cannot be read.
var ErrDamaged = errors.New("the blob is damaged on this node's disk")

// Pace is called before n bytes are read; it waits as long as they have to. Its
// error ends the reading.
type Pace func(ctx context.Context, n int) error

// Verify reads a held blob from its first byte to its last and compares it with
// its digest. A blob that does not pass is quarantined before the answer, which
// then is ErrDamaged: from then on it is not held. One that is not held is
// fault.NotFound with code BLOB_UNKNOWN; any other error says nothing of the
// blob. What it reads stays out of the page cache.
//
// A blob in a Backend is only looked for: an object store checks what it keeps,
// and lets nobody read all of it for nothing.
func (s *Store) Verify(ctx context.Context, d digest.Digest, pace Pace) (Info, error) {
	k, err := keyOf(d)
	if err != nil {
		return Info{}, err
	}
	f, err := s.fs.OpenFile(k.blob(), os.O_RDONLY)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) && s.Shared() {
			return s.Stat(d)
		}
		if !unreadable(err) {
			return Info{}, s.failed(err, d, "opening")
		}
		return Info{}, errors.Join(damaged(d, err), s.setAside(k, nil))
	}
	defer f.Close()
	seen, err := f.Stat()
	if err != nil {
		return Info{}, s.failed(err, d, "looking at")
	}
	err = s.compare(ctx, d, f, pace)
	switch {
	case errors.Is(err, ErrDamaged):
		return Info{}, errors.Join(err, s.setAside(k, seen))
	case err != nil:
		return Info{}, err
	}
	s.refit(k)
	return Info{Digest: d, Size: seen.Size()}, nil
}

// compare reads a file to its end and compares it with its digest.
func (s *Store) compare(ctx context.Context, d digest.Digest, f Handle, pace Pace) error {
	buf := s.buffers.Get().(*[bufferSize]byte)
	defer s.buffers.Put(buf)
	info, err := f.Stat()
	if err != nil {
		return s.failed(err, d, "looking at")
	}
	sum := d.Algorithm().Hash()
	from := cold.Reader(f)
	for at := int64(0); ; {
		next := max(0, min(bufferSize, info.Size()-at))
		if err := errors.Join(ctx.Err(), pace(ctx, int(next))); err != nil {
			return err
		}
		n, err := from.ReadAt(buf[:], at)
		sum.Write(buf[:n])
		at += int64(n)
		switch {
		case err == io.EOF:
			if got := digest.NewDigest(d.Algorithm(), sum); got != d {
				return damaged(d, fmt.Errorf("its %d bytes have digest %s", at, got))
			}
			return nil
		case unreadable(err):
			return damaged(d, err)
		case err != nil:
			return s.failed(err, d, "reading")
		}
	}
}

func damaged(d digest.Digest, why error) error {
	return fmt.Errorf("blob %s: %w: %w", d, ErrDamaged, why)
}

// unreadable tells what a broken disk answers from what is only in the way now.
func unreadable(err error) bool {
	return errors.Is(err, syscall.EIO) || errors.Is(err, syscall.EBADMSG)
}

// Unreadable reports whether reading a blob's file met a broken disk, so that
// the blob is to be quarantined and had from elsewhere.
func Unreadable(err error) bool { return unreadable(err) }

// Quarantine moves a blob aside that could not be read; f is what OpenBlob gave.
// It does nothing when another file has taken the blob's place meanwhile.
func (s *Store) Quarantine(d digest.Digest, f File) error {
	k, err := keyOf(d)
	if err != nil {
		return err
	}
	seen, ok := f.(interface{ Stat() (fs.FileInfo, error) })
	if !ok {
		return fmt.Errorf("quarantining blob %s: the reader given is not its file", d)
	}
	info, err := seen.Stat()
	if err != nil {
		return fmt.Errorf("quarantining blob %s: %w", d, err)
	}
	return s.setAside(k, info)
}

// setAside moves a blob's file into quarantine unless it is another one than was
// seen (nil: whichever it is). Where the disk refuses that too, the file stays
// and is no longer shown.
func (s *Store) setAside(k key, seen fs.FileInfo) error {
	unlock, _ := s.locks.write(k)
	defer unlock()
	sh := &s.shards[k.shard()]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	held, err := s.fs.Stat(k.blob())
	if errors.Is(err, fs.ErrNotExist) || err == nil && seen != nil && !sameFile(held, seen) {
		return nil // removed, or stored anew
	}
	s.mu.Lock()
	s.unfit[k] = true
	s.mu.Unlock()
	if err == nil {
		err = s.fs.Mkdir(quarantineDir)
	}
	if err == nil {
		err = s.fs.Rename(k.blob(), k.quarantined())
	}
	if err != nil {
		return fmt.Errorf("quarantining blob %s: %w", k, err)
	}
	s.refit(k)
	if sh.counted {
		sh.blobs, sh.bytes = sh.blobs-1, sh.bytes-held.Size()
	}
	// Synced, or a power cut would show the blob again.
	return errors.Join(s.fs.SyncDir(quarantineDir), s.fs.SyncDir(shardName(k.shard())))
}

func sameFile(a, b fs.FileInfo) bool {
	if a.Sys() != nil {
		return os.SameFile(a, b)
	}
	return a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// isUnfit reports whether a blob's file is in its place and not to be shown.
func (s *Store) isUnfit(k key) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.unfit[k]
}

func (s *Store) refit(k key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.unfit, k)
}

// Quarantined lists the blobs in quarantine, in the order of their digests.
func (s *Store) Quarantined() ([]digest.Digest, error) {
	names, err := s.fs.ReadDir(quarantineDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // there was none, ever
	}
	if err != nil {
		return nil, fmt.Errorf("listing the quarantine: %w", err)
	}
	var all []digest.Digest
	for _, name := range names {
		if k, ok := keyOfPlain(name); ok {
			all = append(all, k.digest())
		}
	}
	return all, nil
}

// Reclaim reads a quarantined blob once more, since a cable or a controller may
// have been to blame, and takes it back when it is whole. It answers as Verify
// does; NotFound says that the blob is not in quarantine.
func (s *Store) Reclaim(ctx context.Context, d digest.Digest, pace Pace) (Info, error) {
	k, err := keyOf(d)
	if err != nil {
		return Info{}, err
	}
	f, err := s.fs.OpenFile(k.quarantined(), os.O_RDONLY)
	if err != nil {
		if unreadable(err) {
			return Info{}, damaged(d, err)
		}
		return Info{}, s.failed(err, d, "opening")
	}
	defer f.Close()
	if err := s.compare(ctx, d, f, pace); err != nil {
		return Info{}, err
	}
	info, err := f.Stat()
	if err == nil {
		err = s.place(k.quarantined(), k, info.Size(), nil)
	}
	if err != nil {
		return Info{}, s.failed(err, d, "taking back")
	}
	return Info{Digest: d, Size: info.Size()}, nil
}

// Discard frees the space of a quarantined blob; one that is not there is no
// error.
func (s *Store) Discard(d digest.Digest) error {
	k, err := keyOf(d)
	if err != nil {
		return err
	}
	if err := s.fs.Remove(k.quarantined()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return s.failed(err, d, "discarding")
	}
	return nil
}
