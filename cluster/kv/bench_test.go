package kv

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/hashicorp/raft"
)

// BenchmarkApply writes rows of 200 bytes to a state of 100,000, in batches of
// different sizes: what a batch saves is the syncs.
func BenchmarkApply(b *testing.B) {
	for _, size := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("batch=%d", size), func(b *testing.B) {
			e, err := OpenBolt(filepath.Join(b.TempDir(), "state.db"))
			if err != nil {
				b.Fatal(err)
			}
			defer e.Close()
			m, err := NewMachine(e, Hooks{})
			if err != nil {
				b.Fatal(err)
			}
			index := uint64(0)
			batch := func(n, ops int) {
				logs := make([]*raft.Log, n)
				for i := range logs {
					txn := Txn{ID: NewID(), Base: index}
					index++
					for j := range ops {
						key := fmt.Appendf(nil, "artifact\x00project\x00%08x", (index*2654435761+uint64(j))%100000)
						txn.Ops = append(txn.Ops, Op{Kind: Put, Key: key, Value: make([]byte, 200)})
					}
					data, err := txn.Encode()
					if err != nil {
						b.Fatal(err)
					}
					logs[i] = &raft.Log{Index: index, Type: raft.LogCommand, Data: data}
				}
				if _, ok := m.ApplyBatch(logs)[0].(Result); !ok {
					b.Fatal(m.Err())
				}
			}
			for range 25 {
				batch(1, 4000)
			}
			b.ResetTimer()
			for range b.N {
				batch(size, 1)
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*size), "us/txn")
		})
	}
}
