package airgap

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"iter"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle"
	"github.com/atoll-registry/atoll/bundle/entry"
)

// ExportRequest says what to export and as whom.
type ExportRequest struct {
	Site       Site          // this site
	Key        crypto.Signer // an active online key of it
	Projects   []string      // names here; none: every project that was ever used
	Recipients []string      // ids of the only sites that may import; none: whoever trusts this one
	// Basis is what the receiver has acknowledged of each log; an unnamed log is
	// carried from its first entry.
	Basis map[entry.LogID]uint64
}

// Export writes a bundle. When it returns an error, what was written until then
// is refused by every importer.
func Export(ctx context.Context, w io.Writer, request ExportRequest, source Source) (Report, error) {
	var report Report
	logs, err := source.Journal.Logs(ctx, request.Projects)
	if err != nil {
		return report, fmt.Errorf("export: %w", err)
	}
	spec := bundle.Spec{
		Source:     bundle.Origin{Site: request.Site.ID, Incarnation: request.Site.Incarnation, Name: request.Site.Name},
		Recipients: request.Recipients, Key: request.Key, Chains: map[string]entry.KeyChain{},
	}
	for _, site := range append(origins(logs), request.Site.ID) {
		if spec.Chains[site], err = source.Journal.KeyChain(ctx, site); err != nil {
			return report, fmt.Errorf("export: key chain of site %s: %w", site, err)
		}
	}
	for _, log := range logs {
		// A project that nobody ever used, such as a new site's library, would
		// only be in the way of the importer's own.
		if len(request.Projects) == 0 && log.Size <= 1 {
			continue
		}
		one, err := prepare(ctx, log, request.Basis[log.ID], source.Journal)
		if err != nil {
			return report, fmt.Errorf("export project %s: %w", log.Project, err)
		}
		spec.Logs = append(spec.Logs, one)
	}
	if len(spec.Logs) == 0 {
		return report, refuse(ErrNoProject, "nothing to export: no project of this site was ever pushed to. Name one with --project to export it empty")
	}
	written, err := bundle.Write(ctx, w, spec, source.Content)
	if err != nil {
		return report, err
	}
	report.describe(&written.Predicate)
	report.Verified = true
	report.Images = append(report.Images, written.Images...)
	report.Absent = append([]digest.Digest{}, written.Absent...)
	for i, goal := range written.Target {
		report.Entries += int(goal.Size - report.Projects[i].From)
	}
	report.Blobs.Total, report.Blobs.Copied = written.Configs+written.Layers, written.Configs+written.Layers
	report.Blobs.Bytes = written.BlobBytes
	return report, nil
}

func origins(logs []Log) []string {
	var sites []string
	for _, log := range logs {
		sites = append(sites, log.ID.Site)
	}
	return sites
}

// prepare gives the bundle's view of a log from the basis on.
func prepare(ctx context.Context, log Log, basis uint64, journal Journal) (bundle.Log, error) {
	if basis > log.Size {
		return bundle.Log{}, refuse(ErrGap, "the receiver has acknowledged %d entries of log %s, this site has %d: it was set back, and its log needs a new incarnation", basis, log.ID, log.Size)
	}
	tree, seq, name := &entry.Tree{}, uint64(0), ""
	if basis > 0 {
		for value, err := range journal.Entries(ctx, log.ID, 0, basis) {
			if err != nil {
				return bundle.Log{}, err
			}
			e, err := entry.Decode(value)
			if err != nil {
				return bundle.Log{}, err
			}
			if e.Kind == entry.ProjectPut {
				name = e.Name
			}
			leaf, err := entry.Leaf(log.ID, seq, value)
			if err != nil {
				return bundle.Log{}, err
			}
			tree.Append(leaf)
			seq++
		}
		if seq != basis {
			return bundle.Log{}, errors.New("its journal ends before its basis")
		}
	}
	return bundle.Log{
		ID: log.ID, Project: name, Basis: tree, Size: log.Size, Checkpoint: log.Checkpoint, State: log.State,
		Values: func() iter.Seq2[[]byte, error] { return journal.Entries(ctx, log.ID, basis, log.Size) },
	}, nil
}
