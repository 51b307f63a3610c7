package kv

import (
	"bytes"
	"os"

	"golang.org/x/sys/unix"
)

// memoryFile is where the kernel says how much memory this process has. It stays
// open: to open it anew costs more than to read it.
type memoryFile struct{ file *os.File }

func openMemoryFile() *memoryFile {
	f, err := os.Open("/proc/self/statm")
	if err != nil {
		return &memoryFile{}
	}
	return &memoryFile{f}
}

// read gives the bytes that are in memory, and those of them that are of mapped
// files.
func (m *memoryFile) read() (resident, files int64, ok bool) {
	if m.file == nil {
		return 0, 0, false
	}
	var buf [128]byte
	n, _ := m.file.ReadAt(buf[:], 0) // it is shorter, so there is always an error
	_, rest, _ := bytes.Cut(buf[:n], []byte(" "))
	second, rest, _ := bytes.Cut(rest, []byte(" "))
	third, _, ok := bytes.Cut(rest, []byte(" "))
	page := int64(os.Getpagesize())
	return decimal(second) * page, decimal(third) * page, ok
}

func (m *memoryFile) close() {
	if m.file != nil {
		m.file.Close()
	}
}

func decimal(digits []byte) (n int64) {
	for _, d := range digits {
		n = 10*n + int64(d-'0')
	}
	return n
}

// unmapPages takes the pages of a mapped file from the process. They stay in the
// kernel's cache, and the next access finds them there.
func unmapPages(at uintptr, size int64) {
	// Advice that is not taken changes nothing.
	_, _, _ = unix.Syscall(unix.SYS_MADVISE, at, uintptr(size), unix.MADV_DONTNEED)
}
