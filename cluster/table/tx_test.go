package table_test

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
)

func TestTxSeesItsOwnWrites(t *testing.T) {
	both(t, func(t *testing.T, open func() *table.DB) {
		db := open()
		boats := table.Define[boat](db, "boat")
		tabletest.Start(t, db)
		for _, k := range []string{"b", "d", "f"} {
			put(t, db, boats, boat{Crew: 1}, k)
		}
		_, err := db.Update(t.Context(), func(tx *table.Tx) error {
			for _, k := range []string{"a", "d", "e", "g"} {
				if err := boats.Put(tx, boat{Crew: 2}, k); err != nil {
					return err
				}
			}
			for _, k := range []string{"b", "g"} {
				if err := boats.Delete(tx, k); err != nil {
					return err
				}
			}
			if diff := cmp.Diff([]string{"[a]", "[d]", "[e]", "[f]"}, keys(t, boats.Scan(tx, table.Range{}))); diff != "" {
				t.Errorf("scan: %s", diff)
			}
			if diff := cmp.Diff([]string{"[a]", "[d]"}, keys(t, boats.Scan(tx, table.Range{Limit: 2}))); diff != "" {
				t.Errorf("scan of two: %s", diff)
			}
			if _, _, ok, _ := boats.Get(tx, "b"); ok {
				t.Error("a deleted row is there")
			}
			b, meta, ok, err := boats.Get(tx, "d")
			if b.Crew != 2 || !ok || err != nil || meta.Created == 0 || meta.Revision != 0 {
				t.Errorf("own write: %+v %+v %v %v", b, meta, ok, err)
			}
			if _, meta, _, _ := boats.Get(tx, "a"); meta.Created != 0 {
				t.Errorf("a row that is new has Created %d", meta.Created)
			}
			if err := boats.Put(tx, boat{Crew: 3}, "b"); err != nil {
				return err
			}
			if _, meta, ok, _ := boats.Get(tx, "b"); !ok || meta.Created != 0 {
				t.Errorf("a row created anew: %v %+v", ok, meta)
			}
			for range boats.Scan(tx, table.Range{}) {
				break
			}
			return boats.Delete(tx, "f")
		})
		if err != nil {
			t.Fatal(err)
		}
		_ = db.View(func(v *table.View) error {
			if diff := cmp.Diff([]string{"[a]", "[b]", "[d]", "[e]"}, keys(t, boats.Scan(v, table.Range{}))); diff != "" {
				t.Errorf("committed: %s", diff)
			}
			if _, meta, _, _ := boats.Get(v, "b"); meta.Created != 4 || meta.Revision != 4 {
				t.Errorf("b: %+v", meta)
			}
			return nil
		})
	})
}

// TestWhatIsReadIsGuarded changes one row while an Update is on its way and
// looks whether the Update had to run again.
func TestWhatIsReadIsGuarded(t *testing.T) {
	type fn = func(tx *table.Tx, boats *table.Table[boat]) error
	scan := func(rg table.Range) fn {
		return func(tx *table.Tx, boats *table.Table[boat]) error {
			for _, err := range boats.Scan(tx, rg) {
				if err != nil {
					return err
				}
			}
			return nil
		}
	}
	get := func(k ...string) fn {
		return func(tx *table.Tx, boats *table.Table[boat]) error {
			_, _, _, err := boats.Get(tx, k...)
			return err
		}
	}
	for _, c := range []struct {
		name    string
		read    fn
		touch   string
		deleted bool
		again   bool
	}{
		{"a row", get("b"), "b", false, true},
		{"another row", get("b"), "d", false, false},
		{"an absent row", get("c"), "c", false, true},
		{"a deleted row", get("b"), "b", true, true},
		{"in the range", scan(table.Range{}), "d", false, true},
		{"removed from the range", scan(table.Range{}), "b", true, true},
		{"new in the range", scan(table.Range{}), "c", false, true},
		{"at the range's end", scan(table.Range{}), "zz", false, true},
		{"before what was read", scan(table.Range{Limit: 2}), "a", false, true},
		{"behind what was read", scan(table.Range{Limit: 2}), "f", false, false},
		{"just behind what was read", scan(table.Range{Limit: 2}), "dd", false, false},
		{"before the start", scan(table.Range{After: []string{"b"}}), "b", false, false},
		{"nothing read", func(*table.Tx, *table.Table[boat]) error { return nil }, "b", false, false},
		{"deleted blindly", func(tx *table.Tx, boats *table.Table[boat]) error { return boats.Delete(tx, "b") }, "b", false, false},
		{"overwritten", func(tx *table.Tx, boats *table.Table[boat]) error { return boats.Put(tx, boat{}, "b") }, "b", false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			db := tabletest.Open(t)
			boats := table.Define[boat](db, "boat")
			backend := tabletest.Start(t, db)
			for _, k := range []string{"b", "d", "f"} {
				put(t, db, boats, boat{Crew: 1}, k)
			}
			backend.BeforeNext(func() {
				_, err := db.Update(t.Context(), func(tx *table.Tx) error {
					if c.deleted {
						return boats.Delete(tx, c.touch)
					}
					return boats.Put(tx, boat{Crew: 9}, c.touch)
				})
				if err != nil {
					t.Error(err)
				}
			})
			runs := 0
			_, err := db.Update(t.Context(), func(tx *table.Tx) error {
				runs++
				if err := c.read(tx, boats); err != nil {
					return err
				}
				tx.Append("log", nil)
				return nil
			})
			if err != nil || (runs > 1) != c.again {
				t.Errorf("%d runs, %v", runs, err)
			}
		})
	}
}

func TestScanInATxIsBounded(t *testing.T) {
	db := tabletest.Open(t)
	boats := table.Define[boat](db, "boat")
	tabletest.Start(t, db)
	_, err := db.Update(t.Context(), func(tx *table.Tx) error {
		for i := range 257 {
			if err := boats.Put(tx, boat{}, fmt.Sprintf("%03d", i)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	read := func(limit int) error {
		_, err := db.Update(t.Context(), func(tx *table.Tx) error {
			for _, err := range boats.Scan(tx, table.Range{Limit: limit}) {
				if err != nil {
					return err
				}
			}
			tx.Append("log", nil)
			return nil
		})
		return err
	}
	if err := read(256); err != nil {
		t.Error(err)
	}
	if err := read(0); !errors.Is(err, table.ErrTooLarge) {
		t.Errorf("257 rows: %v", err)
	}
}

func TestTooLargeIsRefusedBeforeItTravels(t *testing.T) {
	db := tabletest.Open(t)
	boats := table.Define[boat](db, "boat")
	backend := tabletest.Start(t, db)
	for name, fn := range map[string]func(tx *table.Tx) error{
		"value": func(tx *table.Tx) error { return boats.Put(tx, boat{Port: string(make([]byte, 1<<20))}, "a") },
		"key": func(tx *table.Tx) error {
			return boats.Put(tx, boat{}, longName())
		},
		"log": func(tx *table.Tx) error { tx.Append(longName(), nil); return nil },
		"operations": func(tx *table.Tx) error {
			for range 4097 {
				tx.Append("log", nil)
			}
			return nil
		},
	} {
		if _, err := db.Update(t.Context(), fn); !errors.Is(err, table.ErrTooLarge) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := backend.Proposals(); n != 0 {
		t.Errorf("%d proposals", n)
	}
	for _, key := range [][]string{nil, {"a\x00b"}} {
		if _, err := db.Update(t.Context(), func(tx *table.Tx) error { return boats.Put(tx, boat{}, key...) }); err == nil {
			t.Errorf("key %q was taken", key)
		}
	}
}

func longName() string { return strings.Repeat("x", 3000) }

func TestLogsAndCounters(t *testing.T) {
	both(t, func(t *testing.T, open func() *table.DB) {
		db := open()
		tabletest.Start(t, db)
		var first, second table.Pending
		_, err := db.Update(t.Context(), func(tx *table.Tx) error {
			first = tx.Append("trips", []byte("one"))
			if err := tx.Add(7, 10, "quota", "acme"); err != nil {
				return err
			}
			if n, err := tx.Counter("quota", "acme"); n != 7 || err != nil {
				t.Errorf("counter in the Tx: %d %v", n, err)
			}
			if n, err := tx.LogLen("trips"); n != 1 || err != nil {
				t.Errorf("length in the Tx: %d %v", n, err)
			}
			second = tx.Append("trips", []byte("two"))
			return nil
		})
		if err != nil || first.Seq() != 0 || second.Seq() != 1 {
			t.Fatalf("%d %d %v", first.Seq(), second.Seq(), err)
		}
		_, err = db.Update(t.Context(), func(tx *table.Tx) error {
			tx.Append("trips", []byte("three"))
			return tx.Add(4, 10, "quota", "acme")
		})
		if !errors.Is(err, table.ErrOutOfBounds) {
			t.Errorf("over the bound: %v", err)
		}
		if _, err := db.Update(t.Context(), func(tx *table.Tx) error {
			tx.Trim("trips", 1)
			return tx.Add(math.MaxInt64-7, math.MaxInt64, "quota", "acme")
		}); err != nil {
			t.Fatal(err)
		}
		_ = db.View(func(v *table.View) error {
			var got []string
			for e, err := range v.Log("trips", 0, 5) {
				if err != nil {
					t.Error(err)
				}
				got = append(got, fmt.Sprintf("%d %s", e.Seq, e.Value))
			}
			if diff := cmp.Diff([]string{"1 two"}, got); diff != "" {
				t.Error(diff)
			}
			if n, _ := v.LogLen("trips"); n != 2 {
				t.Errorf("length %d", n)
			}
			if n, err := v.Counter("quota", "acme"); n != math.MaxInt64 || err != nil {
				t.Errorf("counter %d %v", n, err)
			}
			return nil
		})
	})
}

// TestWriters increments one row from 16 goroutines: none may be lost, and
// none may give up.
func TestWriters(t *testing.T) {
	db := tabletest.Open(t)
	boats := table.Define[boat](db, "boat")
	tabletest.Start(t, db)
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			for range 20 {
				if _, err := db.Update(t.Context(), func(tx *table.Tx) error {
					b, _, _, err := boats.Get(tx, "ada")
					if err != nil {
						return err
					}
					b.Crew++
					return boats.Put(tx, b, "ada")
				}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	_ = db.View(func(v *table.View) error {
		if b, _, _, _ := boats.Get(v, "ada"); b.Crew != 320 {
			t.Errorf("crew %d, want 320", b.Crew)
		}
		return nil
	})
}

func TestUseAfterTheEnd(t *testing.T) {
	both(t, func(t *testing.T, open func() *table.DB) {
		db := open()
		boats := table.Define(db, "boat", table.Index[boat]{Name: "port", Keys: byPort})
		tabletest.Start(t, db)
		put(t, db, boats, boat{Port: "x"}, "a")
		var late *table.Tx
		var view *table.View
		_, _ = db.Update(t.Context(), func(tx *table.Tx) error { late = tx; return nil })
		_ = db.View(func(v *table.View) error { view = v; return nil })
		for _, r := range []table.Reader{late, view} {
			if _, _, _, err := boats.Get(r, "a"); err == nil {
				t.Errorf("%T reads after its end", r)
			}
			for _, err := range boats.Scan(r, table.Range{}) {
				if err == nil {
					t.Errorf("%T scans after its end", r)
				}
			}
		}
		if err := boats.Put(late, boat{}, "a"); err == nil {
			t.Error("a Tx writes after its end")
		}
		for _, err := range boats.Lookup(view, "port", table.Range{}) {
			if err == nil {
				t.Error("a View looks up after its end")
			}
		}
	})
}

// A row whose key says everything is written unguarded: who writes it again
// meanwhile is in nobody's way, and it keeps its creation.
func TestARowWithoutFieldsIsWrittenUnguarded(t *testing.T) {
	both(t, func(t *testing.T, open func() *table.DB) {
		db := open()
		marks := table.Define[struct{}](db, "mark")
		tabletest.Start(t, db)
		mark := func(tx *table.Tx) error { return marks.Put(tx, struct{}{}, "a", "b") }
		var first table.Commit
		runs := 0
		if _, err := db.Update(t.Context(), func(tx *table.Tx) (err error) {
			if runs++; runs == 1 {
				if first, err = db.Update(t.Context(), mark); err != nil {
					return err
				}
			}
			return mark(tx)
		}); err != nil {
			t.Fatal(err)
		}
		if runs != 1 {
			t.Errorf("it took %d runs", runs)
		}
		if err := db.View(func(v *table.View) error {
			meta, ok, err := marks.Meta(v, "a", "b")
			if !ok || meta.Created != first.Revision || meta.Revision <= first.Revision {
				t.Errorf("the row is %+v, %v; made at %d", meta, ok, first.Revision)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	})
}
