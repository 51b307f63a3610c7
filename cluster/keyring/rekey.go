package keyring

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"github.com/atoll-registry/atoll/cluster/atomicfile"
)

// RekeyFile holds the files of a node as they are to become, from the moment at which
// that is decided until all are in place.
const RekeyFile = "rekey.json"

// planJSON is the content of RekeyFile, which is sealed by the new provider.
type planJSON struct {
	Format int        `json:"format"`
	Files  []planFile `json:"files"`
}

type planFile struct {
	Name string `json:"name"`
	Data []byte `json:"data"` // as the file will lie on the disk
}

// Rekeying gives the files of a directory another provider.
type Rekeying struct {
	Dir   string
	Names []string // of the protected files; those that are not there stay away
	From  *Ring
	To    *Ring // has a key for RekeyFile too

	// Step is called after each thing that was made durable; its error ends the
	// work there, as a crash would. For tests; nil otherwise.
	Step func(name string) error
}

// Run does it. Cut short before RekeyFile is written it has changed nothing, later it
// is to be brought to its end by Finish. The caller has seen to it that there is no
// RekeyFile, and that nobody else uses the directory.
func (r Rekeying) Run() error {
	plan := planJSON{Format: format}
	for _, name := range r.Names {
		path := filepath.Join(r.Dir, name)
		data, err := r.From.Read(path)
		if errors.Is(err, fs.ErrNotExist) || err == nil && erased(data) {
			continue
		}
		if err != nil {
			return err
		}
		if data, err = r.To.seal(name, data); err != nil {
			return fmt.Errorf("sealing %s: %w", path, err)
		}
		plan.Files = append(plan.Files, planFile{name, data})
	}
	if err := r.To.WriteJSON(filepath.Join(r.Dir, RekeyFile), plan); err != nil {
		return err
	}
	if err := r.step(RekeyFile); err != nil {
		return err
	}
	return r.Finish()
}

// Finish places the files of RekeyFile and removes it; without one there is nothing
// to do. What lies in a place already is left alone.
func (r Rekeying) Finish() error {
	path := filepath.Join(r.Dir, RekeyFile)
	data, err := r.To.Read(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !erased(data) {
		if err := r.place(path, data); err != nil {
			return err
		}
	}
	if err := r.sweep(); err != nil {
		return err
	}
	// In it may be plain keys.
	if err := atomicfile.Erase(path); err != nil {
		return err
	}
	return r.step("done")
}

func (r Rekeying) place(path string, data []byte) error {
	var plan planJSON
	if err := json.Unmarshal(data, &plan); err != nil {
		return fmt.Errorf("%s is damaged: %w", path, err)
	}
	if plan.Format != format {
		return fmt.Errorf("%s has format %d, this version of Atoll knows %d: go on with the version that began it", path, plan.Format, format)
	}
	for _, file := range plan.Files {
		if !slices.Contains(r.Names, file.Name) {
			return fmt.Errorf("%s names a file that holds no keys (%q): it was altered", path, file.Name)
		}
	}
	for _, file := range plan.Files {
		here := filepath.Join(r.Dir, file.Name)
		if old, err := readFile(here); err == nil && bytes.Equal(old, file.Data) {
			continue
		}
		if err := atomicfile.WriteSecret(here, file.Data); err != nil {
			return err
		}
		if err := r.step(file.Name); err != nil {
			return err
		}
	}
	return nil
}

// sweep erases what writes that were cut short have left of protected files: it may
// be what is to be sealed.
func (r Rekeying) sweep() error {
	for _, name := range append([]string{RekeyFile}, r.Names...) {
		left, err := filepath.Glob(filepath.Join(r.Dir, name+".tmp-*"))
		if err != nil {
			return err
		}
		for _, path := range left {
			if err := atomicfile.Erase(path); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r Rekeying) step(name string) error {
	if r.Step == nil {
		return nil
	}
	return r.Step(name)
}
