// Package adopt takes over what another registry has stored: the storage
// directory of distribution's registry or of zot.
//
// Invariants:
//   - Nothing in the directory is changed, and nothing in it is believed: each
//     blob is hashed, and what is damaged is named and left out.
//   - A manifest comes in as a pushed one does, through the catalog and its gates,
//     after everything that it names.
//   - Adopting again adds what is missing and moves no tag that is here already:
//     it may have been pushed since.
package adopt

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"path/filepath"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/project"
	"github.com/atoll-registry/atoll/node/rest"
)

// Projects makes and checks projects.
type Projects interface {
	Get(r table.Reader, name string) (project.Project, bool, error)
	Create(ctx context.Context, d project.Draft) (project.Project, error)
}

// Config of Adopt. All fields are needed.
type Config struct {
	DB       *table.DB
	Projects Projects
	Catalog  *catalog.Catalog
	Store    *blobs.Store
	Records  *blobs.Records
	Copies   blobs.Copies
	Log      *slog.Logger
}

// Adopt is the room.
type Adopt struct {
	Config
	busy sync.Mutex // one directory at a time
}

// New makes the room.
func New(c Config) *Adopt { return &Adopt{Config: c} }

// Request asks to take over a directory.
type Request struct {
	// Dir is the storage directory as this node sees it.
	Dir string `json:"dir"`
	// Project takes all repositories, under their whole names; "" puts each into
	// the project that its name begins with, or into library.
	Project string `json:"project"`
	// DryRun reads names, manifests and sizes, hashes nothing and changes nothing.
	DryRun bool `json:"dry_run"`
	// Copy makes copies where links to the same files would do.
	Copy bool `json:"copy"`
}

// Report says what was taken over.
type Report struct {
	Dir          string    `json:"dir"`
	Kind         string    `json:"kind"` // distribution or zot
	DryRun       bool      `json:"dry_run"`
	Repositories int       `json:"repositories"`
	Manifests    int       `json:"manifests"`
	Tags         int       `json:"tags"`
	Blobs        Blobs     `json:"blobs"`
	Problems     []Problem `json:"problems"`
}

// Blobs counts blobs by what was done for them.
type Blobs struct {
	Linked int   `json:"linked"` // share their space with the directory
	Copied int   `json:"copied"`
	Held   int   `json:"held"` // were here already
	Bytes  int64 `json:"bytes"`
}

// Problem is something that was left out, and why.
type Problem struct {
	Repository string `json:"repository"`
	Tag        string `json:"tag,omitempty"`
	Digest     string `json:"digest,omitempty"`
	Reason     string `json:"reason"`
}

// Line is one line of the answer: progress now and then, and a report at the
// end. Failure ends the work before its end; what the report names is kept.
type Line struct {
	Progress *Progress `json:"progress,omitempty"`
	Report   *Report   `json:"report,omitempty"`
	Failure  string    `json:"failure,omitempty"`
}

// Progress of the work.
type Progress struct {
	Repository string `json:"repository"` // under way
	Done       int    `json:"done"`       // repositories
	Total      int    `json:"total"`      // repositories
	Bytes      int64  `json:"bytes"`
}

// Operations adds the room's operations to the API.
func (a *Adopt) Operations(k *rest.Kernel) {
	rest.RegisterStream(k, rest.StreamOperation[struct{}]{
		ID: "adoptDirectory", Method: http.MethodPost, Path: "/api/atoll/v1/adopt", Tag: "adopt",
		Summary: "Take over the storage directory of another registry", Permission: access.NodeManage,
		MaxBody: 1 << 20, Consumes: "application/json", Produces: "application/x-ndjson",
		Do: func(ctx context.Context, _ *struct{}, w http.ResponseWriter, r *http.Request) error {
			return a.serve(ctx, w, r)
		},
	})
}

// every is how often progress is told.
const every = 500 * time.Millisecond

func (a *Adopt) serve(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
	var asked Request
	if err := json.NewDecoder(r.Body).Decode(&asked); err != nil {
		return fault.Wrap(err, fault.Invalid, "the body is no request to adopt: {\"dir\": \"/var/lib/registry\"}")
	}
	if !filepath.IsAbs(asked.Dir) {
		return fault.New(fault.Invalid, "%q is not an absolute path on the node", asked.Dir)
	}
	if !a.busy.TryLock() {
		return fault.New(fault.Conflict, "this node is adopting a directory already; wait for it")
	}
	defer a.busy.Unlock()
	from, err := open(asked.Dir)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := json.NewEncoder(w)
	control := http.NewResponseController(w)
	next := time.Now().Add(every)
	work := &work{Adopt: a, request: asked, from: from, actor: access.From(ctx).Name, told: func(p Progress) error {
		if time.Now().Before(next) {
			return nil
		}
		next = time.Now().Add(every)
		return errors.Join(out.Encode(Line{Progress: &p}), control.Flush())
	}}
	report, err := work.run(ctx)
	line := Line{Report: &report}
	if err != nil {
		_, line.Failure, _ = fault.Public(err)
	}
	log := a.Log
	if err != nil {
		log = log.With("cut_short_by", err)
	}
	log.Info("directory adopted", "dir", asked.Dir, "kind", report.Kind, "manifests", report.Manifests, "tags", report.Tags,
		"blobs", report.Blobs.Linked+report.Blobs.Copied, "problems", len(report.Problems), "dry_run", asked.DryRun, "user", work.actor)
	return out.Encode(line)
}
