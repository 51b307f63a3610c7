package catalog

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/journal"
)

// Bounds of what one Txn applies. They keep it well below the limits of a Txn;
// what is still too much is halved.
const (
	entriesPerTxn     = 100
	bytesPerTxn       = 256 << 10
	descriptorsPerTxn = 400
)

// attempts to go on when another import of the same log is faster.
const attempts = 20

// SeqEntry is an entry of another site's log with what it needs to be applied.
type SeqEntry struct {
	Seq   uint64
	Value []byte
	// ManifestBytes are the content of an artifact.put. Without them, or while a
	// blob that they name is not live, the artifact is known and not held.
	ManifestBytes []byte
}

// step is an entry made ready: decoded, and its content checked.
type step struct {
	SeqEntry
	entry entry.Entry
	// doc is the content of the artifact that is put or deleted; nil: of another
	// kind, or not there.
	doc *Document
}

// ApplyEntries applies entries of another site's log, which the caller has
// verified, to the mirror of its project. Entries come in order, without gaps
// among them; those that were applied before are compared and skipped, so it may
// be repeated, and an interruption leaves whole entries. Each Txn accepts its
// entries into the journal and makes their changes.
//
// The blobs that a manifest names must be live rows beforehand, or its artifact
// is known and not held until the entry is brought again with its content. The
// gates are asked as for a push; since the state must follow the log, content
// that one refuses is withheld.
//
// Faults: Conflict that wraps journal.ErrGap or journal.ErrFork; Invalid when an
// entry or its content is malformed; Precondition when the project is not the
// mirror of that log.
func (c *Catalog) ApplyEntries(ctx context.Context, project string, log entry.LogID, entries []SeqEntry) error {
	if err := c.db.ReadIndex(ctx); err != nil {
		return err
	}
	steps, err := c.ready(ctx, project, log, entries)
	if err != nil || len(steps) == 0 {
		return err
	}
	for range attempts {
		rest, err := c.skip(ctx, project, log, steps)
		if err != nil {
			return err
		}
		err = c.applyAll(ctx, project, log, rest)
		if err == nil || !errors.Is(err, journal.ErrAccepted) {
			return err
		}
	}
	return fault.New(fault.Conflict, "log %s is being imported by somebody else; try again", log)
}

// ready decodes the entries, checks their content and stores large manifests.
func (c *Catalog) ready(ctx context.Context, project string, log entry.LogID, entries []SeqEntry) ([]step, error) {
	steps := make([]step, 0, len(entries))
	docs := map[digest.Digest]*Document{}
	for i, e := range entries {
		if e.Seq != entries[0].Seq+uint64(i) {
			return nil, fault.Wrap(journal.ErrGap, fault.Conflict, "log %s: entry %d comes after %d", log, e.Seq, entries[i-1].Seq)
		}
		decoded, err := entry.Decode(e.Value)
		if err != nil {
			return nil, fault.Wrap(err, fault.Invalid, "log %s: entry %d is malformed", log, e.Seq)
		}
		s := step{SeqEntry: e, entry: decoded}
		if decoded.Kind == entry.ArtifactPut && e.ManifestBytes != nil {
			if s.doc, err = matching(decoded, e.ManifestBytes); err != nil {
				return nil, fmt.Errorf("log %s: entry %d: %w", log, e.Seq, err)
			}
			docs[decoded.Digest] = s.doc
			if len(e.ManifestBytes) > MaxRow {
				if err := c.big.Put(ctx, decoded.Digest, e.ManifestBytes); err != nil {
					return nil, fmt.Errorf("store manifest %s: %w", decoded.Digest, err)
				}
			}
		}
		if decoded.Kind == entry.ArtifactDelete {
			if s.doc = docs[decoded.Digest]; s.doc == nil {
				if _, _, s.doc, err = c.removal(project, decoded.Repository, "").peek(ctx, decoded.Digest); err != nil {
					return nil, fmt.Errorf("log %s: entry %d: %w", log, e.Seq, err)
				}
			}
		}
		steps = append(steps, s)
	}
	return steps, nil
}

// matching checks that a manifest is what its entry says.
func matching(e entry.Entry, body []byte) (*Document, error) {
	if e.Digest.Algorithm().FromBytes(body) != e.Digest || int64(len(body)) != e.Size {
		return nil, fault.New(fault.Invalid, "the manifest that came with it is not %s of %d bytes", e.Digest, e.Size).WithCode("DIGEST_INVALID")
	}
	doc, err := ParseManifest(e.MediaType, body)
	if err != nil {
		return nil, err
	}
	subject := digest.Digest("")
	if doc.Subject != nil {
		subject = doc.Subject.Digest
	}
	if doc.ArtifactType != e.ArtifactType || subject != e.Subject {
		return nil, fault.New(fault.Invalid, "the entry and manifest %s differ in artifact type or subject", e.Digest).WithCode("MANIFEST_INVALID")
	}
	return &doc, nil
}

// skip compares the entries that were applied before, completes artifacts whose
// content came only now, and gives the rest.
func (c *Catalog) skip(ctx context.Context, project string, log entry.LogID, steps []step) ([]step, error) {
	if err := c.db.ReadIndex(ctx); err != nil {
		return nil, err
	}
	n := 0
	var complete []step
	err := c.db.View(func(v *table.View) error {
		size, err := c.journal.Size(v, log)
		if err != nil {
			return err
		}
		for n < len(steps) && steps[n].Seq < size {
			s := steps[n]
			if err := c.journal.Compare(v, log, journal.SeqEntry{Seq: s.Seq, Value: s.Value}); err != nil {
				return err
			}
			n++
			if s.doc == nil || s.entry.Kind != entry.ArtifactPut {
				continue
			}
			row, _, ok, err := c.artifacts.Get(v, project, s.entry.Repository, s.entry.Digest.String())
			if err != nil {
				return err
			}
			if ok && row.Absent {
				complete = append(complete, s)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, s := range complete {
		if err := c.linkAhead(ctx, project, log, s); err != nil {
			return nil, err
		}
		_, err := c.db.Update(ctx, func(tx *table.Tx) error {
			if err := c.projects.Mirror(tx, project, log); err != nil {
				return err
			}
			row, _, ok, err := c.artifacts.Get(tx, project, s.entry.Repository, s.entry.Digest.String())
			if err != nil || !ok || !row.Absent {
				return err
			}
			return c.application(tx, project, log).content(ctx, s, row)
		})
		if err != nil {
			return nil, fmt.Errorf("complete manifest %s: %w", s.entry.Digest, err)
		}
	}
	return steps[n:], nil
}

func (c *Catalog) applyAll(ctx context.Context, project string, log entry.LogID, steps []step) error {
	for len(steps) > 0 {
		n := batch(steps)
		if n == 1 {
			if err := c.linkAhead(ctx, project, log, steps[0]); err != nil {
				return err
			}
		}
		err := c.applyBatch(ctx, project, log, steps[:n])
		for n > 1 && errors.Is(err, table.ErrTooLarge) {
			n /= 2
			err = c.applyBatch(ctx, project, log, steps[:n])
		}
		if errors.Is(err, table.ErrTooLarge) && steps[0].doc != nil {
			// Admitted at its origin, where names are shorter. The state must
			// follow the log, so it is known here and not held.
			steps[0].doc = nil
			err = c.applyBatch(ctx, project, log, steps[:1])
		}
		if err != nil {
			return fmt.Errorf("apply entries %d to %d of log %s: %w", steps[0].Seq, steps[n-1].Seq, log, err)
		}
		steps = steps[n:]
	}
	return nil
}

// linkAhead lets the repository see the blobs of a manifest that names very many,
// since links and references together are more than one Txn takes. A link alone
// keeps nothing and shows nothing that the entry does not name.
func (c *Catalog) linkAhead(ctx context.Context, project string, log entry.LogID, s step) error {
	if s.doc == nil || s.entry.Kind != entry.ArtifactPut {
		return nil
	}
	all := s.doc.Blobs()
	if len(all) <= descriptorsPerTxn {
		return nil
	}
	for some := range slices.Chunk(all, descriptorsPerTxn) {
		_, err := c.db.Update(ctx, func(tx *table.Tx) error {
			if err := c.projects.Mirror(tx, project, log); err != nil {
				return err
			}
			for _, b := range some {
				err := c.records.Link(tx, project, s.entry.Repository, b.Digest)
				if err != nil && !fault.Is(err, fault.NotFound) {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("link the blobs of manifest %s: %w", s.entry.Digest, err)
		}
	}
	return nil
}

// batch is how many of the steps one Txn takes.
func batch(steps []step) int {
	bytes, descriptors := 0, 0
	for n, s := range steps {
		bytes += len(s.Value) + 1024
		if s.doc != nil {
			descriptors += len(s.doc.Layers) + len(s.doc.Children) + 1
			if len(s.ManifestBytes) <= MaxRow {
				bytes += len(s.ManifestBytes)
			}
		}
		if n > 0 && (n >= entriesPerTxn || bytes > bytesPerTxn || descriptors > descriptorsPerTxn) {
			return n
		}
	}
	return len(steps)
}

func (c *Catalog) applyBatch(ctx context.Context, project string, log entry.LogID, steps []step) error {
	values := make([][]byte, len(steps))
	for i, s := range steps {
		values[i] = s.Value
	}
	var did *application
	_, err := c.db.Update(ctx, func(tx *table.Tx) error {
		if err := c.projects.Mirror(tx, project, log); err != nil {
			return err
		}
		if err := c.journal.Accept(tx, log, steps[0].Seq, values...); err != nil {
			return err
		}
		did = c.application(tx, project, log)
		for i, s := range steps {
			did.slot = uint8(i % slots)
			if err := did.apply(ctx, s); err != nil {
				return fmt.Errorf("entry %d (%s): %w", s.Seq, s.entry.Kind, err)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, p := range did.pushed {
		c.Pushed.Publish(p)
	}
	for _, d := range did.deleted {
		c.Deleted.Publish(d)
	}
	return nil
}

// application is a run of entries in one Txn.
type application struct {
	c       *Catalog
	tx      *table.Tx
	project string
	origin  string
	slot    uint8
	pushed  []Pushed
	deleted []Deleted
}

func (c *Catalog) application(tx *table.Tx, project string, log entry.LogID) *application {
	return &application{c: c, tx: tx, project: project, origin: log.Site}
}

// apply makes the change of one entry, exactly as entry.Entry.State describes
// it: each put and delete concerns one key and nothing else.
func (a *application) apply(ctx context.Context, s step) error {
	e := s.entry
	switch e.Kind {
	case entry.ProjectPut:
		return a.c.projects.ApplyEntry(a.tx, a.project, e)
	case entry.ArtifactPut:
		return a.putArtifact(ctx, s)
	case entry.ArtifactDelete:
		return a.deleteArtifact(s)
	case entry.TagPut:
		return a.putTag(ctx, e)
	case entry.TagDelete:
		row, _, ok, err := a.c.tags.Get(a.tx, a.project, e.Repository, e.Tag)
		if err != nil || !ok {
			return err
		}
		a.deleted = append(a.deleted, a.event(e))
		return a.c.dropTag(a.tx, []string{a.project, e.Repository, e.Tag}, row.Digest)
	}
	return nil // of a later version: kept in the journal, no change here
}

func (a *application) event(e entry.Entry) Deleted {
	d := Deleted{Project: a.project, Repository: e.Repository, Tag: e.Tag, Actor: e.Actor, At: unix(e.At)}
	if e.Kind == entry.ArtifactDelete {
		d.Digest = e.Digest
	}
	return d
}

// admission of what an entry tells, with the origin's times.
func (a *application) admission(e entry.Entry, body []byte, doc *Document) *admission {
	return &admission{c: a.c, tx: a.tx, slot: a.slot, doc: doc, push: Push{
		Project: a.project, Repository: e.Repository, Tag: e.Tag, Digest: e.Digest, MediaType: e.MediaType, Bytes: body,
		Carrier: Bundle, Origin: a.origin, Actor: e.Actor, At: unix(e.PushedAt),
	}}
}

// gates asks the gates; a refusal withholds, a failure to decide ends the Txn.
func (a *application) gates(ctx context.Context, ad *admission) error {
	err := ad.askGates(ctx)
	switch fault.KindOf(err) {
	case fault.Denied, fault.Precondition, fault.Limit, fault.Invalid, fault.Conflict:
		ad.withheld = true
		return nil
	}
	return err
}

func (a *application) putArtifact(ctx context.Context, s step) error {
	e := s.entry
	row, _, known, err := a.c.artifacts.Get(a.tx, a.project, e.Repository, e.Digest.String())
	if err != nil {
		return err
	}
	if !known {
		row = artifactRow{Slot: a.slot, Actor: e.Actor, Absent: true, Total: e.Size}
	}
	row.MediaType, row.Size, row.ArtifactType, row.Subject, row.PushedAt = e.MediaType, e.Size, e.ArtifactType, e.Subject, e.PushedAt
	ad := a.admission(e, s.ManifestBytes, s.doc)
	if err := ad.ensureRepository(); err != nil {
		return err
	}
	a.pushed = append(a.pushed, Pushed{
		Project: a.project, Repository: e.Repository, Digest: e.Digest, MediaType: e.MediaType, ArtifactType: e.ArtifactType,
		Carrier: Bundle, Actor: e.Actor, At: unix(e.PushedAt),
	})
	if row.Absent && s.doc != nil {
		return a.content(ctx, s, row)
	}
	return a.c.artifacts.Put(a.tx, row, a.project, e.Repository, e.Digest.String())
}

// content writes an artifact with its content if all of that is here.
func (a *application) content(ctx context.Context, s step, row artifactRow) error {
	e := s.entry
	ad := a.admission(e, s.ManifestBytes, s.doc)
	complete, err := a.complete(s.doc)
	if err != nil {
		return err
	}
	if complete {
		if err := a.gates(ctx, ad); err != nil {
			return err
		}
		row.Withheld = ad.withheld
		if err := ad.hold(&row); err != nil {
			return err
		}
	}
	return a.c.artifacts.Put(a.tx, row, a.project, e.Repository, e.Digest.String())
}

// complete reports whether every blob that the document names is here.
func (a *application) complete(doc *Document) (bool, error) {
	for _, b := range doc.Blobs() {
		row, ok, err := a.c.records.Get(a.tx, b.Digest)
		if err != nil {
			return false, err
		}
		if !ok && Foreign(b.MediaType) {
			continue
		}
		if !ok || row.State == blobs.Gone {
			return false, nil
		}
	}
	return true, nil
}

func (a *application) putTag(ctx context.Context, e entry.Entry) error {
	old, _, moved, err := a.c.tags.Get(a.tx, a.project, e.Repository, e.Tag)
	if err != nil {
		return err
	}
	row, _, _, err := a.c.artifacts.Get(a.tx, a.project, e.Repository, e.Digest.String())
	if err != nil {
		return err
	}
	body, _, _, err := a.c.manifests.Get(a.tx, e.Digest.String())
	if err != nil {
		return err
	}
	ad := a.admission(e, body.Bytes, nil)
	ad.push.MediaType = row.MediaType
	if err := a.gates(ctx, ad); err != nil {
		return err
	}
	if err := ad.ensureRepository(); err != nil {
		return err
	}
	a.pushed = append(a.pushed, Pushed{
		Project: a.project, Repository: e.Repository, Tag: e.Tag, Digest: e.Digest, MediaType: row.MediaType,
		ArtifactType: row.ArtifactType, Carrier: Bundle, Actor: e.Actor, At: unix(e.PushedAt),
	})
	return ad.putTag(old, moved)
}

func (a *application) deleteArtifact(s step) error {
	e := s.entry
	key := []string{a.project, e.Repository, e.Digest.String()}
	row, meta, ok, err := a.c.artifacts.Get(a.tx, key...)
	if err != nil || !ok {
		return err
	}
	a.deleted = append(a.deleted, a.event(e))
	return a.c.drop(a.tx, row.artifact(key, meta), s.doc)
}

// Materialise yields the state of a project that travels, in the order of its
// keys, for entry.StateRoot: the same at every site that holds the same entries.
func (c *Catalog) Materialise(v *table.View, project string) iter.Seq2[entry.Pair, error] {
	return func(yield func(entry.Pair, error) bool) {
		give := func(e entry.Entry) bool {
			key, value, _, err := e.State()
			return yield(entry.Pair{Key: key, Value: value}, err) && err == nil
		}
		under := table.Range{Prefix: []string{project}}
		for row, err := range c.artifacts.Scan(v, under) {
			if err != nil {
				yield(entry.Pair{}, err)
				return
			}
			if !give(row.Value.entry(row.Key[1], row.Key[2])) {
				return
			}
		}
		state, ok, err := c.projects.State(v, project)
		if err != nil {
			yield(entry.Pair{}, err)
			return
		}
		if ok && !give(state) {
			return
		}
		for row, err := range c.tags.Scan(v, under) {
			if err != nil {
				yield(entry.Pair{}, err)
				return
			}
			if !give(row.Value.entry(row.Key[1], row.Key[2])) {
				return
			}
		}
	}
}
