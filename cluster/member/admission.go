package member

import (
	"context"
	"errors"
	"fmt"
	"maps"
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
	return joining.Server(joining.Strangers(), map[string]joining.Handler{
		pathJoin: n.entrusted(pathJoin), pathRenew: n.entrusted(pathRenew), pathStanding: n.standing,
	}, n.log, n.metrics.joinRefused)
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
	if holder := new(nameHolder); errors.As(err, &holder) {
		return nil, n.contest(ctx, holder)
	}
	if err != nil {
		return nil, err
	}
	cert, err := signer.IssueNode(a.public, id.SiteID, a.Node, now)
	if err != nil {
		return nil, err
	}
	n.log.Info("a node joined", "node", a.Node, "name", a.Name, "address", a.Addr)
	return joinAnswer{Site: id.SiteID, CA: signer.trusted, Links: signer.links, Renewal: signer.renewals, Cert: cert, Epoch: n.cfg.Epoch.Wire()}, nil
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
				return &nameHolder{old}
			}
			old.ReplacedBy = a.Node
			if err := n.rows.members.Put(tx, old, old.ID); err != nil {
				return err
			}
		}
	}
	return n.rows.names.Put(tx, nameRow{Node: a.Node}, a.Name)
}

// nameHolder is a member that seems to be up and has the name that an applicant wants.
type nameHolder struct{ Member }

func (h *nameHolder) Error() string {
	return fmt.Sprintf("the name %q belongs to a node that is up (%s at %s): choose another with --name", h.Name, h.ID, h.Addr)
}

// contest says whether the name is taken for good. A node that died, or was wiped, a
// moment ago counts as up for some seconds yet; if it does not answer, the applicant
// is told to try again, by which time it is known to be down, or has answered.
func (n *Node) contest(ctx context.Context, h *nameHolder) error {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Timings.RPC)
	defer cancel()
	var answer ping
	if err := n.ask(ctx, h.Addr, pathPing, &answer); err == nil && answer.Node == h.ID {
		return joining.Refuse(joining.CodeName, "%v", h)
	}
	return joining.Refuse(joining.CodeLater, "the name %q belongs to node %s at %s, which was up a moment ago and does not answer now: it is yours when it is down", h.Name, h.ID, h.Addr)
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

// Founders is what a site keeps of the token by which its first machines found each
// other: it lets in so many machines, for so long, and never again.
type Founders struct {
	Token  string // id of the token
	Places int    // machines that may come in by it, all told
	// Machine, Name and Addr, of its peer port, are of the machine that asks; its id is
	// its own choice, kept on its disk.
	Machine, Name, Addr string
}

// FoundersLife is for how long a site lets machines in by the token after it first
// heard of it.
const FoundersLife = 72 * time.Hour

// OpenToFounders lets machines in by the token from now on, unless it was opened, and
// perhaps closed, before. The machine named, this node's, takes one of the places.
func (n *Node) OpenToFounders(ctx context.Context, f Founders) error {
	_, err := n.db.Update(ctx, func(tx *table.Tx) error {
		row, _, ok, err := n.rows.founders.Get(tx, f.Token)
		if err != nil {
			return err
		}
		if !ok {
			now := n.Now()
			row = foundersRow{Created: now.Unix(), Expires: now.Add(FoundersLife).Unix(), Places: f.Places}
		}
		if _, known := row.Machines[f.Machine]; ok && (known || len(row.Machines) >= row.Places) {
			return nil
		}
		row.take(f)
		return n.rows.founders.Put(tx, row, f.Token)
	})
	if err != nil {
		return fmt.Errorf("opening the site to those who hold the founding token: %w", err)
	}
	return nil
}

// GrantFounder gives a machine that holds the token a place, and a join token that
// mint makes for the authority with a pin; the same one each time, good for one node.
// Refusals say whether to try again.
func (n *Node) GrantFounder(ctx context.Context, f Founders, mint func(pin []byte) (pki.Token, error)) (string, error) {
	pin, err := n.oldestPin()
	if err != nil {
		return "", err
	}
	grant, err := mint(pin)
	if err != nil {
		return "", err
	}
	now := n.Now()
	_, err = n.db.Update(ctx, func(tx *table.Tx) error {
		row, _, ok, err := n.rows.founders.Get(tx, f.Token)
		if err != nil {
			return err
		}
		if !ok {
			return joining.Refuse(joining.CodeLater, "the site does not know the founding token yet: try again in a few seconds")
		}
		if !now.Before(time.Unix(row.Expires, 0)) {
			return joining.Refuse(joining.CodeExpired, "the founding token lets nobody in any more: make a join token on a node of the site with: atoll token create")
		}
		if err := n.seat(tx, &row, f); err != nil {
			return err
		}
		given, _, _, err := n.rows.tokens.Get(tx, grant.ID)
		if err != nil {
			return err
		}
		given.Kind, given.Hash, given.Uses = grant.Kind, pki.HashSecret(grant.Secret), 1
		given.Created, given.Expires = now.Unix(), now.Add(time.Hour).Unix()
		return errors.Join(n.rows.founders.Put(tx, row, f.Token), n.rows.tokens.Put(tx, given, grant.ID))
	})
	if err != nil {
		return "", err
	}
	return grant.String(), nil
}

// seat gives a machine its place among the founders. A name that a node has is
// refused also while that node is down: machines that were set up alike may all be
// called the same, and one must not take the other's place. A machine of the name and
// the address that one of them had is that one, with a cleared disk: it keeps its
// place, and joins as the heir of the node that it was, once that counts as down.
func (n *Node) seat(tx *table.Tx, row *foundersRow, f Founders) error {
	node, held, err := n.named(tx, f.Name)
	if err != nil {
		return err
	}
	cleared := held && node.Addr == f.Addr
	_, known := row.Machines[f.Machine]
	taken := joining.Refuse(joining.CodeName, "the name %q belongs to a node of the site: give this machine another with --name; if it is to replace that node, join it with a token of: atoll token create", f.Name)
	if held && !cleared && !known {
		return taken
	}
	former := ""
	for machine, name := range row.Machines {
		switch {
		case machine == f.Machine || name != f.Name:
		case cleared, f.Addr != "" && row.Addrs[machine] == f.Addr:
			former = machine
		default:
			return taken
		}
	}
	switch {
	case known:
	case cleared && (n.live(node.ID) || time.Since(n.begun) < n.cfg.Timings.Live):
		return joining.Refuse(joining.CodeLater, "the node %s at %s, whose name and address this machine has, was up a moment ago: its place is this machine's when it is down", node.Name, node.Addr)
	case former == "" && len(row.Machines) >= row.Places:
		return joining.Refuse(joining.CodeUsed, "the founding token was for %d machines, and all have come: make a join token on a node of the site with: atoll token create", row.Places)
	}
	row.leave(former)
	row.take(f)
	return nil
}

// named is the member that has a name.
func (n *Node) named(tx *table.Tx, name string) (m Member, held bool, err error) {
	holder, _, held, err := n.rows.names.Get(tx, name)
	if err != nil || !held {
		return m, false, err
	}
	m, _, held, err = n.rows.members.Get(tx, holder.Node)
	return m, held, err
}

// take writes a machine down. The maps of a row that was read are not its own.
func (r *foundersRow) take(f Founders) {
	r.Machines, r.Addrs = with(r.Machines, f.Machine, f.Name), with(r.Addrs, f.Machine, f.Addr)
}

func (r *foundersRow) leave(machine string) {
	r.Machines, r.Addrs = maps.Clone(r.Machines), maps.Clone(r.Addrs)
	delete(r.Machines, machine)
	delete(r.Addrs, machine)
}

func with(values map[string]string, key, value string) map[string]string {
	more := maps.Clone(values)
	if more == nil {
		more = make(map[string]string, 1)
	}
	more[key] = value
	return more
}

// closeFounders lets nobody in by a founding token any more. The rows stay, so that
// no node that starts with the token opens it again.
func (n *Node) closeFounders(ctx context.Context) error {
	_, err := n.db.Update(ctx, func(tx *table.Tx) error {
		var tokens []string
		for row, err := range n.rows.founders.Scan(tx, table.Range{}) {
			if err != nil {
				return err
			}
			tokens = append(tokens, row.Key[0])
		}
		for _, token := range tokens {
			row, _, _, err := n.rows.founders.Get(tx, token)
			if err != nil {
				return err
			}
			row.Expires = row.Created
			if err := n.rows.founders.Put(tx, row, token); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("closing the founding token: %w", err)
	}
	return nil
}
