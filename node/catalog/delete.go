package catalog

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/journal"
)

// tagsPerTxn bounds the tags that one Txn deletes with their artifact; it stays
// below the rows that a guarded scan may cover.
const tagsPerTxn = 200

// removal is one deletion, in however many Txns.
type removal struct {
	c                   *Catalog
	project, repository string
	actor               string
	at                  time.Time
	gone                []Deleted // since the last Txn began
}

func (c *Catalog) removal(project, repository, actor string) *removal {
	return &removal{c: c, project: project, repository: repository, actor: clip(actor), at: time.Now()}
}

// update runs one Txn of the removal and publishes what it deleted.
func (r *removal) update(ctx context.Context, fn func(*table.Tx, journal.Scope) error) error {
	_, err := r.c.db.Update(ctx, func(tx *table.Tx) error {
		r.gone = nil
		scope, err := r.c.projects.Writable(tx, r.project)
		if err != nil {
			return err
		}
		return fn(tx, scope)
	})
	if err != nil {
		return err
	}
	for _, d := range r.gone {
		r.c.Deleted.Publish(d)
	}
	return nil
}

func (r *removal) note(tag string, d digest.Digest) {
	r.gone = append(r.gone, Deleted{Project: r.project, Repository: r.repository, Tag: tag, Digest: d, Actor: r.actor, At: r.at})
}

func (r *removal) journal(tx *table.Tx, scope journal.Scope, e entry.Entry) error {
	e.Repository, e.At, e.Actor = r.repository, r.at.Unix(), r.actor
	return r.c.journal.Append(tx, scope, e)
}

// dropTag removes a tag that points at an artifact.
func (r *removal) dropTag(tx *table.Tx, scope journal.Scope, tag string, d digest.Digest) error {
	if err := r.c.dropTag(tx, []string{r.project, r.repository, tag}, d); err != nil {
		return err
	}
	r.note(tag, "")
	return r.journal(tx, scope, entry.Entry{Kind: entry.TagDelete, Tag: tag})
}

func (c *Catalog) dropTag(tx *table.Tx, key []string, d digest.Digest) error {
	if err := c.tags.Delete(tx, key...); err != nil {
		return err
	}
	return c.tagged.Delete(tx, key[0], key[1], d.String(), key[2])
}

// DeleteTag removes a tag; its artifact stays. An unknown tag is a fault
// NotFound.
func (c *Catalog) DeleteTag(ctx context.Context, project, repository, tag, actor string) error {
	return c.DeleteTagIf(ctx, Tagged{project, repository, tag}, Condition{}, actor)
}

// Tagged names a tag.
type Tagged struct{ Project, Repository, Tag string }

// DeleteTagIf is DeleteTag for a tag of which the condition holds; when it does
// not, that is a fault Precondition with Moved as its detail.
func (c *Catalog) DeleteTagIf(ctx context.Context, t Tagged, rests Condition, actor string) error {
	project, repository, tag := t.Project, t.Repository, t.Tag
	if err := CheckRepository(repository); err != nil {
		return err
	}
	r := c.removal(project, repository, actor)
	err := r.update(ctx, func(tx *table.Tx, scope journal.Scope) error {
		if CheckTag(tag) != nil {
			return manifestUnknown(project, repository, fmt.Sprintf("%.80q", tag))
		}
		row, _, ok, err := c.tags.Get(tx, project, repository, tag)
		if err != nil {
			return err
		}
		if !ok {
			return c.absent(tx, project, repository, tag)
		}
		if err := rests.check(tag, row.Digest); err != nil {
			return err
		}
		return r.dropTag(tx, scope, tag, row.Digest)
	})
	if err != nil {
		return fmt.Errorf("delete tag %s of %s/%s: %w", tag, project, repository, err)
	}
	return nil
}

// DeleteManifest removes an artifact and its tags. An unknown one is a fault
// NotFound; one that an index of the repository lists is a fault Precondition,
// because the index could not be pulled any more.
func (c *Catalog) DeleteManifest(ctx context.Context, project, repository string, d digest.Digest, actor string) error {
	if err := CheckRepository(repository); err != nil {
		return err
	}
	r := c.removal(project, repository, actor)
	if err := r.manifest(ctx, d); err != nil {
		return fmt.Errorf("delete manifest %s of %s/%s: %w", d, project, repository, err)
	}
	return nil
}

func (r *removal) manifest(ctx context.Context, d digest.Digest) error {
	c := r.c
	for done := false; !done; {
		// The bytes of a digest never change, so they are read beside the Txn: a
		// large manifest may have to come from another node.
		if err := c.db.ReadIndex(ctx); err != nil {
			return err
		}
		before, found, doc, err := r.peek(ctx, d)
		if err != nil {
			return err
		}
		err = r.update(ctx, func(tx *table.Tx, scope journal.Scope) error {
			a, err := c.find(tx, r.project, r.repository, d.String())
			if err != nil {
				return err
			}
			if !found || a.Absent != before.Absent {
				return nil // pushed since: look again
			}
			if err := c.unlisted(tx, a); err != nil {
				return err
			}
			done, err = r.tags(tx, scope, a)
			if err != nil || !done {
				return err
			}
			r.note("", d)
			if err := c.drop(tx, a, doc); err != nil {
				return err
			}
			return r.journal(tx, scope, entry.Entry{Kind: entry.ArtifactDelete, Digest: d})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// peek reads an artifact and its manifest outside of any Txn.
func (r *removal) peek(ctx context.Context, d digest.Digest) (a Artifact, found bool, doc *Document, err error) {
	key := []string{r.project, r.repository, d.String()}
	err = r.c.db.View(func(v *table.View) error {
		row, meta, ok, err := r.c.artifacts.Get(v, key...)
		a, found = row.artifact(key, meta), ok
		return err
	})
	if err == nil && found {
		doc, err = r.c.content(ctx, a)
	}
	return a, found, doc, err
}

// unlisted refuses when an index of the repository lists the artifact.
func (c *Catalog) unlisted(tx *table.Tx, a Artifact) error {
	for row, err := range c.members.Scan(tx, table.Range{Prefix: []string{a.Project, a.Repository, a.Digest.String()}, Limit: 1}) {
		if err != nil {
			return err
		}
		return fault.New(fault.Precondition, "manifest %s is listed by index %s of the same repository; delete that first", a.Digest, row.Key[3]).WithCode("DENIED")
	}
	return nil
}

// tags removes tags of the artifact, as many as one Txn takes; done says that
// none is left.
func (r *removal) tags(tx *table.Tx, scope journal.Scope, a Artifact) (done bool, err error) {
	var names []string
	for row, err := range r.c.tagged.Scan(tx, table.Range{Prefix: []string{a.Project, a.Repository, a.Digest.String()}, Limit: tagsPerTxn}) {
		if err != nil {
			return false, err
		}
		names = append(names, row.Key[3])
	}
	for _, tag := range names {
		if err := r.dropTag(tx, scope, tag, a.Digest); err != nil {
			return false, err
		}
	}
	return len(names) < tagsPerTxn, nil
}

// drop removes an artifact's row and all that keeps its content. Without its
// document (its bytes are lost, or never came) references to its blobs, if there
// are any, stay: they keep too much, never too little.
func (c *Catalog) drop(tx *table.Tx, a Artifact, doc *Document) error {
	if err := c.artifacts.Delete(tx, a.Project, a.Repository, a.Digest.String()); err != nil {
		return err
	}
	held := []digest.Digest{a.Digest} // a large manifest is a blob of its own
	if doc != nil {
		for _, b := range doc.Blobs() {
			held = append(held, b.Digest)
		}
		for _, child := range unique(doc.Children) {
			if err := c.members.Delete(tx, a.Project, a.Repository, child.Digest.String(), a.Digest.String()); err != nil {
				return err
			}
		}
	}
	if err := c.records.DropRefs(tx, held, a.Project, a.Repository, a.Digest); err != nil {
		return err
	}
	others := false
	for row, err := range c.holders.Scan(tx, table.Range{Prefix: []string{a.Digest.String()}, Limit: 2}) {
		if err != nil {
			return err
		}
		others = others || !slices.Equal(row.Key[1:], []string{a.Project, a.Repository})
	}
	if err := c.holders.Delete(tx, a.Digest.String(), a.Project, a.Repository); err != nil || others {
		return err
	}
	return c.manifests.Delete(tx, a.Digest.String())
}

// DeleteRepository removes a repository with all its tags and artifacts. It
// takes many Txns: a failure in between leaves it smaller, and repeating it goes
// on. Content that is pushed meanwhile is removed too.
func (c *Catalog) DeleteRepository(ctx context.Context, project, repository, actor string) error {
	if err := CheckRepository(repository); err != nil {
		return err
	}
	r := c.removal(project, repository, actor)
	for done := false; !done; {
		if err := r.contents(ctx); err != nil {
			return fmt.Errorf("delete repository %s/%s: %w", project, repository, err)
		}
		if err := c.unlink(ctx, project, repository); err != nil {
			return fmt.Errorf("delete repository %s/%s: %w", project, repository, err)
		}
		err := r.update(ctx, func(tx *table.Tx, _ journal.Scope) error {
			if _, _, ok, err := c.repositories.Get(tx, project, repository); err != nil {
				return err
			} else if !ok {
				return nameUnknown(project, repository)
			}
			for _, err := range c.artifacts.Scan(tx, table.Range{Prefix: []string{project, repository}, Limit: 1}) {
				return err // pushed meanwhile: another round
			}
			done = true
			return c.repositories.Delete(tx, project, repository)
		})
		if err != nil {
			return fmt.Errorf("delete repository %s/%s: %w", project, repository, err)
		}
	}
	return nil
}

// contents removes every artifact that is there now: indexes before what they
// list.
func (r *removal) contents(ctx context.Context) error {
	if err := r.c.db.ReadIndex(ctx); err != nil {
		return err
	}
	var left []Artifact
	err := r.c.db.View(func(v *table.View) (err error) {
		left, err = r.c.artifactsOf(v, r.project, r.repository)
		return err
	})
	if err != nil {
		return err
	}
	for len(left) > 0 {
		var listed []Artifact
		for _, a := range left {
			err := r.manifest(ctx, a.Digest)
			if fault.Is(err, fault.Precondition) {
				listed = append(listed, a)
				continue
			}
			if err != nil && !fault.Is(err, fault.NotFound) {
				return err
			}
		}
		if len(listed) == len(left) {
			// No index can list itself, so somebody pushes new ones meanwhile.
			return fault.New(fault.Conflict, "the repository is being pushed to; try again")
		}
		left = listed
	}
	return nil
}

// Forget takes the blobs of uploads that no manifest came for out of the sight
// of a project that is about to go (project.Repositories): whoever makes one of
// that name later must not see them.
func (c *Catalog) Forget(ctx context.Context, project string) error { return c.unlink(ctx, project) }

// linksPerTxn bounds the links that one Txn removes.
const linksPerTxn = 500

// unlink removes all links of a project, or of a project and a repository. It
// loses nothing that is needed: references keep blobs, links show them.
func (c *Catalog) unlink(ctx context.Context, place ...string) error {
	for {
		var in []blobs.Place
		var linked []digest.Digest
		err := c.db.View(func(v *table.View) (err error) {
			in, linked, err = c.records.LinkedIn(v, linksPerTxn, place...)
			return err
		})
		if err != nil || len(linked) == 0 {
			return err
		}
		_, err = c.db.Update(ctx, func(tx *table.Tx) error {
			if _, err := c.projects.Writable(tx, place[0]); err != nil {
				return err
			}
			for i, d := range linked {
				if err := c.records.Unlink(tx, in[i].Project, in[i].Repository, d); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
}
