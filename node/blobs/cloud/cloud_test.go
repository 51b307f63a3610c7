package cloud

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

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
	// Like Azure's, this driver shows what is being written.
	conform(t, func(t *testing.T) blobs.Backend { return New(t.Context(), inmemory.New(), Staged) })
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
	// Nor does it take away what another node has put.
	for _, there := range [][]byte{content, content[:1000]} {
		part, size := digest.FromBytes(there), int64(len(there))
		if err := b.Put(part, size, bytes.NewReader(there)); err != nil {
			t.Fatal(err)
		}
		if err := b.Put(part, size, io.MultiReader(bytes.NewReader(there[:size/2]), failing{broken})); !errors.Is(err, broken) {
			t.Fatalf("Put of a reader that fails: %v", err)
		}
		if got, err := b.Stat(part); got != size || err != nil {
			t.Fatalf("a broken Put left %d bytes of the whole blob there, %v", got, err)
		}
	}
	if err := b.Remove(digest.FromBytes(content[:1000])); err != nil {
		t.Fatal(err)
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
	from, to := New(t.Context(), inmemory.New(), Direct), New(t.Context(), inmemory.New(), Direct)
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
	s.Rehome(New(t.Context(), driver, Direct))
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
	nested := map[string]any{"credentials": map[string]any{"type": "client_secret", "secret": secretKey}}
	if text := Redact("a client_secret "+secretKey, nested); strings.Contains(text, secretKey) || !strings.Contains(text, "client_secret") {
		t.Errorf("redacted to %q", text)
	}
}

// A client is sent elsewhere only for a blob that is there, and only by a driver
// that can.
func TestRedirect(t *testing.T) {
	s := store(t, New(t.Context(), pointing{inmemory.New()}, Direct))
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

// moving is a driver whose moves fail after leaving so much of the content.
type moving struct {
	storagedriver.StorageDriver
	leave int // bytes; -1: nothing at all
}

func (m moving) Move(ctx context.Context, from, to string) error {
	content, err := m.GetContent(ctx, from)
	if err == nil && m.leave >= 0 {
		err = m.PutContent(ctx, to, content[:m.leave])
	}
	return errors.Join(errors.New("pending copy"), err)
}

// A move that fails leaves a whole blob, or nothing, and nothing under another name.
func TestMoveFails(t *testing.T) {
	content := blobstest.Content(40, 3000)
	d := digest.FromBytes(content)
	for _, leave := range []int{-1, 0, 1000, len(content)} {
		driver := inmemory.New()
		b := New(t.Context(), moving{driver, leave}, Staged)
		err := b.Put(d, int64(len(content)), bytes.NewReader(content))
		if _, statErr := b.Stat(d); (leave == len(content)) != (err == nil) || (err == nil) != (statErr == nil) {
			t.Errorf("a move that leaves %d bytes: %v, and then %v", leave, err, statErr)
		}
		if left, err := b.names(incoming); len(left) != 0 || err != nil {
			t.Errorf("a move that leaves %d bytes leaves %v, %v", leave, left, err)
		}
	}
}

// aged is a driver with objects of another time.
type aged struct {
	storagedriver.StorageDriver
	age map[string]time.Duration
}

func (a aged) Stat(ctx context.Context, name string) (storagedriver.FileInfo, error) {
	info, err := a.StorageDriver.Stat(ctx, name)
	if err != nil {
		return nil, err
	}
	// By the clock of a store that nobody has set.
	fields := storagedriver.FileInfoFields{Path: name, Size: info.Size(), ModTime: time.Unix(1e6, 0).Add(-a.age[name])}
	return storagedriver.FileInfoInternal{FileInfoFields: fields}, nil
}

// What nodes left behind that died in the middle of a transfer goes; what may be
// under way stays.
func TestCheckSweeps(t *testing.T) {
	driver := aged{inmemory.New(), map[string]time.Duration{incoming + "/old": 25 * time.Hour, incoming + "/new": time.Hour}}
	for name := range driver.age {
		if err := driver.PutContent(t.Context(), name, []byte("half")); err != nil {
			t.Fatal(err)
		}
	}
	b := New(t.Context(), driver, Staged)
	for range 2 {
		if err := b.Check(); err != nil {
			t.Fatal(err)
		}
		if left, err := b.names(incoming); !slices.Equal(left, []string{"new"}) || err != nil {
			t.Fatalf("left are %v, %v", left, err)
		}
	}
}

// A driver that lists everything below a directory is never asked for the list of
// all blobs.
func TestListFlat(t *testing.T) {
	b := New(t.Context(), inmemory.New(), Staged)
	var all []digest.Digest
	for i := range 30 {
		content := blobstest.Content(uint64(50+i), 100+i)
		all = append(all, digest.FromBytes(content))
		if err := b.Put(all[i], int64(len(content)), bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(all)
	b.flat = true
	b.driver = unlisted{b.driver}
	var found []digest.Digest
	for after := digest.Digest(""); ; after = found[len(found)-1] {
		page, err := b.List(after, 7)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			break
		}
		found = append(found, page...)
	}
	if !slices.Equal(found, all) {
		t.Fatalf("the pages list %d of %d blobs", len(found), len(all))
	}
}

type unlisted struct{ storagedriver.StorageDriver }

func (u unlisted) List(ctx context.Context, dir string) ([]string, error) {
	if len(path.Base(dir)) != 2 {
		return nil, errors.New("a list of all blobs")
	}
	return u.StorageDriver.List(ctx, dir)
}
