// Package version decides which programs may work together: on one site, by its
// feature level, and on one data directory, by its format.
//
// A feature level is a number for what the rows of a site may look like. Each
// program has one (Level), which grows by one when a version brings new shapes
// of rows, and takes part in sites of that level and of the one before. The
// site has one too (Gate). It is raised by hand, once all nodes run the newer
// program, and never goes down: until then the older program may be put back on
// any node, and from then on it is refused. A room asks for the site's level, in
// the transaction that it writes with, before it writes a shape that the level
// brought.
//
// Levels so far:
//
//	1  the rows of the first versions
//	2  a member's row says which version it runs
package version

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// ErrMismatch: this program is too old or too new for the site, or for the data
// directory. Trying again does not help; its text says which version does.
var ErrMismatch = errors.New("this version of atoll does not fit")

// First is the level of a site that has not written down any.
const First = 1

// Runner is a node with the level of the program that it runs, or last ran.
type Runner struct {
	Name  string
	Level int
}

// Upgrade says how far a site is with an upgrade.
type Upgrade struct {
	Site int // the site's level
	// Next is what the site can be raised to now; Site when to nothing.
	Next int
	// Behind are the nodes whose program has the site's level while others run a
	// newer one, Ahead those others; both in the order given.
	Behind, Ahead []string
}

// Survey compares a site's level with its nodes'.
func Survey(site int, nodes []Runner) Upgrade {
	u := Upgrade{Site: site, Next: site}
	for _, n := range nodes {
		if n.Level > site {
			u.Ahead = append(u.Ahead, n.Name)
		} else {
			u.Behind = append(u.Behind, n.Name)
		}
	}
	switch {
	case len(u.Ahead) == 0:
		u.Behind = nil
	case len(u.Behind) == 0:
		u.Next = site + 1
	}
	return u
}

// Advice says what to do next; empty when no upgrade is under way.
func (u Upgrade) Advice() []string {
	switch {
	case u.Next > u.Site:
		return []string{fmt.Sprintf("all nodes run a version of feature level %d and the site is at level %d: the version before may still be put back; when all is well, run atoll cluster upgrade --finish, after which it may not", u.Next, u.Site)}
	case len(u.Behind) > 0:
		return []string{fmt.Sprintf("an upgrade is under way: the older version still runs on %s; upgrade one node after the other, or put the older version back on %s", names(u.Behind), names(u.Ahead))}
	}
	return nil
}

func names(list []string) string {
	if len(list) < 2 {
		return strings.Join(list, "")
	}
	last := len(list) - 1
	return strings.Join(slices.Clone(list[:last]), ", ") + " and " + list[last]
}
