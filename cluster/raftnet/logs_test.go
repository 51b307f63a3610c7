package raftnet

import (
	"bytes"
	"testing"

	"github.com/hashicorp/raft"
)

// The end of the log is kept in memory within a number of entries and of bytes, and
// what is read is what was written.
func TestRecentIsBounded(t *testing.T) {
	stored := raft.NewInmemStore()
	r := &recent{LogStore: stored}
	next := uint64(1)
	store := func(entries, size int) {
		t.Helper()
		for ; entries > 0; entries -= 2 {
			var logs []*raft.Log
			for range 2 {
				logs = append(logs, &raft.Log{Index: next, Term: 1, Data: bytes.Repeat([]byte{byte(next)}, size)})
				next++
			}
			if err := r.StoreLogs(logs); err != nil {
				t.Fatal(err)
			}
		}
	}
	// kept counts what is in memory, and holds the account to it.
	kept := func() (entries, size int) {
		t.Helper()
		for _, entry := range r.ring {
			if entry != nil {
				entries++
				size += sizeOf(entry)
			}
		}
		if size != r.bytes {
			t.Errorf("%d bytes are in memory and %d are counted", size, r.bytes)
		}
		return entries, size
	}
	same := func() {
		t.Helper()
		first, _ := stored.FirstIndex()
		for i := first; i < next; i++ {
			var got, want raft.Log
			if err := r.GetLog(i, &got); err != nil {
				t.Fatal(err)
			}
			if err := stored.GetLog(i, &want); err != nil {
				t.Fatal(err)
			}
			if got.Index != i || !bytes.Equal(got.Data, want.Data) {
				t.Fatalf("entry %d is another", i)
			}
		}
	}

	store(3*recentEntries, 100)
	if n, _ := kept(); n != recentEntries {
		t.Errorf("%d small entries are in memory, want %d", n, recentEntries)
	}
	store(recentEntries, 100<<10)
	if n, size := kept(); size > recentBytes || n < recentBytes/(100<<10)-2 {
		t.Errorf("%d entries of 100 KiB are in memory, %d bytes", n, size)
	}
	store(2, 2*recentBytes)
	if n, _ := kept(); n != 1 {
		t.Errorf("%d entries are in memory that are each larger than all may be, want the newest", n)
	}
	store(10, 100)
	if n, size := kept(); n != 10 || size > recentBytes {
		t.Errorf("%d entries are in memory behind a large one, %d bytes", n, size)
	}
	same()

	if err := r.DeleteRange(1, next-5); err != nil {
		t.Fatal(err)
	}
	if n, _ := kept(); n != 0 {
		t.Errorf("%d entries are in memory behind a cut", n)
	}
	if err := r.GetLog(next-5, &raft.Log{}); err == nil {
		t.Error("an entry that was cut is there")
	}
	store(4, 100)
	same()
}
