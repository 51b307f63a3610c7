package kv

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// A row is looked for once below until the next flush, by whoever wants it, whether it is
// there or not; and what the flush brings, and a Replace, is found.
func TestBehindRemembersWhatWasLookedFor(t *testing.T) {
	below := &counted{Engine: NewMemory()}
	e := newBehind(below, time.Hour, layerSize{bytes: layerBytes, updates: layerUpdates})
	look := func(key string) (v []byte, times int64) {
		t.Helper()
		before := below.rows.Load()
		if err := e.Read(func(c Content) error { v = c.Lookup(rows, []byte(key)); return nil }); err != nil {
			t.Fatal(err)
		}
		return v, below.rows.Load() - before
	}
	long := strings.Repeat("l", foundBytes)
	set(t, e, rows, "one", "1", "long", long) // flushed at once, with which the pause begins
	if err := e.Sync(); err != nil {
		t.Fatal(err)
	}
	set(t, e, rows, "two", "2")
	for try, want := range []int64{1, 0} {
		if v, n := look("one"); string(v) != "1" || n != want {
			t.Errorf("a row that is there, try %d: %q after %d looks", try, v, n)
		}
		if v, n := look("long"); string(v) != long || n != 1 {
			t.Errorf("a long row, try %d: %d bytes after %d looks", try, len(v), n)
		}
	}
	if v, n := look("absent"); v != nil || n != 1 {
		t.Errorf("a row that is not there: %q after %d looks", v, n)
	}
	if v, n := look("absent"); v != nil || n != 0 {
		t.Errorf("the same row again: %q after %d looks", v, n)
	}
	err := e.Update(func(w Writer) error {
		if v := w.Lookup(rows, []byte("absent")); v != nil {
			t.Errorf("an Update finds %q", v)
		}
		if v := w.Lookup(rows, []byte("one")); string(v) != "1" {
			t.Errorf("an Update finds %q", v)
		}
		return errors.Join(w.Set(rows, []byte("absent"), []byte("3")), w.Set(rows, []byte("one"), []byte("1b")))
	})
	if err != nil {
		t.Fatal(err)
	}
	if v, _ := look("absent"); string(v) != "3" {
		t.Errorf("a row that was written: %q", v)
	}
	if v, _ := look("one"); string(v) != "1b" {
		t.Errorf("a row that was written again: %q", v)
	}
	if err := e.Sync(); err != nil {
		t.Fatal(err)
	}
	set(t, e, rows, "four", "4") // a layer again
	if v, n := look("absent"); string(v) != "3" || n != 1 {
		t.Errorf("a row that was flushed: %q after %d looks", v, n)
	}
	if v, n := look("one"); string(v) != "1b" || n != 1 {
		t.Errorf("a row that was flushed again: %q after %d looks", v, n)
	}
	look("new")
	err = e.Replace(func(batch func(func(Writer) error) error) error {
		return batch(func(w Writer) error { return w.Set(rows, []byte("new"), []byte("5")) })
	})
	if err != nil {
		t.Fatal(err)
	}
	set(t, e, rows, "six", "6")
	if v, _ := look("new"); string(v) != "5" {
		t.Errorf("a row of the new state: %q", v)
	}
	if v, _ := look("one"); v != nil {
		t.Errorf("a row of the old state: %q", v)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}
