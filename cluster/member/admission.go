package member

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/atoll-registry/atoll/cluster/joining"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/version"
)

// joinServer serves the nodes that have no valid certificate.
func (n *Node) joinServer() *http.Server {
	return joining.Server(map[string]joining.Handler{pathJoin: n.admit, pathRenew: n.renewal, pathStanding: n.standing}, n.log)
}

// applicant is a joinRequest that was checked.
type applicant struct {
	joinRequest
	token   pki.Token
	public  any
	keyHash string
}

// parseJoin reads and checks a stranger's request. It knows nothing of the site.
func parseJoin(body []byte) (applicant, error) {
	var a applicant
	if err := joining.Decode(body, &a.joinRequest); err != nil {
		return a, err
	}
	var err error
	if a.token, err = pki.ParseToken(a.Token); err != nil {
		return a, joining.Refuse(joining.CodeMalformed, "the join token: %v", err)
	}
	if a.token.Kind != pki.KindJoin {
		return a, joining.Refuse(joining.CodeMalformed, "the token is not for joining")
	}
	if len(a.Node) != 32 || !pki.ValidID(a.Node) {
		return a, joining.Refuse(joining.CodeMalformed, "the node id is malformed")
	}
	if err := checkName(a.Name); err != nil {
		return a, joining.Refuse(joining.CodeMalformed, "%v", err)
	}
	if err := checkAddr(a.Addr); err != nil {
		return a, joining.Refuse(joining.CodeMalformed, "the advertised address: %v", err)
	}
	if err := checkAPI(a.API); err != nil {
		return a, joining.Refuse(joining.CodeMalformed, "%v", err)
	}
	if a.Feature < 1 || a.Feature > 1<<20 {
		return a, joining.Refuse(joining.CodeMalformed, "the feature level is malformed")
	}
	if a.public, a.keyHash, err = parseKey(a.CSR); err != nil {
		return a, joining.Refuse(joining.CodeMalformed, "%v", err)
	}
	return a, nil
}

func checkAPI(api string) error {
	if api == "" {
		return nil
	}
	u, err := url.Parse(api)
	if err != nil || len(api) > 512 || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return errors.New("the API's URL is malformed")
	}
	return nil
}

func parseKey(csr []byte) (public any, hash string, err error) {
	request, err := pki.ParseCSR(csr)
	if err != nil {
		return nil, "", err
	}
	hash, err = pki.KeyHash(request.PublicKey)
	return request.PublicKey, hash, err
}

// admit makes a stranger with a good token a member. The same key with the
// same token gets the same answer again: its first may have been lost.
func (n *Node) admit(ctx context.Context, body []byte) (any, error) {
	a, err := parseJoin(body)
	if err != nil {
		return nil, err
	}
	id := n.Identity()
	if known, err := id.knows(a.token.Pin); err != nil {
		return nil, err
	} else if !known {
		return nil, joining.Refuse(joining.CodeOtherSite, "the token is for another site than this node's (%s): make one here with: atoll token create", id.SiteID)
	}
	now := n.Now()
	var signer signer
	_, err = n.db.Update(ctx, func(tx *table.Tx) error {
		if signer, err = n.signer(tx); err != nil {
			return err
		}
		known, err := n.redeem(tx, a, now)
		if err != nil {
			return err
		}
		return n.enter(tx, a, known, now)
	})
	if err != nil {
		return nil, err
	}
	cert, err := signer.IssueNode(a.public, id.SiteID, a.Node, now)
	if err != nil {
		return nil, err
	}
	n.log.Info("a node joined", "node", a.Node, "name", a.Name, "address", a.Addr)
	return joinAnswer{Site: id.SiteID, CA: signer.trusted, Links: signer.links, Renewal: signer.renewals, Cert: cert, ClusterKey: id.ClusterKey, Epoch: n.cfg.Epoch.Wire()}, nil
}

// redeem takes one use of the applicant's token; known when this very key has
// taken one before.
func (n *Node) redeem(tx *table.Tx, a applicant, now time.Time) (known bool, err error) {
	row, _, ok, err := n.rows.tokens.Get(tx, a.token.ID)
	if err != nil {
		return false, err
	}
	// One answer for both, so that ids cannot be tried out.
	if !ok || !pki.SecretMatches(row.Hash, a.token.Secret) || row.Kind != a.token.Kind {
		return false, joining.Refuse(joining.CodeUnknown, "the token is not known here: it was mistyped, or revoked, or never made at this site")
	}
	for _, u := range row.Used {
		if u.Node == a.Node && u.KeyHash == a.keyHash {
			return true, nil
		}
	}
	if expires := time.Unix(row.Expires, 0); !now.Before(expires) {
		return false, joining.Refuse(joining.CodeExpired, "the token expired on %s: make a new one with: atoll token create", expires.UTC().Format(time.RFC3339))
	}
	if len(row.Used) >= row.Uses {
		return false, joining.Refuse(joining.CodeUsed, "the token was for %d use(s), and all are taken: make a new one with: atoll token create", row.Uses)
	}
	row.Used = append(row.Used, tokenUse{Node: a.Node, KeyHash: a.keyHash})
	return false, n.rows.tokens.Put(tx, row, a.token.ID)
}

// enter writes the applicant's member row.
func (n *Node) enter(tx *table.Tx, a applicant, known bool, now time.Time) error {
	if err := n.gate.Admit(tx, a.Feature); errors.Is(err, version.ErrMismatch) {
		return joining.Refuse(joining.CodeVersion, "%v", err)
	} else if err != nil {
		return err
	}
	m, _, ok, err := n.rows.members.Get(tx, a.Node)
	switch {
	case err != nil:
		return err
	case ok && m.Removed != 0:
		return joining.Refuse(joining.CodeRemoved, "the node %s was removed from the site: join with an empty data directory", a.Node)
	case ok && (!known || m.KeyHash != a.keyHash):
		return joining.Refuse(joining.CodeMalformed, "the node id %s belongs to another node", a.Node)
	case !ok:
		m = Member{ID: a.Node, Joined: now.Unix(), KeyHash: a.keyHash}
	}
	if err := n.takeName(tx, a); err != nil {
		return err
	}
	if m.Name != a.Name && m.Name != "" {
		if err := n.rows.names.Delete(tx, m.Name); err != nil {
			return err
		}
	}
	m.Name, m.Addr, m.API, m.Feature = a.Name, a.Addr, a.API, a.Feature
	return n.rows.members.Put(tx, m, m.ID)
}

// takeName gives the applicant its name. A dead member's name passes on, and
// its place with it: see plan.
func (n *Node) takeName(tx *table.Tx, a applicant) error {
	holder, _, ok, err := n.rows.names.Get(tx, a.Name)
	if err != nil {
		return err
	}
	if ok && holder.Node == a.Node {
		return nil
	}
	if ok {
		old, _, found, err := n.rows.members.Get(tx, holder.Node)
		if err != nil {
			return err
		}
		if found && old.Removed == 0 {
			if time.Since(n.begun) < n.cfg.Timings.Live {
				return joining.Refuse(joining.CodeLater, "this node has just started and does not know yet who is up: try again in a few seconds")
			}
			if n.live(old.ID) {
				return joining.Refuse(joining.CodeName, "the name %q belongs to a node that is up (%s at %s): choose another with --name", a.Name, old.ID, old.Addr)
			}
			old.ReplacedBy = a.Node
			if err := n.rows.members.Put(tx, old, old.ID); err != nil {
				return err
			}
		}
	}
	return n.rows.names.Put(tx, nameRow{Node: a.Node}, a.Name)
}

// renewal issues a new certificate for the key that a member's row names. The
// request needs no other proof: the certificate is of no use without the key.
func (n *Node) renewal(ctx context.Context, body []byte) (any, error) {
	var req renewRequest
	if err := joining.Decode(body, &req); err != nil {
		return nil, err
	}
	public, keyHash, err := parseKey(req.CSR)
	if err != nil {
		return nil, joining.Refuse(joining.CodeMalformed, "%v", err)
	}
	if !pki.ValidID(req.Node) {
		return nil, joining.Refuse(joining.CodeMalformed, "the node id is malformed")
	}
	var m Member
	var known bool
	var signer signer
	_, err = n.db.Confirmed(ctx, func(v *table.View) error {
		if m, _, known, err = n.rows.members.Get(v, req.Node); err != nil {
			return err
		}
		signer, err = n.signer(v)
		return err
	})
	switch {
	case err != nil:
		return nil, err
	case !known:
		return nil, joining.Refuse(joining.CodeUnknown, "the node %s is not a member of the site as far as this node knows", req.Node)
	case m.Removed != 0:
		return nil, joining.Refuse(joining.CodeRemoved, "the node %s was removed from the site", req.Node)
	case m.KeyHash != keyHash:
		return nil, joining.Refuse(joining.CodeMalformed, "the request is not of the key that the node %s joined with", req.Node)
	}
	cert, err := signer.IssueNode(public, n.Identity().SiteID, m.ID, n.Now())
	if err != nil {
		return nil, fmt.Errorf("renewing the certificate of node %s: %w", m.ID, err)
	}
	return renewAnswer{Cert: cert, CA: signer.trusted, Links: signer.links, Renewal: signer.renewals}, nil
}
