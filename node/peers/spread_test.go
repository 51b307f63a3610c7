package peers

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/node/project"
)

// scattered gives nodes random places in so many zones and racks of each.
func scattered(rng *rand.Rand, nodes, zones, racks int) []member.Member {
	var all []member.Member
	for i := range nodes {
		all = append(all, member.Member{ID: fmt.Sprintf("%032x", i), Labels: map[string]string{
			labelZone: fmt.Sprint("z", rng.IntN(zones)), labelRack: fmt.Sprint("r", rng.IntN(racks)),
		}})
	}
	return all
}

func layoutOf(members []member.Member, floor int) layout {
	return newLayout(members[0].ID, members, members, func(string) bool { return false }, floor)
}

// However nodes are scattered, the homes of a blob are in as many zones as there
// can be, and within one zone in as many racks.
func TestHomesStandApart(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 300 {
		members := scattered(rng, 1+rng.IntN(9), 1+rng.IntN(4), 1+rng.IntN(4))
		l := layoutOf(members, 2)
		zones, racks := map[string]bool{}, map[place]bool{}
		for _, p := range l.places {
			zones[p.zone] = true
			racks[p] = true
		}
		for i := range 20 {
			d := digest.FromString(fmt.Sprint(seed, i))
			n := 1 + rng.IntN(5)
			homes := l.homesOf(d, n)
			inZones, inRacks := map[string]bool{}, map[place]bool{}
			for _, id := range homes {
				inZones[l.places[id].zone] = true
				inRacks[l.places[id]] = true
			}
			if want := min(max(n, 2), len(members)); len(homes) != want {
				t.Fatalf("%d homes among %v, want %d", len(homes), l.places, want)
			}
			if want := min(len(homes), len(zones)); len(inZones) != want {
				t.Fatalf("homes %v are in %d zones of %v, want %d", homes, len(inZones), l.places, want)
			}
			if want := min(len(homes), len(racks)); len(zones) == 1 && len(inRacks) != want {
				t.Fatalf("homes %v are in %d racks of %v, want %d", homes, len(inRacks), l.places, want)
			}
			// Every node with the same rows comes to the same homes.
			shuffled := slices.Clone(members)
			rng.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
			if other := layoutOf(shuffled, 2).homesOf(d, n); !slices.Equal(other, homes) {
				t.Fatalf("homes are %v and %v", homes, other)
			}
		}
	}
}

// A node that comes takes its share, and little else moves: without labels
// nothing, with labels what spreading asks for, at most half as much again.
func TestSpreadMovesLittle(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	const sites, count = 40, 400
	moved, share := 0, 0.0
	for range sites {
		after := scattered(rng, 6, 3, 2)
		before := layoutOf(after[:5], 2)
		now := layoutOf(after, 2)
		for i := range count {
			d := digest.FromString(fmt.Sprint(seed, i))
			old := before.homesOf(d, 3)
			for _, id := range now.homesOf(d, 3) {
				if !slices.Contains(old, id) {
					moved++
				}
				if id == after[5].ID {
					share++
				}
			}
		}
	}
	if extra := float64(moved) / share; extra < 1 || extra > 1.5 {
		t.Errorf("%d copies moved for a share of %.0f: %.2f times as many", moved, share, extra)
	}
	// A label that all have in common changes no home.
	plain, same := scattered(rng, 5, 1, 1), scattered(rng, 5, 1, 1)
	for i := range plain {
		plain[i].Labels = nil
	}
	for i := range count {
		d := digest.FromString(fmt.Sprint(seed, i))
		if a, b := layoutOf(plain, 2).homesOf(d, 3), layoutOf(same, 2).homesOf(d, 3); !slices.Equal(a, b) {
			t.Fatalf("homes %v became %v by a label that all have", a, b)
		}
	}
}

func TestWhoMayBeHome(t *testing.T) {
	members := scattered(rand.New(rand.NewPCG(1, 2)), 5, 2, 2)
	members[1].Cache = true
	members[2].Draining = 1
	away := map[string]bool{members[3].ID: true}
	l := newLayout(members[0].ID, members, members, func(id string) bool { return away[id] }, 2)
	for i := range 50 {
		d := digest.FromString(fmt.Sprint(i))
		homes := l.homesOf(d, project.Everywhere)
		slices.Sort(homes)
		if want := []string{members[0].ID, members[4].ID}; !slices.Equal(homes, want) {
			t.Fatalf("homes are %v, want %v", homes, want)
		}
	}
	// A node that was removed a moment ago is not even live.
	if got := (layout{self: "gone", homes: l.homes}).lead(digest.FromString("a blob"), l.homes); got != "" {
		t.Errorf("nobody is live, and %q leads", got)
	}
	// One that is away for long is still wanted: its copy is missing.
	if got := l.wanted(project.Everywhere); got != 3 {
		t.Errorf("%d copies are wanted, want 3", got)
	}
	if got := l.wanted(1); got != 2 {
		t.Errorf("fewer replicas than a push waits for: %d are wanted", got)
	}
}

// The copy that a push waits for stands in another rack than the node that took
// the push, also when the first of the blob's placement does not.
func TestEnsureCopiesToAnotherRack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 4)
		for i, n := range s.nodes {
			n.setRow(func(m *member.Member) { m.Labels = map[string]string{labelRack: []string{"a", "a", "b", "b"}[i]} })
		}
		s.run()
		for i := range 8 {
			d := s.put(bytesOf(fmt.Sprint("blob ", i), 100), s.nodes[0])
			if copies, err := s.nodes[0].Ensure(t.Context(), []digest.Digest{d}); err != nil || copies != 2 {
				t.Fatalf("%d copies, %v", copies, err)
			}
			if !s.nodes[2].holds(d) && !s.nodes[3].holds(d) {
				t.Errorf("blob %d is in one rack only", i)
			}
		}
	})
}

// A push waits for as many nodes as the setting asks for, and says how many there
// are when fewer are live.
func TestDurabilityIsASetting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 4)
		s.durability.Store(3)
		s.run()
		n := s.nodes[0]
		holders := func(d digest.Digest) (count int) {
			for _, o := range s.nodes {
				if o.holds(d) {
					count++
				}
			}
			return count
		}
		d := s.put(bytesOf("three", 100), n)
		if copies, err := n.Ensure(t.Context(), []digest.Digest{d}); err != nil || copies != 3 || holders(d) < 3 {
			t.Errorf("%d copies on %d nodes, %v; want 3", copies, holders(d), err)
		}
		s.nodes[1].setDown(true)
		s.nodes[2].setDown(true)
		d = s.put(bytesOf("two", 100), n)
		if copies, err := n.Ensure(t.Context(), []digest.Digest{d}); err != nil || copies != 2 || holders(d) != 2 {
			t.Errorf("two are down: %d copies on %d nodes, %v; want 2", copies, holders(d), err)
		}
		s.durability.Store(1)
		d = s.put(bytesOf("one", 100), n)
		if copies, err := n.Ensure(t.Context(), []digest.Digest{d}); err != nil || copies != 1 {
			t.Errorf("%d copies, %v; want 1", copies, err)
		}
	})
}

// Nodes that are no home take no copies, and what one of them holds counts only
// as long as the homes are too few.
func TestEnsurePassesOverCachesAndDrainingNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 4)
		cache, draining := s.nodes[1], s.nodes[2]
		cache.setRow(func(m *member.Member) { m.Cache = true })
		draining.setRow(func(m *member.Member) { m.Draining = 1 })
		s.run()
		for i, n := range []*node{cache, draining, s.nodes[0]} {
			d := s.put(bytesOf(fmt.Sprint("blob ", i), 100), n)
			if copies, err := n.Ensure(t.Context(), []digest.Digest{d}); err != nil || copies != 2 {
				t.Fatalf("%d copies, %v", copies, err)
			}
			if !s.nodes[0].holds(d) || !s.nodes[3].holds(d) {
				t.Errorf("a blob that %s took is not on both homes", n.id)
			}
		}
		s.nodes[3].setDown(true)
		d := s.put(bytesOf("last", 100), cache)
		if copies, err := cache.Ensure(t.Context(), []digest.Digest{d}); err != nil || copies != 2 || draining.holds(d) {
			t.Errorf("one home is up: %d copies, %v, on the draining one: %v", copies, err, draining.holds(d))
		}
	})
}

// Who is far is asked by one of a site and chooses nothing: nodes without labels, which
// are most, must not be far from each other.
func TestOnlyAnotherZoneIsFar(t *testing.T) {
	for _, c := range []struct {
		a, b place
		want int
	}{
		{place{}, place{}, 1},
		{place{rack: "a"}, place{rack: "b"}, 1},
		{place{rack: "a"}, place{rack: "a"}, 0},
		{place{rack: "a"}, place{}, 1},
		{place{zone: "north"}, place{zone: "north"}, 1},
		{place{zone: "north", rack: "a"}, place{zone: "south", rack: "a"}, farthest},
		{place{zone: "north"}, place{}, farthest},
	} {
		if got := c.a.distance(c.b); got != c.want || c.b.distance(c.a) != got {
			t.Errorf("from %+v to %+v it is %d, want %d", c.a, c.b, got, c.want)
		}
	}
}

func TestNearPeersAreAskedFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 4)
		at := [][2]string{{"north", "a"}, {"south", "a"}, {"north", "b"}, {"north", "a"}}
		for i, n := range s.nodes {
			n.setRow(func(m *member.Member) { m.Labels = map[string]string{labelZone: at[i][0], labelRack: at[i][1]} })
		}
		for i := range 8 {
			got := candidates{s.nodes[0].Peers}.Candidates(t.Context(), digest.FromString(fmt.Sprint(i)))
			var order []string
			for _, p := range got {
				order = append(order, p.ID)
			}
			if want := []string{"node4", "node3", "node2"}; !slices.Equal(order, want) {
				t.Errorf("asked in the order %v, want %v", order, want)
			}
		}
		// One that does not answer this node is asked last, however near it is.
		s.nodes[0].suspects = "node4"
		got := candidates{s.nodes[0].Peers}.Candidates(t.Context(), digest.FromString("0"))
		if len(got) != 3 || got[2].ID != "node4" {
			t.Errorf("a suspect node is asked in the order %v", got)
		}
	})
}
