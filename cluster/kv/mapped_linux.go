package kv

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mappedNow is how many bytes of files this process has mapped and in memory.
func mappedNow() (int64, bool) {
	data, err := os.ReadFile("/proc/self/statm")
	fields := strings.Fields(string(data))
	if err != nil || len(fields) < 3 {
		return 0, false
	}
	pages, err := strconv.ParseInt(fields[2], 10, 64)
	return pages * int64(os.Getpagesize()), err == nil
}

// unmapPages takes the pages of a mapped file from the process. They stay in the
// kernel's cache, and the next access finds them there.
func unmapPages(at uintptr, size int64) {
	// Advice that is not taken changes nothing.
	_, _, _ = unix.Syscall(unix.SYS_MADVISE, at, uintptr(size), unix.MADV_DONTNEED)
}
