package airgap

import (
	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle"
	"github.com/atoll-registry/atoll/bundle/entry"
)

// Report says what a bundle holds and what an operation did with it. It is what
// the API returns and `--format json` prints.
type Report struct {
	Bundle     string        `json:"bundle"`
	Kind       string        `json:"kind"`
	Format     int           `json:"format"`
	Source     bundle.Origin `json:"source"`
	Recipients []string      `json:"recipients"` // none: whoever trusts the source
	Created    int64         `json:"created"`    // Unix seconds of the newest entry
	Size       int64         `json:"size"`       // bytes of content, without the tar's own

	// Verified says that every byte was read and that keys, signatures and
	// hashes are those of a site trusted beforehand. Without it, all else here is
	// only what somebody wrote into a file.
	Verified bool   `json:"verified"`
	Warning  string `json:"warning,omitempty"`
	DryRun   bool   `json:"dry_run,omitempty"`

	Projects []Project       `json:"projects"`
	Images   []bundle.Image  `json:"images"`
	Absent   []digest.Digest `json:"absent"` // known, not held: blobs that the source did not have either

	Entries int       `json:"entries"` // applied by this import, or to be applied in a dry run
	Blobs   BlobCount `json:"blobs"`
}

// Project is one log of a bundle.
type Project struct {
	Log     entry.LogID `json:"log"`
	Project string      `json:"project"`         // at its origin
	Local   string      `json:"local,omitempty"` // at the importing site
	From    uint64      `json:"from"`            // first entry in the bundle
	Size    uint64      `json:"size"`            // entries after the import
	Applied uint64      `json:"applied"`         // entries that the site had before
	State   string      `json:"state"`           // state root, hex, as the source says
	// Outcome is "new", "updated", "unchanged", "behind" (the site has more than
	// the bundle), "own" (a log of the importing site) or "not accepted"; "" when
	// there is no importing site.
	Outcome string `json:"outcome,omitempty"`
	// StateCompared says that the site's own state root was found equal.
	StateCompared bool `json:"state_compared"`
}

// Outcomes of a log.
const (
	OutcomeNew         = "new"
	OutcomeUpdated     = "updated"
	OutcomeUnchanged   = "unchanged"
	OutcomeBehind      = "behind"
	OutcomeOwn         = "own"
	OutcomeNotAccepted = "not accepted"
)

// BlobCount counts configs and layers; manifests travel with their entries.
type BlobCount struct {
	Total   int   `json:"total"`
	Copied  int   `json:"copied"`  // written by this run
	Bytes   int64 `json:"bytes"`   // of those
	Staged  int   `json:"staged"`  // by an earlier run that was interrupted
	Held    int   `json:"held"`    // the site had them
	Ignored int   `json:"ignored"` // of logs that are not accepted, or behind
}

// NothingNew reports whether the import found everything done already.
func (r *Report) NothingNew() bool { return r.Entries == 0 && r.Blobs.Copied == 0 }

const unverified = "UNVERIFIED: nobody vouches for what this file says of itself. `atoll bundle verify FILE --trust SITE` proves it"

// describe copies what the statement says.
func (r *Report) describe(p *bundle.Predicate) {
	r.Bundle, r.Kind, r.Format, r.Source, r.Recipients = p.Bundle, p.Kind, p.Format, p.Source, p.Recipients
	r.Created, r.Size = p.Created, p.Size
	r.Projects, r.Images, r.Absent = []Project{}, []bundle.Image{}, []digest.Digest{}
	for _, goal := range p.Target {
		r.Projects = append(r.Projects, Project{Log: goal.LogID, Project: goal.Project, From: p.From(goal.LogID), Size: goal.Size, State: goal.State})
	}
}

// contents copies what the manifests say.
func (r *Report) contents(b *bundle.Reader) {
	r.Images = append(r.Images, b.Images()...)
	r.Absent = append(r.Absent, b.Absent()...)
	for _, f := range b.Files() {
		if f.Role == bundle.RoleConfig || f.Role == bundle.RoleLayer {
			r.Blobs.Total++
		}
	}
}
