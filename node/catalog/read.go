package catalog

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
)

func nameUnknown(project, repository string) error {
	return fault.New(fault.NotFound, "there is no repository %s/%s", project, repository).WithCode("NAME_UNKNOWN")
}

func manifestUnknown(project, repository, reference string) error {
	return fault.New(fault.NotFound, "there is no manifest %s in repository %s/%s", reference, project, repository).WithCode("MANIFEST_UNKNOWN")
}

// confirmed reads at a read index. What is found is good even when no leader
// answers; for an absence one is awaited, and when none comes it is a fault
// Unavailable. It may read twice.
func (c *Catalog) confirmed(ctx context.Context, read func(*table.View) error) (table.Freshness, error) {
	fresh, err := c.db.Sought(ctx, func(v *table.View) (bool, error) {
		err := read(v)
		return !fault.Is(err, fault.NotFound), err
	})
	if fresh.Stale && fault.Is(err, fault.NotFound) {
		err = fault.Wrap(err, fault.Unavailable, "this cannot be found here and, as the site has no leader at the moment, not be said to be absent; try again in a few seconds")
	}
	return fresh, err
}

// Resolve gives the manifest that a tag or a digest names. The read is confirmed
// with the leader; while none answers, what is here is given and Freshness says
// how old it may be, and what is not here is a fault Unavailable.
//
// Faults: NotFound with NAME_UNKNOWN or MANIFEST_UNKNOWN; Precondition when the
// artifact is withheld; whatever a gate says.
func (c *Catalog) Resolve(ctx context.Context, project, repository, reference string) (Manifest, table.Freshness, error) {
	if err := CheckRepository(repository); err != nil {
		return Manifest{}, table.Freshness{}, err
	}
	var m Manifest
	fresh, err := c.confirmed(ctx, func(v *table.View) error {
		a, err := c.find(v, project, repository, reference)
		if err != nil {
			return err
		}
		if err := servable(a, reference); err != nil {
			return err
		}
		if err := c.admitPull(ctx, v, Pull{Project: project, Repository: repository, Reference: reference, Digest: a.Digest}); err != nil {
			return err
		}
		row, _, _, err := c.manifests.Get(v, a.Digest.String())
		m = Manifest{Artifact: a, Bytes: row.Bytes}
		return err
	})
	if err != nil {
		return Manifest{}, fresh, err
	}
	if m.Bytes == nil {
		if m.Bytes, err = c.big.Read(ctx, m.Digest); err != nil {
			return Manifest{}, fresh, fmt.Errorf("read manifest %s of %s/%s: %w", m.Digest, project, repository, err)
		}
	}
	return m, fresh, nil
}

// maxOwners bounds the artifacts that are asked about for one blob.
const maxOwners = 64

// AdmitBlob refuses the content of a blob, p.Digest, that in its repository only
// manifests name which are not served to the actor: it says why the last of them
// is not. A blob that no manifest names is on its way in and is let through, and
// so is every blob, at no cost, while there is no gate.
func (c *Catalog) AdmitBlob(ctx context.Context, p Pull) error {
	if len(c.gates) == 0 {
		return nil
	}
	return c.db.View(func(v *table.View) error {
		owners, err := c.records.Referrers(v, p.Digest, blobs.Place{Project: p.Project, Repository: p.Repository}, maxOwners)
		if err != nil {
			return err
		}
		var refused error
		for _, owner := range owners {
			key := []string{p.Project, p.Repository, owner.String()}
			row, meta, ok, err := c.artifacts.Get(v, key...)
			if err != nil {
				return err
			}
			if !ok {
				continue
			}
			if refused = servable(row.artifact(key, meta), owner.String()); refused == nil {
				refused = c.admitPull(ctx, v, Pull{Project: p.Project, Repository: p.Repository, Reference: owner.String(), Digest: owner, Actor: p.Actor})
			}
			if refused == nil {
				return nil
			}
		}
		return refused
	})
}

func (c *Catalog) admitPull(ctx context.Context, v *table.View, p Pull) error {
	for _, g := range c.gates {
		if err := g.AdmitPull(ctx, v, p); err != nil {
			return err
		}
	}
	return nil
}

func servable(a Artifact, reference string) error {
	if a.Absent {
		return fault.New(fault.NotFound, "manifest %s is known in repository %s/%s, but its content did not come along when it was imported; bring a bundle that holds it",
			reference, a.Project, a.Repository).WithCode("MANIFEST_UNKNOWN")
	}
	if a.Withheld {
		return fault.New(fault.Precondition, "manifest %s in repository %s/%s is held back by a policy of its project", reference, a.Project, a.Repository).WithCode("DENIED")
	}
	return nil
}

// find reads the artifact that a tag or a digest names, servable or not. A tag
// that is held back counts as its artifact being so.
func (c *Catalog) find(r table.Reader, project, repository, reference string) (Artifact, error) {
	d, err := entry.ParseDigest(reference)
	withheld := false
	if err != nil {
		if CheckTag(reference) != nil {
			return Artifact{}, manifestUnknown(project, repository, fmt.Sprintf("%.80q", reference))
		}
		tag, _, ok, err := c.tags.Get(r, project, repository, reference)
		if err != nil {
			return Artifact{}, err
		}
		if !ok {
			return Artifact{}, c.absent(r, project, repository, reference)
		}
		d, withheld = tag.Digest, tag.Withheld
	}
	key := []string{project, repository, d.String()}
	row, meta, ok, err := c.artifacts.Get(r, key...)
	if err != nil {
		return Artifact{}, err
	}
	if !ok {
		return Artifact{}, c.absent(r, project, repository, reference)
	}
	a := row.artifact(key, meta)
	a.Withheld = a.Withheld || withheld
	return a, nil
}

// absent says what is missing: the manifest, or the repository too.
func (c *Catalog) absent(r table.Reader, project, repository, reference string) error {
	if _, _, ok, err := c.repositories.Get(r, project, repository); err != nil {
		return err
	} else if !ok {
		return nameUnknown(project, repository)
	}
	return manifestUnknown(project, repository, reference)
}

// ManifestRow reads a manifest that is kept as a row, whatever repository it is
// in, without asking any gate: for content on its way to other sites and from
// them. It is nil for one that is not; larger manifests are blobs.
func (c *Catalog) ManifestRow(v *table.View, d digest.Digest) ([]byte, error) {
	row, _, _, err := c.manifests.Get(v, d.String())
	return row.Bytes, err
}

// content reads and parses an artifact's manifest without asking any gate; nil
// when nobody holds it.
func (c *Catalog) content(ctx context.Context, a Artifact) (*Document, error) {
	var body []byte
	err := c.db.View(func(v *table.View) error {
		row, _, _, err := c.manifests.Get(v, a.Digest.String())
		body = row.Bytes
		return err
	})
	if err == nil && body == nil && a.Size > MaxRow && !a.Absent {
		body, err = c.big.Read(ctx, a.Digest)
	}
	if fault.Is(err, fault.NotFound) || err == nil && body == nil {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	doc, err := ParseManifest(a.MediaType, body)
	if err != nil {
		return nil, fmt.Errorf("read manifest %s, which was admitted once: %w", a.Digest, err)
	}
	return &doc, nil
}

// Page says of a part of a list what its items do not.
type Page struct {
	More  bool // others follow
	Fresh table.Freshness
}

// Tags lists a repository's tags in the order of their names, at most n (0 is
// all) after one. An unknown repository is a fault NotFound.
func (c *Catalog) Tags(ctx context.Context, project, repository, after string, n int) (tags []Tag, p Page, err error) {
	p, err = c.pageOfTags(ctx, project, repository, after, func(v *table.View) (more bool, err error) {
		tags, more, err = listTags(v, c.tags, []string{project, repository}, after, n)
		return more, err
	})
	return tags, p, err
}

// TagNames is Tags for who wants the names alone, which costs half as much.
func (c *Catalog) TagNames(ctx context.Context, project, repository, after string, n int) (names []string, p Page, err error) {
	p, err = c.pageOfTags(ctx, project, repository, after, func(v *table.View) (bool, error) {
		for key, err := range c.tags.Keys(v, page([]string{project, repository}, after, n)) {
			if err != nil {
				return false, err
			}
			if n > 0 && len(names) == n {
				return true, nil
			}
			names = append(names, key[2])
		}
		return false, nil
	})
	return names, p, err
}

func (c *Catalog) pageOfTags(ctx context.Context, project, repository, after string, list func(*table.View) (more bool, err error)) (p Page, err error) {
	if err := CheckRepository(repository); err != nil {
		return p, err
	}
	if err := checkAfter(after); err != nil {
		return p, err
	}
	p.Fresh, err = c.confirmed(ctx, func(v *table.View) error {
		if _, _, ok, err := c.repositories.Get(v, project, repository); err != nil {
			return err
		} else if !ok {
			return nameUnknown(project, repository)
		}
		p.More, err = list(v)
		return err
	})
	return p, err
}

func listTags(v *table.View, t *table.Table[tagRow], prefix []string, after string, n int) (tags []Tag, more bool, err error) {
	for row, err := range t.Scan(v, page(prefix, after, n)) {
		if err != nil {
			return nil, false, err
		}
		if n > 0 && len(tags) == n {
			return tags, true, nil
		}
		tags = append(tags, row.Value.tag(row.Key, row.Meta))
	}
	return tags, false, nil
}

// checkAfter refuses a place in a listing that no key can have. Otherwise it need
// not exist.
func checkAfter(after string) error {
	if len(after) > 1024 || strings.Contains(after, "\x00") {
		return fault.New(fault.Invalid, "%.80q cannot be the last item of a page", after)
	}
	return nil
}

// page is the range of one page, with one row more to see whether others follow.
func page(prefix []string, after string, n int) table.Range {
	rg := table.Range{Prefix: prefix}
	if n > 0 {
		rg.Limit = n + 1
	}
	if after != "" {
		rg.After = append(slices.Clone(prefix), after)
	}
	return rg
}

// Repositories lists the repositories of a project, in the order of their names,
// at most n (0 is all) after one; of project "" those of all projects, after
// "project/repository".
func (c *Catalog) Repositories(ctx context.Context, project, after string, n int) (list []Repository, p Page, err error) {
	if err := checkAfter(after); err != nil {
		return nil, p, err
	}
	p.Fresh, err = c.confirmed(ctx, func(v *table.View) error {
		list, p.More, err = c.repositoriesOf(v, project, after, n)
		return err
	})
	return list, p, err
}

func (c *Catalog) repositoriesOf(v *table.View, project, after string, n int) (list []Repository, more bool, err error) {
	rg := table.Range{}
	if n > 0 {
		rg.Limit = n + 1
	}
	if project != "" {
		rg = page([]string{project}, after, n)
	} else if name, rest, ok := cut(after); ok {
		rg.After = []string{name, rest}
	}
	for row, err := range c.repositories.Scan(v, rg) {
		if err != nil {
			return nil, false, err
		}
		if n > 0 && len(list) == n {
			return list, true, nil
		}
		list = append(list, row.Value.repository(row.Key, row.Meta))
	}
	return list, false, nil
}

// artifactsOf reads the artifacts of a repository in the order of their digests.
func (c *Catalog) artifactsOf(v *table.View, project, repository string) ([]Artifact, error) {
	var all []Artifact
	for row, err := range c.artifacts.Scan(v, table.Range{Prefix: []string{project, repository}}) {
		if err != nil {
			return nil, err
		}
		all = append(all, row.Value.artifact(row.Key, row.Meta))
	}
	return all, nil
}

// tagsOf reads the tags of an artifact.
func (c *Catalog) tagsOf(v *table.View, a Artifact) ([]Tag, error) {
	var all []Tag
	for row, err := range c.tagged.Scan(v, table.Range{Prefix: []string{a.Project, a.Repository, a.Digest.String()}}) {
		if err != nil {
			return nil, err
		}
		key := []string{a.Project, a.Repository, row.Key[3]}
		tag, meta, ok, err := c.tags.Get(v, key...)
		if err != nil {
			return nil, err
		}
		if ok {
			all = append(all, tag.tag(key, meta))
		}
	}
	return all, nil
}

// Referrers lists the artifacts whose subject is the one asked for, in the order
// of their digests, which does not change while artifacts come and go. The
// subject need not exist.
func (c *Catalog) Referrers(ctx context.Context, q Referrers) (list []v1.Descriptor, p Page, err error) {
	if err := CheckRepository(q.Repository); err != nil {
		return nil, p, err
	}
	var found []Manifest
	p.Fresh, err = c.db.Sought(ctx, func(v *table.View) (bool, error) {
		found, p.More, err = c.referrersOf(v, q)
		return len(found) > 0, err
	})
	if err != nil {
		return nil, p, err
	}
	if p.Fresh.Stale && len(found) == 0 {
		return nil, p, fault.New(fault.Unavailable, "whether %s has referrers cannot be said: the site has no leader at the moment; try again in a few seconds", q.Subject)
	}
	for _, m := range found {
		if m.Bytes == nil {
			if m.Bytes, err = c.big.Read(ctx, m.Digest); err != nil {
				return nil, p, fmt.Errorf("read referrer %s: %w", m.Digest, err)
			}
		}
		var own struct {
			Annotations map[string]string `json:"annotations"`
		}
		if err := json.Unmarshal(m.Bytes, &own); err != nil {
			return nil, p, fmt.Errorf("read referrer %s: %w", m.Digest, err)
		}
		list = append(list, m.descriptor(own.Annotations))
	}
	return list, p, nil
}

func (c *Catalog) referrersOf(v *table.View, q Referrers) (found []Manifest, more bool, err error) {
	index := []string{q.Project, q.Repository, q.Subject.String()}
	rg := table.Range{Prefix: index}
	if q.After != "" {
		rg.AfterIndex, rg.After = index, []string{q.Project, q.Repository, q.After.String()}
	}
	for row, err := range c.artifacts.Lookup(v, subjectIndex, rg) {
		if err != nil {
			return nil, false, err
		}
		a := row.Value.artifact(row.Key, row.Meta)
		if a.Absent || a.Withheld || q.ArtifactType != "" && a.ArtifactType != q.ArtifactType {
			continue
		}
		if q.N > 0 && len(found) == q.N {
			return found, true, nil
		}
		body, _, _, err := c.manifests.Get(v, a.Digest.String())
		if err != nil {
			return nil, false, err
		}
		found = append(found, Manifest{Artifact: a, Bytes: body.Bytes})
	}
	return found, false, nil
}

// Has reports whether there is a repository of that name.
func (c *Catalog) Has(r table.Reader, project, repository string) (bool, error) {
	_, _, ok, err := c.repositories.Get(r, project, repository)
	return ok, err
}

// Any reports whether a project has a repository (project.Repositories).
func (c *Catalog) Any(r table.Reader, project string) (bool, error) {
	for _, err := range c.repositories.Scan(r, table.Range{Prefix: []string{project}, Limit: 1}) {
		return err == nil, err
	}
	return false, nil
}

// Count is how many repositories a project has (project.Repositories).
func (c *Catalog) Count(v *table.View, project string) (int, error) {
	return c.repositories.Count(v, project)
}

// Bytes is how much a project's content occupies, each blob and manifest counted
// once (project.Repositories). It reads every manifest of the project.
func (c *Catalog) Bytes(v *table.View, project string) (int64, error) {
	sizes := map[digest.Digest]int64{}
	for row, err := range c.artifacts.Scan(v, table.Range{Prefix: []string{project}}) {
		if err != nil {
			return 0, err
		}
		a := row.Value.artifact(row.Key, row.Meta)
		if _, seen := sizes[a.Digest]; seen || a.Absent {
			continue
		}
		sizes[a.Digest] = a.Size
		body, _, ok, err := c.manifests.Get(v, a.Digest.String())
		if err != nil {
			return 0, err
		}
		if !ok { // too large for a row: its layers are counted as its own
			sizes[a.Digest] = a.Total
			continue
		}
		doc, err := ParseManifest(a.MediaType, body.Bytes)
		if err != nil {
			return 0, fmt.Errorf("read manifest %s, which was admitted once: %w", a.Digest, err)
		}
		for _, b := range doc.Blobs() {
			if !Foreign(b.MediaType) {
				sizes[b.Digest] = b.Size
			}
		}
	}
	var total int64
	for _, n := range sizes {
		total += n
	}
	return total, nil
}
