package peers

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/transfer"
)

// pass lets the bubble's time go on; every node repairs meanwhile.
func pass(t *testing.T, d time.Duration) {
	t.Helper()
	select {
	case <-time.After(d):
	case <-t.Context().Done():
	}
	synctest.Wait()
}

func TestRepairBringsBlobsHome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 5)
		b := bytesOf("blob", transfer.PieceSize+1)
		order := s.byPlacement(digest.FromBytes(b))
		s.run()
		d := s.put(b, order[4]) // on none of its homes
		pass(t, 10*repairSettle)
		for i, n := range order {
			if n.holds(d) != (i < replicas || i == 4) {
				t.Errorf("node %d of its placement holds it: %v", i+1, n.holds(d))
			}
		}
		row := s.row(d)
		if row.Copies < durability {
			t.Errorf("the row says %d copies", row.Copies)
		}
		table, err := transfer.HashPieces(open(t, order[0], d), int64(len(b)))
		if err != nil || string(row.Root) != string(table.Root()) {
			t.Errorf("root on record is %x, want %x, %v", row.Root, table.Root(), err)
		}
	})
}

func open(t *testing.T, n *node, d digest.Digest) blobs.File {
	t.Helper()
	f, _, err := n.Store.OpenBlob(d)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestRepairLeavesAloneWhatIsOnItsWayOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 2)
		keep := s.put(bytesOf("kept", 100), s.nodes[0])
		condemned, gone := s.put(bytesOf("condemned", 100), s.nodes[0]), s.put(bytesOf("gone", 100), s.nodes[0])
		for _, d := range []digest.Digest{condemned, gone} {
			if err := s.records.Condemn(t.Context(), d); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.records.Gone(t.Context(), gone, time.Now().Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		s.run()
		pass(t, 2*time.Minute)
		if n := s.nodes[1]; !n.holds(keep) || n.holds(condemned) || n.holds(gone) {
			t.Errorf("live %v, condemned %v, gone %v", n.holds(keep), n.holds(condemned), n.holds(gone))
		}
	})
}

func TestLoneNodeComputesNoRoots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1)
		d := s.put(bytesOf("blob", 3*transfer.PieceSize), s.nodes[0])
		s.run()
		pass(t, 10*time.Minute)
		if row := s.row(d); row.Root != nil || row.Copies != 1 {
			t.Errorf("a node without peers made %+v", row)
		}
		if s.nodes[0].logs.Len() != 0 {
			t.Errorf("a node without peers logged:\n%s", s.nodes[0].logs.String())
		}
		// It has them as soon as there is somebody to check pieces.
		s.run(s.add("late"))
		pass(t, 10*repairSettle)
		if row := s.row(d); row.Root == nil || row.Copies != 2 || !s.nodes[1].holds(d) {
			t.Errorf("with a second node: %+v, held there: %v", row, s.nodes[1].holds(d))
		}
	})
}

// TestMissingBlobIsLoggedOnce: nobody has a blob, and repair says so once, tries
// at growing distances, and says when it is made good.
func TestMissingBlobIsLoggedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 2)
		b := bytesOf("lost", 1000)
		d := s.put(b)
		s.run()
		pass(t, time.Hour)
		for _, n := range s.nodes {
			if got := n.logged("level=WARN"); got != 1 {
				t.Errorf("%s warned %d times in an hour:\n%s", n.id, got, n.logs.String())
			}
		}
		// Another blob does not make it try the lost one more often, nor wait for it.
		e := s.put(bytesOf("well", 1000), s.nodes[0])
		pass(t, 2*repairSettle)
		if !s.nodes[1].holds(e) {
			t.Error("a lost blob holds up another")
		}
		s.put(b, s.nodes[0])
		pass(t, 2*time.Minute)
		if !s.nodes[1].holds(d) || s.nodes[1].logged("caught up") != 1 {
			t.Errorf("the blob is back, held by the other: %v\n%s", s.nodes[1].holds(d), s.nodes[1].logs.String())
		}
	})
}

func TestNodeThatReturnsIsBroughtUpToDate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 2)
		s.nodes[1].setDown(true)
		s.run()
		d := s.put(bytesOf("blob", 1000), s.nodes[0])
		pass(t, 20*time.Minute)
		if s.row(d).Copies != 1 || s.nodes[1].holds(d) {
			t.Fatalf("the other is down: %+v", s.row(d))
		}
		s.nodes[1].setDown(false)
		pass(t, liveInterval+time.Second) // no need to wait for the next full pass
		if s.row(d).Copies != 2 || !s.nodes[1].holds(d) {
			t.Errorf("the other is back: %+v, holds it: %v\n%s", s.row(d), s.nodes[1].holds(d), s.nodes[1].logs.String())
		}
	})
}

// The homes of a blob that none of them has would else go on asking each other at one moment.
func TestHomesTryAgainApart(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	tries := map[time.Time]bool{}
	for range 10 {
		s := schedule{backoff: repairSettle}
		s.plan(result{full: true, failed: []digest.Digest{digest.FromString("d")}}, now)
		tries[s.next()] = true
	}
	if len(tries) == 1 {
		t.Error("ten homes try again at the same moment")
	}
}

func TestScheduleBacksOff(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	s := schedule{backoff: repairSettle}
	d, e := digest.FromString("d"), digest.FromString("e")
	s.plan(result{full: true, failed: []digest.Digest{d}}, now)
	for i, want := range []time.Duration{repairSettle, 2 * repairSettle, 4 * repairSettle, 8 * repairSettle, 16 * repairSettle, retryMost, retryMost} {
		if got := s.next().Sub(now); got > want || got < want-want/retryApart || len(s.retry) != 1 {
			t.Fatalf("after failure %d the next try of %d is in %v, want %v or a little less", i+1, len(s.retry), got, want)
		}
		now = s.next()
		s.plan(result{again: true, looked: []digest.Digest{d}, failed: []digest.Digest{d}}, now)
	}
	// A pass over what changed, well or not, does not put the try off.
	again := s.next()
	s.plan(result{looked: []digest.Digest{e}}, now.Add(time.Second))
	s.plan(result{looked: []digest.Digest{e}, failed: []digest.Digest{e}}, now.Add(2*time.Second))
	if s.next() != again || len(s.retry) != 2 {
		t.Errorf("other blobs moved the try by %v; to try: %v", s.next().Sub(again), s.retry)
	}
	s.plan(result{again: true, looked: []digest.Digest{d, e}}, again)
	if s.next() != s.stride || len(s.retry) != 0 || s.backoff != repairSettle {
		t.Errorf("after success: to try %v in %v, then %v", s.retry, s.next().Sub(again), s.backoff)
	}
	// Too much to remember, and a pass that ended early, make all due.
	many := result{full: true}
	for i := range retryKept + 1 {
		many.failed = append(many.failed, digest.FromString(fmt.Sprint(i)))
	}
	s.plan(many, now)
	if got := s.next().Sub(now); got != repairSettle {
		t.Errorf("too much to remember: all are due in %v", got)
	}
	s = schedule{backoff: repairSettle}
	s.plan(result{full: true, cause: errors.New("no state")}, now)
	if got := s.full.Sub(now); got != repairSettle {
		t.Errorf("a pass that ended early: all are due in %v", got)
	}
}
