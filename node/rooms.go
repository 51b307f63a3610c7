package node

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/cluster/keyring"
	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/reserve"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/adopt"
	"github.com/atoll-registry/atoll/node/backup"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/doctor"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/identity"
	"github.com/atoll-registry/atoll/node/jobs"
	"github.com/atoll-registry/atoll/node/journal"
	"github.com/atoll-registry/atoll/node/ledger"
	"github.com/atoll-registry/atoll/node/offline"
	"github.com/atoll-registry/atoll/node/peers"
	"github.com/atoll-registry/atoll/node/prefetch"
	"github.com/atoll-registry/atoll/node/project"
	"github.com/atoll-registry/atoll/node/registry"
	"github.com/atoll-registry/atoll/node/rest"
	"github.com/atoll-registry/atoll/node/scrub"
	"github.com/atoll-registry/atoll/node/settings"
	"github.com/atoll-registry/atoll/node/sites"
	"github.com/atoll-registry/atoll/node/storage"
	"github.com/atoll-registry/atoll/node/telemetry"
	"github.com/atoll-registry/atoll/node/traffic"
	"github.com/atoll-registry/atoll/node/upgrade"
	"github.com/atoll-registry/atoll/node/watch"
	"github.com/atoll-registry/atoll/transfer/peernet"
)

// rooms are the parts of a node, in the order in which they are built.
type rooms struct {
	settings  *settings.Settings
	store     *blobs.Store
	records   *blobs.Records
	journal   *journal.Journal
	projects  *project.Projects
	identity  *identity.Identity
	traffic   *traffic.Traffic
	jobs      *jobs.Jobs
	prefetch  *prefetch.Prefetch
	peers     *peers.Peers
	endpoints *peers.Endpoints
	catalog   *catalog.Catalog
	scrub     *scrub.Scrub
	registry  *registry.Registry
	sites     *sites.Sites
	offline   *offline.Offline
	storage   *storage.Storage
	adopt     *adopt.Adopt
	backup    *backup.Backup
	watch     *watch.Watch
	ledger    *ledger.Ledger
	doctor    *doctor.Doctor
	kernel    *rest.Kernel
	http      http.Handler
}

// ground is what the rooms stand on.
type ground struct {
	config  Config
	url     string // where clients find this node
	log     *slog.Logger
	metrics *prometheus.Registry
	engine  kv.Engine
	db      *table.DB
	member  *member.Node
	network *peernet.Net
	packets bool // the peer port is open over UDP too
	reserve *reserve.Reserve
	files   *fileCertificate // nil unless the user has a certificate
	own     *siteCertificate // nil unless the site makes it
	keys    *keyring.Ring    // of the files that hold keys
}

// newRooms builds the rooms and starts nothing. Adding a room is one line here
// and, when it has operations, one in register.
func newRooms(ctx context.Context, g ground) (*rooms, error) {
	r := &rooms{settings: settings.New(g.db, g.log)}
	var err error
	minFree := settings.Define(r.settings, settings.Spec[int64]{
		Name: "storage.min-free", Default: "256MiB", Kind: settings.Bytes(16<<20, 1<<40, false),
		Summary: "the free space of a node's disk below which it takes no content, so that the metadata can always be written; pulls go on",
	})
	if r.store, err = blobs.Open(filepath.Join(g.config.Data, "content"), blobs.Options{
		LowWater: minFree.Value, Opened: func(d digest.Digest) { r.peers.Read(d) }, Log: g.log,
	}); err != nil {
		return nil, err
	}
	if r.watch, err = newWatch(g, r, minFree.Value); err != nil {
		return nil, err
	}
	if r.storage, err = storage.New(ctx, storage.Config{Data: g.config.Data, Keys: g.keys, Store: r.store, Members: r.members(g), Log: g.log}, g.config.Storage); err != nil {
		return nil, err
	}
	r.records = blobs.NewRecords(g.db)
	r.journal = journal.New(g.db, g.member)
	r.projects = project.New(g.db, r.journal)
	r.sites = sites.New(g.db, r.journal)
	if r.identity, err = identity.New(identity.Config{
		DB: g.db, Keys: g.member, Projects: r.projects, Log: g.log, Registerer: g.metrics, ExternalURL: g.config.ExternalURL,
	}); err != nil {
		return nil, err
	}
	if r.traffic, err = traffic.New(traffic.Config{
		Dir: g.config.Data, Roster: g.member, Owners: owners{g.db, r.records}, Settings: r.settings, Log: g.log, Registerer: g.metrics, Clock: g.config.clock, Files: openFiles(),
	}); err != nil {
		return nil, err
	}
	policy := peers.DefineSettings(r.settings)
	policy.Projects = r.projects
	if r.peers, err = peers.New(peers.Config{
		DB: g.db, Roster: g.member, Cluster: g.member, Network: g.network, Over: g.over(), Store: r.store, Records: r.records,
		Policy: policy, Cache: cacheOf(g.config), Place: r.traffic.Place, Limits: r.traffic.Limits,
		Limiter: r.traffic, Incoming: r.traffic.Incoming(), Meter: r.traffic, Log: g.log, Registerer: g.metrics,
	}); err != nil {
		return nil, err
	}
	r.bound(g)
	g.member.Resealers(r.journal.Reseal)
	r.journal.Delegate(g.member.Ask)
	g.member.Duties(journal.SignDuty, r.journal.SignFor)
	r.endpoints = peers.NewEndpoints(g.db, g.member, g.url, !loopback(g.config.Listen), g.log)
	if r.catalog, err = catalog.New(catalog.Config{
		DB: g.db, Records: r.records, Journal: r.journal, Projects: r.projects, Big: bigManifests{r, g.db},
	}); err != nil {
		return nil, err
	}
	r.projects.Attach(r.catalog)
	r.jobs = jobs.New(jobs.Config{Node: g.member.Self(), DB: g.db, Log: g.log, Clock: g.config.clock, Zone: r.traffic.Zone})
	r.prefetch = prefetch.New(prefetch.Config{
		Dir: g.config.Data, Jobs: r.jobs, Content: contents{g.db, r.catalog, r.records}, Store: holding{r.store, r.peers}, Nodes: siblings{r.peers, g.member},
		Log: g.log, Clock: g.config.clock, Zone: r.traffic.Zone,
	})
	r.peers.KeepIf(r.prefetch.Pinned)
	r.offline = offline.New(offline.Config{
		DB: g.db, Journal: r.journal, Projects: r.projects, Catalog: r.catalog, Store: r.store, Records: r.records,
		Copies: r.peers, Fetcher: r.peers, Trusts: r.sites, MinFree: minFree.Value, Log: g.log,
	})
	if r.scrub, err = scrub.New(scrub.Config{
		Node: g.member.Self(), Dir: g.config.Data, DB: g.db, Store: r.store, Records: r.records, Peers: r.peers,
		Settings: r.settings, Log: g.log, Registerer: g.metrics,
	}); err != nil {
		return nil, err
	}
	r.peers.Report(r.scrub.Unreadable, r.scrub.Suspect)
	r.peers.Heed(r.watch)
	r.adopt = adopt.New(adopt.Config{
		DB: g.db, Projects: r.projects, Catalog: r.catalog, Store: r.store, Records: r.records, Copies: r.peers, Log: g.log,
	})
	r.ledger = ledger.New(ledger.Config{
		Data: g.config.Data, DB: g.db, Journal: r.journal, Projects: r.projects, Catalog: r.catalog, Log: g.log,
	})
	r.doctor = newDoctor(g)
	if r.backup, err = backup.New(backup.Config{
		DB: g.db, Engine: g.engine, Member: g.member, Store: r.store, Records: r.records, Fetcher: r.peers, Version: g.config.Version, Log: g.log,
		Registerer: g.metrics,
	}); err != nil {
		return nil, err
	}
	r.peers.Archive(r.lastBackup)
	if r.registry, err = registry.New(registry.Config{
		NodeID: g.member.Self(), DB: g.db, Catalog: r.catalog, Projects: r.projects, Journal: r.journal, Store: r.store, Records: r.records,
		Auth: r.identity, Copies: r.peers, Fetcher: r.peers, Forwarder: r.peers, Teller: r.peers, Guardian: r.scrub, Egress: egress{r.traffic}, Log: g.log, Registerer: g.metrics,
		Settings: registry.DefineSettings(r.settings), Redirect: g.config.Redirect,
	}); err != nil {
		return nil, err
	}
	if r.kernel, err = rest.New(rest.Config{
		Log: g.log, Registerer: g.metrics, Authenticator: r.identity, Guard: r.projects, Version: g.config.Version,
	}); err != nil {
		return nil, err
	}
	r.register(g)
	r.http, err = r.handler(g)
	return r, err
}

// bound has this node agree with the others on the caps that are for all, and keep to caps in
// what it passes on.
func (r *rooms) bound(g ground) {
	r.traffic.Meet(r.peers)
	g.network.Bound(peernet.Passing{In: r.traffic.Incoming(), Out: r.traffic, Meter: r.traffic})
}

func newDoctor(g ground) *doctor.Doctor {
	return doctor.New(doctor.Config{
		Data: g.config.Data, Advertise: g.config.Advertise, DB: g.db, Roster: g.member, Network: g.network,
		Transport: g.config.transport(), Clock: g.config.clock,
	})
}

// over dials by the carrier that the site's setting says, unless this node was told
// itself; nil then. Without a UDP port it is as without the setting.
func (g ground) over() func(context.Context, string, byte, peernet.Carrier) (net.Conn, error) {
	if g.config.PeerTransport != "" {
		return nil
	}
	return func(ctx context.Context, addr string, service byte, by peernet.Carrier) (net.Conn, error) {
		if by == peernet.QUIC && !g.packets {
			return g.network.Dial(ctx, addr, service)
		}
		return g.network.DialBy(ctx, addr, service, by)
	}
}

// register puts the rooms' operations into the table of the API.
func (r *rooms) register(g ground) {
	rest.RegisterSystem(r.kernel, rest.System{
		ExternalURL: g.config.ExternalURL, Version: g.config.Version, Storage: "filesystem", HasCA: true,
		ReadOnly: func() bool { return r.watch.Refusal() != nil },
		Checks:   r.checks(g),
	})
	r.settings.Operations(r.kernel)
	r.projects.Operations(r.kernel)
	r.catalog.Operations(r.kernel)
	r.peers.Operations(r.kernel)
	r.endpoints.Operations(r.kernel)
	r.scrub.Operations(r.kernel)
	r.sites.Operations(r.kernel)
	r.offline.Operations(r.kernel)
	r.storage.Operations(r.kernel)
	r.adopt.Operations(r.kernel)
	r.backup.Operations(r.kernel)
	r.watch.Operations(r.kernel)
	r.traffic.Operations(r.kernel)
	r.prefetch.Operations(r.kernel)
	r.doctor.Operations(r.kernel)
	upgrade.Operations(r.kernel, upgrade.Config{DB: g.db, Cluster: g.member, Version: g.config.Version})
}

// members counts the site's nodes.
func (r *rooms) members(g ground) func() (int, error) {
	return func() (n int, err error) {
		err = g.db.View(func(v *table.View) error {
			all, err := g.member.Members(v)
			n = len(all)
			return err
		})
		return n, err
	}
}

// cacheOf says whether the node is a cache.
func cacheOf(c Config) peers.Cache {
	return peers.Cache{On: c.Cache, Size: c.CacheSize, File: filepath.Join(c.Data, "cache-order")}
}

// handler puts the registry, the token service, the metrics and the API on one
// address.
func (r *rooms) handler(g ground) (http.Handler, error) {
	middleware, err := telemetry.NewMiddleware(g.log, g.metrics)
	if err != nil {
		return nil, err
	}
	metrics := telemetry.MetricsHandler(g.metrics)
	mux := http.NewServeMux()
	mux.Handle("/service/token", r.identity.TokenService())
	mux.HandleFunc("/metrics", func(w http.ResponseWriter, q *http.Request) {
		if !loopback(g.config.Listen) {
			p, err := r.identity.Authenticate(q)
			if err == nil && !access.InSystem(p, access.MetricsRead) {
				err = fault.New(fault.Unauthenticated, "metrics want the credentials of an admin")
			}
			if err != nil {
				w.Header().Set("WWW-Authenticate", `Basic realm="atoll"`)
				rest.WriteError(w, err)
				return
			}
		}
		metrics.ServeHTTP(w, q)
	})
	api := r.kernel.Handler()
	v2 := r.registry.Handler()
	return middleware.Wrap(r.watch.Protect(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		// Not through the mux: it would redirect paths that are not clean, and
		// the registry and the kernel have parsers of their own.
		switch {
		case q.URL.Path == "/v2" || len(q.URL.Path) >= 4 && q.URL.Path[:4] == "/v2/":
			v2.ServeHTTP(w, q)
		case q.URL.Path == "/metrics" || q.URL.Path == "/service/token":
			mux.ServeHTTP(w, q)
		default:
			api.ServeHTTP(w, q)
		}
	}))), nil
}

// bigManifests keeps manifests that are too large for a row as blobs.
type bigManifests struct {
	*rooms
	db *table.DB
}

// Put implements catalog.Big.
func (b bigManifests) Put(ctx context.Context, d digest.Digest, body []byte) error {
	defer b.store.Pin(d)() // no collection between the file and its row
	if _, err := b.store.Put(ctx, d, bytes.NewReader(body)); err != nil {
		return err
	}
	copies, err := b.peers.Ensure(ctx, []digest.Digest{d})
	if err != nil {
		return err
	}
	_, err = b.db.Update(ctx, func(tx *table.Tx) error {
		if err := b.records.Live(tx, d, int64(len(body))); err != nil {
			return err
		}
		return b.records.SetCopies(tx, d, copies)
	})
	return err
}

// Read implements catalog.Big.
func (b bigManifests) Read(ctx context.Context, d digest.Digest) (body []byte, err error) {
	var from io.ReadCloser
	from, size, err := b.store.OpenBlob(d)
	if fault.Is(err, fault.NotFound) {
		err = b.db.View(func(v *table.View) error {
			row, ok, err := b.records.Get(v, d)
			size = row.Size
			return errors.Join(err, missing(ok, d))
		})
		if err == nil {
			from, err = b.peers.Open(ctx, d, size)
		}
	}
	if err != nil {
		return nil, err
	}
	defer from.Close()
	return io.ReadAll(io.LimitReader(from, size))
}

func missing(ok bool, d digest.Digest) error {
	if ok {
		return nil
	}
	return fault.New(fault.NotFound, "there is no manifest %s in this site", d).WithCode("MANIFEST_UNKNOWN")
}
