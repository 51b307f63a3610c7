package table_test

import (
	"fmt"
	"testing"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
)

// BenchmarkRead reads one row and pages of 50 from a table of 50,000.
func BenchmarkRead(b *testing.B) {
	db := tabletest.OpenBolt(b, b.TempDir())
	boats := table.Define(db, "boat", table.Index[boat]{Name: "port", Keys: byPort})
	tabletest.Start(b, db)
	for i := range 50 {
		if _, err := db.Update(b.Context(), func(tx *table.Tx) error {
			for j := range 1000 {
				if err := boats.Put(tx, boat{Port: fmt.Sprint(j % 10), Crew: j}, "fleet", fmt.Sprint(i*1000+j)); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			b.Fatal(err)
		}
	}
	page := table.Range{Prefix: []string{"fleet"}, After: []string{"fleet", "3"}, Limit: 50}
	for name, read := range map[string]func(v *table.View) int{
		"Get": func(v *table.View) int {
			if _, _, ok, _ := boats.Get(v, "fleet", "777"); ok {
				return 1
			}
			return 0
		},
		"Scan": func(v *table.View) (n int) {
			for range boats.Scan(v, page) {
				n++
			}
			return n
		},
		"Lookup": func(v *table.View) (n int) {
			for range boats.Lookup(v, "port", table.Range{Prefix: []string{"3"}, After: []string{"fleet", "3"}, Limit: 50}) {
				n++
			}
			return n
		},
		"Count": func(v *table.View) int { n, _ := boats.Count(v, "fleet"); return n },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for range b.N {
				if err := db.View(func(v *table.View) error {
					if read(v) == 0 {
						return fmt.Errorf("nothing found")
					}
					return nil
				}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
