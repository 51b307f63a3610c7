package plan

import (
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// Several connections of one node about one blob are served at once and count once; they
// give it no second share.
func TestSeveralConnectionsOfOneNode(t *testing.T) {
	q := NewQueue(Slots{Pieces: 1}, seeded())
	o := q.Offer(100, nil)
	var many []*Asker
	for range 5 {
		many = append(many, o.Join("many", transfer.Pull))
	}
	one := o.Join("one", transfer.Pull)
	ask := func(a *Asker, from int) {
		for i := range 8 {
			a.Ask(Ask{Piece: from + i})
		}
	}
	for i, a := range many {
		ask(a, 10*i)
	}
	var turns []*Turn
	for {
		turn, _ := q.Next(0, nil)
		if turn == nil {
			break
		}
		turns = append(turns, turn)
	}
	if len(turns) != len(many) {
		t.Fatalf("%d pieces are in service, want %d", len(turns), len(many))
	}
	ask(one, 60)
	if turn, _ := q.Next(0, nil); turn != nil {
		t.Fatal("another node is served beside, and there is one slot")
	}
	served := map[string]int{}
	for now := time.Millisecond; len(turns) > 0 && served["one"] < 8; now += time.Millisecond {
		q.Done(now, turns[0])
		turns = turns[1:]
		for {
			turn, _ := q.Next(now, nil)
			if turn == nil {
				break
			}
			served[turn.Asker.name]++
			turns = append(turns, turn)
		}
	}
	if served["one"] != 8 || served["many"] > 12 {
		t.Errorf("served %v", served)
	}
}
