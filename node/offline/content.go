package offline

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/airgap"
	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/project"
)

// export shows airgap this site's logs and content.
type export struct{ *Offline }

// Logs implements airgap.Journal: without names, the projects that this site
// owns.
func (e export) Logs(ctx context.Context, names []string) (logs []airgap.Log, err error) {
	err = e.DB.View(func(v *table.View) error {
		projects, err := e.chosen(v, names)
		if err != nil {
			return err
		}
		for _, p := range projects {
			log, err := e.log(ctx, v, p)
			if err != nil {
				return fmt.Errorf("export project %s: %w", p.Name, err)
			}
			logs = append(logs, log)
		}
		return nil
	})
	return logs, err
}

func (e export) log(ctx context.Context, v *table.View, p project.Project) (airgap.Log, error) {
	signed, err := e.Journal.Checkpoint(ctx, v, p.Log)
	if err != nil {
		return airgap.Log{}, err
	}
	checkpoint, err := entry.ParseCheckpoint(signed)
	if err != nil {
		return airgap.Log{}, err
	}
	size, err := e.Journal.Size(v, p.Log)
	if err != nil {
		return airgap.Log{}, err
	}
	if size != checkpoint.Size {
		return airgap.Log{}, fault.New(fault.Conflict, "an import into this mirror has not finished; run it again first")
	}
	state, err := entry.StateRoot(e.Catalog.Materialise(v, p.Name))
	return airgap.Log{ID: p.Log, Project: p.Name, Size: size, Checkpoint: signed, State: state}, err
}

func (e export) chosen(v *table.View, names []string) (chosen []project.Project, err error) {
	all, err := e.Projects.All(v)
	if err != nil {
		return nil, err
	}
	self, err := e.Journal.Site(v)
	if err != nil {
		return nil, err
	}
	for _, p := range all {
		if slices.Contains(names, p.Name) || len(names) == 0 && p.Log.Site == self.ID {
			chosen = append(chosen, p)
		}
	}
	for _, name := range names {
		if !slices.ContainsFunc(chosen, func(p project.Project) bool { return p.Name == name }) {
			return nil, &airgap.Refusal{Reason: airgap.ErrNoProject, Text: fmt.Sprintf("there is no project %q here", name)}
		}
	}
	return chosen, nil
}

// Entries implements airgap.Journal.
func (e export) Entries(ctx context.Context, id entry.LogID, from, to uint64) iter.Seq2[[]byte, error] {
	const page = 512
	return func(yield func([]byte, error) bool) {
		for at := from; at < to; {
			var values [][]byte
			err := e.DB.View(func(v *table.View) error {
				for s, err := range e.Journal.Entries(v, id, at, int(min(page, to-at))) {
					if err != nil {
						return err
					}
					values = append(values, bytes.Clone(s.Value))
				}
				return nil
			})
			if err == nil && len(values) == 0 {
				err = fmt.Errorf("log %s ends at %d, want %d entries", id, at, to)
			}
			if err = errors.Join(err, ctx.Err()); err != nil {
				yield(nil, err)
				return
			}
			for _, value := range values {
				if !yield(value, nil) {
					return
				}
			}
			at += uint64(len(values))
		}
	}
}

// KeyChain implements airgap.Journal.
func (e export) KeyChain(_ context.Context, site string) (chain entry.KeyChain, err error) {
	err = e.DB.View(func(v *table.View) error {
		self, err := e.Journal.Site(v)
		if err != nil {
			return err
		}
		if site == self.ID {
			chain = self.Chain
			return nil
		}
		chain, err = e.Trusts.KeyChain(v, site)
		return err
	})
	return chain, err
}

// found is what a node knows of a manifest or a blob of its site.
type found struct {
	manifest []byte // its bytes, when it is kept as a row
	size     int64
}

// find looks a manifest or blob up; an error that wraps fs.ErrNotExist when no
// node of the site holds it.
func (e export) find(d digest.Digest) (f found, err error) {
	err = e.DB.View(func(v *table.View) error {
		body, err := e.Catalog.ManifestRow(v, d)
		if err != nil || body != nil {
			f = found{bytes.Clone(body), int64(len(body))}
			return err
		}
		row, ok, err := e.Records.Get(v, d)
		if err == nil && (!ok || row.State == blobs.Gone) {
			err = fmt.Errorf("blob %s: %w", d, fs.ErrNotExist)
		}
		f.size = row.Size
		return err
	})
	return f, err
}

// Size implements airgap.Content.
func (e export) Size(_ context.Context, d digest.Digest) (int64, error) {
	f, err := e.find(d)
	return f.size, err
}

// Open implements airgap.Content. What this node lacks it fetches from a peer.
func (e export) Open(ctx context.Context, d digest.Digest) (io.ReadCloser, error) {
	f, err := e.find(d)
	if err != nil {
		return nil, err
	}
	if f.manifest != nil {
		return io.NopCloser(bytes.NewReader(f.manifest)), nil
	}
	file, _, err := e.Store.OpenBlob(d)
	if fault.Is(err, fault.NotFound) {
		return e.Fetcher.Open(ctx, d, f.size)
	}
	return file, err
}
