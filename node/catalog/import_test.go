package catalog_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/journal"
	"github.com/atoll-registry/atoll/node/project"
)

// fill gives a site some history: moved and deleted tags, an index, referrers, a
// large manifest, a deleted artifact.
func fill(s *site) {
	one := s.image("app", "one")
	a := s.mustPush("app", "v1", one)
	s.mustPush("app", "latest", one)
	s.mustPush("app", "latest", s.image("app", "two"))
	index := v1.Index{MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{describe(a)}}
	index.SchemaVersion = 2
	s.mustPush("app", "multi", encode(s.t, index))
	s.mustPush("app", "", s.image("app", "sbom", subject(describe(a)), kind("application/spdx")))
	s.mustPush("deep/er", "big", s.image("deep/er", "large", note(string(make([]byte, 0))+fmt.Sprintf("%070000d", 7))))
	gone := s.mustPush("app", "gone", s.image("app", "gone"))
	must(s.t, s.catalog.DeleteManifest(s.t.Context(), "library", "app", gone.Digest, "admin"))
	must(s.t, s.catalog.DeleteTag(s.t.Context(), "library", "app", "v1", "admin"))
	public := false
	must(s.t, s.projects.Update(s.t.Context(), "library", project.Change{Public: &public, Metadata: map[string]string{"prevent_vul": "true", "auto_scan": "true"}}))
}

// stage makes all blobs of the entries' manifests live at another site.
func (s *site) stage(entries []catalog.SeqEntry) {
	for _, e := range entries {
		if e.ManifestBytes == nil {
			continue
		}
		decoded, err := entry.Decode(e.Value)
		must(s.t, err)
		doc, err := catalog.ParseManifest(decoded.MediaType, e.ManifestBytes)
		must(s.t, err)
		for _, b := range doc.Blobs() {
			s.live(b)
		}
	}
}

func (s *site) mirror(name string, id entry.LogID) {
	s.t.Helper()
	_, err := s.db.Update(s.t.Context(), func(tx *table.Tx) error { return s.projects.CreateMirror(tx, name, id, "admin") })
	must(s.t, err)
}

func TestImportConverges(t *testing.T) {
	a, b := newSite(t, "site-a"), newSite(t, "site-b")
	ctx := t.Context()
	fill(a)
	id, entries := a.log()
	b.stage(entries)
	b.mirror("theirs", id)

	// In two parts, the second overlapping the first.
	must(t, b.catalog.ApplyEntries(ctx, "theirs", id, entries[:5]))
	must(t, b.catalog.ApplyEntries(ctx, "theirs", id, entries[2:]))
	if a.root("library") != b.root("theirs") {
		t.Fatal("the sites hold the same log and differ in state")
	}
	for _, repository := range []string{"app", "deep/er"} {
		want, _, err := a.catalog.Tags(ctx, "library", repository, "", 0)
		must(t, err)
		got, _, err := b.catalog.Tags(ctx, "theirs", repository, "", 0)
		must(t, err)
		if len(want) != len(got) {
			t.Fatalf("%d tags became %d", len(want), len(got))
		}
		for i := range want {
			m, _, err := b.catalog.Resolve(ctx, "theirs", repository, want[i].Name)
			must(t, err)
			if m.Digest != want[i].Digest || !got[i].PushedAt.Equal(want[i].PushedAt) {
				t.Fatalf("tag %+v became %+v", want[i], got[i])
			}
		}
	}
	one := digest.FromBytes(a.image("app", "one"))
	list, _, err := b.catalog.Referrers(ctx, catalog.Referrers{Project: "theirs", Repository: "app", Subject: one})
	must(t, err)
	if len(list) != 1 {
		t.Fatalf("%d referrers", len(list))
	}

	// Again: nothing is written.
	before := b.revision()
	must(t, b.catalog.ApplyEntries(ctx, "theirs", id, entries))
	if b.revision() != before {
		t.Fatal("a repeated import wrote something")
	}

	// Trees agree, and the origin's checkpoint is kept and relayed.
	var signed []byte
	a.view(func(v *table.View) (err error) { signed, err = a.journal.Checkpoint(t.Context(), v, id); return err })
	must(t, b.journal.KeepCheckpoint(ctx, signed))
	b.view(func(v *table.View) error {
		kept, err := b.journal.Checkpoint(t.Context(), v, id)
		if string(kept) != string(signed) {
			t.Error("another checkpoint came back")
		}
		return err
	})

	// A mirror takes no push.
	body := a.image("app", "three")
	_, err = b.catalog.Put(ctx, catalog.Push{Project: "theirs", Repository: "app", Bytes: body})
	wantKind(t, err, fault.Denied, "DENIED")
	wantKind(t, b.catalog.DeleteTag(ctx, "theirs", "app", "latest", "x"), fault.Denied, "")
	wantKind(t, b.projects.Delete(ctx, "theirs"), fault.Precondition, "")
}

func TestImportNamesGapsAndForks(t *testing.T) {
	a, b := newSite(t, "site-a"), newSite(t, "site-b")
	ctx := t.Context()
	fill(a)
	id, entries := a.log()
	b.stage(entries)
	b.mirror("theirs", id)
	must(t, b.catalog.ApplyEntries(ctx, "theirs", id, entries[:3]))
	before := b.root("theirs")

	err := b.catalog.ApplyEntries(ctx, "theirs", id, entries[4:])
	if !errors.Is(err, journal.ErrGap) {
		t.Fatalf("a gap is %v", err)
	}
	forged := []catalog.SeqEntry{{Seq: 2, Value: entries[1].Value}}
	if err := b.catalog.ApplyEntries(ctx, "theirs", id, forged); !errors.Is(err, journal.ErrFork) {
		t.Fatalf("a fork is %v", err)
	}
	if b.root("theirs") != before {
		t.Fatal("a refused import changed something")
	}
	wantKind(t, b.catalog.ApplyEntries(ctx, "library", id, entries[3:]), fault.Precondition, "")
	_, err = b.db.Update(ctx, func(tx *table.Tx) error { return b.projects.CreateMirror(tx, "again", id, "") })
	wantKind(t, err, fault.Conflict, "")
	_, err = b.db.Update(ctx, func(tx *table.Tx) error {
		return b.projects.CreateMirror(tx, "library", entry.LogID{Site: "x", Incarnation: "y", Scope: "z"}, "")
	})
	wantKind(t, err, fault.Conflict, "")
}

func TestContentMayComeLater(t *testing.T) {
	a, b := newSite(t, "site-a"), newSite(t, "site-b")
	ctx := t.Context()
	fill(a)
	id, entries := a.log()
	b.mirror("theirs", id)
	bare := make([]catalog.SeqEntry, len(entries))
	for i, e := range entries {
		bare[i] = catalog.SeqEntry{Seq: e.Seq, Value: e.Value}
	}
	must(t, b.catalog.ApplyEntries(ctx, "theirs", id, bare))
	if a.root("library") != b.root("theirs") {
		t.Fatal("state must not depend on content")
	}
	_, _, err := b.catalog.Resolve(ctx, "theirs", "app", "latest")
	wantKind(t, err, fault.NotFound, "MANIFEST_UNKNOWN")
	b.stage(entries)
	must(t, b.catalog.ApplyEntries(ctx, "theirs", id, entries))
	for _, tag := range []string{"latest", "multi"} {
		_, _, err = b.catalog.Resolve(ctx, "theirs", "app", tag)
		must(t, err)
	}
	if a.root("library") != b.root("theirs") {
		t.Fatal("content changed the state")
	}
}

func TestImportedContentPassesTheGates(t *testing.T) {
	a, b := newSite(t, "site-a"), newSite(t, "site-b", &gate{push: fault.New(fault.Denied, "unsigned")})
	ctx := t.Context()
	fill(a)
	id, entries := a.log()
	b.stage(entries)
	b.mirror("theirs", id)
	must(t, b.catalog.ApplyEntries(ctx, "theirs", id, entries))
	if a.root("library") != b.root("theirs") {
		t.Fatal("a gate must not change what is applied")
	}
	_, _, err := b.catalog.Resolve(ctx, "theirs", "app", "latest")
	wantKind(t, err, fault.Precondition, "")
}

func TestImportRefusesOtherContent(t *testing.T) {
	a, b := newSite(t, "site-a"), newSite(t, "site-b")
	fill(a)
	id, entries := a.log()
	b.stage(entries)
	b.mirror("theirs", id)
	entries[1].ManifestBytes = append([]byte(" "), entries[1].ManifestBytes...)
	wantKind(t, b.catalog.ApplyEntries(t.Context(), "theirs", id, entries), fault.Invalid, "DIGEST_INVALID")
}

func TestManyEntriesInOneImport(t *testing.T) {
	a, b := newSite(t, "site-a"), newSite(t, "site-b")
	for i := range 150 {
		a.mustPush("app", fmt.Sprintf("v%d", i), a.image("app", fmt.Sprint(i)))
	}
	id, entries := a.log()
	b.stage(entries)
	b.mirror("theirs", id)
	must(t, b.catalog.ApplyEntries(t.Context(), "theirs", id, entries))
	if a.root("library") != b.root("theirs") {
		t.Fatal("the sites hold the same log and differ in state")
	}
	tags, _, err := b.catalog.Tags(t.Context(), "theirs", "app", "", 0)
	must(t, err)
	ids := map[int64]bool{}
	for _, tag := range tags {
		ids[tag.ID] = true
	}
	if len(ids) != 150 {
		t.Fatalf("%d ids for %d tags", len(ids), len(tags))
	}
}

// The largest manifest that the catalog takes fits into one Txn, pushed or
// imported, and goes away again.
func TestLargestManifest(t *testing.T) {
	a, b := newSite(t, "site-a"), newSite(t, "site-b")
	body := a.image("app", "many", func(m *v1.Manifest) {
		for i := len(m.Layers); i < catalog.MaxDescriptors-1; i++ {
			m.Layers = append(m.Layers, a.blob("app", fmt.Sprint("part ", i)))
		}
	})
	pushed := a.mustPush("app", "v1", body)
	id, entries := a.log()
	b.stage(entries)
	b.mirror("theirs", id)
	must(t, b.catalog.ApplyEntries(t.Context(), "theirs", id, entries))
	_, _, err := b.catalog.Resolve(t.Context(), "theirs", "app", "v1")
	must(t, err)
	must(t, a.catalog.DeleteManifest(t.Context(), "library", "app", pushed.Digest, "admin"))

	more := a.image("app", "more", func(m *v1.Manifest) {
		for i := range catalog.MaxDescriptors {
			m.Layers = append(m.Layers, v1.Descriptor{MediaType: "a/b", Digest: digest.FromString(fmt.Sprint(i)), Size: 1})
		}
	})
	_, err = a.push("app", "v1", more)
	wantKind(t, err, fault.Limit, "")
}
