package table_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
)

type boat struct {
	Port  string   `cbor:"port"`
	Crew  int      `cbor:"crew,omitempty"`
	Flags []string `cbor:"flags,omitempty"`
}

func byPort(_ []string, b boat) [][]string {
	if b.Port == "" {
		return nil
	}
	return [][]string{{b.Port}}
}

// both runs a test on each engine.
func both(t *testing.T, test func(t *testing.T, open func() *table.DB)) {
	t.Run("memory", func(t *testing.T) { test(t, func() *table.DB { return tabletest.Open(t) }) })
	t.Run("bolt", func(t *testing.T) {
		test(t, func() *table.DB { return tabletest.OpenBolt(t, t.TempDir()) })
	})
}

func put(t *testing.T, db *table.DB, boats *table.Table[boat], b boat, key ...string) table.Commit {
	t.Helper()
	c, err := db.Update(t.Context(), func(tx *table.Tx) error { return boats.Put(tx, b, key...) })
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestPutGetDelete(t *testing.T) {
	both(t, func(t *testing.T, open func() *table.DB) {
		db := open()
		boats := table.Define[boat](db, "boat")
		tabletest.Start(t, db)
		first := put(t, db, boats, boat{Port: "riva", Crew: 3}, "fleet", "ada")
		second := put(t, db, boats, boat{Port: "omis"}, "fleet", "ada")
		err := db.View(func(v *table.View) error {
			b, meta, ok, err := boats.Get(v, "fleet", "ada")
			if err != nil || !ok {
				t.Fatalf("get: %v %v", ok, err)
			}
			if diff := cmp.Diff(boat{Port: "omis"}, b); diff != "" {
				t.Error(diff)
			}
			if meta.Created != first.Revision || meta.Revision != second.Revision {
				t.Errorf("meta %+v, commits %v and %v", meta, first, second)
			}
			_, _, ok, err = boats.Get(v, "fleet")
			if ok || err != nil {
				t.Errorf("a key that is a prefix: %v %v", ok, err)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := db.Update(t.Context(), func(tx *table.Tx) error { return boats.Delete(tx, "fleet", "ada") }); err != nil {
			t.Fatal(err)
		}
		_ = db.View(func(v *table.View) error {
			if _, _, ok, err := boats.Get(v, "fleet", "ada"); ok || err != nil {
				t.Errorf("after delete: %v %v", ok, err)
			}
			return nil
		})
	})
}

func keys[T any](t *testing.T, rows func(func(table.Row[T], error) bool)) (out []string) {
	t.Helper()
	for row, err := range rows {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, fmt.Sprint(row.Key))
	}
	return out
}

func TestScanAndLookup(t *testing.T) {
	both(t, func(t *testing.T, open func() *table.DB) {
		db := open()
		boats := table.Define(db, "boat", table.Index[boat]{Name: "port", Version: 1, Keys: byPort})
		tabletest.Start(t, db)
		for _, k := range []string{"a", "b", "c", "d"} {
			put(t, db, boats, boat{Port: "p" + k[:1]}, "one", k)
			put(t, db, boats, boat{Port: "home"}, "two", k)
		}
		_ = db.View(func(v *table.View) error {
			_, one, _, err := boats.Get(v, "one", "b") // written before "two b"
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range []struct {
				name string
				rg   table.Range
				want []string
			}{
				{"written since", table.Range{Since: one.Revision}, []string{"[one c]", "[one d]", "[two b]", "[two c]", "[two d]"}},
				{"a page of those written since", table.Range{Since: one.Revision, After: []string{"one", "c"}, Limit: 2}, []string{"[one d]", "[two b]"}},
				{"none since", table.Range{Since: one.Revision + 100, Limit: 1}, nil},
				{"all of one", table.Range{Prefix: []string{"one"}}, []string{"[one a]", "[one b]", "[one c]", "[one d]"}},
				{"a page", table.Range{Prefix: []string{"one"}, After: []string{"one", "b"}, Limit: 1}, []string{"[one c]"}},
				{"after a key that is gone", table.Range{Prefix: []string{"one"}, After: []string{"one", "bb"}}, []string{"[one c]", "[one d]"}},
				{"after the end", table.Range{Prefix: []string{"one"}, After: []string{"two", "a"}}, nil},
				{"before the start", table.Range{Prefix: []string{"two"}, After: []string{"one", "a"}, Limit: 1}, []string{"[two a]"}},
				{"over all", table.Range{After: []string{"one", "d"}, Limit: 1}, []string{"[two a]"}},
			} {
				if diff := cmp.Diff(c.want, keys(t, boats.Scan(v, c.rg))); diff != "" {
					t.Errorf("%s: %s", c.name, diff)
				}
			}
			if diff := cmp.Diff([]string{"[two a]", "[two b]", "[two c]", "[two d]"}, keys(t, boats.Lookup(v, "port", table.Range{Prefix: []string{"home"}}))); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff([]string{"[two c]"}, keys(t, boats.Lookup(v, "port", table.Range{Prefix: []string{"home"}, After: []string{"two", "b"}, Limit: 1}))); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff([]string{"[one a]", "[one b]"}, keys(t, boats.Lookup(v, "port", table.Range{After: []string{"two", "d"}, AfterIndex: []string{"home"}, Limit: 2}))); diff != "" {
				t.Error(diff)
			}
			if n, err := boats.Count(v, "two"); n != 4 || err != nil {
				t.Errorf("count: %d %v", n, err)
			}
			return nil
		})
	})
}

func TestConflictRunsAgain(t *testing.T) {
	db := tabletest.Open(t)
	boats := table.Define[boat](db, "boat")
	backend := tabletest.Start(t, db)
	put(t, db, boats, boat{Crew: 1}, "ada")
	backend.BeforeNext(func() { put(t, db, boats, boat{Crew: 10}, "ada") })
	runs := 0
	_, err := db.Update(t.Context(), func(tx *table.Tx) error {
		runs++
		b, _, _, err := boats.Get(tx, "ada")
		if err != nil {
			return err
		}
		b.Crew++
		return boats.Put(tx, b, "ada")
	})
	if err != nil || runs != 2 {
		t.Fatalf("%d runs, %v", runs, err)
	}
	_ = db.View(func(v *table.View) error {
		if b, _, _, _ := boats.Get(v, "ada"); b.Crew != 11 {
			t.Errorf("crew %d", b.Crew)
		}
		return nil
	})
}

func TestUnknownOutcomeSendsTheSameBytes(t *testing.T) {
	db := tabletest.Open(t)
	table.Define[boat](db, "boat")
	backend := tabletest.Start(t, db)
	backend.LoseReplies(2)
	runs := 0
	var p table.Pending
	_, err := db.Update(t.Context(), func(tx *table.Tx) error {
		runs++
		p = tx.Append("trips", []byte("x"))
		return nil
	})
	if err != nil || runs != 1 || p.Seq() != 0 {
		t.Fatalf("%d runs, seq %d, %v", runs, p.Seq(), err)
	}
	_ = db.View(func(v *table.View) error {
		if n, _ := v.LogLen("trips"); n != 1 {
			t.Errorf("%d entries", n)
		}
		return nil
	})
	backend.SetLeader(false)
	if _, err := db.Update(t.Context(), func(tx *table.Tx) error { tx.Append("trips", nil); return nil }); !errors.Is(err, table.ErrNoLeader) || errors.Is(err, table.ErrUnknownOutcome) {
		t.Errorf("no leader: %v", err)
	}
}
