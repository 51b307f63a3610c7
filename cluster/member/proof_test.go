package member

import (
	"bytes"
	"slices"
	"testing"

	"github.com/atoll-registry/atoll/cluster/pki"
)

// A proof is good for one question, from who asked it, about who answered it, and for
// those who hold the key themselves.
func TestProofs(t *testing.T) {
	key, other := bytes.Repeat([]byte{1}, pki.ClusterKeySize), bytes.Repeat([]byte{2}, pki.ClusterKeySize)
	node := func(id string, keys ...[]byte) *Node {
		return &Node{identity: Identity{NodeID: id, ClusterKey: bytes.Join(keys, nil)}}
	}
	asker, holder, without := node("asker", key), node("holder", key, other), node("without")
	garbage := make([][]byte, maxProofs)
	for _, c := range []struct {
		name   string
		by     *Node
		answer ping
		want   bool
	}{
		{"an honest answer", asker, ping{Node: "holder", Proofs: holder.prove("nonce", "asker")}, true},
		{"a claim", asker, ping{Node: "without", Keys: asker.keyIDs(), Seals: asker.keyIDs()[0], Proofs: without.prove("nonce", "asker")}, false},
		{"an answer to another question", asker, ping{Node: "holder", Proofs: holder.prove("former", "asker")}, false},
		{"an answer that was passed on", asker, ping{Node: "without", Proofs: holder.prove("nonce", "asker")}, false},
		{"an answer that it got for a question of its own", asker, ping{Node: "holder", Proofs: holder.prove("nonce", "without")}, false},
		{"another key", asker, ping{Node: "holder", Proofs: node("holder", other).prove("nonce", "asker")}, false},
		{"more than are looked at", asker, ping{Node: "holder", Proofs: append(garbage, holder.prove("nonce", "asker")...)}, false},
		{"who cannot tell", without, ping{Node: "holder", Proofs: holder.prove("nonce", "without")}, false},
	} {
		if got := c.by.proved(c.answer, "nonce"); slices.Equal(got, asker.keyIDs()) != c.want || !c.want && len(got) > 0 {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// A key that the node may not have any more is overwritten in memory, and so is what
// is replaced.
func TestForgottenKeysAreOverwritten(t *testing.T) {
	dir := t.TempDir()
	id, err := Found(dir, "one", "10.0.0.1:5001", nil)
	if err != nil {
		t.Fatal(err)
	}
	n := &Node{cfg: Config{Dir: dir}}
	if err := n.become(id); err != nil {
		t.Fatal(err)
	}
	fresh := bytes.Repeat([]byte{7}, pki.ClusterKeySize)
	for _, change := range []func([][]byte) [][]byte{
		func(keys [][]byte) [][]byte { return append(keys, fresh) },
		func(keys [][]byte) [][]byte { return keys[1:] },
		func([][]byte) [][]byte { return nil },
	} {
		held := n.identity.ClusterKey
		if err := n.keep(change); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(held, make([]byte, len(held))) {
			t.Errorf("of %d bytes of keys some are left", len(held))
		}
	}
	if len(n.ClusterKeys()) != 0 || fresh[0] != 7 {
		t.Error("the wrong keys were overwritten")
	}
	if id := n.Identity(); id.ClusterKey != nil {
		t.Error("an identity that is passed on has the keys")
	}
}
