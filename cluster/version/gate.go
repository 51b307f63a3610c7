package version

import (
	"errors"
	"fmt"
	"time"

	"github.com/atoll-registry/atoll/cluster/table"
)

// ErrNotYet: the site cannot be raised, because a node runs an older program.
var ErrNotYet = errors.New("not all nodes run the newer version")

// siteRow is the site's level.
type siteRow struct {
	Level   int    `cbor:"level"`
	Raised  int64  `cbor:"raised"`  // Unix seconds
	Program string `cbor:"program"` // the version that raised it, for people
}

// theSite is the key of the one row.
const theSite = "site"

// TableName is the table that holds the site's level, for those who watch it.
const TableName = "site_level"

// Gate is the site's feature level and who may pass by it.
type Gate struct {
	site    *table.Table[siteRow]
	level   int
	program string
}

// NewGate defines the level's table for a program of a level; program is its
// version for people.
func NewGate(db *table.DB, level int, program string) *Gate {
	return &Gate{site: table.Define[siteRow](db, TableName), level: level, program: program}
}

// Level is the program's.
func (g *Gate) Level() int { return g.level }

// Site is the site's level. Read through a Tx it is guarded: what the Tx writes
// was written at this level.
func (g *Gate) Site(r table.Reader) (int, error) {
	row, err := g.row(r)
	return row.Level, err
}

func (g *Gate) row(r table.Reader) (siteRow, error) {
	row, _, ok, err := g.site.Get(r, theSite)
	if err != nil {
		return row, fmt.Errorf("reading the site's feature level: %w", err)
	}
	if !ok {
		row.Level = First
	}
	return row, nil
}

// Found writes the level of a new site: the program's.
func (g *Gate) Found(tx *table.Tx, now time.Time) error {
	return g.site.Put(tx, siteRow{Level: g.level, Raised: now.Unix(), Program: g.program}, theSite)
}

// Outdated says, with ErrMismatch, that the program is too old for the site. An
// old state is enough to know that: a site's level never goes down.
func (g *Gate) Outdated(r table.Reader) error {
	row, err := g.row(r)
	if err != nil || row.Level <= g.level {
		return err
	}
	return fmt.Errorf("%w the site: the site is at feature level %d and this program (%s) knows levels up to %d; start %s or a newer version here",
		ErrMismatch, row.Level, called(g.program), g.level, since(row))
}

// Fits says, with ErrMismatch, that the program is too old or too new for the
// site. Only the newest state tells the second: ask through a Tx.
func (g *Gate) Fits(r table.Reader) error {
	if err := g.Outdated(r); err != nil {
		return err
	}
	site, err := g.Site(r)
	if err != nil || g.level <= site+1 {
		return err
	}
	return fmt.Errorf("%w the site: the site is at feature level %d and this program (%s) works at %d and %d; put the version before it on every node, run atoll cluster upgrade --finish, then upgrade to this one",
		ErrMismatch, site, called(g.program), g.level-1, g.level)
}

// Admit says, with ErrMismatch, that a node that wants to join runs a program that
// is too old or too new for the site.
func (g *Gate) Admit(r table.Reader, level int) error {
	row, err := g.row(r)
	switch {
	case err != nil:
		return err
	case level < row.Level:
		return fmt.Errorf("%w the site: the site is at feature level %d and the program that wants to join knows levels up to %d; join with %s or a newer version",
			ErrMismatch, row.Level, level, since(row))
	case level > row.Level+1:
		return fmt.Errorf("%w the site: the site is at feature level %d and the program that wants to join works at %d and %d; join with the version that the other nodes run (atoll cluster status shows it)",
			ErrMismatch, row.Level, level-1, level)
	}
	return nil
}

// Raise raises the site's level by one if every node runs a program of a higher
// one; else it gives ErrNotYet with the names of those that do not. A site at
// which no node is ahead stays as it is. The nodes must have been read through
// tx, so that none goes back to an older program at the same moment.
func (g *Gate) Raise(tx *table.Tx, nodes []Runner, now time.Time) error {
	site, err := g.Site(tx)
	if err != nil {
		return err
	}
	u := Survey(site, nodes)
	switch {
	case len(u.Behind) > 0:
		return fmt.Errorf("%w: upgrade %s first", ErrNotYet, names(u.Behind))
	case u.Next == site:
		return nil
	}
	return g.site.Put(tx, siteRow{Level: u.Next, Raised: now.Unix(), Program: g.program}, theSite)
}

func called(program string) string {
	if program == "" {
		return "atoll"
	}
	return "atoll " + program
}

func since(row siteRow) string {
	if row.Program == "" {
		return "the version that the other nodes run"
	}
	return called(row.Program)
}
