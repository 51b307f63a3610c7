package table_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
)

func lookup(t *testing.T, db *table.DB, boats *table.Table[boat], index string, prefix ...string) (out []string) {
	t.Helper()
	_ = db.View(func(v *table.View) error {
		for row, err := range boats.Lookup(v, index, table.Range{Prefix: prefix}) {
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, fmt.Sprint(row.Index, row.Key))
		}
		return nil
	})
	return out
}

func TestIndexFollowsTheRows(t *testing.T) {
	both(t, func(t *testing.T, open func() *table.DB) {
		db := open()
		boats := table.Define(db, "boat", table.Index[boat]{Name: "flag", Keys: func(_ []string, b boat) (out [][]string) {
			for _, f := range b.Flags {
				out = append(out, strings.Split(f, "."))
			}
			return out
		}})
		tabletest.Start(t, db)
		put(t, db, boats, boat{Flags: []string{"hr.st", "it.ts", "bad\x00part"}}, "fleet", "a")
		put(t, db, boats, boat{Flags: []string{"hr.zd", ""}}, "fleet", "b")
		put(t, db, boats, boat{Flags: []string{"hr.st"}}, "c")
		if diff := cmp.Diff([]string{"[hr st] [c]", "[hr st] [fleet a]", "[hr zd] [fleet b]"}, lookup(t, db, boats, "flag", "hr")); diff != "" {
			t.Error(diff)
		}
		put(t, db, boats, boat{Flags: []string{"it.ts"}}, "fleet", "a")
		if _, err := db.Update(t.Context(), func(tx *table.Tx) error { return boats.Delete(tx, "c") }); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{"[] [fleet b]", "[hr zd] [fleet b]", "[it ts] [fleet a]"}, lookup(t, db, boats, "flag")); diff != "" {
			t.Error(diff)
		}
		_ = db.View(func(v *table.View) error {
			for _, err := range boats.Lookup(v, "nothing", table.Range{}) {
				if err == nil {
					t.Error("an index that is not defined")
				}
			}
			return nil
		})
	})
}

// TestIndexKeysDoNotRunTogether: entries whose parts would join to the same
// bytes stay apart.
func TestIndexKeysDoNotRunTogether(t *testing.T) {
	db := tabletest.Open(t)
	boats := table.Define(db, "boat", table.Index[boat]{Name: "x", Keys: func(_ []string, b boat) [][]string { return [][]string{b.Flags} }})
	tabletest.Start(t, db)
	put(t, db, boats, boat{Flags: []string{"a"}}, "b", "c")
	put(t, db, boats, boat{Flags: []string{"a", "b"}}, "c")
	if diff := cmp.Diff([]string{"[a b] [c]", "[a] [b c]"}, lookup(t, db, boats, "x", "a")); diff != "" {
		t.Error(diff)
	}
}

func TestIndexesAreBroughtUpToDate(t *testing.T) {
	dir := t.TempDir()
	const rows = 2300 // more than two chunks of a build
	key := func(i int) string { return fmt.Sprintf("%04d", i) }
	version := func(name string, use func(t *testing.T, db *table.DB, boats *table.Table[boat]), indexes ...table.Index[boat]) {
		t.Run(name, func(t *testing.T) {
			db := tabletest.OpenBolt(t, dir)
			boats := table.Define(db, "boat", indexes...)
			tabletest.Start(t, db)
			use(t, db, boats)
		})
	}
	want := func(index string, n int, prefix ...string) func(*testing.T, *table.DB, *table.Table[boat]) {
		return func(t *testing.T, db *table.DB, boats *table.Table[boat]) {
			t.Helper()
			if got := lookup(t, db, boats, index, prefix...); len(got) != n {
				t.Errorf("%d rows, want %d", len(got), n)
			}
		}
	}
	port := table.Index[boat]{Name: "port", Version: 1, Keys: byPort}
	crew := table.Index[boat]{Name: "port", Version: 2, Keys: func(_ []string, b boat) [][]string { return [][]string{{fmt.Sprint(b.Crew)}} }}
	version("no index yet", func(t *testing.T, db *table.DB, boats *table.Table[boat]) {
		for i := 0; i < rows; i += 100 {
			if _, err := db.Update(t.Context(), func(tx *table.Tx) error {
				for j := i; j < i+100; j++ {
					if err := boats.Put(tx, boat{Port: "split", Crew: j % 2}, key(j)); err != nil {
						return err
					}
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
		}
	})
	version("a new index", want("port", rows, "split"), port)
	version("another version", func(t *testing.T, db *table.DB, boats *table.Table[boat]) {
		want("port", rows/2, "1")(t, db, boats)
		want("port", 0, "split")(t, db, boats)
	}, crew)
	version("dropped, and the rows move on", func(t *testing.T, db *table.DB, boats *table.Table[boat]) {
		put(t, db, boats, boat{Port: "omis", Crew: 1}, key(0))
	})
	version("the same version again", want("port", rows/2+1, "1"), crew)
}

func TestKeysThatPanicLeaveTheRowOut(t *testing.T) {
	db := tabletest.Open(t)
	boats := table.Define(db, "boat", table.Index[boat]{Name: "flag", Keys: func(_ []string, b boat) [][]string {
		return [][]string{{b.Flags[0]}}
	}})
	tabletest.Start(t, db)
	put(t, db, boats, boat{}, "a")
	put(t, db, boats, boat{Flags: []string{"hr"}}, "b")
	if diff := cmp.Diff([]string{"[hr] [b]"}, lookup(t, db, boats, "flag")); diff != "" {
		t.Error(diff)
	}
}

func TestRestoreBuildsTheIndexes(t *testing.T) {
	open := func(dir string) (*table.DB, *table.Table[boat]) {
		db := tabletest.OpenBolt(t, dir)
		boats := table.Define(db, "boat", table.Index[boat]{Name: "port", Version: 1, Keys: byPort})
		return db, boats
	}
	from, there := open(t.TempDir())
	tabletest.Start(t, from)
	put(t, from, there, boat{Port: "split"}, "a")
	put(t, from, there, boat{Port: "omis"}, "b")
	dir := t.TempDir()
	to, here := open(dir)
	tabletest.Start(t, to)
	put(t, to, here, boat{Port: "split"}, "must go")
	changes := to.Watch(t.Context(), "boat")
	if err := to.Machine().Restore(tabletest.Snapshot(t, from)); err != nil {
		t.Fatal(err)
	}
	if rev := <-changes; rev != 2 {
		t.Errorf("told of revision %d", rev)
	}
	if diff := cmp.Diff([]string{"[omis] [b]", "[split] [a]"}, lookup(t, to, here, "port")); diff != "" {
		t.Error(diff)
	}
}
