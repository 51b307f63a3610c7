package traffic

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/node/settings"
	"github.com/atoll-registry/atoll/transfer"
)

// site is several nodes with their rooms and one table of settings each, which a
// test keeps alike.
type site struct {
	t     *testing.T
	nodes []*node

	mu      sync.Mutex
	members []member.Member
	owners  map[digest.Digest][]Repository
	wall    func() time.Time
	down    map[string]bool
}

type node struct {
	*Traffic
	site     *site
	id       string
	settings *settings.Settings
	messages map[string]func(context.Context, json.RawMessage) (any, error)
}

// newSite makes nodes a, b, c ... in the zones ship, shore, shore.
func newSite(t *testing.T, n int) *site {
	s := &site{t: t, owners: map[digest.Digest][]Repository{}, wall: time.Now, down: map[string]bool{}}
	for i := range n {
		id := string(rune('a' + i))
		zone := "shore"
		if i == 0 {
			zone = "ship"
		}
		s.members = append(s.members, member.Member{ID: "id-" + id, Name: id, Labels: map[string]string{"zone": zone}})
	}
	for _, m := range s.members {
		s.add(m.ID, t.TempDir())
	}
	return s
}

func (s *site) add(id, dir string) *node {
	s.t.Helper()
	db := tabletest.Open(s.t)
	n := &node{site: s, id: id, settings: settings.New(db, slog.New(slog.DiscardHandler)), messages: map[string]func(context.Context, json.RawMessage) (any, error){}}
	var err error
	n.Traffic, err = New(Config{
		Dir: dir, Roster: n, Owners: n, Settings: n.settings, Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
		Clock: func() time.Time { s.mu.Lock(); defer s.mu.Unlock(); return s.wall() },
	})
	if err != nil {
		s.t.Fatal(err)
	}
	n.Meet(n)
	tabletest.Start(s.t, db)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nodes = append(s.nodes, n)
	return n
}

// run runs the nodes until stop.
func (s *site) run(nodes ...*node) (stop func()) {
	if len(nodes) == 0 {
		nodes = s.nodes
	}
	ctx, cancel := context.WithCancel(s.t.Context())
	var all sync.WaitGroup
	for _, n := range nodes {
		all.Go(func() { _ = n.Run(ctx) })
	}
	return func() { cancel(); all.Wait() }
}

func (s *site) set(name, value string) {
	s.t.Helper()
	for _, n := range s.nodes {
		if _, err := n.settings.Set(s.t.Context(), name, value, "test"); err != nil {
			s.t.Fatal(err)
		}
	}
}

func (n *node) Self() string { return n.id }

func (n *node) Live() (live []member.Member) {
	n.site.mu.Lock()
	defer n.site.mu.Unlock()
	for _, m := range n.site.members {
		if m.ID == n.id || !n.site.down[m.ID] {
			live = append(live, m)
		}
	}
	return live
}

func (n *node) Repositories(d digest.Digest) []Repository {
	n.site.mu.Lock()
	defer n.site.mu.Unlock()
	return n.site.owners[d]
}

func (n *node) Answer(name string, answer func(context.Context, json.RawMessage) (any, error)) {
	n.messages[name] = answer
}

func (n *node) AskAll(ctx context.Context, name string, question any, each func(member.Member, json.RawMessage, error)) {
	for _, m := range n.Live() {
		if m.ID == n.id {
			continue
		}
		err := errors.New("no route")
		var answer json.RawMessage
		n.site.mu.Lock()
		nodes := n.site.nodes
		n.site.mu.Unlock()
		for _, o := range nodes {
			if o.id != m.ID || o.messages[name] == nil {
				continue
			}
			q, _ := json.Marshal(question)
			var value any
			if value, err = o.messages[name](ctx, q); err == nil {
				answer, err = json.Marshal(value)
			}
		}
		each(m, answer, err)
	}
}

// load is somebody who sends or asks as fast as it may.
type load struct {
	take func(n int) time.Duration
	done func(n int)
	sent int64
}

const piece = transfer.PieceSize

// drive lets loads go for a time, and gives what each moved. It runs in a bubble,
// where time passes only while everybody waits.
func drive(loads []*load, during time.Duration) {
	deadline := time.Now().Add(during)
	var all sync.WaitGroup
	for _, l := range loads {
		l.sent = 0
		all.Go(func() {
			for time.Now().Before(deadline) {
				if wait := l.take(piece); wait > 0 {
					pass(min(wait, time.Until(deadline)))
					continue
				}
				l.sent += piece
				if l.done != nil {
					l.done(piece)
				}
				pass(time.Millisecond) // what a fast wire takes for a piece
			}
		})
	}
	all.Wait()
}

// to is a load of a node that sends to a peer.
func (n *node) to(peer string, c transfer.Class, d digest.Digest) *load {
	f := transfer.Flow{Blob: transfer.Blob{Digest: d, Size: 1 << 40}, Peer: peer, Class: c}
	return &load{take: func(size int) time.Duration { return n.Take(f, size) }, done: func(size int) { n.Sent(f, size) }}
}

func total(loads ...*load) (sum int64) {
	for _, l := range loads {
		sum += l.sent
	}
	return sum
}

// near fails when a figure is off by more than a part of what is wanted.
func near(t *testing.T, what string, got int64, want, off float64) {
	t.Helper()
	if math.Abs(float64(got)-want) > off*want {
		t.Errorf("%s: %d bytes, want %.0f within %.0f %%", what, got, want, 100*off)
	}
}

func blob(name string) digest.Digest { return digest.FromString(name) }

// pass lets time pass in a bubble.
func pass(d time.Duration) { <-time.After(d) }
