// Package atomicfile keeps the small files of a data directory: an identity, a
// plan, a position. Whoever is cut short, by kill -9 or by a power cut, leaves the
// old file or the new one, whole.
//
// Every file is 0600. A name with ".tmp-" in it is the rest of a write that was cut
// short; nothing reads it.
package atomicfile

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Write puts data in the place of the file, durably.
func Write(path string, data []byte) error {
	err := write(path, data)
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

func write(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".tmp-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // it is gone when all went well
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// WriteJSON is Write of a value as indented JSON.
func WriteJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return Write(path, append(b, '\n'))
}

// ReadJSON reads what WriteJSON wrote; fs.ErrNotExist when there is no file.
func ReadJSON(path string, into any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%s is damaged: %w", path, err)
	}
	return nil
}

// Remove removes a file for good; that it is gone already is fine.
func Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing %s: %w", path, err)
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir makes the names in a directory durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// WriteSecret is Write of a file whose former content is to be gone: the bytes that
// it replaces are overwritten where they lay. A journal of the file system, a
// snapshot below it, or the spare blocks of a flash disk may keep them still.
func WriteSecret(path string, data []byte) error {
	old, size, err := opened(path)
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if err := Write(path, data); err != nil {
		return errors.Join(err, closed(old))
	}
	if err := errors.Join(overwrite(old, size), closed(old)); err != nil {
		return fmt.Errorf("overwriting what %s was: %w", path, err)
	}
	return nil
}

// Erase overwrites a file where it lies and removes it. Cut short in between it
// leaves a file of zeros. That it is gone already is fine.
func Erase(path string) error {
	old, size, err := opened(path)
	if err == nil {
		err = errors.Join(overwrite(old, size), closed(old))
	}
	if err != nil {
		return fmt.Errorf("overwriting %s: %w", path, err)
	}
	return Remove(path)
}

// opened gives nil when there is no file.
func opened(path string) (f *os.File, size int64, err error) {
	f, err = os.OpenFile(path, os.O_WRONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, info.Size(), nil
}

func overwrite(f *os.File, size int64) error {
	if f == nil {
		return nil
	}
	_, err := f.WriteAt(make([]byte, size), 0)
	return errors.Join(err, f.Sync())
}

func closed(f *os.File) error {
	if f == nil {
		return nil
	}
	return f.Close()
}
