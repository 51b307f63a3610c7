package member

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"net/http"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/atoll-registry/atoll/cluster/gossip"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/version"
)

// Run makes the node take part in its site until ctx ends or something fails
// for good: the state machine halts, the node was removed (ErrRemoved), or its
// program does not fit the site (version.ErrMismatch). A node runs once.
//
// The order of stopping has reasons. What acts by itself (leading, gossip,
// renewal) ends first, so that nothing starts anew. Then the leadership is
// handed over, while this node still answers its peers: the successor needs
// its vote and the last entries. Then raft ends, then the listeners, and last
// the log is closed, which raft writes until it has ended.
func (n *Node) Run(ctx context.Context) error {
	if n.ran.Swap(true) {
		return errors.New("member: Run was called twice")
	}
	if _, err := n.heed(); err != nil {
		return err
	}
	n.meetMembers(ctx)
	if self, ok, err := n.member(n.Self()); err == nil && ok {
		if err := n.alone(ctx, self); err != nil {
			return err
		}
	}
	in, err := n.open()
	if err != nil {
		return err
	}
	// The servers outlive ctx; they end when their listeners are closed.
	var serving errgroup.Group
	failed := make(chan error, 3)
	serve := func(what string, f func() error) {
		serving.Go(func() error {
			if err := f(); err != nil {
				failed <- fmt.Errorf("serving %s: %w", what, err)
			}
			return nil
		})
	}
	control, joins := n.controlServer(), n.joinServer()
	serve("the consensus", in.layer.Serve)
	serve("the members", func() error { return serveHTTP(control, n.cfg.Network.Listen(ServiceControl)) })
	serve("joining nodes", func() error { return serveHTTP(joins, n.cfg.Network.ListenJoin()) })
	n.raft.Store(in)

	acting, actx := errgroup.WithContext(ctx)
	for _, act := range []func(context.Context) error{
		func(ctx context.Context) error { return n.observe(ctx, in) },
		func(ctx context.Context) error { return n.lead(ctx, in) },
		func(ctx context.Context) error { return n.noticeSilence(ctx, in) },
		func(ctx context.Context) error { return n.snapshotWhenDue(ctx, in) },
		func(ctx context.Context) error { return n.giveWay(ctx, in) },
		n.gossip.Run, n.watchPeers, n.publish, n.renew, n.holdKeys, n.rememberContact,
		func(ctx context.Context) error { return n.standAside(ctx, in) },
		func(ctx context.Context) error { return n.start(ctx, in) },
		func(ctx context.Context) error {
			select {
			case <-ctx.Done():
				return nil
			case err := <-failed:
				return err
			case <-in.machine.Halted():
				return in.machine.Err()
			case err := <-n.cfg.Disk.Broken():
				return err
			}
		},
	} {
		acting.Go(func() error { return act(actx) })
	}
	err = acting.Wait()

	in.stop(n)
	n.changed.fire()
	control.Close()
	joins.Close()
	n.client.CloseIdleConnections()
	_ = serving.Wait() // its functions report to failed
	return err
}

func serveHTTP(s *http.Server, l net.Listener) error {
	if err := s.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// start makes a lone voter lead and says when the node serves.
func (n *Node) start(ctx context.Context, in *instance) error {
	defer close(n.ready)
	if !in.loneVoter() {
		return nil
	}
	if err := in.elect(n.cfg.Advertise); err != nil {
		n.log.Info("this node leads after a timeout only", "error", err)
	}
	patience, cancel := context.WithTimeout(ctx, 2*n.cfg.Timings.Election)
	defer cancel()
	for {
		opened := n.changed.wait()
		if n.term.Load() != 0 && !n.founding.Load() {
			return nil
		}
		select {
		case <-opened:
		case <-patience.Done():
			return nil
		}
	}
}

// observe wakes those who wait for a leader.
func (n *Node) observe(ctx context.Context, in *instance) error {
	seen := make(chan raft.Observation, 16)
	o := raft.NewObserver(seen, false, func(o *raft.Observation) bool {
		switch o.Data.(type) {
		case raft.LeaderObservation, raft.RaftState:
			return true
		}
		return false
	})
	in.RegisterObserver(o)
	defer in.DeregisterObserver(o)
	for {
		n.changed.fire()
		select {
		case o := <-seen:
			if l, ok := o.Data.(raft.LeaderObservation); ok && l.LeaderID == "" {
				n.log.Info("the site has no leader at the moment")
			} else if ok {
				n.log.Info("the site's leader changed", "leader", string(l.LeaderID), "address", string(l.LeaderAddr))
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// publish keeps this node's own row true, and notices when it was removed or the
// site has outgrown its program.
func (n *Node) publish(ctx context.Context) error {
	rows, raised := n.db.Watch(ctx, "member", n.Self()), n.db.Watch(ctx, version.TableName)
	for {
		changed := n.changed.wait()
		level, err := n.heed()
		if errors.Is(err, version.ErrMismatch) {
			return err
		}
		self, ok, unread := n.member(n.Self())
		err = errors.Join(err, unread)
		switch {
		case err != nil:
			n.log.Warn("reading this node's row", "error", err)
		case ok && self.Removed != 0:
			if err := n.dismissed(self); err != nil {
				return err
			}
		case ok && !n.published(self, level).equal(self):
			if err := n.alone(ctx, self); err != nil {
				return err
			}
			err := n.publishOnce(ctx)
			if errors.Is(err, version.ErrMismatch) {
				return err
			}
			if err != nil && ctx.Err() == nil {
				n.log.Info("this node's new address or name is not known to the site yet", "error", err)
			}
		}
		tick := time.NewTimer(5 * n.cfg.Timings.Ping)
		select {
		case <-rows:
		case <-raised:
		case <-changed:
		case <-tick.C:
		case <-ctx.Done():
			tick.Stop()
			return nil
		}
		tick.Stop()
	}
}

// alone makes sure that nobody else runs as this node at the address that its row
// names: ErrCloned when somebody does. A copied disk would else vote twice, in two
// minds. The one that runs where the row says goes on; the other, which would move
// the row to itself, ends.
func (n *Node) alone(ctx context.Context, self Member) error {
	if self.Addr == n.cfg.Advertise {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Timings.Live)
	defer cancel()
	var other ping
	if err := n.ask(ctx, self.Addr, pathPing, &other); err != nil || other.Node != n.Self() || other.Run == n.run {
		return nil // the node has moved
	}
	return fmt.Errorf("%w: node %s (%s) answers at %s, and this one is at %s", ErrCloned, self.ID, self.Name, self.Addr, n.cfg.Advertise)
}

// published is what this node's row should be at a site of the level.
func (n *Node) published(m Member, level int) Member {
	m.Name, m.Addr, m.API, m.Feature = n.cfg.Name, n.cfg.Advertise, n.cfg.APIURL, n.cfg.Level
	m.Labels, m.Cache, m.TokenKey = n.cfg.Labels, n.cfg.Cache, n.tokenPublic()
	if level >= levelVersions {
		m.Version = n.cfg.Version
	}
	return m
}

func (n *Node) publishOnce(ctx context.Context) error {
	_, err := n.db.Update(ctx, func(tx *table.Tx) error {
		self, _, ok, err := n.rows.members.Get(tx, n.Self())
		if err != nil || !ok || self.Removed != 0 {
			return err
		}
		level, err := n.gate.Site(tx)
		if err == nil {
			err = n.gate.Fits(tx)
		}
		if err != nil {
			return err
		}
		is := n.published(self, level)
		if is.Name != self.Name {
			if holder, _, taken, err := n.rows.names.Get(tx, is.Name); err != nil {
				return err
			} else if taken && holder.Node != is.ID {
				return fmt.Errorf("%w: %q is node %s", ErrNameTaken, is.Name, holder.Node)
			}
			if err := n.rows.names.Delete(tx, self.Name); err != nil {
				return err
			}
			if err := n.rows.names.Put(tx, nameRow{Node: is.ID}, is.Name); err != nil {
				return err
			}
		}
		return n.rows.members.Put(tx, is, is.ID)
	})
	return err
}

// standAside takes the node out of the consensus as soon as it is fenced. What
// it holds stays readable, and says that it may be old.
func (n *Node) standAside(ctx context.Context, in *instance) error {
	select {
	case <-n.cfg.Epoch.Fenced():
	case <-ctx.Done():
		return nil
	}
	n.log.Error(n.cfg.Epoch.Err().Error())
	in.halt(n)
	n.changed.fire()
	return nil
}

// nameMembers tells gossip who they are.
func (n *Node) nameMembers(members []Member) {
	all := make([]gossip.Member, len(members))
	for i, m := range members {
		all[i] = gossip.Member{ID: m.ID, Addr: m.Addr}
	}
	n.gossip.Follow(all)
}

// noteUp logs who came and who went since the last call, which left them in up.
func (n *Node) noteUp(members []Member, up map[string]bool) {
	for _, m := range members {
		is := n.live(m.ID)
		switch {
		case is == up[m.ID] || m.ID == n.Self():
		case is:
			n.log.Info("a member is up", "node", m.ID, "name", m.Name, "address", m.Addr)
		default:
			n.log.Warn("a member is down", "node", m.ID, "name", m.Name, "address", m.Addr)
		}
		up[m.ID] = is
	}
}

// hint is what gossip carries of this node: it changes when the others should ask
// what is new. The first byte is the level of the program.
func (n *Node) hint() []byte {
	in := n.raft.Load()
	if in == nil {
		return nil
	}
	said := n.sign(in)
	said.Term, said.Applied, said.Leader, said.Clock = 0, 0, "", 0 // always in motion
	sum := fnv.New64a()
	_ = json.NewEncoder(sum).Encode(struct {
		ping
		Labels map[string]string
	}{said, n.cfg.Labels}) // writing to a sum does not fail
	return sum.Sum([]byte{byte(n.cfg.Level)})
}

// metrics of the membership.
type metrics struct {
	singleCopies prometheus.Counter
	refused      *prometheus.CounterVec
}

// joinRefused counts a request of a node without a certificate that was refused.
func (m *metrics) joinRefused(code string) { m.refused.WithLabelValues(code).Inc() }

func newMetrics(registry prometheus.Registerer, n *Node) (*metrics, error) {
	m := &metrics{singleCopies: prometheus.NewCounter(prometheus.CounterOpts{
		Name: "atoll_cluster_single_copy_writes_total",
		Help: "Writes that were acknowledged with one copy because the only other node was away or catching up.",
	}), refused: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "atoll_cluster_join_refused_total",
		Help: "Requests of nodes that join or renew which were refused, by the reason that they were told.",
	}, []string{"code"})}
	if registry == nil {
		return m, nil
	}
	gauge := func(name, help string, value func(*instance) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			in := n.raft.Load()
			if in == nil {
				return 0
			}
			return value(in)
		})
	}
	for _, c := range []prometheus.Collector{
		m.singleCopies, m.refused,
		gauge("atoll_cluster_term_count", "Raft's term: it grows with each election.", func(in *instance) float64 { return float64(in.CurrentTerm()) }),
		gauge("atoll_cluster_applied_revision", "Revision of this node's state.", func(in *instance) float64 { return float64(in.machine.Applied()) }),
		gauge("atoll_cluster_leader_bool", "1 while this node leads.", func(in *instance) float64 {
			if in.State() == raft.Leader {
				return 1
			}
			return 0
		}),
		gauge("atoll_cluster_live_nodes", "Members that this node could reach just now, itself included.", func(*instance) float64 { return float64(len(n.Live())) }),
	} {
		if err := registry.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
