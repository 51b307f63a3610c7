package plan

import (
	"slices"
	"testing"
)

// A piece that an earlier attempt left, and that turns out to be rotten, is said to be
// needed to those who were told to leave it out; one that came meanwhile is not.
func TestRottenPiecesMayBeChosenAgain(t *testing.T) {
	w := NewWant(4, Rules{}, seeded())
	w.SetAside([]int{0, 1, 2, 3})
	source := w.Join(nil, false)
	w.Join(some(4), false)
	if !source.Hears(Need) || w.All(Skip).Count() != 4 || w.Left() != 0 {
		t.Fatalf("set aside: hears %v, left out %d, left %d", source.Hears(Need), w.All(Skip).Count(), w.Left())
	}
	if asks := all(w, 0, source); asks != nil {
		t.Fatalf("asked %v while everything may be here", asks)
	}
	w.Arrived(0, nil, 0)
	w.Notes()
	w.PutBack(0)
	w.PutBack(3)
	if got := w.Notes(); !slices.Equal(got, []Note{{3, Need}}) {
		t.Errorf("notes %v", got)
	}
	if asks := all(w, 0, source); len(asks) == 0 || asks[0].Piece != Any {
		t.Errorf("asked %v", asks)
	}
}
