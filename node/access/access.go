// Package access says who asks and what they may do: the principal of a
// request, permissions as pairs of resource and action in Harbor's words, and
// the matrix of roles. It decides from what it is given and reads no table.
package access

import (
	"context"
	"slices"
)

// Kind of principal.
type Kind uint8

const (
	Anonymous Kind = iota // no credentials
	User                  // a person
	Robot                 // a machine account
	System                // this node's own socket, or the node itself
)

// Principal is who makes a request. It is a value: copy it freely.
type Principal struct {
	Kind Kind
	Name string // login name; "" for Anonymous
	// Admin may do everything in the system.
	Admin bool
	// Grants narrow a principal that came with a registry token to what the
	// token names; nil means not narrowed.
	Grants []Grant
}

// Grant is what a registry token allows on one repository.
type Grant struct {
	Repository string   // project/name, or Catalog
	Actions    []string // pull, push, delete, or * (catalog)
}

// Catalog is the Repository of the Grant to list all repositories.
const Catalog = "*"

// Permission is an action on a resource, in Harbor's words, for example
// {"repository", "push"} or {"project", "create"}.
type Permission struct{ Resource, Action string }

func (p Permission) String() string { return p.Resource + ":" + p.Action }

// The permissions that the rooms ask for.
var (
	RepositoryPull   = Permission{"repository", "pull"}
	RepositoryPush   = Permission{"repository", "push"}
	RepositoryDelete = Permission{"repository", "delete"}
	RepositoryList   = Permission{"repository", "list"}
	ArtifactList     = Permission{"artifact", "list"}
	ArtifactRead     = Permission{"artifact", "read"}
	ProjectCreate    = Permission{"project", "create"}
	ProjectRead      = Permission{"project", "read"}
	ProjectList      = Permission{"project", "list"}
	ProjectUpdate    = Permission{"project", "update"}
	ProjectDelete    = Permission{"project", "delete"}
	CatalogRead      = Permission{"catalog", "read"}
	SystemRead       = Permission{"system", "read"}
	NodeRead         = Permission{"node", "read"}
	NodeManage       = Permission{"node", "manage"}
	SiteRead         = Permission{"site", "read"}
	SiteManage       = Permission{"site", "manage"}
	BundleExport     = Permission{"bundle", "export"}
	BundleImport     = Permission{"bundle", "import"}
	MetricsRead      = Permission{"metrics", "read"}

	ConfigurationRead   = Permission{"configuration", "read"}
	ConfigurationUpdate = Permission{"configuration", "update"}
)

// Project is what a decision needs to know of a project.
type Project struct {
	Name   string
	Public bool
}

// publicRead is what everybody, anonymous included, may do in a public project.
var publicRead = []Permission{RepositoryPull, RepositoryList, ArtifactList, ArtifactRead, ProjectRead}

// openToAll is what everybody may do in the system without a project: these
// operations show only what the asker may see.
var openToAll = []Permission{ProjectList}

// RepositoryAction gives the permission behind an action of a registry token.
func RepositoryAction(action string) (Permission, bool) {
	switch action {
	case "pull":
		return RepositoryPull, true
	case "push":
		return RepositoryPush, true
	case "delete":
		return RepositoryDelete, true
	}
	return Permission{}, false
}

// InSystem reports whether the principal may do this outside any project. One
// that came with a registry token may only what the token reaches: list the
// catalog, and create the project of a repository that it may push to.
func InSystem(p Principal, want Permission) bool {
	if p.Grants != nil {
		switch want {
		case CatalogRead:
			if !Granted(p, Catalog, "*") {
				return false
			}
		case ProjectCreate:
			if !slices.ContainsFunc(p.Grants, func(g Grant) bool { return slices.Contains(g.Actions, "push") }) {
				return false
			}
		default:
			return false
		}
	}
	return p.Admin || p.Kind == System || slices.Contains(openToAll, want)
}

// InProject reports whether the principal may do this in the project. One that
// came with a registry token may at most pull, push and delete there, and of
// which repositories is a second question: see Granted.
func InProject(p Principal, want Permission, project Project) bool {
	if p.Grants != nil && want != RepositoryPull && want != RepositoryPush && want != RepositoryDelete {
		return false
	}
	if p.Admin || p.Kind == System {
		return true
	}
	return project.Public && slices.Contains(publicRead, want)
}

// Granted reports whether a principal that came with a registry token may do
// the action (pull, push, delete) on the repository. A principal without grants
// is not narrowed.
func Granted(p Principal, repository, action string) bool {
	if p.Grants == nil {
		return true
	}
	for _, g := range p.Grants {
		if g.Repository == repository && (slices.Contains(g.Actions, action) || slices.Contains(g.Actions, "*")) {
			return true
		}
	}
	return false
}

type principalKey struct{}

// WithPrincipal gives a context that carries the principal.
func WithPrincipal(ctx context.Context, p Principal) context.Context {
	return context.WithValue(ctx, principalKey{}, p)
}

// From gives the context's principal; Anonymous when it carries none.
func From(ctx context.Context) Principal {
	p, _ := ctx.Value(principalKey{}).(Principal)
	return p
}
