package transfer

import (
	"time"

	"github.com/opencontainers/go-digest"
)

// Reason why a peer was dropped for the rest of a fetch.
type Reason string

const (
	BadPiece  Reason = "bad-piece"  // sent a piece with the wrong hash
	BadTable  Reason = "bad-table"  // sent a piece table of another root
	BadSize   Reason = "bad-size"   // claimed or sent another length
	BadDigest Reason = "bad-digest" // alone sent a whole blob with the wrong digest
	Stalled   Reason = "stalled"    // made no progress, repeatedly
	Broken    Reason = "broken"     // unreachable, or answers broke off, repeatedly
	Gone      Reason = "gone"       // does not hold the blob after all
)

// Lie says whether the reason is one that no honest peer gives.
func (r Reason) Lie() bool {
	return r == BadPiece || r == BadTable || r == BadSize || r == BadDigest
}

// Hooks are called for metrics, from many goroutines, and must not block. Each may
// be nil.
type Hooks struct {
	// Moved: verified bytes came from the peer.
	Moved func(peerID string, bytes int64)
	// Served: bytes went to the peer.
	Served func(peerID string, bytes int64)
	// Dropped: the peer takes no further part in the fetch of the blob.
	Dropped func(peerID string, d digest.Digest, why Reason)
	// Ended: a fetch ended, well when err is nil.
	Ended func(d digest.Digest, bytes int64, took time.Duration, err error)
}
