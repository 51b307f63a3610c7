// Package traffic is the operator's hold on what moves between nodes and to
// clients: caps by node, link, site and project with hours of the week, budgets of
// metered links, what is under way at this moment and how fast. It implements
// transfer.Limiter and transfer.Meter and moves nothing itself.
//
// Invariants:
//   - Take never blocks, and costs one load from memory while there is no cap.
//   - What a cap lets through in a few seconds differs from it by less than a tenth,
//     whoever competes for it; nobody who asks again and again is left out for ever.
//   - Rates are measured by a clock that never jumps. The wall clock decides only
//     which hour, day and month it is.
//   - A budget never counts less than what went, minus one step (budget.go), across
//     crashes; on a clock that jumps it is never forgotten.
//   - What the node passes on for two others (transfer.ByRelay) counts like what it sends
//     and takes in itself. Each hop of such a way is a way of its own.
//   - Caps of a link, a site, a project and a user hold for all nodes of the site
//     together: they tell each other what they need (fellows.go), and a node that hears
//     nothing takes its equal part. A link counts once, at the node that sends.
//   - Limits on what is taken on at once (limits.go) count for what begins after they
//     were set; nothing that is under way ends for them.
//   - A new setting counts for transfers under way within a second.
//   - What is shown, counted and told is bounded, however much is under way.
package traffic

import (
	"cmp"
	"context"
	"encoding/json"
	"hash/fnv"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/node/settings"
	"github.com/atoll-registry/atoll/transfer"
)

// Roster knows the nodes of the site.
type Roster interface {
	Self() string
	Live() []member.Member
}

// Fellows are the other nodes of the site, with their rooms of traffic.
type Fellows interface {
	// Answer sets what this node says when another asks it by a name.
	Answer(name string, answer func(ctx context.Context, question json.RawMessage) (any, error))
	// AskAll asks all other nodes that are live, in parallel, until ctx ends, and calls
	// each with what one says or why it says nothing, one at a time.
	AskAll(ctx context.Context, name string, question any, each func(node member.Member, answer json.RawMessage, err error))
}

// Owners say whose blobs are.
type Owners interface {
	// Repositories names some of those that show a blob, as project and name.
	Repositories(d digest.Digest) []Repository
}

// Repository is one that shows a blob.
type Repository struct{ Project, Name string }

// Config of a Traffic. All fields are needed but Clock and Files.
type Config struct {
	Dir        string // where budgets are kept
	Roster     Roster
	Owners     Owners
	Settings   *settings.Settings
	Log        *slog.Logger
	Registerer prometheus.Registerer
	// Clock of the wall; time.Now when nil.
	Clock func() time.Time
	// Files that this process may have open; 0: not known.
	Files int
}

// look is how often the settings and the hours are looked at.
const look = 250 * time.Millisecond

// Traffic is the room.
type Traffic struct {
	Config
	set     options
	began   time.Time // of the clock that never jumps
	metrics metrics
	board   board
	owners  owned
	events  events
	capped  atomic.Bool // there is any cap or budget
	others  Fellows     // nil: this node is alone

	answering, fetching *transfer.Places
	stream, swarm       transfer.Limits

	mu      sync.Mutex
	loaded  [5]string // the texts of the settings that are in force
	caps    caps
	ways    map[wayKey]way
	ledgers map[string]*ledger
	fellows map[string]fellow
	stored  map[string]*ledger // all that the file has
	file    chan struct{}
}

// caps are what is in force, by what each is for.
type caps struct {
	nodeOut, nodeIn, site *capped
	links                 []*capped
	projects, users       map[string]*capped
}

// capped is a cap with its schedule.
type capped struct {
	rule
	*bucket
	shared bool
	most   int64 // by the schedule, for the whole site
}

// wayKey is a way of bytes: to or from a peer; "" is a client.
type wayKey struct {
	peer string
	in   bool
}

// way is what bounds what goes on it.
type way struct {
	caps    []*capped
	ledgers []*ledger
}

// New makes the room, with its settings. It starts nothing.
func New(c Config) (*Traffic, error) {
	if c.Clock == nil {
		c.Clock = time.Now
	}
	t := &Traffic{
		Config: c, set: defineOptions(c.Settings), began: time.Now(), ways: map[wayKey]way{},
		ledgers: map[string]*ledger{}, fellows: map[string]fellow{}, file: make(chan struct{}, 1),
	}
	t.board.init()
	t.limit(c.Files)
	t.owners.from = c.Owners
	t.loadLedgers()
	return t, t.register()
}

// Meet has this node agree with the others on what is for all of them. It must be
// called before Run.
func (t *Traffic) Meet(others Fellows) {
	t.others = others
	others.Answer(messageName, t.answer)
}

// now is the time since the start, by the clock that never jumps.
func (t *Traffic) now() time.Duration { return time.Since(t.began) }

// Run follows the settings and the hours, and keeps the books, until ctx ends.
func (t *Traffic) Run(ctx context.Context) error {
	var parts sync.WaitGroup
	parts.Go(func() { t.keepBooks(ctx) })
	parts.Go(func() { t.talk(ctx) })
	tick := time.NewTicker(look)
	defer tick.Stop()
	for ctx.Err() == nil {
		t.follow()
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	parts.Wait()
	return nil
}

// follow puts in force what the settings say for this moment.
func (t *Traffic) follow() {
	wall := t.Clock().In(t.set.zone.Value())
	now := t.now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if texts := t.set.texts(); texts != t.loaded {
		t.loaded = texts
		t.adopt()
	}
	jitter := t.jitter()
	for c := range t.caps.all() {
		c.most = c.rates.eased(wall, jitter)
		t.tune(c, now)
		c.lately.look(now)
	}
	for _, l := range t.ledgers {
		if l.turn(wall) {
			t.wakeBooks()
		}
	}
	clear(t.ways) // nodes and labels may have changed
	t.board.tick(now)
}

// jitter is by how much this node takes up higher rates later.
func (t *Traffic) jitter() time.Duration {
	most := t.set.jitter.Value()
	if most == 0 {
		return 0
	}
	h := fnv.New32a()
	h.Write([]byte(t.Roster.Self()))
	return time.Duration(h.Sum32()%uint32(most)) * time.Second
}

// tune gives a cap's bucket its rate; t.mu is held.
func (t *Traffic) tune(c *capped, now time.Duration) {
	switch {
	case c.most == stopped:
		c.bucket.tune(now, 0)
	case c.most != unlimited:
		rate := float64(c.most)
		if c.shared {
			rate = t.share(c, now)
		}
		c.bucket.tune(now, rate)
	}
	c.sweep(now)
}

// adopt makes caps and ledgers of what the settings say, and keeps what stays;
// t.mu is held.
func (t *Traffic) adopt() {
	was := map[string]*bucket{}
	for c := range t.caps.all() {
		was[c.name] = c.bucket
	}
	keep := func(kind, name string, r rule, shared bool) *capped {
		b := was[name]
		if b == nil {
			b = newBucket(kind, name)
			b.seen = t.now()
		}
		return &capped{rule: r, bucket: b, shared: shared}
	}
	single := func(kind string, s schedule, shared bool) *capped {
		if s.rest == unlimited && len(s.windows) == 0 {
			return nil
		}
		return keep(kind, kind, rule{rates: s}, shared)
	}
	next := caps{projects: map[string]*capped{}, users: map[string]*capped{}}
	next.nodeOut = single("node", t.set.nodeOut.Value().schedule, false)
	next.nodeIn = single("node-in", t.set.nodeIn.Value().schedule, false)
	next.site = single("site", t.set.site.Value().schedule, true)
	for _, r := range t.set.links.Value().all {
		next.links = append(next.links, keep("link", "link "+r.key, r, true))
	}
	for _, r := range t.set.projects.Value().all {
		next.projects[r.key] = keep("project", "project "+r.key, r, true)
	}
	for _, r := range t.set.users.Value().all {
		next.users[r.key] = keep("user", "user "+r.key, r, true)
	}
	t.caps = next
	t.adoptLedgers()
	any := false
	for range next.all() {
		any = true
	}
	t.capped.Store(any || len(t.ledgers) > 0)
}

// all gives every cap.
func (c *caps) all() func(func(*capped) bool) {
	return func(yield func(*capped) bool) {
		for _, one := range []*capped{c.nodeOut, c.nodeIn, c.site} {
			if one != nil && !yield(one) {
				return
			}
		}
		for _, one := range c.links {
			if !yield(one) {
				return
			}
		}
		for _, some := range []map[string]*capped{c.projects, c.users} {
			for _, one := range some {
				if !yield(one) {
					return
				}
			}
		}
	}
}

// way finds what bounds bytes to or from a peer; t.mu is held.
func (t *Traffic) way(k wayKey) way {
	if w, ok := t.ways[k]; ok {
		return w
	}
	var w way
	if k.in {
		w.add(t.caps.nodeIn)
	} else {
		w.add(t.caps.nodeOut)
		w.add(t.caps.site)
	}
	self, peer, known := t.ends(k.peer)
	// Both ends of a link are nodes of the site: who sends keeps to it, or each byte
	// would count twice.
	over := func(l link) bool { return !k.in && known && l.carries(self, peer) }
	for _, c := range t.caps.links {
		if over(c.link) {
			w.add(c)
		}
	}
	for _, l := range t.ledgers {
		if l.key == keyNode || over(l.link) {
			w.ledgers = append(w.ledgers, l)
		}
	}
	t.ways[k] = w
	return w
}

// ends finds this node and a peer; false when the peer is none of the site's that are up.
func (t *Traffic) ends(id string) (self, peer member.Member, known bool) {
	if id == "" {
		return self, peer, false
	}
	for _, m := range t.Roster.Live() {
		switch m.ID {
		case t.Roster.Self():
			self = m
		case id:
			peer, known = m, true
		}
	}
	return self, peer, known
}

func (w *way) add(c *capped) {
	if c != nil {
		w.caps = append(w.caps, c)
	}
}

// ask is one question whether bytes may move.
type ask struct {
	way     wayKey
	client  string // who is treated alike with others
	class   transfer.Class
	project string // "": none that is capped
	user    string // whose client it is; "": none's
	n       int
}

// decide says whether bytes may move now, and if not, what holds them back.
func (t *Traffic) decide(a ask) (wait time.Duration, by, kind string) {
	now := t.now()
	t.mu.Lock()
	defer t.mu.Unlock()
	w := t.way(a.way)
	for _, l := range w.ledgers {
		if held := l.holds(a.class, a.n); held {
			return mostWait, l.name(), "budget"
		}
	}
	all := w.caps
	for _, one := range []*capped{t.caps.projects[a.project], t.caps.users[a.user]} {
		if one != nil && !a.way.in {
			all = append([]*capped{one}, all...)
		}
	}
	for i, c := range all {
		if c.most == unlimited {
			continue
		}
		if wait := c.check(now, a.class, a.client, a.n); wait > 0 {
			for _, passed := range all[:i] {
				passed.hindered = now
			}
			return wait, c.name, c.kind
		}
	}
	for _, c := range all {
		if c.most != unlimited {
			c.take(a.class, a.client, a.n)
		}
	}
	// What comes in is counted when it has come.
	if !a.way.in {
		t.spend(w, a.n)
	}
	return 0, "", ""
}

// Take implements transfer.Limiter.
func (t *Traffic) Take(f transfer.Flow, n int) time.Duration {
	return t.admit(f, n, false)
}

// Incoming is the Limiter of what comes in: it is asked before each piece is taken in,
// and a sender that is not read sends no more, so that as much as its window is on
// the way.
func (t *Traffic) Incoming() transfer.Limiter { return incoming{t} }

type incoming struct{ t *Traffic }

func (a incoming) Take(f transfer.Flow, n int) time.Duration { return a.t.admit(f, n, true) }

func (t *Traffic) admit(f transfer.Flow, n int, in bool) time.Duration {
	if !t.capped.Load() {
		return 0
	}
	wait, by, kind := t.decide(ask{
		way: wayKey{cmp.Or(f.Via, f.Peer), in}, client: f.Peer, class: min(f.Class, transfer.Prefetch),
		project: t.cappedProject(f), n: n,
	})
	t.board.held(t.now(), flowKey{blob: f.Blob.Digest, peer: f.Peer, in: in}, factsOf(f), wait, by)
	t.metrics.hold(kind, f.Class, wait)
	return wait
}

// cappedProject is the project whose cap a blob counts for; "" when a project that
// shows it has none. Of what is passed on nobody here knows the blob.
func (t *Traffic) cappedProject(f transfer.Flow) string {
	t.mu.Lock()
	none := len(t.caps.projects) == 0
	t.mu.Unlock()
	if none || f.Way == transfer.ByRelay {
		return ""
	}
	found := t.owners.of(f.Blob.Digest, t.now())
	t.mu.Lock()
	defer t.mu.Unlock()
	project := ""
	for _, r := range found {
		if t.caps.projects[r.Project] == nil {
			return ""
		}
		project = r.Project
	}
	return project
}

// Sent implements transfer.Meter.
func (t *Traffic) Sent(f transfer.Flow, n int) { t.moved(f, n, false) }

// Received implements transfer.Meter.
func (t *Traffic) Received(f transfer.Flow, n int) {
	t.moved(f, n, true)
	if t.capped.Load() {
		t.mu.Lock()
		t.spend(t.way(wayKey{cmp.Or(f.Via, f.Peer), true}), n)
		t.mu.Unlock()
	}
}

func factsOf(f transfer.Flow) flowFacts {
	return flowFacts{class: f.Class, size: f.Blob.Size, way: f.Way}
}

func (t *Traffic) moved(f transfer.Flow, n int, in bool) {
	t.board.moved(t.now(), flowKey{blob: f.Blob.Digest, peer: f.Peer, in: in}, factsOf(f), n)
	t.metrics.count(in, f.Class, f.Peer, n)
}

var (
	_ transfer.Limiter = (*Traffic)(nil)
	_ transfer.Meter   = (*Traffic)(nil)
)

// Capped is how many caps and budgets are in force on this node.
func (t *Traffic) Capped() (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for range t.caps.all() {
		n++
	}
	return n + len(t.ledgers)
}

// Zone is the time zone of hours, days and months.
func (t *Traffic) Zone() *time.Location { return t.set.zone.Value() }
