package clustertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
)

// Options of a cluster; the zero value has the timings of production.
type Options struct {
	Timings   member.Timings
	Snapshots member.Snapshots
	// Disk gives what stands between a node's raft and its files, for each run.
	Disk func(n *Node) member.Disk
	// Engine gives what stands before the engine of a node's state, for each run.
	Engine func(n *Node, e kv.Engine) kv.Engine
	// Clock gives a node's clock.
	Clock func(n *Node) func() time.Time
	// Define defines the test's tables on each node's database.
	Define func(n *Node, db *table.DB)
}

// Cluster is a site, or several of them on one network.
type Cluster struct {
	Network *Network
	t       testing.TB
	dir     string // of the nodes' directories
	opts    Options
	nodes   []*Node
}

// New gives a cluster without nodes. Nodes that run when the test ends are
// stopped.
func New(t testing.TB, opts Options) *Cluster {
	c := &Cluster{Network: NewNetwork(), t: t, dir: t.TempDir(), opts: opts} // removed after the nodes have ended
	t.Cleanup(func() {
		for _, n := range c.nodes {
			n.Kill()
		}
	})
	return c
}

// Node is one node of a cluster.
type Node struct {
	*member.Node // of the present run
	DB           *table.DB
	Epoch        *epoch.Guard
	Name, Addr   string
	Dir          string
	Tables       any // for Options.Define to keep what it defined
	// Labels and Cache are what the next start says of the node.
	Labels map[string]string
	Cache  bool
	// Level of the program that the next start runs, or the next JoinWith comes
	// with; version.Level when 0.
	Level   int
	Version string // of that program

	cluster *Cluster
	engine  kv.Engine
	power   *power
	host    *host
	cancel  context.CancelFunc
	done    chan error
	logs    *lines
}

// Found starts a new site's first node.
func (c *Cluster) Found() *Node {
	c.t.Helper()
	n := c.newNode()
	if _, err := member.Found(n.Dir, n.Name, n.Addr, nil); err != nil {
		c.t.Fatal(err)
	}
	n.Start()
	return n
}

// Join starts a new node with a token of its own and waits until it serves.
func (c *Cluster) Join(via *Node) *Node {
	c.t.Helper()
	token, err := via.CreateToken(c.t.Context(), time.Hour, 1)
	if err != nil {
		c.t.Fatal(err)
	}
	n := c.newNode()
	if err := n.JoinWith(token, via.Addr); err != nil {
		c.t.Fatal(err)
	}
	n.Start()
	return n
}

// Grow founds a site of so many nodes and waits until its voters are as many
// as they will be.
func (c *Cluster) Grow(nodes int) []*Node {
	c.t.Helper()
	first := c.Found()
	for range nodes - 1 {
		c.Join(first)
	}
	c.AwaitVoters(min(5, nodes-1+nodes%2))
	return c.nodes
}

// NewNode gives a node without an identity.
func (c *Cluster) NewNode() *Node { return c.newNode() }

func (c *Cluster) newNode() *Node {
	number := len(c.nodes) + 1
	n := &Node{
		Name: fmt.Sprintf("node%d", number), Addr: fmt.Sprintf("10.0.0.%d:5001", number),
		Dir: filepath.Join(c.dir, fmt.Sprintf("node%d", number), "data"), cluster: c,
	}
	c.nodes = append(c.nodes, n)
	return n
}

// JoinWith joins the node to a site; it does not start it.
func (n *Node) JoinWith(token string, addrs ...string) error {
	_, err := member.Join(n.cluster.t.Context(), member.JoinConfig{
		Dir: n.Dir, Name: n.Name, Advertise: n.Addr, Token: token, Addrs: addrs, Level: n.Level,
		Dial: n.cluster.Network.Visitor(n.Addr).DialJoin,
	})
	return err
}

// Start runs the node on what its directory holds and waits until it serves.
func (n *Node) Start() {
	n.cluster.t.Helper()
	if err := n.TryStart(); err != nil {
		n.cluster.t.Fatal(err)
	}
}

// TryStart is Start for a node that may refuse.
func (n *Node) TryStart() (err error) {
	t, opts := n.cluster.t, n.cluster.opts
	identity, err := member.LoadIdentity(n.Dir, nil)
	if err != nil {
		return err
	}
	if n.engine, err = kv.OpenBolt(filepath.Join(n.Dir, "meta.db")); err != nil {
		return err
	}
	if opts.Engine != nil {
		n.engine = opts.Engine(n, n.engine)
	}
	n.power = &power{Engine: n.engine}
	n.engine = kv.WriteBehind(n.power)
	defer func() {
		if err != nil {
			err = errors.Join(err, n.engine.Close())
		}
	}()
	n.logs = &lines{t: t, name: n.Name}
	log := slog.New(slog.NewTextHandler(n.logs, &slog.HandlerOptions{Level: level()}))
	n.DB = table.New(n.engine, log)
	if opts.Define != nil {
		opts.Define(n, n.DB)
	}
	if n.Epoch, err = epoch.Open(n.Dir, identity.SiteID, identity.CA, log); err != nil {
		return err
	}
	var node *member.Node
	n.host = &host{
		epoch:     n.Epoch,
		addr:      n.Addr,
		identity:  func() member.Identity { return node.Identity() },
		authorize: func(peer string, service byte) error { return node.Authorize(peer, service) },
	}
	var disk member.Disk
	if opts.Disk != nil {
		disk = opts.Disk(n)
	}
	var clock func() time.Time
	if opts.Clock != nil {
		clock = opts.Clock(n)
	}
	node, err = member.New(member.Config{
		Disk: disk, Clock: clock, Dir: n.Dir, Name: n.Name, Advertise: n.Addr, Network: n.host, DB: n.DB, Log: log, Epoch: n.Epoch,
		Timings: opts.Timings, Snapshots: opts.Snapshots, Labels: n.Labels, Cache: n.Cache,
		Level: n.Level, Version: n.Version,
	}, identity)
	if err != nil {
		return err
	}
	n.Node = node
	n.cluster.Network.attach(n.host)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	if err := n.DB.Build(ctx); err != nil {
		cancel()
		return err
	}
	n.DB.Attach(node)
	n.cancel, n.done = cancel, make(chan error, 1)
	go func() { n.done <- node.Run(ctx) }()
	select {
	case <-node.Ready():
		return nil
	case err := <-n.done:
		cancel()
		n.cancel = nil
		return err
	}
}

// Stop ends the node in order; it may be started again.
func (n *Node) Stop() {
	if n.cancel == nil {
		return
	}
	n.cancel()
	n.cancel = nil
	// One that the site has removed, or replaced under its name, ends so when it
	// learns of it, which may be now; who cares asks Done.
	if err := <-n.done; err != nil && !errors.Is(err, member.ErrRemoved) && !errors.Is(err, errPower) {
		n.cluster.t.Errorf("%s ended with: %v", n.Name, err)
	}
	n.host.kill()
	if err := n.engine.Close(); err != nil && !n.power.off.Load() {
		n.cluster.t.Errorf("%s: closing the state: %v", n.Name, err)
	}
}

// Kill ends the node as a power cut does, as far as the others and its disk can
// see: its connections break before it can say anything, and what of its state was
// not on the disk is lost. It may be started again.
func (n *Node) Kill() {
	if n.cancel != nil {
		n.power.off.Store(true)
		n.host.kill()
		n.Stop()
	}
}

// Blackout kills all nodes at one moment.
func (c *Cluster) Blackout() {
	for _, n := range c.nodes {
		if n.cancel != nil {
			n.power.off.Store(true)
			n.host.kill()
		}
	}
	for _, n := range c.nodes {
		n.Stop()
	}
}

// power is what a node's disk gets its own from.
type power struct {
	kv.Engine
	off atomic.Bool
}

var errPower = errors.New("the power is off")

func (p *power) Update(fn func(kv.Writer) error) error {
	if p.off.Load() {
		return errPower
	}
	return p.Engine.Update(fn)
}

// Done gives the error with which a running node ends by itself.
func (n *Node) Done() error {
	err := <-n.done
	n.done <- nil // for Stop
	return err
}

// Up reports whether the node runs.
func (n *Node) Up() bool { return n.cancel != nil }

// Isolate cuts a node off from all others, Rejoin brings it back.
func (c *Cluster) Isolate(n *Node) { c.each(n, c.Network.Cut) }

// Rejoin heals what Isolate cut.
func (c *Cluster) Rejoin(n *Node) { c.each(n, c.Network.Heal) }

func (c *Cluster) each(n *Node, do func(a, b string)) {
	for _, other := range c.nodes {
		if other != n {
			do(n.Addr, other.Addr)
		}
	}
}

// Await waits until ok, for a minute of the test's time at most.
func (c *Cluster) Await(what string, ok func() bool) {
	c.t.Helper()
	deadline := time.NewTimer(time.Minute)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			for _, n := range c.nodes {
				if n.Up() {
					s, err := n.Status(c.t.Context())
					c.t.Logf("%s: %+v, %v", n.Name, s, err)
				}
			}
			c.t.Fatalf("waited a minute in vain: %s", what)
		}
	}
}

// AwaitVoters waits until every node that runs sees so many voters and a
// leader confirmed by them.
func (c *Cluster) AwaitVoters(want int) {
	c.t.Helper()
	c.Await(fmt.Sprintf("%d voters", want), func() bool {
		for _, n := range c.nodes {
			if !n.Up() {
				continue
			}
			s, err := n.Status(c.t.Context())
			if err != nil || !s.Quorum || voters(s) != want {
				return false
			}
		}
		return true
	})
}

func voters(s member.Status) int {
	count := 0
	for _, m := range s.Members {
		if m.Voter {
			count++
		}
	}
	return count
}

// Leader waits for a leader that a majority confirms.
func (c *Cluster) Leader() *Node {
	c.t.Helper()
	var leader *Node
	c.Await("a leader", func() bool {
		for _, n := range c.nodes {
			if !n.Up() {
				continue
			}
			if s, err := n.Status(c.t.Context()); err == nil && s.Quorum && s.Leader == s.Self {
				leader = n
				return true
			}
		}
		return false
	})
	return leader
}

// Others are the nodes that run, but for these.
func (c *Cluster) Others(not ...*Node) []*Node {
	var others []*Node
nodes:
	for _, n := range c.nodes {
		for _, no := range not {
			if n == no {
				continue nodes
			}
		}
		if n.Up() {
			others = append(others, n)
		}
	}
	return others
}

// lines writes a node's log to the test's.
type lines struct {
	t    testing.TB
	name string
	mu   sync.Mutex
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.t.Logf("%s %s", l.name, bytes.TrimSpace(p))
	return len(p), nil
}

// level of what nodes log: ATOLL_TEST_LOG=debug shows raft as well.
func level() slog.Level {
	if os.Getenv("ATOLL_TEST_LOG") == "debug" {
		return slog.LevelDebug
	}
	return slog.LevelWarn
}
