package plan

import (
	"slices"
	"testing"
	"time"
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

// Who is alone and fast is asked for what it brings in a second and a half: while a lost packet holds up
// what has arrived, it has something to send. Who is slow is not, nor are all of several.
func TestAFastHolderIsAskedFarAhead(t *testing.T) {
	for name, c := range map[string]struct {
		every   time.Duration
		holders int
		want    int
	}{
		"fast":           {25 * time.Millisecond, 1, 60},
		"faster":         {time.Millisecond, 1, 64},
		"slow":           {200 * time.Millisecond, 1, 16},
		"one of two":     {25 * time.Millisecond, 2, 32},
		"one of several": {25 * time.Millisecond, 5, 16},
	} {
		t.Run(name, func(t *testing.T) {
			w := NewWant(2000, Rules{}, seeded())
			first := w.Join(nil, false)
			for range c.holders - 1 {
				w.Join(nil, false)
			}
			now := time.Duration(0)
			for range 20 {
				all(w, now, first)
				now += c.every
				w.Arrived(now, first, first.asked[0])
			}
			all(w, now, first)
			if got := len(first.asked); got != c.want {
				t.Errorf("%d pieces are asked ahead, want %d", got, c.want)
			}
		})
	}
}
