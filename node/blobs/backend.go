package blobs

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"net/http"
	"os"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/fault"
)

// Backend keeps committed blobs elsewhere than in the store's own directory: in
// an object store that all nodes of the site share. Uploads, fetches and imports
// under way stay on the node's disk, where they can be resumed, and a blob goes
// to the backend only after its bytes were verified and synced there.
//
// No method takes a context: who asks for a blob does so for others too, so an
// implementation ends a request that does not move by itself. Failures other
// than the absence of a blob say nothing about it. Implementations are safe for
// concurrent use, by other processes too.
type Backend interface {
	// Stat gives the size of a blob that is held durably; an error that is
	// fs.ErrNotExist when it is not.
	Stat(d digest.Digest) (size int64, err error)
	// Open opens a blob for reading from any offset; fs.ErrNotExist as in Stat.
	Open(d digest.Digest) (File, int64, error)
	// Put keeps a blob of verified bytes. When it returns nil the blob is durable;
	// until then it is not visible, nor is a part of it. The same blob may be there
	// already, or be put by another node meanwhile.
	Put(d digest.Digest, size int64, r io.Reader) error
	// Remove removes a blob; fs.ErrNotExist as in Stat.
	Remove(d digest.Digest) error
	// List gives up to n blobs in the order of their digests, after the one given
	// ("" begins).
	List(after digest.Digest, n int) ([]digest.Digest, error)
}

// Redirector is a Backend whose blobs clients can fetch without this node.
type Redirector interface {
	// Redirect gives an address at which the client of r gets the blob for some
	// minutes, or "" when there is none. It does not look whether the blob is held.
	Redirect(r *http.Request, d digest.Digest) (string, error)
}

// shelf is a place that holds blobs: a Backend as those see it who do not add.
type shelf interface {
	Stat(d digest.Digest) (size int64, err error)
	Open(d digest.Digest) (File, int64, error)
	Remove(d digest.Digest) error
	List(after digest.Digest, n int) ([]digest.Digest, error)
}

// shelves says where blobs are.
type shelves struct {
	home   Backend // where new blobs go; nil: the store's own directory
	former Backend // also read and emptied; nil: none
}

// Shared reports whether new blobs go to a backend, which all nodes of the site
// use.
func (s *Store) Shared() bool { return s.shelves.Load().home != nil }

// Shelved reports whether the backend holds a blob, so that it is as safe as the
// site asks without a copy on another node. What is only in the directory of this
// node is not.
func (s *Store) Shelved(d digest.Digest) bool {
	home := s.shelves.Load().home
	if _, err := keyOf(d); err != nil || home == nil {
		return false
	}
	_, err := home.Stat(d)
	return err == nil
}

// Rehome makes a backend the home of blobs, nil the store's own directory. The
// home until then is still read, and so is the directory, always: Carry moves
// what is there, Leave ends it.
//
// It waits for commits under way, so that nothing arrives in the old home later.
func (s *Store) Rehome(home Backend) {
	s.moving.Lock()
	defer s.moving.Unlock()
	s.shelves.Store(&shelves{home: home, former: s.shelves.Load().home})
}

// Leave stops reading the backend that was the home before Rehome.
func (s *Store) Leave() { s.shelves.Store(&shelves{home: s.shelves.Load().home}) }

// all lists the shelves in the order in which they are asked: the directory
// first, which costs next to nothing.
func (s *Store) all() []shelf {
	now := s.shelves.Load()
	list := []shelf{own{s}}
	for _, b := range []Backend{now.home, now.former} {
		if b != nil {
			list = append(list, b)
		}
	}
	return list
}

// find asks the shelves in turn until one answers other than that it has no such
// blob. A shelf that cannot answer does not hide one that can.
func (s *Store) find(ask func(shelf) error) error {
	var failure error
	for _, from := range s.all() {
		err := ask(from)
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, fs.ErrNotExist) && failure == nil:
			failure = err
			if _, here := from.(own); !here {
				failure = unavailable(err)
			}
		}
	}
	if failure == nil {
		failure = fs.ErrNotExist
	}
	return failure
}

func unavailable(err error) error {
	return fault.Wrap(err, fault.Unavailable, "the storage of this site does not answer as it should; try again in a while")
}

// own is the store's own directory as a shelf. Its errors are the file system's.
type own struct{ s *Store }

func (o own) Stat(d digest.Digest) (int64, error) {
	k, err := keyOf(d)
	if err != nil {
		return 0, err
	}
	fi, err := o.s.fs.Stat(k.blob())
	if err == nil && o.s.isUnfit(k) {
		err = fs.ErrNotExist
	}
	if err != nil {
		return 0, err
	}
	return fi.Size(), o.s.settle(k.shard())
}

func (o own) Open(d digest.Digest) (File, int64, error) {
	k, err := keyOf(d)
	if err != nil {
		return nil, 0, err
	}
	if o.s.isUnfit(k) {
		return nil, 0, fs.ErrNotExist
	}
	f, err := o.s.fs.OpenFile(k.blob(), os.O_RDONLY)
	if err != nil {
		return nil, 0, err
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, fi.Size(), nil
}

func (o own) Remove(d digest.Digest) error {
	k, err := keyOf(d)
	if err != nil {
		return err
	}
	return o.s.unlink(k)
}

func (o own) List(after digest.Digest, n int) ([]digest.Digest, error) { return o.s.listOwn(after, n) }

// ship puts a verified and synced file into the home and drops the file. Two
// pushes of one blob share the transfer. A shared lock is enough: it keeps
// removals out, and readers need not wait for what they may not see yet.
func (s *Store) ship(home Backend, from string, k key, size int64) error {
	unlock := s.locks.read(k)
	defer unlock()
	_, err, _ := s.shipping.Do(string(k), func() (any, error) {
		if held, err := home.Stat(k.digest()); err == nil && held == size {
			return nil, nil
		}
		f, err := s.fs.OpenFile(from, os.O_RDONLY)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if err := home.Put(k.digest(), size, io.NewSectionReader(f, 0, size)); err != nil {
			return nil, unavailable(err)
		}
		return nil, nil
	})
	if err == nil {
		s.sweep(from)
	}
	return err
}

// removeAll removes a blob from every shelf; fs.ErrNotExist when none had it.
func (s *Store) removeAll(d digest.Digest) error {
	found := false
	for _, from := range s.all() {
		err := from.Remove(d)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		found = found || err == nil
	}
	if !found {
		return fs.ErrNotExist
	}
	return nil
}

// merge lists blobs of several shelves as one.
func merge(from []shelf, after digest.Digest, n int) ([]digest.Digest, error) {
	var found []digest.Digest
	for _, one := range from {
		list, err := one.List(after, n)
		if err != nil {
			return nil, err
		}
		found = append(found, list...)
	}
	if len(from) > 1 {
		slices.Sort(found)
		found = slices.Compact(found)
	}
	return found[:min(n, len(found))], nil
}

// Redirect gives an address at which the client of r can fetch a blob without
// this node, or "" when there is none; fault.NotFound as in Stat.
func (s *Store) Redirect(r *http.Request, d digest.Digest) (url string, err error) {
	k, err := keyOf(d)
	if err != nil {
		return "", err
	}
	unlock := s.locks.read(k)
	defer unlock()
	err = s.find(func(from shelf) error {
		_, err := from.Stat(d)
		if to, ok := from.(Redirector); ok && err == nil {
			url, err = to.Redirect(r, d)
		}
		return err
	})
	if err != nil {
		return "", s.failed(err, d, "looking at")
	}
	return url, nil
}

// Elsewhere lists, as List does, blobs that are held in another place than the
// home, whether or not the home holds them too.
func (s *Store) Elsewhere(after digest.Digest, n int) ([]digest.Digest, error) {
	_, from := s.sides()
	list, err := merge(from, after, n)
	if err != nil {
		return nil, fmt.Errorf("listing blobs: %w", err)
	}
	return list, nil
}

// Carry makes the home hold a blob that another place holds, verified against
// its digest on the way, and gives how many bytes that took: none when the home
// has it. ErrDamaged when no place has the right bytes, fault.NotFound when none
// has any: neither changes anything.
func (s *Store) Carry(ctx context.Context, d digest.Digest) (moved int64, err error) {
	k, err := keyOf(d)
	if err != nil {
		return 0, err
	}
	home, from := s.sides()
	switch _, err := home.Stat(d); {
	case err == nil:
		return 0, nil
	case !errors.Is(err, fs.ErrNotExist):
		return 0, unavailable(err)
	}
	if _, here := home.(own); !here { // else Put takes the lock
		defer s.locks.read(k)()
	}
	failure := fs.ErrNotExist
	for _, one := range from {
		moved, err := s.carry(ctx, home, one, d)
		if err == nil {
			return moved, nil
		}
		if errors.Is(failure, fs.ErrNotExist) {
			failure = err
		}
	}
	return 0, s.failed(failure, d, "moving")
}

// sides gives the home and all other shelves.
func (s *Store) sides() (home shelf, others []shelf) {
	now := s.shelves.Load()
	home = own{s}
	if now.home != nil {
		home, others = now.home, []shelf{own{s}}
	}
	if now.former != nil {
		others = append(others, now.former)
	}
	return home, others
}

func (s *Store) carry(ctx context.Context, home, from shelf, d digest.Digest) (int64, error) {
	f, size, err := from.Open(d)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	r := &proven{r: f, d: d, sum: d.Algorithm().Hash(), stop: ctx.Err}
	to, remote := home.(Backend)
	if !remote {
		_, err = s.Put(ctx, d, r)
	} else if err = to.Put(d, size, r); err != nil && !errors.Is(err, ErrDamaged) && ctx.Err() == nil {
		err = unavailable(err)
	}
	return size, err
}

// Unload removes a blob from every place but the home, once the home holds it in
// full; else nothing happens.
func (s *Store) Unload(d digest.Digest) error {
	k, err := keyOf(d)
	if err != nil {
		return err
	}
	unlock, _ := s.locks.write(k)
	defer unlock()
	home, from := s.sides()
	held, err := home.Stat(d)
	if err != nil {
		return s.failed(err, d, "looking at")
	}
	for _, one := range from {
		size, err := one.Stat(d)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return unavailable(err)
		case size != held:
			return fmt.Errorf("blob %s: %w: it has %d bytes in its new place and %d in the old one", d, ErrDamaged, held, size)
		}
		if err := one.Remove(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return s.failed(err, d, "removing")
		}
	}
	return nil
}

// proven gives the end of what it reads only when the digest is right, so that
// whoever waits for the end to commit never commits anything else.
type proven struct {
	r    io.Reader
	d    digest.Digest
	sum  hash.Hash
	stop func() error // says whether to go on
}

func (p *proven) Read(b []byte) (int, error) {
	if err := p.stop(); err != nil {
		return 0, err
	}
	n, err := p.r.Read(b)
	p.sum.Write(b[:n])
	if err == io.EOF {
		if got := digest.NewDigest(p.d.Algorithm(), p.sum); got != p.d {
			return 0, fmt.Errorf("blob %s: %w: its bytes have digest %s", p.d, ErrDamaged, got)
		}
	}
	return n, err
}
