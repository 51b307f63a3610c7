package blobs

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// File is an open blob. With the production file system its dynamic type is
// *os.File, so that net/http hands it to the kernel's sendfile: never wrap it
// on its way into http.ServeContent.
type File interface {
	io.ReadSeekCloser
	io.ReaderAt
}

// Handle is an open file of the seam. *os.File implements it.
type Handle interface {
	File
	io.WriterAt
	Sync() error
	Truncate(size int64) error
	Stat() (fs.FileInfo, error)
}

// FS is the seam between the store and the disk: everything that the store asks
// of a file system, so that tests can fail, tear or stop any single step. Names
// are slash paths below the store's directory. Implementations are safe for
// concurrent use. Missing names answer errors that are fs.ErrNotExist, a full
// disk one that is syscall.ENOSPC or EDQUOT.
type FS interface {
	// OpenFile opens a file with os.O_ flags; a new one is private to its owner.
	OpenFile(name string, flag int) (Handle, error)
	// Mkdir makes one directory; one that exists is no error.
	Mkdir(name string) error
	// Rename replaces to. It is atomic, and durable only after SyncDir of to's directory.
	Rename(from, to string) error
	// Remove removes a file or an empty directory.
	Remove(name string) error
	// ReadDir lists the names in a directory, sorted.
	ReadDir(name string) ([]string, error)
	Stat(name string) (fs.FileInfo, error)
	// SyncDir makes the entries of a directory durable.
	SyncDir(name string) error
	// Space gives the bytes that this process may still write and the disk's size.
	Space() (free, total int64, err error)
}

// Disk is the operating system's file system below a directory.
func Disk(dir string) FS { return disk{dir} }

// disk is the operating system's file system below a directory.
type disk struct{ dir string }

func (d disk) path(name string) string { return filepath.Join(d.dir, filepath.FromSlash(name)) }

func (d disk) OpenFile(name string, flag int) (Handle, error) {
	f, err := os.OpenFile(d.path(name), flag, 0o600)
	if err != nil {
		return nil, err // not f: a nil *os.File in an interface is not nil
	}
	return f, nil
}

func (d disk) Mkdir(name string) error {
	err := os.Mkdir(d.path(name), 0o700)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

func (d disk) Rename(from, to string) error          { return os.Rename(d.path(from), d.path(to)) }
func (d disk) Remove(name string) error              { return os.Remove(d.path(name)) }
func (d disk) Stat(name string) (fs.FileInfo, error) { return os.Lstat(d.path(name)) }
func (d disk) Space() (free, total int64, err error) { return space(d.dir) }

func (d disk) ReadDir(name string) ([]string, error) {
	f, err := os.Open(d.path(name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

func (d disk) SyncDir(name string) error {
	f, err := os.Open(d.path(name))
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
