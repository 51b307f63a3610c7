package adopt_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/adopt"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/journal"
	"github.com/atoll-registry/atoll/node/project"
	"github.com/atoll-registry/atoll/node/rest"
)

// site is the room over the real catalog and store.
type site struct {
	t        *testing.T
	db       *table.DB
	store    *blobs.Store
	projects *project.Projects
	catalog  *catalog.Catalog
	gate     gate
	url      string
	dir      string // of the store
}

type plainSealer struct{}

func (plainSealer) Seal(_ string, plain []byte) ([]byte, error)    { return plain, nil }
func (plainSealer) Unseal(_ string, sealed []byte) ([]byte, error) { return sealed, nil }

// big keeps large manifests with the blobs, as a node does.
type big struct{ s *site }

func (b big) Put(ctx context.Context, d digest.Digest, body []byte) error {
	_, err := b.s.store.Put(ctx, d, bytes.NewReader(body))
	return err
}

func (b big) Read(_ context.Context, d digest.Digest) ([]byte, error) {
	f, _, err := b.s.store.OpenBlob(d)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

type one struct{}

func (one) Ensure(context.Context, []digest.Digest) (int, error) { return 1, nil }

// gate refuses one repository.
type gate struct{ refused string }

func (g *gate) AdmitPush(_ context.Context, _ *table.Tx, p catalog.Push) (catalog.Verdict, error) {
	if p.Carrier != catalog.Adopted {
		return catalog.Allow, fault.New(fault.Internal, "carrier %s", p.Carrier)
	}
	if p.Repository == g.refused {
		return catalog.Allow, fault.New(fault.Denied, "the gate refuses it")
	}
	return catalog.Allow, nil
}

func (g *gate) AdmitPull(context.Context, *table.View, catalog.Pull) error { return nil }

type everybody struct{}

func (everybody) Authenticate(*http.Request) (access.Principal, error) {
	return access.Principal{Name: "tester"}, nil
}

func (everybody) Allow(context.Context, access.Principal, access.Permission, string) error {
	return nil
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{t: t, db: tabletest.Open(t), dir: filepath.Join(t.TempDir(), "content")}
	log := slog.New(slog.DiscardHandler)
	var err error
	s.store, err = blobs.Open(s.dir, blobs.Options{})
	must(t, err)
	records, j := blobs.NewRecords(s.db), journal.New(s.db, plainSealer{})
	s.projects = project.New(s.db, j)
	s.catalog, err = catalog.New(catalog.Config{DB: s.db, Records: records, Journal: j, Projects: s.projects, Big: big{s}, Gates: []catalog.Gate{&s.gate}})
	must(t, err)
	s.projects.Attach(s.catalog)
	room := adopt.New(adopt.Config{DB: s.db, Projects: s.projects, Catalog: s.catalog, Store: s.store, Records: records, Copies: one{}, Log: log})
	k, err := rest.New(rest.Config{Log: log, Registerer: prometheus.NewRegistry(), Authenticator: everybody{}, Guard: everybody{}, Version: "test"})
	must(t, err)
	room.Operations(k)
	server := httptest.NewServer(k.Handler())
	t.Cleanup(server.Close)
	s.url = server.URL
	tabletest.Start(t, s.db)
	_, err = j.EnsureSite(t.Context(), "here", "here")
	must(t, err)
	must(t, s.projects.EnsureLibrary(t.Context(), "admin"))
	return s
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// ask adopts through the API and gives what is refused as an error.
func (s *site) ask(r adopt.Request) (adopt.Report, error) {
	s.t.Helper()
	body, err := json.Marshal(r)
	must(s.t, err)
	req, _ := http.NewRequestWithContext(s.t.Context(), http.MethodPost, s.url+"/api/atoll/v1/adopt", bytes.NewReader(body))
	req.Header.Set("Content-Type", "application/json")
	answer, err := http.DefaultClient.Do(req)
	must(s.t, err)
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(answer.Body)
		return adopt.Report{}, fault.New(fault.Invalid, "%s: %s", answer.Status, text)
	}
	for lines := json.NewDecoder(answer.Body); ; {
		var line adopt.Line
		must(s.t, lines.Decode(&line))
		if line.Failure != "" {
			s.t.Fatalf("the work broke off: %s", line.Failure)
		}
		if line.Report != nil {
			return *line.Report, nil
		}
	}
}

func (s *site) adopt(r adopt.Request) adopt.Report {
	s.t.Helper()
	report, err := s.ask(r)
	must(s.t, err)
	return report
}

// serves fails the test unless the repository serves exactly this manifest and
// all blobs that it names.
func (s *site) serves(project, repository, reference string, want []byte) {
	s.t.Helper()
	m, _, err := s.catalog.Resolve(s.t.Context(), project, repository, reference)
	if err != nil || !bytes.Equal(m.Bytes, want) {
		s.t.Fatalf("%s/%s:%s: %d bytes, %v", project, repository, reference, len(m.Bytes), err)
	}
	doc, err := catalog.ParseManifest(m.MediaType, m.Bytes)
	must(s.t, err)
	for _, b := range doc.Blobs() {
		f, _, err := s.store.OpenBlob(b.Digest)
		must(s.t, err)
		got, err := io.ReadAll(f)
		f.Close()
		if err != nil || digest.FromBytes(got) != b.Digest {
			s.t.Fatalf("blob %s reads as %d bytes, %v", b.Digest, len(got), err)
		}
	}
}

func (s *site) lacks(project, repository, reference string) {
	s.t.Helper()
	if _, _, err := s.catalog.Resolve(s.t.Context(), project, repository, reference); !fault.Is(err, fault.NotFound) {
		s.t.Fatalf("%s/%s:%s: %v, and should not be there", project, repository, reference, err)
	}
}

// writer lays out a registry's storage by its documentation.
type writer interface {
	blob(repository string, content []byte) digest.Digest
	manifest(repository, tag, mediaType string, body []byte) v1.Descriptor
	file(repository string, d digest.Digest) string
}

func write(t *testing.T, name string, content []byte) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(name), 0o755))
	must(t, os.WriteFile(name, content, 0o644))
}

// distribution writes docker/registry/v2.
type distribution struct {
	t   *testing.T
	dir string
}

func (w distribution) root() string { return filepath.Join(w.dir, "docker", "registry", "v2") }

func (w distribution) file(_ string, d digest.Digest) string {
	return filepath.Join(w.root(), "blobs", "sha256", d.Encoded()[:2], d.Encoded(), "data")
}

func (w distribution) blob(repository string, content []byte) digest.Digest {
	d := digest.FromBytes(content)
	write(w.t, w.file(repository, d), content)
	write(w.t, filepath.Join(w.root(), "repositories", repository, "_layers", "sha256", d.Encoded(), "link"), []byte(d))
	return d
}

func (w distribution) manifest(repository, tag, mediaType string, body []byte) v1.Descriptor {
	d := digest.FromBytes(body)
	write(w.t, w.file(repository, d), body)
	top := filepath.Join(w.root(), "repositories", repository, "_manifests")
	write(w.t, filepath.Join(top, "revisions", "sha256", d.Encoded(), "link"), []byte(d))
	if tag != "" {
		write(w.t, filepath.Join(top, "tags", tag, "current", "link"), []byte(d))
		write(w.t, filepath.Join(top, "tags", tag, "index", "sha256", d.Encoded(), "link"), []byte(d))
	}
	return v1.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(body))}
}

// sharing is how a zot keeps a blob that several of its repositories have.
type sharing int

const (
	asLinks  sharing = iota // "dedupe": true
	asCopies                // "dedupe": false
	asEmpty                 // files of no bytes, which dedupe makes in an object store
)

// zot writes what zot 2.1 leaves in its directory: an OCI layout for each
// repository, one of which may be inside another.
type zot struct {
	t       *testing.T
	dir     string
	sharing sharing
	first   map[digest.Digest]string
	indexes map[string]*v1.Index
}

func newZot(t *testing.T, s sharing) *zot {
	return &zot{t: t, dir: t.TempDir(), sharing: s, first: map[digest.Digest]string{}, indexes: map[string]*v1.Index{}}
}

func (w *zot) file(repository string, d digest.Digest) string {
	return filepath.Join(w.dir, repository, "blobs", "sha256", d.Encoded())
}

func (w *zot) blob(repository string, content []byte) digest.Digest {
	d := digest.FromBytes(content)
	name := w.file(repository, d)
	first, known := w.first[d]
	switch {
	case !known || first == name || w.sharing == asCopies:
		w.first[d] = name
		write(w.t, name, content)
	case w.sharing == asEmpty:
		write(w.t, name, nil)
	default:
		must(w.t, os.MkdirAll(filepath.Dir(name), 0o755))
		must(w.t, os.Link(first, name))
	}
	return d
}

func (w *zot) manifest(repository, tag, mediaType string, body []byte) v1.Descriptor {
	d := v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(body), Size: int64(len(body))}
	write(w.t, w.file(repository, d.Digest), body) // a manifest is not shared
	index := w.indexes[repository]
	if index == nil {
		index = &v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}} // it names no media type
		w.indexes[repository] = index
	}
	listed := d
	if tag != "" {
		listed.Annotations = map[string]string{v1.AnnotationRefName: tag}
	}
	index.Manifests = append(index.Manifests, listed)
	text, err := json.Marshal(index)
	must(w.t, err)
	write(w.t, filepath.Join(w.dir, repository, "index.json"), text)
	write(w.t, filepath.Join(w.dir, repository, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`))
	write(w.t, filepath.Join(w.dir, repository, ".uploads", "half"), []byte("half a layer"))
	own := "cache.db"
	if w.sharing == asCopies {
		own = "_restore_complete"
	}
	write(w.t, filepath.Join(w.dir, own), []byte("what zot keeps for itself"))
	return d
}

// place is a repository of a layout.
type place struct {
	writer
	t          *testing.T
	repository string
}

// image is an image of a seed; layers of one base are shared.
func (w place) image(seed, mediaType string, subject *v1.Descriptor) []byte {
	w.t.Helper()
	repository := w.repository
	blob := func(kind, content string) v1.Descriptor {
		return v1.Descriptor{MediaType: kind, Digest: w.blob(repository, []byte(content)), Size: int64(len(content))}
	}
	m := v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: mediaType, Subject: subject,
		Config: blob(v1.MediaTypeImageConfig, "config "+seed),
		Layers: []v1.Descriptor{blob(v1.MediaTypeImageLayerGzip, strings.Repeat("base", 1<<18)), blob(v1.MediaTypeImageLayerGzip, "layer "+seed)},
	}
	body, err := json.Marshal(m)
	must(w.t, err)
	return body
}

// filled is what fill wrote.
type filled struct {
	app, unnamed, index, referrer, team []byte
	appOne                              v1.Descriptor
}

// fill writes two repositories: an image, one that does not say what it is, an
// index over both, a referrer, and an image in a project.
func fill(t *testing.T, w writer) filled {
	t.Helper()
	var f filled
	f.app = place{w, t, "app"}.image("one", v1.MediaTypeImageManifest, nil)
	f.appOne = w.manifest("app", "v1", v1.MediaTypeImageManifest, f.app)
	f.unnamed = place{w, t, "app"}.image("two", "", nil)
	two := w.manifest("app", "", v1.MediaTypeImageManifest, f.unnamed)
	var err error
	f.index, err = json.Marshal(v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{f.appOne, two}})
	must(t, err)
	w.manifest("app", "latest", v1.MediaTypeImageIndex, f.index)
	f.referrer = place{w, t, "app"}.image("signature", v1.MediaTypeImageManifest, &f.appOne)
	w.manifest("app", "", v1.MediaTypeImageManifest, f.referrer)
	f.team = place{w, t, "team/sub/tool"}.image("three", v1.MediaTypeImageManifest, nil)
	w.manifest("team/sub/tool", "v1", v1.MediaTypeImageManifest, f.team)
	return f
}

// writers are the layouts, each in a directory of its own.
func writers(t *testing.T) map[string]struct {
	writer
	dir string
} {
	linked, copied, empty := newZot(t, asLinks), newZot(t, asCopies), newZot(t, asEmpty)
	plain := distribution{t, t.TempDir()}
	return map[string]struct {
		writer
		dir string
	}{"distribution": {plain, plain.dir}, "zot": {linked, linked.dir}, "zot without dedupe": {copied, copied.dir}, "zot without links": {empty, empty.dir}}
}

func TestAdopt(t *testing.T) {
	for name, w := range writers(t) {
		t.Run(name, func(t *testing.T) {
			f := fill(t, w)
			s := newSite(t)
			dry := s.adopt(adopt.Request{Dir: w.dir, DryRun: true})
			if dry.Repositories != 2 || dry.Manifests != 5 || dry.Tags != 3 || len(dry.Problems) != 0 {
				t.Fatalf("a dry run reports %+v", dry)
			}
			s.lacks("library", "app", "v1")
			report := s.adopt(adopt.Request{Dir: w.dir})
			if report.Repositories != 2 || report.Manifests != 5 || report.Tags != 3 || len(report.Problems) != 0 {
				t.Fatalf("the report is %+v", report)
			}
			if report.Blobs.Linked != 9 || report.Blobs.Copied != 0 {
				t.Fatalf("blobs on one file system are to be linked: %+v", report.Blobs)
			}
			s.serves("library", "app", "v1", f.app)
			s.serves("library", "app", "latest", f.index)
			s.serves("library", "app", digest.FromBytes(f.unnamed).String(), f.unnamed)
			s.serves("team", "sub/tool", "v1", f.team)
			list, _, err := s.catalog.Referrers(t.Context(), catalog.Referrers{Project: "library", Repository: "app", Subject: f.appOne.Digest, N: 10})
			if err != nil || len(list) != 1 || list[0].Digest != digest.FromBytes(f.referrer) {
				t.Fatalf("the referrers are %v, %v", list, err)
			}
			again := s.adopt(adopt.Request{Dir: w.dir})
			if again.Blobs.Linked != 0 || again.Blobs.Copied != 0 || again.Tags != 3 || len(again.Problems) != 0 {
				t.Fatalf("adopting again does something: %+v", again)
			}
		})
	}
}

// A repository may lie inside another.
func TestNested(t *testing.T) {
	w := newZot(t, asLinks)
	var bodies [][]byte
	names := []string{"team/tool", "team/tool/extra"}
	for _, name := range names {
		body := place{w, t, name}.image(name, v1.MediaTypeImageManifest, nil)
		w.manifest(name, "v1", v1.MediaTypeImageManifest, body)
		bodies = append(bodies, body)
	}
	s := newSite(t)
	if report := s.adopt(adopt.Request{Dir: w.dir}); report.Repositories != 2 || report.Tags != 2 || len(report.Problems) != 0 {
		t.Fatalf("the report is %+v", report)
	}
	s.serves("team", "tool", "v1", bodies[0])
	s.serves("team", "tool/extra", "v1", bodies[1])
}

// All goes into one project under whole names, and copies share nothing with the
// directory.
func TestIntoProject(t *testing.T) {
	for name, w := range writers(t) {
		t.Run(name, func(t *testing.T) {
			f := fill(t, w)
			s := newSite(t)
			report := s.adopt(adopt.Request{Dir: w.dir, Project: "old", Copy: true})
			if report.Blobs.Linked != 0 || report.Blobs.Copied != 9 || len(report.Problems) != 0 {
				t.Fatalf("the report is %+v", report)
			}
			must(t, os.RemoveAll(w.dir))
			s.serves("old", "app", "v1", f.app)
			s.serves("old", "team/sub/tool", "v1", f.team)
		})
	}
}

// What is damaged or missing is named, nothing that needs it comes in, and the
// rest does. When it is mended, adopting again completes it.
func TestDamage(t *testing.T) {
	for name, w := range writers(t) {
		t.Run(name, func(t *testing.T) {
			f := fill(t, w)
			layer := []byte("layer two")
			file := w.file("app", digest.FromBytes(layer))
			write(t, file, []byte("layer twO"))
			s := newSite(t)
			report := s.adopt(adopt.Request{Dir: w.dir})
			// The image, the index that lists it, and the index's tag.
			if len(report.Problems) != 3 || report.Manifests != 3 || report.Tags != 2 {
				t.Fatalf("the report is %+v", report)
			}
			if first := report.Problems[0]; first.Digest != digest.FromBytes(f.unnamed).String() || !strings.Contains(first.Reason, digest.FromBytes(layer).String()) {
				t.Fatalf("the damaged blob is not named: %+v", first)
			}
			s.serves("library", "app", "v1", f.app)
			s.lacks("library", "app", "latest")
			write(t, file, layer)
			if report := s.adopt(adopt.Request{Dir: w.dir}); len(report.Problems) != 0 || report.Blobs.Linked != 1 {
				t.Fatalf("the report of what was mended is %+v", report)
			}
			s.serves("library", "app", "latest", f.index)
		})
	}
}

// A tag that was pushed here after the first time stays where it points.
func TestNewerTagStays(t *testing.T) {
	w := distribution{t, t.TempDir()}
	f := fill(t, w)
	s := newSite(t)
	s.adopt(adopt.Request{Dir: w.dir})
	push := catalog.Push{Project: "library", Repository: "app", Tag: "v1", MediaType: v1.MediaTypeImageManifest, Bytes: f.referrer,
		Carrier: catalog.Adopted, At: time.Now()}
	_, err := s.catalog.Put(t.Context(), push)
	must(t, err)
	report := s.adopt(adopt.Request{Dir: w.dir})
	if len(report.Problems) != 1 || report.Problems[0].Tag != "v1" {
		t.Fatalf("the report is %+v", report)
	}
	s.serves("library", "app", "v1", f.referrer)
}

// Gates are asked, and a name that is none here is no reason to stop.
func TestRefusals(t *testing.T) {
	w := distribution{t, t.TempDir()}
	f := fill(t, w)
	other := place{w, t, "Bad_/name"}.image("four", v1.MediaTypeImageManifest, nil)
	w.manifest("Bad_/name", "v1", v1.MediaTypeImageManifest, other)
	write(t, filepath.Join(w.root(), "repositories", "app", "_manifests", "tags", "torn", "current", "link"), []byte("sha256:12"))
	s := newSite(t)
	s.gate.refused = "app"
	report := s.adopt(adopt.Request{Dir: w.dir})
	if report.Manifests != 1 || report.Tags != 1 {
		t.Fatalf("the report is %+v", report)
	}
	text, _ := json.Marshal(report.Problems)
	for _, want := range []string{"Bad_/name", "torn", "the gate refuses it"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the problems do not name %q: %s", want, text)
		}
	}
	s.lacks("library", "app", "v1")
	s.serves("team", "sub/tool", "v1", f.team)
	for _, dir := range []string{"relative", "/none/such", t.TempDir()} {
		if _, err := s.ask(adopt.Request{Dir: dir}); err == nil {
			t.Errorf("%s is adopted", dir)
		}
	}
}
