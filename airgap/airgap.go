// Package airgap exchanges projects between sites that share no network: which
// site is trusted to write what, what an export holds, and the rules by which
// an import becomes visible. It knows no store and no network; the small
// interfaces below are what it needs from a node.
//
// Invariants of an import:
//   - Nothing is written before the keys, the signatures, the recipient, the
//     format, the acceptance rules, the vectors, the names and the free space
//     are checked, and nothing becomes visible before the last byte is verified.
//   - Entries are applied in journal order, each exactly once, whatever was
//     interrupted and however often the same bundle comes.
//   - A refusal takes nothing away that the site had.
//
// DESIGN.md says why; bundle/FORMAT.md says what the file looks like.
package airgap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"path"

	"github.com/opencontainers/go-digest"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/atoll-registry/atoll/bundle"
	"github.com/atoll-registry/atoll/bundle/entry"
)

// The reasons to refuse. Every refusal is a *Refusal that wraps one of them and
// whose Text may be shown to the user as it is.
var (
	ErrUntrusted   = bundle.ErrUntrusted   // signed by nobody whom this site was told to trust
	ErrAltered     = bundle.ErrAltered     // not what its signer wrote
	ErrTruncated   = bundle.ErrTruncated   // ends too early
	ErrNewerFormat = bundle.ErrNewerFormat // of a format version that this build does not read
	ErrNotBundle   = bundle.ErrNotBundle   // something else than a bundle

	ErrNotRecipient = errors.New("not a recipient")            // made for other sites
	ErrNotAccepted  = errors.New("not accepted")               // the trusted site may not write this project here
	ErrNameTaken    = errors.New("project name taken")         // another project here has the name
	ErrNoSpace      = errors.New("not enough space")           // the blobs would not fit
	ErrGap          = errors.New("entries missing in between") // begins after what was applied so far
	ErrFork         = errors.New("two histories of one log")   // alarm: two entries with one id
	ErrDiverged     = errors.New("state diverged")             // alarm: equal logs, different states
	ErrNoProject    = errors.New("no such project")            // export: not known here
)

// Refusal says why an import, export or verification ended.
type Refusal = bundle.Refusal

func refuse(reason error, format string, args ...any) *Refusal {
	return bundle.Refuse(reason, format, args...)
}

// Site is the public identity of a site: the document that
// `atoll site show --format json` prints and `atoll site trust` reads.
type Site struct {
	ID          string    `json:"id"`
	Incarnation string    `json:"incarnation"` // at the time of printing: a restored site has another
	Name        string    `json:"name"`        // a label, never an identity
	RootKey     entry.Key `json:"root_key"`    // base64 of the SubjectPublicKeyInfo
	Fingerprint string    `json:"fingerprint"` // of RootKey, for people to compare
}

// Validate refuses a document whose parts contradict each other.
func (s Site) Validate() error {
	if !entry.ValidID(s.ID) || !entry.ValidID(s.Incarnation) {
		return fmt.Errorf("site document: id %q or incarnation %q is malformed: have the other site print it again with `atoll site show --format json`", s.ID, s.Incarnation)
	}
	if _, err := s.RootKey.Ed25519(); err != nil {
		return fmt.Errorf("site document of %s: %w", s.ID, err)
	}
	if s.Fingerprint != s.RootKey.Fingerprint() {
		return fmt.Errorf("site document of %s: its fingerprint %s is not the one of its key, %s: do not use it, ask for it again", s.ID, s.Fingerprint, s.RootKey.Fingerprint())
	}
	return nil
}

// Trust is what this site was told about another: who it is and which of its
// projects it may write here.
type Trust struct {
	Site   Site     `json:"site"`
	Accept []string `json:"accept"` // patterns over the other site's project names, as path.Match; none accepts nothing
	Serial uint64   `json:"serial"` // the newest key document seen of the site; an older one is refused
}

// Accepts reports whether the site may write a project that it calls name.
func (t Trust) Accepts(name string) bool {
	for _, pattern := range t.Accept {
		if ok, err := path.Match(pattern, name); err == nil && ok {
			return true
		}
	}
	return false
}

// Log is one project's log as an export finds it. All fields are of one
// consistent view.
type Log struct {
	ID         entry.LogID
	Project    string   // the name here
	Size       uint64   // entries, as Checkpoint says
	Checkpoint []byte   // signed by the origin, over exactly Size entries
	State      [32]byte // entry.StateRoot of the rows here, at Size
}

// Journal is where an export finds entries. All methods may be called from
// several goroutines.
type Journal interface {
	// Logs lists the logs of the projects named, of all when none is named. An
	// unknown project is an error that wraps ErrNoProject. A mirror's log is
	// its origin's, with the newest checkpoint of the origin that was accepted.
	Logs(ctx context.Context, projects []string) ([]Log, error)
	// Entries yields the values of the entries from, from+1 ... to-1.
	Entries(ctx context.Context, id entry.LogID, from, to uint64) iter.Seq2[[]byte, error]
	// KeyChain is the newest chain known of a site, this one included.
	KeyChain(ctx context.Context, site string) (entry.KeyChain, error)
}

// Content is where an export finds manifests and blobs; an error that wraps
// fs.ErrNotExist means "not held here": the bundle then says "known, not held".
type Content = bundle.Content

// Source is a site that exports.
type Source struct {
	Journal Journal
	Content Content
}

// Scope is a log as the importing site knows it.
type Scope struct {
	Log     entry.LogID
	Project string // the name here
	Applied uint64 // entries applied so far
}

// Record is an entry to be applied.
type Record struct {
	Seq   uint64
	Value []byte
	// Manifest is the manifest of an artifact.put; nil for other kinds, and
	// when the artifact is known but not held: because a later entry of the same
	// log deletes it, or because the bundle says so.
	Manifest []byte
}

// Finish ends the import of one log.
type Finish struct {
	Log        entry.LogID
	Checkpoint []byte // signed by the origin, over all that is applied now
	KeyChain   entry.KeyChain
	Serial     uint64 // of the chain's last document
}

// Catalog is what an import changes. All methods may be called from several
// goroutines; an error ends the import, which can be run again.
type Catalog interface {
	// Scope looks a log up; ok is false when nothing of it was ever applied.
	// This site's own logs are known, with all their entries applied.
	Scope(ctx context.Context, log entry.LogID) (scope Scope, ok bool, err error)
	// Holder is the log of the project that has the name here.
	Holder(ctx context.Context, project string) (log entry.LogID, ok bool, err error)
	// Root is the root of the first size entries applied, size <= Applied.
	Root(ctx context.Context, log entry.LogID, size uint64) (tlog.Hash, error)
	// Apply applies entries in order and keeps their values for relaying. The
	// first call for an unknown log creates the project under scope.Project with
	// the log's site as owner. Records below what is applied are skipped; a
	// record beyond the next is an error. What one call applies is visible at
	// once or not at all, or at least in order.
	Apply(ctx context.Context, scope Scope, records []Record) error
	// StateRoot is the entry.StateRoot of the rows of the log's project.
	StateRoot(ctx context.Context, log entry.LogID) ([32]byte, error)
	// Finish remembers the checkpoint and the key chain. Repeating it is fine.
	Finish(ctx context.Context, finish Finish) error
}

// Blob is what is to be staged, with its role in the bundle: bundle.RoleConfig or
// RoleLayer in an area that is committed; bundle.RoleEntries or RoleManifest in
// one that is only read and discarded (manifests reach the catalog by Apply).
type Blob struct {
	Digest digest.Digest
	Size   int64
	Role   string
}

// Blobs is where an import puts blobs.
type Blobs interface {
	// Has reports whether the site holds the blob durably.
	Has(ctx context.Context, d digest.Digest) (bool, error)
	// Free is how many bytes may be written before the site's low-water mark.
	Free(ctx context.Context) (int64, error)
	// Stage opens the staging area with the name, which keeps what was put
	// there until Commit or Discard, across restarts. Names are of a-z, 0-9, "-".
	Stage(ctx context.Context, name string) (Staging, error)
}

// Staging holds verified blobs that nobody can see yet.
type Staging interface {
	Has(ctx context.Context, d digest.Digest) (bool, error)
	// Put reads the blob to its end, and keeps it only if it has the digest and
	// the size. An error of the reader is returned wrapped.
	Put(ctx context.Context, blob Blob, r io.Reader) error
	Open(ctx context.Context, d digest.Digest) (io.ReadCloser, error)
	// Commit makes all blobs durable and held by the site. Repeating it is fine.
	Commit(ctx context.Context) error
	// Discard removes the area and what is left in it.
	Discard(ctx context.Context) error
}

// Target is a site that imports.
type Target struct {
	Catalog Catalog
	Blobs   Blobs
}
