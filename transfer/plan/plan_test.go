package plan

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

func seeded() *rand.Rand { return rand.New(rand.NewPCG(1, 2)) }

// all takes everything that there is to ask of a holder.
func all(w *Want, now time.Duration, h *Holder) (asks []Ask) {
	for {
		a, ok := w.Next(now, h)
		if !ok {
			return asks
		}
		asks = append(asks, a)
	}
}

func some(pieces int, which ...int) transfer.Bitmap {
	set := transfer.PiecesBitmap(pieces)
	for _, i := range which {
		set.Add(i)
	}
	return set
}

func TestNoPieceIsAskedTwice(t *testing.T) {
	w := NewWant(100, Rules{Depth: 8}, seeded())
	holders := []*Holder{w.Join(nil, false), w.Join(nil, false), w.Join(nil, false)}
	came := 0
	for now := time.Duration(0); came < 100; now += time.Millisecond {
		if now > time.Second {
			t.Fatal("the rest is not asked for")
		}
		seen := map[int]bool{}
		for _, h := range holders {
			for _, a := range all(w, now, h) {
				if a.Piece == Any {
					t.Fatal("left to the holder, though nobody else wants the blob")
				}
			}
			for _, i := range h.asked {
				if seen[i] {
					t.Fatalf("piece %d is asked of two", i)
				}
				seen[i] = true
			}
		}
		for _, h := range holders {
			if len(h.asked) > 0 {
				w.Arrived(now, h, h.asked[0])
				came++
			}
		}
	}
}

// Each holder's part is in proportion to its speed.
func TestHoldersShareBySpeed(t *testing.T) {
	const pieces = 1000
	w := NewWant(pieces, Rules{}, seeded())
	every := []int{1, 2, 4} // ticks a piece
	var holders []*Holder
	for range every {
		holders = append(holders, w.Join(nil, false))
	}
	sent := make([]int, len(every))
	tick := 0
	for ; w.Left() > 0 || len(w.asks) > 0; tick++ {
		now := time.Duration(tick) * time.Millisecond
		for k, h := range holders {
			all(w, now, h)
			if tick%every[k] == 0 && len(h.asked) > 0 {
				sent[k]++
				w.Arrived(now, h, h.asked[0])
			}
		}
	}
	if best := pieces * 4 / 7; tick > best*102/100 {
		t.Errorf("took %d ticks, %d at best; %v", tick, best, sent)
	}
}

func TestRarestFirst(t *testing.T) {
	w := NewWant(8, Rules{SwarmDepth: 1, Specific: true}, seeded())
	a := w.Join(some(8, 0, 1, 2), false)
	w.Join(some(8, 0, 1), false)
	w.Join(some(8, 0), false)
	for _, want := range []int{2, 1, 0} {
		asks := all(w, 0, a)
		if len(asks) != 1 || asks[0].Piece != want {
			t.Fatalf("asked %v, want piece %d", asks, want)
		}
		w.Arrived(0, a, want)
	}
	if asks := all(w, 0, a); asks != nil {
		t.Errorf("asked %v of a holder that has nothing more", asks)
	}
	w.Has(a, 7)
	if asks := all(w, 0, a); len(asks) != 1 || asks[0].Piece != 7 {
		t.Errorf("asked %v after it had one more", asks)
	}
}

// What is lost with a holder is missing again, and those that choose hear of it.
func TestLostPiecesComeBack(t *testing.T) {
	w := NewWant(8, Rules{}, seeded())
	source, peer := w.Join(nil, false), w.Join(some(8, 3), false)
	if asks := all(w, 0, source); len(asks) != maxCredit || asks[0].Piece != Any {
		t.Fatalf("of a holder that chooses: %v", asks)
	}
	all(w, 0, peer)
	if got := w.Notes(); !slices.Equal(got, []Note{{3, Skip}}) {
		t.Fatalf("notes %v", got)
	}
	w.Leave(peer)
	if got := w.Notes(); !slices.Equal(got, []Note{{3, Need}}) || w.Left() != 8 {
		t.Fatalf("notes %v, %d left", got, w.Left())
	}
	if _, ok := w.Begun(0, peer, 3); ok {
		t.Error("a piece begun by one that has left")
	}
}

// A holder chooses what is on its way from another: the other is told.
func TestChosenElsewhere(t *testing.T) {
	w := NewWant(8, Rules{}, seeded())
	source, peer := w.Join(nil, false), w.Join(some(8, 3), false)
	all(w, 0, source)
	all(w, 0, peer)
	cancel, ok := w.Begun(0, source, 3)
	if !ok || len(cancel) != 1 || cancel[0] != (Cancel{peer, 3}) || len(peer.asked) != 0 {
		t.Fatalf("cancel %v, %v", cancel, ok)
	}
	if cancel := w.Arrived(0, source, 3); cancel != nil || !w.Held(3) {
		t.Error("arrived")
	}
	if _, ok := w.Begun(0, peer, 5); ok {
		t.Error("a piece was taken that nobody had asked for")
	}
}

func TestStalledPiecesAreAskedElsewhere(t *testing.T) {
	w := NewWant(1, Rules{}, seeded())
	a, b := w.Join(nil, false), w.Join(nil, false)
	all(w, 0, a)
	if asks := all(w, 999*time.Millisecond, b); asks != nil {
		t.Fatalf("too soon: %v", asks)
	}
	if asks := all(w, time.Second, b); len(asks) != 1 {
		t.Fatal("never")
	}
	if cancel := w.Arrived(time.Second, b, 0); len(cancel) != 1 || cancel[0] != (Cancel{a, 0}) {
		t.Errorf("cancel %v", cancel)
	}
}

// A reader that comes late stops the rest until its first piece is here, and takes
// over what was asked for already.
func TestReadersOvertake(t *testing.T) {
	w := NewWant(64, Rules{Depth: 4}, seeded())
	h := w.Join(nil, false)
	was := all(w, 0, h)
	asked := was[2].Piece
	w.Cursors([]int{asked, 63})
	asks := all(w, 0, h)
	if len(asks) != 2 || asks[0] != (Ask{Piece: asked, Urgent: true, Again: true}) || asks[1] != (Ask{Piece: 63, Urgent: true}) {
		t.Fatalf("asked %v", asks)
	}
	w.Arrived(0, h, was[0].Piece)
	w.Arrived(0, h, was[1].Piece)
	if asks := all(w, 0, h); asks != nil {
		t.Fatalf("asked %v while a reader waits for its first piece", asks)
	}
	w.Arrived(0, h, asked)
	w.Cursors([]int{63})
	if asks := all(w, 0, h); len(asks) == 0 || asks[0].Urgent {
		t.Errorf("asked %v afterwards", asks)
	}
}

// What a reader waits for is asked of the faster holder.
func TestReadersAreServedByTheFast(t *testing.T) {
	w := NewWant(64, Rules{Depth: 2}, seeded())
	slow, fast := w.Join(nil, false), w.Join(nil, false)
	for i := range 8 {
		all(w, 0, slow)
		all(w, 0, fast)
		w.Arrived(time.Duration(i)*10*time.Millisecond, fast, fast.asked[0])
	}
	w.Arrived(time.Second, slow, slow.asked[0])
	w.Arrived(2*time.Second, slow, slow.asked[0])
	next := 0
	for w.Held(next) || w.asks[next] != nil {
		next++
	}
	w.Cursors([]int{next})
	if a, ok := w.Next(time.Second, slow); ok {
		t.Errorf("%v is asked of the slow one", a)
	}
	if a, ok := w.Next(time.Second, fast); !ok || a != (Ask{Piece: next, Urgent: true}) {
		t.Errorf("%v is asked of the fast one", a)
	}
}

func TestFarHoldersAreAskedByTheElected(t *testing.T) {
	w := NewWant(8, Rules{}, seeded())
	far := w.Join(nil, true)
	w.Elect(false)
	if asks := all(w, 0, far); asks != nil {
		t.Errorf("asked %v beyond the slow link", asks)
	}
	w.Elect(true)
	asks := all(w, 0, far)
	if asks == nil {
		t.Error("the elected asks nothing")
	}
	w.Begun(0, far, asks[0].Piece)
	if cancel := w.Elect(false); len(cancel) != len(asks)-1 || len(far.asked) != 1 {
		t.Errorf("%d of %d asks are taken back", len(cancel), len(asks))
	}
	w.Elect(true)
	w.Forget(far)
	near := w.Join(some(8, 1, 2, 3), false)
	for _, a := range all(w, 0, far) {
		if near.have.Has(a.Piece) {
			t.Errorf("piece %d is asked beyond the slow link and is near", a.Piece)
		}
	}
	w.Completed(near)
	if asks := all(w, 0, far); asks != nil {
		t.Errorf("asked %v beyond the slow link when all is near", asks)
	}
	nodes := []string{"a", "b", "c", "d"}
	first := Elect("sha256:1", nodes)
	rest := slices.DeleteFunc(slices.Clone(nodes), func(n string) bool { return n == first })
	slices.Reverse(rest)
	if second := Elect("sha256:1", rest); second == first || second == "" || Elect("sha256:1", nil) != "" {
		t.Errorf("after %s comes %q", first, second)
	}
}

// next takes turns, one after the other.
func next(t *testing.T, q *Queue, now time.Duration) *Turn {
	t.Helper()
	turn, _ := q.Next(now, nil)
	if turn == nil {
		t.Fatal("no turn")
	}
	q.Done(now, turn)
	return turn
}

func TestSourceSendsEachPieceOnce(t *testing.T) {
	q := NewQueue(Slots{}, seeded())
	o := q.Offer(30, nil)
	var askers []*Asker
	for _, name := range []string{"a", "b", "c"} {
		askers = append(askers, o.Join(name, transfer.Pull))
	}
	seen := map[int]bool{}
	for range 30 {
		for _, a := range askers {
			a.Ask(Ask{Piece: Any})
		}
		turn := next(t, q, 0)
		if seen[turn.Piece] {
			t.Fatalf("piece %d again after %d", turn.Piece, len(seen))
		}
		seen[turn.Piece] = true
	}
}

// New pieces go to who passes them on.
func TestFreshPiecesGoToWhoPassesThemOn(t *testing.T) {
	q := NewQueue(Slots{}, seeded())
	o := q.Offer(200, nil)
	a, b := o.Join("a", transfer.Pull), o.Join("b", transfer.Pull)
	got := map[*Asker]int{}
	for range 100 {
		a.Ask(Ask{Piece: Any})
		b.Ask(Ask{Piece: Any})
		turn := next(t, q, 0)
		got[turn.Asker]++
		if turn.Asker == a {
			b.Hear(Note{turn.Piece, Skip})
		}
	}
	if got[a] < 90 {
		t.Errorf("who passes pieces on got %d, who keeps them %d", got[a], got[b])
	}
}

// Classes share by weight, and none starves.
func TestClassesShareByWeight(t *testing.T) {
	q := NewQueue(Slots{}, seeded())
	var askers []*Asker
	got := map[transfer.Class]int{}
	for c := range transfer.Class(transfer.Classes) {
		askers = append(askers, q.Offer(2000, nil).Join(c.String(), c))
	}
	for range 1500 {
		for _, a := range askers {
			a.Ask(Ask{Piece: Any})
		}
		got[next(t, q, 0).Asker.class]++
	}
	for c, n := range got {
		if want := 100 * c.Weight(); n < want-2 || n > want+2 {
			t.Errorf("%s got %d, want %d", c, n, want)
		}
	}
	// One that comes back from a pause has saved nothing up.
	for range 200 {
		askers[0].Ask(Ask{Piece: Any})
		next(t, q, 0)
	}
	run := 0
	for range 20 {
		askers[0].Ask(Ask{Piece: Any})
		askers[3].Ask(Ask{Piece: Any})
		if next(t, q, 0).Asker == askers[3] {
			run++
		}
	}
	if run > 4 {
		t.Errorf("prefetch had %d of 20 turns", run)
	}
}

// One that wants ten blobs gets as much as one that wants one.
func TestPeersShareEvenly(t *testing.T) {
	q := NewQueue(Slots{}, seeded())
	var askers []*Asker
	for range 10 {
		askers = append(askers, q.Offer(1000, nil).Join("greedy", transfer.Pull))
	}
	modest := q.Offer(1000, nil).Join("modest", transfer.Pull)
	got := 0
	for range 100 {
		for _, a := range append(askers, modest) {
			a.Ask(Ask{Piece: Any})
		}
		if next(t, q, 0).Asker == modest {
			got++
		}
	}
	if got < 49 || got > 51 {
		t.Errorf("had %d of 100 turns", got)
	}
}

func TestUrgentPiecesGoFirst(t *testing.T) {
	q := NewQueue(Slots{}, seeded())
	o := q.Offer(100, nil)
	a, b := o.Join("a", transfer.Pull), o.Join("b", transfer.Pull)
	for i := range 5 {
		a.Ask(Ask{Piece: i})
		b.Ask(Ask{Piece: 10 + i})
	}
	b.Ask(Ask{Piece: 13, Urgent: true})
	b.Ask(Ask{Piece: 14, Urgent: true})
	b.Ask(Ask{Piece: 13, Urgent: true})
	for _, want := range []int{13, 14} {
		if turn := next(t, q, 0); turn.Piece != want {
			t.Errorf("piece %d goes out, want %d", turn.Piece, want)
		}
	}
	if b.Waiting() != 3 || b.urgent != 0 {
		t.Errorf("%d wait, %d of them urgent", b.Waiting(), b.urgent)
	}
}

// The limiter holds one asker back, not the others.
func TestLimiterHoldsBackOne(t *testing.T) {
	q := NewQueue(Slots{}, seeded())
	a, b := q.Offer(10, nil).Join("a", transfer.Pull), q.Offer(10, nil).Join("b", transfer.Pull)
	a.Ask(Ask{Piece: Any})
	b.Ask(Ask{Piece: Any})
	asked := 0
	allow := func(who *Asker, _ int) time.Duration {
		asked++
		if who == a {
			return time.Second
		}
		return 0
	}
	turn, _ := q.Next(0, allow)
	if turn == nil || turn.Asker != b {
		t.Fatal("the other has no turn")
	}
	q.Done(0, turn)
	was := asked
	turn, again := q.Next(time.Millisecond, allow)
	if turn != nil || again != 999*time.Millisecond || asked != was {
		t.Errorf("turn %v, again after %s, asked %d times", turn, again, asked-was)
	}
	if turn, _ := q.Next(time.Second, nil); turn == nil || turn.Asker != a {
		t.Error("it never has its turn")
	}
}

// Few pieces are in service at once, but those that wait for slow receivers do not
// keep the uplink idle.
func TestSlots(t *testing.T) {
	q := NewQueue(Slots{Pieces: 2, Most: 5}, seeded())
	o := q.Offer(100, nil)
	var askers []*Asker
	for _, name := range []string{"a", "b", "c", "d", "e", "f", "g"} {
		a := o.Join(name, transfer.Pull)
		a.Ask(Ask{Piece: Any})
		askers = append(askers, a)
	}
	serve := func(now time.Duration) (n int, again time.Duration) {
		for {
			turn, wait := q.Next(now, nil)
			if turn == nil {
				return n, wait
			}
			n++
		}
	}
	if n, again := serve(0); n != 2 || again != 3*unknown {
		t.Errorf("%d in service, again after %s", n, again)
	}
	if n, _ := serve(3 * unknown); n != 2 {
		t.Errorf("%d more when those make no progress", n)
	}
	if n, _ := serve(6 * unknown); n != 1 {
		t.Errorf("%d more, five are the limit", n)
	}
	for _, a := range askers {
		q.Leave(a)
	}
	if len(q.turns) != 0 || len(q.offers) != 0 || len(q.peers) != 0 {
		t.Error("something is kept of those that left")
	}
}

// An asker for which there is nothing to choose keeps its credit until there is.
func TestCreditWaitsForSomethingToChoose(t *testing.T) {
	q := NewQueue(Slots{}, seeded())
	o := q.Offer(2, some(2, 0))
	a := o.Join("a", transfer.Pull)
	a.Ask(Ask{Piece: Any})
	a.Ask(Ask{Piece: Any})
	if turn := next(t, q, 0); turn.Piece != 0 {
		t.Fatalf("piece %d, which is not held", turn.Piece)
	}
	if turn, _ := q.Next(0, nil); turn != nil {
		t.Fatalf("piece %d again", turn.Piece)
	}
	o.Hold(1)
	if turn := next(t, q, 0); turn.Piece != 1 {
		t.Errorf("piece %d", turn.Piece)
	}
	a.Ask(Ask{Piece: Any})
	if turn, _ := q.Next(0, nil); turn != nil {
		t.Errorf("piece %d, though it has both", turn.Piece)
	}
	a.Hear(Note{1, Need})
	if turn := next(t, q, 0); turn.Piece != 1 {
		t.Errorf("piece %d, where 1 is needed again", turn.Piece)
	}
}

// A piece that is slow to be read does not keep its asker from the next one.
func TestSlowReadsStandAside(t *testing.T) {
	q := NewQueue(Slots{}, seeded())
	a := q.Offer(2, nil).Join("a", transfer.Pull)
	a.Ask(Ask{Piece: 0})
	a.Ask(Ask{Piece: 1})
	slow, _ := q.Next(0, nil)
	if turn, _ := q.Next(0, nil); turn != nil {
		t.Fatal("two at once")
	}
	q.Aside(slow)
	turn, _ := q.Next(0, nil)
	if turn == nil {
		t.Fatal("the next has no turn")
	}
	q.Done(0, slow)
	a.Ask(Ask{Piece: Any})
	if other, _ := q.Next(0, nil); other != nil {
		t.Error("the end of the slow one ends the other's turn")
	}
	q.Done(0, turn)
}

// Holders that do not choose are never left a choice; the engine turns what it is told
// to ask into what its protocol has.
// What is late to be found slow has been sent by then, and the asker has its next turn: another
// one beside that would take its place, and the piece would never go out.
func TestNothingStandsAsideOnceItIsDone(t *testing.T) {
	q := NewQueue(Slots{}, seeded())
	a := q.Offer(3, nil).Join("a", transfer.Pull)
	for i := range 3 {
		a.Ask(Ask{Piece: i})
	}
	first := next(t, q, 0)
	if turn, _ := q.Next(0, nil); turn == nil {
		t.Fatal("the next has no turn")
	}
	q.Aside(first)
	if turn, _ := q.Next(0, nil); turn != nil {
		t.Errorf("piece %d goes out beside the one in service", turn.Piece)
	}
}

func TestSpecific(t *testing.T) {
	w := NewWant(16, Rules{Specific: true}, seeded())
	source := w.Join(nil, false)
	w.Join(some(16, 1), false)
	for _, a := range all(w, 0, source) {
		if a.Piece == Any {
			t.Error("a choice is left to the holder")
		}
	}
	if source.Hears(Skip) || len(w.Notes()) > 0 {
		t.Error("notes for nobody")
	}
}

// While nobody else fetches the blob, what comes after a reader comes in order: else it
// has half of the wire and waits for the other half in the end.
func TestAReaderAloneGetsTheRestInOrder(t *testing.T) {
	w := NewWant(400, Rules{}, seeded())
	a := w.Join(nil, false)
	w.Cursors([]int{160, 161})
	next := func() int {
		ask, ok := w.Next(0, a)
		if !ok {
			t.Fatal("nothing is asked for")
		}
		return ask.Piece
	}
	for want := 160; want < 175; want++ {
		if got := next(); got != want {
			t.Errorf("piece %d is asked for, want %d", got, want)
		}
		if want == 161 { // until it comes nothing else is asked for
			w.Arrived(0, a, 160)
			w.Cursors([]int{161, 162})
		}
	}
}

// A reader that goes on over several pieces at once has not jumped: nothing stops for it.
func TestAReaderThatGoesOnStopsNothing(t *testing.T) {
	w := NewWant(400, Rules{}, seeded())
	a := w.Join(nil, false)
	w.Cursors([]int{0, 1})
	all(w, 0, a)
	w.Arrived(0, a, 0)
	w.Cursors([]int{1, 2})
	all(w, 0, a)
	for i := 1; i < 6; i++ {
		w.Arrived(0, a, i)
	}
	w.Cursors([]int{6, 7})
	if got := len(all(w, 0, a)); got < 5 {
		t.Errorf("%d pieces were asked for in the place of five that came", got)
	}
	w.Cursors([]int{300, 301})
	if got := all(w, 0, a); len(got) != 2 {
		t.Errorf("after a jump %v is asked for", got)
	}
}

// A piece that becomes urgent when it has gone out does not go out twice.
func TestWhatHasGoneOutOnlyOvertakes(t *testing.T) {
	q := NewQueue(Slots{}, seeded())
	a := q.Offer(4, nil).Join("a", transfer.Pull)
	a.Ask(Ask{Piece: 0})
	a.Ask(Ask{Piece: 1})
	a.Ask(Ask{Piece: 2})
	turn, _ := q.Next(0, nil)
	if turn == nil || turn.Piece != 0 {
		t.Fatalf("%+v goes out first", turn)
	}
	a.Ask(Ask{Piece: 0, Urgent: true, Again: true})
	a.Ask(Ask{Piece: 2, Urgent: true, Again: true})
	for _, want := range []int{2, 1} {
		q.Done(0, turn)
		if turn, _ = q.Next(0, nil); turn == nil || turn.Piece != want {
			t.Fatalf("%+v goes out, want %d", turn, want)
		}
	}
	q.Done(0, turn)
	if turn, _ = q.Next(0, nil); turn != nil {
		t.Errorf("piece %d goes out again", turn.Piece)
	}
}
