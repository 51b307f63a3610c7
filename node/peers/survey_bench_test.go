package peers

import (
	"fmt"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/table"
)

// BenchmarkSurvey is the cost of a look at a row of a blob that lacks nothing, asking
// the other homes included: what a full pass costs for each blob of the site.
func BenchmarkSurvey(b *testing.B) {
	s := newSite(b, 3)
	s.run()
	const rows = 2 * repairPage
	for i := range rows {
		c := bytesOf(fmt.Sprint("blob ", i), 100)
		s.put(c, s.nodes...)
		s.update(func(tx *table.Tx) error { return s.records.SetCopies(tx, digest.FromBytes(c), durability) })
	}
	n := s.nodes[0]
	l, err := n.currentLayout()
	if err != nil {
		b.Fatal(err)
	}
	b.ResetTimer()
	seen := 0
	for seen < b.N {
		if r := n.repairAll(b.Context(), l); r.cause != nil || len(r.failed) > 0 {
			b.Fatal(r.cause, r.example)
		}
		seen += rows
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(seen), "ns/row")
}
