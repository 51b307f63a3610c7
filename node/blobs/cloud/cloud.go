// Package cloud keeps committed blobs in an object store, through the storage
// drivers of the distribution project: S3, Google Cloud Storage and Azure.
//
// The drivers bring large libraries, so each is compiled in by a build tag: s3,
// gcs or azure, or cloud for all of them. Without them the package still says by
// name what is missing.
package cloud

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"path"
	"slices"
	"strings"
	"time"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
)

const (
	// requestTime bounds a request that moves no content.
	requestTime = 30 * time.Second
	// stallTime ends a transfer that has not moved for so long. It is longer than
	// the drivers take to give up and try a part again.
	stallTime = 2 * time.Minute
	// whole is up to which size a blob is sent in one request, in bytes.
	whole = 4 << 20
	// root holds everything, beside whatever else is in the bucket.
	root = "/blobs"
	// incoming holds what is not whole yet.
	incoming = root + "/incoming"
	// leftTime is after how long what is in incoming belongs to no transfer.
	leftTime = 24 * time.Hour
)

// Backend keeps blobs with a storage driver, as ROOT/blobs/<algorithm>/<ab>/<hex>.
// It implements blobs.Backend and blobs.Redirector.
type Backend struct {
	driver  storagedriver.StorageDriver
	writing Writing
	// flat says that the driver lists a directory by reading all that is below it.
	flat bool
	// lifetime gives requests their values and an end that is not a client's: what
	// one client waits for others need too.
	lifetime func() context.Context
	stall    time.Duration
	redact   func(text string) string // takes secrets out
}

// Writing says what a driver's Writer does to the object of its name.
type Writing int

const (
	// Staged: what is written grows in sight of everybody. It is written under
	// another name and moved.
	Staged Writing = iota
	// Direct: nothing is seen before Commit, and Cancel takes back no more than was
	// written.
	Direct
	// Unended: nothing is seen before Commit, but Cancel removes, and Close without
	// Commit replaces, the whole object that another node may have put there. A
	// write that breaks off is left to the store, where it expires.
	Unended
)

// New makes a backend of a driver.
func New(ctx context.Context, driver storagedriver.StorageDriver, writing Writing) *Backend {
	ctx = context.WithoutCancel(ctx)
	return &Backend{driver: driver, writing: writing, lifetime: func() context.Context { return ctx }, stall: stallTime, redact: strings.Clone}
}

// Check writes, reads and removes a small object, so that wrong credentials or a
// missing bucket show at the start and not at the first push: fault.Unavailable.
// It also removes what moves left behind that broke off a day ago or earlier.
func (b *Backend) Check() error {
	ctx, cancel := context.WithTimeout(b.lifetime(), requestTime)
	defer cancel()
	name := root + "/check-" + unique()
	err := b.driver.PutContent(ctx, name, []byte("atoll\n"))
	if err == nil {
		_, err = b.driver.GetContent(ctx, name)
	}
	if err == nil {
		err = b.sweep(ctx, name)
	}
	if err == nil {
		err = b.driver.Delete(ctx, name)
	}
	if err != nil {
		return fault.New(fault.Unavailable, "the storage cannot be used; check its address, bucket and credentials: %s", b.redact(err.Error()))
	}
	return nil
}

func unique() string { return digest.FromString(rand.Text()).Encoded()[:16] }

// sweep removes what is under incoming for longer than any transfer takes, by
// the store's own clock, which a new object shows.
func (b *Backend) sweep(ctx context.Context, fresh string) error {
	if b.writing != Staged {
		return nil
	}
	now, err := b.driver.Stat(ctx, fresh)
	if err != nil {
		return err
	}
	left, err := b.names(incoming)
	for _, name := range left {
		if err != nil {
			return err
		}
		var info storagedriver.FileInfo
		name = path.Join(incoming, name)
		if info, err = b.driver.Stat(ctx, name); err == nil && now.ModTime().Sub(info.ModTime()) > leftTime {
			err = b.driver.Delete(ctx, name)
		}
		if err = gone(err); errors.Is(err, fs.ErrNotExist) {
			err = nil // another node moved or swept it
		}
	}
	return err
}

func shard(algorithm string, hex string) string { return path.Join(root, algorithm, hex[:2]) }

func name(d digest.Digest) string {
	return path.Join(shard(d.Algorithm().String(), d.Encoded()), d.Encoded())
}

// gone gives a missing path the name that the store knows.
func gone(err error) error {
	var missing storagedriver.PathNotFoundError
	if errors.As(err, &missing) {
		return fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	return err
}

// Stat implements blobs.Backend.
func (b *Backend) Stat(d digest.Digest) (int64, error) {
	ctx, cancel := context.WithTimeout(b.lifetime(), requestTime)
	defer cancel()
	info, err := b.driver.Stat(ctx, name(d))
	if err != nil {
		return 0, gone(err)
	}
	if info.IsDir() {
		return 0, fs.ErrNotExist
	}
	return info.Size(), nil
}

// Open implements blobs.Backend. Nothing is read before it is asked for.
func (b *Backend) Open(d digest.Digest) (blobs.File, int64, error) {
	size, err := b.Stat(d)
	if err != nil {
		return nil, 0, err
	}
	return &file{b: b, name: name(d), size: size}, size, nil
}

// Put implements blobs.Backend.
func (b *Backend) Put(d digest.Digest, size int64, r io.Reader) error {
	ctx, moved, done := b.watch()
	defer done()
	r = progress{r, moved}
	to := name(d)
	if b.writing != Staged && size <= whole {
		content, err := io.ReadAll(io.LimitReader(r, size+1))
		if err == nil && int64(len(content)) != size {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		return b.driver.PutContent(ctx, to, content)
	}
	if b.writing != Staged {
		return b.write(ctx, to, size, r)
	}
	from := path.Join(incoming, d.Encoded()+"-"+unique())
	if err := b.write(ctx, from, size, r); err != nil {
		return err
	}
	moved()
	err := b.driver.Move(ctx, from, to)
	if err == nil {
		return nil
	}
	err = errors.Join(err, b.discard(from))
	switch there, statErr := b.Stat(d); {
	case statErr != nil:
	case there == size:
		return nil // another node's move was in the way, and has ended well
	default:
		err = errors.Join(err, b.discard(to)) // a copy that the store gave up
	}
	return err
}

func (b *Backend) write(ctx context.Context, to string, size int64, r io.Reader) error {
	w, err := b.driver.Writer(ctx, to, false)
	if err != nil {
		return err
	}
	n, err := io.Copy(w, r)
	if err == nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	if err == nil {
		err = w.Commit(ctx)
	} else if b.writing != Unended {
		cleaning, cancel := context.WithTimeout(b.lifetime(), requestTime)
		defer cancel()
		err = errors.Join(err, w.Cancel(cleaning))
	}
	if err != nil && b.writing == Unended {
		return err // Close would put the half under the name
	}
	return errors.Join(err, w.Close())
}

func (b *Backend) discard(name string) error {
	ctx, cancel := context.WithTimeout(b.lifetime(), requestTime)
	defer cancel()
	return b.driver.Delete(ctx, name)
}

// Remove implements blobs.Backend.
func (b *Backend) Remove(d digest.Digest) error {
	if _, err := b.Stat(d); err != nil {
		return err // S3 answers the removal of nothing with success
	}
	return gone(b.discard(name(d)))
}

// List implements blobs.Backend. It lists one of 256 directories at a time.
func (b *Backend) List(after digest.Digest, n int) ([]digest.Digest, error) {
	var found []digest.Digest
	for _, algorithm := range entry.Algorithms() { // in the order of their names
		if after != "" && after.Algorithm().String() > algorithm.String() {
			continue
		}
		shards, err := b.shards(algorithm)
		if err != nil {
			return nil, err
		}
		for _, s := range shards {
			if len(found) >= n {
				return found, nil
			}
			if after != "" && after.Algorithm() == algorithm && s < after.Encoded()[:2] {
				continue
			}
			names, err := b.names(path.Join(root, algorithm.String(), s))
			if err != nil {
				return nil, err
			}
			for _, hex := range names {
				d := digest.NewDigestFromEncoded(algorithm, hex)
				if d.Validate() == nil && d > after && len(found) < n {
					found = append(found, d)
				}
			}
		}
	}
	return found, nil
}

// shards lists the directories of an algorithm. Where that would read the name of
// every blob it gives all that there may be.
func (b *Backend) shards(algorithm digest.Algorithm) ([]string, error) {
	if !b.flat {
		return b.names(path.Join(root, algorithm.String()))
	}
	all := make([]string, 256)
	for i := range all {
		all[i] = fmt.Sprintf("%02x", i)
	}
	return all, nil
}

// names lists a directory; one that is not there is empty.
func (b *Backend) names(dir string) ([]string, error) {
	ctx, cancel := context.WithTimeout(b.lifetime(), requestTime)
	defer cancel()
	list, err := b.driver.List(ctx, dir)
	if err = gone(err); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	for i := range list {
		list[i] = path.Base(strings.TrimSuffix(list[i], "/"))
	}
	slices.Sort(list)
	return list, err
}

// Redirect implements blobs.Redirector.
func (b *Backend) Redirect(r *http.Request, d digest.Digest) (string, error) {
	return b.driver.RedirectURL(r, name(d))
}

// watch gives a context that ends when moved has not been called for a while.
func (b *Backend) watch() (ctx context.Context, moved func(), done func()) {
	ctx, cancel := context.WithCancelCause(b.lifetime())
	timer := time.AfterFunc(b.stall, func() {
		cancel(fmt.Errorf("%s did not move a byte for %s", b.driver.Name(), b.stall))
	})
	return ctx, func() { timer.Reset(b.stall) }, func() { timer.Stop(); cancel(nil) }
}

// progress calls moved at every read.
type progress struct {
	io.Reader
	moved func()
}

func (p progress) Read(b []byte) (int, error) {
	p.moved()
	return p.Reader.Read(b)
}
