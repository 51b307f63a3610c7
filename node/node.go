// Package node is the appliance: it puts the cluster, the peer port and the
// rooms together into one process, starts them in order and stops them in order.
//
// Order of starting, and the reverse of stopping: data directory locked, peer
// port, cluster, rooms, registry address. Each stands on the one before: what is
// served last is stopped first, so that no request meets a part that is gone, and
// the cluster hands over its leadership while the peer port is still there.
package node

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/atoll-registry/atoll/cluster/atomicfile"
	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/keyring"
	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/recovery"
	"github.com/atoll-registry/atoll/cluster/reserve"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/version"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/identity"
	"github.com/atoll-registry/atoll/node/telemetry"
	"github.com/atoll-registry/atoll/transfer/peernet"
)

// PeerPort is the default port between nodes.
const PeerPort = "5001"

// Node is one node of a site.
type Node struct {
	config  Config
	log     *slog.Logger
	lock    *os.File
	keys    *keyring.Ring // of the files that hold keys
	founded bool

	peerListener net.Listener
	peerPackets  *net.UDPConn // of the same number; nil: no UDP
	network      *peernet.Net
	reserve      *reserve.Reserve
	engine       kv.Engine
	db           *table.DB
	member       *member.Node
	rooms        *rooms
	public       net.Listener
	publicTLS    *tls.Config
	files        *fileCertificate // the user's own certificate; nil when there is none
	own          *siteCertificate // of the site's authority; nil when there is none
	socket       net.Listener
}

// New opens a node's data directory, founds or joins a site when it is empty, and
// takes its addresses. It serves nothing before Run. When it fails, it has let go
// of all that it took.
func New(ctx context.Context, c Config) (n *Node, err error) {
	if err := c.complete(); err != nil {
		return nil, err
	}
	n = &Node{config: c, log: c.Log}
	taken := n // a return of nil sets n
	defer func() {
		if err != nil {
			taken.Close()
		}
	}()
	// Before anything in the directory is touched.
	if err := version.Check(c.Data, c.Version); err != nil {
		return nil, err
	}
	if n.lock, err = lockData(c.Data); err != nil {
		return nil, err
	}
	if err := rebuildPending(c); err != nil {
		return nil, err
	}
	if err := recovery.Pending(c.Data); err != nil {
		return nil, fault.New(fault.Conflict, "%v", err)
	}
	n.keys, err = c.Keys.open(ctx, c.Data)
	clear(c.Keys.Passphrase) // the ring needs it no more
	if err != nil {
		return nil, err
	}
	// The addresses and the certificate first: a node that cannot have them must
	// not found a site.
	if n.public, err = listen("--listen", c.Listen); err != nil {
		return nil, err
	}
	if n.peerListener, err = listen("--peer-listen", c.PeerListen); err != nil {
		return nil, err
	}
	if err := n.listenPackets(); err != nil {
		return nil, err
	}
	n.config.Advertise = chosenPort(c.Advertise, n.peerListener.Addr())
	if n.publicTLS, err = n.tlsConfig(); err != nil {
		return nil, err
	}
	who, err := n.identify(ctx)
	if err != nil {
		return nil, err
	}
	if err := n.build(ctx, who); err != nil {
		return nil, err
	}
	n.socket, err = listenSocket(ctx, c.Data)
	return n, err
}

// complete fills in what the configuration leaves open.
func (c *Config) complete() error {
	if err := c.Storage.Check(); err != nil {
		return err // before a site is founded
	}
	if c.Init && len(c.Join) > 0 {
		return fault.New(fault.Invalid, "--init founds a new site and --join joins another: choose one")
	}
	if _, err := peernet.ParseTransport(c.PeerTransport); err != nil {
		return fault.Wrap(err, fault.Invalid, "--peer-transport")
	}
	if err := c.checkFounding(); err != nil {
		return err
	}
	if c.Data == "" {
		c.Data = DefaultDataDir()
	}
	if err := checkDir(c.Data); err != nil {
		return err
	}
	if u, err := url.Parse(c.ExternalURL); c.ExternalURL != "" && (err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https") {
		return fault.New(fault.Invalid, "--external-url %s is no URL such as https://registry.example", c.ExternalURL)
	}
	host, _, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return fault.New(fault.Invalid, "--listen %s is no HOST:PORT", c.Listen)
	}
	if c.PeerListen == "" {
		c.PeerListen = net.JoinHostPort(host, PeerPort)
	}
	peerHost, peerPort, err := net.SplitHostPort(c.PeerListen)
	if err != nil {
		return fault.New(fault.Invalid, "--peer-listen %s is no HOST:PORT", c.PeerListen)
	}
	if c.Advertise == "" {
		if ip, err := netip.ParseAddr(peerHost); peerHost == "" || err == nil && ip.IsUnspecified() {
			if peerHost, err = ownAddress(); err != nil {
				return err
			}
		}
		c.Advertise = net.JoinHostPort(peerHost, peerPort)
	}
	if _, _, err := net.SplitHostPort(c.Advertise); err != nil {
		return fault.New(fault.Invalid, "--advertise %s is no HOST:PORT", c.Advertise)
	}
	if c.Name == "" {
		if c.Name, err = os.Hostname(); err != nil {
			return fault.Wrap(err, fault.Invalid, "this machine has no name; give the node one with --name")
		}
	}
	return nil
}

// chosenPort puts the port that the system chose in the place of port 0.
func chosenPort(addr string, taken net.Addr) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || port != "0" {
		return addr
	}
	_, port, err = net.SplitHostPort(taken.String())
	if err != nil {
		return addr
	}
	return net.JoinHostPort(host, port)
}

// ownAddress is the first address of this machine that others can reach.
func ownAddress() (string, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return "", err
	}
	for _, a := range addrs {
		prefix, err := netip.ParsePrefix(a.String())
		if err == nil && prefix.Addr().IsGlobalUnicast() {
			return prefix.Addr().String(), nil
		}
	}
	return "", fault.New(fault.Invalid, "this machine has no address that other nodes can reach; name one with --advertise HOST:PORT")
}

// identify reads who this node is, or makes it somebody.
func (n *Node) identify(ctx context.Context) (member.Identity, error) {
	c := n.config
	who, err := member.LoadIdentity(c.Data, n.keys)
	if err == nil {
		err = notWhole(member.CheckLog(c.Data)) // before anything is made in the directory
	}
	if !errors.Is(err, member.ErrEmpty) {
		return who, err
	}
	switch {
	case c.Init:
		if err := checkFirstPassword(c.AdminPassword); err != nil {
			return who, err
		}
		n.founded = true
		return member.Found(c.Data, c.Name, c.Advertise, n.keys)
	case c.Expect > 0:
		return n.foundTogether(ctx)
	case len(c.Join) > 0:
		return n.join(ctx)
	}
	return who, fault.New(fault.Invalid, "%s holds no node. If its disk is not mounted, mount it. Else choose: --init founds a new site, --join ADDR --token TOKEN joins one, or make a site of a backup in it with: atoll restore FILE", c.Data)
}

func checkFirstPassword(password string) error {
	if size := len(password); size > 0 && (size < identity.MinPassword || size > identity.MaxPassword) {
		return fault.New(fault.Invalid, "the first password of admin has %d to %d bytes, this one has %d; no site was founded", identity.MinPassword, identity.MaxPassword, size)
	}
	return nil
}

func notWhole(err error) error {
	if errors.Is(err, member.ErrLogLost) {
		return fault.Wrap(err, fault.Conflict, "this node does not start")
	}
	return err
}

func (n *Node) join(ctx context.Context) (member.Identity, error) {
	if n.config.Token == "" {
		return member.Identity{}, fault.New(fault.Invalid, "--join needs --token TOKEN or --token-file FILE; make one on a node of the site with: atoll token create")
	}
	if token, err := pki.ParseToken(n.config.Token); err == nil && token.Kind == pki.KindSite {
		return member.Identity{}, fault.New(fault.Invalid, "the token is one by which machines found a site together: say with --bootstrap-expect N how many do")
	}
	who, err := n.joinWith(ctx, n.config.Token, n.config.Join)
	return who, notJoined(err)
}

// joinWith joins a site with a join token.
func (n *Node) joinWith(ctx context.Context, token string, addrs []string) (member.Identity, error) {
	dialer, err := peernet.New(peernet.Config{Log: n.log, Transport: n.config.transport})
	if err != nil {
		return member.Identity{}, err
	}
	return member.Join(ctx, member.JoinConfig{
		Dir: n.config.Data, Keys: n.keys, Name: n.config.Name, Advertise: n.config.Advertise,
		Addrs: addrs, Token: token, Log: n.log,
		Dial: func(ctx context.Context, addr string, pin []byte) (net.Conn, error) {
			conn, err := dialer.DialJoin(ctx, addr, pin)
			if errors.Is(err, peernet.ErrOtherSite) {
				err = fmt.Errorf("%w: %w", member.ErrOtherSite, err)
			}
			return conn, err
		},
	})
}

// notJoined gives the reasons why a node may not join the kinds that decide exit
// codes.
func notJoined(err error) error {
	const text = "this node did not join the site"
	switch {
	case errors.Is(err, pki.ErrMalformed):
		return fault.Wrap(err, fault.Invalid, text)
	case errors.Is(err, member.ErrTokenExpired), errors.Is(err, member.ErrTokenUsed), errors.Is(err, member.ErrTokenUnknown), errors.Is(err, member.ErrOtherSite):
		return fault.Wrap(err, fault.Denied, text)
	case errors.Is(err, version.ErrMismatch):
		return fault.Wrap(err, fault.Precondition, text)
	case errors.Is(err, member.ErrNameTaken):
		return fault.Wrap(err, fault.Conflict, text)
	case errors.Is(err, member.ErrUnreachable):
		return fault.Wrap(err, fault.Unavailable, text)
	}
	return err
}

// build puts the parts together.
func (n *Node) build(ctx context.Context, who member.Identity) (err error) {
	metrics := telemetry.NewRegistry()
	guard, err := epoch.Open(n.config.Data, who.SiteID, who.Authorities(), n.log)
	if err != nil {
		return err
	}
	paired, err := n.config.paired()
	if err != nil {
		return err
	}
	if n.network, err = peernet.New(peernet.Config{
		Founding: paired, SiteID: who.SiteID, Log: n.log, Registry: metrics, Epoch: guard.Wire, Meet: guard.Meet,
		Cert:      func() tls.Certificate { return n.member.Certificate() },
		CA:        func() *x509.CertPool { return n.member.Pool() },
		Authorize: func(id string, service byte) error { return n.member.Authorize(id, service) },
		Now:       func() time.Time { return n.member.Now() },
		Peers:     n.fellows,
		Transport: n.config.transport, Secret: []byte(cmp.Or(string(who.TokenKey), string(who.Key))),
	}); err != nil {
		return err
	}
	// Before the first file is opened: on a full disk that takes the ballast.
	if n.reserve, err = reserve.Open(reserve.Path(n.config.Data), blobs.Disk(n.config.Data), n.log); err != nil {
		return err
	}
	if n.engine, err = kv.OpenBolt(filepath.Join(n.config.Data, "meta.db")); err != nil {
		return err
	}
	n.engine = kv.WriteBehind(n.reserve.Engine(n.engine))
	n.db = table.New(n.engine, n.log)
	if n.member, err = member.New(member.Config{
		Dir: n.config.Data, Keys: n.keys, Name: n.config.Name, Advertise: n.config.Advertise,
		Network: n.network, DB: n.db, Epoch: guard, Log: n.log, Registry: metrics,
		Version: n.config.Version, Timings: n.config.timings, Snapshots: n.config.Snapshots, Clock: n.config.clock,
		Disk: n.reserve, Labels: n.config.Labels, Cache: n.config.Cache,
	}, who); err != nil {
		return err
	}
	if n.own != nil {
		n.own.from = n.member
	}
	n.rooms, err = newRooms(ctx, ground{n.config, n.url(), n.log, metrics, n.engine, n.db, n.member, n.network, n.peerPackets != nil, n.reserve, n.files, n.own, n.keys})
	return err
}

// Run serves until ctx ends, then stops in order. It may be called once.
func (n *Node) Run(ctx context.Context) error {
	defer n.Close()
	if err := n.db.Build(ctx); err != nil {
		if errors.Is(err, context.Cause(ctx)) {
			return nil // told to stop before it served
		}
		return err
	}
	n.db.Attach(n.member)
	if err := n.rooms.settings.Load(); err != nil {
		return err
	}
	n.rooms.peers.ServeForwarded(n.rooms.http)

	// Three floors, each stopped when all above it have: the first error of any
	// stops them all.
	run, fail := context.WithCancelCause(ctx)
	port := startFloor(run, fail, func(ctx context.Context) error { return n.network.ServeBoth(ctx, n.peerListener, n.packets()) })
	cluster := startFloor(run, fail, n.member.Run, n.welcome, n.own.keep)
	rooms := startFloor(run, fail, n.rooms.settings.Run, n.rooms.traffic.Run, n.rooms.jobs.Run, n.rooms.peers.Run, n.rooms.endpoints.Run, n.rooms.scrub.Run,
		n.rooms.registry.Run, n.rooms.storage.Run, n.rooms.watch.Run, n.rooms.ledger.Run, n.rooms.doctor.Run, telemetry.GiveBackMemory,
		telemetry.BoundMemory(n.engine.Large), telemetry.SpareProcessor)

	err := n.settle(run)
	if err == nil {
		n.certified(run)
		n.announce()
		err = n.serve(run)
	}
	rooms()
	cluster()
	port()
	cause := context.Cause(run)
	fail(nil)
	switch {
	case ctx.Err() == nil && cause != nil:
		return ended(cause, n.config.Data) // why the node stopped, not what that made of the rest
	case ctx.Err() != nil && errors.Is(err, context.Cause(ctx)):
		return nil // told to stop before it served
	}
	return err
}

// Push admits a manifest as that of a client is, once its bytes are here: it is for
// programs that have a node in their process. It fails until the node serves.
func (n *Node) Push(ctx context.Context, p catalog.Push) error {
	_, err := n.rooms.catalog.Put(ctx, p)
	return err
}

// ended says what to do about an end that is not the node's own wish.
func ended(cause error, dir string) error {
	if errors.Is(cause, member.ErrRemoved) {
		return fault.Wrap(cause, fault.Denied, "this node was removed from its site and serves no more; to let this machine join again, move %s away and start with --join and a new token", dir)
	}
	if errors.Is(cause, member.ErrCloned) {
		return fault.Wrap(cause, fault.Conflict, "another machine runs as this very node: this data directory, %s, was copied from it. To make this machine a node of its own: atoll node seal --yes --data %s, then start it with --join and a new token", dir, dir)
	}
	return notWhole(cause)
}

// startFloor runs functions in a context that outlives ctx, and gives the way to
// stop them and wait. The first error among them is reported to fail.
func startFloor(ctx context.Context, fail context.CancelCauseFunc, parts ...func(context.Context) error) (stop func()) {
	inner, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var group errgroup.Group
	for _, part := range parts {
		group.Go(func() error {
			err := part(inner)
			if err == nil && inner.Err() == nil {
				err = errors.New("a part of the node ended by itself")
			}
			if err != nil && inner.Err() == nil {
				fail(err)
			}
			return err
		})
	}
	return func() {
		cancel()
		_ = group.Wait() // the error that mattered went to fail
	}
}

// settlePatience bounds how long a node waits at its first start for what every
// site has: identity, library project, admin.
const (
	settlePatience = time.Minute
	settlePause    = 250 * time.Millisecond // most failures have waited for a leader already
)

// settle waits until the node's own state can be served. At a site's first start
// it creates what every site has; the admin comes last and tells that it is done,
// so that a start that was cut short is completed by the next one.
func (n *Node) settle(ctx context.Context) error {
	select {
	case <-n.member.Ready():
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if done, err := n.rooms.identity.HasAdmin(); err != nil || done {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, settlePatience,
		fault.New(fault.Unavailable, "the site has no leader; start more of its nodes, then this one again"))
	defer cancel()
	who, err := member.LoadIdentity(n.config.Data, n.keys)
	if err != nil {
		return err
	}
	for {
		_, err := n.rooms.journal.EnsureSite(ctx, who.SiteID, who.Name)
		if err == nil {
			err = n.rooms.projects.EnsureLibrary(ctx, "system")
		}
		if err == nil {
			err = n.rooms.identity.EnsureAdmin(ctx, n.adminPassword)
		}
		if err == nil || ctx.Err() != nil || !fault.Is(err, fault.Unavailable) {
			return errors.Join(err, context.Cause(ctx))
		}
		n.log.Info("waiting for the site's leader", "err", err)
		pause := time.NewTimer(settlePause)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
		}
	}
}

// certified waits a while for the certificate that clients ask for first of all.
func (n *Node) certified(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, certificateTry)
	defer cancel()
	if err := n.own.first(ctx); err != nil {
		n.log.Warn("clients cannot connect until the site's leader has made a certificate for this node", "err", err)
	}
}

// adminPassword is the given password, or a random one that is first put into its
// file, so that no site has a password that nobody knows.
func (n *Node) adminPassword() (string, error) {
	if n.config.AdminPassword != "" {
		return n.config.AdminPassword, nil
	}
	password := rand.Text()
	name := filepath.Join(n.config.Data, PasswordName)
	return password, atomicfile.Write(name, []byte(password+"\n"))
}

func (n *Node) announce() {
	started := Started{
		URL: n.url(), PeerAddr: n.config.Advertise, Data: n.config.Data, Founded: n.founded,
	}
	file := filepath.Join(n.config.Data, PasswordName)
	if _, err := os.Stat(file); err == nil {
		started.PasswordFile = file
	}
	n.log.Info("node serves", "url", started.URL, "peer_addr", started.PeerAddr, "data", started.Data)
	if n.config.Started != nil {
		n.config.Started(started)
	}
}

// url is where clients find the registry.
func (n *Node) url() string {
	if n.publicTLS == nil {
		return "http://" + n.reachable()
	}
	return "https://" + n.reachable()
}

// reachable is the registry's address as others can use it: when it is all of the
// machine's, one that the other nodes are told too.
func (n *Node) reachable() string {
	addr := n.public.Addr().String()
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	if ip, err := netip.ParseAddr(host); err != nil || !ip.IsUnspecified() {
		return addr
	}
	if host, _, err = net.SplitHostPort(n.config.Advertise); err != nil {
		return addr
	}
	return net.JoinHostPort(host, port)
}

// Close lets go of what New took; for a node that is not Run.
func (n *Node) Close() {
	for _, l := range []net.Listener{n.public, n.peerListener, n.socket} {
		if l != nil {
			l.Close()
		}
	}
	if n.peerPackets != nil {
		n.peerPackets.Close()
	}
	if n.rooms != nil && n.rooms.store != nil {
		n.rooms.store.Close()
	}
	if n.engine != nil {
		if err := n.engine.Close(); err != nil {
			n.log.Warn("closing the state; the next start goes on from the log", "error", err)
		}
	}
	if n.lock != nil {
		n.lock.Close()
	}
}
