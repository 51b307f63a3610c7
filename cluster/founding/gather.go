package founding

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
)

// gather proposes a site once enough machines are there that have promised nothing
// to anybody, and this one is the first of them that the others can dial.
func (m *machine) gather(ctx context.Context, seen map[string]standing) (id member.Identity, done bool, err error) {
	for _, s := range seen {
		if s.Offer != nil && s.Offer.Founder.ID == s.Machine.ID && !slices.Contains(s.Sees, m.id) && m.pledgeTo(*s.Offer) == nil {
			m.bring(ctx, s)
			return id, false, nil
		}
	}
	free, engaged, names := m.present(seen)
	if len(free) < m.Expect && len(engaged) > 0 {
		m.waits("machines that are there take part in another founding", "expected", m.Expect, "engaged", engaged)
		return id, false, nil
	} else if len(free) < m.Expect {
		m.waits("not all machines are there", "expected", m.Expect, "seen_besides_this_one", names)
		return id, false, nil
	}
	founder, machines := m.first(free)
	switch {
	case len(machines) == 0:
		m.waits("none of the machines can be dialled by enough of the others: open the peer port of one of them to all", "machines", names)
		return id, false, nil
	case founder.ID != free[0].Machine.ID && !m.stands(founder, free):
		m.waits("whether the others can dial the first of them shows in some seconds", "first", free[0].Machine.Name, "address", free[0].Machine.Addr)
		return id, false, nil
	case founder.ID != m.id:
		m.waits("another machine founds it", "founder", founder.Name, "address", founder.Addr)
		return id, false, nil
	}
	p := Proposal{ID: table.NewID(), Founder: founder, Machines: machines}
	if err := p.check(m.id, m.Expect); err != nil {
		m.waits("two machines are called the same: give each its own --name", "machines", machines)
		return id, false, nil
	}
	return m.propose(ctx, p)
}

// stands says whether it has been known for a round of everybody that this one is to
// found it and not the first of all: who has just started is not seen by all yet.
func (m *machine) stands(founder Machine, free []hello) bool {
	key := founder.ID
	for _, f := range free {
		key += " " + f.Machine.ID
	}
	now := time.Now()
	if key != m.view || now.Sub(m.viewed) > 2*talkTime {
		m.view, m.stood = key, now
	}
	m.viewed = now
	return now.Sub(m.stood) >= talkTime+2*m.Pause
}

// present are the machines that are there, by id: those that have promised nothing, and
// what they say of whom they can dial, the names of the others, and all names but this one's.
func (m *machine) present(seen map[string]standing) (free []hello, engaged, names []string) {
	m.mu.Lock()
	free = []hello{{Machine: m.self(), Sees: m.sees}}
	all := make([]hello, 0, len(seen)+len(m.heard))
	for id, h := range m.heard {
		if _, answers := seen[id]; !answers && time.Since(h.at) < heardFor {
			all = append(all, h.hello)
		}
	}
	m.mu.Unlock()
	for _, s := range seen {
		all = append(all, hello{Machine: s.Machine, Expect: s.Expect, Sees: s.Sees, Engaged: s.Pledge != nil || s.Proposal != "" || s.Joins != ""})
	}
	for _, h := range all {
		names = append(names, h.Machine.String())
		switch {
		case h.Expect != m.Expect:
		case h.Engaged:
			engaged = append(engaged, h.Machine.String())
		default:
			free = append(free, h)
		}
	}
	slices.Sort(names)
	slices.Sort(engaged)
	slices.SortFunc(free, func(a, b hello) int { return strings.Compare(a.Machine.ID, b.Machine.ID) })
	return free, engaged, names
}

// first is the first machine that enough others can dial, as they must to join its
// site, and the machines that found it.
func (m *machine) first(free []hello) (founder Machine, machines []Machine) {
	for _, f := range free {
		machines = []Machine{f.Machine}
		for _, other := range free {
			if other.Machine.ID != f.Machine.ID && len(machines) < m.Expect && (other.Sees == nil || slices.Contains(other.Sees, f.Machine.ID)) {
				machines = append(machines, other.Machine)
			}
		}
		if len(machines) == m.Expect {
			return f.Machine, machines
		}
	}
	return founder, nil
}

// propose founds the site if all machines promise to take part in it.
func (m *machine) propose(ctx context.Context, p Proposal) (id member.Identity, done bool, err error) {
	m.mu.Lock()
	if m.promise.Pledge != nil || m.promise.Site != "" {
		m.mu.Unlock()
		return id, false, nil
	}
	m.proposal = &p
	m.awaited = make(map[string]chan struct{})
	for _, other := range p.Machines {
		if other.ID != m.id && !slices.Contains(m.sees, other.ID) {
			m.awaited[other.ID] = make(chan struct{})
		}
	}
	awaited := maps.Clone(m.awaited)
	m.mu.Unlock()
	waiting, stop := context.WithCancel(ctx)
	defer stop()
	fails := make([]error, len(p.Machines))
	var asked sync.WaitGroup
	for i, other := range p.Machines {
		if other.ID == p.Founder.ID {
			continue
		}
		asked.Go(func() {
			if came := awaited[other.ID]; came != nil {
				fails[i] = await(waiting, came, other)
				return
			}
			var none struct{}
			if fails[i] = m.post(ctx, other.Addr, pathPledge, pledgeRequest{Proposal: p, Expect: m.Expect}, &none); fails[i] != nil {
				stop()
			}
		})
	}
	asked.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := errors.Join(append(fails, ctx.Err())...); err != nil {
		m.proposal = nil // from here on it is dead, whoever promised what
		m.waits("a machine has not promised to take part", "error", err)
		return id, false, nil
	}
	if err := m.save("agreed", func(kept *promise) { kept.Origin = p.ID }); err != nil {
		return id, false, err
	}
	// Until this returns the others hear nothing. When it fails the machine ends: the
	// next start sees whether there is an identity.
	if id, err = member.Found(m.Dir, m.Name, m.Advertise, m.Keys); err != nil {
		return id, false, err
	}
	if err := m.step("founded"); err != nil {
		return id, false, err
	}
	m.site = id.SiteID
	m.Log.Info("founded the site; the other machines join it", "site", id.SiteID)
	return id, true, nil
}

// await waits for the promise of a machine that cannot be dialled.
func await(ctx context.Context, came <-chan struct{}, other Machine) error {
	late := time.NewTimer(promiseTime)
	defer late.Stop()
	select {
	case <-came:
		return nil
	case <-late.C:
		return fmt.Errorf("%s, which cannot be dialled, has not brought its promise", other)
	case <-ctx.Done():
		return ctx.Err()
	}
}
