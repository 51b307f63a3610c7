package cloud

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/distribution/v3/registry/storage/driver/inmemory"
	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/blobs/blobstest"
	"github.com/atoll-registry/atoll/node/fault"
)

// conform runs the suite of a content store over a backend; each call gives an
// empty one.
func conform(t *testing.T, backend func(t *testing.T) blobs.Backend) {
	blobstest.Run(t, func(t *testing.T) func() blobstest.Store[*blobs.Upload] {
		dir, b := t.TempDir(), backend(t)
		return func() blobstest.Store[*blobs.Upload] {
			s, err := blobs.Open(dir, blobs.Options{Backend: b, Boot: "one"})
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
	})
	t.Run("backend", func(t *testing.T) { testBackend(t, backend(t)) })
	t.Run("nodes", func(t *testing.T) { testTwoNodes(t, backend(t)) })
	t.Run("move", func(t *testing.T) { testMove(t, backend(t), backend(t)) })
}

func TestConformanceInMemory(t *testing.T) {
	// Like Azure's, this driver shows what is being written: it is not direct.
	conform(t, func(t *testing.T) blobs.Backend { return New(t.Context(), inmemory.New(), false) })
}

// testBackend holds a backend to what blobs.Backend promises beyond what a store
// uses of it.
func testBackend(t *testing.T, b blobs.Backend) {
	content := blobstest.Content(1, 5<<20) // more than goes in one request
	d := digest.FromBytes(content)
	if _, err := b.Stat(d); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("Stat of nothing: %v", err)
	}
	if _, _, err := b.Open(d); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("Open of nothing: %v", err)
	}
	if err := b.Remove(d); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("Remove of nothing: %v", err)
	}
	// What breaks off, or ends early, never becomes a blob.
	broken := errors.New("broken")
	for _, size := range []int{1000, len(content)} {
		part := digest.FromBytes(content[:size])
		if err := b.Put(part, int64(size), io.MultiReader(bytes.NewReader(content[:size/2]), failing{broken})); !errors.Is(err, broken) {
			t.Fatalf("Put of a reader that fails: %v", err)
		}
		if err := b.Put(part, int64(size), bytes.NewReader(content[:size/2])); err == nil {
			t.Fatal("Put of half a blob succeeds")
		}
		if _, err := b.Stat(part); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("half a blob is visible: %v", err)
		}
	}
	for range 2 { // the second puts what is there
		if err := b.Put(d, int64(len(content)), bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
	}
	f, size, err := b.Open(d)
	if err != nil || size != int64(len(content)) {
		t.Fatalf("Open: %d bytes, %v", size, err)
	}
	defer f.Close()
	buf := make([]byte, 64<<10)
	for _, at := range []int64{3 << 20, 3<<20 + 64<<10, 100, 4 << 20, 0, size - 64<<10} {
		if n, err := f.ReadAt(buf, at); n != len(buf) || err != nil || !bytes.Equal(buf, content[at:at+int64(n)]) {
			t.Fatalf("ReadAt %d: %d bytes, %v", at, n, err)
		}
	}
	if n, err := f.ReadAt(buf, size-10); n != 10 || err != io.EOF {
		t.Fatalf("ReadAt over the end: %d, %v", n, err)
	}
	if at, err := f.Seek(-5, io.SeekEnd); at != size-5 || err != nil {
		t.Fatalf("Seek: %d, %v", at, err)
	}
	if rest, err := io.ReadAll(f); err != nil || !bytes.Equal(rest, content[size-5:]) {
		t.Fatalf("the end reads as %d bytes, %v", len(rest), err)
	}
	if list, err := b.List("", 10); err != nil || !slices.Equal(list, []digest.Digest{d}) {
		t.Fatalf("List: %v, %v", list, err)
	}
	if err := b.Remove(d); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Stat(d); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("a removed blob is there: %v", err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func store(t *testing.T, b blobs.Backend) *blobs.Store {
	t.Helper()
	s, err := blobs.Open(t.TempDir(), blobs.Options{Backend: b})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// What one node has stored, every node of the site holds, and pushes of one blob
// to several nodes at once do not disturb each other.
func testTwoNodes(t *testing.T, b blobs.Backend) {
	one, two := store(t, b), store(t, b)
	content := blobstest.Content(7, 6<<20)
	d := digest.FromBytes(content)
	var pushes sync.WaitGroup
	for _, s := range []*blobs.Store{one, two, one} {
		pushes.Go(func() {
			if _, err := s.Put(t.Context(), d, bytes.NewReader(content)); err != nil {
				t.Error(err)
			}
		})
	}
	pushes.Wait()
	for _, s := range []*blobs.Store{one, two} {
		blobstest.Check(t, s, content)
		pace := func(context.Context, int) error { return nil }
		if info, err := s.Verify(t.Context(), d, pace); err != nil || info.Size != int64(len(content)) || !s.Shelved(d) {
			t.Fatalf("Verify: %+v, %v", info, err)
		}
	}
	if u, err := one.Usage(t.Context()); err != nil || u.Uploads != 0 || u.Blobs != 0 {
		t.Fatalf("a blob that is in the backend occupies the disk: %+v, %v", u, err)
	}
	if err := one.RemoveIf(t.Context(), d, func(context.Context) error { return nil }); !fault.Is(err, fault.Conflict) {
		t.Fatalf("RemoveIf while other nodes may be pushing: %v", err)
	}
	if err := one.Remove(d); err != nil {
		t.Fatal(err)
	}
	blobstest.CheckAbsent(t, two, d)
}

// testMove moves a store from its directory to a backend, on to another and back.
func testMove(t *testing.T, first, second blobs.Backend) {
	s := store(t, nil)
	var all [][]byte
	for i, size := range []int{0, 1, 1000, 5 << 20} {
		all = append(all, blobstest.Content(uint64(20+i), size))
		put(t, s, all[i])
	}
	for step, home := range []blobs.Backend{first, second, nil} {
		s.Rehome(home)
		pushed := blobstest.Content(uint64(30+step), 2000)
		put(t, s, pushed)
		all = append(all, pushed)
		list, err := s.Elsewhere("", 100)
		if err != nil || len(list) < len(all)-1 {
			t.Fatalf("step %d: Elsewhere lists %d of %d blobs, %v", step, len(list), len(all), err)
		}
		for range 2 { // the second time there is nothing to do
			for _, d := range list {
				if _, err := s.Carry(t.Context(), d); err != nil {
					t.Fatalf("step %d: %v", step, err)
				}
			}
		}
		for _, d := range list {
			if err := s.Unload(d); err != nil {
				t.Fatalf("step %d: %v", step, err)
			}
		}
		if list, err := s.Elsewhere("", 100); err != nil || len(list) != 0 {
			t.Fatalf("step %d: %v is still elsewhere, %v", step, list, err)
		}
		s.Leave()
		for _, content := range all {
			blobstest.Check(t, s, content)
		}
	}
	for _, b := range []blobs.Backend{first, second} {
		if list, err := b.List("", 10); err != nil || len(list) != 0 {
			t.Fatalf("a backend that was left holds %v, %v", list, err)
		}
	}
}

func put(t *testing.T, s *blobs.Store, content []byte) {
	t.Helper()
	if _, err := s.Put(t.Context(), digest.FromBytes(content), bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
}

// A damaged blob does not travel, and stays where it is.
func TestCarryVerifies(t *testing.T) {
	from, to := New(t.Context(), inmemory.New(), true), New(t.Context(), inmemory.New(), true)
	for _, size := range []int{100, 5 << 20} {
		content := blobstest.Content(3, size)
		d := digest.FromBytes(content)
		if err := from.Put(d, int64(size), bytes.NewReader(append(content[:size-1:size-1], content[size-1]^1))); err != nil {
			t.Fatal(err)
		}
		s := store(t, from)
		for _, home := range []blobs.Backend{to, nil} {
			s.Rehome(home)
			if _, err := s.Carry(t.Context(), d); !errors.Is(err, blobs.ErrDamaged) {
				t.Fatalf("Carry of a damaged blob: %v", err)
			}
			s.Rehome(from)
		}
		if _, err := to.Stat(d); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("a damaged blob arrived: %v", err)
		}
	}
}

// A backend that fails is named as such, hides nothing that is held elsewhere,
// and takes no acknowledgement back.
func TestBackendFails(t *testing.T) {
	driver := &broken{StorageDriver: inmemory.New()}
	s := store(t, nil)
	old := blobstest.Content(1, 100)
	put(t, s, old)
	s.Rehome(New(t.Context(), driver, true))
	driver.fail = true
	content := blobstest.Content(2, 100)
	d := digest.FromBytes(content)
	if _, err := s.Put(t.Context(), d, bytes.NewReader(content)); !fault.Is(err, fault.Unavailable) {
		t.Fatalf("Put: %v", err)
	}
	if _, err := s.Stat(d); !fault.Is(err, fault.Unavailable) {
		t.Fatalf("an absence that nobody can confirm: %v", err)
	}
	blobstest.Check(t, s, old)
	driver.fail = false
	blobstest.CheckAbsent(t, s, d)
	put(t, s, content)
	blobstest.Check(t, s, content)
}

type broken struct {
	storagedriver.StorageDriver
	fail bool
}

func (b *broken) refuse() error {
	if b.fail {
		return errors.New("no route to host")
	}
	return nil
}

func (b *broken) Stat(ctx context.Context, path string) (storagedriver.FileInfo, error) {
	if err := b.refuse(); err != nil {
		return nil, err
	}
	return b.StorageDriver.Stat(ctx, path)
}

func (b *broken) PutContent(ctx context.Context, path string, content []byte) error {
	if err := b.refuse(); err != nil {
		return err
	}
	return b.StorageDriver.PutContent(ctx, path, content)
}

func TestOpen(t *testing.T) {
	secretKey := rand.Text()
	for name, parameters := range map[string]map[string]any{
		"tape": {},
		"s3":   {"accesskey": "a", "secretkey": secretKey, "bucket": ""},
		"gcs":  {},
	} {
		_, err := Open(t.Context(), name, parameters)
		if !fault.Is(err, fault.Invalid) || strings.Contains(err.Error(), secretKey) {
			t.Errorf("opening %s: %v", name, err)
		}
	}
	text := Redact("key "+secretKey+" in bucket b", map[string]any{"secretkey": secretKey, "bucket": "b"})
	if strings.Contains(text, secretKey) || !strings.Contains(text, "bucket b") {
		t.Errorf("redacted to %q", text)
	}
}

// A client is sent elsewhere only for a blob that is there, and only by a driver
// that can.
func TestRedirect(t *testing.T) {
	s := store(t, New(t.Context(), pointing{inmemory.New()}, true))
	content := blobstest.Content(1, 100)
	r, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
	if _, err := s.Redirect(r, digest.FromBytes(content)); !fault.Is(err, fault.NotFound) {
		t.Fatalf("redirect to nothing: %v", err)
	}
	put(t, s, content)
	url, err := s.Redirect(r, digest.FromBytes(content))
	if err != nil || !strings.HasSuffix(url, digest.FromBytes(content).Encoded()) {
		t.Fatalf("redirect to %q, %v", url, err)
	}
	plain := store(t, nil)
	put(t, plain, content)
	if url, err := plain.Redirect(r, digest.FromBytes(content)); url != "" || err != nil {
		t.Fatalf("a file of this node is at %q, %v", url, err)
	}
}

type pointing struct{ storagedriver.StorageDriver }

func (pointing) RedirectURL(_ *http.Request, path string) (string, error) {
	return "https://elsewhere.example" + path, nil
}
