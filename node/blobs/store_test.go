package blobs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/blobs/blobstest"
	"github.com/atoll-registry/atoll/node/blobs/faultfs"
	"github.com/atoll-registry/atoll/node/fault"
)

func open(t *testing.T, dir string, o blobs.Options) *blobs.Store {
	t.Helper()
	s, err := blobs.Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func put(t *testing.T, s *blobs.Store, content []byte) digest.Digest {
	t.Helper()
	d := digest.FromBytes(content)
	if _, err := s.Put(t.Context(), d, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestConformanceDisk(t *testing.T) {
	blobstest.Run(t, func(t *testing.T) func() blobstest.Store[*blobs.Upload] {
		dir := t.TempDir()
		return func() blobstest.Store[*blobs.Upload] { return open(t, dir, blobs.Options{}) }
	})
}

// A blob that is removed is read to its end by those who have it open.
func TestRemovedWhileRead(t *testing.T) {
	s := open(t, t.TempDir(), blobs.Options{})
	content := blobstest.Content(9, 1<<20)
	d := put(t, s, content)
	f, _, err := s.OpenBlob(d)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := s.Remove(d); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("a removed blob reads as %d bytes, %v", len(got), err)
	}
}

// A file of another registry becomes a blob: by a link where that works, by a copy
// else, and only when its bytes are right.
func TestTake(t *testing.T) {
	dir := t.TempDir()
	content := blobstest.Content(11, 1<<20)
	d := digest.FromBytes(content)
	file := filepath.Join(dir, "data")
	write := func(b []byte) {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, link := range []bool{true, false} {
		s := open(t, filepath.Join(dir, fmt.Sprint(link)), blobs.Options{})
		write(append(bytes.Clone(content[:1<<19]), content[:1<<19]...))
		if _, _, err := s.Take(t.Context(), d, file, link); !blobstest.Code(err, fault.Invalid, "DIGEST_INVALID") {
			t.Fatalf("damaged content is taken: %v", err)
		}
		blobstest.CheckAbsent(t, s, d)
		write(content)
		for range 2 { // the second finds it held
			if info, linked, err := s.Take(t.Context(), d, file, link); err != nil || linked != link || info.Size != 1<<20 {
				t.Fatalf("Take with link %v: %+v, linked %v, %v", link, info, linked, err)
			}
		}
		blobstest.Check(t, s, content)
		if u, err := s.Usage(t.Context()); err != nil || u.Staging != 0 || u.Uploads != 0 {
			t.Fatalf("Take leaves files: %+v, %v", u, err)
		}
	}
	s := open(t, "/", blobs.Options{FS: faultfs.New()}) // cannot link
	if _, linked, err := s.Take(t.Context(), d, file, true); err != nil || linked {
		t.Fatalf("Take without links: linked %v, %v", linked, err)
	}
	blobstest.Check(t, s, content)
}

func TestConformanceMemory(t *testing.T) {
	blobstest.Run(t, func(t *testing.T) func() blobstest.Store[*blobs.Upload] {
		disk := faultfs.New()
		return func() blobstest.Store[*blobs.Upload] {
			disk.Restart(faultfs.Killed, 0)
			return open(t, "/", blobs.Options{FS: disk, Boot: "1"})
		}
	})
}

func TestFormat(t *testing.T) {
	dir := t.TempDir()
	d := put(t, open(t, dir, blobs.Options{}), []byte("content"))
	name := filepath.Join(dir, "blobs", "sha256", d.Encoded()[:2], d.Encoded())
	if _, err := os.Stat(name); err != nil {
		t.Fatal(err)
	}
	format := filepath.Join(dir, "format")
	if b, err := os.ReadFile(format); err != nil || string(b) != "atoll-blobs 1\n" {
		t.Fatalf("format file %q, %v", b, err)
	}
	if err := os.WriteFile(format, []byte("atoll-blobs 2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := blobs.Open(dir, blobs.Options{}); err == nil || !strings.Contains(err.Error(), `"atoll-blobs 2\n"`) {
		t.Fatalf("opening a store of a newer format: %v", err)
	}
	if err := os.Remove(format); err != nil {
		t.Fatal(err)
	}
	if _, err := blobs.Open(dir, blobs.Options{}); err == nil || !strings.Contains(err.Error(), "holds blobs") {
		t.Fatalf("opening a store without its format file: %v", err)
	}
}

// watched is a connection that notes what net/http asks it to read from.
type watched struct {
	*net.TCPConn
	fromFile *atomic.Int64
}

func (w watched) ReadFrom(r io.Reader) (int64, error) {
	n, err := w.TCPConn.ReadFrom(r)
	if limited, ok := r.(*io.LimitedReader); ok {
		if _, ok := limited.R.(syscall.Conn); ok {
			w.fromFile.Add(n)
		}
	}
	return n, err
}

type watchedListener struct {
	net.Listener
	fromFile *atomic.Int64
}

func (l watchedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return watched{conn.(*net.TCPConn), l.fromFile}, nil
}

// A blob reaches the kernel's sendfile: the file is an *os.File, and net/http
// hands it as such to the ReadFrom of the TCP connection.
func TestSendfile(t *testing.T) {
	s := open(t, t.TempDir(), blobs.Options{})
	content := blobstest.Content(1, 3<<20)
	d := put(t, s, content)
	f, _, err := s.OpenBlob(d)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := f.(*os.File); !ok {
		t.Fatalf("an open blob is a %T, not an *os.File", f)
	}
	f.Close()

	var fromFile atomic.Int64
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f, _, err := s.OpenBlob(d)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		defer f.Close()
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, r, "", time.Time{}, f)
	}))
	server.Listener = watchedListener{server.Listener, &fromFile}
	server.Start()
	defer server.Close()
	resp, err := http.Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil || !bytes.Equal(got, content) {
		t.Fatalf("served %d bytes, %v", len(got), err)
	}
	server.Close() // waits for the handler's side to have counted
	// net/http may copy the first 512 bytes itself, together with the header.
	if n := fromFile.Load(); n < int64(len(content))-512 {
		t.Fatalf("%d of %d bytes went from the file to the socket in the kernel", n, len(content))
	}
}

func TestRemoveIf(t *testing.T) {
	s := open(t, "/", blobs.Options{FS: faultfs.New()})
	d := put(t, s, []byte("content"))
	refusal := errors.New("no")
	if err := s.RemoveIf(t.Context(), d, func(context.Context) error { return refusal }); err != refusal {
		t.Fatalf("RemoveIf that is not allowed: %v", err)
	}
	release := s.Pin(d)
	if err := s.Remove(d); !fault.Is(err, fault.Conflict) {
		t.Fatalf("Remove of a pinned blob: %v", err)
	}
	release()
	release()

	// A pin waits for a removal that has been allowed.
	asked, answer := make(chan struct{}), make(chan struct{})
	removed := make(chan error)
	go func() {
		removed <- s.RemoveIf(t.Context(), d, func(context.Context) error { close(asked); <-answer; return nil })
	}()
	<-asked
	pinned := make(chan func())
	go func() { pinned <- s.Pin(d) }()
	select {
	case <-pinned:
		t.Fatal("a pin came between the answer and the unlink")
	default:
	}
	close(answer)
	if err := <-removed; err != nil {
		t.Fatal(err)
	}
	release = <-pinned
	defer release()
	put(t, s, []byte("content"))
	if err := s.Remove(d); !fault.Is(err, fault.Conflict) {
		t.Fatalf("Remove of a pinned blob: %v", err)
	}
}

func TestUsage(t *testing.T) {
	disk := faultfs.New()
	disk.SetCapacity(1 << 30)
	s := open(t, "/", blobs.Options{FS: disk, Boot: "1"})
	check := func(want blobs.Usage) {
		t.Helper()
		got, err := s.Usage(t.Context())
		got.Free = 0
		if want.Total = 1 << 30; err != nil || got != want {
			t.Fatalf("usage %+v, %v, want %+v", got, err, want)
		}
	}
	put(t, s, make([]byte, 100))
	check(blobs.Usage{Blobs: 1, Bytes: 100})
	d := put(t, s, make([]byte, 1000))
	put(t, s, make([]byte, 1000))
	check(blobs.Usage{Blobs: 2, Bytes: 1100})
	u, err := s.NewUpload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Append(t.Context(), bytes.NewReader(make([]byte, 7)), 0); err != nil {
		t.Fatal(err)
	}
	g, err := s.Staging("import")
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Put(t.Context(), digest.FromString("12345"), 5, strings.NewReader("12345")); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(d); err != nil {
		t.Fatal(err)
	}
	check(blobs.Usage{Blobs: 1, Bytes: 100, Uploads: 7, Staging: 5})
	disk.Restart(faultfs.Killed, 0)
	s = open(t, "/", blobs.Options{FS: disk, Boot: "1"})
	check(blobs.Usage{Blobs: 1, Bytes: 100, Uploads: 7, Staging: 5})
}

// A store that a broken file system gave a short file heals by the next push.
func TestWrongSizeIsReplaced(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, blobs.Options{})
	content := blobstest.Content(1, 10000)
	d := put(t, s, content)
	if err := os.Truncate(filepath.Join(dir, "blobs/sha256", d.Encoded()[:2], d.Encoded()), 5000); err != nil {
		t.Fatal(err)
	}
	put(t, s, content)
	blobstest.Check(t, s, content)
}
