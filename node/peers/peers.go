// Package peers is a node's life among the other nodes of its site: it serves
// blobs to them and fetches from them, makes the second copy that a push waits
// for, repairs what lacks copies, carries requests that belong to another node,
// and answers for the state of the cluster.
//
// Invariants:
//   - Ensure counts a node only after that node has said that the blob is on its
//     stable storage.
//   - Which nodes should hold a blob follows from the member rows alone, so every
//     node comes to the same answer (placement.go); reachability decides only
//     whom to ask first.
//   - A node lets go of a surplus copy only while as many homes as the policy wants
//     hold the blob and say that they keep it (surplus.go).
//   - A piece root is committed only by a node that has verified the blob's
//     digest itself (pieces.go).
//   - Requests from a peer arrive on connections that prove the peer's node id;
//     only there may a request name the user for whom it was made (forward.go).
package peers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/stream"
	"github.com/atoll-registry/atoll/transfer/swarm"
)

// Network is the peer port.
type Network interface {
	Listen(service byte) net.Listener
	Dial(ctx context.Context, addr string, service byte) (net.Conn, error)
}

// Roster knows the nodes of the site.
type Roster interface {
	// Self is this node's id.
	Self() string
	// Live are the nodes that are up, this one first and the suspect ones last.
	Live() []member.Member
	// Suspect says of a live node that others vouch for it, but it has not
	// answered this one.
	Suspect(id string) bool
	// DownSince is since when a node is not live, as far as this one knows.
	DownSince(id string) (time.Time, bool)
	// Members are all nodes of the site.
	Members(r table.Reader) ([]member.Member, error)
}

// Cluster is what the operations show and change.
type Cluster interface {
	Identity() member.Identity
	Status(ctx context.Context) (member.Status, error)
	CreateToken(ctx context.Context, ttl time.Duration, uses int) (string, error)
	CA() []byte
	// Find gives the member with an id or a name; member.ErrNoMember.
	Find(r table.Reader, ref string) (member.Member, error)
	// Remove, Drain and Lead change the membership of the node with an id.
	// Errors: member.ErrNoMember, member.ErrQuorum, member.ErrNoVote.
	Remove(ctx context.Context, id string) error
	Drain(ctx context.Context, id string, undo bool) error
	Lead(ctx context.Context, id string) error
	// Betray is Remove for a node that was stolen: what it held is replaced.
	Betray(ctx context.Context, id string) error
	// RotateAuthority and RenewAll begin to change the nodes' certificates, RotateKey
	// the cluster key, unless that is under way already.
	RotateAuthority(ctx context.Context) (underWay bool, err error)
	RenewAll(ctx context.Context) (underWay bool, err error)
	RotateKey(ctx context.Context) (underWay bool, err error)
	// Now is the time by which certificates are judged.
	Now() time.Time
}

// Config of Peers. All fields are needed but Over, Place, Limits, Limiter, Incoming and Meter.
type Config struct {
	DB      *table.DB
	Roster  Roster
	Cluster Cluster
	Network Network
	Store   *blobs.Store
	Records *blobs.Records
	Policy  Policy
	Cache   Cache // the zero value: this node is none
	// Over dials as Network does, by one carrier; nil: how to reach others is Network's
	// own business, whatever the setting says.
	Over func(ctx context.Context, addr string, service byte, by peernet.Carrier) (net.Conn, error)
	// Place waits until one more blob may be fetched for repair or prefetch; nil: at once.
	Place func(ctx context.Context) (release func(), err error)
	// Limits of the two engines; nil: their own.
	Limits func() (stream, swarm transfer.Limits)
	// Limiter is asked before bytes go out, Incoming before they are taken in, Meter is
	// told of what moved; nil: nobody is.
	Limiter    transfer.Limiter
	Incoming   transfer.Limiter
	Meter      transfer.Meter
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Peers is the room. It implements blobs.Copies.
type Peers struct {
	Config
	tables  *pieceTables
	engine  *stream.Engine
	swarm   *swarm.Engine
	client  *http.Client // of the API service: the URL's host is a node id
	api     http.Handler // what forwarded requests are served by
	metrics metrics

	unreadable func(d digest.Digest, file blobs.File, cause error) // may be nil
	absent     func(d digest.Digest)                               // may be nil
	conditions Conditions                                          // may be nil
	pinned     func(d digest.Digest) bool                          // may be nil
	archive    func(v *table.View) (*LastBackup, error)            // may be nil
	answers    map[string]func(context.Context, json.RawMessage) (any, error)

	mu      sync.Mutex
	failing map[string]bool // nodes that could not take their last copy

	projects projectWants
	ledger   ledger
	cached   cached
	surplus  surplus

	unrepaired int // blobs that repair could not bring here; its goroutine's alone
}

type metrics struct {
	underReplicated prometheus.Gauge
	leaving         prometheus.Gauge
	repairRows      prometheus.Counter
	cacheBytes      prometheus.Gauge
	evicted         prometheus.Counter
	copiesMade      prometheus.Counter
	copyFailures    prometheus.Counter
	received        prometheus.Counter
	served          prometheus.Counter
	dropped         *prometheus.CounterVec
	surplusBlobs    prometheus.Gauge
	surplusBytes    prometheus.Gauge
	released        prometheus.Counter
}

// New makes the room.
func New(c Config) (*Peers, error) {
	p := &Peers{Config: c, tables: newPieceTables(c.Store), failing: map[string]bool{}, answers: map[string]func(context.Context, json.RawMessage) (any, error){}}
	p.metrics = metrics{
		underReplicated: prometheus.NewGauge(prometheus.GaugeOpts{Name: "atoll_peers_underreplicated_blobs", Help: "Blobs that this node sees to and that are on fewer nodes than they should be: the sum over the nodes is that of the site."}),
		leaving:         prometheus.NewGauge(prometheus.GaugeOpts{Name: "atoll_peers_leaving_blobs", Help: "Blobs that this node, which is being drained, must still hand over."}),
		repairRows:      prometheus.NewCounter(prometheus.CounterOpts{Name: "atoll_peers_repair_rows_total", Help: "Rows of blobs that repair has looked at."}),
		cacheBytes:      prometheus.NewGauge(prometheus.GaugeOpts{Name: "atoll_peers_cache_bytes", Help: "Bytes of blobs that this node, which is a cache, holds."}),
		evicted:         prometheus.NewCounter(prometheus.CounterOpts{Name: "atoll_peers_evicted_blobs_total", Help: "Blobs that this node, which is a cache, let go of."}),
		copiesMade:      prometheus.NewCounter(prometheus.CounterOpts{Name: "atoll_peers_copies_total", Help: "Blobs copied to this node for durability or repair."}),
		copyFailures:    prometheus.NewCounter(prometheus.CounterOpts{Name: "atoll_peers_copy_failures_total", Help: "Copies to this node that did not succeed."}),
		received:        prometheus.NewCounter(prometheus.CounterOpts{Name: "atoll_peers_received_bytes_total", Help: "Verified bytes of blobs from peers."}),
		served:          prometheus.NewCounter(prometheus.CounterOpts{Name: "atoll_peers_served_bytes_total", Help: "Bytes of blobs sent to peers."}),
		surplusBlobs:    prometheus.NewGauge(prometheus.GaugeOpts{Name: "atoll_peers_surplus_blobs", Help: "Blobs that this node holds and other nodes are to keep; it lets go of them when those hold them all."}),
		surplusBytes:    prometheus.NewGauge(prometheus.GaugeOpts{Name: "atoll_peers_surplus_bytes", Help: "Bytes of these blobs."}),
		released:        prometheus.NewCounter(prometheus.CounterOpts{Name: "atoll_peers_released_blobs_total", Help: "Surplus copies of blobs that this node let go of."}),
		dropped:         prometheus.NewCounterVec(prometheus.CounterOpts{Name: "atoll_peers_dropped_senders_total", Help: "Peers dropped from the fetch of a blob, by reason."}, []string{"reason"}),
	}
	for _, m := range []prometheus.Collector{p.metrics.underReplicated, p.metrics.leaving, p.metrics.repairRows, p.metrics.cacheBytes, p.metrics.evicted,
		p.metrics.copiesMade, p.metrics.copyFailures, p.metrics.received, p.metrics.served, p.metrics.dropped,
		p.metrics.surplusBlobs, p.metrics.surplusBytes, p.metrics.released} {
		if err := c.Registerer.Register(m); err != nil {
			return nil, fmt.Errorf("peers: %w", err)
		}
	}
	p.client = &http.Client{Transport: &http.Transport{
		DialContext:         p.dialNode,
		MaxIdleConnsPerHost: 4,
		IdleConnTimeout:     time.Minute,
	}}
	if err := p.makeEngines(); err != nil {
		return nil, err
	}
	torrents := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "atoll_peers_torrents", Help: "Blobs that this node fetches or serves by BitTorrent at the moment, or did a few seconds ago."}, func() float64 {
		n, _ := p.swarm.Torrents()
		return float64(n)
	})
	if err := c.Registerer.Register(torrents); err != nil {
		return nil, fmt.Errorf("peers: %w", err)
	}
	return p, nil
}

// dialNode connects to the API service of the node whose id is the host of addr
// and requires that this node is who answers.
func (p *Peers) dialNode(ctx context.Context, _, addr string) (net.Conn, error) {
	id, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	target, ok := p.find(id)
	if !ok {
		return nil, fmt.Errorf("node %s is not a live member of this site", id)
	}
	conn, err := p.Network.Dial(ctx, target.Addr, peernet.ServiceAPI)
	if err != nil {
		return nil, err
	}
	if proven, ok := conn.(interface{ PeerID() string }); !ok || proven.PeerID() != id {
		conn.Close()
		return nil, fmt.Errorf("%s is not node %s but another one", target.Addr, id)
	}
	return conn, nil
}

// find looks a live member up by its id.
func (p *Peers) find(id string) (member.Member, bool) {
	for _, m := range p.Roster.Live() {
		if m.ID == id {
			return m, true
		}
	}
	return member.Member{}, false
}

// others are the live members without this node.
func (p *Peers) others() []member.Member {
	live := p.Roster.Live()
	out := make([]member.Member, 0, len(live))
	for _, m := range live {
		if m.ID != p.Roster.Self() {
			out = append(out, m)
		}
	}
	return out
}

// ServeForwarded sets what serves requests that another node passed on. It must
// be called before Run.
func (p *Peers) ServeForwarded(api http.Handler) { p.api = api }

// Report sets who is told when the disk could not read a blob for a peer, and of a blob
// that is needed and that nobody who was asked holds: of one that a push rests on, whoever
// is up; for repair, once all nodes of the site say so, or each restart of a node would
// raise an alarm for what it alone holds yet. Both return at once. It must be called
// before Run.
func (p *Peers) Report(unreadable func(d digest.Digest, file blobs.File, cause error), absent func(d digest.Digest)) {
	p.unreadable, p.absent = unreadable, absent
}

func (p *Peers) tellAbsent(d digest.Digest) {
	if p.absent != nil {
		p.absent(d)
	}
}

// KeepIf sets what this node lets go of in no case, though others hold it. It must be
// called before Run.
func (p *Peers) KeepIf(pinned func(d digest.Digest) bool) { p.pinned = pinned }

// Run serves the peers, repairs copies and fills in piece roots until ctx ends.
func (p *Peers) Run(ctx context.Context) error {
	if p.api == nil {
		return errors.New("peers: ServeForwarded was not called")
	}
	// Idle connections would outlive the room, with two goroutines each.
	defer p.client.CloseIdleConnections()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return p.runEngines(ctx) })
	group.Go(func() error { return p.tables.run(ctx) })
	group.Go(func() error { return p.engine.Serve(ctx, p.Network.Listen(peernet.ServiceBlob)) })
	group.Go(func() error { return p.serveHTTP(ctx, peernet.ServiceAPI, p.apiServer()) })
	p.refreshProjects(ctx)
	group.Go(func() error { return p.watchProjects(ctx) })
	group.Go(func() error { return p.repair(ctx) })
	group.Go(func() error { return p.keepCache(ctx) })
	group.Go(func() error { return p.shed(ctx) })
	return group.Wait()
}

func (p *Peers) apiServer() *http.Server {
	return &http.Server{
		Handler:           p.peerHandler(),
		ReadHeaderTimeout: 30 * time.Second,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(p.Log.Handler(), slog.LevelDebug),
	}
}

// grace bounds how long requests of other nodes may take once this one stops.
const grace = 3 * time.Second

// serveHTTP serves one service until ctx ends, lets requests under way finish
// within the grace, cuts the others and waits for all of them to return.
func (p *Peers) serveHTTP(ctx context.Context, service byte, server *http.Server) error {
	requests, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	var open sync.RWMutex // each request reads, the end writes
	handler := server.Handler
	server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !open.TryRLock() {
			http.Error(w, "this node is stopping", http.StatusServiceUnavailable)
			return
		}
		defer open.RUnlock()
		handler.ServeHTTP(w, r)
	})
	server.BaseContext = func(net.Listener) context.Context { return requests }
	var stopping sync.WaitGroup
	stopping.Go(func() {
		<-ctx.Done()
		last, cancel := context.WithTimeout(requests, grace)
		defer cancel()
		if server.Shutdown(last) != nil {
			server.Close() // first: a handler that is cut must not seem to have succeeded
			cut()
		}
		open.Lock()
	})
	err := server.Serve(p.Network.Listen(service))
	if ctx.Err() == nil {
		cut()
		server.Close()
		return fmt.Errorf("serve peers: %w", err) // ends the group, and so ctx
	}
	stopping.Wait()
	return nil
}
