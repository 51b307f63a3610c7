package project

import (
	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/journal"
)

// What the catalog asks of projects (catalog.Projects).

// Writable gives the log to tell of changes in a project of this site. The Txn
// takes effect only while the project stays as it was read. An unknown project
// is a fault NotFound, a mirror a fault Denied that names its owner.
func (p *Projects) Writable(tx *table.Tx, name string) (journal.Scope, error) {
	k, ok, err := p.accessOf(tx, name)
	if err != nil {
		return journal.Scope{}, err
	}
	if !ok {
		return journal.Scope{}, unknown(name)
	}
	return p.journal.Own(tx, k.log)
}

// Mirror refuses, with a fault Precondition, unless the project is the mirror of
// the log.
func (p *Projects) Mirror(tx *table.Tx, name string, log entry.LogID) error {
	r, _, err := p.need(tx, name)
	if err != nil {
		return err
	}
	if r.Log != log {
		return fault.New(fault.Precondition, "project %s is not the mirror of log %s but of %s", name, log, r.Log)
	}
	return nil
}

// ApplyEntry changes a mirror as an entry project.put of its log says.
func (p *Projects) ApplyEntry(tx *table.Tx, name string, e entry.Entry) error {
	r, _, err := p.need(tx, name)
	if err != nil {
		return err
	}
	r.Public, r.Metadata, r.OwnerName, r.UpdatedAt = e.Public, e.Metadata, e.Name, e.At
	return p.rows.Put(tx, r, name)
}

// State is the entry that the project as it stands amounts to; ok is false in a
// mirror to which none was applied yet.
func (p *Projects) State(r table.Reader, name string) (e entry.Entry, ok bool, err error) {
	found, _, err := p.need(r, name)
	return found.entry(found.UpdatedAt, ""), err == nil && found.OwnerName != "", err
}

// Describe gives what listings need to know of a project.
func (p *Projects) Describe(r table.Reader, name string) (access.Project, int64, bool, error) {
	found, ok, err := p.Get(r, name)
	return access.Project{Name: found.Name, Public: found.Public}, found.ID, ok, err
}
