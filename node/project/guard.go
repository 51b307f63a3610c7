package project

import (
	"context"
	"strings"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest"
)

// Allow decides whether the principal may do this in the project, or in the
// system when the reference is "" (rest.Guard). Whoever may not see a project
// gets the same refusal whether it exists or not: without credentials a fault
// Unauthenticated, with them a fault Denied.
func (p *Projects) Allow(ctx context.Context, who access.Principal, want access.Permission, ref string) error {
	if ref == "" {
		if access.InSystem(who, want) {
			return nil
		}
		return refuse(who, want, "")
	}
	found, ok, err := p.resolve(ctx, ref)
	if err != nil {
		return err
	}
	name, id := rest.ParseProject(ref)
	if ok && access.InProject(who, want, access.Project{Name: found.Name, Public: found.Public}) {
		return nil
	}
	if ok || !access.InProject(who, want, access.Project{Name: name}) {
		return refuse(who, want, ref)
	}
	if name == "" {
		return fault.New(fault.NotFound, "there is no project with the id %d", id)
	}
	return unknown(name)
}

func refuse(who access.Principal, want access.Permission, ref string) error {
	if who.Kind == access.Anonymous {
		return fault.New(fault.Unauthenticated, "log in to do this")
	}
	if ref == "" {
		return fault.New(fault.Denied, "%s may not do this (%s)", who.Name, want)
	}
	return fault.New(fault.Denied, "%s may not do this (%s) in project %s, or there is no such project", who.Name, want, strings.TrimPrefix(ref, "="))
}

// resolve finds a project by a reference as rest.ParseProject reads it. What is
// there is read locally; an absence is confirmed, and a fault Unavailable while
// no leader answers.
func (p *Projects) resolve(ctx context.Context, ref string) (Project, bool, error) {
	name, id := rest.ParseProject(ref)
	var found Project
	var ok bool
	read := func(v *table.View) (err error) {
		if name != "" {
			if nameForm.MatchString(name) && len(name) <= 255 {
				found, ok, err = p.Get(v, name)
			}
			return err
		}
		if id > 0 {
			found, ok, err = p.ByID(v, id)
		}
		return err
	}
	if err := p.db.View(read); err != nil || ok {
		return found, ok, err
	}
	fresh, err := p.db.Sought(ctx, func(v *table.View) (bool, error) {
		err := read(v)
		return ok, err
	})
	if err == nil && !ok && fresh.Stale {
		err = fault.New(fault.Unavailable, "whether project %s exists cannot be said: the site has no leader at the moment; try again in a few seconds", strings.TrimPrefix(ref, "="))
	}
	return found, ok, err
}
