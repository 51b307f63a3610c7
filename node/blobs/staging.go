package blobs

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/fault"
)

// Staging is where the blobs of an import wait, verified and invisible, until
// Commit moves all of them among the blobs. It survives a restart, and what a
// power cut takes from it is whole blobs. It is safe for concurrent use, but for
// Commit and Discard.
type Staging struct {
	s   *Store
	dir string
}

// Staging opens the staging area of an import, with what an earlier process put
// there. The id is 1 to 80 letters, digits, '-', '_' and '.'; else fault.Invalid.
func (s *Store) Staging(id string) (*Staging, error) {
	if !isStagingID(id) {
		return nil, fault.New(fault.Invalid, "%.100q cannot name an import", id)
	}
	g := &Staging{s: s, dir: stagingDir + "/" + id}
	if err := s.fs.Mkdir(g.dir); err != nil {
		return nil, g.failed(err, "making")
	}
	return g, nil
}

// Staged lists the ids of the staging areas.
func (s *Store) Staged() ([]string, error) {
	names, err := s.fs.ReadDir(stagingDir)
	if err != nil {
		return nil, fmt.Errorf("listing imports: %w", err)
	}
	return names, nil
}

func (g *Staging) failed(err error, doing string) error {
	if full(err) {
		return noSpace(err)
	}
	return fmt.Errorf("%s %s: %w", doing, g.dir, err)
}

// Put stages a blob from r, which must give exactly size bytes of the digest:
// else it is fault.Invalid with code SIZE_INVALID or DIGEST_INVALID. A blob that
// is staged is replaced by what is the same.
func (g *Staging) Put(ctx context.Context, d digest.Digest, size int64, r io.Reader) error {
	k, err := keyOf(d)
	if err != nil {
		return err
	}
	if err := g.s.room(size); err != nil {
		return err
	}
	temp := g.dir + "/" + rand.Text() + tempSuffix
	f, err := g.s.fs.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return g.failed(err, "making a file in")
	}
	err = g.fill(ctx, f, k, size, r)
	if err == nil {
		if err = f.Sync(); err != nil {
			err = g.failed(err, "syncing a file in")
		}
	}
	if closing := f.Close(); err == nil && closing != nil {
		err = g.failed(closing, "closing a file in")
	}
	if err == nil {
		if err = g.s.fs.Rename(temp, g.dir+"/"+k.plain()); err != nil {
			err = g.failed(err, "naming a file in")
		}
	}
	if err != nil {
		g.s.sweep(temp)
	}
	return err
}

func (g *Staging) fill(ctx context.Context, f Handle, k key, size int64, r io.Reader) error {
	buf := g.s.buffers.Get().(*[bufferSize]byte)
	defer g.s.buffers.Put(buf)
	sum := k.algorithm().Hash()
	var at int64
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(r, buf[:])
		if at+int64(n) > size {
			return fault.New(fault.Invalid, "blob %s is longer than the %d bytes announced", k, size).WithCode("SIZE_INVALID")
		}
		sum.Write(buf[:n])
		wrote, werr := f.WriteAt(buf[:n], at)
		if werr == nil && wrote < n {
			werr = io.ErrShortWrite
		}
		if werr != nil {
			return g.failed(werr, "writing a file in")
		}
		at += int64(n)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			break
		}
		if err != nil {
			return fmt.Errorf("reading blob %s: %w", k, err)
		}
	}
	if at != size {
		return fault.New(fault.Invalid, "blob %s has %d bytes, not the %d announced", k, at, size).WithCode("SIZE_INVALID")
	}
	return k.verify(sum, size)
}

// Has reports whether a blob is staged here; whether the store holds it already
// is Store.Stat's answer.
func (g *Staging) Has(d digest.Digest) (bool, error) {
	k, err := keyOf(d)
	if err != nil {
		return false, err
	}
	_, err = g.s.fs.Stat(g.dir + "/" + k.plain())
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// List gives the digests of all that is staged, in their order.
func (g *Staging) List() ([]digest.Digest, error) {
	names, err := g.s.fs.ReadDir(g.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // committed or discarded
	}
	if err != nil {
		return nil, g.failed(err, "reading")
	}
	var staged []digest.Digest
	for _, name := range names {
		if k, ok := keyOfPlain(name); ok {
			staged = append(staged, k.digest())
		}
	}
	return staged, nil
}

// Open opens a staged blob.
func (g *Staging) Open(d digest.Digest) (File, int64, error) {
	k, err := keyOf(d)
	if err != nil {
		return nil, 0, err
	}
	return g.s.open(g.dir+"/"+k.plain(), d)
}

// Commit moves all that is staged among the blobs and ends the area. When it
// returns nil they are durable; after a failure or a crash some may be visible
// already, and Commit is to be called again.
func (g *Staging) Commit(ctx context.Context) error {
	names, err := g.s.fs.ReadDir(g.dir)
	if err != nil {
		return g.failed(err, "reading")
	}
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		if k, ok := keyOfPlain(name); ok {
			if err := g.move(k); err != nil {
				return g.failed(err, "moving blobs from")
			}
		}
	}
	// All shards, not only those used now: an earlier Commit of this area may
	// have been stopped after it had moved others.
	for i := range g.s.shards {
		if err := g.s.settle(i); err != nil {
			return g.failed(err, "syncing blobs from")
		}
	}
	return g.Discard()
}

func (g *Staging) move(k key) error {
	staged := g.dir + "/" + k.plain()
	fi, err := g.s.fs.Stat(staged)
	if err != nil {
		return err
	}
	g.s.moving.RLock()
	defer g.s.moving.RUnlock()
	if home := g.s.shelves.Load().home; home != nil {
		return g.s.ship(home, staged, k, fi.Size())
	}
	unlock, _ := g.s.locks.write(k)
	defer unlock()
	_, err = g.s.enter(staged, k, fi.Size())
	return err
}

// Discard ends the area and frees its space.
func (g *Staging) Discard() error {
	names, err := g.s.fs.ReadDir(g.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return g.failed(err, "reading")
	}
	for _, name := range names {
		if err := g.s.fs.Remove(g.dir + "/" + name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return g.failed(err, "emptying")
		}
	}
	if err := g.s.fs.Remove(g.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return g.failed(err, "removing")
	}
	return nil
}

// recoverStaging sweeps the files of unfinished writes.
func (s *Store) recoverStaging() error {
	areas, err := s.fs.ReadDir(stagingDir)
	if err != nil {
		return err
	}
	for _, area := range areas {
		names, err := s.fs.ReadDir(stagingDir + "/" + area)
		if err != nil {
			return err
		}
		for _, name := range names {
			if strings.HasSuffix(name, tempSuffix) {
				s.sweep(stagingDir + "/" + area + "/" + name)
			}
		}
	}
	return nil
}

// linker is an FS that can give a file of the system a second name.
type linker interface {
	Link(file, name string) error
}

func (d disk) Link(file, name string) error { return os.Link(file, d.path(name)) }

// adopted is the staging area of Take. It is never committed.
const adopted = stagingDir + "/adopted"

// Take makes a blob of a file outside the store, which stays as it is. With link
// the two share their space if the disk can do that, and the file must never be
// written to again; linked says whether they do. The failures are those of Put;
// what was stored was verified here.
func (s *Store) Take(ctx context.Context, d digest.Digest, file string, link bool) (info Info, linked bool, err error) {
	k, err := keyOf(d)
	if err != nil {
		return Info{}, false, err
	}
	if to, can := s.fs.(linker); can && link && !s.Shared() {
		temp := adopted + "/" + rand.Text() + tempSuffix
		if err := s.fs.Mkdir(adopted); err != nil {
			return Info{}, false, s.failed(err, d, "linking")
		}
		if err := to.Link(file, temp); err == nil {
			info, err = s.takeLink(ctx, k, temp)
			return info, err == nil, err
		}
		// Another file system, or another user's file: a copy will do.
	}
	f, err := os.Open(file)
	if err != nil {
		return Info{}, false, err
	}
	defer f.Close()
	info, err = s.Put(ctx, d, f)
	return info, false, err
}

func (s *Store) takeLink(ctx context.Context, k key, temp string) (Info, error) {
	size, err := s.prove(ctx, k, temp)
	if err == nil {
		if err = s.place(temp, k, size, nil); err != nil {
			err = s.failed(err, k.digest(), "storing")
		}
	}
	if err != nil {
		s.sweep(temp)
		return Info{}, err
	}
	return Info{Digest: k.digest(), Size: size}, nil
}

// prove hashes a file, makes it durable and gives its size.
func (s *Store) prove(ctx context.Context, k key, name string) (int64, error) {
	f, err := s.fs.OpenFile(name, os.O_RDONLY)
	if err != nil {
		return 0, s.failed(err, k.digest(), "opening")
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return 0, s.failed(err, k.digest(), "opening")
	}
	sum := k.algorithm().Hash()
	if err := s.hash(ctx, sum, f, 0, fi.Size()); err != nil {
		return 0, s.failed(err, k.digest(), "reading")
	}
	if err := k.verify(sum, fi.Size()); err != nil {
		return 0, err
	}
	if err := f.Sync(); err != nil {
		return 0, s.failed(err, k.digest(), "syncing")
	}
	return fi.Size(), nil
}
