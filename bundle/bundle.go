// Package bundle reads and writes the signed file that carries projects between
// sites: a plain tar that is an OCI image layout, with a signed statement over
// everything in it. FORMAT.md is the specification, DESIGN.md says why.
//
// Invariants:
//   - Equal contents and keys give equal bytes.
//   - Both directions take one pass over a stream; memory grows with the number
//     of manifests and names, never with the size of blobs.
//   - The Reader returns bytes only after the statement, the manifest and the
//     key chain are authenticated, and reports the end only after every byte of
//     the file is accounted for. What a Writer would not have written is refused.
//   - No key inside a bundle is trusted because it is inside.
package bundle

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
)

// Version is the format version that this build writes, and the highest it reads.
const Version = 1

// The reasons to refuse a bundle. Every refusal is a *Refusal that wraps one.
var (
	ErrNotBundle   = errors.New("not an Atoll bundle")
	ErrNewerFormat = errors.New("newer bundle format")
	ErrUntrusted   = errors.New("bundle not signed by a trusted site")
	ErrAltered     = errors.New("bundle altered or damaged")
	ErrTruncated   = errors.New("bundle truncated")
)

// Refusal says why a bundle is refused, in words that the operator can act upon
// and that may be shown as they are.
type Refusal struct {
	Reason error  // one of the errors above, or of the rules of package airgap
	Text   string // what was found, in which place, and what to do
	Cause  error  // more for the log; may be nil
}

func (r *Refusal) Error() string { return r.Text }

// Unwrap makes errors.Is find the reason and the cause.
func (r *Refusal) Unwrap() []error {
	if r.Cause == nil {
		return []error{r.Reason}
	}
	return []error{r.Reason, r.Cause}
}

// Refuse makes a refusal.
func Refuse(reason error, format string, args ...any) *Refusal {
	return &Refusal{Reason: reason, Text: fmt.Sprintf(format, args...)}
}

// Because adds the cause.
func (r *Refusal) Because(cause error) *Refusal { r.Cause = cause; return r }

// altered is the refusal of something that no writer wrote.
func altered(format string, args ...any) *Refusal {
	return Refuse(ErrAltered, "the bundle is altered or damaged: "+format+"; copy it again from its source", args...)
}

// Content is where a Writer finds manifests and blobs. An error that wraps
// fs.ErrNotExist means that the blob is not held: the bundle says so and goes on.
type Content interface {
	// Size is the size of a blob in bytes.
	Size(ctx context.Context, d digest.Digest) (int64, error)
	// Open reads a blob from its beginning.
	Open(ctx context.Context, d digest.Digest) (io.ReadCloser, error)
}

// Roles of the files that the manifest names, in their order in the tar.
const (
	RoleLayout     = "layout"     // oci-layout
	RoleKeys       = "keys"       // a site's key chain
	RoleIndex      = "index"      // index.json
	RoleCheckpoint = "checkpoint" // the signed checkpoint of a log
	RoleEntries    = "entries"    // its entries
	RoleManifest   = "manifest"   // an image manifest or index
	RoleConfig     = "config"     // a blob that a manifest names as config
	RoleLayer      = "layer"      // any other blob
)

// Trusted gives the root key that was trusted for a site before the bundle came.
type Trusted func(site string) (root entry.Key, ok bool)
