package kv

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"
)

// gated is an Engine below whose commits are counted and can be held up or fail.
type gated struct {
	Engine
	mu      sync.Mutex
	commits []time.Time
	gate    chan struct{} // each commit takes one; nil lets them go
	begun   chan struct{} // has one for each commit that waits at the gate
	err     error         // of the next commit
	last    []string      // rows at Close
}

func (g *gated) Close() error {
	_ = g.Read(func(c Content) error { g.last = list(c, rows, nil, nil); return nil })
	return g.Engine.Close()
}

func (g *gated) Update(fn func(Writer) error) error {
	g.mu.Lock()
	gate, bad := g.gate, g.err
	g.commits = append(g.commits, time.Now())
	g.mu.Unlock()
	if gate != nil {
		g.begun <- struct{}{}
		<-gate
	}
	return g.Engine.Update(func(w Writer) error { return errors.Join(fn(w), bad) })
}

func (g *gated) hold() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.gate, g.begun = make(chan struct{}), make(chan struct{}, 100)
}

func (g *gated) breaks(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.err = err
}

func (g *gated) times() []time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.commits)
}

// An Update costs no commit below; a flush begins at once after a quiet time, else
// a pause after the last, and takes all that came meanwhile.
func TestBehindFlushesInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gated{Engine: NewMemory()}
		e := WriteBehind(g)
		start := time.Now()
		for i := range 10 {
			set(t, e, rows, fmt.Sprint("key", i), "v")
			time.Sleep(flushPause / 4)
		}
		time.Sleep(time.Second)
		set(t, e, rows, "late", "v")
		synctest.Wait()
		var at []time.Duration
		for _, c := range g.times() {
			at = append(at, c.Sub(start))
		}
		late := 10*flushPause/4 + time.Second
		if want := []time.Duration{0, flushPause, 2 * flushPause, 3 * flushPause, late}; !slices.Equal(at, want) {
			t.Errorf("flushes at %v, want %v", at, want)
		}
		if diff := cmp.Diff(listAll(t, e, rows), listAll(t, g.Engine, rows)); diff != "" {
			t.Error(diff)
		}
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
}

// After a flush that took long there is a longer pause.
func TestBehindSparesASlowDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gated{Engine: NewMemory()}
		g.hold()
		e := WriteBehind(g)
		const slow = flushPause / 2
		set(t, e, rows, "a", "1")
		time.Sleep(slow)
		g.gate <- struct{}{}
		set(t, e, rows, "b", "1")
		time.Sleep(flushShare*slow - 1)
		synctest.Wait()
		if n := len(g.times()); n != 1 {
			t.Errorf("%d flushes before the pause is over", n)
		}
		time.Sleep(1)
		synctest.Wait()
		if n := len(g.times()); n != 2 {
			t.Errorf("%d flushes after the pause", n)
		}
		close(g.gate)
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
}

// Layers are bounded: an Update waits for room, and is let go when the Engine is
// closed. What was answered is below after Close.
func TestBehindWaitsForRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gated{Engine: NewMemory()}
		g.hold()
		e := newBehind(g, flushPause, layerSize{bytes: 1 << 20, updates: 3})
		made := make(chan int, 100)
		ended := make(chan error)
		go func() {
			for i := 0; ; i++ {
				if err := e.Update(func(w Writer) error { return w.Set(rows, fmt.Appendf(nil, "key%d", i), []byte("v")) }); err != nil {
					ended <- err
					return
				}
				made <- i
			}
		}()
		synctest.Wait()
		first := 0
		for len(made) > 0 {
			<-made
			first++
		}
		if first < 4 || first > 6 {
			t.Errorf("%d Updates while no flush ends, of 3 a layer", first)
		}
		g.gate <- struct{}{}
		synctest.Wait()
		if n := len(made); n == 0 || n > 3 {
			t.Errorf("%d Updates after a flush", n)
		}
		closed := make(chan error)
		go func() { closed <- e.Close() }()
		if err := <-ended; !errors.Is(err, ErrClosed) {
			t.Errorf("an Update that waits while the engine is closed: %v", err)
		}
		close(g.gate)
		if err := <-closed; err != nil {
			t.Error(err)
		}
		if n := first + len(made); len(g.last) != n {
			t.Errorf("%d rows are below after Close, of %d", len(g.last), n)
		}
	})
}

// A flush that fails ends it: nothing more is taken and nothing of the flush is
// below, but all is still read; the machine halts, with the reason.
func TestBehindFailingFlush(t *testing.T) {
	g := &gated{Engine: openTestBolt(t, filepath.Join(t.TempDir(), "state.db"))}
	e := newBehind(g, time.Hour, layerSize{bytes: layerBytes, updates: layerUpdates})
	m := newTestMachine(t, e)
	do(t, m, nil, putOp("a", "1"))
	if err := e.Sync(); err != nil {
		t.Fatal(err)
	}
	kept := dump(t, g.Engine)
	bad := &os.PathError{Op: "sync", Path: "a file", Err: syscall.EIO}
	g.breaks(bad)
	do(t, m, nil, putOp("a", "2"), appendOp("log", "x"))
	snap, err := m.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	var s sink
	if err := snap.Persist(&s); !errors.Is(err, syscall.EIO) || s.closed {
		t.Errorf("a snapshot of what could not be kept: %v, kept %v", err, s.closed)
	}
	if err := e.Sync(); !errors.Is(err, syscall.EIO) {
		t.Errorf("Sync: %v", err)
	}
	if err := e.Replace(func(func(func(Writer) error) error) error { t.Error("replaces"); return nil }); !errors.Is(err, syscall.EIO) {
		t.Errorf("Replace: %v", err)
	}
	<-m.Halted() // without another entry
	out := m.Apply(entry(t, 3, Txn{ID: NewID(), Ops: []Op{putOp("a", "3")}}))
	if err, ok := out.(error); !ok || !errors.Is(err, ErrHalted) || !errors.Is(err, syscall.EIO) || m.Applied() != 2 {
		t.Errorf("the next entry: %v, applied %d", out, m.Applied())
	}
	_ = e.Read(func(c Content) error {
		if row, _ := ReadRow(c, []byte("a")); string(row.Value) != "2" || Applied(c) != 2 {
			t.Errorf("the row is %q at %d", row.Value, Applied(c))
		}
		return nil
	})
	if diff := cmp.Diff(kept, dump(t, g.Engine)); diff != "" {
		t.Errorf("something of a flush that failed is there: %s", diff)
	}
	if err := e.Close(); !errors.Is(err, syscall.EIO) {
		t.Errorf("Close: %v", err)
	}
}

// A snapshot is kept when the engine below holds what is in it.
func TestSnapshotIsKeptBehindTheState(t *testing.T) {
	below := openTestBolt(t, filepath.Join(t.TempDir(), "state.db"))
	e := newBehind(below, time.Hour, layerSize{bytes: layerBytes, updates: layerUpdates})
	defer e.Close()
	m := newTestMachine(t, e)
	do(t, m, nil, putOp("a", "1")) // flushed at once, perhaps
	do(t, m, nil, putOp("a", "2"))
	snap, err := m.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	s := closing{at: func() {
		_ = below.Read(func(c Content) error {
			if Applied(c) != 2 {
				t.Errorf("a snapshot at 2 is kept when the engine is at %d", Applied(c))
			}
			return nil
		})
	}}
	if err := snap.Persist(&s); err != nil || !s.closed {
		t.Errorf("%v, kept %v", err, s.closed)
	}
}

type closing struct {
	sink
	at func()
}

func (c *closing) Close() error {
	c.at()
	return c.sink.Close()
}

// A Replace that comes while a flush is under way waits for it, and nothing of the
// old state comes over the new one. Who reads the old one goes on in it.
func TestBehindReplaceDuringAFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gated{Engine: NewMemory()}
		g.hold()
		e := WriteBehind(g)
		set(t, e, rows, "frozen", "1")
		<-g.begun
		set(t, e, rows, "active", "1")
		old, err := e.Open()
		if err != nil {
			t.Fatal(err)
		}
		replaced := make(chan error, 1)
		go func() {
			replaced <- e.Replace(func(batch func(func(Writer) error) error) error {
				return batch(func(w Writer) error { return w.Set(rows, []byte("new"), []byte("1")) })
			})
		}()
		synctest.Wait()
		if len(replaced) > 0 {
			t.Error("replaced during a flush")
		}
		close(g.gate)
		if err := <-replaced; err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for _, state := range []Engine{e, g.Engine} {
			if diff := cmp.Diff([]string{"new=1"}, listAll(t, state, rows)); diff != "" {
				t.Error(diff)
			}
		}
		if diff := cmp.Diff([]string{"active=1", "frozen=1"}, list(old, rows, nil, nil)); diff != "" {
			t.Errorf("an open snapshot: %s", diff)
		}
		old.Release()
		set(t, e, rows, "next", "1")
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
}

// Whatever moment a reader takes, it finds one state: two keys in two spaces that
// are always written together agree, a log of what was written has no gap, and no
// state is older than one that was seen before.
func TestBehindReadersFindOneState(t *testing.T) {
	for name, below := range map[string]Engine{"memory": NewMemory(), "bolt": openTestBolt(t, filepath.Join(t.TempDir(), "state.db"))} {
		t.Run(name, func(t *testing.T) {
			if b, ok := below.(*bolt); ok {
				b.db.NoSync = true
			}
			e := newBehind(below, time.Microsecond, layerSize{bytes: layerBytes, updates: 5})
			defer e.Close()
			const updates = 3000
			stop := make(chan struct{})
			var reading sync.WaitGroup
			for range 3 {
				reading.Go(func() {
					last := uint64(0)
					for {
						select {
						case <-stop:
							return
						default:
						}
						_ = e.Read(func(c Content) error {
							n := Applied(c)
							if n < last {
								t.Errorf("the state is at %d after %d", n, last)
							}
							last = n
							var there []uint64
							for k := range c.Ascend(seen, nil, nil) {
								there = append(there, fromBE64(k))
							}
							// The newest ten are kept, all others are gone.
							want := []uint64{}
							for i := max(n, 10) - 9; i <= n; i++ {
								want = append(want, i)
							}
							if n > 0 && !slices.Equal(there, want) {
								t.Errorf("at %d there are %v", n, there)
							}
							for _, s := range []Space{rows, Local} {
								if v := c.Lookup(s, []byte("pair")); n > 0 && fromBE64(v) != n {
									t.Errorf("at %d %v is at %d", n, s, fromBE64(v))
								}
							}
							return nil
						})
					}
				})
			}
			for i := uint64(1); i <= updates; i++ {
				if err := e.Update(func(w Writer) error {
					err := errors.Join(w.Set(rows, []byte("pair"), be64(i)), w.Set(Local, []byte("pair"), be64(i)),
						w.Set(meta, []byte(appliedKey), be64(i)), w.Set(seen, be64(i), []byte("x")))
					if i > 10 {
						err = errors.Join(err, w.Unset(seen, be64(i-10)))
					}
					return err
				}); err != nil {
					t.Fatal(err)
				}
				if i%100 == 0 {
					if err := e.Sync(); err != nil {
						t.Fatal(err)
					}
				}
			}
			close(stop)
			reading.Wait()
		})
	}
}

// A process that dies at any moment, between a freeze and its commit too, leaves
// the state after some Update, whole; the log, replayed, makes the rest of it.
func TestBehindCrash(t *testing.T) {
	rnd := rand.New(rand.NewPCG(8, 8))
	dir := t.TempDir()
	path := filepath.Join(dir, "state.db")
	logs := randomTxns(t, rnd, 120)
	want, at := newTestMachine(t, NewMemory()), map[uint64]string{}
	at[0] = dump(t, want.engine)
	for _, l := range logs {
		want.Apply(l)
		at[want.Applied()] = dump(t, want.engine)
	}
	g := &gated{Engine: openTestBolt(t, path)}
	g.hold()
	e := newBehind(g, time.Microsecond, layerSize{bytes: layerBytes, updates: layerUpdates})
	m := newTestMachine(t, e)
	states := map[uint64]bool{}
	for i := 0; i < len(logs); {
		n := min(1+rnd.IntN(4), len(logs)-i)
		m.ApplyBatch(logs[i : i+n])
		i += n
		if rnd.IntN(3) == 0 {
			continue
		}
		<-g.begun // frozen and not committed
		name := filepath.Join(dir, fmt.Sprint("copy", i))
		data, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(name, data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		g.gate <- struct{}{}
		left := openTestBolt(t, name)
		again := newTestMachine(t, left)
		states[again.Applied()] = true
		if diff := cmp.Diff(at[again.Applied()], dump(t, left)); diff != "" {
			t.Fatalf("what a crash left at %d is no state of the history: %s", again.Applied(), diff)
		}
		applyInBatches(again, rnd, logs)
		if diff := cmp.Diff(at[want.Applied()], dump(t, left)); diff != "" {
			t.Fatalf("the log replayed over it: %s", diff)
		}
		checkDerived(t, left)
	}
	if len(states) < 10 {
		t.Errorf("crashes at %v only", slices.Sorted(maps.Keys(states)))
	}
	close(g.gate)
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
}

// What is remembered of the last transactions is found and forgotten in the layers
// as it is below, and no batch passes what the ones before it forgot.
func TestBehindForgets(t *testing.T) {
	e := newBehind(NewMemory(), time.Hour, layerSize{bytes: 1 << 30, updates: 1 << 30})
	defer e.Close()
	m := newTestMachine(t, e)
	var logs []*raft.Log
	for i := range 200 {
		logs = append(logs, entry(t, uint64(i+1), Txn{ID: NewID(), Base: uint64(i)}))
	}
	m.ApplyBatch(logs)
	b := begins{Engine: e}
	m.engine = &b
	for i := range uint64(200) {
		b.from = nil
		rev := Window + 2 + i
		m.Apply(entry(t, rev, Txn{ID: NewID(), Base: rev - 1}))
		if i > 0 && !slices.Equal(b.from, be64(rev-1-Window)) {
			t.Fatalf("at %d results are looked for from %x on", rev, b.from)
		}
	}
	_ = e.Read(func(c Content) error {
		if k := list(c, seen, nil, be64(201)); len(k) != 0 {
			t.Errorf("%d results were not forgotten", len(k))
		}
		return nil
	})
	if len(m.known) != 200 {
		t.Errorf("%d results are known", len(m.known))
	}
}

// begins notes where walks over the results begin.
type begins struct {
	Engine
	from []byte
}

func (b *begins) Update(fn func(Writer) error) error {
	return b.Engine.Update(func(w Writer) error { return fn(beginsWriter{w, b}) })
}

type beginsWriter struct {
	Writer
	b *begins
}

func (w beginsWriter) Ascend(s Space, from, to []byte) iter.Seq2[[]byte, []byte] {
	if s == seen {
		w.b.from = from
	}
	return w.Writer.Ascend(s, from, to)
}

// counted counts the rows that are looked up in an Engine.
type counted struct {
	Engine
	rows atomic.Int64
}

type countedSnapshot struct {
	Snapshot
	rows *atomic.Int64
}

func (c *counted) Open() (Snapshot, error) {
	s, err := c.Engine.Open()
	return countedSnapshot{s, &c.rows}, err
}

func (s countedSnapshot) Lookup(in Space, key []byte) []byte {
	if in == rows {
		s.rows.Add(1)
	}
	return s.Snapshot.Lookup(in, key)
}

// An Update asks what is below once for a row, however often it is looked up, and
// sees what it writes to the row all the same.
func TestBehindAsksOnce(t *testing.T) {
	below := &counted{Engine: NewMemory()}
	e := WriteBehind(below)
	t.Cleanup(func() { e.Close() })
	set := func(w Writer, value string) error { return w.Set(rows, []byte("there"), []byte(value)) }
	if err := errors.Join(e.Update(func(w Writer) error { return set(w, "old") }), e.Sync()); err != nil {
		t.Fatal(err)
	}
	below.rows.Store(0)
	if err := e.Update(func(w Writer) error {
		want := func(key, value string) {
			t.Helper()
			for range 3 {
				if got := w.Lookup(rows, []byte(key)); string(got) != value || (got == nil) != (value == "") {
					t.Errorf("%s is %q, want %q", key, got, value)
				}
			}
		}
		want("there", "old")
		want("nowhere", "")
		if got := below.rows.Load(); got != 2 {
			t.Errorf("two rows were looked up %d times below", got)
		}
		if err := set(w, "new"); err != nil {
			return err
		}
		want("there", "new")
		if err := w.Unset(rows, []byte("there")); err != nil {
			return err
		}
		want("there", "")
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// sized says that its state is large, or not.
type sized struct {
	Engine
	large bool
}

func (s sized) Large() bool { return s.large }

// Over a large state a layer is full much sooner, by its keys above all: a flush of it maps
// little, and how long the values are plays hardly a part in that.
func TestLayersOverALargeStateAreSmall(t *testing.T) {
	for _, row := range []struct {
		large       bool
		keys, value int
		full        bool
	}{
		{false, 2 * layerKeysLarge, 1, false},
		{true, 2 * layerKeysLarge, 1, true},
		{true, layerKeysLarge / 2, 1, false},
		{true, layerKeysLarge / 2, 256, false},
		{true, layerKeysLarge / 2, 2 * layerBytesLarge / layerKeysLarge, true},
	} {
		e := newBehind(sized{NewMemory(), row.large}, time.Hour, layerSize{bytes: layerBytes, updates: layerUpdates})
		e.mu.Lock()
		e.rested = false // nothing is flushed before a layer is full
		e.mu.Unlock()
		err := e.Update(func(w Writer) error {
			for i := range row.keys {
				if err := w.Set(rows, fmt.Appendf(nil, "key%d", i), make([]byte, row.value)); err != nil {
					return err
				}
			}
			return nil
		})
		e.mu.Lock()
		full := e.full()
		e.mu.Unlock()
		if err := errors.Join(err, e.Close()); err != nil || full != row.full {
			t.Errorf("large state: %v; a layer of %d keys of %d bytes is full: %v, want %v (%v)", row.large, row.keys, row.value, full, row.full, err)
		}
	}
}
