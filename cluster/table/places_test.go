package table

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// Whether there are few keys or many, the newest place of each is found.
func TestPlacesAreTheNewest(t *testing.T) {
	var p places
	newest := map[string]int{}
	for at := range 4 * fewPlaces {
		key := fmt.Sprint(rand.IntN(2 * fewPlaces))
		p.set([]byte(key), at)
		newest[key] = at
		for n := range 2 * fewPlaces {
			want, is := newest[fmt.Sprint(n)]
			if got, ok := p.find(fmt.Append(nil, n)); got != want || ok != is {
				t.Fatalf("after %d keys %d is at %d, %v; it is at %d, %v", at+1, n, got, ok, want, is)
			}
		}
	}
	if p.many == nil {
		t.Errorf("%d keys are compared one by one", len(p.keys))
	}
}
