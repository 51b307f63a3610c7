package plan

import (
	"crypto/sha256"
	"encoding/binary"
)

// Elect chooses the one of a site's nodes that asks beyond the slow link for a blob
// (rendezvous hashing): all that know the same nodes choose the same one, and when it
// leaves the next is known at once. "" when there are none.
func Elect(blob string, nodes []string) string {
	best, high := "", uint64(0)
	for _, id := range nodes {
		sum := sha256.Sum256([]byte(id + "\x00" + blob))
		if s := binary.BigEndian.Uint64(sum[:8]); best == "" || s > high || s == high && id < best {
			best, high = id, s
		}
	}
	return best
}
