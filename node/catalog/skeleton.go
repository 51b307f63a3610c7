package catalog

import (
	"context"
	"iter"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
)

func (c *Catalog) Put(ctx context.Context, p Push) (Artifact, error) { panic("being built") }

func (c *Catalog) Resolve(ctx context.Context, project, repository, reference string) (Manifest, table.Freshness, error) {
	panic("being built")
}

func (c *Catalog) Tags(ctx context.Context, project, repository, after string, n int) ([]Tag, bool, error) {
	panic("being built")
}

func (c *Catalog) Repositories(ctx context.Context, project, after string, n int) ([]Repository, bool, error) {
	panic("being built")
}

func (c *Catalog) Referrers(ctx context.Context, q Referrers) ([]v1.Descriptor, bool, error) {
	panic("being built")
}

func (c *Catalog) DeleteTag(ctx context.Context, project, repository, tag, actor string) error {
	panic("being built")
}

func (c *Catalog) DeleteManifest(ctx context.Context, project, repository string, d digest.Digest, actor string) error {
	panic("being built")
}

func (c *Catalog) DeleteRepository(ctx context.Context, project, repository, actor string) error {
	panic("being built")
}

// SeqEntry is an entry of another site's log with what it needs to be applied.
type SeqEntry struct {
	Seq           uint64
	Value         []byte
	ManifestBytes []byte // of artifact.put; nil: known, not held
}

func (c *Catalog) ApplyEntries(ctx context.Context, project string, log entry.LogID, entries []SeqEntry) error {
	panic("being built")
}

func (c *Catalog) Materialise(v *table.View, project string) iter.Seq2[entry.Pair, error] {
	panic("being built")
}
