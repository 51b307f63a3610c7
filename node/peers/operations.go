package peers

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest"
)

// NewToken asks for a join token.
type NewToken struct {
	TTLSeconds int64 `json:"ttl_seconds" min:"1" max:"2592000" required:"true"`
	Uses       int   `json:"uses" min:"1" max:"1000" required:"true"`
}

// JoinToken lets nodes join the site until it expires or is used up.
type JoinToken struct {
	Token     string    `json:"token"`
	ExpiresAt time.Time `json:"expires_at"`
}

// Status of the site's cluster as one node sees it.
type Status struct {
	Site   string `json:"site"`
	Self   string `json:"self"` // node id of the node that answers
	Leader string `json:"leader"`
	Term   uint64 `json:"term"`
	Quorum bool   `json:"quorum"`
	// StaleSeconds is for how long no leader has confirmed what this node serves; 0
	// while one does. Unconfirmed is how many changes its log has that it cannot serve
	// yet, because it does not know that the site agreed on them.
	StaleSeconds    int64        `json:"stale_seconds"`
	Unconfirmed     uint64       `json:"unconfirmed"`
	Nodes           []NodeStatus `json:"nodes"`
	Blobs           int          `json:"blobs"`
	UnderReplicated int          `json:"under_replicated"` // on fewer nodes than they should be
	// Counting: UnderReplicated is not complete, because a node has just come or gone.
	Counting bool `json:"counting"`
	Lost     int  `json:"lost"` // blobs that no node which is up holds
	// Surplus is how many copies nodes hold that others are to keep, SurplusBytes
	// their size: they are let go of when those others hold them all.
	Surplus      int   `json:"surplus"`
	SurplusBytes int64 `json:"surplus_bytes"`
	// Tolerance is how many more of the voters that are up may fail before no
	// write succeeds any more; -1 when none does now.
	Tolerance int `json:"tolerance"`
	// Epoch is the site's recovery epoch as this node has it; "0" when the site was
	// never recovered. Fenced says why this node takes no part in it; "" while it does.
	Epoch  string `json:"epoch"`
	Fenced string `json:"fenced,omitempty"`
	// Advice says in words what is wrong and what to do; empty when all is well.
	Advice []string `json:"advice"`
	// Backup is the last backup of the site that arrived; nil: there was none.
	Backup *LastBackup `json:"backup,omitempty"`
	// Level is the site's feature level; the nodes' are in Nodes.
	Level int `json:"level"`
	// KeyProvider is what keeps the keys of the node that answers: file or passphrase.
	KeyProvider string `json:"key_provider"`
	// UnderWay, in the answer to a rotation: it was under way already, and is the same one.
	UnderWay bool `json:"under_way,omitempty"`
}

// LastBackup is what the site remembers of its last backup.
type LastBackup struct {
	At         time.Time `json:"at"`   // the moment whose state it holds
	Node       string    `json:"node"` // name of the node that wrote it
	Revision   uint64    `json:"revision"`
	Recipients []string  `json:"recipients"` // none: it is not encrypted
	Blobs      bool      `json:"blobs"`      // it holds content, too
	Missing    int       `json:"missing"`    // blobs that are not in it
}

// NodeStatus is one node of the site.
type NodeStatus struct {
	ID     string `json:"id"`
	Name   string `json:"name"`
	Addr   string `json:"addr"`
	Voter  bool   `json:"voter"`
	Leader bool   `json:"leader"`
	Up     bool   `json:"up"`
	Lag    uint64 `json:"lag"` // revisions behind the leader
	// Draining is since when the node is taken out of service.
	Draining *time.Time `json:"draining,omitempty"`
	Version  string     `json:"version,omitempty"` // "" when it has not said
	Feature  int        `json:"feature"`           // level of the rows that it can write
	// CertExpires is when its certificate for the peer port ends.
	CertExpires *time.Time `json:"cert_expires,omitempty"`
	// Suspect: it is up, as others say, but does not answer the node that was asked.
	Suspect bool `json:"suspect,omitempty"`
	// Labels say where the node stands; Cache that it is no home for blobs.
	Labels map[string]string `json:"labels,omitempty"`
	Cache  bool              `json:"cache,omitempty"`
	// Conditions are codes of what the node itself finds wrong with it.
	Conditions []string `json:"conditions"`
	// Leaving is how many blobs a draining node must still hand over, -1 while that is
	// not known; CacheBytes how much a cache holds.
	Leaving    int   `json:"leaving,omitempty"`
	CacheBytes int64 `json:"cache_bytes,omitempty"`
}

func nodeStatus(m member.MemberStatus) NodeStatus {
	n := NodeStatus{
		ID: m.ID, Name: m.Name, Addr: m.Addr, Voter: m.Voter, Leader: m.Leader, Up: m.Up, Suspect: m.Suspect, Lag: m.Lag,
		Version: m.Version, Feature: m.Feature, Labels: m.Labels, Cache: m.Cache,
		Conditions: append([]string{}, m.Codes...),
	}
	if m.Draining != 0 {
		at := time.Unix(m.Draining, 0).UTC()
		n.Draining = &at
	}
	if !m.CertExpires.IsZero() {
		at := m.CertExpires.UTC()
		n.CertExpires = &at
	}
	return n
}

// Operations adds the room's operations to the API.
func (p *Peers) Operations(k *rest.Kernel) {
	type tokenIn struct{ Body NewToken }
	rest.Register(k, rest.Operation[tokenIn, JoinToken]{
		ID: "createToken", Method: http.MethodPost, Path: "/api/atoll/v1/tokens", Tag: "cluster",
		Summary: "Make a token by which nodes join this site", Permission: access.NodeManage, Status: http.StatusCreated,
		Do: func(ctx context.Context, in *tokenIn) (JoinToken, error) { return p.createToken(ctx, in.Body) },
	})
	rest.Register(k, rest.Operation[struct{}, Status]{
		ID: "getCluster", Method: http.MethodGet, Path: "/api/atoll/v1/cluster", Tag: "cluster",
		Summary: "The nodes of this site, their state, and what to do", Permission: access.NodeRead,
		Do: func(ctx context.Context, _ *struct{}) (Status, error) { return p.Status(ctx) },
	})
	rest.Register(k, rest.Operation[Leaving, Left]{
		ID: "removeNode", Method: http.MethodDelete, Path: "/api/atoll/v1/cluster/nodes/{node}", Tag: "cluster",
		Summary: "Take a node out of this site", Permission: access.NodeManage,
		Do: func(ctx context.Context, in *Leaving) (Left, error) { return p.Remove(ctx, *in) },
	})
	type nodeIn struct {
		Node string `path:"node" max:"64"`
	}
	type rotationIn struct {
		What string `path:"what" enum:"ca,certificates,key"`
	}
	rest.Register(k, rest.Operation[rotationIn, Status]{
		ID: "rotate", Method: http.MethodPost, Path: "/api/atoll/v1/cluster/rotations/{what}", Tag: "cluster",
		Summary: "Replace the CA, the nodes' certificates, or the cluster key that seals the site's secrets", Permission: access.NodeManage, Status: http.StatusAccepted,
		Do: func(ctx context.Context, in *rotationIn) (Status, error) { return p.rotate(ctx, in.What) },
	})
	for _, op := range []struct {
		id, method, action, summary string
		do                          func(context.Context, string) (NodeStatus, error)
	}{
		{"drainNode", http.MethodPut, "drain", "Take a node out of service before maintenance or removal", func(ctx context.Context, node string) (NodeStatus, error) {
			return p.Drain(ctx, node, false)
		}},
		{"undrainNode", http.MethodDelete, "drain", "Take a node back into service", func(ctx context.Context, node string) (NodeStatus, error) {
			return p.Drain(ctx, node, true)
		}},
		{"leadNode", http.MethodPut, "lead", "Move the leadership of this site to a node", p.Lead},
	} {
		rest.Register(k, rest.Operation[nodeIn, NodeStatus]{
			ID: op.id, Method: op.method, Path: "/api/atoll/v1/cluster/nodes/{node}/" + op.action, Tag: "cluster",
			Summary: op.summary, Permission: access.NodeManage,
			Do: func(ctx context.Context, in *nodeIn) (NodeStatus, error) { return op.do(ctx, in.Node) },
		})
	}
	rest.RegisterStream(k, rest.StreamOperation[struct{}]{
		ID: "getCA", Method: http.MethodGet, Path: "/api/atoll/v1/ca", Tag: "cluster",
		Summary: "The site's CA certificate", Anonymous: true, Produces: "application/x-pem-file",
		Do: func(_ context.Context, _ *struct{}, w http.ResponseWriter, _ *http.Request) error {
			w.Header().Set("Content-Type", "application/x-pem-file")
			_, err := w.Write(p.Cluster.CA())
			return err
		},
	})
}

func (p *Peers) createToken(ctx context.Context, n NewToken) (JoinToken, error) {
	ttl := time.Duration(n.TTLSeconds) * time.Second
	token, err := p.Cluster.CreateToken(ctx, ttl, n.Uses)
	return JoinToken{Token: token, ExpiresAt: time.Now().Add(ttl).UTC().Truncate(time.Second)}, err
}

func (p *Peers) rotate(ctx context.Context, what string) (Status, error) {
	begin := p.Cluster.RenewAll
	switch what {
	case "ca":
		begin = p.Cluster.RotateAuthority
	case "key":
		begin = p.Cluster.RotateKey
	}
	underWay, err := begin(ctx)
	if err != nil {
		return Status{}, err
	}
	status, err := p.Status(ctx)
	status.UnderWay = underWay
	return status, err
}

// Status gives the state of the cluster and what to do about it.
func (p *Peers) Status(ctx context.Context) (Status, error) {
	s, err := p.Cluster.Status(ctx)
	if err != nil {
		return Status{}, fault.Wrap(err, fault.Unavailable, "the state of the cluster cannot be read now")
	}
	out := Status{Site: p.Cluster.Identity().SiteID, Self: p.Roster.Self(), Leader: s.Leader, Term: s.Term, Quorum: s.Quorum, Epoch: s.Epoch.String(),
		Level: s.Upgrade.Site, KeyProvider: s.KeyProvider, Advice: []string{}}
	if s.Fenced != nil {
		out.Fenced = s.Fenced.Error()
	}
	if !s.Quorum {
		out.Unconfirmed = s.Unconfirmed
		if !s.LastContact.IsZero() {
			out.StaleSeconds = int64(time.Since(s.LastContact) / time.Second)
		}
	}
	for _, m := range s.Members {
		out.Nodes = append(out.Nodes, nodeStatus(m))
	}
	err = p.DB.View(func(v *table.View) (err error) {
		if out.Blobs, err = p.Records.Count(v); err != nil {
			return err
		}
		if out.Lost, err = p.Records.CountLost(v); err != nil || p.archive == nil {
			return err
		}
		out.Backup, err = p.archive(v)
		return err
	})
	if err == nil {
		err = p.addFigures(ctx, &out)
	}
	out.Tolerance = tolerance(out)
	out.Advice = append(advise(out, s, p.Cluster.Now()), p.further()...)
	for _, n := range out.Nodes {
		if n.Draining != nil && n.Up {
			out.Advice = append(out.Advice, drained(n))
		}
	}
	return out, err
}

// tolerance counts from the voters that are up.
func tolerance(s Status) int {
	voters, up := 0, 0
	for _, n := range s.Nodes {
		if n.Voter {
			voters++
			if n.Up {
				up++
			}
		}
	}
	return max(-1, up-(voters/2+1))
}

// expirySoon is how long before its end a certificate is worth a word: nodes renew
// when at most half of its life is left, and try again each minute.
const expirySoon = 14 * 24 * time.Hour

// lagging is by how many revisions a node may be behind without a word: a healthy
// one is a few behind when it is asked.
const lagging = 1000

func advise(out Status, s member.Status, now time.Time) []string {
	advice := []string{}
	voters, up := 0, 0
	for _, n := range out.Nodes {
		if n.Voter {
			voters++
			if n.Up {
				up++
			}
		}
	}
	switch {
	case out.Fenced != "":
		return append(advice, out.Fenced) // nothing else is of use
	case s.Quorum:
	case up > voters/2:
		advice = append(advice, "no leader at the moment: the nodes that are up are electing one; pulls go on, pushes wait for it")
	default:
		advice = append(advice, "no quorum: pulls go on, pushes are refused; bring back enough of the nodes that are down; if most voters are gone for good: stop this node, then atoll cluster recover")
		advice = append(advice, staleness(out)...)
	}
	for _, n := range out.Nodes {
		if !n.Up {
			advice = append(advice, fmt.Sprintf("node %s (%s) is down: start it again; it catches up by itself. If it is gone for good: start another with --join and --name %s, or atoll cluster remove %s", n.Name, n.Addr, n.Name, n.Name))
		}
		if n.Up && n.Suspect {
			advice = append(advice, fmt.Sprintf("node %s (%s) is up, as other nodes say, but does not answer this one: if that lasts, see to the network and the firewalls between the two", n.Name, n.Addr))
		}
		if n.Up && n.Lag > lagging {
			advice = append(advice, fmt.Sprintf("node %s is %d revisions behind and catching up; if that grows, its disk or its network is too slow", n.Name, n.Lag))
		}
		if n.CertExpires != nil && n.CertExpires.Before(now.Add(expirySoon)) {
			ends := "ends"
			if !now.Before(*n.CertExpires) {
				ends = "has ended"
			}
			advice = append(advice, fmt.Sprintf("the certificate of node %s %s on %s and was not renewed: see its log and its clock, or try atoll cluster rotate certificates", n.Name, ends, n.CertExpires.Format(time.DateOnly)))
		}
	}
	switch len(out.Nodes) {
	case 1:
		advice = append(advice, "one node: add two more (atoll token create, then atoll serve --join there), so that one may fail")
	case 2:
		for _, n := range out.Nodes {
			if n.Voter {
				advice = append(advice, fmt.Sprintf("two nodes: if %s fails, which alone votes and holds the cluster key, pushes wait for it; add a third", n.Name))
				break
			}
		}
	}
	for _, stray := range s.Strays {
		if stray.Apart {
			advice = append(advice, fmt.Sprintf("node %s was recovered apart from this one (its recovery epoch is %s): decide which of the two goes on; on the other: atoll node wipe --yes, then join it again", stray.Node, stray.Epoch))
		} else {
			advice = append(advice, fmt.Sprintf("node %s came back with data from before the recovery and is refused; on it: atoll cluster salvage -o FILE, atoll node wipe --yes, then join it again", stray.Node))
		}
	}
	if s.Rekeying {
		advice = append(advice, "the site is changing its cluster key: it is done when all nodes that are up hold the new one")
	}
	if len(s.Exposed) > 0 && !s.Rekeying {
		advice = append(advice, fmt.Sprintf("%s had the cluster key, which seals the site's secrets, and needs it no more; it has erased it, but a disk may keep what was erased: if you do not trust it, replace the key (atoll cluster rotate key)", strings.Join(s.Exposed, ", ")))
	}
	if s.Rotation.Phase != "" {
		doing := map[string]string{"begin": "the site is about to make a new CA", "trust": "the site's new CA is being distributed", "renew": "the nodes are getting new certificates"}[s.Rotation.Phase]
		if len(s.Rotation.Waiting) > 0 {
			doing += ": waiting for " + strings.Join(s.Rotation.Waiting, ", ")
		}
		advice = append(advice, doing)
	}
	advice = append(advice, s.Upgrade.Advice()...)
	if out.Lost > 0 {
		advice = append(advice, fmt.Sprintf("no node that is up holds %d of the blobs: bring back the nodes that are down; if all are up, push the images again that atoll scrub status names", out.Lost))
	}
	if out.UnderReplicated > 0 {
		advice = append(advice, fmt.Sprintf("%d blobs are on fewer nodes than they should be; they are copied as soon as nodes are up", out.UnderReplicated))
	}
	return advice
}

// staleness says how old what a node serves may be that hears of no leader.
func staleness(s Status) []string {
	var parts []string
	if s.StaleSeconds > 0 {
		parts = append(parts, fmt.Sprintf("no leader has confirmed what this node serves for %v", time.Duration(s.StaleSeconds)*time.Second))
	}
	if s.Unconfirmed > 0 {
		parts = append(parts, fmt.Sprintf("its log has %d more changes that it does not serve yet, because only a quorum knows whether the site agreed on them", s.Unconfirmed))
	}
	if len(parts) == 0 {
		return nil
	}
	return []string{strings.Join(parts, "; ")}
}

var _ blobs.Copies = (*Peers)(nil)
