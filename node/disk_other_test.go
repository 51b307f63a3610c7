//go:build unix && !linux

package node

import (
	"errors"
	"os/exec"
)

func ownDisks(*exec.Cmd) {}

func mountDisk(string, string) error {
	return errors.New("a disk of its own for a process is known to this test on Linux only")
}
