package peers

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/project"
)

// lacking adds up what the live nodes say, seen by the first of them.
func (s *site) lacking() (sum int, counting bool) {
	s.t.Helper()
	for _, n := range s.nodes {
		if n.down {
			continue
		}
		all, err := n.Figures(s.t.Context())
		if err != nil {
			s.t.Fatal(err)
		}
		for _, f := range all {
			sum, counting = sum+f.Lacking, counting || f.Counting
		}
		return sum, counting
	}
	s.t.Fatal("no node is live")
	return 0, false
}

func (s *site) fill(kind string, count int, on ...*node) (ds []digest.Digest) {
	s.t.Helper()
	for i := range count {
		ds = append(ds, s.put(bytesOf(fmt.Sprint(kind, " ", i), 100+i), on...))
	}
	return ds
}

// Each blob that lacks a copy is counted by one node, until it lacks none.
func TestUnderReplicatedIsAFigure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		s.run()
		const count = repairPage + 7
		ds := s.fill("blob", count, s.nodes[0])
		pass(t, 10*repairSettle)
		if sum, counting := s.lacking(); sum != 0 || counting {
			t.Fatalf("all are up: %d lack copies, still counting: %v", sum, counting)
		}
		s.nodes[1].setDown(true)
		pass(t, 3*liveInterval)
		if sum, counting := s.lacking(); sum != count || counting {
			t.Errorf("one of three is down: %d of %d lack copies, still counting: %v", sum, count, counting)
		}
		more := s.fill("more", 5, s.nodes[0])
		pass(t, 3*repairSettle)
		if sum, _ := s.lacking(); sum != count+5 {
			t.Errorf("five more: %d lack copies, want %d", sum, count+5)
		}
		if got := testutil.ToFloat64(s.nodes[0].metrics.underReplicated) + testutil.ToFloat64(s.nodes[2].metrics.underReplicated); got != count+5 {
			t.Errorf("the metric says %v, want %d", got, count+5)
		}
		s.nodes[1].setDown(false)
		pass(t, time.Minute)
		if sum, counting := s.lacking(); sum != 0 || counting {
			t.Errorf("all are back: %d lack copies, still counting: %v", sum, counting)
		}
		for _, d := range slices.Concat(ds, more) {
			if !s.nodes[1].holds(d) {
				t.Fatalf("the node that was away lacks %s", d)
			}
		}
	})
}

// An idle site looks at no rows, and a push only at its own.
func TestRepairReadsNothingForNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		s.run()
		s.fill("blob", 300, s.nodes[0])
		pass(t, time.Minute)
		looked := func() (sum float64) {
			for _, n := range s.nodes {
				sum += testutil.ToFloat64(n.metrics.repairRows)
			}
			return sum
		}
		before := looked()
		pass(t, repairInterval/2)
		if got := looked() - before; got != 0 {
			t.Errorf("half an idle hour: %v rows were looked at", got)
		}
		s.put(bytesOf("one more", 100), s.nodes[0])
		pass(t, time.Minute)
		// Each node sees the push, and then that its row says two copies.
		if got := looked() - before; got < 3 || got > 12 {
			t.Errorf("one push: %v rows were looked at", got)
		}
		pass(t, repairInterval)
		if got := looked() - before; got < 900 {
			t.Errorf("more than an hour: %v rows were looked at, want every node to look at all", got)
		}
	})
}

// A link from another project is looked at, though it changes no row of a blob.
func TestLinksAreLookedAt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 4)
		for _, n := range s.nodes {
			n.Policy.Projects = wants{"everywhere": project.Everywhere}
		}
		s.run()
		d := s.put(bytesOf("blob", 100), s.nodes[0])
		pass(t, time.Minute)
		s.update(func(tx *table.Tx) error { return s.records.Link(tx, "everywhere", "app", d) })
		pass(t, time.Minute)
		for _, n := range s.nodes {
			if !n.holds(d) {
				t.Errorf("%s lacks a blob of a project that wants it on all", n.id)
			}
		}
		if sum, _ := s.lacking(); sum != 0 {
			t.Errorf("%d lack copies", sum)
		}
	})
}

// wants is how many replicas projects ask for.
type wants map[string]int

func (w wants) Replicas(_ table.Reader, project string) (int, bool, error) {
	n, ok := w[project]
	return n, ok, nil
}

func (w wants) AllReplicas(*table.View) (map[string]int, error) { return w, nil }

// A blob that several projects link has the most replicas that one of them asks
// for; what no project asks for has the site's.
func TestReplicasOfProjects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 5)
		for _, n := range s.nodes {
			n.Policy.Projects = wants{"few": 2, "many": 4, "everywhere": project.Everywhere}
		}
		s.run()
		holders := func(d digest.Digest) (count int) {
			for _, n := range s.nodes {
				if n.holds(d) {
					count++
				}
			}
			return count
		}
		rows := []struct {
			projects []string
			want     int
		}{
			{nil, 3}, {[]string{"plain"}, 3}, {[]string{"few"}, 2}, {[]string{"many"}, 4}, {[]string{"everywhere"}, 5},
			{[]string{"few", "many"}, 4}, {[]string{"few", "plain"}, 3}, {[]string{"plain", "everywhere", "few"}, 5},
		}
		var ds []digest.Digest
		for i, r := range rows {
			b := bytesOf(fmt.Sprint("blob ", i), 100)
			d := digest.FromBytes(b)
			s.put(b, s.byPlacement(d)[0])
			s.update(func(tx *table.Tx) error {
				for _, p := range r.projects {
					if err := s.records.Link(tx, p, "app", d); err != nil {
						return err
					}
				}
				return nil
			})
			ds = append(ds, d)
		}
		pass(t, time.Minute)
		for i, r := range rows {
			if got := holders(ds[i]); got != r.want {
				t.Errorf("a blob of %v is on %d nodes, want %d", r.projects, got, r.want)
			}
		}
	})
}

// A home that is missed for long is stood in for by the next of the placement.
func TestAnAbsentHomeIsStoodInFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 4)
		s.run()
		b := bytesOf("blob", 1000)
		order := s.byPlacement(digest.FromBytes(b))
		d := s.put(b, order[0])
		pass(t, time.Minute)
		order[1].setDown(true)
		pass(t, awayAfter/2)
		if order[3].holds(d) {
			t.Error("a node that is away for a short while is stood in for already")
		}
		pass(t, awayAfter)
		if !order[3].holds(d) {
			t.Error("nobody stands in for a node that has been away for long")
		}
	})
}

// A node that is drained hands over all that it alone holds, counts what is left,
// and then loses nothing with it.
func TestDraining(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 4)
		leaving := s.nodes[3]
		var ds []digest.Digest
		for i := range 40 { // on the node alone, homes or not
			ds = append(ds, s.put(bytesOf(fmt.Sprint("blob ", i), 1000), leaving))
		}
		condemned := s.put(bytesOf("condemned", 100), leaving)
		if err := s.records.Condemn(t.Context(), condemned); err != nil {
			t.Fatal(err)
		}
		ds = append(ds, condemned)
		leaving.setRow(func(m *member.Member) { m.Draining = 1 })
		for _, n := range s.nodes[1:3] {
			n.setDown(true)
		}
		s.run()
		pass(t, time.Minute)
		if left, err := s.nodes[0].DrainLeft(t.Context(), leaving.id); err != nil || left != len(ds) {
			t.Errorf("two of the three homes are down: %d left, %v; want %d", left, err, len(ds))
		}
		row := member.Member{ID: leaving.id, Name: "leaving", Draining: 1}
		if err := s.nodes[0].spare(t.Context(), row); !fault.Is(err, fault.Precondition) {
			t.Errorf("it may be removed already: %v", err)
		}
		if f, err := s.nodes[0].Figures(t.Context()); err != nil || f[leaving.id].Leaving != len(ds) {
			t.Errorf("the figure is %+v, %v", f[leaving.id], err)
		}
		for _, n := range s.nodes[1:3] {
			n.setDown(false)
		}
		pass(t, 2*time.Minute)
		if left, err := s.nodes[0].DrainLeft(t.Context(), leaving.id); err != nil || left != 0 {
			t.Errorf("all homes are up: %d left, %v", left, err)
		}
		if err := s.nodes[0].spare(t.Context(), row); err != nil {
			t.Errorf("it may not be removed: %v", err)
		}
		if f, err := s.nodes[0].Figures(t.Context()); err != nil || f[leaving.id].Leaving != 0 {
			t.Errorf("the figure is %+v, %v", f[leaving.id], err)
		}
		for _, d := range ds {
			for _, n := range s.nodes[:3] {
				if !n.holds(d) {
					t.Fatalf("%s lacks %s, which the drained node held", n.id, d)
				}
			}
		}
		leaving.setDown(true)
		if _, err := s.nodes[0].DrainLeft(t.Context(), leaving.id); !fault.Is(err, fault.Unavailable) {
			t.Errorf("asking a node that is down: %v", err)
		}
	})
}

// A lone node has nobody to hand over to.
func TestDrainingTheOnlyNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1)
		s.put(bytesOf("blob", 100), s.nodes[0])
		s.nodes[0].setRow(func(m *member.Member) { m.Draining = 1 })
		s.run()
		pass(t, time.Minute)
		if left, err := s.nodes[0].DrainLeft(t.Context(), s.nodes[0].id); err != nil || left != 1 {
			t.Errorf("%d left, %v; want 1", left, err)
		}
	})
}

// cache makes a node a cache of so many bytes.
func (n *node) cache(size int64, file string) {
	n.setRow(func(m *member.Member) { m.Cache = true })
	n.Peers.Cache = Cache{On: true, Size: size, File: file}
}

// A cache stays within its size, keeps what was read last, and a reader goes on.
func TestCacheEvicts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		cache := s.nodes[2]
		cache.cache(10_500, "")
		s.run()
		var ds []digest.Digest
		read := func(i int) io.ReadCloser {
			t.Helper()
			f, _, err := cache.Store.OpenBlob(ds[i])
			if err != nil {
				t.Fatal(err)
			}
			cache.Read(ds[i])
			return f
		}
		for i := range 10 {
			ds = append(ds, s.put(bytesOf(fmt.Sprint("blob ", i), 1000), s.nodes...))
			read(i).Close()
		}
		pass(t, time.Minute)
		for i, d := range ds {
			if !cache.holds(d) {
				t.Errorf("blob %d was let go of, though the cache is within its size", i)
			}
		}
		old := read(1)
		defer old.Close()
		read(0).Close() // no longer the oldest
		ds = append(ds, s.put(bytesOf("blob 10", 1000), s.nodes...))
		pass(t, time.Minute)
		for i, d := range ds {
			// 11,000 bytes are down to 9,450 by the two that were read longest ago.
			if gone := i == 2 || i == 3; cache.holds(d) == gone {
				t.Errorf("blob %d is held: %v", i, !gone)
			}
			if !s.nodes[0].holds(d) || !s.nodes[1].holds(d) {
				t.Errorf("a home lost blob %d", i)
			}
		}
		for i := range 10 {
			s.put(bytesOf(fmt.Sprint("later ", i), 1000), s.nodes...)
		}
		pass(t, time.Minute)
		if cache.holds(ds[1]) {
			t.Fatal("the cache was filled anew and keeps a blob that was read long ago")
		}
		if got, err := io.ReadAll(old); err != nil || !bytes.Equal(got, bytesOf("blob 1", 1000)) {
			t.Errorf("a reader under way got %d bytes, %v", len(got), err)
		}
		if f, err := s.nodes[0].Figures(t.Context()); err != nil || f[cache.id].Cache < 5000 || f[cache.id].Cache > 10_500 {
			t.Errorf("the cache says that it holds %+v, %v", f[cache.id], err)
		}
	})
}

// What was prefetched to a cache stays, however long ago it was read, until it is not
// to be kept any more.
func TestCacheKeepsWhatIsPinned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		cache := s.nodes[2]
		cache.cache(5_500, "")
		first := s.put(bytesOf("pinned", 1000), s.nodes...)
		var released atomic.Bool
		cache.KeepIf(func(d digest.Digest) bool { return d == first && !released.Load() })
		s.run()
		cache.Read(first)
		for i := range 9 {
			cache.Read(s.put(bytesOf(fmt.Sprint("blob ", i), 1000), s.nodes...))
		}
		pass(t, time.Minute)
		if f, err := cache.Figures(t.Context()); err != nil || f[cache.id].Cache > 5_500 || !cache.holds(first) {
			t.Errorf("the cache holds %+v, %v; the pinned blob: %v", f[cache.id], err, cache.holds(first))
		}
		released.Store(true)
		for i := range 9 {
			cache.Read(s.put(bytesOf(fmt.Sprint("later ", i), 1000), s.nodes...))
		}
		pass(t, time.Minute)
		if cache.holds(first) {
			t.Error("it is not pinned any more, and stays though it was read longest ago")
		}
	})
}

// What homes do not hold no cache lets go of, however many caches there are and
// whatever their rows say of each other.
func TestCachesKeepTheLastCopy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 4)
		a, b := s.nodes[2], s.nodes[3]
		a.cache(1, "")
		b.cache(1, "")
		d := s.put(bytesOf("blob", 1000), a, b)
		for _, home := range s.nodes[:2] {
			home.setDown(true)
		}
		s.run()
		pass(t, time.Minute)
		if !a.holds(d) || !b.holds(d) {
			t.Fatal("no home is up, and a cache let go of the blob")
		}
		// Their rows are older than they are: each takes the other for a home.
		for _, n := range []*node{a, b} {
			n.setRow(func(m *member.Member) { m.Cache = false })
		}
		pass(t, time.Minute)
		if !a.holds(d) || !b.holds(d) {
			t.Fatal("two caches took each other for homes, and one let go of the blob")
		}
		for _, n := range []*node{a, b} {
			n.setRow(func(m *member.Member) { m.Cache = true })
		}
		// One home has it, of two that should.
		s.nodes[0].setDown(false)
		pass(t, time.Minute)
		if !s.nodes[0].holds(d) || !a.holds(d) || !b.holds(d) {
			t.Fatalf("one home is up: it holds the blob: %v, the caches: %v, %v", s.nodes[0].holds(d), a.holds(d), b.holds(d))
		}
		s.nodes[1].setDown(false)
		pass(t, time.Minute)
		if !s.nodes[0].holds(d) || !s.nodes[1].holds(d) || a.holds(d) || b.holds(d) {
			t.Errorf("both homes are up: %v, %v, the caches: %v, %v", s.nodes[0].holds(d), s.nodes[1].holds(d), a.holds(d), b.holds(d))
		}
		// What it lacks again it has from the homes.
		content, err := a.Open(t.Context(), d, 1000)
		if err != nil {
			t.Fatal(err)
		}
		defer content.Close()
		if got, err := io.ReadAll(content); err != nil || !bytes.Equal(got, bytesOf("blob", 1000)) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	})
}

// The order in which blobs were read outlives the process.
func TestCacheRemembers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1)
		n := s.nodes[0]
		n.Peers.Cache = Cache{On: true, Size: 1 << 20, File: t.TempDir() + "/cache-order"}
		ds := s.fill("blob", 5, n)
		n.recall() // nothing is there yet
		for _, i := range []int{3, 0, 4, 1, 2, 0} {
			n.Read(ds[i])
		}
		n.remember()
		other := s.add("again")
		other.Peers.Cache = n.Peers.Cache
		other.recall()
		if got, want := other.cached.oldest(), []digest.Digest{ds[3], ds[4], ds[1], ds[2], ds[0]}; !slices.Equal(got, want) {
			t.Errorf("the order is %v, want %v", got, want)
		}
		if n.logs.Len()+other.logs.Len() > 0 {
			t.Errorf("logged:\n%s%s", n.logs.String(), other.logs.String())
		}
	})
}

func TestHeldQuestionIsChecked(t *testing.T) {
	many := make([]digest.Digest, blobsAsked+1)
	for i := range many {
		many[i] = digest.FromString(fmt.Sprint(i))
	}
	many[1] = digest.SHA512.FromString("another algorithm")
	packed, err := pack(many)
	if err != nil {
		t.Fatal(err)
	}
	if err := (haveQuestion{Blobs: packed}).check(); err == nil {
		t.Error("more blobs than one request may name are taken")
	}
	if packed, err = pack(many[:3]); err != nil {
		t.Fatal(err)
	}
	if got, err := unpack(packed); err != nil || !slices.Equal(got, many[:3]) {
		t.Errorf("what was packed is %v, %v", got, err)
	}
	if _, err := pack([]digest.Digest{"sha256:../../etc"}); err == nil {
		t.Error("a malformed digest is packed")
	}
	for _, bad := range [][]byte{{33}, packed[:len(packed)-1], append([]byte{0}, packed...)} {
		if err := (haveQuestion{Blobs: bad}).check(); err == nil {
			t.Errorf("%d bytes that are no digests are taken", len(bad))
		}
	}
}
