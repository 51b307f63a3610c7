//go:build unix

package node

import (
	"errors"
	"os"
	"syscall"
)

// tryLock takes a file for this process; false when another one has it. The
// kernel frees the lock of a process that was killed.
func tryLock(f *os.File) (taken bool, err error) {
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return false, nil
	}
	return err == nil, err
}

// ownerOnly keeps others from a socket that has no name yet. Linux gives the
// name this mode; where it does not work, the caller's Chmod has to do.
func ownerOnly(fd uintptr) { _ = syscall.Fchmod(int(fd), 0o600) }

// openFiles is how many files this process may have open; 0: not known.
func openFiles() int {
	var most syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &most); err != nil {
		return 0
	}
	return int(min(most.Cur, 1<<30))
}
