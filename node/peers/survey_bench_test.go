package peers

import (
	"fmt"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/table"
)

// BenchmarkSurvey is what a look at one blob costs that lacks nothing, in a site of
// three nodes of which two others are asked: by the pass over all blobs (survey)
// and before a node is removed (strands). SURVEY_BLOBS is how many the site has.
func BenchmarkSurvey(b *testing.B) {
	count := 2 * repairPage
	if n, err := strconv.Atoi(os.Getenv("SURVEY_BLOBS")); err == nil {
		count = n
	}
	s := newSite(b, 3)
	s.serve()
	var rows []digest.Digest
	for i := range count {
		c := bytesOf(fmt.Sprint("blob ", i), 100)
		rows = append(rows, digest.FromBytes(c))
		for _, n := range s.nodes {
			n.plant(rows[i], c)
		}
		if len(rows)%1000 == 0 || i == count-1 {
			s.update(func(tx *table.Tx) error {
				for _, d := range rows[len(rows)-1-i%1000:] {
					if err := s.records.Live(tx, d, 100); err != nil {
						return err
					}
					if err := s.records.SetCopies(tx, d, durability); err != nil {
						return err
					}
				}
				return nil
			})
		}
	}
	one := s.nodes[0]
	l, err := one.currentLayout()
	if err != nil {
		b.Fatal(err)
	}
	per := func(b *testing.B, began time.Duration) {
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*count), "ns/blob")
		b.ReportMetric(float64(cpu(b)-began)/float64(b.N*count), "cpu-ns/blob")
	}
	b.Run("survey", func(b *testing.B) {
		began := cpu(b)
		for range b.N {
			if r := one.repairAll(b.Context(), l); r.cause != nil || len(r.failed) > 0 {
				b.Fatal(r.cause, r.example)
			}
		}
		per(b, began)
	})
	b.Run("strands", func(b *testing.B) {
		began := cpu(b)
		for range b.N {
			if got, err := one.strands(b.Context(), s.nodes[2].id); err != nil || got.blobs != 0 {
				b.Fatal(got, err)
			}
		}
		per(b, began)
	})
	b.Run("strands-of-what-this-node-lacks", func(b *testing.B) {
		other, err := emptied(one)
		if err != nil {
			b.Fatal(err)
		}
		one.Store = other
		began := cpu(b)
		for range b.N {
			if got, err := one.strands(b.Context(), s.nodes[2].id); err != nil || got.blobs != 0 {
				b.Fatal(got, err)
			}
		}
		per(b, began)
	})
}

// cpu is the processor time of this process so far, of all three nodes together.
func cpu(b *testing.B) time.Duration {
	var use syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &use); err != nil {
		b.Fatal(err)
	}
	return time.Duration(use.Utime.Nano() + use.Stime.Nano())
}
