// Package gossip notices which members of the site are there. It runs memberlist
// (SWIM with Lifeguard) over the peer port: every node asks one other for a sign of
// life at a time, has others ask when there is no answer, and tells what it found
// along the way.
//
// Invariants:
//   - It is a hint and never the authority. Who is a member is what Follow was told
//     last; gossip neither adds nor keeps one.
//   - What a peer says in its own name is proved by its certificate. What it says of
//     others may be wrong, and costs at most that a node which lives counts as down
//     for as long as the lies go on.
//   - Nothing waits for a peer: queues are bounded, and what does not fit is dropped.
//     What one peer can take of memory, processor and connections is bounded too.
//   - Time is the monotonic clock's. A clock that is set changes nothing.
//
// DESIGN.md beside it gives the reasons and the figures.
package gossip

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/prometheus/client_golang/prometheus"
)

// Service of the peer port.
const Service byte = 5

// packetSize is what memberlist puts into one packet, so that it fits into a
// datagram of any path.
const packetSize = 1200

// DefaultInterval is Config.Interval's.
const DefaultInterval = 800 * time.Millisecond

// MaxHint is the longest hint, in bytes.
const MaxHint = 64

// Network carries connections between members. A connection proves its peer and has
// a method PeerID() string.
type Network interface {
	Listen(service byte) net.Listener
	Dial(ctx context.Context, addr string, service byte) (net.Conn, error)
}

// Member of the site: its id and the address of its peer port.
type Member struct{ ID, Addr string }

// State of a member, best first.
type State uint8

const (
	// Up: it answers.
	Up State = iota
	// Suspect: others say that it lives, but it has not answered this node.
	Suspect
	// Down: nobody has an answer from it.
	Down
)

func (s State) String() string {
	if int(s) < 3 {
		return [...]string{"up", "suspect", "down"}[s]
	}
	return "unknown"
}

// Config of Gossip.
type Config struct {
	Self    string // this node's id
	Network Network
	// Hint gives what this node says of itself, at most MaxHint bytes; nil: nothing.
	Hint func() []byte
	// Interval between two probes of this node's; DefaultInterval when 0.
	Interval time.Duration
	Log      *slog.Logger
	Registry prometheus.Registerer // may be nil
}

// Gossip is this node's view of who is there.
//
// Lock order: memberlist's locks come before mu. Nothing of memberlist is called
// under mu.
type Gossip struct {
	cfg       Config
	log       *slog.Logger
	metrics   metrics
	transport *transport
	changed   chan struct{}
	refresh   chan struct{}

	work sync.WaitGroup // of goroutines that end before Run does

	mu       sync.Mutex
	start    func(*peer) // begins to send to it; nil before Run
	stopping bool
	peers    map[string]*peer
	open     map[net.Conn]struct{}
	probes   map[uint32]probe // that may still be answered
}

// probe is a question that this node put to some peers.
type probe struct {
	at    time.Time
	peers []string
}

// New makes a view in which everybody is down; nothing runs yet.
func New(cfg Config) (*Gossip, error) {
	if cfg.Self == "" || cfg.Network == nil || cfg.Log == nil {
		return nil, fmt.Errorf("gossip: Self, Network and Log are required")
	}
	if cfg.Interval <= 0 {
		cfg.Interval = DefaultInterval
	}
	if cfg.Hint == nil {
		cfg.Hint = func() []byte { return nil }
	}
	g := &Gossip{
		cfg: cfg, log: cfg.Log.With("part", "gossip"), changed: make(chan struct{}, 1), refresh: make(chan struct{}, 1),
		peers: map[string]*peer{}, open: map[net.Conn]struct{}{}, probes: map[uint32]probe{},
	}
	g.transport = &transport{
		g: g, packets: make(chan *memberlist.Packet), streams: make(chan net.Conn), queue: make(chan *memberlist.Packet, 256),
	}
	var err error
	g.metrics, err = newMetrics(cfg.Registry, g)
	return g, err
}

// Follow says who the members are, this node may be among them. Connections of those
// that are none any more end.
func (g *Gossip) Follow(members []Member) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := map[string]bool{}
	for _, m := range members {
		now[m.ID] = true
		p, ok := g.peers[m.ID]
		if m.ID == g.cfg.Self || ok && p.Addr == m.Addr || g.stopping {
			continue
		}
		fresh := newPeer(m, func() {})
		if ok { // it moved
			p.stop()
			fresh.up, fresh.since, fresh.meta, fresh.in = p.up, p.since, p.meta, p.in
		}
		g.peers[m.ID] = fresh
		if g.start != nil {
			g.start(fresh)
		}
		poke(g.refresh)
	}
	for id, p := range g.peers {
		if !now[id] {
			p.stop()
			delete(g.peers, id)
		}
	}
}

// State is how a member is as far as this node knows. It is up itself; who is no
// member is down.
func (g *Gossip) State(id string) State {
	g.mu.Lock()
	defer g.mu.Unlock()
	p, ok := g.peers[id]
	switch {
	case id == g.cfg.Self:
		return Up
	case !ok || !p.up:
		return Down
	case !p.asked.IsZero() && time.Since(p.asked) > g.cfg.Interval:
		return Suspect
	}
	return Up
}

// DownSince is since when a member is down, or since when this node has known of it
// without an answer; false while it is not down.
func (g *Gossip) DownSince(id string) (time.Time, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	p, ok := g.peers[id]
	if !ok || p.up {
		return time.Time{}, false
	}
	return p.since, true
}

// Changed gets a value when a member came, went, or says something else of itself.
// It has one reader.
func (g *Gossip) Changed() <-chan struct{} { return g.changed }

// Run gossips until ctx ends, then tells the others that this node leaves. It is
// called once; all its goroutines have ended when it returns.
func (g *Gossip) Run(ctx context.Context) error {
	// Connections outlive ctx, so that the others can be told of the end.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	listener := g.cfg.Network.Listen(Service)
	defer listener.Close()
	g.transport.dial = func(id string, timeout time.Duration) (net.Conn, error) { return g.exchange(ctx, id, timeout) }
	list, err := memberlist.Create(g.config())
	if err != nil {
		return fmt.Errorf("starting gossip: %w", err)
	}
	g.mu.Lock()
	g.start = func(p *peer) {
		sending, stop := context.WithCancel(life)
		p.stop = stop
		g.work.Go(func() { g.send(sending, p) })
	}
	for _, p := range g.peers {
		g.start(p)
	}
	g.mu.Unlock()
	g.work.Go(func() { g.accept(life, listener) })
	var pumping sync.WaitGroup
	pumped := make(chan struct{})
	pumping.Go(func() { g.transport.pump(pumped) })

	g.follow(ctx, list)

	// A node that says so is missed at once, not when the suspicion's time is up.
	if err := list.Leave(2 * g.cfg.Interval); err != nil {
		g.log.Debug("the others were not told that this node leaves", "error", err)
	}
	g.mu.Lock()
	g.stopping = true
	g.mu.Unlock()
	close(pumped)
	pumping.Wait() // memberlist still listens: it takes the last answers
	_ = list.Shutdown()
	end()
	listener.Close()
	g.mu.Lock()
	for c := range g.open {
		c.Close()
	}
	g.mu.Unlock()
	g.work.Wait()
	return nil
}

// follow greets members that are down, and tells the others when this node's hint
// has changed, until ctx ends.
func (g *Gossip) follow(ctx context.Context, list *memberlist.Memberlist) {
	tick := time.NewTicker(g.cfg.Interval)
	defer tick.Stop()
	said := bytes.Clone(g.hint())
	for round := 0; ; {
		if round%4 == 0 {
			g.greet(list)
		}
		if hint := g.hint(); !bytes.Equal(hint, said) {
			said = bytes.Clone(hint)
			_ = list.UpdateNode(time.Millisecond) // it travels whether or not that is waited for
		}
		select {
		case <-ctx.Done():
			return
		case <-g.refresh:
			round = 0
		case <-tick.C:
			round++
		}
	}
}

// greeted is how many members are greeted at once.
const greeted = 8

// greet exchanges states with members that are down: they may be back, and after
// a partition neither side would ask the other again.
func (g *Gossip) greet(list *memberlist.Memberlist) {
	g.mu.Lock()
	var down []string
	for id, p := range g.peers {
		if !p.up {
			down = append(down, id)
		}
	}
	g.mu.Unlock()
	slices.Sort(down)
	for some := range slices.Chunk(down, greeted) {
		var asked sync.WaitGroup
		for _, id := range some {
			asked.Go(func() {
				if _, err := list.Join([]string{fmt.Sprintf("%s/%s:%d", id, nowhere, nowherePort)}); err != nil {
					g.log.Debug("greeting a member", "node", id, "error", err)
				}
			})
		}
		asked.Wait()
	}
}

// accept serves connections until the listener is closed.
func (g *Gossip) accept(ctx context.Context, l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		if !g.admit(c) {
			g.metrics.dropped.WithLabelValues("connection").Inc()
			c.Close()
			continue
		}
		g.work.Go(func() {
			defer g.dismiss(c)
			g.transport.serve(ctx, c)
		})
	}
}

// config of memberlist. The suspicion is chosen for weak machines, see DESIGN.md.
func (g *Gossip) config() *memberlist.Config {
	c := memberlist.DefaultLANConfig()
	c.Name, c.Transport, c.RequireNodeNames = g.cfg.Self, g.transport, true
	c.AdvertiseAddr, c.AdvertisePort, c.BindPort = nowhere.String(), nowherePort, nowherePort
	c.ProtocolVersion = memberlist.ProtocolVersionMax
	c.ProbeInterval, c.ProbeTimeout = g.cfg.Interval, g.cfg.Interval/2
	c.SuspicionMult, c.SuspicionMaxTimeoutMult = 3, 2
	c.AwarenessMaxMultiplier = 4
	c.GossipInterval, c.GossipNodes = g.cfg.Interval/4, 3
	c.PushPullInterval, c.GossipToTheDeadTime = 75*g.cfg.Interval, 40*g.cfg.Interval
	c.TCPTimeout = g.patience()
	c.EnableCompression, c.UDPBufferSize, c.HandoffQueueDepth = false, packetSize, 256
	d := delegate{g}
	c.Delegate, c.Events, c.Alive, c.Ping = d, d, d, nil
	c.Logger = log.New(sink{g.log}, "", 0)
	return c
}

// patience bounds dialling and one exchange.
func (g *Gossip) patience() time.Duration { return 4 * g.cfg.Interval }

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
