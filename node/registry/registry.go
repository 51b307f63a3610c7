// Package registry serves the OCI Distribution API 1.1 under /v2/: pull, push,
// discovery and deletion, as docker, containerd, podman, skopeo, crane, helm and
// oras use it.
//
// Invariants:
//   - Content is served byte for byte as it was pushed; nothing is converted.
//   - A blob is visible only in the repositories that link it; to link it there
//     takes its bytes or the right to pull it from where it is linked already.
//   - A push is acknowledged only once what it names is durable on as many nodes
//     as the site wants, and the answer says on how many that was.
//   - An absence is said only when a leader has confirmed it; otherwise the
//     answer is 503, never 404.
//   - What a client has sent of an upload is kept when it goes away, until the
//     session expires. The session's id names the node that has it.
//   - A connection may be slow, but not silent: deadlines move while bytes flow.
package registry

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/journal"
	"github.com/atoll-registry/atoll/node/project"
	"github.com/atoll-registry/atoll/node/telemetry"
)

// Auth says who makes a request. Both methods are safe for concurrent use.
type Auth interface {
	// Authenticate gives the principal; fault.Unauthenticated when there are
	// credentials and they do not hold.
	Authenticate(r *http.Request) (access.Principal, error)
	// Challenge sets the header that tells a client where to get a token that
	// reaches the scopes, each as in "repository:library/app:pull,push".
	Challenge(w http.ResponseWriter, r *http.Request, scopes ...string)
}

// Fetcher reads blobs that other nodes hold.
type Fetcher interface {
	// OpenAt gives a reader that delivers verified bytes while they arrive, those from
	// the byte from on first, where its user is about to begin. It returns only once
	// somebody who holds the blob is known; fault.Unavailable when nobody answers.
	// Closing the reader does not end the fetch.
	OpenAt(ctx context.Context, d digest.Digest, size, from int64) (io.ReadSeekCloser, error)
}

// Guardian is told of content that this node should give and cannot. Both
// methods return at once and are safe for concurrent use.
type Guardian interface {
	// Unreadable: the disk could not read the file f of a held blob. When it
	// returns the blob is not held any more.
	Unreadable(d digest.Digest, f blobs.File, cause error)
	// Suspect: no node that is up gave a blob whose row is live.
	Suspect(d digest.Digest)
}

// Forwarder passes requests on to the node that owns what they are about.
type Forwarder interface {
	// Forward has the node answer the request, for the principal in the request's
	// context. An error means that nothing has been written to w; a node that is
	// not live is fault.Unavailable.
	Forward(node string, w http.ResponseWriter, r *http.Request) error
}

// Outgoing is a blob that a client is about to be sent.
type Outgoing struct {
	Digest     digest.Digest
	Size       int64
	Project    string
	Repository string // relative to the project
	User       string
	Client     string // USER@ADDRESS
}

// Egress bounds what clients are sent. Safe for concurrent use.
type Egress interface {
	// Begin waits until one more answer may begin; an error is the context's.
	Begin(ctx context.Context, o Outgoing) (Paced, error)
}

// Paced is one answer on its way.
type Paced interface {
	// Take asks to send n bytes. 0: they may go. Else it is asked again after so long.
	Take(n int) time.Duration
	// Capped says whether any cap is in force, so that it pays to send small steps.
	Capped() bool
	// End is called once, when the answer has ended.
	End()
}

// Teller makes a change known.
type Teller interface {
	// Tell returns when every node that is live has the revision, or does not answer.
	Tell(ctx context.Context, revision uint64)
}

// Defaults of Config.
const (
	defaultIdle      = 2 * time.Minute
	defaultUploadTTL = 24 * time.Hour
	expireEvery      = time.Minute
	copyWorkers      = 4
	copyQueue        = 256
)

// Config names what a registry is made of. Copies, Fetcher, Forwarder and
// Teller may be nil on a node that is alone.
type Config struct {
	NodeID     string // this node's, which is in the ids of its upload sessions
	DB         *table.DB
	Catalog    *catalog.Catalog
	Projects   *project.Projects
	Journal    *journal.Journal
	Store      *blobs.Store
	Records    *blobs.Records
	Auth       Auth
	Copies     blobs.Copies
	Fetcher    Fetcher
	Forwarder  Forwarder
	Teller     Teller
	Guardian   Guardian // nil: nobody is told
	Egress     Egress   // nil: nothing bounds what is sent
	Log        *slog.Logger
	Registerer prometheus.Registerer
	Settings   *Settings
	// Redirect sends clients to the object store for blobs that are in one.
	Redirect bool

	// Idle is how long a connection may go without a byte while a request or
	// its answer is under way; 0 is two minutes.
	Idle time.Duration
	// UploadTTL is how long an upload session is kept without progress; 0 is a
	// day.
	UploadTTL time.Duration
}

// Registry is safe for use by many goroutines.
type Registry struct {
	node      string
	db        *table.DB
	catalog   *catalog.Catalog
	projects  *project.Projects
	journal   *journal.Journal
	store     *blobs.Store
	redirect  bool
	records   *blobs.Records
	auth      Auth
	copies    blobs.Copies
	fetcher   Fetcher
	forwarder Forwarder
	teller    Teller
	guardian  Guardian
	egress    Egress
	log       *slog.Logger

	settings  *Settings
	idle      time.Duration
	uploadTTL time.Duration

	uploads uploads
	pacers  pacers
	large   chan struct{} // a place for each large manifest that is taken in

	early   chan digest.Digest // blobs whose second copy can begin before the manifest comes
	metrics metrics
}

type metrics struct {
	uploads   *prometheus.CounterVec
	mounts    *prometheus.CounterVec
	remote    prometheus.Counter
	forwarded prometheus.Counter
	expired   prometheus.Counter
}

// New makes a registry. It starts nothing.
func New(c Config) (*Registry, error) {
	if c.NodeID == "" || c.DB == nil || c.Catalog == nil || c.Projects == nil || c.Journal == nil || c.Store == nil ||
		c.Records == nil || c.Auth == nil || c.Log == nil || c.Registerer == nil || c.Settings == nil {
		return nil, errors.New("registry: a part that it is made of is missing")
	}
	g := &Registry{
		node: c.NodeID, db: c.DB, catalog: c.Catalog, projects: c.Projects, journal: c.Journal, store: c.Store,
		records: c.Records, auth: c.Auth, copies: c.Copies, fetcher: c.Fetcher, forwarder: c.Forwarder, teller: c.Teller, guardian: c.Guardian, egress: c.Egress, log: c.Log,
		settings: c.Settings, redirect: c.Redirect, idle: c.Idle, uploadTTL: c.UploadTTL,
		uploads: uploads{byUser: map[string]map[string]bool{}}, pacers: pacers{all: map[string]*pacer{}},
		large: make(chan struct{}, largeManifests),
		early: make(chan digest.Digest, copyQueue),
		metrics: metrics{
			uploads: prometheus.NewCounterVec(prometheus.CounterOpts{
				Name: "atoll_registry_uploads_total", Help: "Blobs that clients pushed, by how the upload ended (stored, refused).",
			}, []string{"outcome"}),
			mounts: prometheus.NewCounterVec(prometheus.CounterOpts{
				Name: "atoll_registry_mounts_total", Help: "Blobs that clients asked to mount, by outcome (mounted, upload).",
			}, []string{"outcome"}),
			remote: prometheus.NewCounter(prometheus.CounterOpts{
				Name: "atoll_registry_remote_pulls_total", Help: "Blob pulls that were served from other nodes.",
			}),
			forwarded: prometheus.NewCounter(prometheus.CounterOpts{
				Name: "atoll_registry_forwarded_total", Help: "Requests passed on to the node that has the upload session.",
			}),
			expired: prometheus.NewCounter(prometheus.CounterOpts{
				Name: "atoll_registry_expired_uploads_total", Help: "Upload sessions that were abandoned and removed.",
			}),
		},
	}
	if g.idle == 0 {
		g.idle = defaultIdle
	}
	if g.uploadTTL == 0 {
		g.uploadTTL = defaultUploadTTL
	}
	m := g.metrics
	for _, collector := range []prometheus.Collector{m.uploads, m.mounts, m.remote, m.forwarded, m.expired} {
		if err := c.Registerer.Register(collector); err != nil {
			return nil, err
		}
	}
	return g, nil
}

// Handler serves every path that begins with /v2. Whatever routes to it must not
// clean paths.
func (g *Registry) Handler() http.Handler { return http.HandlerFunc(g.serve) }

// serve answers one request: handlers return errors, and this is where they end.
func (g *Registry) serve(w http.ResponseWriter, r *http.Request) {
	r = telemetry.Begin(w, r)
	c := newCall(w, r, g.idle)
	defer c.release()
	h := w.Header()
	h.Set("Docker-Distribution-Api-Version", "registry/2.0")
	h.Set("X-Content-Type-Options", "nosniff")
	var err error
	if c.route, err = ParsePath(r.URL.Path); err == nil {
		telemetry.SetRoute(r.Context(), c.route.Endpoint.template())
		err = g.dispatch(c)
	}
	if err != nil {
		g.fail(c, err)
	}
}

func (g *Registry) dispatch(c *call) error {
	switch c.route.Endpoint {
	case EndpointBase:
		return g.handle(c, method{"GET", (*Registry).base})
	case EndpointCatalog:
		return g.handle(c, method{"GET", (*Registry).listRepositories})
	case EndpointTags:
		return g.handle(c, method{"GET", (*Registry).listTags})
	case EndpointManifest:
		return g.handle(c, method{"GET", (*Registry).getManifest},
			method{"PUT", (*Registry).putManifest}, method{"DELETE", (*Registry).deleteManifest})
	case EndpointBlob:
		return g.handle(c, method{"GET", (*Registry).getBlob}, method{"DELETE", (*Registry).deleteBlob})
	case EndpointUploads:
		return g.handle(c, method{"POST", (*Registry).startUpload})
	case EndpointSession:
		return g.handle(c, method{"GET", (*Registry).uploadStatus},
			method{"PATCH", (*Registry).patchUpload},
			method{"PUT", (*Registry).finishUpload}, method{"DELETE", (*Registry).cancelUpload})
	case EndpointReferrers:
		return g.handle(c, method{"GET", (*Registry).listReferrers})
	}
	return noEndpoint()
}

// base answers whether this is a registry, and whether the credentials hold.
func (g *Registry) base(c *call) error {
	if err := g.identify(c); err != nil {
		return err
	}
	return c.json(http.StatusOK, struct{}{})
}

// Run expires abandoned uploads and makes early copies of pushed blobs until the
// context ends.
func (g *Registry) Run(ctx context.Context) error {
	done := make(chan struct{})
	for range copyWorkers {
		go func() {
			defer func() { done <- struct{}{} }()
			g.copyEarly(ctx)
		}()
	}
	ticker := time.NewTicker(expireEvery)
	defer ticker.Stop()
	for {
		g.expire(ctx)
		select {
		case <-ticker.C:
			continue
		case <-ctx.Done():
		}
		for range copyWorkers {
			<-done
		}
		return ctx.Err()
	}
}

func (g *Registry) expire(ctx context.Context) {
	n, err := g.store.Expire(ctx, g.uploadTTL)
	g.uploads.pruneAll(g.alive)
	g.metrics.expired.Add(float64(n))
	if n > 0 {
		g.log.Info("removed abandoned uploads", "count", n, "idle_longer_than", g.uploadTTL)
	}
	if err != nil && ctx.Err() == nil {
		g.log.Warn("could not remove all abandoned uploads; trying again later", "error", err)
	}
}

// copyLater begins the other copies of a blob while its manifest is still to
// come. When the queue is full the manifest's push makes them.
func (g *Registry) copyLater(d digest.Digest) {
	if g.copies == nil {
		return
	}
	select {
	case g.early <- d:
	default:
	}
}

func (g *Registry) copyEarly(ctx context.Context) {
	for {
		select {
		case d := <-g.early:
			if _, err := g.copies.Ensure(ctx, []digest.Digest{d}); err != nil && ctx.Err() == nil {
				g.log.Debug("no early copy of a pushed blob; its manifest's push tries again", "digest", d, "error", err)
			}
		case <-ctx.Done():
			return
		}
	}
}

// ensure makes the copies that a push waits for and says how many there are.
func (g *Registry) ensure(ctx context.Context, ds []digest.Digest) (int, error) {
	if g.copies == nil {
		return 1, nil
	}
	copies, err := g.copies.Ensure(ctx, ds)
	if err != nil && fault.KindOf(err) == fault.Internal {
		return 0, fault.Wrap(err, fault.Unavailable, "the push could not be made durable on another node; try it again in a few seconds")
	}
	return copies, err
}
