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
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
)

// Version is the format version that this build writes, and the highest it reads.
const Version = 1

// The reasons to refuse a bundle. The errors that wrap them say where and what.
var (
	ErrNotBundle   = errors.New("not an Atoll bundle")
	ErrNewerFormat = errors.New("newer bundle format")
	ErrUntrusted   = errors.New("bundle not signed by a trusted site")
	ErrAltered     = errors.New("bundle altered or damaged")
	ErrTruncated   = errors.New("bundle truncated")
)

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
