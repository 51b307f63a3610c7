package blobs_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/blobs/blobstest"
	"github.com/atoll-registry/atoll/node/blobs/faultfs"
	"github.com/atoll-registry/atoll/node/fault"
)

func atOnce(context.Context, int) error { return nil }

// fileOf finds the file of a blob on a disk.
func fileOf(t *testing.T, disk *faultfs.FS, d digest.Digest) string {
	t.Helper()
	for _, name := range disk.Dump("blobs") {
		if strings.HasSuffix(name, d.Encoded()) {
			return name
		}
	}
	t.Fatalf("the disk has no file of blob %s", d)
	return ""
}

// What is damaged is not held from the moment on that it is found, can be
// stored anew, and stays in quarantine until it is discarded.
func TestVerify(t *testing.T) {
	content := blobstest.Content(1, 600<<10)
	d := digest.FromBytes(content)
	damages := map[string]func(disk *faultfs.FS, name string){
		"bit flip":   func(disk *faultfs.FS, name string) { disk.Flip(name, 300<<13+5) },
		"unreadable": func(disk *faultfs.FS, name string) { disk.Spoil(name, syscall.EIO) },
	}
	for kind, damage := range damages {
		t.Run(kind, func(t *testing.T) {
			disk := founded(t)
			s := open(t, "/", blobs.Options{FS: disk, Boot: "1"})
			if _, err := s.Verify(t.Context(), d, atOnce); !fault.Is(err, fault.NotFound) {
				t.Fatalf("Verify of a blob that is not held: %v", err)
			}
			if err := store(t.Context(), s, newHistory(), content); err != nil {
				t.Fatal(err)
			}
			if info, err := s.Verify(t.Context(), d, atOnce); err != nil || info.Size != int64(len(content)) {
				t.Fatalf("Verify of a whole blob: %+v, %v", info, err)
			}
			before, err := s.Usage(t.Context())
			if err != nil || before.Blobs != 1 {
				t.Fatalf("%+v, %v", before, err)
			}
			damage(disk, fileOf(t, disk, d))
			if _, err := s.Verify(t.Context(), d, atOnce); !errors.Is(err, blobs.ErrDamaged) {
				t.Fatalf("Verify of a damaged blob: %v", err)
			}
			blobstest.CheckAbsent(t, s, d)
			disk.Restart(faultfs.PowerCut, 0)
			s = open(t, "/", blobs.Options{FS: disk, Boot: "2"})
			blobstest.CheckAbsent(t, s, d)
			if all, err := s.Quarantined(); err != nil || !slices.Equal(all, []digest.Digest{d}) {
				t.Fatalf("in quarantine are %v, %v", all, err)
			}
			if use, err := s.Usage(t.Context()); err != nil || use.Blobs != 0 || use.Bytes != 0 {
				t.Fatalf("%+v, %v", use, err)
			}
			if _, err := s.Reclaim(t.Context(), d, atOnce); !errors.Is(err, blobs.ErrDamaged) {
				t.Fatalf("Reclaim of a damaged blob: %v", err)
			}
			if err := store(t.Context(), s, newHistory(), content); err != nil {
				t.Fatal(err)
			}
			blobstest.Check(t, s, content)
			for range 2 {
				if err := s.Discard(d); err != nil {
					t.Fatal(err)
				}
			}
			if left := disk.Dump("quarantine"); len(left) > 0 {
				t.Fatalf("left in quarantine: %v", left)
			}
		})
	}
}

// A disk that was unreadable only for a while gives the blob back.
func TestReclaim(t *testing.T) {
	content := blobstest.Content(1, 5000)
	d := digest.FromBytes(content)
	disk := founded(t)
	s := open(t, "/", blobs.Options{FS: disk, Boot: "1"})
	if err := store(t.Context(), s, newHistory(), content); err != nil {
		t.Fatal(err)
	}
	name := fileOf(t, disk, d)
	f, _, err := s.OpenBlob(d)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	disk.Spoil(name, syscall.EIO)
	if _, err := f.ReadAt(make([]byte, 10), 0); !blobs.Unreadable(err) {
		t.Fatalf("reading a bad sector: %v", err)
	}
	if err := s.Quarantine(d, f); err != nil {
		t.Fatal(err)
	}
	blobstest.CheckAbsent(t, s, d)
	disk.Spoil(disk.Dump("quarantine")[0], nil)
	if _, err := s.Reclaim(t.Context(), d, atOnce); err != nil {
		t.Fatal(err)
	}
	disk.Restart(faultfs.PowerCut, 0)
	s = open(t, "/", blobs.Options{FS: disk, Boot: "2"})
	blobstest.Check(t, s, content)
	if _, err := s.Reclaim(t.Context(), d, atOnce); !fault.Is(err, fault.NotFound) {
		t.Fatalf("Reclaim of what is not in quarantine: %v", err)
	}
}

// Whoever met damage in a file does not take away the one that replaced it.
func TestQuarantineSparesTheNewFile(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, blobs.Options{})
	content := blobstest.Content(1, 5000)
	d := digest.FromBytes(content)
	put := func() {
		t.Helper()
		if _, err := s.Put(t.Context(), d, bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
	}
	put()
	f, _, err := s.OpenBlob(d)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := s.Remove(d); err != nil {
		t.Fatal(err)
	}
	put()
	if err := s.Quarantine(d, f); err != nil {
		t.Fatal(err)
	}
	blobstest.Check(t, s, content)
	// On a real disk, found and replaced by the next push.
	name := filepath.Join(dir, "blobs", "sha256", d.Encoded()[:2], d.Encoded())
	if err := os.WriteFile(name, content[:4999], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Verify(t.Context(), d, atOnce); !errors.Is(err, blobs.ErrDamaged) {
		t.Fatalf("Verify of a file that was cut: %v", err)
	}
	put()
	blobstest.Check(t, s, content)
}

// Where the disk refuses even the quarantine, the blob is not shown all the same.
func TestQuarantineRefused(t *testing.T) {
	content := blobstest.Content(1, 5000)
	d := digest.FromBytes(content)
	disk := founded(t)
	s := open(t, "/", blobs.Options{FS: disk, Boot: "1"})
	if err := store(t.Context(), s, newHistory(), content); err != nil {
		t.Fatal(err)
	}
	disk.Flip(fileOf(t, disk, d), 9)
	disk.Inject(disk.Steps()+5, faultfs.Fault{Err: syscall.EROFS}) // the making of the quarantine
	if _, err := s.Verify(t.Context(), d, atOnce); !errors.Is(err, blobs.ErrDamaged) {
		t.Fatalf("Verify of a damaged blob: %v", err)
	}
	blobstest.CheckAbsent(t, s, d)
	if err := store(t.Context(), s, newHistory(), content); err != nil {
		t.Fatal(err)
	}
	blobstest.Check(t, s, content)
}
