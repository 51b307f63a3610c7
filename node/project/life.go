package project

import (
	"context"
	"fmt"
	"time"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/fault"
)

// Continue lets a project of this site go on after the site began a new life: a
// new log takes the place of the one of the earlier life, which stays as it is,
// and begins with what the project amounts to. rest gives the entries that say so
// of what is in it, in parts that fit into one Txn. Nothing else may write
// meanwhile. A mirror, and a project that has gone on already, stay as they are.
func (p *Projects) Continue(ctx context.Context, name string, rest func(tell func([]entry.Entry) error) error) error {
	err := p.resume(ctx, name, rest)
	if err != nil {
		return fmt.Errorf("go on with project %s in a new life of the site: %w", name, err)
	}
	return nil
}

func (p *Projects) resume(ctx context.Context, name string, rest func(tell func([]entry.Entry) error) error) error {
	var old row
	var log entry.LogID
	done := false
	_, err := p.db.Update(ctx, func(tx *table.Tx) (err error) {
		if old, _, err = p.need(tx, name); err != nil {
			return err
		}
		site, err := p.journal.Site(tx)
		if err != nil {
			return err
		}
		if done = old.Log.Site != site.ID || old.Log.Incarnation == site.Incarnation; done {
			return nil
		}
		own, err := p.journal.Begin(tx, old.Log.Scope)
		if err != nil {
			return err
		}
		log = own.Log
		return p.journal.Append(tx, own, old.entry(time.Now().Unix(), old.Creator))
	})
	if err != nil || done {
		return err
	}
	err = rest(func(part []entry.Entry) error {
		_, err := p.db.Update(ctx, func(tx *table.Tx) error {
			own, err := p.journal.Own(tx, log)
			if err != nil {
				return err
			}
			for _, e := range part {
				if err := p.journal.Append(tx, own, e); err != nil {
					return err
				}
			}
			return nil
		})
		return err
	})
	if err != nil {
		return err
	}
	_, err = p.db.Update(ctx, func(tx *table.Tx) error {
		now, _, err := p.need(tx, name)
		if err != nil {
			return err
		}
		if now.Log != old.Log {
			return fault.New(fault.Conflict, "somebody else changes the project")
		}
		if err := p.logs.Delete(tx, old.Log.Site, old.Log.Incarnation, old.Log.Scope); err != nil {
			return err
		}
		now.Log = log
		return p.store(tx, name, now)
	})
	return err
}
