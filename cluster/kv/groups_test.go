package kv

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.etcd.io/bbolt"
)

func digestOf(i int) string { return fmt.Sprintf("sha256:%064x", i) }

// Whatever a value is, it comes back as it was; one with digests takes less.
func TestValuesComeBack(t *testing.T) {
	d := digestOf(0xabc123)
	for _, value := range []string{
		"", "x", "sha256:", d, d + d, d[:len(d)-1], "sha256:" + d, d + "0", "a" + d + "b" + d, strings.ToUpper(d), "sha256:" + strings.ToUpper(d[7:]),
		"sha256:sha256:" + d, strings.Repeat("g", 300) + d, d + strings.Repeat("\x00", 300), "sha512:" + strings.Repeat("0f", 64), "\x01", "\x00",
	} {
		row := encodeRow(7, 300, []byte(value))
		got := decodeRow([]byte("k"), row)
		want := Row{Key: []byte("k"), Value: []byte(value), Created: 7, Revision: 300}
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%q: %s", value, diff)
		}
		stored := encodeEntry([]byte(value))
		if got := decodeEntry(stored); string(got) != value {
			t.Errorf("%q came back as %q", value, got)
		}
		if n := strings.Count(value, d); len(stored) > 1+len(value)-n*30 {
			t.Errorf("%q takes %d bytes of %d", value, len(stored), len(value))
		}
	}
}

// What a damaged page holds is given back as something that nobody can decode, and
// no condition on it holds.
func TestDamagedValues(t *testing.T) {
	whole := encodeRow(7, 300, []byte("before "+digestOf(1)+" after"))
	for n := range len(whole) {
		row := decodeRow(nil, whole[:n])
		if n > 3 && row.Revision != 300 || n < 3 && row.Revision == 300 || string(row.Value) == "before "+digestOf(1)+" after" {
			t.Errorf("%d bytes of a row give %+v", n, row)
		}
	}
	for _, stored := range [][]byte{nil, {1}, {1, 200}, {1, 5, 'a'}, {1, 1, 'a', 'b'}} {
		if v := decodeEntry(stored); len(v) > 3 {
			t.Errorf("%q gives %q", stored, v)
		}
	}
	for _, key := range [][]byte{nil, {3}, {9, 1}} {
		if v, rest := cutOrdered(key); v != 0 || rest != nil {
			t.Errorf("%q gives %d, %q", key, v, rest)
		}
	}
}

func FuzzValuesComeBack(f *testing.F) {
	f.Add([]byte(digestOf(1)+"between"+digestOf(2)), uint64(1), uint64(0))
	f.Add([]byte("sha256:sha256:"), uint64(1)<<62, uint64(1)<<62)
	f.Fuzz(func(t *testing.T, value []byte, created, more uint64) {
		created, more = created>>1, more>>2 // revisions are indexes of raft's log
		got := decodeRow(nil, encodeRow(created, created+more, value))
		if !bytes.Equal(got.Value, value) || got.Created != created || got.Revision != created+more {
			t.Fatalf("%q, %d and %d more came back as %+v", value, created, more, got)
		}
		if got := decodeEntry(encodeEntry(value)); !bytes.Equal(got, value) {
			t.Fatalf("%q came back as %q", value, got)
		}
	})
}

func TestOrdered(t *testing.T) {
	var last []byte
	for _, v := range []uint64{0, 1, 2, 255, 256, 257, 65535, 65536, 1 << 24, 1<<32 - 1, 1 << 40, 1<<56 + 1, 1<<64 - 1} {
		b := ordered(nil, v)
		if last != nil && bytes.Compare(last, b) >= 0 {
			t.Errorf("%d is not above the one before: %x, %x", v, last, b)
		}
		if got, rest := cutOrdered(append(b, 'x')); got != v || string(rest) != "x" {
			t.Errorf("%d came back as %d and %q", v, got, rest)
		}
		last = b
	}
}

// The engines give the same rows in the same order, whatever zero bytes are in
// the keys and in the bounds.
func TestEnginesAgreeOnKeys(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	key := func() []byte {
		b := make([]byte, 1+random.IntN(4))
		for i := range b {
			b[i] = []byte{0, 0, 1, 'a', 'b', 0xff}[random.IntN(6)]
		}
		return b
	}
	memory, file := NewMemory(), openTestBolt(t, filepath.Join(t.TempDir(), "state.db"))
	// Every third Update is moved below, so that keys lie in the layers and there.
	layers := openTestBehind(t, filepath.Join(t.TempDir(), "state.db"), time.Hour)
	for round := range 60 {
		type change struct {
			key, value []byte
		}
		var changes []change
		for range 20 {
			c := change{key: key()}
			if random.IntN(3) > 0 {
				c.value = encodeRow(1, uint64(round+1), nil)
			}
			changes = append(changes, c)
		}
		if round%3 == 0 {
			if err := layers.Sync(); err != nil {
				t.Fatal(err)
			}
		}
		for _, e := range []Engine{memory, file, layers} {
			if err := e.Update(func(w Writer) error {
				for _, c := range changes {
					var err error
					if c.value == nil {
						err = w.Unset(rows, c.key)
					} else {
						err = w.Set(rows, c.key, c.value)
					}
					if err != nil {
						return err
					}
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
		}
		compare := func(a, b Content) {
			for range 40 {
				from, to := key(), key()
				switch random.IntN(4) {
				case 0:
					from = nil
				case 1:
					to = nil
				}
				if diff := cmp.Diff(list(a, rows, from, to), list(b, rows, from, to)); diff != "" {
					t.Fatalf("from %q to %q: %s", from, to, diff)
				}
				if k := key(); !bytes.Equal(a.Lookup(rows, k), b.Lookup(rows, k)) {
					t.Fatalf("the engines differ in %q", k)
				}
			}
		}
		if err := memory.Read(func(a Content) error {
			return errors.Join(
				file.Read(func(b Content) error { compare(a, b); return nil }),
				layers.Read(func(b Content) error { compare(a, b); return nil }))
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// Pages of a table that grows at some places are full; those of a table whose
// keys are random are as full as halves that are filled.
func TestPagesArePacked(t *testing.T) {
	const batches, size = 400, 40
	random := rand.New(rand.NewPCG(5, 6))
	path := filepath.Join(t.TempDir(), "state.db")
	e := openTestBolt(t, path)
	e.(*bolt).db.NoSync = true
	value := encodeRow(1, 1, bytes.Repeat([]byte("v"), 60))
	var next [20]int
	for range batches {
		var keys []string
		for i := range size {
			place := i % len(next)
			keys = append(keys, fmt.Sprintf("grows\x00place%02d\x00tag-%08d", place, next[place]), fmt.Sprintf("random\x00%016x", random.Uint64()))
			next[place]++
		}
		// As many clients at once bring them: not quite in order.
		random.Shuffle(len(keys), func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
		if err := e.Update(func(w Writer) error {
			for _, k := range keys {
				if err := w.Set(rows, []byte(k), value); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	err := e.(*bolt).db.View(func(tx *bbolt.Tx) error {
		for table, least := range map[string]float64{"grows": 0.78, "random": 0.62} {
			stats := tx.Bucket([]byte(rows.String())).Bucket([]byte(table + groupEnd)).Stats()
			if stats.KeyN != batches*size {
				t.Errorf("%s has %d rows", table, stats.KeyN)
			}
			if full := float64(stats.LeafInuse) / float64(stats.LeafAlloc); full < least {
				t.Errorf("pages of %s are %.2f full, want %.2f", table, full, least)
			} else {
				t.Logf("pages of %s are %.2f full", table, full)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A log's entries lie under a number and not under its name, and logs whose
// names begin alike do not mix.
func TestLogsHaveNumbers(t *testing.T) {
	for name, open := range engines(t) {
		t.Run(name, func(t *testing.T) {
			e := open(t)
			m := newTestMachine(t, e)
			long := strings.Repeat("n", 200)
			do(t, m, nil, trimOp("trimmed first", 3))
			for i := range 300 {
				do(t, m, nil, appendOp(long, fmt.Sprint("long ", i)), appendOp("n", fmt.Sprint("short ", i)), appendOp("trimmed first", fmt.Sprint(i)))
			}
			restored := open(t)
			if err := newTestMachine(t, restored).Restore(snapshotOf(t, m)); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(dump(t, e), dump(t, restored)); diff != "" {
				t.Error(diff)
			}
			_ = e.Read(func(c Content) error {
				for k := range c.Ascend(entries, nil, nil) {
					if len(k) > 5 {
						t.Errorf("the key of an entry has %d bytes", len(k))
					}
				}
				var got []string
				for _, v := range ReadLog(c, []byte("n"), 298) {
					got = append(got, string(v))
				}
				if !slices.Equal(got, []string{"short 298", "short 299"}) {
					t.Errorf("the log ends with %q", got)
				}
				return nil
			})
		})
	}
}

// A push looks for some twenty rows, a pull for a few: what each costs the collector is
// paid by all.
func TestLookingForARowMakesNoGarbage(t *testing.T) {
	engine, err := OpenBolt(filepath.Join(t.TempDir(), "meta.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close()
	key := func(i int) []byte { return fmt.Appendf(nil, "boat\x00%05d", i) }
	if err := engine.Update(func(w Writer) error {
		for i := range 5000 { // three levels of pages
			if err := w.Set(rows, key(2*i), encodeRow(1, 1, bytes.Repeat([]byte("v"), 100))); err != nil {
				return err
			}
		}
		return w.Set(rows, []byte("alone"), encodeRow(1, 1, nil))
	}); err != nil {
		t.Fatal(err)
	}
	state, err := engine.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer state.Release()
	for _, key := range [][]byte{key(500), key(9998), key(501), key(9999), []byte("alone"), []byte("none"), []byte("boat\x00"), []byte("fleet\x001")} {
		there := string(key) == "alone" || len(key) == 10 && key[9]%2 == 0
		if got := state.Lookup(rows, key) != nil; got != there {
			t.Errorf("%q is there: %v", key, got)
		}
		if n := testing.AllocsPerRun(100, func() { state.Lookup(rows, key) }); n > 0 && key[0] != 'f' {
			t.Errorf("looking for %q allocates %v times", key, n)
		}
	}
}
