package peers

import (
	"fmt"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
)

func nodeIDs(n int) (ids []string) {
	for i := range n {
		ids = append(ids, digest.FromString(fmt.Sprint(i)).Encoded()[:32])
	}
	return ids
}

func TestPlacementIsAFunctionOfTheSet(t *testing.T) {
	ids := nodeIDs(7)
	given := slices.Clone(ids)
	d := digest.FromString("a blob")
	want := placement(d, ids)
	if !slices.Equal(ids, given) {
		t.Error("placement changed what it was given")
	}
	slices.Reverse(given)
	if got := placement(d, given); !slices.Equal(got, want) {
		t.Errorf("in another order of nodes: %v, want %v", got, want)
	}
	if got := homes(d, ids, 3); !slices.Equal(got, want[:3]) {
		t.Errorf("homes are %v, want the first three of %v", got, want)
	}
	if got := homes(d, ids[:2], 3); len(got) != 2 {
		t.Errorf("homes among two nodes are %v", got)
	}
	if got := homes(d, nil, 3); len(got) != 0 {
		t.Errorf("homes among no nodes are %v", got)
	}
	// Every version must agree with those that are out there.
	if got := placement(digest.FromString("a blob"), []string{"a", "b", "c", "d"}); !slices.Equal(got, []string{"b", "a", "c", "d"}) {
		t.Errorf("placement is %v: nodes of two versions would not agree", got)
	}
}

func TestPlacementIsBalanced(t *testing.T) {
	const nodes, count = 5, 5000
	ids := nodeIDs(nodes)
	homesOf, firsts := map[string]int{}, map[string]int{}
	for i := range count {
		d := digest.FromString(fmt.Sprintf("blob %d", i))
		for _, id := range homes(d, ids, replicas) {
			homesOf[id]++
		}
		firsts[placement(d, ids)[0]]++
	}
	// 18.47 is the 99.9 % bound of chi square with four degrees of freedom; the
	// homes of one blob are distinct, which only makes them more even.
	for name, counts := range map[string]map[string]int{"homes": homesOf, "firsts": firsts} {
		total := 0
		for _, n := range counts {
			total += n
		}
		mean, chi := float64(total)/nodes, 0.0
		for _, id := range ids {
			off := float64(counts[id]) - mean
			chi += off * off / mean
		}
		if chi > 18.47 {
			t.Errorf("%s are %v: chi square %.1f", name, counts, chi)
		}
	}
}

func TestPlacementMovesLittle(t *testing.T) {
	ids := nodeIDs(6)
	moved := 0
	const count = 2000
	for i := range count {
		d := digest.FromString(fmt.Sprintf("blob %d", i))
		before, after := homes(d, ids[:5], replicas), homes(d, ids, replicas)
		for _, id := range after {
			if !slices.Contains(before, id) {
				if id != ids[5] {
					t.Fatalf("blob %d moved between nodes that were there before", i)
				}
				moved++
			}
		}
		// The order of those that stay does not change either.
		if rest := slices.DeleteFunc(placement(d, ids), func(id string) bool { return id == ids[5] }); !slices.Equal(rest, placement(d, ids[:5])) {
			t.Fatalf("blob %d: the new node changed the order of the others", i)
		}
	}
	if share := float64(moved) / count; share < 0.44 || share > 0.56 { // 3 of 6
		t.Errorf("the new node got %.2f of all blobs, want about a half", share)
	}
}
