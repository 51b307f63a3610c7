package project

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest"
)

// The operations on projects, in Harbor's shapes.

type allowlistJSON struct {
	ID        int64     `json:"id"`
	ProjectID int64     `json:"project_id"`
	Items     []any     `json:"items"`
	CreatedAt time.Time `json:"creation_time"`
	UpdatedAt time.Time `json:"update_time"`
}

type projectJSON struct {
	ID          int64             `json:"project_id"`
	Name        string            `json:"name"`
	OwnerID     int64             `json:"owner_id"`
	OwnerName   string            `json:"owner_name"`
	CreatedAt   time.Time         `json:"creation_time"`
	UpdatedAt   time.Time         `json:"update_time"`
	Deleted     bool              `json:"deleted"`
	RepoCount   int               `json:"repo_count"`
	Metadata    map[string]string `json:"metadata"`
	RoleID      int               `json:"current_user_role_id"`
	RoleIDs     []int             `json:"current_user_role_ids"`
	Allowlist   allowlistJSON     `json:"cve_allowlist"`
	OwnerSite   string            `json:"owner_site"` // Atoll's: who alone writes it
	OwnerCalled string            `json:"owner_site_name,omitempty"`
}

// adminRole is Harbor's number for the administrator of a project.
const adminRole = 1

func (p *Projects) json(v *table.View, x Project, who access.Principal) (projectJSON, error) {
	out := projectJSON{
		ID: x.ID, Name: x.Name, OwnerID: 1, OwnerName: x.Creator, CreatedAt: x.CreatedAt, UpdatedAt: x.UpdatedAt,
		Metadata: x.metadata(), RoleIDs: []int{}, OwnerSite: x.Log.Site,
		Allowlist: allowlistJSON{ID: x.ID, ProjectID: x.ID, Items: []any{}, CreatedAt: x.CreatedAt, UpdatedAt: x.CreatedAt},
	}
	if x.OwnerName != x.Name {
		out.OwnerCalled = x.OwnerName
	}
	if who.Admin || who.Kind == access.System {
		out.RoleID, out.RoleIDs = adminRole, []int{adminRole}
	}
	var err error
	out.RepoCount, err = p.repos.Count(v, x.Name)
	return out, err
}

// Operations adds the operations to the kernel.
func (p *Projects) Operations(k *rest.Kernel) {
	const all, one = "/api/v2.0/projects", "/api/v2.0/projects/{project_name_or_id}"
	ref := func(in *rest.ProjectRef) string { return in.Ref() }
	rest.Register(k, rest.Operation[listInput, rest.Page[projectJSON]]{
		ID: "listProjects", Method: "GET", Path: all, Tag: "project", Summary: "List the projects that you may see",
		Permission: access.ProjectList, Do: p.list,
	})
	rest.Register(k, rest.Operation[createInput, rest.Created]{
		ID: "createProject", Method: "POST", Path: all, Tag: "project", Summary: "Create a project",
		Permission: access.ProjectCreate, Do: p.create,
	})
	rest.Register(k, rest.Operation[headInput, rest.None]{
		ID: "headProject", Method: "HEAD", Path: all, Tag: "project", Summary: "Say whether a project exists",
		Permission: access.ProjectList, Do: p.head,
	})
	rest.Register(k, rest.Operation[rest.ProjectRef, projectJSON]{
		ID: "getProject", Method: "GET", Path: one, Tag: "project", Summary: "Show a project",
		Permission: access.ProjectRead, Project: ref, Do: p.show,
	})
	rest.Register(k, rest.Operation[updateInput, rest.None]{
		ID: "updateProject", Method: "PUT", Path: one, Tag: "project", Summary: "Change a project's metadata",
		Permission: access.ProjectUpdate, Project: func(in *updateInput) string { return in.Ref() }, Do: p.change,
	})
	rest.Register(k, rest.Operation[rest.ProjectRef, rest.None]{
		ID: "deleteProject", Method: "DELETE", Path: one, Tag: "project", Summary: "Delete an empty project",
		Permission: access.ProjectDelete, Project: ref, Do: p.remove,
	})
	rest.Register(k, rest.Operation[rest.ProjectRef, deletableJSON]{
		ID: "getProjectDeletable", Method: "GET", Path: one + "/_deletable", Tag: "project", Summary: "Say whether a project can be deleted, and why not",
		Permission: access.ProjectDelete, Project: ref, Do: p.askDeletable,
	})
	p.replicaOperations(k)
	rest.Register(k, rest.Operation[rest.ProjectRef, summaryJSON]{
		ID: "getProjectSummary", Method: "GET", Path: one + "/summary", Tag: "project", Summary: "Show a project's numbers",
		Permission: access.ProjectRead, Project: ref, Do: p.summary,
	})
}

type listInput struct {
	rest.Paging
	rest.Filter
	Name   string `query:"name" max:"255"`
	Public *bool  `query:"public"`
	Owner  string `query:"owner" max:"255"`
}

func (p *Projects) list(ctx context.Context, in *listInput) (page rest.Page[projectJSON], err error) {
	who := access.From(ctx)
	_, err = p.db.Confirmed(ctx, func(v *table.View) error {
		all, err := p.All(v)
		if err != nil {
			return err
		}
		all = slices.DeleteFunc(all, func(x Project) bool {
			return !access.InProject(who, access.ProjectRead, access.Project{Name: x.Name, Public: x.Public}) || !in.match(x)
		})
		order(all, in.Sort)
		cut := rest.PageOf(all, in.Paging)
		page = rest.Page[projectJSON]{Total: cut.Total}
		for _, x := range cut.Items {
			item, err := p.json(v, x, who)
			if err != nil {
				return err
			}
			page.Items = append(page.Items, item)
		}
		return nil
	})
	return page, err
}

func (in *listInput) match(x Project) bool {
	return strings.Contains(x.Name, in.Name) && (in.Public == nil || *in.Public == x.Public) &&
		(in.Owner == "" || in.Owner == x.Creator) && in.Q.Holds("name", x.Name) &&
		in.Q.Holds("public", strconv.FormatBool(x.Public)) && in.Q.Holds("owner", x.Creator) &&
		in.Q.Holds("project_id", strconv.FormatInt(x.ID, 10))
}

func order(all []Project, by rest.Sort) {
	slices.SortStableFunc(all, func(a, b Project) int {
		for _, key := range by {
			n := 0
			switch key.Key {
			case "name":
				n = cmp.Compare(a.Name, b.Name)
			case "creation_time":
				n = cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
			case "update_time":
				n = a.UpdatedAt.Compare(b.UpdatedAt)
			case "project_id":
				n = cmp.Compare(a.ID, b.ID)
			}
			if key.Descending {
				n = -n
			}
			if n != 0 {
				return n
			}
		}
		return cmp.Compare(a.ID, b.ID)
	})
}

// body is what Harbor's clients send to create or change a project.
type body struct {
	Public       *bool             `json:"public"`
	Metadata     map[string]string `json:"metadata"`
	StorageLimit *int64            `json:"storage_limit"`
	RegistryID   *int64            `json:"registry_id"`
}

// check refuses what this version would have to ignore.
func (b body) check() error {
	if b.StorageLimit != nil && *b.StorageLimit > 0 {
		return fault.New(fault.Invalid, "this version has no storage quotas; leave storage_limit out or set it to -1")
	}
	if b.RegistryID != nil && *b.RegistryID != 0 {
		return fault.New(fault.Invalid, "this version has no proxy projects; leave registry_id out")
	}
	return nil
}

type createInput struct {
	NameInLocation bool `header:"X-Resource-Name-In-Location"`
	Body           struct {
		Name string `json:"project_name"`
		body
	}
}

func (p *Projects) create(ctx context.Context, in *createInput) (rest.Created, error) {
	if err := in.Body.check(); err != nil {
		return rest.Created{}, err
	}
	d := Draft{Name: in.Body.Name, Metadata: in.Body.Metadata, Actor: access.From(ctx).Name}
	if in.Body.Public != nil {
		d.Public = *in.Body.Public
	}
	x, err := p.Create(ctx, d)
	if err != nil {
		return rest.Created{}, err
	}
	last := strconv.FormatInt(x.ID, 10)
	if in.NameInLocation {
		last = x.Name
	}
	return rest.Created{Location: "/api/v2.0/projects/" + last}, nil
}

type headInput struct {
	Name string `query:"project_name" required:"true" max:"255"`
}

// head tells whether the name is taken, to those who may see that.
func (p *Projects) head(ctx context.Context, in *headInput) (rest.None, error) {
	x, ok, err := p.Lookup(ctx, in.Name)
	if err == nil && (!ok || !access.InProject(access.From(ctx), access.ProjectRead, x)) {
		err = unknown(in.Name)
	}
	return rest.None{}, err
}

// named finds the project that a request names; the guard has let it pass.
func (p *Projects) named(ctx context.Context, ref string) (Project, error) {
	x, ok, err := p.resolve(ctx, ref)
	if err == nil && !ok {
		err = unknown(ref)
	}
	return x, err
}

func (p *Projects) show(ctx context.Context, in *rest.ProjectRef) (out projectJSON, err error) {
	x, err := p.named(ctx, in.Ref())
	if err != nil {
		return out, err
	}
	_, err = p.db.Confirmed(ctx, func(v *table.View) error {
		now, ok, err := p.Get(v, x.Name)
		if err != nil {
			return err
		}
		if !ok {
			return unknown(x.Name)
		}
		out, err = p.json(v, now, access.From(ctx))
		return err
	})
	return out, err
}

type updateInput struct {
	rest.ProjectRef
	Body struct {
		body
	}
}

func (p *Projects) change(ctx context.Context, in *updateInput) (rest.None, error) {
	if err := in.Body.check(); err != nil {
		return rest.None{}, err
	}
	x, err := p.named(ctx, in.Ref())
	if err != nil {
		return rest.None{}, err
	}
	return rest.None{}, p.Update(ctx, x.Name, Change{Public: in.Body.Public, Metadata: in.Body.Metadata, Actor: access.From(ctx).Name})
}

func (p *Projects) remove(ctx context.Context, in *rest.ProjectRef) (rest.None, error) {
	x, err := p.named(ctx, in.Ref())
	if err != nil {
		return rest.None{}, err
	}
	return rest.None{}, p.Delete(ctx, x.Name)
}

type deletableJSON struct {
	Deletable bool   `json:"deletable"`
	Message   string `json:"message"`
}

func (p *Projects) askDeletable(ctx context.Context, in *rest.ProjectRef) (deletableJSON, error) {
	x, err := p.named(ctx, in.Ref())
	if err != nil {
		return deletableJSON{}, err
	}
	_, err = p.db.Confirmed(ctx, func(v *table.View) error {
		r, _, err := p.need(v, x.Name)
		if err != nil {
			return err
		}
		return p.deletable(v, x.Name, r)
	})
	if fault.Is(err, fault.Precondition) {
		_, text, _ := fault.Public(err)
		return deletableJSON{Message: text}, nil
	}
	return deletableJSON{Deletable: err == nil}, err
}

type storageJSON struct {
	Storage int64 `json:"storage"` // bytes; -1 is no limit
}

type summaryJSON struct {
	RepoCount  int `json:"repo_count"`
	Admins     int `json:"project_admin_count"`
	Maintainer int `json:"maintainer_count"`
	Developers int `json:"developer_count"`
	Guests     int `json:"guest_count"`
	Limited    int `json:"limited_guest_count"`
	Quota      struct {
		Hard storageJSON `json:"hard"`
		Used storageJSON `json:"used"`
	} `json:"quota"`
}

func (p *Projects) summary(ctx context.Context, in *rest.ProjectRef) (out summaryJSON, err error) {
	x, err := p.named(ctx, in.Ref())
	if err != nil {
		return out, err
	}
	_, err = p.db.Confirmed(ctx, func(v *table.View) (err error) {
		if out.RepoCount, err = p.repos.Count(v, x.Name); err != nil {
			return err
		}
		out.Admins = 1
		out.Quota.Hard.Storage = -1
		out.Quota.Used.Storage, err = p.repos.Bytes(v, x.Name)
		return err
	})
	return out, err
}
