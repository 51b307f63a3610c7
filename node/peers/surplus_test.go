package peers

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/node/fault"
)

// holders counts the nodes that hold a blob.
func (s *site) holders(d digest.Digest) (count int) {
	for _, n := range s.nodes {
		if n.holds(d) {
			count++
		}
	}
	return count
}

// surplusSum is what the status of the site shows.
func (s *site) surplusSum() (sum int, bytes int64) {
	s.t.Helper()
	all, err := s.nodes[0].Figures(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range all {
		sum, bytes = sum+f.Surplus, bytes+f.SurplusBytes
	}
	return sum, bytes
}

// Fewer replicas are wanted: after the time for it the former homes let go, and the
// homes keep theirs.
func TestSurplusIsReleased(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 5)
		s.replicas.Store(5)
		s.minutes.Store(60)
		s.run()
		ds := s.fill("blob", 20, s.nodes[0])
		pass(t, time.Minute)
		for _, d := range ds {
			if s.holders(d) != 5 {
				t.Fatal("five replicas are wanted")
			}
		}
		s.replicas.Store(3)
		pass(t, 30*time.Minute)
		n, bytes := s.surplusSum()
		if want := int64(2 * (20*100 + 190)); n != 40 || bytes != want {
			t.Errorf("surplus: %d blobs, %d bytes, want 40, %d", n, bytes, want)
		}
		for _, d := range ds {
			if s.holders(d) != 5 {
				t.Fatalf("a copy went after half of the time: %d are left", s.holders(d))
			}
		}
		pass(t, 40*time.Minute)
		released := 0.0
		for _, n := range s.nodes {
			released += testutil.ToFloat64(n.metrics.released)
			if got := testutil.ToFloat64(n.metrics.surplusBlobs) + testutil.ToFloat64(n.metrics.surplusBytes); got != 0 {
				t.Errorf("%s still shows surplus: %v", n.id, got)
			}
		}
		if n, bytes := s.surplusSum(); n != 0 || bytes != 0 || released != 40 {
			t.Errorf("surplus: %d blobs, %d bytes; %v were released, want 40", n, bytes, released)
		}
		for _, d := range ds {
			for i, n := range s.byPlacement(d) {
				if n.holds(d) != (i < 3) {
					t.Errorf("node %d of its placement holds %s: %v", i+1, d, n.holds(d))
				}
			}
		}
	})
}

// Nothing goes that is not the site's to keep, that is wanted from here, or that a
// home lacks.
func TestSurplusStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 4)
		s.replicas.Store(2)
		s.minutes.Store(30)
		b := bytesOf("blob", 1000)
		d := digest.FromBytes(b)
		order := s.byPlacement(d)
		former := order[3]
		s.put(b, s.nodes...)
		c := bytesOf("condemned", 100)
		condemned := s.put(c, s.nodes...)
		if err := s.records.Condemn(t.Context(), condemned); err != nil {
			t.Fatal(err)
		}
		unknown := digest.FromString("no row")
		if _, err := former.Store.Put(t.Context(), unknown, strings.NewReader("no row")); err != nil {
			t.Fatal(err)
		}
		order[1].setDown(true) // for less than it takes to stand in for it
		s.run()
		for range 5 {
			pass(t, awayAfter-time.Minute)
			order[1].setDown(false)
			pass(t, liveInterval)
			if s.holders(d) != 4 {
				t.Fatal("a copy went while the placement had only just come back, or a home did not say that it holds the blob")
			}
			order[1].setDown(true)
			pass(t, 20*time.Second)
		}
		order[1].setDown(false)
		release := former.Store.Pin(d)
		for range 8 { // it is read from here, again and again, then pinned by a push
			pass(t, 10*time.Minute)
			former.Read(d)
		}
		if !former.holds(d) {
			t.Fatal("a copy went that is read, or pushed again")
		}
		if order[2].holds(d) {
			t.Error("the copy that nobody reads stays")
		}
		pass(t, time.Hour)
		if !former.holds(d) {
			t.Fatal("a pinned copy went")
		}
		release()
		pass(t, time.Hour)
		if former.holds(d) || s.holders(d) != 2 {
			t.Errorf("the former home holds it: %v; %d do", former.holds(d), s.holders(d))
		}
		if s.holders(condemned) != 4 || !former.holds(unknown) {
			t.Errorf("%d nodes hold a condemned blob, held without a row: %v: neither is this room's", s.holders(condemned), former.holds(unknown))
		}
	})
}

// A node that is added takes its share, and the former homes let go of it; they
// keep it when nodes come and go all the time.
func TestSurplusAfterANodeWasAdded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		s.replicas.Store(2)
		s.minutes.Store(30)
		s.run()
		ds := s.fill("blob", 30, s.nodes[0])
		pass(t, time.Hour+5*time.Minute)
		for _, d := range ds {
			if s.holders(d) != 2 {
				t.Fatalf("%d nodes hold %s, want 2", s.holders(d), d)
			}
		}
		added := s.add("added")
		s.run(added)
		pass(t, 5*time.Minute)
		for range 10 { // the placement flaps: it is away for longer than it is waited for
			added.setDown(true)
			pass(t, awayAfter+time.Minute)
			added.setDown(false)
			pass(t, 25*time.Minute)
			for _, d := range ds {
				if s.holders(d) < 2 {
					t.Fatalf("%d nodes hold %s", s.holders(d), d)
				}
			}
		}
		flapped := 0
		for _, d := range ds {
			flapped += s.holders(d)
		}
		if flapped == 2*len(ds) {
			t.Error("nothing was surplus: this test tests nothing")
		}
		pass(t, 2*time.Hour)
		for _, d := range ds {
			for i, n := range s.byPlacement(d) {
				if n.holds(d) != (i < 2) {
					t.Errorf("node %d of its placement holds %s: %v", i+1, d, n.holds(d))
				}
			}
		}
	})
}

// serve serves the nodes' peers without repair and without anything in the
// background.
func (s *site) serve() {
	for _, n := range s.nodes {
		go func() { _ = n.serveHTTP(s.t.Context(), 4, n.apiServer()) }()
	}
}

func (n *node) letGo(d digest.Digest) error {
	return n.Store.RemoveIf(n.site.t.Context(), d, func(ctx context.Context) error { return n.keptByHomes(ctx, d, true) })
}

// Former homes that decide at the same moment, and nodes that do not agree on who
// the homes are, leave as many copies as are wanted.
func TestSurplusRace(t *testing.T) {
	s := newSite(t, 6)
	s.replicas.Store(2)
	s.serve()
	dice := rand.New(rand.NewPCG(1, 2))
	removed := 0
	for round := range 60 {
		d := s.put(bytesOf(fmt.Sprint("blob ", round), 100), s.nodes...)
		for _, n := range s.nodes {
			zones := map[string]string{}
			for _, o := range s.nodes {
				zones[o.id] = fmt.Sprint("zone", dice.IntN(3))
			}
			if round%3 == 0 {
				n.sees = nil // they agree
				continue
			}
			n.sees = func(m *member.Member) { m.Labels = map[string]string{labelZone: zones[m.ID]} }
		}
		var wait sync.WaitGroup
		for _, n := range s.nodes {
			wait.Go(func() {
				for range 3 {
					if err := n.letGo(d); err == nil {
						return
					} else if !fault.Is(err, fault.Precondition) && !fault.Is(err, fault.NotFound) {
						t.Errorf("%s: %v", n.id, err)
					}
				}
			})
		}
		wait.Wait()
		left := s.holders(d)
		removed += len(s.nodes) - left
		if left < 2 {
			t.Fatalf("round %d: %d copies are left of %d, 2 are wanted", round, left, len(s.nodes))
		}
		if round%3 == 0 && left > 2 {
			// Some asked while others asked about copies of theirs, which then count for
			// nobody. One after the other they let go.
			for _, n := range s.nodes {
				_ = n.letGo(d)
			}
			if s.holders(d) != 2 {
				t.Errorf("round %d: all agree, and %d copies are left", round, s.holders(d))
			}
		}
	}
	if removed < 60 {
		t.Errorf("only %d copies were let go of", removed)
	}
}

// While a node asks the homes about a copy of its own, it tells nobody that it has
// one.
func TestSurplusAboutToGoCountsForNobody(t *testing.T) {
	s := newSite(t, 3)
	s.serve()
	d := s.put(bytesOf("blob", 100), s.nodes...)
	one, two := s.nodes[0], s.nodes[1]
	none := errors.New("not now")
	err := one.Store.RemoveIf(t.Context(), d, func(ctx context.Context) error {
		answer, err := two.askHave(ctx, one.id, []digest.Digest{d}, haveQuestion{Keep: true, Any: true})
		if err != nil || answer.Held.has(0) || answer.Kept.has(0) {
			t.Errorf("a copy that is about to go is told of: %+v, %v", answer, err)
		}
		return none
	})
	if !errors.Is(err, none) {
		t.Fatal(err)
	}
	answer, err := two.askHave(t.Context(), one.id, []digest.Digest{d}, haveQuestion{Keep: true})
	if err != nil || !answer.Held.has(0) || !answer.Kept.has(0) {
		t.Errorf("a copy that stays is not told of: %+v, %v", answer, err)
	}
}

// A home dies between its answer and the unlink: the others still hold the blob,
// and repair makes as many copies as are wanted.
func TestHomeDiesBeforeTheUnlink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 4)
		s.replicas.Store(2)
		b := bytesOf("blob", 1000)
		order := s.byPlacement(digest.FromBytes(b))
		s.run()
		d := s.put(b, order[0], order[1], order[3])
		pass(t, time.Minute)
		err := order[3].Store.RemoveIf(t.Context(), d, func(ctx context.Context) error {
			err := order[3].keptByHomes(ctx, d, true)
			order[0].setDown(true) // for good, with its disk
			if err := order[0].Store.Remove(d); err != nil {
				t.Error(err)
			}
			return err
		})
		if err != nil || order[3].holds(d) {
			t.Fatalf("the surplus copy stays: %v", err)
		}
		if !order[1].holds(d) {
			t.Fatal("the other home has lost it")
		}
		pass(t, awayAfter+time.Minute)
		if !order[1].holds(d) || !order[2].holds(d) {
			t.Errorf("after the loss of a home: %v, %v", order[1].holds(d), order[2].holds(d))
		}
	})
}

// A node that says it is no home yet is asked again, not only when all are.
func TestAHomeThatDoesNotKnowItYetIsAskedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		young := s.nodes[2]
		young.sees = func(m *member.Member) { m.Cache = m.Cache || m.ID == young.id }
		s.fill("blob", 30, s.nodes...)
		s.run()
		pass(t, 10*time.Second)
		if sum, _ := s.lacking(); sum == 0 {
			t.Fatal("a node that says it is no home counts as one")
		}
		s.mu.Lock()
		young.sees = nil
		s.mu.Unlock()
		pass(t, 2*retryMost)
		if sum, counting := s.lacking(); sum != 0 || counting {
			t.Errorf("all homes know that they are: %d lack copies, counting: %v", sum, counting)
		}
	})
}

// A pass that ended early because the site changed is made again, though the site
// is by then as it was before.
func TestASiteThatChangesBackIsLookedAtAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		one := s.nodes[0]
		s.fill("blob", 30, s.nodes...)
		l, err := one.currentLayout()
		if err != nil {
			t.Fatal(err)
		}
		s.serve()
		s.fill("more", 30, one, s.nodes[1])
		s.nodes[2].setDown(true) // after l was made
		if r := one.repairAll(t.Context(), l); !r.moved || r.cause != nil {
			t.Errorf("a pass over another site than it is: moved: %v, %v", r.moved, r.cause)
		}
		s.nodes[2].setDown(false)
		if now, err := one.currentLayout(); err != nil || !now.equal(l) {
			t.Fatal("the site is not what it was")
		}
	})
}
