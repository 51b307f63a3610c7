package kv

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

func rowKey(i int) []byte { return fmt.Appendf(nil, "key %06d", i) }

// fillRows writes so many rows of 1,000 bytes.
func fillRows(t *testing.T, e Engine, count int) {
	t.Helper()
	value := bytes.Repeat([]byte("v"), 1000)
	if err := e.Update(func(w Writer) error {
		for i := range count {
			if err := w.Set(rows, rowKey(i), value); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// However much of a file is read, not much of it stays mapped, and what is read is
// the same.
func TestMappedPagesStayBounded(t *testing.T) {
	e, err := OpenBolt(filepath.Join(t.TempDir(), "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	const rowsEach, batches = 1000, 20
	value := bytes.Repeat([]byte("v"), 1000)
	key := func(i int) []byte { return fmt.Appendf(nil, "key %06d", i) }
	for b := range batches {
		if err := e.Update(func(w Writer) error {
			for i := range rowsEach {
				if err := w.Set(rows, key(b*rowsEach+i), value); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if size := e.Size(); size < 20<<20 {
		t.Fatalf("the file has %d bytes", size)
	}
	m := e.(*bolt).mapped
	m.most = 0 // whatever is beyond least is too much
	var before, peak int64
	look := func() {
		_, now, ok := m.memory.read()
		if !ok {
			t.Fatal("the kernel does not say how much is mapped")
		}
		peak = max(peak, now-before)
	}
	walk := func(most int64) int64 {
		before, peak = unmapAll(t, e.(*bolt)), 0
		m.least = before + most
		m.until.Store(0)
		n := 0
		if err := e.Read(func(c Content) error {
			for k, v := range c.Ascend(rows, nil, nil) {
				if !bytes.Equal(k, key(n)) || !bytes.Equal(v, value) {
					t.Fatalf("row %d is %q", n, k)
				}
				if n++; n%100 == 0 {
					look()
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if n != rowsEach*batches {
			t.Fatalf("%d rows", n)
		}
		return peak
	}
	scattered := func(most int64) int64 {
		before, peak = unmapAll(t, e.(*bolt)), 0
		m.least = before + most
		m.until.Store(0)
		if err := e.Read(func(c Content) error {
			for i := range rowsEach * batches {
				if !bytes.Equal(c.Lookup(rows, key(i*7919%(rowsEach*batches))), value) {
					t.Fatalf("row %d is another", i)
				}
				if i%100 == 0 {
					look()
				}
			}
			look()
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return peak
	}
	if all := walk(1 << 40); all < 15<<20 {
		t.Skipf("this kernel counts %d bytes as mapped when all is read", all)
	}
	// 2 MiB may stay, and a walk maps 4 to 8 MiB before it looks.
	if bounded := walk(2 << 20); bounded > 13<<20 {
		t.Errorf("a walk had %d bytes mapped at once", bounded)
	}
	// Each key maps 64 KiB or two, and 128 are read from one look to the next.
	if all, bounded := scattered(1<<40), scattered(2<<20); all < 15<<20 || bounded > 13<<20 {
		t.Errorf("scattered lookups had %d bytes mapped at once, and %d without a bound", bounded, all)
	}
	m.most = 1 << 40 // the process is small
	if all := scattered(2 << 20); all < 15<<20 {
		t.Errorf("pages were taken from a small process: %d bytes are mapped", all)
	}
}

// A commit reads each page that it replaces. Not much of them stays mapped while it
// does, however many they are.
func TestMappedPagesStayBoundedInACommit(t *testing.T) {
	e, err := OpenBolt(filepath.Join(t.TempDir(), "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	const count = 40_000
	value := bytes.Repeat([]byte("v"), 1000)
	key := func(i int) []byte { return fmt.Appendf(nil, "key %06d", i) }
	set := func(from, step int) {
		t.Helper()
		if err := e.Update(func(w Writer) error {
			for i := from; i < count; i += step {
				if err := w.Set(rows, key(i), value); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	set(0, 1)
	m := e.(*bolt).mapped
	m.most = 0 // whatever is beyond least is too much
	// peak writes a row of every third page or so.
	peak := func(large int64) (highest int64) {
		before := unmapAll(t, e.(*bolt))
		if m.large, m.least = large, before+8<<20; large == 0 {
			m.least *= 2 // it counts by half
		}
		end, ended := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(ended)
			tick := time.NewTicker(100 * time.Microsecond)
			defer tick.Stop()
			for {
				select {
				case <-end:
					return
				case <-tick.C:
					_, now, _ := m.memory.read()
					highest = max(highest, now-before)
				}
			}
		}()
		set(1, 10)
		close(end)
		<-ended
		return highest
	}
	alone := peak(1 << 40)
	if alone < 25<<20 {
		t.Skipf("this kernel counts %d bytes as mapped when all is written", alone)
	}
	// On a busy machine who looks may come late.
	watched := int64(0)
	for range 10 {
		if watched = peak(0); watched < alone/2 {
			return
		}
	}
	t.Errorf("a commit had %d bytes mapped at once, and %d when nobody looked", watched, alone)
}

// unmapAll takes all pages of the engine's file from the process and gives what is
// mapped then.
func unmapAll(t *testing.T, e *bolt) int64 {
	t.Helper()
	tx, err := e.db.Begin(false)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	unmapPages(tx.DB().Info().Data, tx.Size())
	_, now, _ := e.mapped.memory.read()
	return now
}

// Four looks hand back all of a file, also of one that grows with each.
func TestQuartersOfAGrowingFile(t *testing.T) {
	const page = 4096
	m := &mappedPages{}
	size := int64(1001 * page)
	for range 20 {
		whole, reached := size, int64(0)
		for range 4 {
			from, to := m.quarter(size, page)
			if from > reached || from%page != 0 {
				t.Fatalf("of %d bytes what is handed back goes from %d to %d, after %d", size, from, to, reached)
			}
			reached = to
			size += page
		}
		if reached < whole {
			t.Fatalf("%d of %d bytes were handed back", reached, whole)
		}
	}
}

// mappedNow is how much of files is mapped.
func mappedNow(t *testing.T, m *mappedPages) int64 {
	t.Helper()
	_, files, ok := m.memory.read()
	if !ok {
		t.Fatal("the kernel does not say how much is mapped")
	}
	return files
}

// readAll maps all of a file.
func readAll(t *testing.T, db *bbolt.DB) {
	t.Helper()
	if err := db.View(func(tx *bbolt.Tx) error {
		if _, _, no := unix.Syscall(unix.SYS_MADVISE, tx.DB().Info().Data, uintptr(tx.Size()), unix.MADV_POPULATE_READ); no != 0 {
			return no
		}
		return nil
	}); err != nil {
		t.Skipf("this kernel does not map on demand: %v", err)
	}
}

// One look hands all of a large file back, and a quarter of a small one.
func TestALargeFileIsHandedBackAtOnce(t *testing.T) {
	e := openTestBolt(t, filepath.Join(t.TempDir(), "state.db")).(*bolt)
	fillRows(t, e, 16_000)
	m := e.mapped
	m.most = 0
	look := func(large int64) (handed int64) {
		m.large, m.least = large, 1<<40
		readAll(t, e.db)
		full := mappedNow(t, m)
		m.least = 0
		m.until.Store(0)
		if err := e.db.View(func(tx *bbolt.Tx) error { m.look(tx, 0); return nil }); err != nil {
			t.Fatal(err)
		}
		return full - mappedNow(t, m)
	}
	size := int64(0) // the file may be longer than what is in use
	if err := e.db.View(func(tx *bbolt.Tx) error { size = tx.Size(); return nil }); err != nil {
		t.Fatal(err)
	}
	if size < 16<<20 {
		t.Fatalf("the file has %d bytes", size)
	}
	small, large := look(size+1), look(size)
	if large == 0 {
		t.Skip("this kernel does not count what is mapped")
	}
	if small > size/2 || large < size*3/4 {
		t.Errorf("one look handed %d bytes of a small file and %d of a large one back, of %d", small, large, size)
	}
}

// saying is a kernel that says how much the process has, all of it mapped files.
func saying(t *testing.T, bytes int) *memoryFile {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "statm"))
	if err != nil {
		t.Fatal(err)
	}
	pages := bytes / os.Getpagesize()
	if _, err := fmt.Fprintf(f, "%d %d %d 0 0 0 0\n", pages, pages, pages); err != nil {
		t.Fatal(err)
	}
	return &memoryFile{file: f, program: func() []mapping { return nil }}
}

// Before a commit there is room for what it maps: who looks while it is at it may come
// late.
func TestACommitHasRoom(t *testing.T) {
	e := openTestBolt(t, filepath.Join(t.TempDir(), "state.db")).(*bolt)
	const count = 16_000
	fillRows(t, e, count)
	m := e.mapped
	m.large, m.least = 0, 0
	really := m.memory
	t.Cleanup(really.close)
	m.memory = saying(t, 32<<20)
	for _, row := range []struct{ keys, handed int }{{1, 0}, {count / 10, 1}} {
		if err := e.db.Update(func(tx *bbolt.Tx) error {
			w := e.newTx(tx)
			w.growths = newGrowths()
			m.most = 1 << 40
			for i := range row.keys {
				if err := w.Set(rows, rowKey(i*10), bytes.Repeat([]byte("w"), 1000)); err != nil {
					return err
				}
			}
			readAll(t, e.db)
			_, before, _ := really.read()
			m.most = 40 << 20 // within the bound, were it not for the commit
			m.commits(tx)()
			_, after, _ := really.read()
			if handed := before - after; (handed > 8<<20) != (row.handed == 1) {
				t.Errorf("before a commit of %d keys %d bytes were handed back", row.keys, handed)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// Where a state's pages are not enough before a commit, the program's go as well.
func TestTheProgramIsHandedBack(t *testing.T) {
	e := openTestBolt(t, filepath.Join(t.TempDir(), "state.db")).(*bolt)
	m, asked := e.mapped, 0
	m.large, m.least = 0, 0
	m.memory.program = func() []mapping { asked++; return nil }
	for _, row := range []struct {
		most  int64
		asked bool
	}{{1 << 40, false}, {0, true}} {
		m.most, asked = row.most, 0
		fillRows(t, e, 10)
		if (asked > 0) != row.asked {
			t.Errorf("a process that may have %d bytes looked for its program %d times", row.most, asked)
		}
	}
	mapped := programMappings()
	if len(mapped) == 0 {
		t.Fatal("the program is mapped nowhere")
	}
	m.memory.program = func() []mapping { return mapped }
	before := mappedNow(t, m)
	m.memory.unmapProgram()
	if after := mappedNow(t, m); after >= before {
		t.Errorf("%d bytes are mapped, and %d were before", after, before)
	}
}

// Only what is in the program's file as it is in memory is handed back.
func TestWhatOfAProgramIsInItsFile(t *testing.T) {
	const smaps = `00400000-0172a000 r-xp 00000000 fe:00 2097263    /usr/bin/a program
Rss:               15400 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
0172a000-02c00000 r--p 0132a000 fe:00 2097263    /usr/bin/a program
Anonymous:             0 kB
02c00000-02c10000 r--p 0132a000 fe:00 2097263    /usr/bin/a program
Anonymous:             4 kB
02d00000-02d90000 rw-p 02800000 fe:00 2097263    /usr/bin/a program
Anonymous:             0 kB
7f0000000000-7f0000100000 r--p 00000000 fe:00 99    /data/meta.db
Anonymous:             0 kB
7f0000200000-7f0000300000 r-xp 00000000 00:00 0
Anonymous:             0 kB
`
	want := []mapping{{0x400000, 0x172a000}, {0x172a000, 0x2c00000}}
	if got := readOnly(strings.NewReader(smaps), "/usr/bin/a program"); !slices.Equal(got, want) {
		t.Errorf("%x, want %x", got, want)
	}
}

// What the log has mapped goes as soon as the process is large: it is hardly read again.
// Large entries count for what they are.
func TestTheLogStaysHardlyMapped(t *testing.T) {
	l := openTestLog(t, filepath.Join(t.TempDir(), "log.db"))
	const entries, size = 40, 512 << 10 // five more fit into what is mapped, so that nothing is mapped anew
	logs := plainLogs(1, entries, size)
	if err := l.StoreLogs(logs); err != nil {
		t.Fatal(err)
	}
	readAll(t, l.db)
	before := mappedNow(t, l.mapped)
	l.mapped.most, l.mapped.least = 0, 0
	l.mapped.until.Store(0) // it was for other bounds
	if err := l.StoreLogs(plainLogs(entries+1, 5, size)); err != nil {
		t.Fatal(err)
	}
	if handed := before - mappedNow(t, l.mapped); handed < entries*size*3/4 {
		t.Errorf("%d bytes of a log of %d were handed back when 5 entries were added", handed, entries*size)
	}
}
