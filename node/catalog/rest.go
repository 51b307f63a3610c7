package catalog

import (
	"context"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest"
)

// The operations on repositories and artifacts, in Harbor's shapes.

type repositoryJSON struct {
	ID            int64     `json:"id"`
	ProjectID     int64     `json:"project_id"`
	Name          string    `json:"name"` // with the project
	Description   string    `json:"description"`
	ArtifactCount int       `json:"artifact_count"`
	PullCount     int       `json:"pull_count"`
	CreatedAt     time.Time `json:"creation_time"`
	UpdatedAt     time.Time `json:"update_time"`
}

func (c *Catalog) repositoryJSON(v *table.View, r Repository, projectID int64) (repositoryJSON, error) {
	n, err := c.artifacts.Count(v, r.Project, r.Name)
	return repositoryJSON{
		ID: r.ID, ProjectID: projectID, Name: r.Project + "/" + r.Name, Description: r.Description,
		ArtifactCount: n, CreatedAt: r.CreatedAt, UpdatedAt: r.CreatedAt,
	}, err
}

type repositoryRef struct {
	rest.ProjectName
	Repository string `path:"repository_name"`
}

type artifactRef struct {
	repositoryRef
	Reference string `path:"reference" max:"255"`
}

// Operations adds the operations to the kernel.
func (c *Catalog) Operations(k *rest.Kernel) {
	rest.Register(k, rest.Operation[listAllInput, rest.Page[repositoryJSON]]{
		ID: "listAllRepositories", Method: "GET", Path: "/api/v2.0/repositories", Tag: "repository",
		Summary: "List the repositories that you may see", Permission: access.ProjectList, Do: c.listAll,
	})
	const under = "/api/v2.0/projects/{project_name}/repositories"
	rest.Register(k, rest.Operation[listInput, rest.Page[repositoryJSON]]{
		ID: "listRepositories", Method: "GET", Path: under, Tag: "repository", Summary: "List the repositories of a project",
		Permission: access.RepositoryList, Project: func(in *listInput) string { return in.Ref() }, Do: c.list,
	})
	rest.Register(k, rest.Operation[repositoryRef, repositoryJSON]{
		ID: "getRepository", Method: "GET", Path: under + "/{repository_name}", Tag: "repository", Summary: "Show a repository",
		Permission: access.RepositoryList, Project: func(in *repositoryRef) string { return in.Ref() }, Do: c.show,
	})
	rest.Register(k, rest.Operation[repositoryRef, rest.None]{
		ID: "deleteRepository", Method: "DELETE", Path: under + "/{repository_name}", Tag: "repository",
		Summary: "Delete a repository with all that it holds", Permission: access.RepositoryDelete,
		Project: func(in *repositoryRef) string { return in.Ref() },
		Do: func(ctx context.Context, in *repositoryRef) (rest.None, error) {
			return rest.None{}, c.DeleteRepository(ctx, in.Name, in.Repository, access.From(ctx).Name)
		},
	})
	c.registerArtifacts(k, under+"/{repository_name}/artifacts")
}

func (c *Catalog) registerArtifacts(k *rest.Kernel, under string) {
	rest.Register(k, rest.Operation[artifactsInput, rest.Page[artifactJSON]]{
		ID: "listArtifacts", Method: "GET", Path: under, Tag: "artifact", Summary: "List the artifacts of a repository",
		Permission: access.ArtifactList, Project: func(in *artifactsInput) string { return in.Ref() }, Do: c.listArtifacts,
	})
	rest.Register(k, rest.Operation[artifactInput, artifactJSON]{
		ID: "getArtifact", Method: "GET", Path: under + "/{reference}", Tag: "artifact", Summary: "Show an artifact, named by a tag or a digest",
		Permission: access.ArtifactRead, Project: func(in *artifactInput) string { return in.Ref() }, Do: c.showArtifact,
	})
	rest.Register(k, rest.Operation[artifactRef, rest.None]{
		ID: "deleteArtifact", Method: "DELETE", Path: under + "/{reference}", Tag: "artifact", Summary: "Delete an artifact with its tags",
		Permission: access.RepositoryDelete, Project: func(in *artifactRef) string { return in.Ref() }, Do: c.removeArtifact,
	})
	rest.Register(k, rest.Operation[tagsInput, rest.Page[tagJSON]]{
		ID: "listTags", Method: "GET", Path: under + "/{reference}/tags", Tag: "artifact", Summary: "List the tags of an artifact",
		Permission: access.ArtifactList, Project: func(in *tagsInput) string { return in.Ref() }, Do: c.listArtifactTags,
	})
	rest.Register(k, rest.Operation[createTagInput, rest.Created]{
		ID: "createTag", Method: "POST", Path: under + "/{reference}/tags", Tag: "artifact", Summary: "Give an artifact one more tag",
		Permission: access.RepositoryPush, Project: func(in *createTagInput) string { return in.Ref() }, Do: c.createTag,
	})
	rest.Register(k, rest.Operation[deleteTagInput, rest.None]{
		ID: "deleteTag", Method: "DELETE", Path: under + "/{reference}/tags/{tag_name}", Tag: "artifact", Summary: "Delete a tag; its artifact stays",
		Permission: access.RepositoryDelete, Project: func(in *deleteTagInput) string { return in.Ref() }, Do: c.removeTag,
	})
}

type listAllInput struct {
	rest.Paging
	rest.Filter
}

// listAll answers what the asker may see. With q=blob_digest=... it names
// repositories from which that blob can be mounted, as a replicating Harbor
// asks before it uploads: only live blobs, and only where the asker may pull.
func (c *Catalog) listAll(ctx context.Context, in *listAllInput) (page rest.Page[repositoryJSON], err error) {
	want := access.RepositoryList
	var blob digest.Digest
	if term, ok := in.Q.Find("blob_digest"); ok {
		want = access.RepositoryPull
		if blob, err = entry.ParseDigest(term.Values[0]); err != nil {
			return page, fault.New(fault.Invalid, "blob_digest: %v", err)
		}
	}
	_, err = c.confirmed(ctx, func(v *table.View) error {
		var all []Repository
		if blob == "" {
			all, _, err = c.repositoriesOf(v, "", "", 0)
		} else {
			all, err = c.mountable(v, blob)
		}
		if err != nil {
			return err
		}
		seen := &sight{c: c, v: v, who: access.From(ctx), want: want}
		var mine []Repository
		for _, r := range all {
			ok, err := seen.may(r.Project)
			if err != nil {
				return err
			}
			if !ok || !in.Q.Holds("name", r.Project+"/"+r.Name) {
				continue
			}
			mine = append(mine, r)
		}
		page, err = c.repositoryPage(v, mine, in.Paging, seen.ids)
		return err
	})
	return page, err
}

// mountable gives the repositories that link a live blob.
func (c *Catalog) mountable(v *table.View, d digest.Digest) ([]Repository, error) {
	row, ok, err := c.records.Get(v, d)
	if err != nil || !ok || row.State != blobs.Live {
		return nil, err
	}
	places, err := c.records.Places(v, d, 0)
	if err != nil {
		return nil, err
	}
	var all []Repository
	for _, p := range places {
		key := []string{p.Project, p.Repository}
		row, meta, ok, err := c.repositories.Get(v, key...)
		if err != nil {
			return nil, err
		}
		if ok {
			all = append(all, row.repository(key, meta))
		}
	}
	return all, nil
}

// sight remembers in which projects somebody may do something.
type sight struct {
	c    *Catalog
	v    *table.View
	who  access.Principal
	want access.Permission
	ids  map[string]int64
	no   map[string]bool
}

func (s *sight) may(project string) (bool, error) {
	if _, ok := s.ids[project]; ok {
		return true, nil
	}
	if s.no[project] {
		return false, nil
	}
	p, id, ok, err := s.c.projects.Describe(s.v, project)
	if err != nil {
		return false, err
	}
	if ok && access.InProject(s.who, s.want, p) {
		if s.ids == nil {
			s.ids = map[string]int64{}
		}
		s.ids[project] = id
		return true, nil
	}
	if s.no == nil {
		s.no = map[string]bool{}
	}
	s.no[project] = true
	return false, nil
}

func (c *Catalog) repositoryPage(v *table.View, all []Repository, p rest.Paging, ids map[string]int64) (rest.Page[repositoryJSON], error) {
	cutOut := rest.PageOf(all, p)
	page := rest.Page[repositoryJSON]{Total: cutOut.Total}
	for _, r := range cutOut.Items {
		item, err := c.repositoryJSON(v, r, ids[r.Project])
		if err != nil {
			return page, err
		}
		page.Items = append(page.Items, item)
	}
	return page, nil
}

type listInput struct {
	rest.ProjectName
	rest.Paging
	rest.Filter
}

func (c *Catalog) list(ctx context.Context, in *listInput) (page rest.Page[repositoryJSON], err error) {
	_, err = c.confirmed(ctx, func(v *table.View) error {
		_, id, _, err := c.projects.Describe(v, in.Name)
		if err != nil {
			return err
		}
		all, _, err := c.repositoriesOf(v, in.Name, "", 0)
		if err != nil {
			return err
		}
		var match []Repository
		for _, r := range all {
			if in.Q.Holds("name", r.Project+"/"+r.Name) || in.Q.Holds("name", r.Name) {
				match = append(match, r)
			}
		}
		page, err = c.repositoryPage(v, match, in.Paging, map[string]int64{in.Name: id})
		return err
	})
	return page, err
}

func (c *Catalog) show(ctx context.Context, in *repositoryRef) (out repositoryJSON, err error) {
	if err := CheckRepository(in.Repository); err != nil {
		return out, err
	}
	_, err = c.confirmed(ctx, func(v *table.View) error {
		row, meta, ok, err := c.repositories.Get(v, in.Name, in.Repository)
		if err != nil {
			return err
		}
		if !ok {
			return nameUnknown(in.Name, in.Repository)
		}
		_, id, _, err := c.projects.Describe(v, in.Name)
		if err != nil {
			return err
		}
		out, err = c.repositoryJSON(v, row.repository([]string{in.Name, in.Repository}, meta), id)
		return err
	})
	return out, err
}

func (c *Catalog) removeArtifact(ctx context.Context, in *artifactRef) (rest.None, error) {
	a, err := c.confirmedFind(ctx, in)
	if err != nil {
		return rest.None{}, err
	}
	return rest.None{}, c.DeleteManifest(ctx, in.Name, in.Repository, a.Digest, access.From(ctx).Name)
}

func (c *Catalog) confirmedFind(ctx context.Context, in *artifactRef) (a Artifact, err error) {
	if err := CheckRepository(in.Repository); err != nil {
		return a, err
	}
	_, err = c.confirmed(ctx, func(v *table.View) error {
		a, err = c.find(v, in.Name, in.Repository, in.Reference)
		return err
	})
	return a, err
}

type tagsInput struct {
	artifactRef
	rest.Paging
	rest.Filter
}

func (c *Catalog) listArtifactTags(ctx context.Context, in *tagsInput) (page rest.Page[tagJSON], err error) {
	if err := CheckRepository(in.Repository); err != nil {
		return page, err
	}
	_, err = c.confirmed(ctx, func(v *table.View) error {
		a, err := c.find(v, in.Name, in.Repository, in.Reference)
		if err != nil {
			return err
		}
		tags, err := c.tagsJSON(v, a)
		if err != nil {
			return err
		}
		var match []tagJSON
		for _, t := range tags {
			if in.Q.Holds("name", t.Name) {
				match = append(match, t)
			}
		}
		page = rest.PageOf(match, in.Paging)
		return nil
	})
	return page, err
}

type createTagInput struct {
	artifactRef
	Body struct {
		Name string `json:"name" required:"true" max:"128"`
	}
}

func (c *Catalog) createTag(ctx context.Context, in *createTagInput) (rest.Created, error) {
	if err := CheckTag(in.Body.Name); err != nil {
		return rest.Created{}, err
	}
	m, _, err := c.Resolve(ctx, in.Name, in.Repository, in.Reference)
	if err != nil {
		return rest.Created{}, err
	}
	if _, err := c.confirmedFind(ctx, &artifactRef{in.repositoryRef, in.Body.Name}); err == nil {
		return rest.Created{}, fault.New(fault.Conflict, "tag %s exists already in %s/%s", in.Body.Name, in.Name, in.Repository)
	} else if !fault.Is(err, fault.NotFound) {
		return rest.Created{}, err
	}
	_, err = c.Put(ctx, Push{
		Project: in.Name, Repository: in.Repository, Tag: in.Body.Name, Digest: m.Digest, MediaType: m.MediaType, Bytes: m.Bytes,
		Carrier: Client, Actor: access.From(ctx).Name, At: time.Now(),
	})
	location := "/api/v2.0/projects/" + in.Name + "/repositories/" + url.PathEscape(url.PathEscape(in.Repository)) +
		"/artifacts/" + in.Reference + "/tags/" + in.Body.Name
	return rest.Created{Location: location}, err
}

type deleteTagInput struct {
	artifactRef
	Tag string `path:"tag_name" max:"128"`
}

func (c *Catalog) removeTag(ctx context.Context, in *deleteTagInput) (rest.None, error) {
	a, err := c.confirmedFind(ctx, &in.artifactRef)
	if err != nil {
		return rest.None{}, err
	}
	tagged, err := c.confirmedFind(ctx, &artifactRef{in.repositoryRef, in.Tag})
	if err != nil {
		return rest.None{}, err
	}
	if tagged.Digest != a.Digest || strings.Contains(in.Tag, ":") {
		return rest.None{}, manifestUnknown(in.Name, in.Repository, in.Tag)
	}
	return rest.None{}, c.DeleteTag(ctx, in.Name, in.Repository, in.Tag, access.From(ctx).Name)
}

// SetHeaders marks an answer's artifact by its digest, as a HEAD would.
func (a artifactJSON) SetHeaders(h http.Header) { h.Set("Docker-Content-Digest", a.Digest) }
