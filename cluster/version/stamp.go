package version

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/atoll-registry/atoll/cluster/atomicfile"
)

// Formats of a data directory. It grows when a version writes files that the one
// before cannot read; what such a version does with a directory of the format
// before (rewrite it, or refuse it) is decided where those files are opened, and
// says so here by OldestFormat.
//
//	1  directories without a StampFile
//	2  state and log in the layouts that cluster/DESIGN.md describes; 1 is refused
//
// A version writes a new format only at sites of the level that it belongs to
// (FormatLevel): before that, the version before may be put back on the directory.
const (
	Format       = 2
	OldestFormat = 2
	FormatLevel  = 1
)

// formatAt is the stamp's own format until the site has reached the level to which
// the newest belongs.
func (s Stamp) formatAt(can reads, belongs, level int) int {
	if max(level, s.Level) >= belongs {
		return can.newest
	}
	return s.Format
}

// StampFile is the file in a data directory that says what the directory is.
const StampFile = "version.json"

// Stamp is the content of StampFile. A node's directory without one has format 1. Fields
// that this version does not know are lost when the file is written anew, which
// happens only after Check has let the directory pass.
type Stamp struct {
	Format  int    `json:"format"`
	Level   int    `json:"level"`   // of the site, as far as the node knows; it only grows
	Program string `json:"program"` // the version that wrote last, for people
}

// reads is what a program can work on.
type reads struct{ oldest, newest, level int }

// Check says, with ErrMismatch, that a data directory is of another version than
// this program can work on. It changes nothing, and a directory that does not
// exist or holds nothing passes. program is this program's version for people.
func Check(dir, program string) error {
	s, err := read(dir)
	if err != nil {
		return err
	}
	return s.check(dir, program, reads{OldestFormat, Format, Level})
}

func (s Stamp) check(dir, program string, can reads) error {
	writer := "an early version"
	if s.Program != "" {
		writer = called(s.Program)
	}
	switch {
	case s.Format > can.newest:
		return fmt.Errorf("%w the data directory %s: it has format %d, written by %s, and this is %s, which knows formats up to %d; start %s or a newer version on it. Nothing was changed",
			ErrMismatch, dir, s.Format, writer, called(program), can.newest, writer)
	case s.Format < can.oldest:
		return fmt.Errorf("%w the data directory %s: it has format %d, written by %s, and this is %s, which knows formats from %d on; start a version in between on it first, or move it away and join anew with --join and --name of this node. Nothing was changed",
			ErrMismatch, dir, s.Format, writer, called(program), can.oldest)
	case s.Level > can.level:
		return fmt.Errorf("%w the data directory %s: its site is at feature level %d, it was last used by %s, and this is %s, which knows levels up to %d; start %s or a newer version on it. Nothing was changed",
			ErrMismatch, dir, s.Level, writer, called(program), can.level, writer)
	}
	return nil
}

// traces are what a directory of a node has, whatever its format.
func traces() []string { return []string{"identity.json", "raft", "meta.db"} }

func read(dir string) (Stamp, error) {
	s := Stamp{Format: OldestFormat, Level: First} // of a directory that is no node's yet
	path := filepath.Join(dir, StampFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		for _, name := range traces() {
			if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
				s.Format = 1
			} else if !errors.Is(err, fs.ErrNotExist) {
				return s, fmt.Errorf("reading the version of the data directory: %w", err)
			}
		}
		return s, nil
	}
	if err != nil {
		return s, fmt.Errorf("reading the version of the data directory: %w", err)
	}
	if err := json.Unmarshal(data, &s); err != nil || s.Format < 1 {
		return s, fmt.Errorf("%s is damaged: if this version of atoll is the one that used the directory last, remove that file; else start the one that did", path)
	}
	return s, nil
}

// Mark writes down that this program uses the directory, at a site of the level
// given, 0 when that is not known. A level that is there stays if it is higher,
// and a program that is there if none is given.
func Mark(dir, program string, level int) error {
	old, err := read(dir)
	if err != nil {
		return err
	}
	s := old.next(reads{OldestFormat, Format, Level}, FormatLevel, program, level)
	if _, err := os.Stat(filepath.Join(dir, StampFile)); err == nil && s == old {
		return nil
	}
	data, err := json.Marshal(s)
	if err == nil {
		err = atomicfile.Write(filepath.Join(dir, StampFile), append(data, '\n'))
	}
	if err != nil {
		return fmt.Errorf("writing the version of the data directory %s: %w", dir, err)
	}
	return nil
}

// next is the stamp that a program writes over this one.
func (s Stamp) next(can reads, belongs int, program string, level int) Stamp {
	return Stamp{Format: s.formatAt(can, belongs, level), Level: max(level, s.Level), Program: cmp.Or(program, s.Program)}
}
