// Package member makes one node a member of a site: its identity, how it
// founds or joins, the raft instance with its log and snapshots, and the
// membership that raft follows. It is the way to the leader for cluster/table.
// DESIGN.md beside it states the invariants and why they hold.
package member

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/gossip"
	"github.com/atoll-registry/atoll/cluster/joining"
	"github.com/atoll-registry/atoll/cluster/keyring"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/version"
)

// Services of the network that this package listens on.
const (
	ServiceRaft    byte = 1
	ServiceControl byte = 2
)

// Network carries connections between the nodes of the site. An accepted or
// dialled connection proves its peer and says who it is: it has a method
// PeerID() string.
type Network interface {
	// Listen gives the accepted connections of one service.
	Listen(service byte) net.Listener
	// Dial reaches a service of the node at addr.
	Dial(ctx context.Context, addr string, service byte) (net.Conn, error)
	// ListenJoin gives the connections of nodes that have no certificate yet.
	ListenJoin() net.Listener
	// DialJoin reaches the join service of the node at addr, which must prove
	// to be of the site whose authority has the pin. Its error wraps
	// ErrOtherSite when it is not.
	DialJoin(ctx context.Context, addr string, caPin []byte) (net.Conn, error)
	// Drop closes the accepted connections of a node. It is called again and
	// again for nodes that were removed.
	Drop(peerID string)
}

// Config is what a Node needs. Zero values of what is not required mean the
// defaults of the design.
type Config struct {
	Dir       string        // of the identity and of raft's files; required
	Keys      *keyring.Ring // opens and seals the files of Dir that hold keys; nil: they are plain
	Name      string        // a label; the identity's when empty
	Advertise string        // host:port of the peer port as other nodes reach it; required
	Version   string        // of the program, for people
	Level     int           // of the program: version.Level when 0
	APIURL    string        // where clients reach this node's public API
	Network   Network
	DB        *table.DB // New defines its tables on it; built before Run
	// Epoch judges the peers that Network meets; nil: there was no recovery.
	Epoch    *epoch.Guard
	Log      *slog.Logger
	Registry prometheus.Registerer // may be nil
	// Labels and Cache are what the node's row says of it: see Member.
	Labels map[string]string
	Cache  bool

	Timings   Timings
	Snapshots Snapshots
	MaxVoters int // 5

	// Clock of this machine; time.Now when nil.
	Clock func() time.Time
	// Disk stands before raft's files; nil lets raft use them as they are.
	Disk Disk
}

// Disk stands between raft and its files, to deal with a disk that fails.
type Disk interface {
	// Logs and Stable stand before raft's log and what it must not forget.
	Logs(raft.LogStore) raft.LogStore
	Stable(raft.StableStore) raft.StableStore
	// Broken gives the failure after which the node has to stop.
	Broken() <-chan error
	// Stop lets those go that wait for the disk: the node is stopping.
	Stop()
}

// plainDisk is no Disk at all.
type plainDisk struct{}

func (plainDisk) Logs(s raft.LogStore) raft.LogStore         { return s }
func (plainDisk) Stable(s raft.StableStore) raft.StableStore { return s }
func (plainDisk) Broken() <-chan error                       { return nil }
func (plainDisk) Stop()                                      {}

// Timings of the consensus. Tests shrink them; in one site they must agree.
type Timings struct {
	Heartbeat  time.Duration // a follower waits so long for its leader; 3 s
	Election   time.Duration // a candidate waits so long for votes; 3 s
	Lease      time.Duration // a leader without a majority steps down after; 1.5 s
	LeaderWait time.Duration // a write waits so long for a leader; 15 s
	ReadWait   time.Duration // a read index waits so long for the voters; 3 s
	Ping       time.Duration // what this node has to do by itself is looked at so often; 1 s
	Live       time.Duration // a node that has just started may take so long to learn who is up; 3 s
	Probe      time.Duration // gossip asks a member for a sign of life so often; 0.8 s
	RPC        time.Duration // deadline of one raft message; 5 s
	Renew      time.Duration // the certificate's age is looked at so often; 1 h
}

// Snapshots says when one is taken and what of the log stays behind it.
type Snapshots struct {
	// MinBytes of log since the last snapshot make a new one due, unless
	// half of the state is more: then that many, up to 256 MiB. 32 MiB.
	MinBytes int64
	// Eager: MinBytes alone decides, however large the state is.
	Eager bool
	// TrailingLogs stay in the log behind a snapshot, so that a node that was
	// away for a while needs no snapshot. 10240.
	TrailingLogs uint64
}

// Failures that a caller can tell apart.
var (
	// ErrEmpty: the data directory holds no identity.
	ErrEmpty = errors.New("the data directory belongs to no site yet")
	// ErrFounded: the data directory already holds an identity.
	ErrFounded = errors.New("the data directory already belongs to a site")
	// Reasons why a site does not take a node in.
	ErrOtherSite    = joining.ErrOtherSite
	ErrTokenExpired = joining.ErrTokenExpired
	ErrTokenUsed    = joining.ErrTokenUsed
	ErrTokenUnknown = joining.ErrTokenUnknown
	ErrNameTaken    = joining.ErrNameTaken
	// ErrRemoved: this node is no longer a member of its site.
	ErrRemoved = joining.ErrRemoved
	// ErrUnreachable: none of the addresses given for joining answered.
	ErrUnreachable = errors.New("no node of the site answered")
	// ErrLogLost: the data directory has an identity and no consensus log, or one that
	// does not go on where the state ends.
	ErrLogLost = errors.New("this node has lost its log of the consensus")
	// ErrCloned: another process runs as this very node.
	ErrCloned = errors.New("another machine runs as this very node")

	errStopped = errors.New("the node is stopping")
)

// Node is this process as a member of its site.
//
// Lock order: mu is a leaf. Run owns every goroutine.
type Node struct {
	cfg    Config
	log    *slog.Logger
	db     *table.DB
	rows   rows
	gate   *version.Gate
	client *http.Client

	token ed25519.PrivateKey // of Identity.TokenKey

	mu       sync.Mutex
	identity Identity
	cert     tls.Certificate
	pool     *x509.CertPool // of identity.CA
	pins     []string       // of the same, in hex

	raft     atomic.Pointer[instance] // nil until Run has started it
	term     atomic.Uint64            // the newest term that this node has opened as its leader
	stale    atomic.Bool              // the site no longer knows the authority of this node's certificate
	founding atomic.Bool              // the site's first rows are still to be committed
	changed  *signal                  // fires when the leader or the membership may have changed
	peers    *sightings
	gossip   *gossip.Gossip // who is up
	metrics  *metrics
	report   atomic.Pointer[Report]        // nil is a node that is well
	reseal   []func(context.Context) error // see Resealers
	duties   map[string]Duty
	altering sync.Mutex // held while the identity on disk changes; taken before mu
	begun    time.Time
	before   time.Time // when an earlier run last heard of a leader; zero: not known
	run      string    // of this process: two that run as one node differ in it
	ready    chan struct{}
	ran      atomic.Bool
}

var _ table.Backend = (*Node)(nil)

// New prepares a node and defines its tables on cfg.DB; nothing runs yet. The
// order is: New, DB.Build, DB.Attach(node), Run. It keeps the bytes of the identity's
// cluster keys, and overwrites them when the node may not have them any more.
func New(cfg Config, identity Identity) (*Node, error) {
	if cfg.Dir == "" || cfg.Network == nil || cfg.DB == nil || cfg.Log == nil {
		return nil, errors.New("member: Dir, Network, DB and Log are required")
	}
	if err := checkAddr(cfg.Advertise); err != nil {
		return nil, fmt.Errorf("the address to advertise: %w", err)
	}
	if cfg.Name == "" {
		cfg.Name = identity.Name
	}
	if err := checkName(cfg.Name); err != nil {
		return nil, err
	}
	if err := checkLabels(cfg.Labels); err != nil {
		return nil, err
	}
	cfg.defaults()
	n := &Node{
		cfg: cfg, log: cfg.Log, db: cfg.DB, rows: defineRows(cfg.DB), gate: version.NewGate(cfg.DB, cfg.Level, cfg.Version),
		changed: newSignal(), peers: newSightings(), ready: make(chan struct{}), begun: time.Now(), run: table.NewID(),
	}
	err := identity.ensureTokenKey(cfg.Dir, cfg.Keys)
	if err != nil {
		return nil, err
	}
	n.duties = map[string]Duty{pathJoin: n.admit, pathRenew: n.renewal, dutyCertificate: n.issueServer}
	n.token = ed25519.NewKeyFromSeed(identity.TokenKey)
	if err := n.become(identity); err != nil {
		return nil, err
	}
	n.before = n.recallContact()
	n.client = n.newClient()
	if n.gossip, err = gossip.New(gossip.Config{
		Self: identity.NodeID, Network: cfg.Network, Hint: n.hint, Interval: cfg.Timings.Probe, Log: cfg.Log, Registry: cfg.Registry,
	}); err != nil {
		return nil, err
	}
	if n.metrics, err = newMetrics(cfg.Registry, n); err != nil {
		return nil, err
	}
	return n, nil
}

func (c *Config) defaults() {
	t := &c.Timings
	for _, d := range []struct {
		at   *time.Duration
		mean time.Duration
	}{
		{&t.Heartbeat, 3 * time.Second}, {&t.Election, 3 * time.Second}, {&t.Lease, 1500 * time.Millisecond},
		{&t.LeaderWait, 15 * time.Second}, {&t.ReadWait, 3 * time.Second}, {&t.Ping, time.Second},
		{&t.Live, 3 * time.Second}, {&t.Probe, gossip.DefaultInterval}, {&t.RPC, 5 * time.Second}, {&t.Renew, time.Hour},
	} {
		if *d.at == 0 {
			*d.at = d.mean
		}
	}
	if c.Snapshots.MinBytes == 0 {
		c.Snapshots.MinBytes = 32 << 20
	}
	if c.Snapshots.TrailingLogs == 0 {
		c.Snapshots.TrailingLogs = 10240
	}
	if c.Disk == nil {
		c.Disk = plainDisk{}
	}
	if c.Clock == nil {
		c.Clock = time.Now
	}
	if c.Level == 0 {
		c.Level = version.Level
	}
	if c.MaxVoters == 0 {
		c.MaxVoters = 5
	}
}

// Self is this node's id.
func (n *Node) Self() string { return n.Identity().NodeID }

// Identity is what this node is at present, without the cluster keys; its certificate
// changes when it is renewed.
func (n *Node) Identity() Identity {
	n.mu.Lock()
	defer n.mu.Unlock()
	id := n.identity
	id.ClusterKey = nil
	return id
}

// Certificate is the node's certificate for its peers, the authority's behind
// it. It changes when it is renewed: ask again for each handshake.
func (n *Node) Certificate() tls.Certificate {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cert
}

// Pool is the set of authorities whose certificates this node accepts. It changes
// while the site's authority does: ask again for each handshake.
func (n *Node) Pool() *x509.CertPool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.pool
}

// CA is the certificate of the site's authority in PEM, of both while it changes.
func (n *Node) CA() []byte { return n.Identity().CA }

// Ready is closed when the node serves: its state is loaded and its peers are
// answered. There need not be a leader.
func (n *Node) Ready() <-chan struct{} { return n.ready }

// Leader is the id of the leader as far as this node knows; "" for none.
func (n *Node) Leader() string {
	_, id := n.leader()
	return id
}

func (n *Node) leader() (addr, id string) {
	r := n.raft.Load()
	if r == nil {
		return "", ""
	}
	a, i := r.LeaderWithID()
	return string(a), string(i)
}

func (n *Node) raftDir() string { return filepath.Join(n.cfg.Dir, "raft") }

// signal wakes everybody who waits for a change.
type signal struct {
	mu sync.Mutex
	ch chan struct{}
}

func newSignal() *signal { return &signal{ch: make(chan struct{})} }

// wait gives a channel that is closed at the next fire.
func (s *signal) wait() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ch
}

func (s *signal) fire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.ch)
	s.ch = make(chan struct{})
}

// sleep waits; false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
