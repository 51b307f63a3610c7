package member

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/errgroup"

	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/gossip"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/version"
)

// Status is what a node knows of its site.
type Status struct {
	Self    string
	Leader  string // id; "" when none is known
	Term    uint64
	Applied uint64 // revision of this node's state
	// Quorum: a majority of the voters has just confirmed the leader.
	Quorum bool
	// LastContact is when this node last heard of a leader, in an earlier run if not in
	// this one; zero when that is not known.
	LastContact time.Time
	// Unconfirmed is how many entries this node's log has behind its state, of which it
	// does not know that they are committed: it serves them when a leader says so.
	Unconfirmed uint64
	Members     []MemberStatus // by time of joining
	// Epoch is the site's recovery epoch as this node has it; Fenced says why the
	// node takes no part in the site, nil while it does; Strays are the peers that
	// it refused for their epoch.
	Epoch    epoch.Epoch
	Fenced   error
	Strays   []epoch.Stray
	Rotation Rotation // of the site's certificates
	Rekeying bool     // the site is changing its cluster key
	// Exposed are the names of nodes that had the cluster key which is in use, and
	// have no use for it any more: what they kept of it opens the site's secrets.
	Exposed []string
	Upgrade version.Upgrade
	// KeyProvider is what keeps the keys of this node: see cluster/keyring.
	KeyProvider string
}

// MemberStatus is one member as this node sees it.
type MemberStatus struct {
	Member
	Voter  bool
	Leader bool
	Up     bool // somebody has signs of life from it
	// Suspect: others vouch for it, but it has not answered this node.
	Suspect bool
	// Lag is by how many revisions its state is behind this node's; 0 as well
	// when it is not known.
	Lag         uint64
	LastContact time.Time // zero: never since this node started
	Version     string    // of the program; the row's when it has not said
	CertExpires time.Time // of its certificate for its peers; zero when it has not said
	// Fitness and Codes are what the member says of its own health.
	Fitness Fitness
	Codes   []string
	// Skew is by how much its clock is ahead of this node's, within SkewBound; not
	// known when Clocked is false.
	Skew, SkewBound time.Duration
	Clocked         bool
}

// Status gives what this node knows; it asks the leader for a confirmation, no
// longer than 300 ms.
func (n *Node) Status(ctx context.Context) (Status, error) {
	in := n.raft.Load()
	if in == nil {
		return Status{}, errors.New("the node is starting")
	}
	members, err := n.roster()
	if err != nil {
		return Status{}, err
	}
	ask, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	_, unconfirmed := n.ReadIndex(ask)
	s := Status{
		KeyProvider: n.cfg.Keys.Provider(),
		Self:        n.Self(), Leader: n.Leader(), Term: in.CurrentTerm(), Applied: in.machine.Applied(),
		Quorum: unconfirmed == nil, LastContact: n.LastContact(), Unconfirmed: in.unconfirmed(),
		Epoch: n.cfg.Epoch.Epoch(), Fenced: n.cfg.Epoch.Err(), Strays: n.cfg.Epoch.Strays(),
	}
	if err := n.db.View(func(v *table.View) (err error) {
		s.Upgrade, err = n.Upgrade(v)
		return err
	}); err != nil {
		return s, err
	}
	voters := make(map[string]bool)
	for _, server := range in.servers() {
		voters[string(server.ID)] = server.Suffrage == raft.Voter
	}
	for _, m := range members {
		ms := MemberStatus{Member: m, Voter: voters[m.ID], Leader: m.ID == s.Leader, Up: n.live(m.ID), Suspect: n.Suspect(m.ID)}
		ms.LastContact = n.lastSeen(m.ID)
		seen := n.peers.of(m.ID)
		said := seen.ping
		if m.ID == s.Self {
			ms.LastContact, said = time.Now(), n.sign(in)
		}
		if said.Applied > 0 && said.Applied < s.Applied {
			ms.Lag = s.Applied - said.Applied
		}
		ms.Version, ms.Fitness, ms.Codes = cmp.Or(said.Version, m.Version), said.Fitness, said.Codes
		ms.Skew, ms.SkewBound, ms.Clocked = seen.ahead(n.cfg.Clock()), seen.bound, seen.clocked
		if said.Expires != 0 {
			ms.CertExpires = time.Unix(said.Expires, 0)
		}
		s.Members = append(s.Members, ms)
	}
	if s.Exposed, err = n.exposed(); err != nil {
		return s, err
	}
	if _, s.Rotation, err = n.rotation(); err != nil {
		return s, err
	}
	secret, err := n.localSecret()
	s.Rekeying = secret.changing()
	slices.SortStableFunc(s.Members, func(a, b MemberStatus) int { return int(a.Joined - b.Joined) })
	return s, err
}

// Live are the members that are up: this node first, those that it cannot reach
// itself last.
func (n *Node) Live() []Member {
	members, err := n.roster()
	if err != nil {
		n.log.Warn("reading the members", "error", err)
		return nil
	}
	live := slices.DeleteFunc(members, func(m Member) bool { return !n.live(m.ID) })
	rank := func(m Member) int {
		switch {
		case m.ID == n.Self():
			return 0
		case !n.Suspect(m.ID):
			return 1
		}
		return 2
	}
	slices.SortStableFunc(live, func(a, b Member) int { return cmp.Compare(rank(a), rank(b)) })
	return live
}

// live says that a member is up. That is hearsay in part, so a follower that
// answered this node just now is up whatever others say.
func (n *Node) live(id string) bool {
	return n.gossip.State(id) != gossip.Down || n.answers(id)
}

// Suspect says that others vouch for a member that has not answered this node.
func (n *Node) Suspect(id string) bool { return n.gossip.State(id) == gossip.Suspect && !n.answers(id) }

// answers says that a member answered this node as its leader just now.
func (n *Node) answers(id string) bool {
	in := n.raft.Load()
	return in != nil && time.Since(in.progress.Contact(id)) < n.cfg.Timings.Lease
}

// DownSince is since when a member is down, or since when this node has known of it
// without a sign of life; false while it is up.
func (n *Node) DownSince(id string) (time.Time, bool) {
	if n.answers(id) {
		return time.Time{}, false
	}
	return n.gossip.DownSince(id)
}

// lastSeen is the last successful exchange with a member, of either kind.
func (n *Node) lastSeen(id string) time.Time {
	seen := n.peers.of(id).at
	if in := n.raft.Load(); in != nil {
		if c := in.progress.Contact(id); c.After(seen) {
			return c
		}
	}
	return seen
}

// sightings is what the members said of themselves when they were asked. Who is up
// is not among it: that is gossip's to say.
type sightings struct {
	mu   sync.Mutex
	seen map[string]sighting
}

type sighting struct {
	ping
	at time.Time
	// theirs is what its clock said at that moment, known to within bound; not
	// clocked: not known.
	theirs  time.Time
	bound   time.Duration
	clocked bool
}

// ahead is by how much its clock is ahead of this node's, which says now. Both may
// have been set since it was seen: ours counts as it is now.
func (s sighting) ahead(now time.Time) time.Duration {
	if !s.clocked {
		return 0
	}
	return s.theirs.Add(time.Since(s.at)).Sub(now)
}

func newSightings() *sightings { return &sightings{seen: make(map[string]sighting)} }

func (s *sightings) of(id string) sighting {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen[id]
}

// saw takes an answer to a ping that took so long. The answer's clock was read
// somewhere in between.
func (s *sightings) saw(p ping, took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := sighting{ping: p, at: time.Now()}
	now.Fitness = min(p.Fitness, Unfit)
	if p.Clock != 0 {
		now.theirs, now.bound, now.clocked = time.UnixMilli(p.Clock).Add(took/2), took/2+time.Millisecond, true
	}
	s.seen[p.Node] = now
}

// route is the way to the leader: raft's, else what members answered to pings.
// A node whose address has changed hears of the leader in that way only: the
// leader does not know where to find it.
func (n *Node) route() (addr, id string) {
	// An unfit leader is one in its own eyes only; its peers know who leads now.
	if addr, id = n.leader(); id != "" && (id != n.Self() || n.refusal() == nil) {
		return addr, id
	}
	addr, id = "", ""
	members, err := n.roster()
	if err != nil {
		return "", ""
	}
	byID := make(map[string]Member, len(members))
	for _, m := range members {
		byID[m.ID] = m
	}
	var newest time.Time
	for _, m := range members {
		s := n.peers.of(m.ID)
		leader, ok := byID[s.Leader]
		if ok && leader.ID != n.Self() && s.at.After(newest) && time.Since(s.at) < n.cfg.Timings.Live {
			newest, addr, id = s.at, leader.Addr, leader.ID
		}
	}
	return addr, id
}

// askPings: the members are asked how they are at every so manieth look, and at once
// when gossip says that one came, went or has news.
const askPings = 3

// watchPeers tells gossip who the members are, and asks those that are up how they
// are.
func (n *Node) watchPeers(ctx context.Context) error {
	rows := n.db.Watch(ctx, "member")
	var inquired time.Time
	up := map[string]bool{}
	news := true
	for round := 0; ; round++ {
		members, err := n.roster()
		if err != nil {
			n.log.Warn("reading the members", "error", err)
		} else {
			n.nameMembers(members)
		}
		n.noteUp(members, up)
		if round%outcastPings == 0 {
			n.meetOutcasts(ctx)
		}
		if news || round%askPings == 0 || n.Leader() == "" {
			n.pingAll(ctx, members)
		}
		if n.Leader() == "" && n.cfg.Epoch.Err() == nil && time.Since(inquired) > 5*n.cfg.Timings.Ping {
			if err := n.inquire(ctx, members); err != nil {
				return err
			}
			inquired = time.Now()
		}
		n.cutOff()
		tick := time.NewTimer(n.cfg.Timings.Ping)
		news = true
		select {
		case <-rows: // somebody joined or moved
		case <-n.gossip.Changed():
		case <-tick.C:
			news = false
		case <-ctx.Done():
			tick.Stop()
			return nil
		}
		tick.Stop()
	}
}

// inquire asks the members how the site sees this node, which finds no leader:
// ErrRemoved when it was removed, ErrCloned when another machine runs as it.
func (n *Node) inquire(ctx context.Context, members []Member) error {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Timings.Live/2)
	defer cancel()
	var asked errgroup.Group
	var stale atomic.Bool
	for _, m := range members {
		if m.ID == n.Self() {
			continue
		}
		asked.Go(func() error {
			how, err := n.askStanding(ctx, m.Addr)
			switch {
			case err != nil:
				return nil // it is down, or its network is
			case how.Removed != 0:
				return removedOn(how.Removed)
			case how.Stale:
				stale.Store(true)
			case how.Addr != "":
				self := m
				self.ID, self.Name, self.Addr = n.Self(), n.cfg.Name, how.Addr
				return n.alone(ctx, self)
			}
			return nil
		})
	}
	err := asked.Wait()
	if stale.Load() {
		n.stale.Store(true)
		n.changed.fire()
	}
	return err
}

// cutOff ends the connections of nodes that the consensus has let go: they were
// let in while they were members.
func (n *Node) cutOff() {
	in := n.raft.Load()
	var all []Member
	err := n.db.View(func(v *table.View) (err error) {
		all, err = n.everMembers(v)
		return err
	})
	if err != nil || in == nil {
		return
	}
	for _, m := range all {
		if m.Removed != 0 && !in.serves(m.ID) && m.ID != n.Self() {
			n.cfg.Network.Drop(m.ID)
		}
	}
}

// pingAll asks the members that are up how they are.
func (n *Node) pingAll(ctx context.Context, members []Member) {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Timings.Live/2)
	defer cancel()
	var asked errgroup.Group
	for _, m := range members {
		if m.ID == n.Self() || !n.live(m.ID) {
			continue
		}
		asked.Go(func() error {
			var answer ping
			sent, nonce := time.Now(), table.NewID()
			if err := n.ask(ctx, m.Addr, pathPing+"?nonce="+nonce, &answer); err != nil {
				n.log.Debug("asking a member how it is", "node", m.ID, "name", m.Name, "address", m.Addr, "error", err)
				return nil
			}
			if answer.Node == m.ID { // else another node has its address now
				took := time.Since(sent)
				answer.Keys = n.proved(answer, nonce)
				n.peers.saw(answer, took)
			}
			return nil
		})
	}
	_ = asked.Wait() // no function fails
}

// Fitness is what a node can do for its site at the moment.
type Fitness uint8

const (
	// Fit for everything.
	Fit Fitness = iota
	// Reluctant: it works, but another voter should lead.
	Reluctant
	// Unfit: its disk takes no writes. It does not lead, and refuses writes at
	// once instead of letting them wait.
	Unfit
)

func (f Fitness) String() string {
	if int(f) < 3 {
		return [...]string{"fit", "reluctant", "unfit"}[f]
	}
	return "unknown"
}

// Report is what a node knows of its own state of health.
type Report struct {
	Fitness Fitness
	// Refusal is what writes through this node are answered with while it is
	// Unfit; its text says why, and what to do.
	Refusal error
	// Codes of what is wrong here, for the other nodes to show.
	Codes []string
}

// Report tells the node how it is, until the next call. It acts at once: see
// Fitness.
func (n *Node) Report(r Report) {
	if r.Fitness == Unfit && r.Refusal == nil {
		r.Refusal = errUnfit
	}
	before := n.report.Swap(&r)
	if before == nil || before.Fitness != r.Fitness {
		n.changed.fire()
	}
}

const errUnfit = failure("this node's disk takes no writes at the moment")

func (n *Node) reported() Report {
	if r := n.report.Load(); r != nil {
		return *r
	}
	return Report{}
}

// refusal is why this node takes no writes; nil while it does.
func (n *Node) refusal() error {
	if r := n.reported(); r.Fitness == Unfit {
		return r.Refusal
	}
	return nil
}

// giveWay sees to it that a node that should not lead does not.
//
// A disk that hangs is the hard case: raft's loop waits for the disk and hears
// nothing, not even a request to hand over, while its heartbeats have goroutines
// of their own and go on. The followers would wait for such a leader for ever.
// So an unfit node asks raft to hand over, and whatever comes of that, sends no
// message of raft from then on until it is fit: a silent leader is replaced
// after one timeout, and a silent node wins no election.
func (n *Node) giveWay(ctx context.Context, in *instance) error {
	asked := time.Time{}
	for ctx.Err() == nil {
		changed := n.changed.wait()
		fitness := n.reported().Fitness
		if fitness == Fit {
			asked = time.Time{}
		} else if in.State() == raft.Leader && (asked.IsZero() || time.Since(asked) > 10*n.cfg.Timings.Election) {
			if id, addr, ok := n.heir(in, fitness); ok {
				asked = time.Now()
				err := within(n.cfg.Timings.Lease, in.LeadershipTransferToServer(id, addr).Error)
				n.log.Info("this node asks another to lead", "fitness", fitness.String(), "heir", string(id), "error", err)
			}
		}
		if mute := fitness == Unfit && in.otherVoters(); in.transport.Mute(mute) != mute {
			n.log.Warn("raft's messages from this node", "silent", mute)
		}
		tick := time.NewTimer(n.cfg.Timings.Ping)
		select {
		case <-changed:
		case <-tick.C:
		case <-ctx.Done():
		}
		tick.Stop()
	}
	in.transport.Mute(false) // stopping hands over
	return nil
}

// heir is the voter that should lead instead: one that is up and says that it is
// in a better state, and of several the one whose log is furthest.
func (n *Node) heir(in *instance, than Fitness) (raft.ServerID, raft.ServerAddress, bool) {
	term := in.CurrentTerm()
	servers := slices.DeleteFunc(slices.Clone(in.servers()), func(s raft.Server) bool {
		id := string(s.ID)
		return s.Suffrage != raft.Voter || s.ID == in.self || !n.live(id) || n.peers.of(id).Fitness >= than
	})
	if len(servers) == 0 {
		return "", "", false
	}
	best := slices.MaxFunc(servers, func(a, b raft.Server) int {
		return cmp.Compare(in.progress.Of(string(a.ID), term).Durable, in.progress.Of(string(b.ID), term).Durable)
	})
	return best.ID, best.Address, true
}

// outcastPings: the members that a recovery left out are looked for at every
// so manieth sign of life.
const outcastPings = 30

// meetMembers says hello to the members that this node knows, before it can
// vote or lead: when the site was recovered without it, it learns so here. It
// takes as long as those need who do not refuse, half of Timings.Live at most.
func (n *Node) meetMembers(ctx context.Context) {
	members, err := n.roster()
	if err != nil {
		n.log.Warn("reading the members", "error", err)
		return
	}
	n.meet(ctx, members)
}

// meetOutcasts tells the members that a recovery left out, at their last
// addresses, that the site goes on without them: when this node's address has
// changed they could not find it.
func (n *Node) meetOutcasts(ctx context.Context) {
	var outcasts []Member
	err := n.db.View(func(v *table.View) error {
		all, err := n.everMembers(v)
		for _, m := range all {
			if m.Outcast != "" {
				outcasts = append(outcasts, m)
			}
		}
		return err
	})
	if err != nil {
		n.log.Warn("reading the members", "error", err)
		return
	}
	n.meet(ctx, outcasts)
}

func (n *Node) meet(ctx context.Context, members []Member) {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Timings.Live/2)
	defer cancel()
	var asked errgroup.Group
	for _, m := range members {
		if m.ID == n.Self() {
			continue
		}
		asked.Go(func() error {
			c, err := n.cfg.Network.Dial(ctx, m.Addr, ServiceControl)
			if err != nil {
				n.log.Debug("saying hello to a member", "node", m.ID, "name", m.Name, "address", m.Addr, "error", err)
				return nil
			}
			return c.Close()
		})
	}
	_ = asked.Wait() // only a Close fails
}
