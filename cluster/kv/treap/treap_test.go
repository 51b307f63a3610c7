package treap

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

// Every version of a random history stays what it was, whatever is made of it
// later, and is in order.
func TestVersionsStay(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	type version struct {
		m    Map
		want map[string]string
	}
	versions := []version{{Map{}, map[string]string{}}}
	for range 300 {
		from := versions[rnd.IntN(len(versions))]
		e, want := from.m.Edit(), maps.Clone(from.want)
		for range rnd.IntN(40) {
			key := fmt.Sprint(rnd.IntN(200))
			if rnd.IntN(3) == 0 {
				e.Remove([]byte(key))
				delete(want, key)
			} else {
				v := fmt.Append(nil, rnd.IntN(1000))
				e.Set([]byte(key), v)
				want[key] = string(v)
			}
			if got, ok := e.Get([]byte(key)); string(got) != want[key] || ok != (want[key] != "") {
				t.Fatalf("key %s is %q in the edit, want %q", key, got, want[key])
			}
			if rnd.IntN(10) == 0 {
				versions = append(versions, version{e.Map(), maps.Clone(want)})
			}
		}
		versions = append(versions, version{e.Map(), want})
	}
	for i, v := range versions {
		check(t, v.m.root)
		got := maps.Collect(strings(v.m, nil, nil))
		if !maps.Equal(got, v.want) || v.m.Empty() != (len(v.want) == 0) {
			t.Fatalf("version %d is %v, want %v", i, got, v.want)
		}
		from, to := fmt.Sprint(rnd.IntN(200)), fmt.Sprint(rnd.IntN(200))
		var keys, want []string
		for k := range strings(v.m, []byte(from), []byte(to)) {
			keys = append(keys, k)
		}
		for _, k := range slices.Sorted(maps.Keys(v.want)) {
			if k >= from && k < to {
				want = append(want, k)
			}
		}
		if !slices.Equal(keys, want) {
			t.Fatalf("version %d from %s to %s: %v, want %v", i, from, to, keys, want)
		}
	}
}

func strings(m Map, from, to []byte) func(func(string, string) bool) {
	return func(yield func(string, string) bool) {
		for k, v := range m.Ascend(from, to) {
			if !yield(string(k), string(v)) {
				return
			}
		}
	}
}

// check finds a child that is on the wrong side or weighs more.
func check(t *testing.T, n *node) {
	if n == nil {
		return
	}
	for _, child := range []*node{n.left, n.right} {
		if child != nil && (child.weight > n.weight || (bytes.Compare(child.key, n.key) < 0) != (child == n.left)) {
			t.Fatal("no treap")
		}
		check(t, child)
	}
}

// A value that is nil is not the same as none: it stands for a key that is gone.
func TestNil(t *testing.T) {
	e := Map{}.Edit()
	e.Set([]byte("gone"), nil)
	e.Set([]byte("empty"), []byte{})
	for key, want := range map[string]bool{"gone": true, "empty": false} {
		if v, ok := e.Get([]byte(key)); !ok || (v == nil) != want {
			t.Errorf("%s: %v %v", key, v, ok)
		}
	}
	if _, ok := e.Get([]byte("none")); ok {
		t.Error("found what is not there")
	}
}

// An edit copies a path once, not for each of its writes.
func TestEditOwnsItsNodes(t *testing.T) {
	e := Map{}.Edit()
	key := func(i int) []byte { return fmt.Appendf(nil, "%06d", i) }
	for i := range 10000 {
		e.Set(key(i), []byte("v"))
	}
	m, middle := e.Map(), key(5000)
	set := func(times int) float64 {
		return testing.AllocsPerRun(20, func() {
			e := m.Edit()
			for range times {
				e.Set(middle, []byte("w"))
			}
		})
	}
	if once, often := set(1), set(100); often > once+99 {
		t.Errorf("1 write takes %v allocations and 100 of the same key %v", once, often)
	}
}
