package catalog

import (
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
)

// restated is how many entries Restate tells at once: with their longest names
// they fit into one Txn.
const restated = 256

// Restate tells, as entries of a log that begins anew, what is in a project:
// artifacts first, then tags.
func (c *Catalog) Restate(project string, tell func([]entry.Entry) error) error {
	artifacts := func(v *table.View, rg table.Range, give func(key []string, e entry.Entry)) error {
		for row, err := range c.artifacts.Scan(v, rg) {
			if err != nil {
				return err
			}
			e := row.Value.entry(row.Key[1], row.Key[2])
			e.At, e.Actor = row.Value.PushedAt, clip(row.Value.Actor)
			give(row.Key, e)
		}
		return nil
	}
	tags := func(v *table.View, rg table.Range, give func(key []string, e entry.Entry)) error {
		for row, err := range c.tags.Scan(v, rg) {
			if err != nil {
				return err
			}
			e := row.Value.entry(row.Key[1], row.Key[2])
			e.At = row.Value.PushedAt
			give(row.Key, e)
		}
		return nil
	}
	err := errors.Join(c.restate(project, artifacts, tell), c.restate(project, tags, tell))
	if err != nil {
		return fmt.Errorf("tell what is in project %s: %w", project, err)
	}
	return nil
}

func (c *Catalog) restate(project string, scan func(*table.View, table.Range, func([]string, entry.Entry)) error, tell func([]entry.Entry) error) error {
	rg := table.Range{Prefix: []string{project}, Limit: restated}
	for {
		var part []entry.Entry
		err := c.db.View(func(v *table.View) error {
			return scan(v, rg, func(key []string, e entry.Entry) {
				part = append(part, e)
				rg.After = key
			})
		})
		if err != nil || len(part) == 0 {
			return err
		}
		if err := tell(part); err != nil {
			return err
		}
	}
}

// Small gives the bytes of a manifest that is kept as a row; nil when there is
// none, or when it is too large for one and kept as a blob.
func (c *Catalog) Small(v *table.View, d digest.Digest) ([]byte, error) {
	row, _, ok, err := c.manifests.Get(v, d.String())
	if err != nil || !ok {
		return nil, err
	}
	return row.Bytes, nil
}
