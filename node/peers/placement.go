package peers

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"slices"

	"github.com/opencontainers/go-digest"
)

// placement orders nodes by how much they should hold a blob (rendezvous
// hashing, Thaler and Ravishankar 1998): every node computes the same order from
// the same ids, and a node that comes or goes moves only its own share. ids is
// not changed.
func placement(d digest.Digest, ids []string) []string {
	type scored struct {
		id    string
		score uint64
	}
	all := make([]scored, len(ids))
	for i, id := range ids {
		sum := sha256.Sum256([]byte(id + "\x00" + d.String()))
		all[i] = scored{id, binary.BigEndian.Uint64(sum[:8])}
	}
	slices.SortFunc(all, func(a, b scored) int {
		return cmp.Or(cmp.Compare(b.score, a.score), cmp.Compare(a.id, b.id))
	})
	out := make([]string, len(all))
	for i, s := range all {
		out[i] = s.id
	}
	return out
}

// homes are the nodes that should hold a blob: the first n of its placement.
func homes(d digest.Digest, ids []string, n int) []string {
	order := placement(d, ids)
	return order[:min(n, len(order))]
}
