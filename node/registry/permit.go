package registry

import (
	"context"
	"net/http"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/project"
	"github.com/atoll-registry/atoll/node/telemetry"
)

// The actions of registry tokens.
const (
	actionPull   = "pull"
	actionPush   = "push"
	actionDelete = "delete"
)

// scopeOf is what a client has to ask a token for. The name is the one that the
// client sent, since it merges the scopes with its own by comparing them.
func scopeOf(n Name, action string) string {
	if action == actionPush {
		action = "pull,push" // clients look before they push, with the same token
	}
	return "repository:" + n.Sent + ":" + action
}

// identify says who asks. A request without credentials is refused even where
// anybody may pull: clients take that as the place to get a token, and some rely
// on it. Whoever came in another way (this node's socket, another node) is in
// the context already.
func (g *Registry) identify(c *call) error {
	if c.who = access.From(c.r.Context()); c.who.Kind != access.Anonymous {
		return nil
	}
	if c.r.Header.Get("Authorization") == "" {
		return fault.New(fault.Unauthenticated, "authentication is needed; anonymous pulls need a token too, which the challenge tells how to get")
	}
	who, err := g.auth.Authenticate(c.r)
	if err != nil {
		return err
	}
	c.who = who
	c.r = c.r.WithContext(access.WithPrincipal(c.r.Context(), who))
	telemetry.SetUser(c.r.Context(), who.Name)
	return nil
}

// permit refuses a request unless its principal may do the action in the
// request's repository. A missing project is made for a push by somebody who may
// make projects.
func (g *Registry) permit(c *call, action string) error {
	c.scopes = append([]string{scopeOf(c.route.Name, action)}, c.scopes...)
	if err := g.identify(c); err != nil {
		return err
	}
	if action == actionPull {
		if err := g.mapMirror(c); err != nil {
			return err
		}
	}
	n := c.route.Name
	p, found, err := g.projects.Lookup(c.r.Context(), n.Project)
	if err != nil {
		return err
	}
	want, _ := access.RepositoryAction(action)
	user := bare(c.who)
	switch {
	case !found && action == actionPush && access.InSystem(user, access.ProjectCreate):
		if !access.Granted(c.who, n.Full(), action) {
			return narrow(n, action)
		}
		return g.createProject(c, n.Project)
	case !found && access.InProject(user, want, access.Project{Name: n.Project}):
		return fault.New(fault.NotFound, "there is no project %s", n.Project).WithCode(codeNameUnknown)
	case !found || !access.InProject(user, want, p):
		return denied(c, action)
	case !c.reaches(p, action):
		return narrow(n, action)
	case action == actionPull:
		return nil
	}
	return g.owned(n.Project)
}

// bare is the principal without the limits of the token that it came with: what
// it may not do at all, no other token would let it do.
func bare(p access.Principal) access.Principal {
	p.Grants = nil
	return p
}

// narrow asks for a token that reaches further.
func narrow(n Name, action string) error {
	return fault.New(fault.Unauthenticated, "the token does not reach as far as %s of %s; ask for one with the scope that the challenge names", action, n.Sent)
}

// denied says the same whether a project is hidden or missing.
func denied(c *call, action string) error {
	n := c.route.Name
	if c.who.Kind == access.Anonymous {
		return fault.New(fault.Unauthenticated, "log in to %s %s", action, n.Sent)
	}
	if action != actionPush {
		return fault.New(fault.Denied, "%s may not %s %s, or there is no such repository", c.who.Name, action, n.Sent).WithCode(codeDenied)
	}
	scheme := "http"
	if c.r.TLS != nil {
		scheme = "https"
	}
	return fault.New(fault.Denied, "%s may not push to %s: there is no project %s, or only others may push to it. If it is missing, an administrator makes it with: curl -u admin -H 'Content-Type: application/json' -d '{\"project_name\":\"%s\"}' %s://%s/api/v2.0/projects",
		c.who.Name, n.Sent, n.Project, n.Project, scheme, c.r.Host).WithCode(codeDenied)
}

// createProject makes the private project that a push names.
func (g *Registry) createProject(c *call, name string) error {
	if err := project.CheckName(name); err != nil {
		return fault.Wrap(err, fault.Invalid, "%q cannot be a project; the first part of a repository's name is its project and has single '.', '_' or '-' only between letters and digits", name).WithCode(codeNameInvalid)
	}
	_, err := g.projects.Create(c.r.Context(), project.Draft{Name: name, Actor: c.who.Name})
	if fault.Is(err, fault.Conflict) {
		return nil // somebody else's push was first
	}
	if err == nil {
		g.log.Info("made a private project for a push", "project", name, "user", c.who.Name)
	}
	return err
}

// owned refuses to write to a project that another site owns. The catalog
// decides this when a manifest comes; here it spares the upload of the blobs.
func (g *Registry) owned(name string) error {
	return g.db.View(func(v *table.View) error {
		p, ok, err := g.projects.Get(v, name)
		if err != nil || !ok {
			return err
		}
		_, err = g.journal.Own(v, p.Log)
		return err
	})
}

// mayRead reports whether a principal may pull a repository, and if only its
// token stands against that.
func (g *Registry) mayRead(ctx context.Context, who access.Principal, n Name) (may, tokenOnly bool, err error) {
	p, found, err := g.projects.Lookup(ctx, n.Project)
	if err != nil || !found || !access.InProject(bare(who), access.RepositoryPull, p) {
		return false, false, err
	}
	// What anybody may pull, no token has to name.
	if p.Public || access.Granted(who, n.Full(), actionPull) {
		return true, false, nil
	}
	return false, true, nil
}

// listRepositories answers /v2/_catalog, which lists all projects.
func (g *Registry) listRepositories(c *call) error {
	c.scopes = []string{"registry:catalog:*"}
	if err := g.identify(c); err != nil {
		return err
	}
	if !access.InSystem(c.who, access.CatalogRead) {
		if access.InSystem(bare(c.who), access.CatalogRead) {
			return fault.New(fault.Unauthenticated, "the token does not reach the catalog; ask for one with the scope that the challenge names")
		}
		if c.who.Kind == access.Anonymous {
			return fault.New(fault.Unauthenticated, "log in as an administrator to list all repositories")
		}
		return fault.New(fault.Denied, "only administrators may list all repositories; a project's are under /api/v2.0/projects").WithCode(codeDenied)
	}
	q, err := parsePage(c.r)
	if err != nil {
		return err
	}
	answer := struct {
		Repositories []string `json:"repositories"`
	}{[]string{}}
	if q.n == 0 {
		return c.json(http.StatusOK, answer)
	}
	all, page, err := g.catalog.Repositories(c.r.Context(), "", q.last, q.n)
	if err != nil {
		return err
	}
	markStale(c.w.Header(), page.Fresh)
	for _, r := range all {
		answer.Repositories = append(answer.Repositories, r.Project+"/"+r.Name)
	}
	if page.More && len(all) > 0 {
		q.next(c, "/v2/_catalog", answer.Repositories[len(all)-1])
	}
	return c.json(http.StatusOK, answer)
}
