// Package project keeps the projects: their names, who may see them, their
// metadata, and which site owns each.
//
// Invariants:
//   - A project is known between sites by its log (origin site and a random
//     scope), never by its name; a log is under at most one name here.
//   - Only the owner's site writes a project. Mirrors change by entries of the
//     owner's log alone.
//   - Whatever travels with a project is told to its log by the Txn that changes
//     it; local facts (ids, schedules, limits of this site) are not.
//   - The integer id is the revision that created the row: the same on every
//     node, and never used again.
package project

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/journal"
)

// Table is the name of the table of projects, for those who watch it.
const Table = "project"

// Library is the public project that every site has from its founding.
const Library = "library"

// Repositories is what projects need to know of the room above: what is in them.
type Repositories interface {
	// Any reports whether the project has a repository; in a Tx the answer is
	// a condition of the Txn.
	Any(r table.Reader, project string) (bool, error)
	// Count is how many it has.
	Count(v *table.View, project string) (int, error)
	// Bytes is how much its content occupies, each blob counted once.
	Bytes(v *table.View, project string) (int64, error)
	// Forget removes what uploads left in a project without a repository.
	Forget(ctx context.Context, project string) error
}

// Project is one project as it stands.
type Project struct {
	ID        int64
	Name      string
	Public    bool
	Metadata  map[string]string // travels with the project; without "public"
	Local     map[string]string // metadata of this site only
	Creator   string
	CreatedAt time.Time
	UpdatedAt time.Time
	// Log is the project's identity between sites; Log.Site owns it.
	Log entry.LogID
	// OwnerName is what the owner calls it; the same as Name at the owner, ""
	// in a mirror to which no entry was applied yet.
	OwnerName string
}

type row struct {
	Public    bool              `cbor:"public"`
	Metadata  map[string]string `cbor:"metadata"`
	Local     map[string]string `cbor:"local"`
	Creator   string            `cbor:"creator"`
	CreatedAt int64             `cbor:"created_at"`
	UpdatedAt int64             `cbor:"updated_at"`
	Log       entry.LogID       `cbor:"log"`
	OwnerName string            `cbor:"owner_name"`
	Replicas  int               `cbor:"replicas,omitempty"` // see SetReplicas
}

func (r row) project(name string, meta table.Meta) Project {
	return Project{
		ID: int64(meta.Created), Name: name, Public: r.Public, Metadata: r.Metadata, Local: r.Local, Creator: r.Creator,
		CreatedAt: time.Unix(r.CreatedAt, 0).UTC(), UpdatedAt: time.Unix(r.UpdatedAt, 0).UTC(), Log: r.Log, OwnerName: r.OwnerName,
	}
}

// logRow keeps a log from being mirrored under two names.
type logRow struct {
	Project string `cbor:"project"`
}

// Projects is the table of projects. It is safe for use by many goroutines.
type Projects struct {
	db      *table.DB
	journal *journal.Journal
	rows    *table.Table[row]
	logs    *table.Table[logRow]
	repos   Repositories

	mu     sync.Mutex
	names  map[int64]string // id to name: a hint that is checked when used
	access map[string]known // by name: checked by its revision when used
}

// New defines the tables on db. Attach the repositories before use.
func New(db *table.DB, j *journal.Journal) *Projects {
	return &Projects{
		db: db, journal: j, names: map[int64]string{}, access: map[string]known{},
		rows: table.Define[row](db, Table),
		logs: table.Define[logRow](db, "project_log"),
	}
}

// Attach says who knows the projects' repositories. It is called once, while
// the node is put together.
func (p *Projects) Attach(r Repositories) { p.repos = r }

var nameForm = regexp.MustCompile(`^[a-z0-9]+(?:[._-][a-z0-9]+)*$`)

// CheckName refuses what cannot be a project's name, and says the rule.
func CheckName(name string) error {
	if len(name) > 255 || !nameForm.MatchString(name) {
		if len(name) > 80 {
			name = name[:80] + "..."
		}
		return fault.New(fault.Invalid, "%q cannot name a project: a name has 1-255 characters of a-z and 0-9, with single '.', '_' or '-' between them", name)
	}
	return nil
}

// Draft is a project to be created.
type Draft struct {
	Name     string
	Public   bool
	Metadata map[string]string // as CheckMetadata allows; "public" wins over Public
	Actor    string
}

// Create makes a project that this site owns. A name that is taken is a fault
// Conflict.
func (p *Projects) Create(ctx context.Context, d Draft) (Project, error) {
	if err := CheckName(d.Name); err != nil {
		return Project{}, err
	}
	set, err := sortMetadata(d.Metadata)
	if err != nil {
		return Project{}, err
	}
	now := time.Now().Unix()
	fresh := row{
		Public: d.Public, Metadata: set.portable, Local: set.local, Creator: d.Actor,
		CreatedAt: now, UpdatedAt: now, OwnerName: d.Name,
	}
	if set.public != nil {
		fresh.Public = *set.public
	}
	scope := table.NewID()
	commit, err := p.db.Update(ctx, func(tx *table.Tx) error {
		if err := p.free(tx, d.Name); err != nil {
			return err
		}
		own, err := p.journal.Begin(tx, scope)
		if err != nil {
			return err
		}
		fresh.Log = own.Log
		if err := p.store(tx, d.Name, fresh); err != nil {
			return err
		}
		return p.journal.Append(tx, own, fresh.entry(now, d.Actor))
	})
	if err != nil {
		return Project{}, fmt.Errorf("create project %s: %w", d.Name, err)
	}
	return fresh.project(d.Name, table.Meta{Created: commit.Revision, Revision: commit.Revision}), nil
}

// EnsureLibrary makes the public project "library" unless it is there.
func (p *Projects) EnsureLibrary(ctx context.Context, actor string) error {
	_, err := p.Create(ctx, Draft{Name: Library, Public: true, Actor: actor})
	if fault.Is(err, fault.Conflict) {
		return nil
	}
	return err
}

// CreateMirror makes a mirror, under a local name, of a project that another
// site owns. It holds nothing until entries of the log are applied; until they
// say otherwise it is private. A taken name is a fault Conflict, as is a log
// that is mirrored already.
func (p *Projects) CreateMirror(tx *table.Tx, name string, log entry.LogID, actor string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	if err := p.free(tx, name); err != nil {
		return err
	}
	taken, _, ok, err := p.logs.Get(tx, log.Site, log.Incarnation, log.Scope)
	if err != nil {
		return err
	}
	if ok {
		return fault.New(fault.Conflict, "the project of log %s is here already, as %s", log, taken.Project)
	}
	if err := p.journal.Follow(tx, log); err != nil {
		return err
	}
	now := time.Now().Unix()
	return p.store(tx, name, row{Creator: actor, CreatedAt: now, UpdatedAt: now, Log: log})
}

func (p *Projects) free(tx *table.Tx, name string) error {
	_, _, taken, err := p.rows.Get(tx, name)
	if err == nil && taken {
		return fault.New(fault.Conflict, "the project name %s is taken", name)
	}
	return err
}

func (p *Projects) store(tx *table.Tx, name string, r row) error {
	if err := p.rows.Put(tx, r, name); err != nil {
		return err
	}
	return p.logs.Put(tx, logRow{Project: name}, r.Log.Site, r.Log.Incarnation, r.Log.Scope)
}

// entry is what the log says of the project as it stands.
func (r row) entry(at int64, actor string) entry.Entry {
	return entry.Entry{Kind: entry.ProjectPut, At: at, Actor: clip(actor), Name: r.OwnerName, Public: r.Public, Metadata: r.Metadata}
}

// clip keeps an actor's name within what an entry takes.
func clip(actor string) string {
	if len(actor) > 256 {
		actor = actor[:256]
	}
	return actor
}

// Change is what an update sets; what it does not name stays.
type Change struct {
	Public   *bool
	Metadata map[string]string // as CheckMetadata allows; "public" wins over Public
	Actor    string
}

// Update changes a project. On a mirror only this site's own metadata can be.
func (p *Projects) Update(ctx context.Context, name string, c Change) error {
	set, err := sortMetadata(c.Metadata)
	if err != nil {
		return err
	}
	if set.public == nil {
		set.public = c.Public
	}
	_, err = p.db.Update(ctx, func(tx *table.Tx) error {
		r, _, err := p.need(tx, name)
		if err != nil {
			return err
		}
		after := r
		after.Metadata = merged(r.Metadata, set.portable)
		after.Local = merged(r.Local, set.local)
		if set.public != nil {
			after.Public = *set.public
		}
		travels := after.Public != r.Public || !maps.Equal(after.Metadata, r.Metadata)
		if !travels && maps.Equal(after.Local, r.Local) {
			return nil
		}
		after.UpdatedAt = time.Now().Unix()
		if travels {
			own, err := p.journal.Own(tx, r.Log)
			if err != nil {
				return err
			}
			if err := p.journal.Append(tx, own, after.entry(after.UpdatedAt, c.Actor)); err != nil {
				return err
			}
		}
		return p.rows.Put(tx, after, name)
	})
	if err != nil {
		return fmt.Errorf("update project %s: %w", name, err)
	}
	return nil
}

func merged(old, set map[string]string) map[string]string {
	if len(set) == 0 {
		return old
	}
	out := maps.Clone(old)
	if out == nil {
		out = map[string]string{}
	}
	maps.Copy(out, set)
	return out
}

// Delete removes an empty project that this site owns. Its log stays.
func (p *Projects) Delete(ctx context.Context, name string) error {
	check := func(v *table.View) error {
		r, _, err := p.need(v, name)
		if err != nil {
			return err
		}
		return p.deletable(v, name, r)
	}
	if err := p.db.ReadIndex(ctx); err != nil {
		return fmt.Errorf("delete project %s: %w", name, err)
	}
	err := p.db.View(check)
	if err == nil {
		err = p.repos.Forget(ctx, name)
	}
	if err != nil {
		return fmt.Errorf("delete project %s: %w", name, err)
	}
	_, err = p.db.Update(ctx, func(tx *table.Tx) error {
		r, _, err := p.need(tx, name)
		if err != nil {
			return err
		}
		if err := p.deletable(tx, name, r); err != nil {
			return err
		}
		if err := p.logs.Delete(tx, r.Log.Site, r.Log.Incarnation, r.Log.Scope); err != nil {
			return err
		}
		return p.rows.Delete(tx, name)
	})
	if err != nil {
		return fmt.Errorf("delete project %s: %w", name, err)
	}
	return nil
}

// deletable refuses what must not go. Reads of a Tx guard the answer.
func (p *Projects) deletable(r table.Reader, name string, row row) error {
	if _, err := p.journal.Own(r, row.Log); err != nil {
		if fault.Is(err, fault.Denied) {
			// A mirror that came back would find its entries accepted already.
			return fault.Wrap(err, fault.Precondition, "project %s is a mirror of one that site %s owns; mirrors are kept", name, row.Log.Site)
		}
		return err
	}
	some, err := p.repos.Any(r, name)
	if err != nil {
		return err
	}
	if some {
		return fault.New(fault.Precondition, "project %s still has repositories; delete them first", name)
	}
	return nil
}

// need reads a project's row or says that there is none.
func (p *Projects) need(r table.Reader, name string) (row, table.Meta, error) {
	found, meta, ok, err := p.rows.Get(r, name)
	if err == nil && !ok {
		err = unknown(name)
	}
	return found, meta, err
}

func unknown(name string) error {
	return fault.New(fault.NotFound, "there is no project %s", name).WithCode("NAME_UNKNOWN")
}

// Get reads a project by name.
func (p *Projects) Get(r table.Reader, name string) (Project, bool, error) {
	found, meta, ok, err := p.rows.Get(r, name)
	return found.project(name, meta), ok, err
}

// ByID reads a project by its integer id.
func (p *Projects) ByID(v *table.View, id int64) (Project, bool, error) {
	p.mu.Lock()
	name, hinted := p.names[id]
	p.mu.Unlock()
	if hinted {
		if found, ok, err := p.Get(v, name); err != nil || ok && found.ID == id {
			return found, ok, err
		}
	}
	for r, err := range p.rows.Scan(v, table.Range{}) {
		if err != nil {
			return Project{}, false, err
		}
		if int64(r.Created) == id {
			p.mu.Lock()
			if len(p.names) > 10000 {
				clear(p.names)
			}
			p.names[id] = r.Key[0]
			p.mu.Unlock()
			return r.Value.project(r.Key[0], r.Meta), true, nil
		}
	}
	return Project{}, false, nil
}

// ByScope reads the project of a log.
func (p *Projects) ByScope(v *table.View, log entry.LogID) (Project, bool, error) {
	found, _, ok, err := p.logs.Get(v, log.Site, log.Incarnation, log.Scope)
	if err != nil || !ok {
		return Project{}, false, err
	}
	return p.Get(v, found.Project)
}

// All reads every project, in the order of ids.
func (p *Projects) All(v *table.View) ([]Project, error) {
	var all []Project
	for r, err := range p.rows.Scan(v, table.Range{}) {
		if err != nil {
			return nil, err
		}
		all = append(all, r.Value.project(r.Key[0], r.Meta))
	}
	slices.SortFunc(all, func(a, b Project) int { return cmp.Compare(a.ID, b.ID) })
	return all, nil
}

// known is what a decision about access needs of a row at a revision.
type known struct {
	revision uint64
	project  access.Project
	log      entry.LogID
}

// maxKnown bounds what is kept in memory of projects.
const maxKnown = 10000

// Lookup gives what a decision about access needs. An absence is confirmed:
// while no leader answers it is a fault Unavailable.
func (p *Projects) Lookup(ctx context.Context, name string) (access.Project, bool, error) {
	var now known
	var here bool
	err := p.db.View(func(v *table.View) (err error) {
		now, here, err = p.accessOf(v, name)
		return err
	})
	if err != nil || here {
		return now.project, here, err
	}
	found, ok, err := p.resolve(ctx, "="+name)
	return access.Project{Name: found.Name, Public: found.Public}, ok, err
}

// accessOf reads a row unless what it says is known: every request to the
// registry asks, and every push once more. In a Tx it guards the row.
func (p *Projects) accessOf(v table.Reader, name string) (known, bool, error) {
	p.mu.Lock()
	k, ok := p.access[name]
	p.mu.Unlock()
	if ok {
		meta, here, err := p.rows.Meta(v, name)
		if err != nil || here && meta.Revision == k.revision {
			return k, here, err
		}
	}
	if len(name) > 255 || !nameForm.MatchString(name) {
		return known{}, false, nil
	}
	r, meta, here, err := p.rows.Get(v, name)
	if err != nil || !here {
		return known{}, false, err
	}
	k = known{meta.Revision, access.Project{Name: name, Public: r.Public}, r.Log}
	if meta.Revision == 0 {
		return k, true, nil // the Tx wrote it itself, and may not commit
	}
	p.mu.Lock()
	if len(p.access) >= maxKnown {
		clear(p.access)
	}
	p.access[name] = k
	p.mu.Unlock()
	return k, true, nil
}
