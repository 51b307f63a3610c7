package cold

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

type file struct{ *os.File }

// reader switches read-ahead off for this open file: pages that it brings in
// unasked could not be told from those that others use.
func reader(f io.ReaderAt) io.ReaderAt {
	real, ok := f.(*os.File)
	if !ok || unix.Fadvise(int(real.Fd()), 0, 0, unix.FADV_RANDOM) != nil {
		return f
	}
	return file{real}
}

// ReadAt implements io.ReaderAt.
func (f file) ReadAt(p []byte, off int64) (int, error) {
	fd := int(f.Fd())
	// Not waiting for the disk succeeds when all of it is in memory.
	if n, err := unix.Preadv2(fd, [][]byte{p}, off, unix.RWF_NOWAIT); err == nil && n == len(p) {
		return n, nil
	}
	n, err := f.File.ReadAt(p, off)
	if n > 0 {
		_ = unix.Fadvise(fd, off, int64(n), unix.FADV_DONTNEED) // no more than advice
	}
	return n, err
}
