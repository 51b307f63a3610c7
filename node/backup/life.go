package backup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/recovery"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/journal"
	"github.com/atoll-registry/atoll/node/project"
)

// NewLife gives what has to change in the rows of the rooms when a site goes on
// as one node, from a state that may be older than what the site has said to
// others: a new incarnation with new logs, which begin with what the projects
// amount to, and rows of blobs that count the copies on this node's disk alone.
// dir is the data directory.
func NewLife(dir string) recovery.Prepare {
	return func(db *table.DB, offline *member.Offline) (func(context.Context) error, error) {
		records := blobs.NewRecords(db)
		log := journal.New(db, offline)
		projects := project.New(db, log)
		content, err := catalog.New(catalog.Config{DB: db, Records: records, Journal: log, Projects: projects, Big: noBig{}})
		if err != nil {
			return nil, err
		}
		projects.Attach(content)
		return func(ctx context.Context) error {
			if err := begin(ctx, db, log, projects, content); err != nil {
				return err
			}
			return recount(ctx, db, records, dir)
		}, nil
	}
}

func begin(ctx context.Context, db *table.DB, log *journal.Journal, projects *project.Projects, content *catalog.Catalog) error {
	if _, err := db.Update(ctx, func(tx *table.Tx) error { return log.NewLife(tx) }); err != nil {
		return fmt.Errorf("beginning a new life of the site: %w", err)
	}
	var all []project.Project
	if err := db.View(func(v *table.View) (err error) { all, err = projects.All(v); return err }); err != nil {
		return fmt.Errorf("reading the projects: %w", err)
	}
	for _, p := range all {
		err := projects.Continue(ctx, p.Name, func(tell func([]entry.Entry) error) error {
			return content.Restate(p.Name, tell)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// recounted is how many rows of blobs one Txn changes.
const recounted = 500

// recount writes down which blobs this node holds: with the other nodes gone, a
// row that counts their copies would hide what has only one, or none. Where blobs
// are kept in an object store the counts stay.
func recount(ctx context.Context, db *table.DB, records *blobs.Records, dir string) error {
	if _, err := os.Stat(filepath.Join(dir, "storage.json")); err == nil {
		return nil
	}
	store, err := blobs.Open(filepath.Join(dir, contentDir), blobs.Options{})
	if err != nil {
		return err
	}
	defer store.Close()
	for after := digest.Digest(""); ; {
		copies := map[digest.Digest]int{}
		rows := 0
		err := db.View(func(v *table.View) error {
			for row, err := range records.Scan(v, after, recounted) {
				if err != nil {
					return err
				}
				rows++
				after = digest.Digest(row.Key[0])
				if row.Value.State == blobs.Gone {
					continue
				}
				held := 0
				if _, err := store.Stat(after); err == nil {
					held = 1
				}
				if row.Value.Copies != held {
					copies[after] = held
				}
			}
			return nil
		})
		if err != nil || rows == 0 {
			return err
		}
		_, err = db.Update(ctx, func(tx *table.Tx) error {
			for d, n := range copies {
				if err := records.SetCopies(tx, d, n); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("counting the copies of blobs: %w", err)
		}
	}
}

// noBig stands for the store of large manifests, which are not touched here.
type noBig struct{}

var errNoBig = errors.New("manifests cannot be stored in a site that does not run")

func (noBig) Put(context.Context, digest.Digest, []byte) error    { return errNoBig }
func (noBig) Read(context.Context, digest.Digest) ([]byte, error) { return nil, errNoBig }
