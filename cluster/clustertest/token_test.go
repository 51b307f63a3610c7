package clustertest

import (
	"bytes"
	"testing"
	"testing/synctest"
)

// TestTokenKeys: every node knows the key of every other, it outlives a restart, and
// that of a node that was removed is known no more.
func TestTokenKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{})
		nodes := c.Grow(3)
		kid, key := nodes[2].TokenKey()
		known := func(n *Node, kid string) bool {
			public, err := n.TokenPublic(kid)
			if err != nil {
				t.Fatal(err)
			}
			return public != nil
		}
		c.Await("all know it", func() bool { return known(nodes[0], kid) && known(nodes[1], kid) && known(nodes[2], kid) })
		nodes[2].Stop()
		nodes[2].Start()
		if again, same := nodes[2].TokenKey(); again != kid || !bytes.Equal(key, same) {
			t.Error("the key changed at a restart")
		}
		other, _ := nodes[1].TokenKey()
		for _, wrong := range []string{"", "x", nodes[2].Self(), nodes[2].Self() + "-", nodes[2].Self() + other[32:]} {
			if known(nodes[0], wrong) || known(nodes[2], wrong) {
				t.Errorf("%q is the id of a key", wrong)
			}
		}
		if err := nodes[0].Remove(t.Context(), nodes[2].Self()); err != nil {
			t.Fatal(err)
		}
		if known(nodes[0], kid) {
			t.Error("the key of a removed node is known where it was removed")
		}
		c.Await("nobody knows it", func() bool { return !known(nodes[1], kid) })
		nodes[2].ends()
	})
}
