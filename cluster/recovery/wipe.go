package recovery

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/atoll-registry/atoll/cluster/atomicfile"
	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/version"
)

// wiped are the names that make a directory that of a node, in the order in
// which they go. What a machine promised to those with whom it founds a site goes
// before its identity: without that, the rest of its promise would say that it never
// founded. The identity is next: without it nothing starts on the rest.
// The state is before the log, and the log last, because a directory with a log
// and no identity is refused by all but another Wipe. Behind it goes only what
// says which version of the program wrote the rest.
func wiped() []string {
	names := slices.DeleteFunc(member.Files(), func(name string) bool { return name == version.StampFile })
	names = slices.DeleteFunc(names, func(name string) bool { return name == member.MachineFile })
	names = append([]string{member.MachineFile}, names...)
	return append(names, planFile, buildDir, stateFile, stateFile+".new", epoch.File, epoch.FencedFile, raftDir, version.StampFile)
}

// Wipe makes the data directory that of a node which has never been a member of
// a site. Blobs stay, and what earlier recoveries kept. Cut short, it is to be
// run again; nothing else can be done with the directory then.
func Wipe(dir string) (removed []string, err error) {
	return wipe(dir, func(string) error { return nil })
}

func wipe(dir string, at func(string) error) (removed []string, err error) {
	for _, name := range wiped() {
		path := filepath.Join(dir, name)
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return removed, err
		}
		if err := os.RemoveAll(path); err != nil {
			return removed, fmt.Errorf("wiping %s: %w", path, err)
		}
		if err := errors.Join(atomicfile.SyncDir(dir), at(name)); err != nil {
			return removed, err
		}
		removed = append(removed, name)
	}
	return removed, nil
}
