package blobs_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/blobs/blobstest"
	"github.com/atoll-registry/atoll/node/blobs/faultfs"
	"github.com/atoll-registry/atoll/node/fault"
)

func begin(t *testing.T, s *blobs.Store, content []byte) *blobs.Upload {
	t.Helper()
	u, err := s.NewUpload(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Append(t.Context(), bytes.NewReader(content), 0); err != nil {
		t.Fatal(err)
	}
	return u
}

func TestFullDisk(t *testing.T) {
	const mark = 1 << 20
	tests := []struct {
		name     string
		capacity int64
		minFree  int64
	}{
		{"full", 4 << 20, 0},
		{"low-water mark", 24 << 20, mark},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			disk := faultfs.New()
			disk.SetCapacity(test.capacity)
			s := open(t, "/", blobs.Options{FS: disk, Boot: "1", MinFree: test.minFree})
			small := blobstest.Content(1, 100<<10)
			put(t, s, small)

			u := begin(t, s, nil)
			_, err := u.Append(t.Context(), io.LimitReader(zeros{}, 1<<30), 0)
			if !blobstest.Code(err, fault.Limit, blobs.CodeNoSpace) {
				t.Fatalf("a push larger than the disk: %v", err)
			}
			usage, err := s.Usage(t.Context())
			if err != nil || usage.Uploads != 0 {
				t.Fatalf("the refused push keeps %d bytes (%v)", usage.Uploads, err)
			}
			if _, err := s.Upload(u.ID()); !blobstest.Code(err, fault.NotFound, "BLOB_UPLOAD_UNKNOWN") {
				t.Fatalf("the refused session: %v", err)
			}

			// Fill it up by an import that fits, and then nothing more does.
			g, err := s.Staging("import")
			if err != nil {
				t.Fatal(err)
			}
			rest := make([]byte, usage.Free-test.minFree)
			if err := g.Put(t.Context(), digest.FromBytes(rest), int64(len(rest)), bytes.NewReader(rest)); err != nil {
				t.Fatal(err)
			}
			disk.SetCapacity(test.capacity - 1)
			content := blobstest.Content(2, 100<<10)
			d := digest.FromBytes(content)
			if err := g.Put(t.Context(), d, 100<<10, bytes.NewReader(content)); !blobstest.Code(err, fault.Limit, blobs.CodeNoSpace) {
				t.Fatalf("an import on a full disk: %v", err)
			}
			if _, err := s.Put(t.Context(), d, bytes.NewReader(content)); !blobstest.Code(err, fault.Limit, blobs.CodeNoSpace) {
				t.Fatalf("a push on a full disk: %v", err)
			}
			if _, err := s.NewPartial(t.Context(), d, 100<<10); !blobstest.Code(err, fault.Limit, blobs.CodeNoSpace) {
				t.Fatalf("a fetch on a full disk: %v", err)
			}
			blobstest.Check(t, s, small)
			if err := g.Discard(); err != nil {
				t.Fatal(err)
			}
			put(t, s, content)
		})
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func TestUploadLimits(t *testing.T) {
	s := open(t, "/", blobs.Options{FS: faultfs.New(), MaxUpload: 300 << 10, MaxSessions: 2})
	put(t, s, make([]byte, 300<<10))
	u := begin(t, s, make([]byte, 300<<10))
	if _, err := u.Append(t.Context(), strings.NewReader("x"), -1); !blobstest.Code(err, fault.Limit, "SIZE_INVALID") {
		t.Fatalf("one byte too many: %v", err)
	}
	begin(t, s, nil)
	begin(t, s, nil)
	if _, err := s.NewUpload(t.Context()); !blobstest.Code(err, fault.Limit, "TOOMANYREQUESTS") {
		t.Fatalf("one session too many: %v", err)
	}
}

// One request writes at a time; another waits a little, then is told.
func TestBusySession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, "/", blobs.Options{FS: faultfs.New(), Boot: "1"})
		u := begin(t, s, []byte("so"))
		in, out := io.Pipe()
		first := make(chan error)
		go func() {
			_, err := u.Append(t.Context(), in, 2)
			first <- err
		}()
		io.WriteString(out, "me")
		before := time.Now()
		if _, err := u.Append(t.Context(), strings.NewReader("x"), 2); !fault.Is(err, fault.Conflict) || time.Since(before) > 5*time.Second {
			t.Errorf("a second writer: %v after %s", err, time.Since(before))
		}
		if err := u.Cancel(); !fault.Is(err, fault.Conflict) {
			t.Errorf("cancelling under a writer: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := u.Commit(ctx, digest.FromString("some")); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("committing under a writer: %v", err)
		}
		// The first client's connection breaks while the second waits.
		go func() {
			time.Sleep(time.Second) // of the bubble's clock
			out.CloseWithError(io.ErrUnexpectedEOF)
		}()
		go func() { <-first }()
		if _, err := u.Append(t.Context(), strings.NewReader("thing"), -1); err != nil {
			t.Error(err)
		}
		if _, err := u.Commit(t.Context(), digest.FromString("something")); err != nil {
			t.Error(err)
		}
	})
}

func TestProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, "/", blobs.Options{FS: faultfs.New(), Boot: "1"})
		u := begin(t, s, nil)
		start := time.Now()
		in, out := io.Pipe()
		go func() { // a client that sends a byte a second
			for range 60 {
				time.Sleep(time.Second) // of the bubble's clock
				io.WriteString(out, "x")
			}
			out.Close()
		}()
		done := make(chan error)
		go func() {
			_, err := u.Append(t.Context(), in, 0)
			done <- err
		}()
		time.Sleep(30*time.Second + time.Millisecond)
		if _, at := u.Progress(); at.Sub(start) != 30*time.Second {
			t.Errorf("the last byte came at %s, not at 30s", at.Sub(start))
		}
		if err := <-done; err != nil || u.Size() != 60 {
			t.Errorf("%d bytes, %v", u.Size(), err)
		}
	})
}

func TestExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := faultfs.New()
		s := open(t, "/", blobs.Options{FS: disk, Boot: "1"})
		content := blobstest.Content(1, 1000)
		old := begin(t, s, content)
		p, err := s.NewPartial(t.Context(), digest.FromBytes(content), 1000)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.WriteAt(content, 0); err != nil {
			t.Fatal(err)
		}
		expire := func(want int) {
			t.Helper()
			if n, err := s.Expire(t.Context(), time.Hour); n != want || err != nil {
				t.Fatalf("expired %d, %v, want %d", n, err, want)
			}
		}
		time.Sleep(70 * time.Minute) // of the bubble's clock
		expire(1)
		if _, err := s.Upload(old.ID()); !blobstest.Code(err, fault.NotFound, "BLOB_UPLOAD_UNKNOWN") {
			t.Fatalf("an abandoned session: %v", err)
		}
		young := begin(t, s, content[:500])
		time.Sleep(5 * time.Minute)
		expire(0)
		// What paused was saved by Expire: not even a power cut takes it.
		disk.Restart(faultfs.PowerCut, 0)
		s = open(t, "/", blobs.Options{FS: disk, Boot: "2"})
		if young, err = s.Upload(young.ID()); err != nil || young.Size() != 500 {
			t.Fatalf("a paused session after a power cut: %v", err)
		}
		if p, err = s.NewPartial(t.Context(), digest.FromBytes(content), 1000); err != nil {
			t.Fatal(err)
		}
		if _, err := p.WriteAt(content, 0); err != nil {
			t.Fatal(err)
		}
		time.Sleep(59 * time.Minute)
		expire(0)
		if _, err := young.Append(t.Context(), bytes.NewReader(content[500:]), 500); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		expire(0) // the partial is open
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		expire(1)
		if _, err := young.Commit(t.Context(), digest.FromBytes(content)); err != nil {
			t.Fatal(err)
		}
		if left := append(disk.Dump("uploads"), disk.Dump("partials")...); len(left) > 0 {
			t.Fatalf("left behind: %s", left)
		}
	})
}

// A large chunk is durable once it is acknowledged, name and all.
func TestCheckpoint(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, blobs.Options{Boot: "1"})
	u := begin(t, s, nil)
	if _, err := u.Append(t.Context(), io.LimitReader(zeros{}, 64<<20), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := u.Append(t.Context(), strings.NewReader("tail"), 64<<20); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, blobs.Options{Boot: "2"})
	u, err := s.Upload(u.ID())
	if err != nil || u.Size() != 64<<20 {
		t.Fatalf("after a reboot: %v", err)
	}
	sum := sha256.New()
	io.CopyN(sum, zeros{}, 64<<20)
	io.WriteString(sum, "end")
	if _, err := u.Append(t.Context(), strings.NewReader("end"), 64<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := u.Commit(t.Context(), digest.NewDigest(digest.SHA256, sum)); err != nil {
		t.Fatal(err)
	}
}

func TestPartial(t *testing.T) {
	s := open(t, t.TempDir(), blobs.Options{})
	content := blobstest.Content(1, 3*blobs.PieceSize+5)
	d := digest.FromBytes(content)
	size := int64(len(content))
	newPartial := func() *blobs.Partial {
		t.Helper()
		p, err := s.NewPartial(t.Context(), d, size)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	write := func(p *blobs.Partial, i int, b []byte) {
		t.Helper()
		at := i * blobs.PieceSize
		if _, err := p.WriteAt(b[at:min(at+blobs.PieceSize, len(b))], int64(at)); err != nil {
			t.Fatal(err)
		}
		if err := p.MarkPiece(i); err != nil {
			t.Fatal(err)
		}
	}
	p := newPartial()
	if _, err := s.NewPartial(t.Context(), d, size); !fault.Is(err, fault.Conflict) {
		t.Fatalf("a second partial of one blob: %v", err)
	}
	write(p, 3, content)
	write(p, 1, content)
	for _, i := range []int{-1, 4} {
		if err := p.MarkPiece(i); !fault.Is(err, fault.Invalid) || p.Have(i) {
			t.Fatalf("marking piece %d of 4: %v", i, err)
		}
	}
	for _, off := range []int64{-1, size, size - 1, 1 << 62} {
		if _, err := p.WriteAt([]byte("xx"), off); !fault.Is(err, fault.Invalid) {
			t.Fatalf("writing at %d of %d: %v", off, size, err)
		}
	}
	if n, bytes := p.Held(); n != 2 || bytes != blobs.PieceSize+5 {
		t.Fatalf("held %d pieces, %d bytes", n, bytes)
	}
	blobstest.CheckAbsent(t, s, d)
	if err := errors.Join(p.Close(), p.Close()); err != nil {
		t.Fatal(err)
	}

	p = newPartial()
	for i, want := range []bool{false, true, false, true} {
		if p.Have(i) != want {
			t.Fatalf("after reopening, piece %d: %v", i, p.Have(i))
		}
	}
	if _, err := p.Commit(t.Context()); !blobstest.Code(err, fault.Invalid, "DIGEST_INVALID") {
		t.Fatalf("committing half a blob: %v", err)
	}
	if n, _ := p.Held(); n != 2 {
		t.Fatalf("an early Commit left %d pieces", n)
	}
	bad := bytes.Clone(content)
	bad[7] ^= 1
	write(p, 0, bad)
	write(p, 2, content)
	if _, err := p.Commit(t.Context()); !blobstest.Code(err, fault.Invalid, "DIGEST_INVALID") {
		t.Fatalf("committing a wrong piece: %v", err)
	}
	blobstest.CheckAbsent(t, s, d)
	if _, err := p.WriteAt(content[:1], 0); err == nil {
		t.Fatal("writing to a dropped partial")
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}

	p = newPartial()
	if n, _ := p.Held(); n != 0 {
		t.Fatalf("a dropped partial came back with %d pieces", n)
	}
	for i := range 4 {
		write(p, i, content)
	}
	for range 2 {
		if info, err := p.Commit(t.Context()); err != nil || info.Size != size || info.Digest != d {
			t.Fatalf("Commit: %+v, %v", info, err)
		}
	}
	blobstest.Check(t, s, content)
	if _, err := p.WriteAt(bad[:10], 0); err == nil {
		t.Fatal("wrote into a blob")
	}
	got := make([]byte, 10)
	if _, err := p.ReadAt(got, 5); err != nil || !bytes.Equal(got, content[5:15]) {
		t.Fatalf("reading on after Commit: %v", err)
	}
	if err := p.Abort(); err != nil {
		t.Fatal(err)
	}
	blobstest.Check(t, s, content)

	// Another size is another file: a peer may have lied about the first.
	size = blobs.PieceSize
	p = newPartial()
	write(p, 0, content)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	size++
	p = newPartial()
	if n, _ := p.Held(); n != 0 {
		t.Fatalf("%d pieces of a blob of another size", n)
	}
	if err := p.Abort(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.NewPartial(t.Context(), d, -1); !fault.Is(err, fault.Invalid) {
		t.Fatalf("a blob of size -1: %v", err)
	}
	empty, err := s.NewPartial(t.Context(), digest.FromString(""), 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := empty.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	empty.Close()
	blobstest.Check(t, s, nil)
}

func TestStaging(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, blobs.Options{})
	one, two := blobstest.Content(1, 300<<10), blobstest.Content(2, 5)
	d1, d2 := digest.FromBytes(one), digest.FromBytes(two)
	g, err := s.Staging("import-1")
	if err != nil {
		t.Fatal(err)
	}
	broken := errors.New("stick pulled")
	bad := []struct {
		name string
		d    digest.Digest
		size int64
		r    io.Reader
		code string
	}{
		{"longer", d1, 300<<10 - 1, bytes.NewReader(one), "SIZE_INVALID"},
		{"shorter", d1, 300<<10 + 1, bytes.NewReader(one), "SIZE_INVALID"},
		{"altered", d2, 5, strings.NewReader("other"), "DIGEST_INVALID"},
		{"no digest", "sha256:..", 5, strings.NewReader("other"), "DIGEST_INVALID"},
	}
	for _, b := range bad {
		if err := g.Put(t.Context(), b.d, b.size, b.r); !blobstest.Code(err, fault.Invalid, b.code) {
			t.Fatalf("%s: %v", b.name, err)
		}
	}
	if err := g.Put(t.Context(), d1, 300<<10, io.MultiReader(bytes.NewReader(one[:1000]), iotest.ErrReader(broken))); !errors.Is(err, broken) {
		t.Fatalf("a source that breaks off: %v", err)
	}
	if u, err := s.Usage(t.Context()); err != nil || u.Staging != 0 {
		t.Fatalf("refused blobs occupy %d bytes (%v)", u.Staging, err)
	}
	if err := g.Put(t.Context(), d1, 300<<10, bytes.NewReader(one)); err != nil {
		t.Fatal(err)
	}
	blobstest.CheckAbsent(t, s, d1)

	s = open(t, dir, blobs.Options{})
	if ids, err := s.Staged(); err != nil || fmt.Sprint(ids) != "[import-1]" {
		t.Fatalf("staged after a restart: %v, %v", ids, err)
	}
	if g, err = s.Staging("import-1"); err != nil {
		t.Fatal(err)
	}
	if has, err := g.Has(d1); !has || err != nil {
		t.Fatalf("a staged blob after a restart: %v, %v", has, err)
	}
	if has, err := g.Has(d2); has || err != nil {
		t.Fatalf("a blob that was not staged: %v, %v", has, err)
	}
	put(t, s, two) // held already when the import commits
	for range 2 {
		if err := g.Put(t.Context(), d2, 5, bytes.NewReader(two)); err != nil {
			t.Fatal(err)
		}
	}
	f, size, err := g.Open(d1)
	if err != nil || size != 300<<10 {
		t.Fatalf("opening a staged blob: %d, %v", size, err)
	}
	f.Close()
	if err := g.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	blobstest.Check(t, s, one)
	blobstest.Check(t, s, two)
	if ids, err := s.Staged(); err != nil || len(ids) != 0 {
		t.Fatalf("staged after Commit: %v, %v", ids, err)
	}
	if err := g.Discard(); err != nil {
		t.Fatal(err)
	}
}

// syncs counts how often files of uploads are synced.
type syncs struct {
	blobs.FS
	n atomic.Int32
}

type syncedHandle struct {
	blobs.Handle
	n *atomic.Int32
}

func (s *syncs) OpenFile(name string, flag int) (blobs.Handle, error) {
	h, err := s.FS.OpenFile(name, flag)
	if err == nil && strings.HasPrefix(name, "uploads/") {
		h = syncedHandle{h, &s.n}
	}
	return h, err
}

func (h syncedHandle) Sync() error {
	h.n.Add(1)
	return h.Handle.Sync()
}

// Of pushes of one blob at once one writes it to the disk, and who pushes what is
// held waits for no disk at all.
func TestPushesShareTheSync(t *testing.T) {
	disk := &syncs{FS: faultfs.New()}
	s := open(t, "/", blobs.Options{FS: disk, Boot: "1"})
	content := blobstest.Content(9, 5000)
	var all []*blobs.Upload
	for range 6 {
		all = append(all, begin(t, s, content))
	}
	disk.n.Store(0)
	var commits sync.WaitGroup
	for _, u := range all {
		commits.Go(func() {
			if _, err := u.Commit(t.Context(), digest.FromBytes(content)); err != nil {
				t.Error(err)
			}
		})
	}
	commits.Wait()
	if n := disk.n.Load(); n != 1 {
		t.Errorf("six pushes of one blob synced it %d times", n)
	}
	put(t, s, content)
	if n := disk.n.Load(); n != 1 {
		t.Errorf("a push of a held blob synced it again: %d", n)
	}
	blobstest.Check(t, s, content)
}

// What was marked is there after a kill, and after a power cut only what was synced.
func TestPartialAfterAKill(t *testing.T) {
	content := blobstest.Content(1, 10*blobs.PieceSize+5)
	d, size := digest.FromBytes(content), int64(10*blobs.PieceSize+5)
	for _, c := range []struct {
		name string
		loss faultfs.Loss
		boot string
		want int
	}{{"killed", faultfs.Killed, "1", 3}, {"power cut", faultfs.PowerCut, "2", 0}, {"rebooted in peace", faultfs.Killed, "2", 0}} {
		t.Run(c.name, func(t *testing.T) {
			disk := faultfs.New()
			s := open(t, "/", blobs.Options{FS: disk, Boot: "1"})
			p, err := s.NewPartial(t.Context(), d, size)
			if err != nil {
				t.Fatal(err)
			}
			for _, i := range []int{10, 0, 9} {
				at := i * blobs.PieceSize
				if _, err := p.WriteAt(content[at:min(at+blobs.PieceSize, len(content))], int64(at)); err != nil {
					t.Fatal(err)
				}
				if err := p.MarkPiece(i); err != nil {
					t.Fatal(err)
				}
			}
			disk.Restart(c.loss, 0)
			for range 2 { // it stays so: the second start is another one of the same kernel
				s = open(t, "/", blobs.Options{FS: disk, Boot: c.boot})
			}
			if p, err = s.NewPartial(t.Context(), d, size); err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			if n, _ := p.Held(); n != c.want || c.want > 0 && (!p.Have(10) || !p.Have(0) || !p.Have(9)) {
				t.Errorf("%d pieces are marked, want %d", n, c.want)
			}
		})
	}
}
