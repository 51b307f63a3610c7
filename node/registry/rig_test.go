package registry_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/identity"
	"github.com/atoll-registry/atoll/node/journal"
	"github.com/atoll-registry/atoll/node/project"
	"github.com/atoll-registry/atoll/node/registry"
	"github.com/atoll-registry/atoll/node/settings"
)

const password = "Correct1Horse"

// site is the real rooms over a database of one member.
type site struct {
	t        testing.TB
	db       *table.DB
	backend  *tabletest.Backend
	records  *blobs.Records
	journal  *journal.Journal
	projects *project.Projects
	catalog  *catalog.Catalog
	identity *identity.Identity
	gates    *gate
	tuning   *settings.Settings
	settings *registry.Settings

	mu    sync.Mutex
	nodes map[string]*node
}

// node is one registry of the site with its own blobs.
type node struct {
	*client
	site   *site
	id     string
	dir    string
	store  *blobs.Store
	copies *copies
	server *httptest.Server
	down   bool
	begun  []int64 // where readers of others' blobs were to begin; under site.mu
}

// tokenKey is that of a site's only node.
type tokenKey ed25519.PrivateKey

func newTokenKey() tokenKey {
	_, private, _ := ed25519.GenerateKey(nil)
	return tokenKey(private)
}

func (k tokenKey) TokenKey() (string, ed25519.PrivateKey) { return "here", ed25519.PrivateKey(k) }

func (k tokenKey) TokenPublic(kid string) (ed25519.PublicKey, error) {
	if kid != "here" {
		return nil, nil
	}
	return ed25519.PrivateKey(k).Public().(ed25519.PublicKey), nil
}

// plainSealer keeps secrets as they are: nobody steals a test.
type plainSealer struct{}

func (plainSealer) Seal(_ string, plain []byte) ([]byte, error)    { return plain, nil }
func (plainSealer) Unseal(_ string, sealed []byte) ([]byte, error) { return sealed, nil }

// big keeps large manifests in memory.
type big struct {
	mu   sync.Mutex
	held map[digest.Digest][]byte
}

func (b *big) Put(_ context.Context, d digest.Digest, body []byte) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held[d] = bytes.Clone(body)
	return nil
}

func (b *big) Read(_ context.Context, d digest.Digest) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if body, ok := b.held[d]; ok {
		return body, nil
	}
	return nil, fault.New(fault.NotFound, "nobody holds %s", d)
}

// gate refuses what a test tells it to.
type gate struct {
	mu         sync.Mutex
	push, pull error
	hold       bool
}

func (g *gate) AdmitPush(context.Context, *table.Tx, catalog.Push) (catalog.Verdict, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.hold {
		return catalog.Hold, g.push
	}
	return catalog.Allow, g.push
}

func (g *gate) AdmitPull(context.Context, *table.View, catalog.Pull) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.pull
}

func (g *gate) holding(hold bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.hold = hold
}

func (g *gate) refuse(push, pull error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.push, g.pull = push, pull
}

// copies records what was to be made durable and says what it is told to.
type copies struct {
	mu     sync.Mutex
	asked  [][]digest.Digest
	count  int
	err    error
	called chan struct{}
}

func (c *copies) Ensure(_ context.Context, ds []digest.Digest) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = append(c.asked, ds)
	select {
	case c.called <- struct{}{}:
	default:
	}
	return c.count, c.err
}

func (c *copies) set(count int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count, c.err, c.asked = count, err, nil
}

func newSite(t testing.TB) *site {
	t.Helper()
	db := tabletest.Open(t)
	s := &site{t: t, db: db, nodes: map[string]*node{}, gates: &gate{}}
	log := slog.New(slog.DiscardHandler)
	s.tuning = settings.New(db, log)
	s.settings = registry.DefineSettings(s.tuning)
	s.records = blobs.NewRecords(db)
	s.journal = journal.New(db, plainSealer{})
	s.projects = project.New(db, s.journal)
	var err error
	s.catalog, err = catalog.New(catalog.Config{
		DB: db, Records: s.records, Journal: s.journal, Projects: s.projects,
		Big: &big{held: map[digest.Digest][]byte{}}, Gates: []catalog.Gate{s.gates},
	})
	must(t, err)
	s.projects.Attach(s.catalog)
	s.identity, err = identity.New(identity.Config{
		DB: db, Keys: newTokenKey(), Projects: s.projects, Log: log, Registerer: prometheus.NewRegistry(),
	})
	must(t, err)
	s.backend = tabletest.Start(t, db)
	_, err = s.journal.EnsureSite(t.Context(), "here", "here")
	must(t, err)
	must(t, s.projects.EnsureLibrary(t.Context(), "admin"))
	must(t, s.identity.EnsureAdmin(t.Context(), func() (string, error) { return password, nil }))
	return s
}

// start runs a registry of the site over the blobs in dir.
func (s *site) start(id, dir string, change ...func(*registry.Config)) *node {
	s.t.Helper()
	store, err := blobs.Open(dir, blobs.Options{})
	must(s.t, err)
	n := &node{site: s, id: id, dir: dir, store: store, copies: &copies{count: 2, called: make(chan struct{}, 1)}}
	c := registry.Config{
		NodeID: id, DB: s.db, Catalog: s.catalog, Projects: s.projects, Journal: s.journal, Store: store,
		Records: s.records, Auth: s.identity, Copies: n.copies, Fetcher: n, Forwarder: n, Settings: s.settings,
		Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	}
	for _, fn := range change {
		fn(&c)
	}
	g, err := registry.New(c)
	must(s.t, err)
	mux := http.NewServeMux()
	mux.Handle(identity.TokenPath, s.identity.TokenService())
	mux.Handle("/", g.Handler())
	n.server = httptest.NewServer(mux)
	n.client = &client{t: s.t, http: n.server.Client(), url: n.server.URL, user: "admin"}
	s.mu.Lock()
	s.nodes[id] = n
	s.mu.Unlock()
	s.t.Cleanup(n.stop)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Run(ctx) }()
	s.t.Cleanup(func() { cancel(); <-done })
	return n
}

// stop takes the node down; its directory stays.
func (n *node) stop() {
	n.site.mu.Lock()
	down := n.down
	n.down = true
	n.site.mu.Unlock()
	if !down {
		n.server.CloseClientConnections()
		n.server.Close()
		if err := n.store.Close(); err != nil {
			n.site.t.Error(err)
		}
	}
}

func (s *site) live(id string) *node {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.nodes[id]; n != nil && !n.down {
		return n
	}
	return nil
}

// Forward implements registry.Forwarder within the process.
func (n *node) Forward(to string, w http.ResponseWriter, r *http.Request) error {
	owner := n.site.live(to)
	if owner == nil {
		return fault.New(fault.Unavailable, "node %s is down", to)
	}
	// As over the network: only headers and the principal come along.
	r = r.Clone(access.WithPrincipal(n.site.t.Context(), access.From(r.Context())))
	r.Header.Del("Authorization")
	owner.server.Config.Handler.ServeHTTP(w, r)
	return nil
}

// OpenAt implements registry.Fetcher with the files of the site's other nodes.
func (n *node) OpenAt(_ context.Context, d digest.Digest, _, from int64) (io.ReadSeekCloser, error) {
	n.site.mu.Lock()
	defer n.site.mu.Unlock()
	n.begun = append(n.begun, from)
	for _, other := range n.site.nodes {
		if other == n || other.down {
			continue
		}
		if file, _, err := other.store.OpenBlob(d); err == nil {
			return file, nil
		}
	}
	return nil, fault.New(fault.Unavailable, "no node that is up holds %s", d)
}

func single(t testing.TB, change ...func(*registry.Config)) *node {
	t.Helper()
	return newSite(t).start("n1", t.TempDir(), change...)
}

// client speaks to a node with a user's name and password.
type client struct {
	t    testing.TB
	http *http.Client
	url  string
	user string // "" sends no credentials
}

func (c *client) as(user string) *client {
	d := *c
	d.user = user
	return &d
}

type answer struct {
	t      testing.TB
	what   string
	status int
	header http.Header
	body   []byte
}

// do sends a request; headers are names and values by turns.
func (c *client) do(method, path string, body []byte, headers ...string) *answer {
	c.t.Helper()
	r, err := http.NewRequestWithContext(c.t.Context(), method, c.url+path, bytes.NewReader(body))
	must(c.t, err)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	if c.user != "" && r.Header.Get("Authorization") == "" {
		r.SetBasicAuth(c.user, password)
	}
	return c.send(r)
}

func (c *client) send(r *http.Request) *answer {
	c.t.Helper()
	resp, err := c.http.Do(r)
	if err != nil {
		c.t.Fatalf("%s %s: %v", r.Method, r.URL.Path, err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatalf("%s %s: reading the answer: %v", r.Method, r.URL.Path, err)
	}
	return &answer{c.t, r.Method + " " + r.URL.RequestURI(), resp.StatusCode, resp.Header, data}
}

// want checks the status and, of a failure, the code of the OCI error.
func (a *answer) want(status int, code ...string) *answer {
	a.t.Helper()
	if a.status != status {
		a.t.Fatalf("%s: answered %d, want %d; body %s", a.what, a.status, status, a.body)
	}
	if len(code) > 0 {
		var e struct {
			Errors []struct{ Code, Message string }
		}
		if err := json.Unmarshal(a.body, &e); err != nil || len(e.Errors) != 1 || e.Errors[0].Code != code[0] || e.Errors[0].Message == "" {
			a.t.Fatalf("%s: answered %s, want the code %s with a message", a.what, a.body, code[0])
		}
	}
	return a
}

// has checks headers, names and values by turns; the value "*" is any.
func (a *answer) has(headers ...string) *answer {
	a.t.Helper()
	for i := 0; i < len(headers); i += 2 {
		got := a.header.Values(headers[i])
		if len(got) != 1 || headers[i+1] != "*" && got[0] != headers[i+1] {
			a.t.Fatalf("%s: header %s is %q, want %q", a.what, headers[i], got, headers[i+1])
		}
	}
	return a
}

func (a *answer) location() string {
	a.t.Helper()
	l := a.header.Get("Location")
	if l == "" || l[0] != '/' {
		a.t.Fatalf("%s: Location is %q, want a path", a.what, l)
	}
	return l
}

func (a *answer) decode(into any) {
	a.t.Helper()
	if err := json.Unmarshal(a.body, into); err != nil {
		a.t.Fatalf("%s: answered %s: %v", a.what, a.body, err)
	}
}

// pushBlob uploads a blob the way docker does.
func (c *client) pushBlob(name string, data []byte) v1.Descriptor {
	c.t.Helper()
	d := digest.FromBytes(data)
	at := c.do("POST", "/v2/"+name+"/blobs/uploads/", nil).want(202).location()
	at = c.do("PATCH", at, data).want(202).location()
	c.do("PUT", at+"?digest="+d.String(), nil).want(201).has("Docker-Content-Digest", d.String())
	return v1.Descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar", Digest: d, Size: int64(len(data))}
}

// image makes a manifest over a config and layers that were pushed.
func image(config v1.Descriptor, subject *v1.Descriptor, layers ...v1.Descriptor) []byte {
	m := v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: config, Layers: layers, Subject: subject}
	m.SchemaVersion = 2
	if m.Layers == nil {
		m.Layers = []v1.Descriptor{}
	}
	data, _ := json.Marshal(m)
	return data
}

// pushImage pushes a small image of random content under a reference and gives
// its manifest.
func (c *client) pushImage(name, reference string) []byte {
	c.t.Helper()
	config := c.pushBlob(name, []byte("{}"))
	config.MediaType = v1.MediaTypeImageConfig
	manifest := image(config, nil, c.pushBlob(name, random(100)))
	c.do("PUT", "/v2/"+name+"/manifests/"+reference, manifest, "Content-Type", v1.MediaTypeImageManifest).want(201)
	return manifest
}

func random(n int) []byte {
	data := make([]byte, n)
	rand.Read(data)
	return data
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// within fails the test when the channel stays silent.
func within(t testing.TB, what string, ch <-chan struct{}) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(20 * time.Second):
		t.Fatalf("%s: nothing happened in 20 seconds", what)
	}
}
