package kv

import (
	"sync/atomic"
	"testing"
	"time"
)

// asked counts what is looked up in an Engine below.
type asked struct {
	Engine
	lookups atomic.Int64
}

type askedState struct {
	Snapshot
	lookups *atomic.Int64
}

func (a *asked) Open() (Snapshot, error) {
	s, err := a.Engine.Open()
	return askedState{s, &a.lookups}, err
}

func (s askedState) Lookup(space Space, key []byte) []byte {
	s.lookups.Add(1)
	return s.Snapshot.Lookup(space, key)
}

// A row that is not there is looked for once below until the next flush, by whoever
// wants it; and what the flush brings, and a Replace, is found.
func TestBehindRemembersWhatIsNotBelow(t *testing.T) {
	below := &asked{Engine: NewMemory()}
	e := newBehind(below, time.Hour, layerSize{bytes: layerBytes, updates: layerUpdates})
	look := func(key string) (v []byte, times int64) {
		t.Helper()
		before := below.lookups.Load()
		if err := e.Read(func(c Content) error { v = c.Lookup(rows, []byte(key)); return nil }); err != nil {
			t.Fatal(err)
		}
		return v, below.lookups.Load() - before
	}
	set(t, e, rows, "one", "1") // flushed at once, with which the pause begins
	if err := e.Sync(); err != nil {
		t.Fatal(err)
	}
	set(t, e, rows, "two", "2")
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
		return w.Set(rows, []byte("absent"), []byte("3"))
	})
	if err != nil {
		t.Fatal(err)
	}
	if v, _ := look("absent"); string(v) != "3" {
		t.Errorf("a row that was written: %q", v)
	}
	if err := e.Sync(); err != nil {
		t.Fatal(err)
	}
	set(t, e, rows, "four", "4") // a layer again
	if v, n := look("absent"); string(v) != "3" || n != 1 {
		t.Errorf("a row that was flushed: %q after %d looks", v, n)
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
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}
