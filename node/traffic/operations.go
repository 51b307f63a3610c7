package traffic

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest"
)

// View is what is under way in the whole site.
type View struct {
	At        time.Time  `json:"at"`
	Transfers []Transfer `json:"transfers"`
	// Nodes are what the nodes have in use of their limits, by name.
	Nodes []Use `json:"nodes"`
	// Silent are the nodes that did not say in time what they are doing.
	Silent []Silent `json:"silent"`
}

// Silent is a node that did not answer.
type Silent struct {
	Node  string `json:"node"`
	Cause string `json:"cause"`
}

// Operations adds the room's operations to the API.
func (t *Traffic) Operations(k *rest.Kernel) {
	rest.Register(k, rest.Operation[struct{}, View]{
		ID: "listTransfers", Method: http.MethodGet, Path: "/api/atoll/v1/transfers", Tag: "transfers",
		Summary: "The blobs that are on their way between the nodes of this site, and to clients", Permission: access.NodeRead,
		Do: func(ctx context.Context, _ *struct{}) (View, error) { return t.View(ctx), nil },
	})
	rest.RegisterStream(k, rest.StreamOperation[struct{}]{
		ID: "watchTransfers", Method: http.MethodGet, Path: "/api/atoll/v1/transfers/events", Tag: "transfers",
		Summary: "The same once a second, as server-sent events: transfers, and dropped before an end that this node decides on", Permission: access.NodeRead,
		Produces: "text/event-stream",
		Do: func(ctx context.Context, _ *struct{}, w http.ResponseWriter, _ *http.Request) error {
			return t.events.serve(ctx, w)
		},
	})
}

// View asks all nodes what is under way.
func (t *Traffic) View(ctx context.Context) View {
	ctx, cancel := context.WithTimeout(ctx, talkTimeout)
	defer cancel()
	seen := newSeen()
	t.reports(ctx, question{Transfers: true}, seen, func(member.Member, report) {})
	t.addOwn(seen)
	return seen.view(t.Clock())
}

// seen puts together what nodes say: both ends of a transfer tell of it.
type seen struct {
	all   map[[3]string]Transfer
	uses  []Use
	quiet []Silent
}

// addOwn adds what this node says.
func (t *Traffic) addOwn(s *seen) {
	s.add(t.own())
	self := t.Roster.Self()
	name := self
	for _, m := range t.Roster.Live() {
		if m.ID == self {
			name = cmp.Or(m.Name, m.ID)
		}
	}
	s.uses = append(s.uses, t.use(name))
}

func newSeen() *seen { return &seen{all: map[[3]string]Transfer{}} }

func (s *seen) add(transfers []Transfer) {
	for _, one := range transfers {
		k := [3]string{one.Blob.String(), one.From, one.To}
		other, twice := s.all[k]
		if twice {
			// Who receives knows when it is all there; who sends, what it waits for.
			if other.ETA >= 0 && (one.ETA < 0 || other.Done > one.Done) {
				one, other = other, one
			}
			one.HeldBack = cmp.Or(one.HeldBack, other.HeldBack)
			one.Repository = cmp.Or(one.Repository, other.Repository)
		}
		s.all[k] = one
	}
}

func (s *seen) silent(m member.Member, err error) {
	s.quiet = append(s.quiet, Silent{cmp.Or(m.Name, m.ID), err.Error()})
}

func (s *seen) view(at time.Time) View {
	v := View{At: at.UTC(), Transfers: make([]Transfer, 0, len(s.all)), Nodes: s.uses, Silent: s.quiet}
	if v.Silent == nil {
		v.Silent = []Silent{}
	}
	for _, one := range s.all {
		v.Transfers = append(v.Transfers, one)
	}
	slices.SortFunc(v.Transfers, func(a, b Transfer) int {
		return cmp.Or(cmp.Compare(b.Rate, a.Rate), cmp.Compare(a.Blob, b.Blob), cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To))
	})
	slices.SortFunc(v.Nodes, func(a, b Use) int { return cmp.Compare(a.Node, b.Node) })
	slices.SortFunc(v.Silent, func(a, b Silent) int { return cmp.Compare(a.Node, b.Node) })
	return v
}

const (
	watchersMax = 16
	// behindMax is how many events one who watches may be behind.
	behindMax = 8
	// sendTimeout bounds how long an event may take to be sent.
	sendTimeout = 30 * time.Second
)

// events gives views to those who watch.
type events struct {
	mu   sync.Mutex
	subs map[*watcher]struct{}
}

type watcher struct {
	views   chan View
	dropped bool
}

func (e *events) watched() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.subs) > 0
}

// publish never blocks: who is too far behind is dropped.
func (e *events) publish(v View) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for w := range e.subs {
		select {
		case w.views <- v:
		default:
			w.dropped = true
			close(w.views)
			delete(e.subs, w)
		}
	}
}

func (e *events) join() (*watcher, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.subs) >= watchersMax {
		return nil, fault.New(fault.Limit, "%d clients watch the transfers of this node, as many as it serves; ask another node, or for /api/atoll/v1/transfers now and then", watchersMax)
	}
	if e.subs == nil {
		e.subs = map[*watcher]struct{}{}
	}
	w := &watcher{views: make(chan View, behindMax)}
	e.subs[w] = struct{}{}
	return w, nil
}

func (e *events) leave(w *watcher) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.subs, w)
}

// serve sends events until ctx ends or the client is too slow.
func (e *events) serve(ctx context.Context, w http.ResponseWriter) error {
	sub, err := e.join()
	if err != nil {
		return err
	}
	defer e.leave(sub)
	control := http.NewResponseController(w)
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	_ = control.Flush() // the client learns that it is served before the first event
	// The next request on the connection has deadlines of its own.
	defer func() { _ = control.SetWriteDeadline(time.Time{}) }()
	send := func(event string, data any) bool {
		_ = control.SetWriteDeadline(time.Now().Add(sendTimeout)) // not every writer has one
		var b bytes.Buffer
		fmt.Fprintf(&b, "event: %s\ndata: ", event)
		if json.NewEncoder(&b).Encode(data) != nil { // ends the line, and holds no other
			return false
		}
		b.WriteByte('\n')
		_, err := w.Write(b.Bytes())
		return err == nil && control.Flush() == nil
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case v, more := <-sub.views:
			if !more {
				send("dropped", dropped{fmt.Sprintf("you are %d events behind; connect again", behindMax)})
				return nil
			}
			if !send("transfers", v) {
				return nil // the client is gone
			}
		}
	}
}

// dropped is the last event of a client that is too slow.
type dropped struct {
	Reason string `json:"reason"`
}
