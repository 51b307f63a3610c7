package registry

import (
	"context"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/fault"
)

// mount links a blob that the asking user may pull from another repository, and
// answers. It reports false when the blob cannot be had that way, which is no
// error: the client then uploads it. Without a repository to mount from, those
// that link the blob are searched.
func (g *Registry) mount(c *call, from Name, d digest.Digest) (bool, error) {
	sources := []Name{from}
	if from.Project == "" {
		var err error
		if sources, err = g.holders(c.route.Name, d); err != nil {
			return false, err
		}
	}
	for _, source := range sources {
		may, tokenOnly, err := g.mayMount(c, source)
		if err != nil {
			return false, err
		}
		if tokenOnly && from.Project != "" {
			return false, narrow(source, actionPull)
		}
		if may && source.Full() != c.route.Name.Full() {
			// Else a mount would be a way around the gates of the source.
			err = g.admitBlob(c, source, d)
			may = err == nil
			if kind := fault.KindOf(err); err != nil && (kind == fault.Internal || kind == fault.Unavailable) {
				return false, err
			}
		}
		if !may {
			continue
		}
		linked, err := g.linkFrom(c.r.Context(), source, c.route.Name, d)
		if err != nil {
			return false, err
		}
		if linked {
			g.metrics.mounts.WithLabelValues("mounted").Inc()
			return true, g.answerBlob(c, d)
		}
	}
	g.metrics.mounts.WithLabelValues("upload").Inc()
	return false, nil
}

func (g *Registry) mayMount(c *call, source Name) (may, tokenOnly bool, err error) {
	if source.Full() == c.route.Name.Full() {
		return true, false, nil // who may push there may see what is there
	}
	return g.mayRead(c.r.Context(), c.who, source)
}

// linkFrom links a blob of one repository into another. False: it is not there.
func (g *Registry) linkFrom(ctx context.Context, from, to Name, d digest.Digest) (linked bool, err error) {
	_, err = g.db.Update(ctx, func(tx *table.Tx) error {
		linked, err = g.records.Linked(tx, from.Project, from.Repository, d)
		if err != nil || !linked {
			return err
		}
		if row, _, err := g.records.Get(tx, d); err != nil || row.Lost != 0 {
			linked = false // the client has it, and the site has not
			return err
		}
		err := g.records.Link(tx, to.Project, to.Repository, d)
		if fault.Is(err, fault.NotFound) {
			linked = false // collected in the meantime
			return nil
		}
		return err
	})
	return linked, err
}

// maxSources bounds the repositories that are tried for a mount that names none.
const maxSources = 64

// holders lists repositories that link a blob, the one that is pushed to first.
func (g *Registry) holders(to Name, d digest.Digest) ([]Name, error) {
	sources := []Name{to}
	err := g.db.View(func(v *table.View) error {
		places, err := g.records.Places(v, d, maxSources)
		for _, p := range places {
			sources = append(sources, Name{Project: p.Project, Repository: p.Repository})
		}
		return err
	})
	return sources, err
}
