package member

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"time"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/joining"
	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/table"
)

// The control service is HTTP/1.1 between members:
//
//	POST /v1/txn    a Txn's bytes in, a Result's bytes out; to the leader
//	GET  /v1/index  a read index; to the leader
//	GET  /v1/term   the term of this node
//	GET  /v1/ping   a sign of life, with proofs for a ?nonce=
//	GET  /v1/key    the cluster key ?id=; to members that are entrusted with it
//	POST /v1/duty   what takes the cluster key, ?of=; to members
//	POST /v1/lead   hand the leadership to the voter ?node=; to the leader
//
// Nothing is passed on: a node that does not lead says so.
const (
	pathTxn   = "/v1/txn"
	pathIndex = "/v1/index"
	pathTerm  = "/v1/term"
	pathPing  = "/v1/ping"
	pathLead  = "/v1/lead"
	pathKey   = "/v1/key"
	pathDuty  = "/v1/duty"
)

// maxAnswer bounds what is read of an answer. The longest is a Result with a
// number for each of kv.MaxParts operations, or the certificates of an authority that
// changed often.
const maxAnswer = 256 << 10

// ping is a sign of life.
type ping struct {
	Node    string `json:"node"`
	Term    uint64 `json:"term"`
	Applied uint64 `json:"applied"`
	Leader  string `json:"leader"`
	Version string `json:"version,omitempty"`
	// Expires is when the node's certificate ends, in Unix seconds.
	Expires int64 `json:"expires,omitempty"`
	// Run is of the process that answers.
	Run string `json:"run,omitempty"`
	// Clock is the node's, in Unix milliseconds; Fitness and Codes are what it
	// says of its own health.
	Clock   int64    `json:"clock_ms,omitempty"`
	Fitness Fitness  `json:"fitness,omitempty"`
	Codes   []string `json:"codes,omitempty"`
	// Issuer and Trusts are the pins, in hex, of the authority that signed the
	// node's certificate and of those whose certificates it accepts; Renewal is
	// up to which of the site's renewals its certificate is new.
	Issuer  string   `json:"issuer,omitempty"`
	Trusts  []string `json:"trusts,omitempty"`
	Renewal int      `json:"renewal,omitempty"`
	// Keys are the ids of the cluster keys that the node holds; Seals is the one
	// that it seals with. Proofs show that it holds them: see prove.
	Keys   []string `json:"keys,omitempty"`
	Seals  string   `json:"seals,omitempty"`
	Proofs [][]byte `json:"proofs,omitempty"`
}

type number struct {
	Node   string `json:"node"`
	Number uint64 `json:"number"`
}

type peerKey struct{}

// controlServer serves the control service.
func (n *Node) controlServer() *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+pathTxn, n.serveTxn)
	mux.HandleFunc("GET "+pathIndex, n.serveIndex)
	mux.HandleFunc("GET "+pathTerm, n.serveTerm)
	mux.HandleFunc("GET "+pathPing, n.servePing)
	mux.HandleFunc("POST "+pathLead, n.serveLead)
	mux.HandleFunc("GET "+pathKey, n.serveKey)
	mux.HandleFunc("POST "+pathDuty, n.serveDuty)
	return &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       time.Minute,
		WriteTimeout:      time.Minute,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    8 << 10,
		ErrorLog:          slog.NewLogLogger(n.log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if p, ok := c.(interface{ PeerID() string }); ok {
				return context.WithValue(ctx, peerKey{}, p.PeerID())
			}
			return ctx
		},
	}
}

func (n *Node) serveTxn(w http.ResponseWriter, r *http.Request) {
	// The network lets peers without a row use this service, so that a node
	// that was away can catch up; writing takes a row.
	peer, _ := r.Context().Value(peerKey{}).(string)
	if m, ok, err := n.member(peer); err != nil || !ok || m.Removed != 0 {
		http.Error(w, "you are not a member of the site as far as this node knows", http.StatusForbidden)
		return
	}
	txn, err := io.ReadAll(http.MaxBytesReader(w, r.Body, kv.MaxTxnBytes))
	if err != nil {
		http.Error(w, "reading the transaction: "+err.Error(), http.StatusBadRequest)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), n.cfg.Timings.LeaderWait)
	defer cancel()
	result, outcome, err := n.commit(ctx, txn)
	switch {
	case err == nil:
		w.Write(result.Encode())
	case outcome == never:
		http.Error(w, err.Error(), http.StatusMisdirectedRequest)
	case outcome == refused:
		http.Error(w, err.Error(), http.StatusBadRequest)
	default:
		http.Error(w, err.Error(), http.StatusBadGateway)
	}
}

// forward sends the bytes to the leader at addr.
func (n *Node) forward(ctx context.Context, addr string, txn []byte) (kv.Result, outcome, error) {
	sent := never
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { sent = unknown },
	})
	status, body, err := n.call(ctx, http.MethodPost, addr, pathTxn, bytes.NewReader(txn))
	if err != nil {
		return kv.Result{}, sent, err
	}
	switch status {
	case http.StatusOK:
		result, err := kv.DecodeResult(body)
		if err != nil {
			return kv.Result{}, unknown, fmt.Errorf("reading the leader's answer: %w", err)
		}
		return result, never, nil
	case http.StatusMisdirectedRequest, http.StatusForbidden:
		return kv.Result{}, never, fmt.Errorf("the leader at %s: %s", addr, body)
	case http.StatusBadRequest:
		return kv.Result{}, refused, fmt.Errorf("the leader at %s: %s", addr, body)
	default:
		return kv.Result{}, unknown, fmt.Errorf("the leader at %s answered %d: %s", addr, status, body)
	}
}

func (n *Node) serveIndex(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), n.cfg.Timings.ReadWait)
	defer cancel()
	index, err := n.leadIndex(ctx)
	if err != nil {
		http.Error(w, err.Error(), http.StatusMisdirectedRequest)
		return
	}
	n.reply(w, number{Node: n.Self(), Number: index})
}

func (n *Node) askIndex(ctx context.Context, addr string) (uint64, error) {
	var answer number
	err := n.ask(ctx, addr, pathIndex, &answer)
	return answer.Number, err
}

func (n *Node) serveTerm(w http.ResponseWriter, _ *http.Request) {
	in := n.raft.Load()
	if in == nil {
		http.Error(w, "the node is starting", http.StatusServiceUnavailable)
		return
	}
	n.reply(w, number{Node: n.Self(), Number: in.CurrentTerm()})
}

// askTerm asks the voter id for its term.
func (n *Node) askTerm(ctx context.Context, addr, id string) (uint64, error) {
	var answer number
	if err := n.ask(ctx, addr, pathTerm, &answer); err != nil {
		return 0, err
	}
	if answer.Node != id {
		return 0, fmt.Errorf("node %s answered at %s instead of %s", answer.Node, addr, id)
	}
	return answer.Number, nil
}

func (n *Node) servePing(w http.ResponseWriter, r *http.Request) {
	in := n.raft.Load()
	if in == nil {
		http.Error(w, "the node is starting", http.StatusServiceUnavailable)
		return
	}
	answer := n.sign(in)
	if peer, _ := r.Context().Value(peerKey{}).(string); peer != "" {
		answer.Proofs = n.prove(r.URL.Query().Get("nonce"), peer)
	}
	n.reply(w, answer)
}

// sign is this node's sign of life.
func (n *Node) sign(in *instance) ping {
	self := n.reported()
	trusts := n.trusts()
	seals, _ := n.seals() // none is an answer
	return ping{
		Run:  n.run,
		Keys: n.keyIDs(), Seals: seals,
		Issuer: trusts[0], Trusts: trusts, Renewal: n.Identity().Renewal,
		Node: n.Self(), Term: in.CurrentTerm(), Applied: in.machine.Applied(), Leader: n.Leader(),
		Version: n.cfg.Version, Expires: n.Certificate().Leaf.NotAfter.Unix(),
		Clock: n.cfg.Clock().UnixMilli(), Fitness: self.Fitness, Codes: self.Codes,
	}
}

// maxProofs bounds those of one answer that are looked at: a node holds two keys while
// the site changes its own, and a third for a moment.
const maxProofs = 4

// proofName is what a proof is bound to: the question, who answers it and who asked. So
// it is good once, and nobody can pass on another's.
func proofName(nonce, holder, asker string) string {
	return "proof of " + holder + " to " + asker + " for " + nonce
}

// prove shows to a member, in answer to its nonce, that this node holds its cluster
// keys: by each it seals nothing, under a name that nobody could have known before.
func (n *Node) prove(nonce, asker string) (proofs [][]byte) {
	name := proofName(nonce, n.Self(), asker)
	n.mu.Lock()
	defer n.mu.Unlock()
	for key := range slices.Chunk(n.identity.ClusterKey, pki.ClusterKeySize) {
		if proof, err := pki.Seal(key, name, nil); err == nil {
			proofs = append(proofs, proof)
		}
	}
	return proofs
}

// proved are the ids of the cluster keys that a member has shown to hold in answer to a
// nonce. Only who holds a key can tell: what a member says of others is nothing that a
// key may be given up for, or a vote be given.
func (n *Node) proved(p ping, nonce string) (ids []string) {
	name := proofName(nonce, p.Node, n.Self())
	n.mu.Lock()
	defer n.mu.Unlock()
	for key := range slices.Chunk(n.identity.ClusterKey, pki.ClusterKeySize) {
		if slices.ContainsFunc(p.Proofs[:min(len(p.Proofs), maxProofs)], func(proof []byte) bool {
			_, err := pki.Open(key, name, proof)
			return err == nil
		}) {
			ids = append(ids, keyID(key))
		}
	}
	return ids
}

func (n *Node) reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(v); err != nil {
		n.log.Debug("answering a member", "error", err)
	}
}

// ask gets a JSON answer.
func (n *Node) ask(ctx context.Context, addr, path string, into any) error {
	return n.request(ctx, http.MethodGet, addr, path, into)
}

// order has something done and gets a JSON answer.
func (n *Node) order(ctx context.Context, addr, path string, into any) error {
	return n.request(ctx, http.MethodPost, addr, path, into)
}

func (n *Node) request(ctx context.Context, method, addr, path string, into any) error {
	status, body, err := n.call(ctx, method, addr, path, nil)
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		return fmt.Errorf("the node at %s answered %d: %s", addr, status, body)
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("reading the answer of %s: %w", addr, err)
	}
	return nil
}

func (n *Node) call(ctx context.Context, method, addr, path string, body io.Reader) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+addr+path, body)
	if err != nil {
		return 0, nil, err
	}
	resp, err := n.client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err == nil && len(answer) > maxAnswer {
		err = errors.New("the answer is too long")
	}
	return resp.StatusCode, answer, err
}

func (n *Node) newClient() *http.Client {
	return &http.Client{
		// Members do not redirect.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
				return n.cfg.Network.Dial(ctx, addr, ServiceControl)
			},
			MaxIdleConnsPerHost: 64, // as many writes travel at once
			IdleConnTimeout:     time.Minute,
			DisableCompression:  true,
		},
	}
}

// A Duty is what only a node that holds the cluster key can do. It answers with what
// encoding/json takes.
type Duty = joining.Handler

// maxDuty bounds what is read of a request. The longest is a statement over a bundle.
const maxDuty = 16 << 20

// dutyCertificate is the duty of issuing certificates for the public listeners.
const dutyCertificate = "certificate"

// Duties adds one that a room has. It must be called before Run.
func (n *Node) Duties(name string, do Duty) { n.duties[name] = do }

// Ask has a duty done, by this node if it holds the cluster key, else by one that
// votes and is up. Its errors pass (Unavailable) while none of those answers; what is
// not granted is a *joining.Refusal.
func (n *Node) Ask(ctx context.Context, duty string, ask, answer any) error {
	body, err := json.Marshal(ask)
	if err != nil {
		return err
	}
	text, err := n.delegate(ctx, duty, body)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, answer)
}

func (n *Node) delegate(ctx context.Context, duty string, body []byte) (json.RawMessage, error) {
	if _, err := n.seals(); err == nil {
		v, err := n.duties[duty](ctx, body)
		if err != nil {
			return nil, err
		}
		return json.Marshal(v)
	}
	in := n.raft.Load()
	if in == nil {
		return nil, errStarting
	}
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Timings.LeaderWait)
	defer cancel()
	silent := []error{errNoKey}
	for _, s := range in.servers() {
		if s.Suffrage != raft.Voter || s.ID == in.self || !n.live(string(s.ID)) {
			continue
		}
		status, text, err := n.call(ctx, http.MethodPost, string(s.Address), pathDuty+"?of="+url.QueryEscape(duty), bytes.NewReader(body))
		if err == nil && status == http.StatusOK {
			return text, nil
		}
		var no joining.Refusal
		if err == nil && status == http.StatusForbidden && json.Unmarshal(text, &no) == nil && no.Code != "" {
			return nil, &no
		}
		if err == nil {
			err = fmt.Errorf("it answered %d: %.200s", status, text)
		}
		silent = append(silent, fmt.Errorf("the node at %s: %w", s.Address, err))
	}
	return nil, errors.Join(silent...)
}

// entrusted is a duty that strangers ask of any node.
func (n *Node) entrusted(duty string) joining.Handler {
	return func(ctx context.Context, body []byte) (any, error) { return n.delegate(ctx, duty, body) }
}

func (n *Node) serveDuty(w http.ResponseWriter, r *http.Request) {
	peer, _ := r.Context().Value(peerKey{}).(string)
	var m Member
	var ok bool
	// Without a leader what is known here decides: certificates have to be renewed.
	_, err := n.db.Confirmed(r.Context(), func(v *table.View) (err error) {
		m, _, ok, err = n.rows.members.Get(v, peer)
		return err
	})
	if err != nil || !ok || m.Removed != 0 {
		http.Error(w, "you are not a member of the site as far as this node knows", http.StatusUnauthorized)
		return
	}
	do, known := n.duties[r.URL.Query().Get("of")]
	if _, err := n.seals(); err != nil || !known {
		http.Error(w, "this node does not hold the site's cluster key, or does not know the duty", http.StatusServiceUnavailable)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxDuty))
	if err != nil {
		http.Error(w, "reading the request: "+err.Error(), http.StatusBadRequest)
		return
	}
	v, err := do(r.Context(), body)
	var no *joining.Refusal
	switch {
	case errors.As(err, &no):
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusForbidden)
		if err := json.NewEncoder(w).Encode(no); err != nil {
			n.log.Debug("answering a member", "error", err)
		}
	case err != nil:
		n.log.Info("could not do what a member asked for, which takes the cluster key", "node", m.ID, "name", m.Name, "duty", r.URL.Query().Get("of"), "error", err)
		http.Error(w, "the node could not answer; its log says why", http.StatusServiceUnavailable)
	default:
		n.reply(w, v)
	}
}
