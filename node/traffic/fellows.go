package traffic

import (
	"cmp"
	"context"
	"encoding/json"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
)

// messageName is by which nodes ask each other for their report.
const messageName = "traffic"

const (
	talkEvery   = time.Second
	talkTimeout = 2 * time.Second
	// recent is how long a node counts as wanting something of a cap after it asked.
	recent = 2 * time.Second
	// fresh is how long what another node said counts.
	fresh = 5 * time.Second
)

// question is what a node asks another one.
type question struct {
	// Transfers: those under way are wanted too.
	Transfers bool `json:"transfers"`
}

// report is what a node says of its traffic.
type report struct {
	Caps      map[string]need  `json:"caps"`
	Budgets   map[string]spent `json:"budgets"`
	Transfers []Transfer       `json:"transfers"`
	Use       *Use             `json:"use,omitempty"` // as far as transfers were asked for; nil too from an older version
}

// need is what a node takes of a cap.
type need struct {
	Rate float64 `json:"rate"` // bytes per second, lately
	// Held: it would take more.
	Held bool `json:"held"`
}

type spent struct {
	Period string `json:"period"`
	Bytes  int64  `json:"bytes"`
}

// fellow is what another node has said.
type fellow struct {
	report
	at time.Duration
}

// answer says what this node takes of the caps, and if wanted what is under way.
func (t *Traffic) answer(_ context.Context, raw json.RawMessage) (any, error) {
	var q question
	if err := json.Unmarshal(raw, &q); err != nil {
		return nil, err
	}
	r := t.report()
	if q.Transfers {
		use := t.use("")
		r.Transfers, r.Use = t.own(), &use
	}
	return r, nil
}

func (t *Traffic) report() report {
	now := t.now()
	t.mu.Lock()
	defer t.mu.Unlock()
	r := report{Caps: map[string]need{}, Budgets: map[string]spent{}}
	for c := range t.caps.all() {
		if c.shared && c.wanted(now) {
			r.Caps[c.name] = need{Rate: c.lately.rate, Held: c.lacking(now)}
		}
	}
	for key, l := range t.ledgers {
		r.Budgets[key] = spent{l.period, l.used[l.period]}
	}
	return r
}

// wanted says whether anybody has asked a bucket lately, lacking whether anybody had
// to wait.
func (b *bucket) wanted(now time.Duration) bool  { return b.asked && now-b.active < recent }
func (b *bucket) lacking(now time.Duration) bool { return b.refused > 0 && now-b.refused < recent }

// talk hears once a second what the other nodes take, while there is a cap or a
// budget that is for all of them.
func (t *Traffic) talk(ctx context.Context) {
	tick := time.NewTicker(talkEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		watched := t.events.watched()
		if t.common() || watched {
			t.hear(ctx, watched)
		}
	}
}

// common says whether something has to be agreed on with other nodes now.
func (t *Traffic) common() bool {
	now := t.now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.ledgers) > 0 {
		return true
	}
	for c := range t.caps.all() {
		if c.shared && c.wanted(now) {
			return true
		}
	}
	return false
}

func (t *Traffic) askAll(ctx context.Context, q question, each func(member.Member, json.RawMessage, error)) {
	if t.others != nil {
		t.others.AskAll(ctx, messageName, q, each)
	}
}

// reports asks the others and gives each report; seen gets what is under way there, and
// who is silent.
func (t *Traffic) reports(ctx context.Context, q question, seen *seen, each func(member.Member, report)) {
	t.askAll(ctx, q, func(m member.Member, raw json.RawMessage, err error) {
		var r report
		if err == nil {
			err = json.Unmarshal(raw, &r)
		}
		if err != nil {
			seen.silent(m, err)
			return
		}
		seen.add(r.Transfers)
		if r.Use != nil {
			r.Use.Node = cmp.Or(m.Name, m.ID)
			seen.uses = append(seen.uses, *r.Use)
		}
		each(m, r)
	})
}

// hear asks the others, and gives what is under way to those who watch.
func (t *Traffic) hear(ctx context.Context, watched bool) {
	ctx, cancel := context.WithTimeout(ctx, talkTimeout)
	defer cancel()
	seen := newSeen()
	t.reports(ctx, question{Transfers: watched}, seen, func(m member.Member, r report) {
		r.Transfers, r.Use = nil, nil
		t.mu.Lock()
		t.fellows[m.ID] = fellow{r, t.now()}
		t.mu.Unlock()
	})
	t.tally()
	if watched {
		t.addOwn(seen)
		t.events.publish(seen.view(t.Clock()))
	}
}

// tally counts what the others used of budgets.
func (t *Traffic) tally() {
	now := t.now()
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, l := range t.ledgers {
		if l.key == keyNode {
			continue // each node has its own
		}
		others := int64(0)
		for _, f := range t.fellows {
			if s := f.Budgets[l.key]; s.Period == l.period {
				others += s.Bytes
			}
		}
		l.others = max(l.others, others) // a node that was restarted or has left took it all the same
	}
	for id, f := range t.fellows {
		if now-f.at > time.Hour {
			delete(t.fellows, id)
		}
	}
}

// share is what this node may take of a cap of all nodes: all that those who get
// enough leave, in equal parts for those who do not; t.mu is held.
func (t *Traffic) share(c *capped, now time.Duration) float64 {
	whole := float64(c.most)
	nodes, hungry := 1, 1
	taken := 0.0
	for _, f := range t.fellows {
		n, wants := f.Caps[c.name]
		if !wants || now-f.at > fresh {
			continue
		}
		nodes++
		if n.Held {
			hungry++
		} else {
			taken += n.Rate
		}
	}
	equal := whole / float64(nodes)
	return max((whole-min(taken, whole-equal))/float64(hungry), equal)
}
