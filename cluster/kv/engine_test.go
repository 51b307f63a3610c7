package kv

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"
)

// engines are all that there are; TestEngine is what each must pass.
func engines(t *testing.T) map[string]func(t *testing.T) Engine {
	return map[string]func(t *testing.T) Engine{
		"memory": func(*testing.T) Engine { return NewMemory() },
		"bolt":   func(t *testing.T) Engine { return openTestBolt(t, filepath.Join(t.TempDir(), "state.db")) },
		"behind": func(t *testing.T) Engine {
			return openTestBehind(t, filepath.Join(t.TempDir(), "state.db"), flushPause)
		},
		// Most of it is in the layers, and most of what is read is not.
		"behind-slow": func(t *testing.T) Engine { return openTestBehind(t, filepath.Join(t.TempDir(), "state.db"), time.Hour) },
	}
}

func openTestBolt(t *testing.T, path string) Engine {
	t.Helper()
	e, err := OpenBolt(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

func openTestBehind(t *testing.T, path string, pause time.Duration) Engine {
	t.Helper()
	below, err := OpenBolt(path)
	if err != nil {
		t.Fatal(err)
	}
	e := newBehind(below, pause, layerSize{bytes: layerBytes, updates: layerUpdates})
	t.Cleanup(func() { e.Close() })
	return e
}

func set(t *testing.T, e Engine, s Space, pairs ...string) {
	t.Helper()
	err := e.Update(func(w Writer) error {
		for i := 0; i < len(pairs); i += 2 {
			if err := w.Set(s, []byte(pairs[i]), []byte(pairs[i+1])); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func list(c Content, s Space, from, to []byte) (out []string) {
	for k, v := range c.Ascend(s, from, to) {
		out = append(out, fmt.Sprintf("%s=%s", k, v))
	}
	return out
}

func listAll(t *testing.T, e Engine, s Space) (out []string) {
	t.Helper()
	if err := e.Read(func(c Content) error { out = list(c, s, nil, nil); return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestEngine(t *testing.T) {
	tests := map[string]func(t *testing.T, e Engine){
		"order and ranges": func(t *testing.T, e Engine) {
			set(t, e, rows, "b", "2", "a", "1", "c", "3", "a\x00", "x")
			_ = e.Read(func(c Content) error {
				for want, got := range map[string][]string{
					"[a=1 a\x00=x b=2 c=3]": list(c, rows, nil, nil),
					"[a\x00=x b=2]":         list(c, rows, []byte("a\x00"), []byte("c")),
					"[b=2 c=3]":             list(c, rows, []byte("aa"), nil),
					"[]":                    list(c, rows, []byte("d"), nil),
				} {
					if fmt.Sprint(got) != want {
						t.Errorf("got %q, want %q", got, want)
					}
				}
				if list(c, Local, nil, nil) != nil {
					t.Error("spaces share their keys")
				}
				if c.Lookup(rows, []byte("aa")) != nil {
					t.Error("found a key that is not there")
				}
				return nil
			})
		},
		"a failed update leaves nothing": func(t *testing.T, e Engine) {
			set(t, e, rows, "a", "1")
			bad := errors.New("no")
			err := e.Update(func(w Writer) error {
				if err := w.Set(rows, []byte("a"), []byte("2")); err != nil {
					return err
				}
				if got := w.Lookup(rows, []byte("a")); string(got) != "2" {
					t.Errorf("a writer reads %q after its write", got)
				}
				if err := w.Unset(rows, []byte("nothing")); err != nil {
					return err
				}
				return bad
			})
			if !errors.Is(err, bad) {
				t.Errorf("got %v", err)
			}
			if diff := cmp.Diff([]string{"a=1"}, listAll(t, e, rows)); diff != "" {
				t.Error(diff)
			}
		},
		"a snapshot stays": func(t *testing.T, e Engine) {
			set(t, e, rows, "a", "1", "b", "2")
			s, err := e.Open()
			if err != nil {
				t.Fatal(err)
			}
			defer s.Release()
			set(t, e, rows, "a", "9", "c", "3")
			if err := e.Update(func(w Writer) error { return w.Unset(rows, []byte("b")) }); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]string{"a=1", "b=2"}, list(s, rows, nil, nil)); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff([]string{"a=9", "c=3"}, listAll(t, e, rows)); diff != "" {
				t.Error(diff)
			}
			s.Release()
		},
		"replace": func(t *testing.T, e Engine) {
			set(t, e, rows, "old", "1")
			s, err := e.Open()
			if err != nil {
				t.Fatal(err)
			}
			bad := errors.New("no")
			write := func(end error) error {
				return e.Replace(func(batch func(func(Writer) error) error) error {
					for _, k := range []string{"x", "y"} {
						if err := batch(func(w Writer) error { return w.Set(rows, []byte(k), []byte("new")) }); err != nil {
							return err
						}
					}
					return end
				})
			}
			if err := write(bad); !errors.Is(err, bad) {
				t.Errorf("got %v", err)
			}
			if diff := cmp.Diff([]string{"old=1"}, listAll(t, e, rows)); diff != "" {
				t.Errorf("after a replacement that failed: %s", diff)
			}
			if err := write(nil); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]string{"x=new", "y=new"}, listAll(t, e, rows)); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff([]string{"old=1"}, list(s, rows, nil, nil)); diff != "" {
				t.Errorf("an open snapshot: %s", diff)
			}
			s.Release()
			set(t, e, rows, "z", "later")
			if diff := cmp.Diff([]string{"x=new", "y=new", "z=later"}, listAll(t, e, rows)); diff != "" {
				t.Error(diff)
			}
		},
		"closed": func(t *testing.T, e Engine) {
			if err := e.Close(); err != nil {
				t.Fatal(err)
			}
			if err := e.Close(); err != nil {
				t.Errorf("a second Close: %v", err)
			}
			if err := e.Update(func(Writer) error { return nil }); !errors.Is(err, ErrClosed) {
				t.Errorf("update: %v", err)
			}
			if err := e.Read(func(Content) error { return nil }); !errors.Is(err, ErrClosed) {
				t.Errorf("read: %v", err)
			}
			if err := e.Replace(func(func(func(Writer) error) error) error { return nil }); !errors.Is(err, ErrClosed) {
				t.Errorf("replace: %v", err)
			}
		},
	}
	for name, open := range engines(t) {
		for test, run := range tests {
			t.Run(name+"/"+strings.ReplaceAll(test, " ", "-"), func(t *testing.T) { run(t, open(t)) })
		}
	}
}

func TestBoltKeepsItsState(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	e := openTestBolt(t, path)
	set(t, e, rows, "a", "1")
	if _, err := OpenBolt(path); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("a second opener: %v", err)
	}
	if err := e.Replace(func(batch func(func(Writer) error) error) error {
		return batch(func(w Writer) error { return w.Set(rows, []byte("b"), []byte("2")) })
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenBolt(path); err == nil {
		t.Error("the replaced file is not locked")
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	// As a crash in the middle of a Replace leaves it.
	if err := os.WriteFile(path+".new", []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	e = openTestBolt(t, path)
	if diff := cmp.Diff([]string{"b=2"}, listAll(t, e, rows)); diff != "" {
		t.Error(diff)
	}
	if _, err := os.Stat(path + ".new"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the rest of a replacement is still there: %v", err)
	}
}

func TestBoltRefusesOtherFormatsAndDamage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	e := openTestBolt(t, path)
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	for _, other := range []byte{1, 9} {
		db, err := bbolt.Open(path, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		err = db.Update(func(tx *bbolt.Tx) error { return tx.Bucket([]byte("meta")).Put([]byte(formatKey), []byte{other}) })
		if err := errors.Join(err, db.Close()); err != nil {
			t.Fatal(err)
		}
		_, err = OpenBolt(path)
		for _, want := range []string{path, fmt.Sprintf("format %02x", other), fmt.Sprintf("format %d", engineFormat), "move the file away"} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("a file of format %d: %v, want %q in it", other, err, want)
			}
		}
	}
	if err := os.WriteFile(path, bytes.Repeat([]byte("no"), 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenBolt(path); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("a damaged file: %v", err)
	}
}

// A read transaction is used again until something is written, by one reader at a time;
// none is open during a write, and whatever is opened later sees it.
func TestReadersAreUsedAgain(t *testing.T) {
	e := openTestBolt(t, filepath.Join(t.TempDir(), "state.db")).(*bolt)
	set(t, e, rows, "t\x00key", "1")
	open := func() (Snapshot, *boltTx) {
		t.Helper()
		s, err := e.Open()
		if err != nil {
			t.Fatal(err)
		}
		return s, s.(*boltReader).boltTx
	}
	value := func(s Snapshot) string { return string(s.Lookup(rows, []byte("t\x00key"))) }
	first, a := open()
	second, b := open()
	if a == b {
		t.Fatal("two readers have one transaction")
	}
	first.Release()
	first.Release() // again changes nothing
	third, c := open()
	if c != a || value(third) != "1" {
		t.Errorf("the transaction is not used again: %v, %q", c != a, value(third))
	}
	fourth, d := open()
	if d == a || d == b {
		t.Error("a transaction that was released twice is in two hands")
	}
	third.Release()
	fourth.Release()
	err := e.Update(func(w Writer) error {
		if n := e.db.Stats().OpenTxN; n != 1 { // the second reader's
			t.Errorf("%d read transactions are open during a write", n)
		}
		inside, _ := open()
		inside.Release()
		if n := e.db.Stats().OpenTxN; n != 1 {
			t.Errorf("%d read transactions are open during a write, after one more", n)
		}
		return w.Set(rows, []byte("t\x00key"), []byte("2"))
	})
	if err != nil {
		t.Fatal(err)
	}
	if value(second) != "1" {
		t.Errorf("a state changed under its reader: %q", value(second))
	}
	second.Release()
	if after, _ := open(); value(after) != "2" {
		t.Errorf("after the write: %q", value(after))
	} else {
		after.Release()
	}
	if err := e.Close(); err != nil { // does not wait for those that are idle
		t.Error(err)
	}
}

// What a power cut leaves of a file that is just being made is no file yet: the next
// start makes it anew.
func TestFileThatWasNeverWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "meta.db")
	open := func() {
		t.Helper()
		e, err := OpenBolt(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(path+".first", make([]byte, 15360), 0o600); err != nil {
		t.Fatal(err)
	}
	open()
	open()
	names, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(names) != 1 || names[0].Name() != "meta.db" {
		t.Errorf("there are %v, %v; want the state alone", names, err)
	}
}

// A state that comes to take the place of another one counts as large: how large it will be
// is known in the end.
func TestWhatTakesTheStatesPlaceIsLarge(t *testing.T) {
	e := openTestBehind(t, filepath.Join(t.TempDir(), "state.db"), time.Hour)
	if e.Large() {
		t.Error("a new state is large")
	}
	for _, fails := range []error{nil, errors.New("cut short")} {
		err := e.Replace(func(batch func(func(Writer) error) error) error {
			if !e.Large() {
				t.Error("it is not large while it comes")
			}
			return errors.Join(fails, batch(func(w Writer) error { return w.Set(rows, []byte("key"), []byte("value")) }))
		})
		if !errors.Is(err, fails) || e.Large() {
			t.Errorf("%v, and afterwards large: %v", err, e.Large())
		}
	}
}
