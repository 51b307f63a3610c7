package peers

import (
	"context"
	"fmt"
	"net/http"
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
	Site            string       `json:"site"`
	Self            string       `json:"self"` // node id of the node that answers
	Leader          string       `json:"leader"`
	Term            uint64       `json:"term"`
	Quorum          bool         `json:"quorum"`
	Nodes           []NodeStatus `json:"nodes"`
	Blobs           int          `json:"blobs"`
	UnderReplicated int          `json:"under_replicated"`
	Lost            int          `json:"lost"` // blobs that no node which is up holds
	// Advice says in words what is wrong and what to do; empty when all is well.
	Advice []string `json:"advice"`
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

// Status gives the state of the cluster and what to do about it.
func (p *Peers) Status(ctx context.Context) (Status, error) {
	s, err := p.Cluster.Status(ctx)
	if err != nil {
		return Status{}, fault.Wrap(err, fault.Unavailable, "the state of the cluster cannot be read now")
	}
	out := Status{Site: p.Cluster.Identity().SiteID, Self: p.Roster.Self(), Leader: s.Leader, Term: s.Term, Quorum: s.Quorum, Advice: []string{}}
	for _, m := range s.Members {
		out.Nodes = append(out.Nodes, NodeStatus{ID: m.ID, Name: m.Name, Addr: m.Addr, Voter: m.Voter, Leader: m.Leader, Up: m.Up, Lag: m.Lag})
	}
	err = p.DB.View(func(v *table.View) (err error) {
		if out.Blobs, err = p.Records.Count(v); err != nil {
			return err
		}
		if out.Lost, err = p.Records.CountLost(v); err != nil {
			return err
		}
		out.UnderReplicated, err = p.Records.CountUnderReplicated(v, min(Durability, len(s.Members)))
		return err
	})
	out.Advice = advise(out, s)
	return out, err
}

func advise(out Status, s member.Status) []string {
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
	case s.Quorum:
	case up > voters/2:
		advice = append(advice, "no leader at the moment: the nodes that are up are electing one; pulls go on, pushes wait for it")
	default:
		advice = append(advice, "no quorum: pulls go on, pushes are refused; bring back enough of the nodes that are down")
	}
	for _, n := range out.Nodes {
		if !n.Up {
			advice = append(advice, fmt.Sprintf("node %s (%s) is down: start it again; it catches up by itself", n.Name, n.Addr))
		}
	}
	switch len(out.Nodes) {
	case 1:
		advice = append(advice, "one node: add two more (atoll token create, then atoll serve --join there), so that one may fail")
	case 2:
		advice = append(advice, "two nodes: if the first fails, pushes wait for it; add a third")
	}
	if out.Lost > 0 {
		advice = append(advice, fmt.Sprintf("no node that is up holds %d of the blobs: bring back the nodes that are down; if all are up, push the images again that atoll scrub status names", out.Lost))
	}
	if out.UnderReplicated > 0 {
		advice = append(advice, fmt.Sprintf("%d blobs are on fewer nodes than they should be; they are copied as soon as nodes are up", out.UnderReplicated))
	}
	return advice
}

var _ blobs.Copies = (*Peers)(nil)
