package peers

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/transfer"
)

// principalHeader carries, between nodes only, the user for whom a request was
// passed on. Nothing but the API service of the peer port reads it, and a node
// sets it anew on everything that it passes on.
const principalHeader = "Atoll-Principal"

// maxPeerMessage bounds a message of one node to another.
const maxPeerMessage = 4 << 20

// Owns reports whether a node id is this node's.
func (p *Peers) Owns(node string) bool { return node == p.Roster.Self() }

// Forward passes a request on to the node that owns what it is about, with the
// user for whom it was made, and sends that node's answer. fault.Unavailable when
// the node is not live; then nothing has been sent.
func (p *Peers) Forward(node string, w http.ResponseWriter, r *http.Request) error {
	if _, ok := p.find(node); !ok {
		return fault.New(fault.Unavailable, "node %s, which this belongs to, is not up", node)
	}
	principal, err := json.Marshal(access.From(r.Context()))
	if err != nil {
		return err
	}
	proxy := httputil.ReverseProxy{
		Transport: p.client.Transport,
		Rewrite: func(out *httputil.ProxyRequest) {
			out.SetURL(&url.URL{Scheme: "http", Host: node})
			out.Out.Host = out.In.Host
			out.Out.Header.Del("Authorization")
			out.Out.Header.Set(principalHeader, string(principal))
		},
		ErrorHandler: func(_ http.ResponseWriter, _ *http.Request, e error) { err = e },
	}
	// A node that hangs answers nothing and breaks no connection either.
	err = p.whileLive(r.Context(), node, func(ctx context.Context) error {
		proxy.ServeHTTP(w, r.WithContext(ctx))
		return err
	})
	switch {
	case err == nil:
		return nil
	case r.Context().Err() != nil:
		return context.Cause(r.Context()) // the client left
	}
	return fault.Wrap(err, fault.Unavailable, "node %s, which this belongs to, went away", node)
}

// peerHandler serves what other nodes ask of this one.
func (p *Peers) peerHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /peer/v1/held", func(w http.ResponseWriter, r *http.Request) {
		serveMessage(p, w, r, p.hold)
	})
	mux.HandleFunc("POST /peer/v1/have", func(w http.ResponseWriter, r *http.Request) { serveMessage(p, w, r, p.answerHave) })
	mux.HandleFunc("POST /peer/v1/drain", func(w http.ResponseWriter, r *http.Request) { serveMessage(p, w, r, p.answerDrain) })
	mux.HandleFunc("POST /peer/v1/figures", func(w http.ResponseWriter, r *http.Request) {
		serveMessage(p, w, r, func(context.Context, figuresQuestion) (any, error) { return p.figures() })
	})
	mux.HandleFunc("POST /peer/v1/root", func(w http.ResponseWriter, r *http.Request) {
		serveMessage(p, w, r, p.answerRoot)
	})
	mux.HandleFunc("POST /peer/v1/reached", func(w http.ResponseWriter, r *http.Request) {
		serveMessage(p, w, r, p.reached)
	})
	for name, answer := range p.answers {
		mux.HandleFunc("POST /peer/v1/"+name, func(w http.ResponseWriter, r *http.Request) { serveMessage(p, w, r, answer) })
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		principal, err := decodePrincipal(r.Header.Get(principalHeader))
		if err != nil {
			http.Error(w, "a forwarded request names its user: "+err.Error(), http.StatusBadRequest)
			return
		}
		r.Header.Del(principalHeader)
		p.api.ServeHTTP(w, r.WithContext(access.WithPrincipal(r.Context(), principal)))
	})
	return mux
}

// decodePrincipal reads the user of a forwarded request. There must be one:
// nothing is anonymous only because a header got lost.
func decodePrincipal(header string) (access.Principal, error) {
	var principal *access.Principal
	if err := json.Unmarshal([]byte(header), &principal); err != nil {
		return access.Principal{}, err
	}
	if principal == nil || principal.Kind > access.System {
		return access.Principal{}, errors.New("it is of no kind that this version knows")
	}
	return *principal, nil
}

// rootRequest asks a holder to compute and commit the piece root of a blob.
type rootRequest struct {
	Digest digest.Digest `json:"digest"`
}

// rootAnswer names a revision at which the blob's row has its root.
type rootAnswer struct {
	Revision uint64 `json:"revision"`
}

func (p *Peers) answerRoot(ctx context.Context, q rootRequest) (any, error) {
	if err := p.commitRoot(ctx, q.Digest); err != nil {
		return nil, err
	}
	var answer rootAnswer
	err := p.DB.View(func(v *table.View) error { answer.Revision = v.Revision(); return nil })
	return answer, err
}

// serveMessage decodes a bounded message, answers it, and logs a failure.
func serveMessage[Q any](p *Peers, w http.ResponseWriter, r *http.Request, answer func(context.Context, Q) (any, error)) {
	q, err := decodeMessage[Q](r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	value, err := answer(r.Context(), q)
	if errors.Is(err, transfer.ErrNotHeld) { // a fair question, and an answer to it
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	if err != nil {
		p.Log.Warn("could not do what another node asked", "path", r.URL.Path, "err", err)
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	if value == nil {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(value) // a failed write means that the node is gone
}

// message is a request of one node to another.
type message interface{ check() error }

func (q heldRequest) check() error {
	for _, b := range q.Blobs {
		if _, err := entry.ParseDigest(b.Digest.String()); err != nil {
			return fmt.Errorf("blob %q: %w", b.Digest, err)
		}
		if b.Size < 0 {
			return fmt.Errorf("blob %s: size %d is negative", b.Digest, b.Size)
		}
	}
	return nil
}

func (q rootRequest) check() error {
	_, err := entry.ParseDigest(q.Digest.String())
	return err
}

func decodeMessage[Q any](body io.Reader) (q Q, err error) {
	data, err := io.ReadAll(io.LimitReader(body, maxPeerMessage+1))
	if err != nil {
		return q, err
	}
	if len(data) > maxPeerMessage {
		return q, fmt.Errorf("message is longer than %d bytes", maxPeerMessage)
	}
	if err := json.Unmarshal(data, &q); err != nil {
		return q, fmt.Errorf("message is no JSON of its kind: %w", err)
	}
	if m, ok := any(q).(message); ok {
		err = m.check()
	}
	return q, err
}

// errNotUnderstood: a node of an older version does not know a message.
var errNotUnderstood = errors.New("the node does not understand the question")

// call sends a message to a node and decodes its answer into answer, when not
// nil.
func (p *Peers) call(ctx context.Context, node, name string, question, answer any) error {
	data, err := json.Marshal(question)
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+node+"/peer/v1/"+name, bytes.NewReader(data))
	if err != nil {
		return err
	}
	resp, err := p.client.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxPeerMessage))
	if err != nil {
		return err
	}
	if resp.StatusCode == http.StatusBadRequest { // from the handler of forwarded requests
		return fmt.Errorf("node %s: %s: %w", node, bytes.TrimSpace(body), errNotUnderstood)
	}
	if resp.StatusCode >= 300 {
		return fmt.Errorf("node %s: %s: %s", node, resp.Status, bytes.TrimSpace(body))
	}
	if answer == nil || resp.StatusCode == http.StatusNoContent {
		return nil
	}
	return json.Unmarshal(body, answer)
}

// tellWait is how long Tell waits at most for a node that hangs and is still live.
const tellWait = 10 * time.Second

// reachedRequest asks a node to answer once its state has a revision.
type reachedRequest struct {
	Revision uint64 `json:"revision"`
}

func (p *Peers) reached(ctx context.Context, q reachedRequest) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, tellWait)
	defer cancel()
	return nil, p.DB.WaitApplied(ctx, q.Revision)
}

// Tell returns when each node that is live knows of a revision, so that what it
// took away is not to be seen on any of them. A node that stops being live is not
// waited for.
func (p *Peers) Tell(ctx context.Context, revision uint64) {
	ctx, cancel := context.WithTimeout(ctx, tellWait)
	defer cancel()
	var wait sync.WaitGroup
	for _, m := range p.others() {
		wait.Go(func() {
			err := p.whileLive(ctx, m.ID, func(ctx context.Context) error {
				return p.call(ctx, m.ID, "reached", reachedRequest{revision}, nil)
			})
			if err != nil {
				p.Log.Debug("a node does not say that it knows of a deletion", "node", m.ID, "revision", revision, "err", err)
			}
		})
	}
	wait.Wait()
}

// Answer sets what this node says when another one asks it by a name that no other
// message has. It must be called before Run.
func (p *Peers) Answer(name string, answer func(ctx context.Context, question json.RawMessage) (any, error)) {
	p.answers[name] = answer
}

// Ask puts a question to one node for as long as it is live, and decodes its answer.
func (p *Peers) Ask(ctx context.Context, node, name string, question, answer any) error {
	return p.whileLive(ctx, node, func(ctx context.Context) error { return p.call(ctx, node, name, question, answer) })
}

// AskAll asks the other nodes that are live in parallel and calls each, one call at
// a time, with what a node says or why it says nothing.
func (p *Peers) AskAll(ctx context.Context, name string, question any, each func(node member.Member, answer json.RawMessage, err error)) {
	var wait sync.WaitGroup
	var mu sync.Mutex
	for _, m := range p.others() {
		wait.Go(func() {
			var answer json.RawMessage
			err := p.call(ctx, m.ID, name, question, &answer)
			mu.Lock()
			defer mu.Unlock()
			each(m, answer, err)
		})
	}
	wait.Wait()
}
