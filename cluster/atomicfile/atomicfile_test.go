package atomicfile

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	for _, text := range []string{"one", "a longer one", "", "x"} {
		if err := Write(path, []byte(text)); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != text {
			t.Errorf("%q, %v, want %q", got, err, text)
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v", info.Mode(), err)
		}
	}
	left, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(left) != 1 {
		t.Errorf("%v, %v: more than the file is there", left, err)
	}
}

// TestWriteFails: what cannot be put in place leaves the old file and no rest.
func TestWriteFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.MkdirAll(filepath.Join(path, "below"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, write := range map[string]func(string, []byte) error{"Write": Write, "WriteSecret": WriteSecret} {
		if err := write(path, []byte("x")); err == nil {
			t.Errorf("%s replaced a directory", name)
		}
	}
	left, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(left) != 1 {
		t.Errorf("%v, %v", left, err)
	}
}

func TestJSON(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	var got map[string]int
	if err := ReadJSON(path, &got); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if err := WriteJSON(path, map[string]int{"a": 1}); err != nil {
		t.Fatal(err)
	}
	if err := ReadJSON(path, &got); err != nil || got["a"] != 1 {
		t.Errorf("%v, %v", got, err)
	}
	if err := Write(path, []byte("{")); err != nil {
		t.Fatal(err)
	}
	if err := ReadJSON(path, &got); err == nil {
		t.Error("a damaged file was read")
	}
}

// TestSecret: the bytes are gone from where they lay. A second name shows the place.
func TestSecret(t *testing.T) {
	dir := t.TempDir()
	path, place := filepath.Join(dir, "f"), filepath.Join(dir, "place")
	for _, replace := range []func() error{
		func() error { return WriteSecret(path, []byte("new")) },
		func() error { return Erase(path) },
	} {
		if err := errors.Join(Write(path, []byte("secret")), os.RemoveAll(place), os.Link(path, place)); err != nil {
			t.Fatal(err)
		}
		if err := replace(); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(place); err != nil || !bytes.Equal(got, make([]byte, len("secret"))) {
			t.Errorf("there is %q, %v", got, err)
		}
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the erased file: %v", err)
	}
	if err := Erase(path); err != nil {
		t.Errorf("erasing it again: %v", err)
	}
	if err := WriteSecret(path, []byte("first")); err != nil {
		t.Errorf("where there was none: %v", err)
	}
}
