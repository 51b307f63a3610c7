package member

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/joining"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/table"
)

// Refusals of operations on the membership.
var (
	// ErrNoMember: no member of the site has the id or the name.
	ErrNoMember = errors.New("no such node")
	// ErrQuorum: the change would leave too few live voters to decide anything.
	ErrQuorum = errors.New("the site would lose its quorum")
	// ErrNoVote: a node that has no vote cannot lead.
	ErrNoVote = errors.New("the node cannot lead")
)

const errStarting = failure("the node is starting")

// Find gives the member with an id or a name, and among those that were removed
// the last to go; ErrNoMember when there never was one.
func (n *Node) Find(r table.Reader, ref string) (Member, error) {
	all, err := n.everMembers(r)
	if err != nil {
		return Member{}, err
	}
	var found Member
	for _, m := range all {
		switch {
		case m.ID == ref:
			return m, nil
		case m.Name != ref || m.ReplacedBy != "" && found.ID != "":
		case found.ID == "", m.Removed == 0, found.Removed != 0 && m.Removed > found.Removed:
			found = m
		}
	}
	if found.ID == "" {
		return Member{}, fmt.Errorf("%w: %q; atoll cluster status lists the nodes", ErrNoMember, ref)
	}
	return found, nil
}

// Remove ends the membership of the node with the id and waits, for as long as a
// write waits for its leader, until the consensus has let it go. Its row stays and
// says when; a second time changes nothing. Copies of blobs are the caller's
// concern. Errors: ErrNoMember; ErrQuorum when too few of the voters that stay are
// live, or none stays.
func (n *Node) Remove(ctx context.Context, id string) error { return n.dismiss(ctx, id, false) }

// Betray is Remove of a node that strangers may have in their hands, and has
// replaced what it held: the join tokens, the authority that its certificate is of,
// and the cluster key if it had that. One Txn says so, and whoever leads does it while
// the site runs on; Status tells how far that is. What the rooms keep is theirs: see
// Resealers. Safe to repeat. Errors are those of Remove.
func (n *Node) Betray(ctx context.Context, id string) error { return n.dismiss(ctx, id, true) }

func (n *Node) dismiss(ctx context.Context, id string, stolen bool) error {
	in, err := n.settled(ctx)
	if err != nil {
		return err
	}
	_, err = n.db.Update(ctx, func(tx *table.Tx) error {
		m, _, ok, err := n.rows.members.Get(tx, id)
		switch {
		case err != nil:
			return err
		case !ok:
			return fmt.Errorf("%w: %q", ErrNoMember, id)
		case m.Removed == 0:
			if err := n.spare(tx, in, m); err != nil {
				return err
			}
		}
		if stolen && m.Stolen == 0 {
			m.Stolen = time.Now().Unix()
			if err := n.forsake(tx, m); err != nil {
				return err
			}
		} else if m.Removed != 0 {
			return nil
		}
		return n.expel(tx, m)
	})
	if err != nil || id == n.Self() {
		return err // a node cannot see its own end
	}
	wait, cancel := context.WithTimeout(ctx, n.cfg.Timings.LeaderWait)
	defer cancel()
	for (in.serves(id) || stolen && n.revoking()) && sleep(wait, n.cfg.Timings.Ping/10) {
	}
	return ctx.Err()
}

// settled is the running consensus of a node that has had the time to learn who is
// up.
func (n *Node) settled(ctx context.Context) (*instance, error) {
	in := n.raft.Load()
	if in == nil {
		return nil, errStarting
	}
	if early := n.cfg.Timings.Live - time.Since(n.begun); early > 0 && !sleep(ctx, early) {
		return nil, ctx.Err()
	}
	return in, nil
}

// expel marks a member as removed and frees its name.
func (n *Node) expel(tx *table.Tx, m Member) error {
	holder, _, ok, err := n.rows.names.Get(tx, m.Name)
	if err != nil {
		return err
	}
	if ok && holder.Node == m.ID {
		if err := n.rows.names.Delete(tx, m.Name); err != nil {
			return err
		}
	}
	if m.Removed == 0 {
		m.Removed = time.Now().Unix()
	}
	return n.rows.members.Put(tx, m, m.ID)
}

// spare refuses when the voters without m could not decide. It reads their rows
// through tx: of two removals at once, the second sees the first.
func (n *Node) spare(tx *table.Tx, in *instance, m Member) error {
	var down []string
	voters, live, others := 0, 0, 0
	for _, s := range in.servers() {
		id := string(s.ID)
		if id == m.ID {
			continue
		}
		other, _, ok, err := n.rows.members.Get(tx, id)
		if err != nil {
			return err
		}
		if ok && other.Removed != 0 {
			continue
		}
		up := n.live(id)
		if up && other.Draining == 0 {
			others++
		}
		switch {
		case s.Suffrage != raft.Voter:
		case up:
			voters, live = voters+1, live+1
		default:
			voters, down = voters+1, append(down, other.Name)
		}
	}
	switch {
	case others == 0 && len(down) == 0:
		return fmt.Errorf("%w: no other node is up and in service; add one first (atoll token create, then atoll serve --join there)", ErrQuorum)
	case live < voters/2+1 && voters > 0:
		return fmt.Errorf("%w: of the %d voters that stay, %d would be up; start %s again, or remove what is gone for good first",
			ErrQuorum, voters, live, strings.Join(down, ", "))
	}
	return nil
}

// Drain marks the node with the id as one that is to be taken out of service, or
// takes that back: it gives up leadership and vote as soon as others can take
// them. A second time changes nothing. Errors: ErrNoMember; ErrQuorum when no
// other node is up.
func (n *Node) Drain(ctx context.Context, id string, undo bool) error {
	in, err := n.settled(ctx)
	if err != nil {
		return err
	}
	_, err = n.db.Update(ctx, func(tx *table.Tx) error {
		m, _, ok, err := n.rows.members.Get(tx, id)
		switch {
		case err != nil:
			return err
		case !ok, m.Removed != 0:
			return fmt.Errorf("%w: %q", ErrNoMember, id)
		case undo == (m.Draining == 0):
			return nil
		}
		m.Draining = 0
		if !undo {
			if err := n.spare(tx, in, m); err != nil {
				return err
			}
			m.Draining = time.Now().Unix()
		}
		return n.rows.members.Put(tx, m, id)
	})
	return err
}

// Lead moves the leadership to the node with the id. Errors: ErrNoVote with what
// to do when it is no voter, is down or behind.
func (n *Node) Lead(ctx context.Context, id string) error {
	in := n.raft.Load()
	if in == nil {
		return errStarting
	}
	if err := n.mayLead(in, id); err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, n.cfg.Timings.LeaderWait)
	defer cancel()
	var last error
	for {
		changed := n.changed.wait()
		addr, leader := n.route()
		switch leader {
		case id:
			return nil
		case "":
			last = errors.New("no leader is known")
		case n.Self():
			last = in.handTo(wait, id)
		default:
			var answer number
			last = n.order(wait, addr, pathLead+"?node="+id, &answer)
		}
		tick := time.NewTimer(n.cfg.Timings.Ping)
		select {
		case <-changed:
		case <-tick.C:
		case <-wait.Done():
			tick.Stop()
			return fmt.Errorf("%w: %w", table.ErrNoLeader, errors.Join(last, ctx.Err()))
		}
		tick.Stop()
	}
}

func (n *Node) mayLead(in *instance, id string) error {
	m, ok, err := n.member(id)
	switch {
	case err != nil:
		return err
	case !ok || m.Removed != 0:
		return fmt.Errorf("%w: %q", ErrNoMember, id)
	case m.Draining != 0:
		return fmt.Errorf("%w: it is being drained; end that with: atoll cluster drain %s --undo", ErrNoVote, m.Name)
	case !in.votes(id):
		return fmt.Errorf("%w: it has no vote; the leader is one of the voters that atoll cluster status shows", ErrNoVote)
	case !n.live(id):
		return fmt.Errorf("%w: it is down; start it first", ErrNoVote)
	}
	return nil
}

func (n *Node) serveLead(w http.ResponseWriter, r *http.Request) {
	peer, _ := r.Context().Value(peerKey{}).(string)
	in := n.raft.Load()
	if m, ok, err := n.member(peer); err != nil || !ok || m.Removed != 0 || in == nil {
		http.Error(w, "you are not a member of the site as far as this node knows", http.StatusForbidden)
		return
	}
	if err := in.handTo(r.Context(), r.URL.Query().Get("node")); err != nil {
		http.Error(w, err.Error(), http.StatusMisdirectedRequest)
		return
	}
	n.reply(w, number{Node: n.Self()})
}

// handTo hands the leadership to a voter.
func (in *instance) handTo(ctx context.Context, id string) error {
	for _, s := range in.servers() {
		if string(s.ID) != id || s.Suffrage != raft.Voter {
			continue
		}
		in.gate.RLock()
		defer in.gate.RUnlock()
		if in.stopped {
			return errStopped
		}
		return within(timeLeft(ctx), in.LeadershipTransferToServer(s.ID, s.Address).Error)
	}
	return fmt.Errorf("%w: it has no vote", ErrNoVote)
}

// serves reports whether raft's newest configuration has the node.
func (in *instance) serves(id string) bool {
	for _, s := range in.servers() {
		if string(s.ID) == id {
			return true
		}
	}
	return false
}

func (in *instance) votes(id string) bool {
	for _, s := range in.servers() {
		if string(s.ID) == id {
			return s.Suffrage == raft.Voter
		}
	}
	return false
}

// standingAnswer says how the site sees a node.
type standingAnswer struct {
	// Removed is when the node was removed and the consensus let it go; 0 else.
	Removed int64 `json:"removed"`
	// Stale: its certificate is of an authority that the site no longer knows.
	Stale bool `json:"stale,omitempty"`
	// Addr is where a member is as far as the site knows.
	Addr string `json:"addr,omitempty"`
}

type standingRequest struct {
	Node string `json:"node"`
	// Issuer is the pin, in hex, of the authority that signed its certificate.
	Issuer string `json:"issuer,omitempty"`
}

// standing tells a node that nobody talks to any more whether it was removed:
// it is refused everywhere else, and the entry that removed it need not have
// reached it. That a node was removed is no secret from one that knows its id.
func (n *Node) standing(_ context.Context, body []byte) (any, error) {
	var req standingRequest
	if err := joining.Decode(body, &req); err != nil {
		return nil, err
	}
	m, ok, err := n.member(req.Node)
	if err != nil {
		return nil, err
	}
	in := n.raft.Load()
	// Until it has left raft's configuration its vote may be needed. One that a
	// recovery left out is fenced by the epoch as soon as they meet, and goes on
	// serving what it has; told that it was removed, it would end before that.
	if !ok || m.Removed == 0 || m.Outcast != "" || in == nil || in.serves(m.ID) {
		return standingAnswer{Stale: req.Issuer != "" && !slices.Contains(n.trusts(), req.Issuer), Addr: m.Addr}, nil
	}
	return standingAnswer{Removed: m.Removed}, nil
}

// dismissed returns ErrRemoved once this node's row says so and the consensus has
// let it go: until then its vote may be needed, and a leader hands over first.
func (n *Node) dismissed(self Member) error {
	in := n.raft.Load()
	if self.Removed == 0 || in == nil || in.serves(self.ID) {
		return nil
	}
	return removedOn(self.Removed)
}

func removedOn(at int64) error {
	return fmt.Errorf("%w on %s", ErrRemoved, time.Unix(at, 0).UTC().Format(time.DateOnly))
}

// maxLinks bounds the certificates by which nodes that were away during that many
// changes of the authority, two certificates each, find back.
const maxLinks = 4

// Rotation is how far a change of the site's certificates is. It is read from rows,
// so any node can tell and any leader goes on with it.
type Rotation struct {
	// Phase is "" when nothing is under way; "begin" until there is a new authority,
	// "trust" until all live members trust
	// the new authority, "renew" until all have a certificate of it or are as new
	// as they were told to be.
	Phase string
	// Waiting are the names of the live members that are not there yet.
	Waiting []string
}

// RotateAuthority has the site's authority replaced. When that is under way already it
// changes nothing, and says so. The leader does it: see replaceSecrets and advance.
func (n *Node) RotateAuthority(ctx context.Context) (underWay bool, err error) {
	_, err = n.db.Update(ctx, func(tx *table.Tx) error {
		rows, err := n.authorities(tx)
		if err != nil {
			return err
		}
		row, err := n.secret(tx)
		if err != nil {
			return err
		}
		if underWay = row.Authority || len(rows) > 1; underWay {
			return nil
		}
		row.Authority = true
		return n.rows.secrets.Put(tx, row, theSecret)
	})
	return underWay, err
}

// makeAuthority makes the authority that is to follow, as the leader.
func (n *Node) makeAuthority(ctx context.Context) error {
	id := n.Identity()
	next, err := pki.NewAuthority(id.SiteID, n.Now())
	if err != nil {
		return err
	}
	keyPEM, err := next.KeyPEM()
	if err != nil {
		return err
	}
	sealed, err := n.seal(caKeyName, keyPEM)
	if err != nil {
		return err
	}
	_, err = n.db.Update(ctx, func(tx *table.Tx) error {
		rows, err := n.authorities(tx)
		if err != nil {
			return err
		}
		secret, err := n.secret(tx)
		if err != nil || !secret.Authority || len(rows) > 1 {
			return err // one that is under way comes to its end first
		}
		secret.Authority = false
		if err := n.rows.secrets.Put(tx, secret, theSecret); err != nil {
			return err
		}
		now, err := n.signer(tx)
		if err != nil {
			return err
		}
		link, err := now.Link(next)
		if err != nil {
			return err
		}
		links, err := shorten(bytes.Join([][]byte{link, now.CertPEM(), now.links}, nil))
		if err != nil {
			return err
		}
		return n.rows.authority.Put(tx, authorityRow{Cert: next.CertPEM(), SealedKey: sealed, Links: links}, nextAuthority)
	})
	return err
}

// shorten keeps the newest links.
func shorten(links []byte) ([]byte, error) {
	certs, err := pki.ParseCerts(links)
	if err != nil || len(certs) <= 2*maxLinks {
		return links, err
	}
	var short []byte
	for _, c := range certs[:2*maxLinks] {
		short = append(short, pki.EncodeCert(c)...)
	}
	return short, nil
}

// RenewAll tells every node to get itself a new certificate now. While they do so
// already, or the authority is being replaced, which renews them all, it changes
// nothing, and says so: asked for again and again, or by several at once, it comes to an
// end.
func (n *Node) RenewAll(ctx context.Context) (underWay bool, err error) {
	_, err = n.db.Update(ctx, func(tx *table.Tx) error {
		rows, err := n.authorities(tx)
		if err != nil {
			return err
		}
		signs, ok := rows[theAuthority]
		if !ok {
			return errNoAuthority
		}
		secret, err := n.secret(tx)
		if err != nil {
			return err
		}
		// Of one that this node has not reached since it started nothing is known.
		waiting, err := n.unready(func(_ Member, p ping) bool { return p.Node == "" || p.Renewal >= signs.Renewals })
		if err != nil {
			return err
		}
		if underWay = secret.Authority || len(rows) > 1 || len(waiting) > 0; underWay {
			return nil
		}
		signs.Renewals++
		return n.rows.authority.Put(tx, signs, theAuthority)
	})
	return underWay, err
}

// advance takes the change of the authority one step further, as the leader, once
// every live member is ready for it. A member that is away is not waited for: the
// links let it find back.
func (n *Node) advance(ctx context.Context) error {
	rows, r, err := n.rotation()
	if err != nil || r.Phase == "" || len(r.Waiting) > 0 || time.Since(n.begun) < n.cfg.Timings.Live {
		return err
	}
	next, distributing := rows[nextAuthority]
	if _, renewing := rows[formerAuthority]; !distributing && !renewing {
		return nil
	}
	_, err = n.db.Update(ctx, func(tx *table.Tx) error {
		now, err := n.authorities(tx)
		if err != nil || !bytes.Equal(trusted(now), trusted(rows)) {
			return err // somebody else went on
		}
		if !distributing {
			return n.rows.authority.Delete(tx, formerAuthority)
		}
		signs := now[theAuthority]
		next.Renewals = signs.Renewals + 1
		return errors.Join(
			n.rows.authority.Put(tx, next, theAuthority),
			n.rows.authority.Put(tx, authorityRow{Cert: signs.Cert}, formerAuthority),
			n.rows.authority.Delete(tx, nextAuthority))
	})
	if err != nil {
		return fmt.Errorf("changing the site's authority: %w", err)
	}
	if distributing {
		n.log.Info("all nodes that are up trust the site's new authority; it signs from now on")
	} else {
		n.log.Info("all nodes that are up have certificates of the site's new authority; the former is trusted no more")
	}
	return nil
}

// rotation gives the authority's rows and how far the live members are.
func (n *Node) rotation() (rows map[string]authorityRow, r Rotation, err error) {
	err = n.db.View(func(v *table.View) error {
		rows, err = n.authorities(v)
		return err
	})
	if err != nil || len(rows) == 0 {
		return nil, r, err
	}
	signs := rows[theAuthority]
	next, distributing := rows[nextAuthority]
	_, renewing := rows[formerAuthority]
	pin, err := hexPin(signs.Cert)
	if err != nil {
		return rows, r, err
	}
	ready := func(_ Member, p ping) bool { return p.Issuer == pin && p.Renewal >= signs.Renewals }
	if distributing {
		if pin, err = hexPin(next.Cert); err != nil {
			return rows, r, err
		}
		ready = func(_ Member, p ping) bool { return slices.Contains(p.Trusts, pin) }
	}
	if r.Waiting, err = n.unready(ready); err != nil {
		return rows, r, err
	}
	secret, err := n.localSecret()
	switch {
	case distributing:
		r.Phase = "trust"
	case renewing, len(r.Waiting) > 0:
		r.Phase = "renew"
	case secret.Authority:
		r.Phase = "begin"
	}
	return rows, r, err
}

// unready are the names of the live members that did not say in their last ping
// what was asked for.
func (n *Node) unready(ready func(Member, ping) bool) (names []string, err error) {
	members, err := n.roster()
	for _, m := range members {
		said := n.peers.of(m.ID).ping
		if in := n.raft.Load(); m.ID == n.Self() && in != nil {
			said = n.sign(in)
		}
		if n.live(m.ID) && !ready(m, said) {
			names = append(names, m.Name)
		}
	}
	return names, err
}

func hexPin(cert []byte) (string, error) {
	pin, err := pki.PinPEM(cert)
	return hex.EncodeToString(pin), err
}
