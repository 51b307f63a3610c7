// Package transfer moves a blob by digest between peers. It declares what an
// engine needs (a Source to serve from, a Sink to write to, Peers to ask) and
// what it offers (a Mover), and it holds the two things that every engine must
// do alike: the piece table (hash tree) of a blob, and the Arrival, the one gate
// through which received bytes become bytes that may be read.
//
// The invariant, whatever the engine and whoever the peers: no byte is used,
// served or passed on before it is verified, either piece by piece against a
// root that was trusted beforehand, or, without such a root, as a whole against
// the blob's digest; and no blob becomes visible before its digest is verified.
package transfer

import (
	"context"
	_ "crypto/sha512" // blobs may be named by it; pieces have sha256 whatever their blob has
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Blob names what to move and what is known about it beforehand.
type Blob struct {
	Digest digest.Digest
	// Size in bytes, from the blob's row or a manifest's descriptor, never from a
	// peer: it bounds everything that a peer may send.
	Size int64
	// Root of the piece tree, 32 bytes, or nil when none is trusted yet.
	Root []byte
}

// Check says what is wrong with a blob that nobody could fetch.
func (b Blob) Check() error {
	if err := b.Digest.Validate(); err != nil {
		return fmt.Errorf("blob %q: %w", b.Digest, err)
	}
	if b.Size < 0 {
		return fmt.Errorf("blob %s: size %d is negative", b.Digest, b.Size)
	}
	if b.Root == nil {
		return nil
	}
	if len(b.Root) != HashSize {
		return fmt.Errorf("blob %s: piece root has %d bytes, want %d", b.Digest, len(b.Root), HashSize)
	}
	if b.Size > MaxSize {
		return fmt.Errorf("blob %s: %d bytes are more than a piece table covers (%d); fetch it without a root", b.Digest, b.Size, int64(MaxSize))
	}
	return nil
}

// Peer is a node that may hold a blob.
type Peer struct {
	ID   string // node id; the connection must prove it
	Addr string // host:port of its peer port
}

// Peers knows whom to ask.
type Peers interface {
	// Candidates lists the live peers that may hold the blob, nearest first,
	// without this node itself. The mover asks them in parallel, so the list need
	// not be right, only plausible. Called again while a fetch runs.
	Candidates(ctx context.Context, d digest.Digest) []Peer
}

// Content is the bytes of a blob that this node holds.
type Content interface {
	io.ReaderAt
	Size() int64
	io.Closer
}

// Source is what this node holds. Safe for concurrent use.
type Source interface {
	// Open gives a blob that is complete and verified; ErrNotHeld when there is none.
	Open(ctx context.Context, d digest.Digest) (Content, error)
	// Pieces gives the blob's piece table, computing it when that was never done;
	// ErrNotHeld when the blob is not held.
	Pieces(ctx context.Context, d digest.Digest) (PieceTable, error)
}

// Sink is where arriving blobs are written. Safe for concurrent use; a mover has
// at most one Partial open per digest.
type Sink interface {
	// Create opens the partial blob, the one left by an earlier attempt if there
	// is one, else a new one of blob.Size bytes.
	Create(ctx context.Context, blob Blob) (Partial, error)
}

// Partial is a blob that is arriving. WriteAt, ReadAt, Have and MarkPiece may be
// called concurrently; writes never overlap with different bytes.
//
// Marks are hints that survive a restart: a mover verifies a marked piece again
// before it trusts it, so a mark that outlived its bytes costs one piece.
type Partial interface {
	io.WriterAt
	// ReadAt works until Close or Abort, also after Commit.
	io.ReaderAt
	// Have says whether the piece was marked, now or before a restart.
	Have(piece int) bool
	// MarkPiece remembers that the piece has been written and verified.
	MarkPiece(piece int) error
	// Commit makes the bytes durable, verifies the whole digest and makes the blob
	// visible, in this order. An error that wraps ErrDigest says that the bytes are
	// not the blob; any other error leaves the Partial as it was.
	Commit(ctx context.Context) error
	// Abort discards everything.
	Abort() error
	// Close releases the Partial; marked pieces are kept unless it was committed
	// or aborted.
	Close() error
}

// Mover fetches blobs from peers. Safe for concurrent use.
type Mover interface {
	// Fetch starts to fetch a blob, joins the fetch of it that is under way, or, if
	// the node holds the blob already, gives a Fetch that has ended. The fetch
	// belongs to the mover: ctx bounds only this call, and nobody's leaving ends it.
	Fetch(ctx context.Context, blob Blob, options ...Option) (*Fetch, error)
}

var (
	// ErrNotHeld: the node does not hold the blob.
	ErrNotHeld = errors.New("blob not held here")
	// ErrDigest: the bytes that came together are not the blob's.
	ErrDigest = errors.New("bytes do not have the blob's digest")
	// ErrBadPiece: a piece does not have the hash that the piece table says.
	ErrBadPiece = errors.New("piece does not have the hash of the piece table")
	// ErrBadTable: a piece table is malformed or not that of the trusted root.
	ErrBadTable = errors.New("piece table is not that of the trusted root")
	// ErrStopped: the mover has stopped, or stopped while the fetch ran; what was
	// verified is kept for the next start.
	ErrStopped = errors.New("blob mover stopped")
	// ErrNoHolder is what errors.Is finds in a NoHolderError.
	ErrNoHolder = errors.New("no reachable peer could supply the blob")
)

// NoHolderError says that every peer that was asked could not supply the blob, or
// that there was nobody to ask.
type NoHolderError struct {
	Digest digest.Digest
	Asked  []Asked
}

// Asked is one peer and why it could not supply the blob.
type Asked struct {
	Peer   Peer
	Reason error
}

// Heard notes what came of asking a peer, in the place of what came of it before; nil
// when it holds the blob.
func (e *NoHolderError) Heard(p Peer, reason error) {
	for i := range e.Asked {
		if e.Asked[i].Peer == p {
			e.Asked[i].Reason = reason
			return
		}
	}
	e.Asked = append(e.Asked, Asked{p, reason})
}

// Final is the error to end a fetch with: those that hold the blob, and brought nothing
// all the same, have the reason given.
func (e *NoHolderError) Final(reason error) *NoHolderError {
	final := &NoHolderError{Digest: e.Digest, Asked: slices.Clone(e.Asked)}
	for i := range final.Asked {
		if final.Asked[i].Reason == nil {
			final.Asked[i].Reason = reason
		}
	}
	return final
}

func (e *NoHolderError) Error() string {
	if len(e.Asked) == 0 {
		return fmt.Sprintf("blob %s: no live peer to ask; bring a node that holds it back, or push it again", e.Digest)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "blob %s: no peer could supply it; asked", e.Digest)
	for i, a := range e.Asked {
		if i > 0 {
			b.WriteByte(';')
		}
		fmt.Fprintf(&b, " %s (%s): %v", a.Peer.ID, a.Peer.Addr, a.Reason)
	}
	return b.String()
}

// Nowhere says that all of so many peers answered that they do not hold the blob: none was
// out of reach, and none gave it up on the way.
func (e *NoHolderError) Nowhere(peers int) bool {
	return len(e.Asked) >= peers && !slices.ContainsFunc(e.Asked, func(a Asked) bool { return !errors.Is(a.Reason, ErrNotHeld) })
}

// Is makes errors.Is(err, ErrNoHolder) true.
func (e *NoHolderError) Is(target error) bool { return target == ErrNoHolder }

// Unavailable is true: the same request may succeed once a holder is back.
func (e *NoHolderError) Unavailable() bool { return true }
