package offline

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/airgap"
	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/journal"
	"github.com/atoll-registry/atoll/node/project"
	"github.com/atoll-registry/atoll/node/rest"
)

// site is one node's worth of rooms, with the store in a directory.
type site struct {
	*Offline
	t         testing.TB
	id        string
	algorithm digest.Algorithm // by which what is pushed is named; "" is sha256
	dir       string
	backend   *tabletest.Backend
	reads     *watched
	copies    *copies
	server    *httptest.Server
	elsewhere elsewhere
	trusts    trusts
}

// plainSealer keeps secrets as they are: nobody steals a test.
type plainSealer struct{}

func (plainSealer) Seal(_ string, plain []byte) ([]byte, error)    { return plain, nil }
func (plainSealer) Unseal(_ string, sealed []byte) ([]byte, error) { return sealed, nil }

// watched counts the views of the database that are open.
type watched struct {
	kv.Engine
	open atomic.Int64
}

func (w *watched) Read(fn func(kv.Content) error) error {
	w.open.Add(1)
	defer w.open.Add(-1)
	return w.Engine.Read(fn)
}

// copies says how many there are, after what a test wants to happen first.
type copies struct {
	mu    sync.Mutex
	calls int
	do    func([]digest.Digest) error
}

func (c *copies) Ensure(_ context.Context, ds []digest.Digest) (int, error) {
	c.mu.Lock()
	c.calls++
	do := c.do
	c.mu.Unlock()
	if do != nil {
		return 0, do(ds)
	}
	return 1, nil
}

func (c *copies) set(do func([]digest.Digest) error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.do, c.calls = do, 0
}

// elsewhere are the blobs of another node of the site.
type elsewhere struct {
	held map[digest.Digest][]byte
	look func() // at each read
}

type remote struct {
	*bytes.Reader
	look func()
}

func (r remote) Read(p []byte) (int, error) {
	if r.look != nil {
		r.look()
	}
	return r.Reader.Read(p)
}

func (remote) Close() error { return nil }

func (e *elsewhere) Open(_ context.Context, d digest.Digest, _ int64) (io.ReadSeekCloser, error) {
	b, ok := e.held[d]
	if !ok {
		return nil, fault.New(fault.Unavailable, "no node that is up holds %s", d)
	}
	return remote{bytes.NewReader(b), e.look}, nil
}

// trusts plays the room that keeps the trusted sites.
type trusts struct {
	s     *site
	known map[string]airgap.Trust
	chain map[string]entry.KeyChain
}

func (r *trusts) Self() (site airgap.Site, err error) {
	err = r.s.DB.View(func(v *table.View) error {
		self, err := r.s.Journal.Site(v)
		site = airgap.Site{ID: self.ID, Incarnation: self.Incarnation, Name: self.Name, RootKey: self.Root, Fingerprint: self.Root.Fingerprint()}
		return err
	})
	return site, err
}

func (r *trusts) All(context.Context) (all []airgap.Trust, err error) {
	for _, t := range r.known {
		all = append(all, t)
	}
	return all, nil
}

func (r *trusts) Saw(_ *table.Tx, id string, _ uint64, chain entry.KeyChain) error {
	r.chain[id] = chain
	return nil
}

func (r *trusts) KeyChain(_ table.Reader, id string) (entry.KeyChain, error) {
	if chain, ok := r.chain[id]; ok {
		return chain, nil
	}
	return nil, fault.New(fault.NotFound, "no keys of %s", id)
}

// big keeps large manifests among the blobs, as a node does.
type big struct{ *site }

func (b big) Put(ctx context.Context, d digest.Digest, body []byte) error {
	if _, err := b.Store.Put(ctx, d, bytes.NewReader(body)); err != nil {
		return err
	}
	_, err := b.DB.Update(ctx, func(tx *table.Tx) error { return b.Records.Live(tx, d, int64(len(body))) })
	return err
}

func (b big) Read(_ context.Context, d digest.Digest) ([]byte, error) {
	f, _, err := b.Store.OpenBlob(d)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

func newSite(t testing.TB, id string) *site {
	t.Helper()
	s := &site{t: t, id: id, dir: t.TempDir(), reads: &watched{Engine: kv.NewMemory()}, copies: &copies{}}
	s.elsewhere.held = map[digest.Digest][]byte{}
	s.trusts = trusts{s, map[string]airgap.Trust{}, map[string]entry.KeyChain{}}
	log := slog.New(slog.DiscardHandler)
	db := table.New(s.reads, log)
	store, err := blobs.Open(filepath.Join(s.dir, "content"), blobs.Options{})
	must(t, err)
	c := Config{DB: db, Store: store, Records: blobs.NewRecords(db), Journal: journal.New(db, plainSealer{}), Copies: s.copies, Fetcher: &s.elsewhere, Trusts: &s.trusts, MinFree: func() int64 { return 0 }, Log: log}
	c.Projects = project.New(db, c.Journal)
	c.Catalog, err = catalog.New(catalog.Config{DB: db, Records: c.Records, Journal: c.Journal, Projects: c.Projects, Big: big{s}})
	must(t, err)
	c.Projects.Attach(c.Catalog)
	s.Offline = New(c)
	s.backend = tabletest.Start(t, db)
	_, err = c.Journal.EnsureSite(t.Context(), id, id)
	must(t, err)
	must(t, c.Projects.EnsureLibrary(t.Context(), "admin"))
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// trust makes s accept projects of another site.
func (s *site) trust(other *site, accept ...string) {
	s.t.Helper()
	who, err := other.trusts.Self()
	must(s.t, err)
	s.trusts.known[who.ID] = airgap.Trust{Site: who, Accept: accept}
}

// project makes an empty project.
func (s *site) project(name string) {
	s.t.Helper()
	_, err := s.Projects.Create(s.t.Context(), project.Draft{Name: name})
	must(s.t, err)
}

// blob gives a repository a blob, whose bytes this node holds.
func (s *site) blob(place, mediaType string, b []byte) v1.Descriptor {
	s.t.Helper()
	name, repository, _ := strings.Cut(place, "/")
	d := s.digest(b)
	info, err := s.Store.Put(s.t.Context(), d, bytes.NewReader(b))
	must(s.t, err)
	must(s.t, s.Records.Add(s.t.Context(), name, repository, info))
	return v1.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}
}

func (s *site) digest(b []byte) digest.Digest {
	if s.algorithm == "" {
		return digest.FromBytes(b)
	}
	return s.algorithm.FromBytes(b)
}

// push puts an image with one layer into PROJECT/REPOSITORY.
func (s *site) push(place, tag, layer string, annotations ...string) (manifest []byte) {
	s.t.Helper()
	m := v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		Config: s.blob(place, v1.MediaTypeImageConfig, []byte(`{"os":"linux"}`)),
		Layers: []v1.Descriptor{s.blob(place, v1.MediaTypeImageLayer, []byte(layer))},
	}
	if len(annotations) > 0 {
		m.Annotations = map[string]string{"note": annotations[0]}
	}
	manifest, err := json.Marshal(m)
	must(s.t, err)
	must(s.t, s.put(place, tag, manifest))
	return manifest
}

func (s *site) put(place, tag string, manifest []byte) error {
	name, repository, _ := strings.Cut(place, "/")
	_, err := s.Catalog.Put(s.t.Context(), catalog.Push{
		Project: name, Repository: repository, Tag: tag, Digest: s.digest(manifest), MediaType: v1.MediaTypeImageManifest,
		Bytes: manifest, Carrier: catalog.Client, Actor: "admin", At: time.Now(), Copies: 1,
	})
	return err
}

// resolve gives the manifest behind PROJECT/REPOSITORY and a tag.
func (s *site) resolve(place, tag string) ([]byte, error) {
	name, repository, _ := strings.Cut(place, "/")
	m, _, err := s.Catalog.Resolve(s.t.Context(), name, repository, tag)
	return m.Bytes, err
}

// wants holds what the site serves to a manifest.
func (s *site) wants(place, tag string, manifest []byte) {
	s.t.Helper()
	got, err := s.resolve(place, tag)
	if err != nil || !bytes.Equal(got, manifest) {
		s.t.Errorf("%s has %d bytes as %s:%s, %v; want %d", s.id, len(got), place, tag, err, len(manifest))
	}
}

// serve puts the operations behind HTTP; the user is whom the header As names.
func (s *site) serve() *httptest.Server {
	s.t.Helper()
	if s.server == nil {
		s.server = httptest.NewServer(s.handler())
		s.t.Cleanup(s.server.Close)
	}
	return s.server
}

func (s *site) handler() http.Handler {
	s.t.Helper()
	k, err := rest.New(rest.Config{
		Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(), Authenticator: byHeader{}, Guard: s.Projects, Version: "test",
	})
	must(s.t, err)
	s.Operations(k)
	return k.Handler()
}

type byHeader struct{}

func (byHeader) Authenticate(r *http.Request) (access.Principal, error) {
	name := r.Header.Get("As")
	if name == "" {
		return access.Principal{}, nil
	}
	return access.Principal{Kind: access.User, Name: name, Admin: name == "admin"}, nil
}

// exportFile gives a bundle as the API does.
func (s *site) exportFile(request ExportRequest) []byte {
	s.t.Helper()
	body, err := json.Marshal(request)
	must(s.t, err)
	status, out := s.ask("admin", "export", bytes.NewReader(body))
	if status != http.StatusOK {
		s.t.Fatalf("export: %d %s", status, out)
	}
	return out
}

// importFile sends a bundle to the API.
func (s *site) importFile(file []byte, query ...string) (status int, report airgap.Report, text string) {
	s.t.Helper()
	name := "import"
	if len(query) > 0 {
		name += "?" + strings.Join(query, "&")
	}
	status, out := s.ask("admin", name, bytes.NewReader(file))
	if status == http.StatusOK {
		must(s.t, json.Unmarshal(out, &report))
	}
	return status, report, string(out)
}

func (s *site) ask(as, path string, body io.Reader) (int, []byte) {
	s.t.Helper()
	r, err := http.NewRequestWithContext(s.t.Context(), http.MethodPost, s.serve().URL+"/api/atoll/v1/bundles/"+path, body)
	must(s.t, err)
	r.Header.Set("As", as)
	resp, err := s.serve().Client().Do(r)
	must(s.t, err)
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	must(s.t, err)
	return resp.StatusCode, out
}

// refused holds a refusal to its status and code.
func refused(t testing.TB, status int, text string, wantStatus int, code string) {
	t.Helper()
	if status != wantStatus || !strings.Contains(text, fmt.Sprintf("%q", code)) {
		t.Errorf("answered %d %.300s, want %d %s", status, text, wantStatus, code)
	}
}

var errCrash = errors.New("the power is gone")
