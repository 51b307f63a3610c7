package node

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/atoll-registry/atoll/node/fault"
)

// maxSocketPath is how long the path of a Unix socket may be on the systems that
// Atoll runs on.
const maxSocketPath = 103

// checkDir refuses a data directory in which no socket can be made.
func checkDir(dir string) error {
	if n := len(filepath.Join(dir, SocketName)); n > maxSocketPath {
		return fault.New(fault.Invalid, "the path of the data directory is %d characters too long for the socket in it: %s; choose a shorter one with --data, relative to the working directory if need be", n-maxSocketPath, dir)
	}
	return nil
}

// lockData makes the data directory and takes it for this process, until the
// file is closed. The kernel frees the lock of a process that was killed.
func lockData(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fault.Wrap(err, fault.Invalid, "the data directory %s cannot be made", dir)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fault.Wrap(err, fault.Invalid, "the data directory %s cannot be used", dir)
	}
	taken, err := tryLock(lock)
	if taken {
		return lock, nil
	}
	lock.Close()
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return nil, fault.New(fault.Conflict, "another node runs with the data directory %s; stop it, or give this one a directory of its own with --data", dir)
}
