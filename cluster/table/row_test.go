package table_test

import (
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
)

type engineNow struct {
	Power int    `cbor:"power"`
	Fuel  string `cbor:"fuel,omitempty"`
}

type engineThen struct {
	Power int `cbor:"power"`
}

type origin struct {
	Yard string `cbor:"yard"`
}

// shipNow and shipThen are one row as two versions know it.
type shipNow struct {
	origin
	Name    string      `cbor:"name"`
	Engine  engineNow   `cbor:"engine"`
	Spare   *engineNow  `cbor:"spare,omitempty"`
	Engines []engineNow `cbor:"engines,omitempty"`
	Built   time.Time   `cbor:"built"`
	Tenant  string      `cbor:"tenant,omitempty"`
	Old     string      `cbor:"old,omitempty"`
}

type shipThen struct {
	Name   string      `cbor:"name"`
	Engine engineThen  `cbor:"engine"`
	Spare  *engineThen `cbor:"spare,omitempty"`
	Old    string      `cbor:"old,omitempty"`
	Built  time.Time   `cbor:"built"`
	secret string
	Skip   string `cbor:"-"`
}

// reopen runs one version of the program on a file that others use before and
// after it.
func reopen[T any](t *testing.T, dir string, use func(db *table.DB, ships *table.Table[T])) {
	t.Helper()
	t.Run("version", func(t *testing.T) {
		db := tabletest.OpenBolt(t, dir)
		ships := table.Define[T](db, "ship")
		tabletest.Start(t, db)
		use(db, ships)
	})
}

func TestAnOlderVersionKeepsNewerFields(t *testing.T) {
	dir := t.TempDir()
	built := time.Date(2031, 5, 6, 7, 8, 9, 123456789, time.UTC)
	row := shipNow{
		origin: origin{Yard: "split"}, Name: "ada", Tenant: "acme", Old: "x", Built: built,
		Engine: engineNow{Power: 5, Fuel: "diesel"}, Spare: &engineNow{Power: 1, Fuel: "sail"},
	}
	reopen(t, dir, func(db *table.DB, ships *table.Table[shipNow]) {
		if _, err := db.Update(t.Context(), func(tx *table.Tx) error {
			if err := ships.Put(tx, row, "gone"); err != nil {
				return err
			}
			return ships.Put(tx, row, "ada")
		}); err != nil {
			t.Fatal(err)
		}
	})
	reopen(t, dir, func(db *table.DB, ships *table.Table[shipThen]) {
		if _, err := db.Update(t.Context(), func(tx *table.Tx) error {
			s, _, ok, err := ships.Get(tx, "ada")
			if err != nil || !ok || !s.Built.Equal(built) {
				t.Errorf("%+v %v %v", s, ok, err)
			}
			s.Name, s.Old, s.secret, s.Skip = "bob", "", "x", "y"
			s.Engine.Power, s.Spare.Power = 6, 2
			if err := ships.Put(tx, s, "ada"); err != nil {
				return err
			}
			s.Name = "cid"
			if err := ships.Put(tx, s, "ada"); err != nil { // over our own write
				return err
			}
			// A row that is deleted first starts from nothing.
			if err := ships.Delete(tx, "gone"); err != nil {
				return err
			}
			return ships.Put(tx, shipThen{Name: "new"}, "gone")
		}); err != nil {
			t.Fatal(err)
		}
	})
	reopen(t, dir, func(db *table.DB, ships *table.Table[shipNow]) {
		_ = db.View(func(v *table.View) error {
			got, _, _, err := ships.Get(v, "ada")
			if err != nil {
				t.Fatal(err)
			}
			want := row
			want.Name, want.Old = "cid", ""
			want.Engine.Power = 6
			want.Spare = &engineNow{Power: 2, Fuel: "sail"}
			if diff := cmp.Diff(want, got, cmp.AllowUnexported(shipNow{})); diff != "" {
				t.Error(diff)
			}
			if got, _, _, _ := ships.Get(v, "gone"); got.Tenant != "" || got.Name != "new" {
				t.Errorf("%+v", got)
			}
			return nil
		})
	})
}

func TestUnreadableRows(t *testing.T) {
	dir := t.TempDir()
	type other struct {
		Name []int `cbor:"name"`
	}
	reopen(t, dir, func(db *table.DB, ships *table.Table[other]) {
		if _, err := db.Update(t.Context(), func(tx *table.Tx) error { return ships.Put(tx, other{Name: []int{1}}, "bad") }); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("reads", func(t *testing.T) {
		db := tabletest.OpenBolt(t, dir)
		ships := table.Define(db, "ship", table.Index[shipNow]{Name: "name", Keys: func(_ []string, s shipNow) [][]string { return [][]string{{s.Name}} }})
		tabletest.Start(t, db)
		if _, err := db.Update(t.Context(), func(tx *table.Tx) error { return ships.Put(tx, shipNow{Name: "ok"}, "good") }); err != nil {
			t.Fatal(err)
		}
		_ = db.View(func(v *table.View) error {
			if _, _, ok, err := ships.Get(v, "bad"); ok || err == nil || !strings.Contains(err.Error(), "ship/bad") {
				t.Errorf("get: %v %v", ok, err)
			}
			var seen []string
			for row, err := range ships.Scan(v, table.Range{}) {
				if (err != nil) != (row.Key[0] == "bad") {
					t.Errorf("scan of %v: %v", row.Key, err)
				}
				seen = append(seen, row.Key[0])
			}
			if diff := cmp.Diff([]string{"bad", "good"}, seen); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff([]string{"[good]"}, keys(t, ships.Lookup(v, "name", table.Range{}))); diff != "" {
				t.Error(diff)
			}
			return nil
		})
	})
}

func TestDefineRefuses(t *testing.T) {
	type array struct {
		_    struct{} `cbor:",toarray"`
		Name string
	}
	for name, define := range map[string]func(db *table.DB){
		"a bad name":   func(db *table.DB) { table.Define[boat](db, "Boat") },
		"a taken name": func(db *table.DB) { table.Define[boat](db, "boat"); table.Define[boat](db, "boat") },
		"no struct":    func(db *table.DB) { table.Define[string](db, "boat") },
		"time":         func(db *table.DB) { table.Define[time.Time](db, "boat") },
		"an array":     func(db *table.DB) { table.Define[array](db, "boat") },
		"no keys":      func(db *table.DB) { table.Define(db, "boat", table.Index[boat]{Name: "x"}) },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			define(tabletest.Open(t))
		})
	}
}

// TestValuesOutliveTheirView: what Get gives does not alias the engine.
func TestValuesOutliveTheirView(t *testing.T) {
	type cargo struct {
		Raw  []byte          `cbor:"raw"`
		CBOR cbor.RawMessage `cbor:"cbor"`
		Any  any             `cbor:"any"`
	}
	db := tabletest.OpenBolt(t, t.TempDir())
	cargos := table.Define[cargo](db, "cargo")
	tabletest.Start(t, db)
	want := cargo{Raw: []byte("raw bytes"), CBOR: cbor.RawMessage{0x63, 'a', 'b', 'c'}, Any: []byte("any")}
	if _, err := db.Update(t.Context(), func(tx *table.Tx) error { return cargos.Put(tx, want, "a") }); err != nil {
		t.Fatal(err)
	}
	var got cargo
	_ = db.View(func(v *table.View) (err error) {
		got, _, _, err = cargos.Get(v, "a")
		return err
	})
	// Writing through an alias of the file would crash: it is mapped read-only.
	got.Raw[0], got.CBOR[1], got.Any.([]byte)[0] = 'R', 'A', 'A'
	if string(got.Raw) != "Raw bytes" {
		t.Errorf("%+v", got)
	}
}
