package plan

import (
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// Who reads at many nodes at once waits for the same pieces: they are not asked of the
// one that chooses, but for the first, and for what does not come for too long.
func TestReadersOfASwarmSpareTheSource(t *testing.T) {
	w := NewWant(64, Rules{}, seeded())
	source, mate := w.Join(nil, false), w.Join(transfer.PiecesBitmap(64), false)
	w.Cursors([]int{0, 1})
	if asks := all(w, 0, source); len(asks) != 1+maxCredit || asks[0] != (Ask{Piece: 0, Urgent: true}) || asks[1].Piece != Any || asks[2].Piece != Any {
		t.Fatalf("at first %v is asked of the source", asks)
	}
	w.Arrived(0, source, 0)
	w.Cursors([]int{1, 2})
	for _, a := range all(w, 0, source) {
		if a.Piece != Any {
			t.Errorf("%v is asked of the source, which chooses", a)
		}
	}
	w.Has(mate, 2)
	if a, ok := w.Next(0, mate); !ok || a != (Ask{Piece: 2, Urgent: true}) {
		t.Errorf("%v is asked of the other one", a)
	}
	w.Arrived(0, mate, 2)
	w.Cursors([]int{1})
	if asks := all(w, 2*time.Second, source); len(asks) != 1 || asks[0] != (Ask{Piece: 1, Urgent: true}) {
		t.Errorf("after two seconds %v is asked of the source", asks)
	}
}

// A holder that knows of a reader chooses what comes next for it.
func TestTheSourceGoesOnAfterReaders(t *testing.T) {
	q := NewQueue(Slots{}, seeded())
	o := q.Offer(400, nil)
	reads, other := o.Join("a", transfer.Pull), o.Join("b", transfer.Pull)
	reads.Ask(Ask{Piece: 160, Urgent: true})
	reads.Ask(Ask{Piece: Any})
	other.Ask(Ask{Piece: Any})
	for range 20 {
		turn, _ := q.Next(0, nil)
		if turn == nil || turn.Piece < 160 || turn.Piece > 160+20+inOrder {
			t.Fatalf("%+v goes out", turn)
		}
		q.Done(0, turn)
		turn.Asker.Ask(Ask{Piece: Any})
	}
}

// Several holders that choose among few pieces would choose the same.
func TestFewPiecesAreLeftToFewHolders(t *testing.T) {
	w := NewWant(8, Rules{}, seeded())
	w.Join(transfer.PiecesBitmap(8), false)
	asked := 0
	for range 6 {
		asked += len(all(w, 0, w.Join(nil, false)))
	}
	if asked != 2 {
		t.Errorf("%d of 8 pieces are left to six holders to choose, want 2", asked)
	}
}
