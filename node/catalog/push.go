package catalog

import (
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/journal"
)

// Put admits a manifest and, when the push names one, moves the tag to it. It
// returns after the change is committed and visible here. Repeating a push
// changes nothing.
//
// Faults: Invalid with DIGEST_INVALID, MANIFEST_INVALID or, when blobs or listed
// manifests are not in the repository, MANIFEST_BLOB_UNKNOWN and the digests as
// Detail; NotFound for an unknown project; Denied for a mirror; Precondition with
// Moved as Detail when the tag is not where the push rests on; whatever a gate says.
func (c *Catalog) Put(ctx context.Context, p Push) (Artifact, error) {
	doc, err := checkPush(&p)
	if err != nil {
		return Artifact{}, err
	}
	if len(p.Bytes) > MaxRow {
		if err := c.big.Put(ctx, p.Digest, p.Bytes); err != nil {
			return Artifact{}, fmt.Errorf("store manifest %s: %w", p.Digest, err)
		}
	}
	var artifact Artifact
	var changed bool
	commit, err := c.db.Update(ctx, func(tx *table.Tx) error {
		scope, err := c.projects.Writable(tx, p.Project)
		if err != nil {
			return err
		}
		a := &admission{c: c, tx: tx, scope: &scope, push: p, doc: &doc}
		artifact, err = a.run(ctx)
		changed = a.changed
		return err
	})
	if err != nil {
		if errors.Is(err, table.ErrTooLarge) {
			err = fault.Wrap(err, fault.Limit, "the manifest names more than one change of this registry can hold; split it").WithCode("MANIFEST_INVALID")
		}
		return Artifact{}, fmt.Errorf("push %s to %s/%s: %w", p.Digest, p.Project, p.Repository, err)
	}
	if artifact.ID == 0 {
		artifact.ID = idOf(table.Meta{Created: commit.Revision}, 0)
	}
	if changed {
		c.Pushed.Publish(Pushed{
			Project: p.Project, Repository: p.Repository, Tag: p.Tag, Digest: p.Digest, MediaType: artifact.MediaType,
			ArtifactType: artifact.ArtifactType, Carrier: p.Carrier, Actor: p.Actor, At: p.At,
		})
	}
	return artifact, nil
}

// checkPush does all that needs no table: names, digest, manifest. It completes
// the push with the digest and the media type.
func checkPush(p *Push) (Document, error) {
	if err := CheckRepository(p.Repository); err != nil {
		return Document{}, err
	}
	if p.Tag != "" {
		if err := CheckTag(p.Tag); err != nil {
			return Document{}, err
		}
	}
	doc, err := ParseManifest(p.MediaType, p.Bytes)
	if err != nil {
		return Document{}, err
	}
	if p.Digest == "" {
		p.Digest, p.MediaType = digest.FromBytes(p.Bytes), doc.MediaType
		return doc, nil
	}
	if _, err := entry.ParseDigest(p.Digest.String()); err != nil {
		return Document{}, fault.Wrap(err, fault.Invalid, "the push names the manifest by %.140q, which is not a digest that is taken", p.Digest.String()).WithCode("DIGEST_INVALID")
	}
	if real := p.Digest.Algorithm().FromBytes(p.Bytes); p.Digest != real {
		return Document{}, fault.New(fault.Invalid, "the manifest's digest is %s, not %s as the push says; it changed on the way", real, p.Digest).WithCode("DIGEST_INVALID")
	}
	p.MediaType = doc.MediaType
	return doc, nil
}

// admission is one push in one Txn. The apply path uses the same, with leniency
// where an entry has already been decided at its origin.
type admission struct {
	c     *Catalog
	tx    *table.Tx
	scope *journal.Scope // nil: a mirror, whose journal has its entries already
	push  Push
	doc   *Document // nil: the content did not come along
	slot  uint8

	changed  bool
	withheld bool
}

func (a *admission) run(ctx context.Context) (Artifact, error) {
	p := a.push
	key := []string{p.Project, p.Repository, p.Digest.String()}
	row, meta, found, err := a.c.artifacts.Get(a.tx, key...)
	if err != nil {
		return Artifact{}, err
	}
	fresh := !found || row.Absent
	var tag tagRow
	tagged := false
	if p.Tag != "" {
		if tag, _, tagged, err = a.c.tags.Get(a.tx, p.Project, p.Repository, p.Tag); err != nil {
			return Artifact{}, err
		}
		if err := p.If.check(p.Tag, tag.Digest); err != nil {
			return Artifact{}, err
		}
	}
	moves := p.Tag != "" && (!tagged || tag.Digest != p.Digest)
	if !fresh && !moves {
		return row.artifact(key, meta), nil
	}
	a.changed = true
	if err := a.askGates(ctx); err != nil {
		return Artifact{}, err
	}
	if err := a.ensureRepository(); err != nil {
		return Artifact{}, err
	}
	if fresh {
		if row, err = a.putArtifact(row, found); err != nil {
			return Artifact{}, err
		}
	}
	if moves {
		err = a.putTag(tag, tagged)
	}
	if err != nil {
		return Artifact{}, err
	}
	artifact := row.artifact(key, meta)
	if !found {
		artifact.ID = 0 // known once it is committed
	}
	return artifact, nil
}

func (a *admission) askGates(ctx context.Context) error {
	for _, g := range a.c.gates {
		verdict, err := g.AdmitPush(ctx, a.tx, a.push)
		if err != nil {
			return err
		}
		a.withheld = a.withheld || verdict == Hold
	}
	return nil
}

func (a *admission) ensureRepository() error {
	p := a.push
	_, ok, err := a.c.repositories.Meta(a.tx, p.Project, p.Repository)
	if err != nil || ok {
		return err
	}
	return a.c.repositories.Put(a.tx, repositoryRow{Slot: a.slot, CreatedAt: p.At.Unix()}, p.Project, p.Repository)
}

// putArtifact writes an artifact that is new here, or that was known and absent.
func (a *admission) putArtifact(row artifactRow, known bool) (artifactRow, error) {
	p := a.push
	if !known {
		row = artifactRow{Slot: a.slot, PushedAt: p.At.Unix(), Actor: p.Actor}
	}
	row.MediaType, row.ArtifactType = a.doc.MediaType, a.doc.ArtifactType
	row.Size = int64(len(p.Bytes))
	if a.doc.Subject != nil {
		row.Subject = a.doc.Subject.Digest
	}
	row.Withheld = a.withheld
	if err := a.hold(&row); err != nil {
		return row, err
	}
	if err := a.c.artifacts.Put(a.tx, row, p.Project, p.Repository, p.Digest.String()); err != nil {
		return row, err
	}
	if known {
		return row, nil // its entry was written when it became known
	}
	return row, a.journal(row.entry(p.Repository, p.Digest.String()))
}

// hold writes everything that keeps an artifact's content: references to its
// blobs, its place in its children's rows, and its bytes.
func (a *admission) hold(row *artifactRow) error {
	p, c := a.push, a.c
	total, err := a.checkContent()
	if err != nil {
		return err
	}
	row.Total, row.Absent = total, false
	if a.doc.Config != nil {
		row.ConfigType = a.doc.Config.MediaType
	}
	for _, child := range unique(a.doc.Children) {
		if err := c.members.Put(a.tx, mark{}, p.Project, p.Repository, child.Digest.String(), p.Digest.String()); err != nil {
			return err
		}
	}
	if len(p.Bytes) > MaxRow {
		if err := c.records.Live(a.tx, p.Digest, int64(len(p.Bytes))); err != nil {
			return err
		}
		return c.records.AddRef(a.tx, p.Digest, p.Project, p.Repository, p.Digest)
	}
	// Whoever removes the last holder removes the bytes: the row is written again
	// unless it is there, and this read guards that it stays until then.
	if _, ok, err := c.manifests.Meta(a.tx, p.Digest.String()); err != nil {
		return err
	} else if !ok {
		if err := c.manifests.Put(a.tx, manifestRow{Bytes: p.Bytes}, p.Digest.String()); err != nil {
			return err
		}
	}
	return c.holders.Put(a.tx, mark{}, p.Digest.String(), p.Project, p.Repository)
}

// checkContent refuses the artifact unless everything that it names is here, and
// refers to its blobs, which guards them. It gives the size of all together.
func (a *admission) checkContent() (total int64, err error) {
	var missing []string
	total = int64(len(a.push.Bytes))
	for _, b := range a.doc.Blobs() {
		here, err := a.holdBlob(b)
		if err != nil {
			return 0, err
		}
		if !here && !Foreign(b.MediaType) {
			missing = append(missing, b.Digest.String())
		}
		if here {
			total += b.Size
		}
	}
	for _, m := range unique(a.doc.Children) {
		child, _, ok, err := a.c.artifacts.Get(a.tx, a.push.Project, a.push.Repository, m.Digest.String())
		if err != nil {
			return 0, err
		}
		if (!ok || child.Absent) && a.scope != nil {
			missing = append(missing, m.Digest.String())
			continue
		}
		if ok && child.Size != m.Size && a.scope != nil {
			return 0, invalidManifest("the index says that manifest %s has %d bytes, it has %d", m.Digest, m.Size, child.Size)
		}
		total += child.Total
	}
	if len(missing) > 0 {
		return 0, fault.New(fault.Invalid, "the manifest names content that is not in repository %s/%s (first: %s); push it before the manifest",
			a.push.Project, a.push.Repository, missing[0]).WithCode("MANIFEST_BLOB_UNKNOWN").WithDetail(missing)
	}
	return total, nil
}

// holdBlob refers to a blob if the repository may see it and it is live.
func (a *admission) holdBlob(b v1.Descriptor) (bool, error) {
	p, records := a.push, a.c.records
	if a.scope != nil {
		linked, err := records.Linked(a.tx, p.Project, p.Repository, b.Digest)
		if err != nil || !linked {
			return false, err
		}
	}
	row, err := records.Guard(a.tx, b.Digest)
	if fault.Is(err, fault.NotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if row.Size != b.Size {
		return false, invalidManifest("the manifest says that blob %s has %d bytes, it has %d", b.Digest, b.Size, row.Size)
	}
	if a.scope == nil {
		if err := records.Link(a.tx, p.Project, p.Repository, b.Digest); err != nil {
			return false, err
		}
	}
	if p.Copies > row.Copies {
		if err := records.SetCopies(a.tx, b.Digest, p.Copies); err != nil {
			return false, err
		}
	}
	return true, records.AddRef(a.tx, b.Digest, p.Project, p.Repository, p.Digest)
}

// putTag points the tag at the artifact, away from another one if need be.
func (a *admission) putTag(old tagRow, moved bool) error {
	p, c := a.push, a.c
	row := tagRow{Digest: p.Digest, PushedAt: p.At.Unix(), Slot: a.slot, Withheld: a.withheld}
	if moved {
		row.Slot = old.Slot // a row keeps its creation, so it keeps its id
		if err := c.tagged.Delete(a.tx, p.Project, p.Repository, old.Digest.String(), p.Tag); err != nil {
			return err
		}
	}
	if err := c.tags.Put(a.tx, row, p.Project, p.Repository, p.Tag); err != nil {
		return err
	}
	if err := c.tagged.Put(a.tx, mark{}, p.Project, p.Repository, p.Digest.String(), p.Tag); err != nil {
		return err
	}
	return a.journal(row.entry(p.Repository, p.Tag))
}

// journal tells the project's log, unless that is where the change came from.
func (a *admission) journal(e entry.Entry) error {
	if a.scope == nil {
		return nil
	}
	e.At, e.Actor = a.push.At.Unix(), clip(a.push.Actor)
	return a.c.journal.Append(a.tx, *a.scope, e)
}

// clip keeps an actor's name within what an entry takes.
func clip(actor string) string {
	if len(actor) > 256 {
		actor = actor[:256]
	}
	return actor
}
