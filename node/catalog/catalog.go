// Package catalog keeps what the repositories hold: artifacts, tags, and which
// artifact refers to which.
//
// Invariants (DESIGN.md says why):
//   - One change is one Txn: rows, references to blobs, and the journal's entries
//     take effect together or not at all.
//   - An artifact is admitted only while every blob that it names is live and
//     linked in its repository and every manifest that it lists is there; the
//     Txn is guarded by those rows.
//   - Every way in passes the gates, whatever the carrier.
//   - The state that travels (Materialise) is a pure function of the project's
//     log: equal logs, equal state roots.
package catalog

import (
	"context"
	"errors"
	"regexp"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/events"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/journal"
)

// Carrier is how content came in.
type Carrier string

// The carriers.
const (
	Client      Carrier = "client"
	Bundle      Carrier = "bundle"
	Site        Carrier = "site"
	Replication Carrier = "replication"
	Proxy       Carrier = "proxy"
	Adopted     Carrier = "adopted" // from another registry's storage
)

// Push asks to put a manifest into a repository.
type Push struct {
	Project    string
	Repository string // relative to the project
	Tag        string // "" when it is pushed by digest
	Digest     digest.Digest
	MediaType  string // as the carrier named it; once admitted, the manifest's own
	Bytes      []byte
	Carrier    Carrier
	Origin     string   // id of the site that it comes from, "" for this one
	Signers    []string // fingerprints of the keys that vouched for it on the way
	Actor      string
	At         time.Time
	Copies     int // members that hold its blobs durably
	// If is what the move of the tag rests on; not asked without a tag.
	If Condition
}

// Pull asks for a manifest.
type Pull struct {
	Project, Repository string
	Reference           string // as it was asked for
	Digest              digest.Digest
	Actor               string
}

// Verdict of a gate that does not refuse.
type Verdict uint8

const (
	Allow Verdict = iota
	Hold          // stored and listed, but not served
)

// Gate may refuse content, or hold it back. A refusal is a fault whose text says
// what to do. Both methods run inside a read of the tables: they must not block,
// and AdmitPush may run more than once for one push.
type Gate interface {
	AdmitPush(ctx context.Context, tx *table.Tx, p Push) (Verdict, error)
	AdmitPull(ctx context.Context, v *table.View, p Pull) error
}

// Projects is what the catalog needs to know of projects.
type Projects interface {
	// Writable gives the log of a project that this site owns; an unknown
	// project is a fault NotFound, a mirror a fault Denied. The Txn depends on it.
	Writable(tx *table.Tx, project string) (journal.Scope, error)
	// Mirror refuses unless the project is the mirror of that log.
	Mirror(tx *table.Tx, project string, log entry.LogID) error
	// ApplyEntry changes a mirror as an entry project.put says.
	ApplyEntry(tx *table.Tx, project string, e entry.Entry) error
	// State is the entry that the project amounts to; not ok before the first.
	State(r table.Reader, project string) (e entry.Entry, ok bool, err error)
	// Describe gives what listings need.
	Describe(r table.Reader, project string) (p access.Project, id int64, ok bool, err error)
}

// Big keeps manifests that are too large for a row.
type Big interface {
	// Put stores a manifest as durably as the blobs of a push. It may be repeated.
	Put(ctx context.Context, d digest.Digest, body []byte) error
	// Read gives it back, from this node or another; a fault NotFound says that
	// nobody holds it, Unavailable that nobody who holds it answers.
	Read(ctx context.Context, d digest.Digest) ([]byte, error)
}

// MaxRow is the largest manifest that is kept as a row, in bytes.
const MaxRow = 64 << 10

// Artifact is a manifest in a repository.
type Artifact struct {
	ID           int64
	Project      string
	Repository   string // relative to the project
	Digest       digest.Digest
	MediaType    string
	ArtifactType string
	ConfigType   string        // media type of its config, "" of an index
	Subject      digest.Digest // "" when it refers to none
	Size         int64         // of the manifest, in bytes
	Total        int64         // of the manifest and all that it names, in bytes
	PushedAt     time.Time
	Actor        string
	// Withheld: a gate holds it back; it is listed but not served.
	Withheld bool
	// Absent: an entry told of it but its content did not come along.
	Absent bool
}

// Manifest is an artifact with its bytes.
type Manifest struct {
	Artifact
	Bytes []byte
}

// Tag is a name of an artifact.
type Tag struct {
	ID       int64
	Name     string
	Digest   digest.Digest
	PushedAt time.Time
	Withheld bool
}

// Repository is a named place for artifacts in a project.
type Repository struct {
	ID          int64
	Project     string
	Name        string // relative to the project
	Description string
	CreatedAt   time.Time
}

// Pushed is published after a push that changed something has been committed.
type Pushed struct {
	Project, Repository, Tag string
	Digest                   digest.Digest
	MediaType, ArtifactType  string
	Carrier                  Carrier
	Actor                    string
	At                       time.Time
}

// Deleted is published after a tag ("" Digest) or an artifact ("" Tag) is gone.
type Deleted struct {
	Project, Repository, Tag string
	Digest                   digest.Digest
	Actor                    string
	At                       time.Time
}

// Config names what a catalog is made of. Gates may be empty.
type Config struct {
	DB       *table.DB
	Records  *blobs.Records
	Journal  *journal.Journal
	Projects Projects
	Big      Big
	Gates    []Gate
}

// Catalog keeps repositories, artifacts and tags. It is safe for use by many
// goroutines.
type Catalog struct {
	db       *table.DB
	records  *blobs.Records
	journal  *journal.Journal
	projects Projects
	big      Big
	gates    []Gate

	// Pushed and Deleted tell what has been committed.
	Pushed  events.Topic[Pushed]
	Deleted events.Topic[Deleted]

	tables
}

// New defines the catalog's tables on the DB.
func New(c Config) (*Catalog, error) {
	if c.DB == nil || c.Records == nil || c.Journal == nil || c.Projects == nil || c.Big == nil {
		return nil, errors.New("catalog: a part that it is made of is missing")
	}
	return &Catalog{
		db: c.DB, records: c.Records, journal: c.Journal, projects: c.Projects, big: c.Big, gates: c.Gates,
		tables: define(c.DB),
	}, nil
}

// Referrers asks for the artifacts that refer to a subject.
type Referrers struct {
	Project, Repository string
	Subject             digest.Digest
	ArtifactType        string        // "" is any
	After               digest.Digest // "" begins
	N                   int           // at most so many; 0 is all
}

var (
	repositoryForm = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagForm        = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
)

// CheckRepository refuses what cannot be a repository's name below its project.
func CheckRepository(name string) error {
	if len(name) > 255 || !repositoryForm.MatchString(name) {
		return fault.New(fault.Invalid, "%.80q cannot name a repository: parts of a-z and 0-9 with '.', '_', '__' or '-' inside, joined by '/', at most 255 characters", name).WithCode("NAME_INVALID")
	}
	return nil
}

// CheckTag refuses what cannot be a tag.
func CheckTag(tag string) error {
	if !tagForm.MatchString(tag) {
		return fault.New(fault.Invalid, "%.80q cannot be a tag: 1-128 characters of letters, digits, '_', '.' and '-', the first not '.' or '-'", tag).WithCode("TAG_INVALID")
	}
	return nil
}

// descriptor of an artifact, as a referrers list shows it.
func (a Artifact) descriptor(annotations map[string]string) v1.Descriptor {
	return v1.Descriptor{MediaType: a.MediaType, Digest: a.Digest, Size: a.Size, ArtifactType: a.ArtifactType, Annotations: annotations}
}

// cut splits "project/repository" at the first slash.
func cut(full string) (project, repository string, ok bool) { return strings.Cut(full, "/") }
