package node

import (
	"os"
	"os/exec"
	"syscall"
)

// ownDisks gives a process disks that nobody else sees. It takes no rights: the
// process is root in a user namespace of its own.
func ownDisks(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
}

// mountDisk makes a small disk for a directory.
func mountDisk(dir, size string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return syscall.Mount("none", dir, "tmpfs", 0, "size="+size)
}
