package prefetch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/jobs"
	"github.com/atoll-registry/atoll/node/rest/resttest"
)

// site has one node that leads, and others that only fetch.
type site struct {
	*Prefetch
	t     *testing.T
	nodes map[string]*node // by id
	tags  map[string][]Blob
	rate  atomic.Int64 // bytes per second that a node fetches
}

type node struct {
	*Prefetch
	site *site
	member.Member

	mu      sync.Mutex
	held    map[digest.Digest]bool
	down    bool
	moved   []time.Time
	engines []string // by which blobs were brought
	reply   func(context.Context, json.RawMessage) (any, error)
}

func newSite(t *testing.T) *site {
	s := &site{t: t, nodes: map[string]*node{}, tags: map[string][]Blob{}}
	s.rate.Store(1 << 20)
	db := tabletest.Open(t)
	log := slog.New(slog.DiscardHandler)
	queue := jobs.New(jobs.Config{Node: "id-a", DB: db, Log: log})
	for _, name := range []string{"a", "b", "c"} {
		n := &node{site: s, held: map[digest.Digest]bool{}, Member: member.Member{ID: "id-" + name, Name: name, Labels: map[string]string{"zone": "z" + name}}}
		s.nodes[n.ID] = n
		c := Config{Dir: t.TempDir(), Jobs: queue, Content: s, Store: n, Nodes: n, Log: log}
		if name == "a" {
			n.Prefetch = New(c)
			s.Prefetch = n.Prefetch
		} else {
			n.Prefetch = &Prefetch{Config: c}
			n.Clock, n.Zone = time.Now, func() *time.Location { return time.UTC }
			n.loadPins()
			n.reply = n.Prefetch.answer
		}
	}
	tabletest.Start(t, db)
	return s
}

func (s *site) run() (stop func()) {
	ctx, cancel := context.WithCancel(s.t.Context())
	ended := make(chan error)
	go func() { ended <- s.Jobs.Run(ctx) }()
	return func() { cancel(); <-ended }
}

func (s *site) Tags(_ context.Context, project, repository string) (all []string, err error) {
	if project+"/"+repository != "library/app" {
		return nil, fault.New(fault.NotFound, "there is no repository %s/%s", project, repository)
	}
	for t := range s.tags {
		all = append(all, t)
	}
	return all, nil
}

func (s *site) Blobs(_ context.Context, _, _, tag string) ([]Blob, error) { return s.tags[tag], nil }

func (n *node) Self() string { return n.ID }

func (n *node) Live() (all []member.Member) {
	for _, o := range n.site.nodes {
		all = append(all, o.Member)
	}
	return all
}

func (n *node) Answer(_ string, reply func(context.Context, json.RawMessage) (any, error)) {
	n.reply = reply
}

func (n *node) Ask(ctx context.Context, id, _ string, question, answer any) error {
	o := n.site.nodes[id]
	o.mu.Lock()
	down := o.down
	o.mu.Unlock()
	if down {
		return errors.New("no route")
	}
	raw, err := json.Marshal(question)
	if err != nil {
		return err
	}
	value, err := o.reply(ctx, raw)
	if err != nil {
		return err
	}
	raw, err = json.Marshal(value)
	return errors.Join(err, json.Unmarshal(raw, answer))
}

func (n *node) Holds(d digest.Digest) bool { n.mu.Lock(); defer n.mu.Unlock(); return n.held[d] }

func (n *node) Bring(ctx context.Context, b Blob, engine string) error {
	if !wait(ctx, time.Duration(float64(b.Size)/float64(n.site.rate.Load())*float64(time.Second))) {
		return ctx.Err()
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.held[b.Digest] {
		return nil // two jobs asked at once, and share a fetch as they do in a node
	}
	n.held[b.Digest], n.moved = true, append(n.moved, time.Now())
	n.engines = append(n.engines, engine)
	return nil
}

func (n *node) holdsAll(tags ...string) bool {
	for _, t := range tags {
		for _, b := range n.site.tags[t] {
			if !n.Holds(b.Digest) {
				return false
			}
		}
	}
	return true
}

// tag makes a tag of so many blobs of a MiB.
func (s *site) tag(name string, blobs int) {
	for i := range blobs {
		s.tags[name] = append(s.tags[name], Blob{digest.FromString(fmt.Sprint(name, i)), 1 << 20})
	}
}

func (s *site) view(id string) View {
	s.t.Helper()
	j, err := s.Jobs.Get(s.t.Context(), Kind, id)
	if err != nil {
		s.t.Fatal(err)
	}
	v, err := viewOf(j)
	if err != nil {
		s.t.Fatal(err)
	}
	return v
}

func pass(d time.Duration) { <-time.After(d) }

// The tags that are meant come to the nodes that are meant, before the time, not all
// at once when it begins, and stay there until they expire or it is cancelled. A bubble
// begins at midnight.
func TestPrefetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		defer s.run()()
		s.tag("v1.0", 40)
		s.tag("v1.1", 20)
		s.tag("v2.0", 5)
		var starts []time.Duration
		for range 4 {
			v, err := s.Create(t.Context(), Spec{Repository: "library/app", Tags: []string{"v1.*"}, To: []string{"b", "zone=zc"}, Before: "06:00", KeepHours: 24, Engine: "bittorrent"}, "ann")
			if err != nil {
				t.Fatal(err)
			}
			pass(10 * time.Second)
			p := s.view(v.ID).Progress
			if p == nil || p.Nodes["b"].Blobs != 60 || p.Nodes["b"].Missing != 60 || p.Nodes["b"].Bytes != 60<<20 || len(p.Nodes) != 2 {
				t.Fatalf("planned: %+v", s.view(v.ID))
			}
			if p.Deadline.Hour() != 6 || p.Start.After(p.Deadline.Add(-2*time.Minute)) {
				t.Errorf("from %v until %v", p.Start, p.Deadline)
			}
			starts = append(starts, p.Start.Sub(p.Deadline))
		}
		if starts[0] == starts[1] && starts[1] == starts[2] {
			t.Errorf("all begin at once: %v", starts)
		}
		pass(6 * time.Hour)
		b, c, a := s.nodes["id-b"], s.nodes["id-c"], s.nodes["id-a"]
		if !b.holdsAll("v1.0", "v1.1") || !c.holdsAll("v1.0", "v1.1") || len(a.held) > 0 || b.holdsAll("v2.0") {
			t.Error("not what was meant is where it was meant")
		}
		if last := b.moved[len(b.moved)-1]; last.Hour() >= 6 {
			t.Errorf("the last blob came at %v", last)
		}
		if len(b.moved) != 60 {
			t.Errorf("60 blobs were moved %d times", len(b.moved))
		}
		if slices.ContainsFunc(b.engines, func(e string) bool { return e != "bittorrent" }) {
			t.Errorf("brought by %v", b.engines)
		}
		all, err := s.Jobs.List(Kind)
		if err != nil || len(all) != 4 || len(s.Notices()) != 0 {
			t.Errorf("%d jobs, %v, notices %v", len(all), err, s.Notices())
		}
		d := s.tags["v1.0"][0].Digest
		if !b.Pinned(d) || a.Pinned(d) || b.Pinned(s.tags["v2.0"][0].Digest) {
			t.Error("the wrong blobs stay")
		}
		// Over a restart of the node too.
		again := &Prefetch{Config: b.Prefetch.Config}
		again.loadPins()
		if !again.Pinned(d) {
			t.Error("after a restart nothing stays")
		}
		pass(25 * time.Hour)
		if b.Pinned(d) {
			t.Error("it expired and still stays")
		}
	})
}

// A rate that is known makes a run begin in time; what is missing at the deadline is
// said, as an event too, and the next night's run makes it good.
func TestADeadlineThatIsMissed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		defer s.run()()
		s.tag("v1", 30)
		s.rate.Store(1 << 10) // a blob takes 17 minutes
		events, listened := context.WithCancel(t.Context())
		missed := make(chan Missing, 4)
		done := make(chan struct{})
		go func() { defer close(done); s.Missed.Each(events, 4, func(m Missing, _ int) { missed <- m }) }()
		synctest.Wait()
		c := s.nodes["id-c"]
		c.mu.Lock()
		c.down = true
		c.mu.Unlock()
		job, err := s.Create(t.Context(), Spec{Repository: "library/app", Tags: []string{"v1"}, To: []string{"b", "c"}, Before: "03:00", Cron: "0 1 * * *"}, "ann")
		if err != nil {
			t.Fatal(err)
		}
		pass(3*time.Hour + 20*time.Second)
		v := s.view(job.ID)
		if v.State != jobs.Scheduled || v.LastRun != jobs.Error || !strings.Contains(v.Failure, "c lacks 30") || !strings.Contains(v.Failure, "b lacks") {
			t.Fatalf("after the deadline: %+v", v)
		}
		if m := <-missed; m.ID != job.ID || m.Nodes["c"] != 30 || m.Nodes["b"] == 0 {
			t.Errorf("the event says %+v", m)
		}
		if n := s.Notices(); len(n) != 1 || n[0].Code != "prefetch-missed" || n[0].Subject != job.ID || !strings.Contains(n[0].Text, "lacks") {
			t.Errorf("the operator is told %+v", n)
		}
		s.rate.Store(1 << 20)
		c.mu.Lock()
		c.down = false
		c.mu.Unlock()
		pass(24 * time.Hour)
		if v := s.view(job.ID); v.LastRun != jobs.Success || len(s.Notices()) != 0 || !c.holdsAll("v1") {
			t.Errorf("the next night: %+v, %v", v, s.Notices())
		}
		if _, err := s.Jobs.Cancel(t.Context(), Kind, job.ID, "ann"); err != nil {
			t.Error(err)
		}
		if c.Pinned(s.tags["v1"][0].Digest) {
			t.Error("cancelled, and its blobs still stay")
		}
		listened()
		<-done
	})
}

func TestSpecsAreChecked(t *testing.T) {
	s := newSite(t)
	s.tag("v1", 1)
	good := Spec{Repository: "library/app", Tags: []string{"v1"}, To: []string{"b"}, Before: "06:00"}
	for what, change := range map[string]func(*Spec){
		"repository": func(s *Spec) { s.Repository = "app" },
		"pattern":    func(s *Spec) { s.Tags = []string{"v[1"} },
		"time":       func(s *Spec) { s.Before = "25:00" },
		"cron":       func(s *Spec) { s.Cron = "daily" },
	} {
		bad := good
		change(&bad)
		if _, err := s.Create(t.Context(), bad, ""); !fault.Is(err, fault.Invalid) {
			t.Errorf("a wrong %s: %v", what, err)
		}
	}
	bad := good
	bad.Repository = "library/none"
	if _, err := s.Create(t.Context(), bad, ""); !fault.Is(err, fault.NotFound) {
		t.Errorf("no such repository: %v", err)
	}
	for _, q := range []string{`{"blobs":[{"digest":"../x","size":1}],"fetch":true}`, `{"blobs":[{"digest":"` + digest.FromString("x").String() + `","size":-1}]}`, `[]`} {
		if _, err := s.answer(t.Context(), json.RawMessage(q)); err == nil {
			t.Errorf("a node was asked %s", q)
		}
	}
	// The day on which the clocks change has its six o'clock too.
	zone, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	at := good.deadline(time.Date(2026, 3, 28, 23, 0, 0, 0, zone))
	if at.Sub(time.Date(2026, 3, 28, 23, 0, 0, 0, zone)) != 6*time.Hour || at.Hour() != 6 {
		t.Errorf("the deadline of a short night is %v", at)
	}
}

func TestOperations(t *testing.T) {
	s := newSite(t)
	s.tag("v1", 1)
	api := resttest.New(t)
	s.Operations(api.Kernel)
	var v View
	api.Do("POST", "/api/atoll/v1/prefetch", `{"repository":"library/app","tags":["v1"],"to":["b"],"before":"06:00"}`).Want(201).Decode(&v)
	api.Do("POST", "/api/atoll/v1/prefetch", `{"repository":"library/app","tags":[],"to":["b"],"before":"06:00"}`).Want(422)
	var all []View
	api.Do("GET", "/api/atoll/v1/prefetch", nil).Want(200).Decode(&all)
	if len(all) != 1 || all[0].ID != v.ID || all[0].State != jobs.Pending || all[0].By != "admin" || all[0].Spec.Before != "06:00" {
		t.Errorf("listed: %+v", all)
	}
	api.Do("DELETE", "/api/atoll/v1/prefetch/"+v.ID, nil).Want(200).Decode(&v)
	if v.State != jobs.Stopped {
		t.Errorf("cancelled: %+v", v)
	}
	api.Do("GET", "/api/atoll/v1/prefetch/none", nil).Want(404)
	api.As = access.Principal{Kind: access.User, Name: "u"}
	for _, call := range [][2]string{{"GET", ""}, {"POST", ""}, {"GET", "/" + v.ID}, {"DELETE", "/" + v.ID}} {
		var body any
		if call[0] == "POST" {
			body = `{"repository":"library/app","tags":["v1"],"to":["b"],"before":"06:00"}`
		}
		api.Do(call[0], "/api/atoll/v1/prefetch"+call[1], body).Want(403)
	}
}
