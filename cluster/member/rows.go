package member

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"time"

	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/version"
)

// Member is a node's row. Raft's own configuration follows these rows, never
// the other way round.
type Member struct {
	ID      string `cbor:"id"`
	Name    string `cbor:"name"`
	Addr    string `cbor:"addr"` // of the peer port
	API     string `cbor:"api"`  // URL of the public API; "" when not known yet
	Joined  int64  `cbor:"joined"`
	Feature int    `cbor:"feature"`  // the level of the program that it runs, or last ran
	KeyHash string `cbor:"key_hash"` // of the key that its certificate is for
	// TokenKey is the public half of the Ed25519 key that it signs registry tokens
	// with; nil until it has said so.
	TokenKey []byte `cbor:"token_key,omitempty"`
	// Entrusted is since when the node may have the cluster key, in Unix seconds,
	// because it votes or is about to; 0 while it may not. Knew are the ids of the
	// keys that it had, or could have had, when that ended.
	Entrusted int64    `cbor:"entrusted,omitempty"`
	Knew      []string `cbor:"knew,omitempty"`
	// Stolen is when it was said to be in the hands of strangers; 0: never.
	Stolen int64 `cbor:"stolen,omitempty"`
	// Removed is when the node was removed, 0 while it is a member. The row
	// stays: a certificate that was once issued is refused by it.
	Removed int64 `cbor:"removed"`
	// ReplacedBy is the id of a node that joined under this node's name while
	// it was dead, and takes its place as soon as it has caught up.
	ReplacedBy string `cbor:"replaced_by"`
	// Labels say where the node stands (rack=a, zone=north): copies of one blob
	// are kept apart by them, and fetched from near by.
	Labels map[string]string `cbor:"labels,omitempty"`
	// Cache: the node holds metadata and serves pulls, and is no home for blobs.
	Cache bool `cbor:"cache,omitempty"`
	// Draining is since when the node is no home for blobs because it is to be
	// taken away, in Unix seconds; 0 while it is not.
	Draining int64 `cbor:"draining,omitempty"`
	// Outcast is the id of the recovery epoch that began without the node; ""
	// unless it was removed in that way.
	Outcast string `cbor:"outcast,omitempty"`
	// Version of the program that it runs, or last ran, for people. Written at
	// sites of levelVersions.
	Version string `cbor:"version,omitempty"`
}

// levelVersions is the feature level that brought Member.Version.
const levelVersions = 2

// equal says that two rows are the same.
func (m Member) equal(o Member) bool {
	if !maps.Equal(m.Labels, o.Labels) {
		return false
	}
	m.Labels, o.Labels = nil, nil
	return reflect.DeepEqual(m, o)
}

// nameRow says which node has a name.
type nameRow struct {
	Node string `cbor:"node"`
}

// tokenRow is a join token as the site keeps it. The secret is not in it.
type tokenRow struct {
	Kind    string     `cbor:"kind"`
	Hash    []byte     `cbor:"hash"`
	Created int64      `cbor:"created"`
	Expires int64      `cbor:"expires"`
	Uses    int        `cbor:"uses"`
	Used    []tokenUse `cbor:"used"`
}

// tokenUse remembers who used a token, so that a node whose answer was lost
// gets it again.
type tokenUse struct {
	Node    string `cbor:"node"`
	KeyHash string `cbor:"key_hash"`
}

// foundersRow says who came to the site by a founding token. It stays when the token
// is good for nothing any more, and says so.
type foundersRow struct {
	Created  int64             `cbor:"created"`
	Expires  int64             `cbor:"expires"`
	Places   int               `cbor:"places"`
	Machines map[string]string `cbor:"machines"`        // their names by their ids
	Addrs    map[string]string `cbor:"addrs,omitempty"` // and the addresses of their peer ports
}

// authorityRow is the site's certificate authority.
type authorityRow struct {
	Cert      []byte `cbor:"cert"`       // PEM
	SealedKey []byte `cbor:"sealed_key"` // by pki.Seal under caKeyName; none of a former one
	// Links are certificates by which nodes that know an earlier authority only
	// accept what this one signs, and those earlier authorities' own, in PEM.
	Links []byte `cbor:"links,omitempty"`
	// Renewals counts how often the authority changed or all nodes were told to
	// renew; of the one that signs.
	Renewals int `cbor:"renewals,omitempty"`
}

// Keys of the authority rows. While the authority is replaced there are two: the
// next one until all live members trust it, then the former one until all of them
// have a certificate of the new one.
const (
	theAuthority    = "ca"
	nextAuthority   = "next"
	formerAuthority = "former"
)

// caKeyName is what the authority's key is sealed as.
const caKeyName = "site authority key"

// secretRow says which cluster keys are in use, by their ids (keyID), and what of the
// site's secrets is to be replaced: whoever leads does that, and goes on with it. The
// keys themselves are in no row.
type secretRow struct {
	Seals  string `cbor:"seals"`  // what is sealed now is sealed with it
	Next   string `cbor:"next"`   // "", or the key that is to follow, until all live members hold it
	Former string `cbor:"former"` // "", or the key before, until nothing is sealed with it

	Tokens    bool `cbor:"tokens,omitempty"`    // the join tokens are to be revoked
	Key       bool `cbor:"key,omitempty"`       // a new cluster key is to be made
	Authority bool `cbor:"authority,omitempty"` // a new authority is to be made
}

// changing reports that the site is changing its cluster key.
func (row secretRow) changing() bool { return row.Key || row.Next != "" || row.Former != "" }

// theSecret is the key of the one secret row.
const theSecret = "cluster"

type rows struct {
	secrets   *table.Table[secretRow]
	members   *table.Table[Member]
	names     *table.Table[nameRow]
	tokens    *table.Table[tokenRow]
	founders  *table.Table[foundersRow]
	authority *table.Table[authorityRow]
	clock     *table.Table[clockRow]
}

func defineRows(db *table.DB) rows {
	return rows{
		secrets:   table.Define[secretRow](db, "site_secret"),
		members:   table.Define[Member](db, "member"),
		names:     table.Define[nameRow](db, "member_name"),
		tokens:    table.Define[tokenRow](db, "join_token"),
		founders:  table.Define[foundersRow](db, "site_founders"),
		authority: table.Define[authorityRow](db, "site_authority"),
		clock:     table.Define[clockRow](db, "site_clock"),
	}
}

// Members are the site's nodes at the moment of r, by id. Those that were
// removed are not among them.
func (n *Node) Members(r table.Reader) ([]Member, error) {
	all, err := n.everMembers(r)
	if err != nil {
		return nil, err
	}
	members := all[:0]
	for _, m := range all {
		if m.Removed == 0 {
			members = append(members, m)
		}
	}
	return members, nil
}

// everMembers are also those that were removed.
func (n *Node) everMembers(r table.Reader) ([]Member, error) {
	var all []Member
	for row, err := range n.rows.members.Scan(r, table.Range{}) {
		if err != nil {
			return nil, fmt.Errorf("reading the member rows: %w", err)
		}
		all = append(all, row.Value)
	}
	return all, nil
}

// roster is the members of the newest local state.
func (n *Node) roster() (members []Member, err error) {
	err = n.db.View(func(v *table.View) error {
		members, err = n.Members(v)
		return err
	})
	return members, err
}

// Level is the site's feature level at the moment of r. A room asks for it, in the
// transaction that it writes with, before it writes a shape of a row that a level
// brought. It never goes down.
func (n *Node) Level(r table.Reader) (int, error) { return n.gate.Site(r) }

// Upgrade says how far the site is with an upgrade, at the moment of r.
func (n *Node) Upgrade(r table.Reader) (version.Upgrade, error) {
	site, err := n.gate.Site(r)
	if err != nil {
		return version.Upgrade{}, err
	}
	runners, err := n.runners(r)
	return version.Survey(site, runners), err
}

func (n *Node) runners(r table.Reader) ([]version.Runner, error) {
	members, err := n.Members(r)
	var runners []version.Runner
	for _, m := range members {
		runners = append(runners, version.Runner{Name: m.Name, Level: m.Feature})
	}
	return runners, err
}

// FinishUpgrade raises the site's feature level to that of its nodes, after which
// the older version cannot be put back. A second time changes nothing. Errors:
// version.ErrNotYet when a node runs the older version.
func (n *Node) FinishUpgrade(ctx context.Context) error {
	_, err := n.db.Update(ctx, func(tx *table.Tx) error {
		runners, err := n.runners(tx)
		if err != nil {
			return err
		}
		return n.gate.Raise(tx, runners, n.Now())
	})
	return err
}

// heed stops a node whose program the site has outgrown, and writes the site's
// level down where the next start looks first.
func (n *Node) heed() (level int, err error) {
	err = n.db.View(func(v *table.View) error {
		if err := n.gate.Outdated(v); err != nil {
			return err
		}
		level, err = n.gate.Site(v)
		return err
	})
	if err != nil {
		return level, err
	}
	if err := version.Mark(n.cfg.Dir, n.cfg.Version, level); err != nil {
		n.log.Warn("the data directory does not say which version used it last", "error", err) // a full disk serves pulls
	}
	return level, nil
}

// member reads one row of the newest local state.
func (n *Node) member(id string) (m Member, ok bool, err error) {
	err = n.db.View(func(v *table.View) error {
		m, _, ok, err = n.rows.members.Get(v, id)
		return err
	})
	return m, ok, err
}

// Authorize decides whether a peer with a certificate of the site may use a
// service of this node, by its member row.
//
// A peer without a row may use those of the consensus: a node that was away
// does not know who joined meanwhile, and could never learn it if it refused a
// leader that did. It may not propose: see the control service. Removed
// members have rows that say so; they may use the consensus until it has let
// them go, because a leader that was removed hands over first.
func (n *Node) Authorize(peerID string, service byte) error {
	m, ok, err := n.member(peerID)
	consensus := service == ServiceRaft || service == ServiceControl
	switch {
	case err != nil:
		return fmt.Errorf("looking up the peer %s: %w", peerID, err)
	case ok && m.Removed != 0 && !(consensus && n.raft.Load() != nil && n.raft.Load().serves(peerID)):
		return fmt.Errorf("the peer %s (%s) was removed from the site on %s", peerID, m.Name, time.Unix(m.Removed, 0).UTC().Format(time.DateOnly))
	case !ok && !consensus:
		return fmt.Errorf("the peer %s is not a member of the site as far as this node knows", peerID)
	}
	return nil
}

// Offline reads and changes the rows of a site whose node does not run.
type Offline struct{ node *Node }

// NewOffline defines the tables of members on a database that is not built yet.
// The cluster key opens the site's secrets.
func NewOffline(db *table.DB, clusterKey []byte) *Offline {
	return &Offline{&Node{db: db, rows: defineRows(db), gate: version.NewGate(db, version.Level, ""), identity: Identity{ClusterKey: clusterKey}}}
}

// Members are the site's nodes.
func (o *Offline) Members() ([]Member, error) { return o.node.roster() }

// Seal is Node.Seal.
func (o *Offline) Seal(name string, plain []byte) ([]byte, error) { return o.node.Seal(name, plain) }

// Unseal is Node.Unseal.
func (o *Offline) Unseal(name string, sealed []byte) ([]byte, error) {
	return o.node.Unseal(name, sealed)
}

// Authority is the site's.
func (o *Offline) Authority() (*pki.Authority, error) {
	s, err := o.node.localSigner()
	if errors.Is(err, errNoAuthority) {
		return nil, errors.New("the state names no authority: it is not that of a site")
	}
	return s.Authority, err
}

// Alone makes the rows those of a site that goes on with the member self alone:
// every other is marked as left out by the epoch, and its name is free. A site
// that this program is too old for is refused with version.ErrMismatch.
func (o *Offline) Alone(ctx context.Context, self Member, e epoch.Epoch) error {
	rows := o.node.rows
	now := time.Now().Unix()
	self.Removed, self.Outcast, self.ReplacedBy = 0, "", ""
	self.Entrusted, self.Knew = now, nil
	_, err := o.node.db.Update(ctx, func(tx *table.Tx) error {
		if err := o.node.gate.Outdated(tx); err != nil {
			return err
		}
		var others []Member
		for row, err := range rows.members.Scan(tx, table.Range{}) {
			if err != nil {
				return fmt.Errorf("reading the member rows: %w", err)
			}
			if m := row.Value; m.ID != self.ID && m.Removed == 0 {
				others = append(others, m)
			}
		}
		for _, m := range others {
			if err := rows.names.Delete(tx, m.Name); err != nil {
				return err
			}
			m.Removed, m.Outcast, m.ReplacedBy = now, e.ID, ""
			if err := rows.members.Put(tx, m, m.ID); err != nil {
				return err
			}
		}
		if err := rows.members.Put(tx, self, self.ID); err != nil {
			return err
		}
		return rows.names.Put(tx, nameRow{Node: self.ID}, self.Name)
	})
	return err
}
