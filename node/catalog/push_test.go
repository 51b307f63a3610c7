package catalog_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
)

func TestPushAndResolve(t *testing.T) {
	s := newSite(t, "site-a")
	body := s.image("app", "one")
	a := s.mustPush("app", "v1", body)
	if a.ID == 0 || a.ArtifactType != v1.MediaTypeImageConfig || a.Total <= a.Size {
		t.Fatalf("artifact is %+v", a)
	}
	for _, reference := range []string{"v1", digest.FromBytes(body).String()} {
		m, fresh, err := s.catalog.Resolve(t.Context(), "library", "app", reference)
		must(t, err)
		if string(m.Bytes) != string(body) || m.Digest != a.Digest || m.ID != a.ID || fresh.Stale {
			t.Fatalf("resolve %s gave %+v, %+v", reference, m.Artifact, fresh)
		}
	}
	_, _, err := s.catalog.Resolve(t.Context(), "library", "app", "v2")
	wantKind(t, err, fault.NotFound, "MANIFEST_UNKNOWN")
	_, _, err = s.catalog.Resolve(t.Context(), "library", "nothing", "v2")
	wantKind(t, err, fault.NotFound, "NAME_UNKNOWN")

	// The same again writes nothing.
	before := s.revision()
	again := s.mustPush("app", "v1", body)
	if s.revision() != before || again.ID != a.ID {
		t.Fatalf("the second push wrote something: %+v", again)
	}
	_, entries := s.log()
	var kinds []string
	for _, e := range entries {
		decoded, err := entry.Decode(e.Value)
		must(t, err)
		kinds = append(kinds, decoded.Kind)
	}
	if diff := cmp.Diff([]string{entry.ProjectPut, entry.ArtifactPut, entry.TagPut}, kinds); diff != "" {
		t.Fatal(diff)
	}
}

func TestPushRefusals(t *testing.T) {
	s := newSite(t, "site-a")
	body := s.image("app", "one")

	_, err := s.catalog.Put(t.Context(), catalog.Push{Project: "none", Repository: "app", Bytes: body, At: time.Now()})
	wantKind(t, err, fault.NotFound, "NAME_UNKNOWN")
	_, err = s.push("other", "v1", body) // its blobs are linked elsewhere only
	wantKind(t, err, fault.Invalid, "MANIFEST_BLOB_UNKNOWN")
	if _, _, detail := fault.Public(err); len(detail.([]string)) != 2 {
		t.Fatalf("detail is %v", detail)
	}
	_, err = s.catalog.Put(t.Context(), catalog.Push{Project: "library", Repository: "app", Bytes: body, Digest: digest.FromString("x"), At: time.Now()})
	wantKind(t, err, fault.Invalid, "DIGEST_INVALID")
	_, err = s.push("App", "v1", body)
	wantKind(t, err, fault.Invalid, "NAME_INVALID")
	_, err = s.push("app", "-v1", body)
	wantKind(t, err, fault.Invalid, "TAG_INVALID")

	index := v1.Index{MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{
		{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromBytes(body), Size: int64(len(body))},
	}}
	index.SchemaVersion = 2
	_, err = s.push("app", "v1", encode(t, index))
	wantKind(t, err, fault.Invalid, "MANIFEST_BLOB_UNKNOWN")

	lying := strings.Replace(string(body), `"size":9`, `"size":8`, 1)
	if lying == string(body) {
		t.Fatal("the manifest has no size to falsify")
	}
	_, err = s.push("app", "v1", []byte(lying))
	wantKind(t, err, fault.Invalid, "MANIFEST_INVALID")
}

func TestForeignLayersNeedNotBeHere(t *testing.T) {
	s := newSite(t, "site-a")
	body := s.image("app", "one", func(m *v1.Manifest) {
		m.Layers = append(m.Layers, v1.Descriptor{
			MediaType: "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Digest: digest.FromString("elsewhere"), Size: 1,
		})
	})
	s.mustPush("app", "v1", body)
}

func TestLargeManifest(t *testing.T) {
	s := newSite(t, "site-a")
	body := s.image("app", "one", note(strings.Repeat("x", catalog.MaxRow)))
	a := s.mustPush("app", "v1", body)
	m, _, err := s.catalog.Resolve(t.Context(), "library", "app", "v1")
	must(t, err)
	if string(m.Bytes) != string(body) {
		t.Fatal("other bytes came back")
	}
	wantKind(t, s.records.Condemn(t.Context(), a.Digest), fault.Precondition, "")
	must(t, s.catalog.DeleteManifest(t.Context(), "library", "app", a.Digest, "admin"))
	must(t, s.records.Condemn(t.Context(), a.Digest))
}

func TestConcurrentPushesLoseNothing(t *testing.T) {
	s := newSite(t, "site-a")
	const n = 24
	bodies := make([][]byte, n)
	for i := range bodies {
		bodies[i] = s.image("app", fmt.Sprint(i%8))
	}
	var wait sync.WaitGroup
	failures := make([]error, n)
	for i := range bodies {
		wait.Go(func() { _, failures[i] = s.push("app", fmt.Sprintf("v%02d", i), bodies[i]) })
	}
	wait.Wait()
	must(t, errors.Join(failures...))
	tags, page, err := s.catalog.Tags(t.Context(), "library", "app", "", 0)
	must(t, err)
	if len(tags) != n || page.More {
		t.Fatalf("%d tags, more %v", len(tags), page.More)
	}
	for i, tag := range tags {
		if tag.Digest != digest.FromBytes(bodies[i]) {
			t.Fatalf("tag %s is %s", tag.Name, tag.Digest)
		}
	}
	_, entries := s.log()
	if len(entries) != 1+8+n {
		t.Fatalf("%d entries", len(entries))
	}
	// The log replays to the state that the rows hold.
	var state entry.State
	for _, e := range entries {
		decoded, err := entry.Decode(e.Value)
		must(t, err)
		must(t, state.Apply(decoded))
	}
	replayed, err := state.Root()
	must(t, err)
	if replayed != s.root("library") {
		t.Fatal("the log and the rows disagree")
	}
}

// A push and the condemnation of its blob race: whoever wins, a manifest that is
// there has live blobs.
func TestPushRacesCondemn(t *testing.T) {
	s := newSite(t, "site-a")
	for i := range 40 {
		repository := fmt.Sprintf("app%d", i)
		body := s.image(repository, fmt.Sprint("race ", i))
		layer := digest.FromString(fmt.Sprint("layer race ", i))
		var wait sync.WaitGroup
		var pushed error
		wait.Go(func() { _, pushed = s.push(repository, "v1", body) })
		wait.Go(func() {
			if err := s.records.Condemn(t.Context(), layer); err == nil {
				_ = s.records.Gone(t.Context(), layer, time.Now().Add(time.Hour)) // may be revived by then
			}
		})
		wait.Wait()
		if pushed != nil {
			wantKind(t, pushed, fault.Invalid, "MANIFEST_BLOB_UNKNOWN")
			continue
		}
		s.view(func(v *table.View) error {
			b, ok, err := s.records.Get(v, layer)
			if !ok || b.State != blobs.Live {
				t.Errorf("round %d: the layer of a pushed manifest is %v", i, b.State)
			}
			return err
		})
	}
}

func TestTagMovesAndPages(t *testing.T) {
	s := newSite(t, "site-a")
	one, two := s.image("app", "one"), s.image("app", "two")
	for _, tag := range []string{"c", "a", "b", "B"} {
		s.mustPush("app", tag, one)
	}
	s.mustPush("app", "b", two)
	var got []string
	for after, more := "", true; more; {
		tags, page, err := s.catalog.Tags(t.Context(), "library", "app", after, 3)
		must(t, err)
		more = page.More
		for _, tag := range tags {
			got = append(got, tag.Name)
			after = tag.Name
		}
	}
	if diff := cmp.Diff([]string{"B", "a", "b", "c"}, got); diff != "" {
		t.Fatal(diff)
	}
	// Only the tags that are left go with the artifact.
	must(t, s.catalog.DeleteManifest(t.Context(), "library", "app", digest.FromBytes(one), "admin"))
	tags, _, err := s.catalog.Tags(t.Context(), "library", "app", "", 0)
	must(t, err)
	if len(tags) != 1 || tags[0].Name != "b" {
		t.Fatalf("tags are %+v", tags)
	}
	repositories, page, err := s.catalog.Repositories(t.Context(), "", "library/aaa", 10)
	must(t, err)
	if len(repositories) != 1 || page.More || repositories[0].Name != "app" {
		t.Fatalf("repositories are %+v", repositories)
	}
	_, _, err = s.catalog.Tags(t.Context(), "library", "none", "", 0)
	wantKind(t, err, fault.NotFound, "NAME_UNKNOWN")
}

func TestReferrers(t *testing.T) {
	s := newSite(t, "site-a")
	body := s.image("app", "one")
	target := v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromBytes(body), Size: int64(len(body))}
	// The subject need not be there yet.
	for i := range 5 {
		s.mustPush("app", "", s.image("app", fmt.Sprint("sbom ", i), subject(target), kind("application/spdx"), note(fmt.Sprint(i))))
	}
	s.mustPush("app", "", s.image("app", "signature", subject(target)))
	s.mustPush("app", "v1", body)

	var got []v1.Descriptor
	q := catalog.Referrers{Project: "library", Repository: "app", Subject: target.Digest, ArtifactType: "application/spdx", N: 2}
	for more := true; more; {
		list, page, err := s.catalog.Referrers(t.Context(), q)
		must(t, err)
		more = page.More
		got = append(got, list...)
		q.After = list[len(list)-1].Digest
	}
	if len(got) != 5 {
		t.Fatalf("%d referrers", len(got))
	}
	for i, d := range got {
		if i > 0 && d.Digest <= got[i-1].Digest || d.ArtifactType != "application/spdx" || d.Annotations["note"] == "" {
			t.Fatalf("referrers are %+v", got)
		}
	}
	all, _, err := s.catalog.Referrers(t.Context(), catalog.Referrers{Project: "library", Repository: "app", Subject: target.Digest})
	must(t, err)
	if len(all) != 6 {
		t.Fatalf("%d referrers of any type", len(all))
	}
	must(t, s.catalog.DeleteManifest(t.Context(), "library", "app", got[0].Digest, "admin"))
	all, _, err = s.catalog.Referrers(t.Context(), catalog.Referrers{Project: "library", Repository: "app", Subject: target.Digest})
	must(t, err)
	if len(all) != 5 {
		t.Fatalf("%d referrers after one was deleted", len(all))
	}
}

func TestDelete(t *testing.T) {
	s := newSite(t, "site-a")
	child := s.mustPush("app", "", s.image("app", "one"))
	index := v1.Index{MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{describe(child)}}
	index.SchemaVersion = 2
	parent := s.mustPush("app", "latest", encode(t, index))
	ctx := t.Context()

	wantKind(t, s.catalog.DeleteManifest(ctx, "library", "app", child.Digest, "admin"), fault.Precondition, "DENIED")
	must(t, s.catalog.DeleteTag(ctx, "library", "app", "latest", "admin"))
	wantKind(t, s.catalog.DeleteTag(ctx, "library", "app", "latest", "admin"), fault.NotFound, "MANIFEST_UNKNOWN")
	_, _, err := s.catalog.Resolve(ctx, "library", "app", parent.Digest.String())
	must(t, err)
	must(t, s.catalog.DeleteManifest(ctx, "library", "app", parent.Digest, "admin"))
	wantKind(t, s.catalog.DeleteManifest(ctx, "library", "app", parent.Digest, "admin"), fault.NotFound, "MANIFEST_UNKNOWN")
	layer := digest.FromString("layer one")
	wantKind(t, s.records.Condemn(ctx, layer), fault.Precondition, "") // the child needs it
	must(t, s.catalog.DeleteManifest(ctx, "library", "app", child.Digest, "admin"))
	must(t, s.records.Condemn(ctx, layer))

	// What was deleted can be pushed again.
	s.mustPush("app", "latest", s.image("app", "one"))
}

func TestManyTagsGoWithTheirManifest(t *testing.T) {
	s := newSite(t, "site-a")
	body := s.image("app", "one")
	for i := range 450 {
		s.mustPush("app", fmt.Sprintf("v%d", i), body)
	}
	must(t, s.catalog.DeleteManifest(t.Context(), "library", "app", digest.FromBytes(body), "admin"))
	tags, _, err := s.catalog.Tags(t.Context(), "library", "app", "", 0)
	must(t, err)
	if len(tags) != 0 {
		t.Fatalf("%d tags are left", len(tags))
	}
}

func TestDeleteRepositoryThenProject(t *testing.T) {
	s := newSite(t, "site-a")
	ctx := t.Context()
	child := s.mustPush("deep/app", "v1", s.image("deep/app", "one"))
	index := v1.Index{MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{describe(child)}}
	index.SchemaVersion = 2
	s.mustPush("deep/app", "latest", encode(t, index))
	wantKind(t, s.projects.Delete(ctx, "library"), fault.Precondition, "")
	must(t, s.catalog.DeleteRepository(ctx, "library", "deep/app", "admin"))
	wantKind(t, s.catalog.DeleteRepository(ctx, "library", "deep/app", "admin"), fault.NotFound, "NAME_UNKNOWN")
	s.blob("upload/only", "never pushed")
	must(t, s.projects.Delete(ctx, "library"))
	s.view(func(v *table.View) error {
		_, linked, err := s.records.LinkedIn(v, 10, "library")
		if len(linked) > 0 {
			t.Errorf("links are left: %v", linked)
		}
		return err
	})
	_, err := s.push("deep/app", "v1", s.image("deep/app", "one"))
	wantKind(t, err, fault.NotFound, "NAME_UNKNOWN")
}

// gate answers as it is told.
type gate struct {
	verdict catalog.Verdict
	push    error
	pull    error
}

func (g *gate) AdmitPush(context.Context, *table.Tx, catalog.Push) (catalog.Verdict, error) {
	return g.verdict, g.push
}
func (g *gate) AdmitPull(context.Context, *table.View, catalog.Pull) error { return g.pull }

func TestGates(t *testing.T) {
	g := &gate{push: fault.New(fault.Denied, "not today")}
	s := newSite(t, "site-a", g)
	body := s.image("app", "one")
	_, err := s.push("app", "v1", body)
	wantKind(t, err, fault.Denied, "")

	g.push, g.verdict = nil, catalog.Hold
	s.mustPush("app", "v1", body)
	_, _, err = s.catalog.Resolve(t.Context(), "library", "app", "v1")
	wantKind(t, err, fault.Precondition, "")
	tags, _, err := s.catalog.Tags(t.Context(), "library", "app", "", 0)
	must(t, err)
	if len(tags) != 1 {
		t.Fatal("what is held back must be listed")
	}

	g.verdict, g.pull = catalog.Allow, fault.New(fault.Denied, "not for you")
	s.mustPush("app", "v2", s.image("app", "two"))
	_, _, err = s.catalog.Resolve(t.Context(), "library", "app", "v2")
	wantKind(t, err, fault.Denied, "")
}

func TestEventsFollowCommits(t *testing.T) {
	s := newSite(t, "site-a")
	ctx, stop := context.WithCancel(t.Context())
	got := make(chan catalog.Pushed, 10)
	ready := make(chan struct{})
	var wait sync.WaitGroup
	wait.Go(func() {
		var once sync.Once
		s.catalog.Pushed.Each(ctx, 10, func(e catalog.Pushed, _ int) {
			once.Do(func() { close(ready) })
			if e.Repository == "app" {
				got <- e
			}
		})
	})
	for subscribed := false; !subscribed; { // until the subscription is there
		s.catalog.Pushed.Publish(catalog.Pushed{Repository: "probe"})
		select {
		case <-ready:
			subscribed = true
		default:
		}
	}
	s.mustPush("app", "v1", s.image("app", "one"))
	e := <-got
	if e.Tag != "v1" || e.Carrier != catalog.Client || e.Actor != "admin" {
		t.Fatalf("event is %+v", e)
	}
	stop()
	wait.Wait()
}
