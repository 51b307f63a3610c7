package node

import (
	"context"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/registry"
	"github.com/atoll-registry/atoll/node/traffic"
)

// egress has what clients are sent kept to the caps.
type egress struct{ traffic *traffic.Traffic }

// Begin implements registry.Egress.
func (e egress) Begin(ctx context.Context, o registry.Outgoing) (registry.Paced, error) {
	return e.traffic.Begin(ctx, traffic.Content(o))
}

// owners tell the traffic whose blobs are.
type owners struct {
	db      *table.DB
	records *blobs.Records
}

// ownersMax is how many places of a blob are looked at.
const ownersMax = 16

// Repositories implements traffic.Owners.
func (o owners) Repositories(d digest.Digest) (all []traffic.Repository) {
	err := o.db.View(func(v *table.View) error {
		places, err := o.records.Places(v, d, ownersMax)
		for _, p := range places {
			all = append(all, traffic.Repository{Project: p.Project, Name: p.Repository})
		}
		return err
	})
	if err != nil {
		return nil // a blob of nobody is not held back for a project
	}
	return all
}
