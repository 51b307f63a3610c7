package kv

import (
	"math/rand/v2"
	"testing"
)

// A filter misses nothing that was put into it, and with a full layer in it is in doubt
// about few others.
func TestFilterMissesNothing(t *testing.T) {
	var f filter
	var in []uint64
	for range 18000 {
		in = append(in, rand.Uint64())
		f.add(in[len(in)-1])
	}
	for _, sum := range in {
		if !f.may(sum) {
			t.Fatalf("%x is in it, and it says no", sum)
		}
	}
	doubts, others := 0, 100000
	for range others {
		if f.may(rand.Uint64()) {
			doubts++
		}
	}
	if doubts > others/40 {
		t.Errorf("in doubt about %d of %d that are not in it", doubts, others)
	}
	if (*filter)(nil).may(in[0]) {
		t.Error("what is empty may have something")
	}
}
