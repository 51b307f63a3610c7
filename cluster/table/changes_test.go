package table_test

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
)

type counted struct {
	N int `cbor:"n"`
}

func TestChangesAreCollected(t *testing.T) {
	db := tabletest.Open(t)
	seen, other := table.Define[counted](db, "seen"), table.Define[counted](db, "seen_not")
	tabletest.Start(t, db)
	ctx, cancel := context.WithCancel(t.Context())
	c := db.Collect(ctx, 3, "seen")
	put := func(rows *table.Table[counted], keys ...string) {
		t.Helper()
		if _, err := db.Update(t.Context(), func(tx *table.Tx) error {
			for _, k := range keys {
				if err := rows.Put(tx, counted{1}, k, "part"); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	take := func() (names []string, lost bool) {
		keys, lost := c.Take()
		for _, k := range keys {
			if k.Table != "seen" || len(k.Parts) != 2 || k.Parts[1] != "part" {
				t.Errorf("collected %+v", k)
			}
			names = append(names, k.Parts[0])
		}
		slices.Sort(names)
		return names, lost
	}
	some := func() bool {
		select {
		case <-c.Some():
			return true
		default:
			return false
		}
	}
	put(other, "x")
	if got, lost := take(); some() || len(got) != 0 || lost {
		t.Errorf("another table's change gave %v, %v", got, lost)
	}
	put(seen, "a")
	put(seen, "b", "a")
	if got, lost := take(); !slices.Equal(got, []string{"a", "b"}) || lost {
		t.Errorf("collected %v, %v", got, lost)
	}
	if some() {
		t.Error("there is something after it was taken")
	}
	put(seen, "c")
	if !some() {
		t.Error("nobody is told of a change")
	}
	for i := range 4 {
		put(seen, fmt.Sprint(i))
	}
	if got, lost := take(); len(got) != 0 || !lost {
		t.Errorf("more than the limit: %v, %v", got, lost)
	}
	put(seen, "d")
	if got, lost := take(); !slices.Equal(got, []string{"d"}) || lost {
		t.Errorf("after the limit was passed: %v, %v", got, lost)
	}
	cancel()
	for i := 0; ; i++ { // AfterFunc runs on its own goroutine
		put(seen, fmt.Sprint("late", i))
		if got, _ := take(); len(got) == 0 {
			break
		}
	}
}
