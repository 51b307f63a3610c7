// Package blobstest is the conformance suite of a content store: every backend
// of blobs passes it.
package blobstest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
)

// Upload is what a backend's upload session must do; blobs.Upload documents it.
type Upload interface {
	ID() string
	Size() int64
	Expect(algorithm digest.Algorithm)
	Progress() (size int64, at time.Time)
	Append(ctx context.Context, r io.Reader, at int64) (int64, error)
	Commit(ctx context.Context, want digest.Digest) (blobs.Info, error)
	Cancel() error
}

// Store is what a backend must do; blobs.Store documents it.
type Store[U Upload] interface {
	Stat(d digest.Digest) (blobs.Info, error)
	OpenBlob(d digest.Digest) (blobs.File, int64, error)
	List(after digest.Digest, n int) ([]digest.Digest, error)
	Remove(d digest.Digest) error
	Put(ctx context.Context, d digest.Digest, r io.Reader) (blobs.Info, error)
	NewUpload(ctx context.Context) (U, error)
	Upload(id string) (U, error)
}

// Content gives n bytes that depend on the seed alone.
func Content(seed uint64, n int) []byte {
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b)
	return b
}

// Check fails the test unless the store holds exactly this content, by sha256.
func Check[U Upload](t *testing.T, s Store[U], want []byte) {
	t.Helper()
	CheckAs(t, s, digest.FromBytes(want), want)
}

// CheckAs fails the test unless the store holds exactly this content under the
// digest.
func CheckAs[U Upload](t *testing.T, s Store[U], d digest.Digest, want []byte) {
	t.Helper()
	info, err := s.Stat(d)
	if err != nil || info.Size != int64(len(want)) || info.Digest != d {
		t.Fatalf("Stat of a held blob of %d bytes: %+v, %v", len(want), info, err)
	}
	f, size, err := s.OpenBlob(d)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := io.ReadAll(f)
	if err != nil || size != int64(len(want)) || !bytes.Equal(got, want) {
		t.Fatalf("blob %s reads as %d bytes (announced %d), err %v, equal %v", d, len(got), size, err, bytes.Equal(got, want))
	}
}

// CheckAbsent fails the test if the store shows a blob.
func CheckAbsent[U Upload](t *testing.T, s Store[U], d digest.Digest) {
	t.Helper()
	if _, err := s.Stat(d); !Code(err, fault.NotFound, "BLOB_UNKNOWN") {
		t.Fatalf("Stat of a blob that is not held: %v", err)
	}
	if f, _, err := s.OpenBlob(d); !Code(err, fault.NotFound, "BLOB_UNKNOWN") {
		t.Fatalf("OpenBlob of a blob that is not held: %v, %v", f, err)
	}
	if all, err := s.List("", 1<<30); err != nil || slices.Contains(all, d) {
		t.Fatalf("List shows a blob that is not held (err %v)", err)
	}
}

// Code reports whether err is a fault of the kind with the code.
func Code(err error, kind fault.Kind, code string) bool {
	got, _, _ := fault.Public(err)
	return fault.Is(err, kind) && got == code
}

// Run runs the suite. backend makes an empty place for a test and gives the
// function that opens the store in it, as often as it is called: the second call
// follows the sudden end of the process that made the first.
func Run[U Upload](t *testing.T, backend func(t *testing.T) (open func() Store[U])) {
	t.Helper()
	tests := map[string]func(t *testing.T, open func() Store[U]){
		"push":       testPush[U],
		"algorithms": testAlgorithms[U],
		"chunks":     testChunks[U],
		"digest":     testDigest[U],
		"sessions":   testSessions[U],
		"interrupts": testInterrupts[U],
		"restart":    testRestart[U],
		"concurrent": testConcurrent[U],
		"read":       testRead[U],
		"list":       testList[U],
		"remove":     testRemove[U],
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) { test(t, backend(t)) })
	}
}

func begin[U Upload](t *testing.T, s Store[U]) U {
	t.Helper()
	u, err := s.NewUpload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func add(t *testing.T, u Upload, b []byte, at int64) {
	t.Helper()
	if n, err := u.Append(t.Context(), bytes.NewReader(b), at); err != nil || n != int64(len(b)) {
		t.Fatalf("Append of %d bytes at %d: %d, %v", len(b), at, n, err)
	}
}

func commit(t *testing.T, u Upload, want []byte) {
	t.Helper()
	d := digest.FromBytes(want)
	if info, err := u.Commit(t.Context(), d); err != nil || info != (blobs.Info{Digest: d, Size: int64(len(want))}) {
		t.Fatalf("Commit of %s: %+v, %v", d, info, err)
	}
}

func testPush[U Upload](t *testing.T, open func() Store[U]) {
	s := open()
	for i, size := range []int{0, 1, 511, 256 << 10, 256<<10 + 1, 1<<20 + 3} {
		content := Content(uint64(i), size)
		CheckAbsent(t, s, digest.FromBytes(content))
		u := begin(t, s)
		add(t, u, content, 0)
		if u.Size() != int64(size) {
			t.Fatalf("Size is %d after %d bytes", u.Size(), size)
		}
		CheckAbsent(t, s, digest.FromBytes(content))
		commit(t, u, content)
		Check(t, s, content)
	}
	content := Content(99, 70<<10)
	if _, err := s.Put(t.Context(), digest.FromBytes(content), bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	Check(t, s, content)
	s = open()
	Check(t, s, content)
}

// The same bytes under two algorithms are two blobs, and a session takes either
// digest in the end, whatever it was told to expect.
func testAlgorithms[U Upload](t *testing.T, open func() Store[U]) {
	s := open()
	i := uint64(0)
	for _, expected := range []digest.Algorithm{"", digest.SHA256, digest.SHA512, digest.SHA384, "md5"} {
		for _, algorithm := range entry.Algorithms() {
			content := Content(i, 300<<10)
			i++
			d := algorithm.FromBytes(content)
			u := begin(t, s)
			u.Expect(expected)
			add(t, u, content[:1000], 0)
			u.Expect(digest.SHA256) // too late: there are bytes
			u.Expect(digest.SHA512)
			add(t, u, content[1000:], 1000)
			if info, err := u.Commit(t.Context(), d); err != nil || info != (blobs.Info{Digest: d, Size: 300 << 10}) {
				t.Fatalf("Commit as %s of a session that expects %q: %+v, %v", d, expected, info, err)
			}
			CheckAs(t, s, d, content)
			for _, other := range entry.Algorithms() {
				if other != algorithm {
					CheckAbsent(t, s, other.FromBytes(content))
				}
			}
		}
	}
	content := Content(50, 70<<10)
	d256, d512 := digest.SHA256.FromBytes(content), digest.SHA512.FromBytes(content)
	for _, d := range []digest.Digest{d256, d512} {
		if _, err := s.Put(t.Context(), d, bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
	}
	s = open()
	CheckAs(t, s, d256, content)
	CheckAs(t, s, d512, content)
	if err := s.Remove(d256); err != nil {
		t.Fatal(err)
	}
	CheckAbsent(t, s, d256)
	CheckAs(t, s, d512, content)
	for _, wrong := range []digest.Digest{digest.SHA512.FromString("something else"), digest.SHA384.FromBytes(content)} {
		if _, err := s.Put(t.Context(), wrong, bytes.NewReader(content)); !Code(err, fault.Invalid, "DIGEST_INVALID") {
			t.Fatalf("Put as %s: %v", wrong, err)
		}
	}
}

func testChunks[U Upload](t *testing.T, open func() Store[U]) {
	s := open()
	content := Content(1, 600<<10)
	u := begin(t, s)
	add(t, u, content[:100], 0)
	for _, at := range []int64{0, 99, 101, 1 << 40} {
		n, err := u.Append(t.Context(), bytes.NewReader(content), at)
		_, _, detail := fault.Public(err)
		if n != 0 || !Code(err, fault.Invalid, "BLOB_UPLOAD_INVALID") || detail != (blobs.Offset{Offset: 100}) {
			t.Fatalf("Append at %d of 100: %d, %v, detail %v", at, n, err, detail)
		}
	}
	add(t, u, content[100:300<<10], 100)
	add(t, u, nil, 300<<10)
	add(t, u, content[300<<10:], -1)
	if size, at := u.Progress(); size != 600<<10 || time.Since(at) > time.Minute {
		t.Fatalf("Progress is %d at %s", size, at)
	}
	commit(t, u, content)
	Check(t, s, content)
}

func testDigest[U Upload](t *testing.T, open func() Store[U]) {
	s := open()
	content := Content(2, 1000)
	wrong := digest.FromString("something else")
	u := begin(t, s)
	add(t, u, content, 0)
	for _, d := range []digest.Digest{"", "sha256:", "sha256:../../x", "md5:d41d8cd98f00b204e9800998ecf8427e", "sha256:" + digest.Digest(strings.Repeat("A", 64)), "sha512:" + digest.Digest(strings.Repeat("a", 64)), digest.SHA384.FromBytes(content)} {
		if _, err := u.Commit(t.Context(), d); !Code(err, fault.Invalid, "DIGEST_INVALID") {
			t.Fatalf("Commit as %q: %v", d, err)
		}
		if _, err := s.Stat(d); !Code(err, fault.Invalid, "DIGEST_INVALID") {
			t.Fatalf("Stat of %q: %v", d, err)
		}
	}
	if _, err := u.Commit(t.Context(), wrong); !Code(err, fault.Invalid, "DIGEST_INVALID") {
		t.Fatalf("Commit with a wrong digest: %v", err)
	}
	CheckAbsent(t, s, wrong)
	CheckAbsent(t, s, digest.FromBytes(content))
	if _, err := s.Upload(u.ID()); !Code(err, fault.NotFound, "BLOB_UPLOAD_UNKNOWN") {
		t.Fatalf("the session of a wrong digest: %v", err)
	}
	if _, err := s.Put(t.Context(), wrong, bytes.NewReader(content)); !Code(err, fault.Invalid, "DIGEST_INVALID") {
		t.Fatalf("Put with a wrong digest: %v", err)
	}
}

func testSessions[U Upload](t *testing.T, open func() Store[U]) {
	s := open()
	for _, id := range []string{"", "x", "../blobs", "00000000000000000000000000000000"} {
		if _, err := s.Upload(id); !Code(err, fault.NotFound, "BLOB_UPLOAD_UNKNOWN") {
			t.Fatalf("Upload(%q): %v", id, err)
		}
	}
	u := begin(t, s)
	add(t, u, []byte("some"), 0)
	if again, err := s.Upload(u.ID()); err != nil || again.Size() != 4 {
		t.Fatalf("Upload of an open session: %v", err)
	}
	for range 2 {
		if err := u.Cancel(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Upload(u.ID()); !Code(err, fault.NotFound, "BLOB_UPLOAD_UNKNOWN") {
		t.Fatalf("Upload of a cancelled session: %v", err)
	}
	if _, err := u.Append(t.Context(), bytes.NewReader(nil), 4); !Code(err, fault.NotFound, "BLOB_UPLOAD_UNKNOWN") {
		t.Fatalf("Append to a cancelled session: %v", err)
	}
	if _, err := u.Commit(t.Context(), digest.FromString("some")); !Code(err, fault.NotFound, "BLOB_UPLOAD_UNKNOWN") {
		t.Fatalf("Commit of a cancelled session: %v", err)
	}
	CheckAbsent(t, s, digest.FromString("some"))
}

func testInterrupts[U Upload](t *testing.T, open func() Store[U]) {
	s := open()
	content := Content(3, 700<<10)
	u := begin(t, s)
	broken := errors.New("connection reset")
	n, err := u.Append(t.Context(), io.MultiReader(bytes.NewReader(content[:300<<10]), iotest.ErrReader(broken)), 0)
	if n != 300<<10 || !errors.Is(err, broken) || !Code(err, fault.Invalid, "BLOB_UPLOAD_INVALID") {
		t.Fatalf("Append from a client that breaks off: %d, %v", n, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	n, err = u.Append(ctx, io.MultiReader(bytes.NewReader(content[300<<10:400<<10]), readerFunc(func(b []byte) (int, error) {
		cancel()
		return copy(b, content[400<<10:400<<10+1]), nil
	})), 300<<10)
	if n != 100<<10+1 || !errors.Is(err, context.Canceled) {
		t.Fatalf("Append that is cancelled: %d, %v", n, err)
	}
	add(t, u, content[400<<10+1:], u.Size())
	commit(t, u, content)
	Check(t, s, content)
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

func testRestart[U Upload](t *testing.T, open func() Store[U]) {
	s := open()
	content := Content(4, 1<<20)
	u, small, long := begin(t, s), begin(t, s), begin(t, s)
	long.Expect(digest.SHA512)
	add(t, long, content[:700<<10], 0)
	add(t, u, content[:600<<10+5], 0)
	add(t, u, content[600<<10+5:600<<10+10], 600<<10+5)
	add(t, small, content[:10], 0)

	s = open()
	u, err := s.Upload(u.ID())
	if err != nil || u.Size() != 600<<10+10 {
		t.Fatalf("a session after a restart: %v", err)
	}
	add(t, u, content[600<<10+10:], u.Size())
	s = open()
	if u, err = s.Upload(u.ID()); err != nil {
		t.Fatal(err)
	}
	commit(t, u, content)
	Check(t, s, content)
	if small, err = s.Upload(small.ID()); err != nil {
		t.Fatal(err)
	}
	commit(t, small, content[:10])
	if long, err = s.Upload(long.ID()); err != nil {
		t.Fatal(err)
	}
	d512 := digest.SHA512.FromBytes(content)
	add(t, long, content[700<<10:], 700<<10)
	if _, err := long.Commit(t.Context(), d512); err != nil {
		t.Fatal(err)
	}
	s = open()
	Check(t, s, content[:10])
	CheckAs(t, s, d512, content)
	if _, err := s.Upload(small.ID()); !Code(err, fault.NotFound, "BLOB_UPLOAD_UNKNOWN") {
		t.Fatalf("a committed session after a restart: %v", err)
	}
}

func testConcurrent[U Upload](t *testing.T, open func() Store[U]) {
	s := open()
	content := Content(5, 300<<10)
	d := digest.FromBytes(content)
	ready := make(chan struct{})
	errs := make(chan error, 16)
	var group sync.WaitGroup
	for range cap(errs) {
		u := begin(t, s)
		group.Go(func() {
			<-ready
			_, err := u.Append(t.Context(), bytes.NewReader(content), 0)
			if err == nil {
				_, err = u.Commit(t.Context(), d)
			}
			if err == nil {
				_, err = s.Stat(d)
			}
			errs <- err
		})
	}
	close(ready)
	group.Wait()
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	Check(t, s, content)
}

func testRead[U Upload](t *testing.T, open func() Store[U]) {
	s := open()
	content := Content(6, 1<<20)
	d := digest.FromBytes(content)
	if _, err := s.Put(t.Context(), d, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	f, _, err := s.OpenBlob(d)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	part := make([]byte, 1000)
	if _, err := f.ReadAt(part, 500<<10); err != nil || !bytes.Equal(part, content[500<<10:500<<10+1000]) {
		t.Fatalf("ReadAt in the middle: %v", err)
	}
	if n, err := f.ReadAt(part, 1<<20-10); n != 10 || err != io.EOF {
		t.Fatalf("ReadAt over the end: %d, %v", n, err)
	}
	if end, err := f.Seek(0, io.SeekEnd); end != 1<<20 || err != nil {
		t.Fatalf("Seek to the end: %d, %v", end, err)
	}
	if _, err := f.Seek(1<<19, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, content[1<<19:]) {
		t.Fatalf("reading the second half: %v", err)
	}
}

func testList[U Upload](t *testing.T, open func() Store[U]) {
	s := open()
	var want []digest.Digest
	for i := range 60 {
		content := fmt.Append(nil, "blob ", i)
		want = append(want, entry.Algorithms()[i%2].FromBytes(content))
		if _, err := s.Put(t.Context(), want[i], bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(want)
	for _, page := range []int{1, 7, 60, 1000} {
		var got []digest.Digest
		for after := digest.Digest(""); ; after = got[len(got)-1] {
			part, err := s.List(after, page)
			if err != nil || len(part) > page {
				t.Fatalf("List after %q: %d of %d, %v", after, len(part), page, err)
			}
			got = append(got, part...)
			if len(part) < page {
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("pages of %d give %d blobs, want %d in the order of their digests", page, len(got), len(want))
		}
	}
	if got, err := s.List(digest.Digest("sha512:"+strings.Repeat("f", 128)), 1); err != nil || len(got) != 0 {
		t.Fatalf("List after the last: %v, %v", got, err)
	}
	if got, err := s.List(digest.Digest("sha256:"+strings.Repeat("f", 64)), 1); err != nil || len(got) != 1 || got[0].Algorithm() != digest.SHA512 {
		t.Fatalf("List after the last of sha256: %v, %v", got, err)
	}
	if _, err := s.List("sha256:..", 1); !fault.Is(err, fault.Invalid) {
		t.Fatalf("List after what is no digest: %v", err)
	}
}

func testRemove[U Upload](t *testing.T, open func() Store[U]) {
	s := open()
	content := Content(7, 100<<10)
	d := digest.FromBytes(content)
	if err := s.Remove(d); !Code(err, fault.NotFound, "BLOB_UNKNOWN") {
		t.Fatalf("Remove of a blob that is not held: %v", err)
	}
	if _, err := s.Put(t.Context(), d, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	f, _, err := s.OpenBlob(d)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := s.Remove(d); err != nil {
		t.Fatal(err)
	}
	CheckAbsent(t, s, d)
	// A file stays for those who have it open; an object store need not keep it.
	if got, err := io.ReadAll(f); !bytes.Equal(got, content) && !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("reading a removed blob on: %d bytes, %v", len(got), err)
	}
	if _, err := s.Put(t.Context(), d, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	Check(t, s, content)
}
