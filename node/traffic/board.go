package traffic

import (
	"cmp"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
)

const (
	// boardMax bounds what is shown of a node; what is beyond it is counted and capped
	// all the same.
	boardMax = 4096
	// lifeAfter is how long a transfer is shown after its last byte.
	lifeAfter = 3 * time.Second
	// meanOver is the time over which rates are averaged.
	meanOver = 3 * time.Second
	// heldFor is how long a transfer counts as held back after it had to wait.
	heldFor = 2 * time.Second
)

// meter is the exponentially weighted mean of a rate.
type meter struct {
	rate  float64 // bytes per second
	fresh float64 // bytes since the last look
	at    time.Duration
	begun bool
}

func (m *meter) look(now time.Duration) {
	dt := (now - m.at).Seconds()
	if dt <= 0 {
		return
	}
	keep := math.Exp(-dt / meanOver.Seconds())
	if !m.begun && m.fresh > 0 {
		keep, m.begun = 0, true
	}
	m.rate = keep*m.rate + (1-keep)*m.fresh/dt
	m.fresh, m.at = 0, now
}

// flowKey is a transfer: of a blob, to or from a node or a client.
type flowKey struct {
	blob   digest.Digest
	peer   string // node id; "" for a client
	client string
	in     bool
}

type flowFacts struct {
	class      transfer.Class
	size       int64
	repository string // project/name, when the request says so
	way        transfer.Way
}

type flow struct {
	flowFacts
	meter
	done   int64
	since  time.Duration
	last   time.Duration // of a byte, or of having waited
	heldBy string
	heldAt time.Duration
	open   int // answers to clients that have not ended
}

// board is what is under way on this node. Safe for concurrent use.
type board struct {
	mu    sync.Mutex
	flows map[flowKey]*flow
	tocks int
}

func (b *board) init() { b.flows = map[flowKey]*flow{} }

// find gives the entry of a transfer, nil when there are too many; b.mu is held.
func (b *board) find(now time.Duration, k flowKey, facts flowFacts) *flow {
	f := b.flows[k]
	if f == nil {
		if len(b.flows) >= boardMax {
			return nil
		}
		f = &flow{flowFacts: facts, since: now, meter: meter{at: now}}
		b.flows[k] = f
	}
	f.class, f.way, f.last = facts.class, facts.way, now
	return f
}

func (b *board) moved(now time.Duration, k flowKey, facts flowFacts, n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if f := b.find(now, k, facts); f != nil {
		f.done += int64(n)
		f.fresh += float64(n)
	}
}

// held notes what a transfer has to wait for.
func (b *board) held(now time.Duration, k flowKey, facts flowFacts, wait time.Duration, by string) {
	if wait == 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if f := b.find(now, k, facts); f != nil {
		f.heldBy, f.heldAt = by, now
	}
}

// open notes that an answer to a client begins, close that it has ended.
func (b *board) open(now time.Duration, k flowKey, facts flowFacts) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if f := b.find(now, k, facts); f != nil {
		f.open++
	}
}

func (b *board) close(k flowKey) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.flows[k]
	if f == nil {
		return
	}
	if f.open--; f.open <= 0 {
		delete(b.flows, k)
	}
}

// tick brings the rates up to date, once a second, and forgets what has ended.
func (b *board) tick(now time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.tocks++; b.tocks%4 != 0 {
		return
	}
	for k, f := range b.flows {
		f.look(now)
		if now-f.last > lifeAfter && f.open == 0 {
			delete(b.flows, k)
		}
	}
}

// Transfer is a blob, or a part of it, on its way.
type Transfer struct {
	Blob digest.Digest `json:"blob"` // "" when it is passed on for two other nodes
	Size int64         `json:"size"` // bytes of the blob
	// Repository that shows the blob, one of them, as project/name; "" when not known.
	Repository string `json:"repository"`
	From       string `json:"from"` // a node's name
	To         string `json:"to"`   // a node's name, or USER@ADDRESS of a client
	Class      string `json:"class"`
	// Engine that moves it: stream or bittorrent, relay when it is passed on for two other
	// nodes; "" to a client.
	Engine  string `json:"engine"`
	Rate    int64  `json:"rate"` // bytes per second, a mean of the last seconds
	Done    int64  `json:"done"` // bytes on this way, since Seconds
	Seconds int64  `json:"seconds"`
	// ETA in seconds for the whole blob at the present rate; -1 when nothing moves.
	ETA int64 `json:"eta"`
	// HeldBack names the cap or budget that it has to wait for; "" when none.
	HeldBack string `json:"held_back"`
}

// own lists what is under way on this node.
func (t *Traffic) own() []Transfer {
	names := map[string]string{}
	for _, m := range t.Roster.Live() {
		names[m.ID] = m.Name
	}
	name := func(id string) string {
		if n := names[id]; n != "" {
			return n
		}
		return id
	}
	self := name(t.Roster.Self())
	now := t.now()
	t.board.mu.Lock()
	// What comes from several nodes is done when all of them together have sent it.
	type sum struct {
		done int64
		rate float64
	}
	arriving := map[digest.Digest]sum{}
	for k, f := range t.board.flows {
		if k.in {
			s := arriving[k.blob]
			arriving[k.blob] = sum{s.done + f.done, s.rate + f.rate}
		}
	}
	out := make([]Transfer, 0, len(t.board.flows))
	for k, f := range t.board.flows {
		one := Transfer{
			Blob: k.blob, Size: f.size, Repository: f.repository, From: self, To: name(k.peer), Class: f.class.String(), Engine: string(f.way),
			Rate: int64(f.rate), Done: f.done, Seconds: int64((now - f.since).Seconds()), ETA: -1,
		}
		left, rate := f.size-f.done, f.rate
		switch {
		case k.in:
			one.From, one.To = one.To, one.From
			left, rate = f.size-arriving[k.blob].done, arriving[k.blob].rate
		case k.peer == "":
			one.To = k.client
		}
		if rate >= 1 && f.way != transfer.ByRelay {
			one.ETA = int64(math.Ceil(float64(max(left, 0)) / rate))
		}
		if f.heldBy != "" && now-f.heldAt < heldFor {
			one.HeldBack = f.heldBy
		}
		out = append(out, one)
	}
	t.board.mu.Unlock() // the tables may be slow
	for i := range out {
		if out[i].Repository == "" && out[i].Blob != "" {
			if all := t.owners.of(out[i].Blob, now); len(all) > 0 {
				out[i].Repository = all[0].Project + "/" + all[0].Name
			}
		}
	}
	slices.SortFunc(out, func(a, b Transfer) int {
		return cmp.Or(cmp.Compare(b.Rate, a.Rate), cmp.Compare(a.Blob, b.Blob), cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To))
	})
	return out
}

// owned remembers for a while whose blobs are.
type owned struct {
	from Owners

	mu    sync.Mutex
	known map[digest.Digest]owner
}

type owner struct {
	all []Repository
	at  time.Duration
}

const (
	ownedFor = 10 * time.Second
	ownedMax = 1024
)

func (o *owned) of(d digest.Digest, now time.Duration) []Repository {
	o.mu.Lock()
	if k, ok := o.known[d]; ok && now-k.at < ownedFor {
		o.mu.Unlock()
		return k.all
	}
	o.mu.Unlock()
	all := o.from.Repositories(d)
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.known == nil || len(o.known) >= ownedMax {
		o.known = map[digest.Digest]owner{}
	}
	o.known[d] = owner{all, now}
	return all
}
