package plan

import (
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// Readers that begin together wait for the same piece. One gets it, and passes it on; what else
// there is goes to the others meanwhile. What nobody passes on goes out again.
func TestAPieceIsLeftToOthersToPassOn(t *testing.T) {
	q := NewQueue(Slots{}, seeded())
	o := q.Offer(8, nil)
	a, b, c := o.Join("a", transfer.Pull), o.Join("b", transfer.Pull), o.Join("c", transfer.Pull)
	for _, k := range []*Asker{a, b, c} {
		k.Ask(Ask{Piece: 0, Urgent: true})
		k.Hear(Note{0, Skip})
	}
	b.Ask(Ask{Piece: Any})
	if turn := next(t, q, 0); turn.Asker != a || turn.Piece != 0 {
		t.Fatalf("%+v goes out first", turn)
	}
	if turn := next(t, q, 0); turn.Asker != b || turn.Piece == 0 {
		t.Fatalf("%+v goes out next, and the first has just got that", turn)
	}
	turn, again := q.Next(0, nil)
	if turn != nil || again <= 0 || again > passOnLate {
		t.Fatalf("%+v goes out, or something does after %v", turn, again)
	}
	b.Cancel(0) // a passes it on to b
	if turn := next(t, q, again); turn.Asker != c || turn.Piece != 0 {
		t.Errorf("%+v goes out to the one that got it from nobody", turn)
	}
}

// What is there to choose is not sent twice in a row either.
func TestOfFewPiecesNoneIsChosenTwiceInARow(t *testing.T) {
	q := NewQueue(Slots{}, seeded())
	o := q.Offer(2, nil)
	for _, name := range []string{"a", "b", "c"} {
		o.Join(name, transfer.Pull).Ask(Ask{Piece: Any})
	}
	if one, two := next(t, q, 0), next(t, q, 0); one.Piece == two.Piece {
		t.Errorf("%d goes out twice", one.Piece)
	}
	if turn, _ := q.Next(0, nil); turn != nil {
		t.Errorf("%+v goes out, and two others have just got the two pieces", turn)
	}
	next(t, q, passOnLate)
}

func TestWhomToLeaveNothingTo(t *testing.T) {
	for name, c := range map[string]struct {
		pieces int
		change func(q *Queue, o *Offer, a, b *Asker)
	}{
		"small":               {1, func(*Queue, *Offer, *Asker, *Asker) {}},
		"the one that has it": {8, func(_ *Queue, _ *Offer, a, _ *Asker) { a.Apart() }},
		"the one that asks":   {8, func(_ *Queue, _ *Offer, _, b *Asker) { b.Apart() }},
		"it has left":         {8, func(q *Queue, _ *Offer, a, _ *Asker) { q.Leave(a) }},
		"still being fetched": {8, func(_ *Queue, o *Offer, _, _ *Asker) { o.have = o.all.Clone() }},
	} {
		t.Run(name, func(t *testing.T) {
			q := NewQueue(Slots{}, seeded())
			o := q.Offer(c.pieces, nil)
			a, b := o.Join("a", transfer.Pull), o.Join("b", transfer.Pull)
			a.Ask(Ask{Piece: 0, Urgent: true})
			next(t, q, 0)
			c.change(q, o, a, b)
			b.Ask(Ask{Piece: 0, Urgent: true})
			if turn, again := q.Next(0, nil); turn == nil {
				t.Errorf("a reader waits for %v", again)
			}
		})
	}
}

// What was asked of a holder that chooses is asked of another that has come to have it, and
// taken back once that one sends it.
func TestWhoPassesOnIsAskedToo(t *testing.T) {
	w := NewWant(8, Rules{}, seeded())
	source, mate := w.Join(nil, false), w.Join(transfer.PiecesBitmap(8), false)
	w.Cursors([]int{0, 1})
	asks := all(w, 0, source)
	if len(asks) != 1+maxCredit || asks[0] != (Ask{Piece: 0, Urgent: true}) || asks[1].Piece != Any {
		t.Fatalf("%v is asked of the source", asks)
	}
	w.Has(mate, 0)
	if a, ok := w.Next(0, mate); !ok || a != (Ask{Piece: 0, Urgent: true}) {
		t.Fatalf("%v is asked of the other one", a)
	}
	cancel, ok := w.Begun(time.Millisecond, mate, 0)
	if !ok || len(cancel) != 1 || cancel[0] != (Cancel{source, 0}) {
		t.Errorf("when the other one begins %v is taken back", cancel)
	}
	w.Leave(mate)
	if asks := all(w, time.Millisecond, source); len(asks) == 0 || asks[0] != (Ask{Piece: 0, Urgent: true}) {
		t.Errorf("%v is asked of the source when the other one has gone", asks)
	}
}

// The one that came first asked for given pieces, as of a holder alone. When others fetch too
// the holder chooses, and those would go out beside what it chooses.
func TestWhatAHolderIsToChooseIsNotAskedOfItToo(t *testing.T) {
	w := NewWant(64, Rules{Depth: 8}, seeded())
	source := w.Join(nil, false)
	asks := all(w, 0, source)
	w.Begun(0, source, asks[0].Piece)
	w.Join(transfer.PiecesBitmap(64), false)
	back := w.Back()
	for _, c := range back {
		if c.Holder != source || c.Piece == asks[0].Piece || !w.Missing(c.Piece) {
			t.Errorf("piece %d is taken back", c.Piece)
		}
	}
	if len(back) != 7 || w.Back() != nil {
		t.Errorf("%d of 8 pieces are taken back, one of which is on its way", len(back))
	}
	for _, a := range all(w, 0, source) {
		if a.Piece != Any {
			t.Errorf("%v is asked of the source, which chooses", a)
		}
	}
}

// In a swarm a piece that its holder does not begin to send is asked of another soon, and of
// whoever begins last it is taken back.
func TestWhoHasAPieceTooIsAskedSoon(t *testing.T) {
	w := NewWant(2, Rules{}, seeded())
	w.Join(nil, false)
	first, second := w.Join(some(2, 0), false), w.Join(transfer.PiecesBitmap(2), false)
	w.Join(some(2, 1), false)
	if asks := all(w, 0, first); len(asks) != 1 || asks[0].Piece != 0 {
		t.Fatalf("%v is asked of the first", asks)
	}
	for _, h := range w.holders {
		all(w, 0, h)
	}
	w.Has(second, 0)
	if asks := all(w, 100*time.Millisecond, second); len(asks) != 0 {
		t.Errorf("%v is asked of the second at once", asks)
	}
	if asks := all(w, 250*time.Millisecond, second); len(asks) != 1 || asks[0].Piece != 0 {
		t.Fatalf("%v is asked of the second when the first has not begun", asks)
	}
	if cancel, _ := w.Begun(260*time.Millisecond, second, 0); len(cancel) != 1 || cancel[0] != (Cancel{first, 0}) {
		t.Errorf("%v is taken back when the second begins", cancel)
	}
}

// serveAll puts into service what may go.
func serveAll(q *Queue, now time.Duration) (turns []*Turn) {
	for {
		turn, _ := q.Next(now, nil)
		if turn == nil {
			return turns
		}
		turns = append(turns, turn)
	}
}

// Blobs of some bytes are sent in no time; that says nothing of how long pieces take.
func TestSmallBlobsMakeNoPieceLate(t *testing.T) {
	q := NewQueue(Slots{Pieces: 2}, seeded())
	for range 20 {
		a := q.Offer(1, nil).Join("a", transfer.Pull)
		a.Ask(Ask{Piece: 0})
		next(t, q, 0)
		q.Leave(a)
	}
	o := q.Offer(100, nil)
	for _, name := range []string{"a", "b", "c", "d"} {
		o.Join(name, transfer.Pull).Ask(Ask{Piece: Any})
	}
	if n := len(serveAll(q, 0)); n != 2 {
		t.Fatalf("%d in service", n)
	}
	if n := len(serveAll(q, 100*time.Millisecond)); n != 0 {
		t.Errorf("%d more after a tenth of a second", n)
	}
}

// Four in service at once take four times as long each as one alone. That is usual then, from the
// first on.
func TestPiecesAreAsFastAsTheUplink(t *testing.T) {
	const every = 100 * time.Millisecond
	q := NewQueue(Slots{Pieces: 4}, seeded())
	o := q.Offer(100, nil)
	for _, name := range []string{"a", "b", "c", "d", "e", "f", "g", "h"} {
		a := o.Join(name, transfer.Pull)
		for i := range 50 {
			a.Ask(Ask{Piece: i})
		}
	}
	turns := serveAll(q, 0)
	for now := every; now < 4*time.Second; now += every {
		q.Done(now, turns[0])
		turns = append(turns[1:], serveAll(q, now)...)
		if len(turns) != 4 {
			t.Fatalf("%d in service after %v", len(turns), now)
		}
	}
	if usual := q.usual(); usual != 4*every {
		t.Errorf("%v are usual", usual)
	}
}
