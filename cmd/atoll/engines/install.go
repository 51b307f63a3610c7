package engines

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

const (
	recordName   = "atoll-mirror.json"
	backupSuffix = ".before-atoll"
)

// record is what was written for an engine, and what was there before.
type record struct {
	Files []recorded `json:"files"`
	Dirs  []string   `json:"dirs"` // that were made, parents first
}

type recorded struct {
	Path   string `json:"path"`
	Before string `json:"before"` // SHA-256 of the file before Atoll; "" when there was none
	// Written are the SHA-256 that the file may have now: more than one only when
	// writing was interrupted.
	Written []string `json:"written"`
}

func (r *record) find(name string) *recorded {
	for i := range r.Files {
		if r.Files[i].Path == name {
			return &r.Files[i]
		}
	}
	return nil
}

// Step is what was done to a file.
type Step struct {
	Path string `json:"path"`
	Did  string `json:"did"` // wrote, merged, kept (as it was), restored or removed
}

// installer works on one engine's files below a root directory.
type installer struct {
	root   string // "" is the machine's own
	engine string
	dir    string
}

// Write installs a plan below root ("" is the machine itself) and says what it
// did. Repeating it changes nothing; another plan takes the place of the first.
func Write(root string, p Plan) ([]Step, error) {
	files, _, err := Files(p)
	if err != nil {
		return nil, err
	}
	in, err := newInstaller(root, p.Engine)
	if err != nil {
		return nil, err
	}
	old, err := in.load()
	if err != nil {
		return nil, err
	}
	if err := in.unchanged(old); err != nil {
		return nil, err
	}
	next := record{Dirs: old.Dirs}
	contents := map[string][]byte{}
	for _, f := range files {
		before, err := in.before(old, f.Path)
		if err != nil {
			return nil, err
		}
		content, err := f.merge(before)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.Path, err)
		}
		contents[f.Path] = content
		entry := recorded{Path: f.Path, Written: []string{sum(content)}}
		if before != nil {
			entry.Before = sum(before)
		}
		next.Files = append(next.Files, entry)
	}
	return in.apply(old, next, contents)
}

// apply brings the files from what one record says to what the next does.
func (in installer) apply(old, next record, contents map[string][]byte) (steps []Step, err error) {
	if err := in.mkdirs(&next); err != nil {
		return nil, err
	}
	// On the way both records hold.
	both := record{Dirs: next.Dirs, Files: slices.Clone(next.Files)}
	for i := range both.Files {
		if e := old.find(both.Files[i].Path); e != nil {
			both.Files[i].Written = append(slices.Clone(e.Written), both.Files[i].Written...)
		}
	}
	for _, e := range old.Files {
		if next.find(e.Path) == nil {
			both.Files = append(both.Files, e)
		}
	}
	for _, e := range next.Files {
		if e.Before != "" && old.find(e.Path) == nil {
			if err := in.backup(e.Path); err != nil {
				return nil, err
			}
		}
	}
	if err := in.save(both); err != nil {
		return nil, err
	}
	for _, e := range old.Files {
		if next.find(e.Path) == nil {
			step, err := in.restore(e)
			if err != nil {
				return steps, err
			}
			steps = append(steps, step)
		}
	}
	for _, e := range next.Files {
		step, err := in.put(e, contents[e.Path])
		if err != nil {
			return steps, err
		}
		steps = append(steps, step)
	}
	return steps, in.save(next)
}

// Undo gives back what was there before Atoll, below root.
func Undo(root, engine string) (steps []Step, err error) {
	in, err := newInstaller(root, engine)
	if err != nil {
		return nil, err
	}
	old, err := in.load()
	if err != nil {
		return nil, err
	}
	if err := in.unchanged(old); err != nil {
		return nil, err
	}
	for _, e := range old.Files {
		step, err := in.restore(e)
		if err != nil {
			return steps, err
		}
		steps = append(steps, step)
	}
	if err := os.Remove(in.record()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return steps, err
	}
	for _, dir := range slices.Backward(old.Dirs) {
		_ = os.Remove(in.real(dir)) // one that holds something else stays
	}
	return steps, nil
}

func newInstaller(root, engine string) (installer, error) {
	dir, err := directory(engine)
	return installer{root, engine, dir}, err
}

// real is where a file is on this machine.
func (in installer) real(name string) string {
	return filepath.Join(in.root+string(filepath.Separator), filepath.FromSlash(name))
}

func (in installer) record() string { return in.real(path.Join(in.dir, recordName)) }

func (in installer) load() (r record, err error) {
	data, err := os.ReadFile(in.record())
	if errors.Is(err, fs.ErrNotExist) {
		return record{}, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &r)
	}
	if err != nil {
		return r, fmt.Errorf("read what was written before, in %s: %w", in.record(), err)
	}
	return r, nil
}

func (in installer) save(r record) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return replace(in.record(), append(data, '\n'), 0o644)
}

// unchanged refuses when somebody has changed a file since it was written.
func (in installer) unchanged(r record) error {
	for _, e := range r.Files {
		now, err := in.sum(e.Path)
		if err != nil {
			return err
		}
		if now != e.Before && !slices.Contains(e.Written, now) {
			kept := "there was none before"
			if e.Before != "" {
				kept = "the one before is " + e.Path + backupSuffix
			}
			return fmt.Errorf("%s was changed since Atoll wrote it (%s): bring it to what you want, then remove %s", e.Path, kept, in.record())
		}
	}
	return nil
}

// sum is the SHA-256 of a file, "" of none.
func (in installer) sum(name string) (string, error) {
	data, err := in.read(name)
	if err != nil || data == nil {
		return "", err
	}
	return sum(data), nil
}

// read gives a file's content, not nil; nil when there is no file.
func (in installer) read(name string) ([]byte, error) {
	data, err := os.ReadFile(in.real(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if data == nil {
		data = []byte{}
	}
	return data, err
}

func sum(data []byte) string {
	s := sha256.Sum256(data)
	return hex.EncodeToString(s[:])
}

// before gives a file as it was before Atoll.
func (in installer) before(r record, name string) ([]byte, error) {
	e := r.find(name)
	if e == nil {
		return in.read(name)
	}
	if e.Before == "" {
		return nil, nil
	}
	for _, candidate := range []string{name + backupSuffix, name} {
		data, err := in.read(candidate)
		if err != nil {
			return nil, err
		}
		if data != nil && sum(data) == e.Before {
			return data, nil
		}
	}
	return nil, fmt.Errorf("%s, which keeps the file from before Atoll, is gone or changed; bring %s to what you want, then remove %s", name+backupSuffix, name, in.record())
}

// backup keeps a file as it is: the very file, with its owner and mode, where the
// file system can.
func (in installer) backup(name string) error {
	from, to := in.real(name), in.real(name+backupSuffix)
	err := os.Link(from, to)
	if err == nil {
		return nil
	}
	data, readErr := in.read(name)
	if readErr != nil {
		return readErr
	}
	if errors.Is(err, fs.ErrExist) {
		if kept, err := in.read(name + backupSuffix); err != nil || bytes.Equal(kept, data) {
			return err
		}
		return fmt.Errorf("%s is in the way: it would keep the file from before Atoll; move it", to)
	}
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	return replace(to, data, info.Mode().Perm())
}

// put writes a file unless it is as it should be.
func (in installer) put(e recorded, content []byte) (Step, error) {
	step := Step{e.Path, "kept"}
	if now, err := in.sum(e.Path); err != nil || now == sum(content) {
		return step, err
	}
	mode := fs.FileMode(0o644)
	step.Did = "wrote"
	if e.Before != "" {
		step.Did = "merged"
		if info, err := os.Stat(in.real(e.Path)); err == nil {
			mode = info.Mode().Perm()
		}
	}
	return step, replace(in.real(e.Path), content, mode)
}

// restore gives back the file from before Atoll.
func (in installer) restore(e recorded) (Step, error) {
	name := in.real(e.Path)
	if e.Before == "" {
		err := os.Remove(name)
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return Step{e.Path, "removed"}, err
	}
	backup := in.real(e.Path + backupSuffix)
	kept, err := in.sum(e.Path + backupSuffix)
	if err != nil {
		return Step{}, err
	}
	if kept != e.Before {
		now, err := in.sum(e.Path)
		if err == nil && now != e.Before {
			err = fmt.Errorf("%s, which keeps the file from before Atoll, is gone or changed; bring %s to what you want, then remove %s", backup, e.Path, in.record())
		}
		return Step{e.Path, "kept"}, err
	}
	// Two names of one file would both stay after a rename.
	if now, err := in.sum(e.Path); err == nil && now == e.Before {
		return Step{e.Path, "restored"}, os.Remove(backup)
	}
	if err := os.Rename(backup, name); err != nil {
		return Step{}, err
	}
	return Step{e.Path, "restored"}, syncDir(filepath.Dir(name))
}

// mkdirs makes the directories of the files and notes which ones.
func (in installer) mkdirs(r *record) error {
	for _, e := range append(slices.Clone(r.Files), recorded{Path: path.Join(in.dir, recordName)}) {
		dir := path.Dir(e.Path)
		parts := strings.Split(strings.Trim(dir, "/"), "/")
		for i := range parts {
			at := "/" + strings.Join(parts[:i+1], "/")
			err := os.Mkdir(in.real(at), 0o755)
			switch {
			case err == nil:
				r.Dirs = append(r.Dirs, at)
			case !errors.Is(err, fs.ErrExist):
				return err
			}
		}
	}
	return nil
}

// replace replaces a file in one step, durably.
func replace(name string, data []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".atoll-*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncDir(filepath.Dir(name))
}

func syncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	err = d.Sync()
	if errors.Is(err, errors.ErrUnsupported) || os.PathSeparator == '\\' {
		err = nil // Windows has no such thing
	}
	return errors.Join(err, d.Close())
}
