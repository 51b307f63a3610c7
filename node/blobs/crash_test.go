package blobs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/blobs/blobstest"
	"github.com/atoll-registry/atoll/node/blobs/faultfs"
)

// history is what a scenario was told, for the check after the crash.
type history struct {
	stored  map[digest.Digest][]byte // successes of the store
	removed map[digest.Digest]bool   // removals asked for since
	upload  string                   // a session, of uploadContent
	partial []byte                   // a fetch of this content
}

func (h *history) success(content []byte) {
	d := digestOf(content)
	h.stored[d] = content
	delete(h.removed, d)
}

// digestOf is the digest that scenarios give a content: by one algorithm or the
// other, as its first byte has it.
func digestOf(content []byte) digest.Digest {
	return entry.Algorithms()[content[0]%2].FromBytes(content)
}

// of512 gives n bytes that digestOf addresses by sha512.
func of512(seed uint64, n int) []byte {
	content := blobstest.Content(seed, n)
	content[0] |= 1
	return content
}

type scenario func(ctx context.Context, s *blobs.Store, h *history) error

var scenarios = map[string]scenario{
	"put": func(ctx context.Context, s *blobs.Store, h *history) error {
		return store(ctx, s, h, blobstest.Content(1, 3000))
	},
	"held": func(ctx context.Context, s *blobs.Store, h *history) error {
		content := blobstest.Content(2, 3000)
		err := store(ctx, s, h, content)
		return errors.Join(err, store(ctx, s, h, content))
	},
	"stat": func(ctx context.Context, s *blobs.Store, h *history) error {
		content := blobstest.Content(2, 3000)
		d := digestOf(content)
		if _, err := s.Stat(d); err == nil {
			h.success(content) // a push asks first, and then sends only the manifest
			return nil
		}
		return store(ctx, s, h, content)
	},
	"chunks": chunks,
	"remove": func(ctx context.Context, s *blobs.Store, h *history) error {
		content := blobstest.Content(3, 2000)
		if err := store(ctx, s, h, content); err != nil {
			return err
		}
		h.removed[digestOf(content)] = true
		if err := s.Remove(digestOf(content)); err != nil {
			return err
		}
		return store(ctx, s, h, content)
	},
	"fetch": fetch,
	"stage": stage,
}

func store(ctx context.Context, s *blobs.Store, h *history, content []byte) error {
	_, err := s.Put(ctx, digestOf(content), bytes.NewReader(content))
	if err == nil {
		h.success(content)
	}
	return err
}

// chunks pushes in three parts, with a checkpoint after the first.
func chunks(ctx context.Context, s *blobs.Store, h *history) error {
	content := of512(4, 5000)
	u, err := s.NewUpload(ctx)
	if err != nil {
		return err
	}
	u.Expect(digest.SHA512)
	h.upload = u.ID()
	if _, err := u.Append(ctx, bytes.NewReader(content[:2000]), 0); err != nil {
		return err
	}
	if err := s.Close(); err != nil {
		return err
	}
	for at := 2000; at < len(content); at += 1500 {
		if _, err := u.Append(ctx, bytes.NewReader(content[at:at+1500]), int64(at)); err != nil {
			return err
		}
	}
	if _, err := u.Commit(ctx, digestOf(content)); err != nil {
		return err
	}
	h.success(content)
	h.upload = ""
	return nil
}

func fetch(ctx context.Context, s *blobs.Store, h *history) error {
	content := blobstest.Content(5, blobs.PieceSize+1000)
	h.partial = content
	write := func(p *blobs.Partial, i int) error {
		at := i * blobs.PieceSize
		if _, err := p.WriteAt(content[at:min(at+blobs.PieceSize, len(content))], int64(at)); err != nil {
			return err
		}
		return p.MarkPiece(i)
	}
	for _, round := range [][]int{{1}, {0}} {
		p, err := s.NewPartial(ctx, digestOf(content), int64(len(content)))
		if err != nil {
			return err
		}
		for _, i := range round {
			err = errors.Join(err, write(p, i))
		}
		if err == nil && round[0] == 0 {
			if _, err = p.Commit(ctx); err == nil {
				h.success(content)
			}
		}
		if err := errors.Join(err, p.Close()); err != nil {
			return err
		}
	}
	return nil
}

func stage(ctx context.Context, s *blobs.Store, h *history) error {
	g, err := s.Staging("import-1")
	if err != nil {
		return err
	}
	contents := [][]byte{blobstest.Content(6, 1000), of512(7, 2000)}
	for _, content := range contents {
		if err := g.Put(ctx, digestOf(content), int64(len(content)), bytes.NewReader(content)); err != nil {
			return err
		}
	}
	if err := g.Commit(ctx); err != nil {
		return err
	}
	for _, content := range contents {
		h.success(content)
	}
	return nil
}

// verify checks what must hold after any failure.
func verify(t *testing.T, s *blobs.Store, h *history) {
	t.Helper()
	for d, content := range h.stored {
		if !h.removed[d] {
			blobstest.CheckAs(t, s, d, content)
		}
	}
	visible, err := s.List("", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range visible {
		f, _, err := s.OpenBlob(d)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(f)
		if got := d.Algorithm().FromBytes(b); err != nil || got != d {
			t.Fatalf("visible blob %s has the bytes of %s (%d, %v)", d, got, len(b), err)
		}
		f.Close()
	}
	if p := h.partial; p != nil {
		checkPartial(t, s, p)
	}
}

// checkPartial checks that a reopened partial vouches only for what it has.
func checkPartial(t *testing.T, s *blobs.Store, content []byte) {
	t.Helper()
	p, err := s.NewPartial(t.Context(), digestOf(content), int64(len(content)))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for i := range 2 {
		at := i * blobs.PieceSize
		piece := content[at:min(at+blobs.PieceSize, len(content))]
		got := make([]byte, len(piece))
		if !p.Have(i) {
			continue
		}
		if _, err := p.ReadAt(got, int64(at)); (err != nil && err != io.EOF) || !bytes.Equal(got, piece) {
			t.Fatalf("piece %d is marked and wrong (%v)", i, err)
		}
	}
}

// resume goes on with the session of chunks, if the store still has it: what it
// holds must be the beginning of what was sent.
func resume(t *testing.T, s *blobs.Store, h *history) {
	t.Helper()
	u, err := s.Upload(h.upload)
	if err != nil {
		return
	}
	content := of512(4, 5000)
	if u.Size() > 5000 {
		t.Fatalf("the session holds %d bytes of 5000", u.Size())
	}
	if _, err := u.Append(t.Context(), bytes.NewReader(content[u.Size():]), u.Size()); err != nil {
		t.Fatal(err)
	}
	if _, err := u.Commit(t.Context(), digestOf(content)); err != nil {
		t.Fatal(err)
	}
	h.success(content)
}

// restart is what happens to the machine after a crash.
type restart struct {
	name string
	loss faultfs.Loss
	seed uint64
	boot string
}

var losses = []restart{
	{"killed", faultfs.Killed, 0, "1"},
	{"power cut", faultfs.PowerCut, 0, "2"},
	{"torn 1", faultfs.Torn, 1, "2"},
	{"torn 2", faultfs.Torn, 2, "2"},
	{"torn 3", faultfs.Torn, 3, "2"},
}

// next goes through the steps; far out are only the 256 alike ones that sync
// every directory of blobs, and it takes few of them.
func next(step int) int {
	if step < 40 {
		return step + 1
	}
	return step + 37
}

// founded is a disk with an empty store on it.
func founded(t *testing.T) *faultfs.FS {
	disk := faultfs.New()
	open(t, "/", blobs.Options{FS: disk, Boot: "1"})
	return disk
}

func newHistory() *history {
	return &history{stored: map[digest.Digest][]byte{}, removed: map[digest.Digest]bool{}}
}

// Every scenario is stopped before each of its steps, the disk loses what a kill
// or a power cut takes, and the store is opened again.
func TestCrashAtEveryStep(t *testing.T) {
	base := founded(t)
	for name, run := range scenarios {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, l := range losses {
				for step := 0; ; step = next(step) {
					disk := base.Clone()
					s := open(t, "/", blobs.Options{FS: disk, Boot: "1"})
					disk.Inject(disk.Steps()+step, faultfs.Fault{Crash: true, Short: step * 37})
					h := newHistory()
					err := run(t.Context(), s, h)
					if !disk.Crashed() {
						if err != nil {
							t.Fatalf("without a fault: %v", err)
						}
						if step < 6 {
							t.Fatalf("the scenario has only %d steps", step)
						}
						break
					}
					afterCrash(t, disk, h, run, restart{fmt.Sprintf("%s before step %d", l.name, step), l.loss, l.seed + uint64(step)<<8, l.boot})
				}
			}
		})
	}
}

func afterCrash(t *testing.T, disk *faultfs.FS, h *history, run scenario, r restart) {
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Logf("%s; files: %s", r.name, strings.Join(disk.Dump("."), " "))
		}
	}()
	disk.Restart(r.loss, r.seed)
	s := open(t, "/", blobs.Options{FS: disk, Boot: r.boot})
	verify(t, s, h)
	resume(t, s, h)
	verify(t, s, h)
	// The client tries again, and then the power goes.
	if err := run(t.Context(), s, h); err != nil {
		t.Fatalf("%s: again: %v", r.name, err)
	}
	disk.Restart(faultfs.PowerCut, 0)
	s = open(t, "/", blobs.Options{FS: disk, Boot: "3"})
	verify(t, s, h)
	clean(t, s, disk)
}

// clean checks that nothing unfinished is left once all has expired.
func clean(t *testing.T, s *blobs.Store, disk *faultfs.FS) {
	t.Helper()
	if _, err := s.Expire(t.Context(), -time.Hour); err != nil {
		t.Fatal(err)
	}
	ids, err := s.Staged()
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		if g, err := s.Staging(id); err != nil || g.Discard() != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{"uploads", "partials", "staging"} {
		if left := disk.Dump(dir); len(left) > 0 {
			t.Fatalf("left behind: %s", left)
		}
	}
}

// The machine stops a second time while the store is being opened.
func TestCrashWhileRecovering(t *testing.T) {
	base := founded(t)
	for name, run := range scenarios {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for first := 3; ; first = next(first + 4) {
				disk := base.Clone()
				s := open(t, "/", blobs.Options{FS: disk, Boot: "1"})
				disk.Inject(disk.Steps()+first, faultfs.Fault{Crash: true})
				h := newHistory()
				_ = run(t.Context(), s, h)
				if !disk.Crashed() {
					return
				}
				disk.Restart(faultfs.Torn, uint64(first))
				for second := 0; ; second = next(second) {
					twice := disk.Clone()
					twice.Inject(second, faultfs.Fault{Crash: true})
					if _, err := blobs.Open("/", blobs.Options{FS: twice, Boot: "2"}); err == nil {
						break
					}
					own := newHistory()
					for d, content := range h.stored {
						own.stored[d] = content
					}
					own.removed, own.upload, own.partial = h.removed, h.upload, h.partial
					afterCrash(t, twice, own, run, restart{fmt.Sprintf("first %d second %d", first, second), faultfs.Torn, uint64(second), "3"})
				}
			}
		})
	}
}

// What vouches for bytes after a power cut, a checkpoint or a list of pieces, is
// never ahead of them.
func TestTornWritesAreNotVouchedFor(t *testing.T) {
	base := founded(t)
	content := blobstest.Content(5, blobs.PieceSize+1000)
	resumed, pieces := 0, 0
	for seed := range uint64(150) {
		disk := base.Clone()
		s := open(t, "/", blobs.Options{FS: disk, Boot: "1"})
		u, err := s.NewUpload(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		h := newHistory()
		h.upload, h.partial = u.ID(), content
		if _, err := u.Append(t.Context(), bytes.NewReader(of512(4, 5000)[:2000]), 0); err != nil {
			t.Fatal(err)
		}
		p, err := s.NewPartial(t.Context(), digestOf(content), int64(len(content)))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.WriteAt(content, 0); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(p.MarkPiece(0), p.MarkPiece(1), p.Close(), s.Close()); err != nil {
			t.Fatal(err)
		}
		disk.Restart(faultfs.Torn, seed)
		s = open(t, "/", blobs.Options{FS: disk, Boot: "2"})
		if u, err := s.Upload(u.ID()); err == nil && u.Size() > 0 {
			resumed++
		}
		if p, err := s.NewPartial(t.Context(), digestOf(content), int64(len(content))); err != nil {
			t.Fatal(err)
		} else {
			n, _ := p.Held()
			pieces += n
			p.Close()
		}
		resume(t, s, h)
		verify(t, s, h)
	}
	if resumed == 0 || pieces == 0 {
		t.Fatalf("no case in which anything was kept (%d sessions, %d pieces)", resumed, pieces)
	}
}

// The machine stops while an empty store is being laid out.
func TestCrashWhileFounding(t *testing.T) {
	total := founded(t).Steps()
	for step := 0; step < total; step += 1 + step%29 {
		for _, l := range losses {
			disk := faultfs.New()
			disk.Inject(step, faultfs.Fault{Crash: true, Short: 5})
			if _, err := blobs.Open("/", blobs.Options{FS: disk, Boot: "1"}); err == nil {
				t.Fatalf("opened although the machine stopped before step %d", step)
			}
			disk.Restart(l.loss, l.seed)
			h := newHistory()
			if err := scenarios["put"](t.Context(), open(t, "/", blobs.Options{FS: disk, Boot: l.boot}), h); err != nil {
				t.Fatal(err)
			}
			disk.Restart(faultfs.PowerCut, 0)
			verify(t, open(t, "/", blobs.Options{FS: disk, Boot: "3"}), h)
		}
	}
}

// Every step fails once; the process goes on.
func TestFaultAtEveryStep(t *testing.T) {
	base := founded(t)
	faults := map[string]faultfs.Fault{
		"EIO":         {Err: syscall.EIO},
		"ENOSPC":      {Err: syscall.ENOSPC, Short: 100},
		"short write": {Short: 50},
	}
	for name, run := range scenarios {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for kind, f := range faults {
				for step := 0; ; step = next(step) {
					disk := base.Clone()
					s := open(t, "/", blobs.Options{FS: disk, Boot: "1"})
					at := disk.Steps() + step
					disk.Inject(at, f)
					h := newHistory()
					err := run(t.Context(), s, h)
					if disk.Steps() <= at {
						if err != nil {
							t.Fatalf("without a fault: %v", err)
						}
						break
					}
					verify(t, s, h)
					resume(t, s, h)
					if err := run(t.Context(), s, h); err != nil {
						t.Fatalf("%s at step %d, then again: %v", kind, step, err)
					}
					verify(t, s, h)
					disk.Restart(faultfs.PowerCut, 0)
					s = open(t, "/", blobs.Options{FS: disk, Boot: "2"})
					verify(t, s, h)
					clean(t, s, disk)
				}
			}
		})
	}
}
