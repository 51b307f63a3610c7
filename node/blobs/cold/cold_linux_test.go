package cold_test

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/atoll-registry/atoll/node/blobs/cold"
)

// resident counts the pages of a file that are in memory.
func resident(t *testing.T, f *os.File, size int) (n int) {
	t.Helper()
	m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(m) }()
	page := os.Getpagesize()
	in := make([]byte, (size+page-1)/page)
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(size), uintptr(unsafe.Pointer(&in[0]))); errno != 0 {
		t.Fatal(errno)
	}
	for _, b := range in {
		n += int(b & 1)
	}
	return n
}

// What was not in memory is not there after reading it, and what was is.
func TestReader(t *testing.T) {
	content := bytes.Repeat([]byte("atoll123"), 4<<20/8)
	name := filepath.Join(t.TempDir(), "blob")
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil { // dirty pages cannot be dropped
		t.Fatal(err)
	}
	all := resident(t, f, len(content))
	read := func() {
		got, err := io.ReadAll(io.NewSectionReader(cold.Reader(f), 0, int64(len(content))))
		if err != nil || !bytes.Equal(got, content) {
			t.Fatalf("reads as %d bytes, %v", len(got), err)
		}
	}
	read()
	if now := resident(t, f, len(content)); now < all*9/10 {
		t.Errorf("%d of %d pages that were in memory are left", now, all)
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	if before := resident(t, f, len(content)); before > all/10 {
		t.Skipf("this file system keeps %d of %d pages in memory whatever it is told", before, all)
	}
	read()
	// The kernel does not drop pages that a processor still has on its list of new
	// ones; without the reader all of them would be there.
	if now := resident(t, f, len(content)); now > all/3 {
		t.Errorf("%d of %d pages are in memory after reading them cold", now, all)
	}
}
