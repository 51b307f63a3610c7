package node

import (
	"context"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/peers"
	"github.com/atoll-registry/atoll/node/prefetch"
	"github.com/atoll-registry/atoll/transfer"
)

// contents tells the prefetch what tags name.
type contents struct {
	db      *table.DB
	catalog *catalog.Catalog
	records *blobs.Records
}

// Tags implements prefetch.Content.
func (c contents) Tags(ctx context.Context, project, repository string) ([]string, error) {
	names, _, err := c.catalog.TagNames(ctx, project, repository, "", 0)
	return names, err
}

// Blobs implements prefetch.Content.
func (c contents) Blobs(ctx context.Context, project, repository, tag string) (all []prefetch.Blob, err error) {
	seen := map[digest.Digest]bool{}
	var add func(reference string) error
	add = func(reference string) error {
		m, _, err := c.catalog.Resolve(ctx, project, repository, reference)
		if err != nil || seen[m.Digest] {
			return err
		}
		seen[m.Digest] = true
		doc, err := catalog.ParseManifest(m.MediaType, m.Bytes)
		if err != nil {
			return err
		}
		named := doc.Blobs()
		if m.Size > catalog.MaxRow {
			named = append(named, v1.Descriptor{Digest: m.Digest, Size: m.Size}) // a blob too
		}
		for _, b := range named {
			here, err := c.known(b.Digest)
			if err != nil {
				return err
			}
			if here && !seen[b.Digest] || here && b.Digest == m.Digest {
				all = append(all, prefetch.Blob{Digest: b.Digest, Size: b.Size})
			}
			seen[b.Digest] = true
		}
		for _, child := range doc.Children {
			if err := add(child.Digest.String()); err != nil && !fault.Is(err, fault.NotFound) { // an index may name what is elsewhere
				return err
			}
		}
		return nil
	}
	return all, add(tag)
}

// known says whether the site has a blob; layers that are elsewhere by design are not.
func (c contents) known(d digest.Digest) (known bool, err error) {
	err = c.db.View(func(v *table.View) error {
		row, ok, err := c.records.Get(v, d)
		known = ok && row.State != blobs.Gone
		return err
	})
	return known, err
}

// holding is what the prefetch sees of this node's blobs.
type holding struct {
	store *blobs.Store
	peers *peers.Peers
}

// Holds implements prefetch.Store.
func (h holding) Holds(d digest.Digest) bool {
	_, err := h.store.Stat(d)
	return err == nil
}

// Bring implements prefetch.Store.
func (h holding) Bring(ctx context.Context, b prefetch.Blob, engine string) error {
	return h.peers.Prefetch(ctx, b.Digest, b.Size, transfer.Way(engine))
}

// siblings are the nodes of the site, for the prefetch.
type siblings struct {
	*peers.Peers
	member *member.Node
}

// Self implements prefetch.Nodes.
func (s siblings) Self() string { return s.member.Self() }

// Live implements prefetch.Nodes.
func (s siblings) Live() []member.Member { return s.member.Live() }
