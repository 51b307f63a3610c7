//go:build !unix

package node

import (
	"errors"
	"os"
)

// tryLock: nodes run on Unix systems; elsewhere the binary is for its client
// commands.
func tryLock(*os.File) (taken bool, err error) {
	return false, errors.New("a node does not run on this system; its commands that talk to a node or work on a bundle do")
}

func ownerOnly(uintptr) {}

// openFiles is how many files this process may have open; 0: not known.
func openFiles() int { return 0 }
