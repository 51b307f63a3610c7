package member

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"time"

	"golang.org/x/time/rate"

	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/version"
)

// Strangers reach the join service: few requests at a time, few a second.
const (
	joinsPerSecond = 5
	joinsBurst     = 20
	joinsAtOnce    = 4
)

// joinServer serves the nodes that have no valid certificate.
func (n *Node) joinServer() *http.Server {
	limiter := rate.NewLimiter(joinsPerSecond, joinsBurst)
	places := make(chan struct{}, joinsAtOnce)
	bounded := func(answer func(context.Context, []byte) (any, error)) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			select {
			case places <- struct{}{}:
				defer func() { <-places }()
			default:
				n.refuse(w, refuse(codeLater, "too many nodes are joining at this moment: try again in a few seconds"))
				return
			}
			if !limiter.Allow() {
				n.refuse(w, refuse(codeLater, "too many nodes are joining at this moment: try again in a few seconds"))
				return
			}
			body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxJoinBody))
			if err != nil {
				n.refuse(w, refuse(codeMalformed, "reading the request: %v", err))
				return
			}
			v, err := answer(r.Context(), body)
			if err != nil {
				n.refuse(w, err)
				return
			}
			n.reply(w, v)
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+pathJoin, bounded(n.admit))
	mux.HandleFunc("POST "+pathRenew, bounded(n.renewal))
	mux.HandleFunc("POST "+pathStanding, bounded(n.standing))
	s := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      40 * time.Second, // longer than a write waits for a leader
		MaxHeaderBytes:    4 << 10,
		ErrorLog:          slog.NewLogLogger(n.log.Handler(), slog.LevelDebug),
	}
	s.SetKeepAlivesEnabled(false)
	return s
}

// refuse answers with a refusal; other errors stay in the log.
func (n *Node) refuse(w http.ResponseWriter, err error) {
	var no *refusal
	var passing interface{ Unavailable() bool }
	switch {
	case errors.As(err, &no):
	case errors.As(err, &passing) && passing.Unavailable(), errors.Is(err, context.DeadlineExceeded):
		no = refuse(codeLater, "the site cannot take a node in at the moment, because no leader answers: try again")
	default:
		no = refuse(codeLater, "the node could not answer; its log says why")
	}
	n.log.Info("refused a node's request to join or renew", "code", no.Code, "error", err)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusForbidden)
	if err := json.NewEncoder(w).Encode(no); err != nil {
		n.log.Debug("answering a node", "error", err)
	}
}

// decodeStrict reads exactly one JSON value that has only the fields of into.
func decodeStrict(body []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return refuse(codeMalformed, "the request is malformed: %v", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return refuse(codeMalformed, "the request is malformed: something follows it")
	}
	return nil
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
	if err := decodeStrict(body, &a.joinRequest); err != nil {
		return a, err
	}
	var err error
	if a.token, err = pki.ParseToken(a.Token); err != nil {
		return a, refuse(codeMalformed, "the join token: %v", err)
	}
	if a.token.Kind != pki.KindJoin {
		return a, refuse(codeMalformed, "the token is not for joining")
	}
	if len(a.Node) != 32 || !pki.ValidID(a.Node) {
		return a, refuse(codeMalformed, "the node id is malformed")
	}
	if err := checkName(a.Name); err != nil {
		return a, refuse(codeMalformed, "%v", err)
	}
	if err := checkAddr(a.Addr); err != nil {
		return a, refuse(codeMalformed, "the advertised address: %v", err)
	}
	if err := checkAPI(a.API); err != nil {
		return a, refuse(codeMalformed, "%v", err)
	}
	if a.Feature < 1 || a.Feature > 1<<20 {
		return a, refuse(codeMalformed, "the feature level is malformed")
	}
	if a.public, a.keyHash, err = parseKey(a.CSR); err != nil {
		return a, refuse(codeMalformed, "%v", err)
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
		return nil, refuse(codeOtherSite, "the token is for another site than this node's (%s): make one here with: atoll token create", id.SiteID)
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
		return false, refuse(codeUnknown, "the token is not known here: it was mistyped, or revoked, or never made at this site")
	}
	for _, u := range row.Used {
		if u.Node == a.Node && u.KeyHash == a.keyHash {
			return true, nil
		}
	}
	if expires := time.Unix(row.Expires, 0); !now.Before(expires) {
		return false, refuse(codeExpired, "the token expired on %s: make a new one with: atoll token create", expires.UTC().Format(time.RFC3339))
	}
	if len(row.Used) >= row.Uses {
		return false, refuse(codeUsed, "the token was for %d use(s), and all are taken: make a new one with: atoll token create", row.Uses)
	}
	row.Used = append(row.Used, tokenUse{Node: a.Node, KeyHash: a.keyHash})
	return false, n.rows.tokens.Put(tx, row, a.token.ID)
}

// enter writes the applicant's member row.
func (n *Node) enter(tx *table.Tx, a applicant, known bool, now time.Time) error {
	if err := n.gate.Admit(tx, a.Feature); errors.Is(err, version.ErrMismatch) {
		return refuse(codeVersion, "%v", err)
	} else if err != nil {
		return err
	}
	m, _, ok, err := n.rows.members.Get(tx, a.Node)
	switch {
	case err != nil:
		return err
	case ok && m.Removed != 0:
		return refuse(codeRemoved, "the node %s was removed from the site: join with an empty data directory", a.Node)
	case ok && (!known || m.KeyHash != a.keyHash):
		return refuse(codeMalformed, "the node id %s belongs to another node", a.Node)
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
				return refuse(codeLater, "this node has just started and does not know yet who is up: try again in a few seconds")
			}
			if n.live(old.ID) {
				return refuse(codeName, "the name %q belongs to a node that is up (%s at %s): choose another with --name", a.Name, old.ID, old.Addr)
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
	if err := decodeStrict(body, &req); err != nil {
		return nil, err
	}
	public, keyHash, err := parseKey(req.CSR)
	if err != nil {
		return nil, refuse(codeMalformed, "%v", err)
	}
	if !pki.ValidID(req.Node) {
		return nil, refuse(codeMalformed, "the node id is malformed")
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
		return nil, refuse(codeUnknown, "the node %s is not a member of the site as far as this node knows", req.Node)
	case m.Removed != 0:
		return nil, refuse(codeRemoved, "the node %s was removed from the site", req.Node)
	case m.KeyHash != keyHash:
		return nil, refuse(codeMalformed, "the request is not of the key that the node %s joined with", req.Node)
	}
	cert, err := signer.IssueNode(public, n.Identity().SiteID, m.ID, n.Now())
	if err != nil {
		return nil, fmt.Errorf("renewing the certificate of node %s: %w", m.ID, err)
	}
	return renewAnswer{Cert: cert, CA: signer.trusted, Links: signer.links, Renewal: signer.renewals}, nil
}
