package member

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/atomicfile"
	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/table"
)

// lead does what the leader has to do for as long as this node is it.
func (n *Node) lead(ctx context.Context, in *instance) error {
	rows := n.db.Watch(ctx, "member")
	for ctx.Err() == nil {
		changed, moved := n.changed.wait(), in.moved.wait()
		if in.State() == raft.Leader {
			if err := n.leadOnce(ctx, in); err != nil && ctx.Err() == nil {
				n.log.Info("as the leader: trying again", "error", err)
			}
		} else {
			moved = nil
		}
		tick := time.NewTimer(n.cfg.Timings.Ping)
		select {
		case <-changed:
		case <-moved:
			sleep(ctx, n.cfg.Timings.Ping/20) // followers answer often
		case <-rows:
		case <-tick.C:
		case <-ctx.Done():
		}
		tick.Stop()
	}
	return nil
}

func (n *Node) leadOnce(ctx context.Context, in *instance) error {
	if err := n.openTerm(ctx, in); err != nil {
		return err
	}
	if err := n.foundRows(ctx); err != nil {
		return err
	}
	for ctx.Err() == nil {
		done, err := n.reconcile(ctx, in)
		if err != nil {
			return err
		}
		if done {
			return errors.Join(n.keepClock(ctx, in), n.advance(ctx), n.replaceSecrets(ctx), n.rekey(ctx))
		}
	}
	return nil
}

// openTerm commits an empty transaction, once in each term: before an entry of
// its own term is committed a leader does not know what is.
func (n *Node) openTerm(ctx context.Context, in *instance) error {
	term := in.CurrentTerm()
	if n.term.Load() == term {
		return nil
	}
	data, err := (&kv.Txn{ID: kv.NewID(), Base: in.machine.Applied()}).Encode()
	if err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, n.cfg.Timings.LeaderWait)
	defer cancel()
	if _, _, err := n.commit(bounded, data); err != nil {
		return fmt.Errorf("opening term %d: %w", term, err)
	}
	if in.State() != raft.Leader || in.CurrentTerm() != term {
		return raft.ErrNotLeader
	}
	n.term.Store(term)
	n.changed.fire()
	n.log.Info("this node leads the site", "term", term)
	return nil
}

// foundRows commits a new site's first rows.
func (n *Node) foundRows(ctx context.Context) error {
	if !n.founding.Load() {
		return nil
	}
	path := filepath.Join(n.cfg.Dir, foundingFile)
	var founding foundingJSON
	if err := n.cfg.Keys.ReadJSON(path, &founding); err != nil {
		return err
	}
	id := n.Identity()
	sealed, err := n.seal(caKeyName, []byte(founding.CAKey))
	if err != nil {
		return err
	}
	seals, err := n.seals()
	if err != nil {
		return err
	}
	keyHash, err := id.keyHash()
	if err != nil {
		return err
	}
	_, err = n.db.Update(ctx, func(tx *table.Tx) error {
		if _, _, ok, err := n.rows.authority.Get(tx, theAuthority); ok || err != nil {
			return err
		}
		self := Member{
			ID: id.NodeID, Name: n.cfg.Name, Addr: n.cfg.Advertise, API: n.cfg.APIURL,
			Joined: time.Now().Unix(), Feature: n.cfg.Level, KeyHash: keyHash,
			Labels: n.cfg.Labels, Cache: n.cfg.Cache, TokenKey: n.tokenPublic(), Entrusted: time.Now().Unix(),
		}
		if err := n.rows.members.Put(tx, self, self.ID); err != nil {
			return err
		}
		if err := n.rows.names.Put(tx, nameRow{Node: self.ID}, self.Name); err != nil {
			return err
		}
		if err := n.gate.Found(tx, time.Now()); err != nil {
			return err
		}
		if err := n.rows.clock.Put(tx, clockRow{At: n.cfg.Clock().Unix()}, theClock); err != nil {
			return err
		}
		if err := n.rows.secrets.Put(tx, secretRow{Seals: seals}, theSecret); err != nil {
			return err
		}
		return n.rows.authority.Put(tx, authorityRow{Cert: id.CA, SealedKey: sealed}, theAuthority)
	})
	if err != nil {
		return fmt.Errorf("writing the site's first rows: %w", err)
	}
	n.log.Info("founded the site", "site", id.SiteID, "node", id.NodeID, "name", n.cfg.Name)
	if err := atomicfile.Remove(path); err != nil {
		return err
	}
	n.founding.Store(false)
	n.changed.fire()
	return nil
}

// reconcile makes raft's configuration follow the member rows by one step;
// done when there is none left to take.
func (n *Node) reconcile(ctx context.Context, in *instance) (done bool, err error) {
	var members []Member
	var secret secretRow
	err = n.db.View(func(v *table.View) error {
		if secret, err = n.secret(v); err != nil {
			return err
		}
		members, err = n.everMembers(v)
		return err
	})
	if err != nil {
		return false, err
	}
	future := in.GetConfiguration()
	term, last := in.CurrentTerm(), in.LastIndex()
	step := plan(site{
		self: n.Self(), members: members, servers: future.Configuration().Servers, maxVoters: n.cfg.MaxVoters,
		up: n.live,
		live: func(id string) bool {
			return id == n.Self() || time.Since(in.progress.Of(id, term).Contact) < n.cfg.Timings.Lease
		},
		caught: func(id string) bool {
			f := in.progress.Of(id, term)
			return f.Caught && f.Durable+64 >= last
		},
		holds: func(id string) bool { return id == n.Self() || slices.Contains(n.peers.of(id).Keys, secret.Seals) },
	})
	if step.kind == nothing {
		return true, nil
	}
	if err := n.take(ctx, in, step, future.Index()); err != nil {
		return false, fmt.Errorf("%s node %s: %w", step.kind, step.id, err)
	}
	n.log.Info("changed the consensus", "step", step.kind.String(), "node", step.id)
	n.changed.fire()
	return false, nil
}

// take carries out one step on the configuration at index.
func (n *Node) take(ctx context.Context, in *instance, s step, index uint64) error {
	id, addr, wait := raft.ServerID(s.id), raft.ServerAddress(s.addr), n.cfg.Timings.LeaderWait
	var future raft.Future
	switch s.kind {
	case retire:
		_, err := n.db.Update(ctx, func(tx *table.Tx) error {
			m, _, ok, err := n.rows.members.Get(tx, s.id)
			if err != nil || !ok || m.Removed != 0 {
				return err
			}
			m.Removed = time.Now().Unix()
			return n.rows.members.Put(tx, m, s.id)
		})
		return err
	case entrust, withdraw:
		return n.entrust(ctx, s.id, s.kind == entrust)
	case handOver:
		bounded, cancel := context.WithTimeout(ctx, wait)
		defer cancel()
		return in.handTo(bounded, s.addr)
	case addVoter:
		future = in.AddVoter(id, addr, index, wait)
	case addNonvoter:
		future = in.AddNonvoter(id, addr, index, wait)
	case demote:
		future = in.DemoteVoter(id, index, wait)
	case remove:
		future = in.RemoveServer(id, index, wait)
	}
	return within(wait, future.Error)
}

type stepKind uint8

const (
	nothing     stepKind = iota
	addNonvoter          // or change a non-voter's address
	addVoter             // promote, or change a voter's address
	demote
	remove   // from raft's configuration
	retire   // mark the row of a node whose replacement has taken its place
	handOver // the leader itself has to go; addr is the id of its successor
	entrust  // let the node have the cluster key: it is to vote
	withdraw // the node has no use for the cluster key any more
)

func (k stepKind) String() string {
	return [...]string{"nothing", "add", "add as voter", "demote", "remove", "retire", "hand over from", "entrust", "withdraw the key from"}[k]
}

type step struct {
	kind     stepKind
	id, addr string
}

// site is what a plan rests on.
type site struct {
	self      string // the leader
	members   []Member
	servers   []raft.Server
	maxVoters int
	up        func(id string) bool // it shows signs of life
	live      func(id string) bool // it answered the leader's raft just now
	caught    func(id string) bool // its log has what the leader's has, nearly
	holds     func(id string) bool // it has the cluster key that seals
}

// plan gives the next step towards: every member is a server; voters are odd
// in number, as many as the members allow; a dead member is replaced only by
// one that has caught up; who votes has the cluster key, so that whoever leads can
// open the site's secrets, and nobody else has it. Steps that bring in or correct nodes come before
// those that take any out.
func plan(s site) step {
	rows := make(map[string]Member, len(s.members))
	for _, m := range s.members {
		rows[m.ID] = m
	}
	servers := make(map[string]raft.Server, len(s.servers))
	for _, srv := range s.servers {
		servers[string(srv.ID)] = srv
	}
	if p := s.present(servers); p.kind != nothing {
		return p
	}
	if p := s.gone(rows); p.kind != nothing {
		return p
	}
	if p := s.replaced(servers); p.kind != nothing {
		return p
	}
	return s.balance(rows)
}

// present makes every member a server at its address.
func (s site) present(servers map[string]raft.Server) step {
	for _, m := range s.sorted() {
		srv, ok := servers[m.ID]
		switch {
		case m.Removed != 0, s.held(m):
		case !ok:
			return step{addNonvoter, m.ID, m.Addr}
		case string(srv.Address) != m.Addr && srv.Suffrage == raft.Voter:
			return step{addVoter, m.ID, m.Addr}
		case string(srv.Address) != m.Addr:
			return step{addNonvoter, m.ID, m.Addr}
		case srv.Suffrage == raft.Voter && m.Entrusted == 0:
			return step{entrust, m.ID, ""}
		}
	}
	return step{}
}

// held reports whether another server has the member's address. Raft refuses a
// configuration in which two have the same.
func (s site) held(m Member) bool {
	return slices.ContainsFunc(s.servers, func(srv raft.Server) bool {
		return string(srv.Address) == m.Addr && string(srv.ID) != m.ID
	})
}

// gone takes out servers whose row says that they were removed. A server
// without a row stays: the founder is one for a moment.
func (s site) gone(rows map[string]Member) step {
	for _, srv := range s.servers {
		m, ok := rows[string(srv.ID)]
		switch {
		case !ok || m.Removed == 0:
		case m.ID != s.self:
			return step{remove, m.ID, ""}
		default:
			return s.succeed(rows)
		}
	}
	return step{}
}

// succeed is the step by which a leader that has to go finds a successor: it
// hands over to a voter that stays, or first gives the vote to a node that does.
func (s site) succeed(rows map[string]Member) step {
	for _, srv := range s.servers {
		if id := string(srv.ID); s.stays(rows, id) && srv.Suffrage == raft.Voter && s.ready(id) {
			return step{handOver, s.self, id}
		}
	}
	if s.voters() > 1 {
		return step{} // a voter that stays will be ready again
	}
	for _, srv := range s.servers {
		switch id := string(srv.ID); {
		case !s.stays(rows, id):
		case s.ready(id):
			return step{addVoter, id, string(srv.Address)}
		case s.able(id) && rows[id].Entrusted == 0:
			return step{entrust, id, ""}
		}
	}
	return step{}
}

// stays reports whether a server is neither leaving nor to be replaced.
func (s site) stays(rows map[string]Member, id string) bool {
	m := rows[id]
	return m.Removed == 0 && m.Draining == 0 && m.ReplacedBy == ""
}

// replaced lets a node that joined under a dead one's name take its place.
func (s site) replaced(servers map[string]raft.Server) step {
	for _, m := range s.sorted() {
		if m.Removed != 0 || m.ReplacedBy == "" || s.live(m.ID) {
			continue // one that came back keeps its place
		}
		old, heir := servers[m.ID], servers[m.ReplacedBy]
		switch {
		case heir.ID == "" && s.inherits(m, string(old.Address)):
			// The heir is at its very address, so it will not come back, and raft
			// takes the heir only once it is gone. That costs no tolerance: of an
			// odd number of voters as many may fail as of the even one below,
			// and the dead one counts as failed.
			return step{retire, m.ID, ""}
		case heir.ID == "":
		case old.Suffrage != raft.Voter || heir.Suffrage == raft.Voter:
			return step{retire, m.ID, ""}
		case s.ready(m.ReplacedBy):
			return step{addVoter, m.ReplacedBy, string(heir.Address)}
		case s.able(m.ReplacedBy) && s.entrustable(m.ReplacedBy):
			return step{entrust, m.ReplacedBy, ""}
		}
	}
	return step{}
}

// entrustable reports whether a member is still to be entrusted with the key.
func (s site) entrustable(id string) bool {
	return slices.ContainsFunc(s.members, func(m Member) bool { return m.ID == id && m.Entrusted == 0 })
}

// inherits reports whether the node that replaces a dead one has its address.
func (s site) inherits(dead Member, addr string) bool {
	return slices.ContainsFunc(s.members, func(m Member) bool {
		return m.ID == dead.ReplacedBy && m.Removed == 0 && m.Addr == addr
	})
}

// balance makes the number of voters the highest odd one that the members
// allow. One by one raft passes through even numbers, so it begins only when
// the way to the next odd one is clear, and turns back when it no longer is.
// Members that are drained count for nothing: others take their votes first.
func (s site) balance(rows map[string]Member) step {
	members := 0
	for _, m := range s.members {
		if s.stays(rows, m.ID) {
			members++
		}
	}
	target := min(members, s.maxVoters)
	target -= 1 - target%2
	staying, up := 0, 0 // voters that are not drained
	var ready, able, waiting, drained []raft.Server
	for _, srv := range s.servers {
		id := string(srv.ID)
		drains := rows[id].Draining != 0
		switch {
		case srv.Suffrage == raft.Voter && drains:
			drained = append(drained, srv)
		case srv.Suffrage == raft.Voter:
			staying++
			if s.live(id) {
				up++
			}
		case drains || rows[id].ReplacedBy != "":
		case s.ready(id):
			ready = append(ready, srv)
		case s.able(id):
			able, waiting = append(able, srv), append(waiting, srv)
		case s.live(id), s.up(id):
			waiting = append(waiting, srv)
		}
	}
	missing := 2 - (staying+1)%2 // to the next odd number
	switch {
	case members == 0:
	case staying < target && len(ready) >= missing:
		return step{addVoter, string(ready[0].ID), string(ready[0].Address)}
	case staying < target && len(ready)+len(able) >= missing && s.unentrusted(able[:missing-len(ready)]) != "":
		return step{entrust, s.unentrusted(able[:missing-len(ready)]), ""}
	case len(drained) > 0:
		if (staying >= target || len(waiting) == 0) && up > staying/2 {
			return s.relieve(rows, drained)
		}
	case staying > target, staying%2 == 0 && len(ready) == 0 && len(waiting) == 0 && staying > 1:
		return s.least(rows)
	}
	return s.withdrawal(rows, staying >= target)
}

// withdrawal is the step that takes the key back from a node without a vote: one that
// is drained, or any when the voters are as many as they will be. Who is to follow a
// voter that goes keeps it.
func (s site) withdrawal(rows map[string]Member, full bool) step {
	going := slices.ContainsFunc(s.servers, func(srv raft.Server) bool {
		return srv.Suffrage == raft.Voter && !s.stays(rows, string(srv.ID))
	})
	for _, srv := range s.servers {
		id := string(srv.ID)
		if m := rows[id]; srv.Suffrage != raft.Voter && m.Removed == 0 && m.Entrusted != 0 && (full && !going || m.Draining != 0) {
			return step{withdraw, id, ""}
		}
	}
	return step{}
}

// unentrusted is the first of the servers that may not have the key yet.
func (s site) unentrusted(servers []raft.Server) string {
	for _, srv := range servers {
		if id := string(srv.ID); s.entrustable(id) {
			return id
		}
	}
	return ""
}

// relieve is the step that takes the vote of one of the drained voters. The
// leader is the last and hands over first.
func (s site) relieve(rows map[string]Member, drained []raft.Server) step {
	for _, srv := range drained {
		if string(srv.ID) != s.self {
			return step{demote, string(srv.ID), ""}
		}
	}
	return s.succeed(rows)
}

// least is the step that takes the vote of the voter that is missed least.
func (s site) least(rows map[string]Member) step {
	var voters []raft.Server
	for _, srv := range s.servers {
		if srv.Suffrage == raft.Voter && string(srv.ID) != s.self {
			voters = append(voters, srv)
		}
	}
	if len(voters) == 0 {
		return step{}
	}
	pick := slices.MaxFunc(voters, func(a, b raft.Server) int {
		if l, m := s.live(string(a.ID)), s.live(string(b.ID)); l != m {
			if l {
				return -1
			}
			return 1
		}
		return cmp.Compare(rows[string(a.ID)].Joined, rows[string(b.ID)].Joined)
	})
	return step{demote, string(pick.ID), ""}
}

// able reports whether a node could vote but for the key, ready whether it could.
func (s site) able(id string) bool  { return s.live(id) && s.caught(id) }
func (s site) ready(id string) bool { return s.able(id) && s.holds(id) }

func (s site) voters() int {
	voters := 0
	for _, srv := range s.servers {
		if srv.Suffrage == raft.Voter {
			voters++
		}
	}
	return voters
}

func (s site) sorted() []Member {
	members := slices.Clone(s.members)
	slices.SortFunc(members, func(a, b Member) int {
		return cmp.Or(cmp.Compare(a.Joined, b.Joined), cmp.Compare(a.ID, b.ID))
	})
	return members
}
