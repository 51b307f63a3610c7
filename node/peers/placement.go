package peers

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/project"
	"github.com/atoll-registry/atoll/node/settings"
	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/stream"
)

// Labels of a node that say where it stands; others mean nothing to placement.
const (
	labelRack = "rack"
	labelZone = "zone"
)

// placement orders nodes by how much they should hold a blob (rendezvous
// hashing, Thaler and Ravishankar 1998): every node computes the same order from
// the same ids, and a node that comes or goes moves only its own share. ids is
// not changed.
func placement(d digest.Digest, ids []string) []string {
	type scored struct {
		id    string
		score uint64
	}
	all := make([]scored, len(ids))
	for i, id := range ids {
		sum := sha256.Sum256([]byte(id + "\x00" + d.String()))
		all[i] = scored{id, binary.BigEndian.Uint64(sum[:8])}
	}
	slices.SortFunc(all, func(a, b scored) int {
		return cmp.Or(cmp.Compare(b.score, a.score), cmp.Compare(a.id, b.id))
	})
	out := make([]string, len(all))
	for i, s := range all {
		out[i] = s.id
	}
	return out
}

// place is where a node stands, as far as its labels say. A rack is one of its
// zone: racks of the same name in two zones are two.
type place struct{ zone, rack string }

func placeOf(m member.Member) place { return place{m.Labels[labelZone], m.Labels[labelRack]} }

// distance of two nodes: 0 in the same rack, 1 in the same zone, else 2. Those that name
// no zone are in one: what is far is beyond a slow link, and only an operator knows that.
func (p place) distance(o place) int {
	switch {
	case p.rack != "" && p == o:
		return 0
	case p.zone == o.zone:
		return 1
	}
	return farthest
}

const farthest = stream.Farthest

// spread reorders nodes so that each one stands apart from those before it, and
// from the given ones, while there is another zone, then another rack, to choose
// from; else the order stays. Every beginning of the result uses as many zones as
// it can. Nodes without a place stand apart from all.
func spread(order []string, places map[string]place, before ...string) []string {
	if len(places) == 0 {
		return order
	}
	zones, racks := map[string]int{}, map[place]int{}
	take := func(id string) {
		p := places[id]
		if p.zone != "" {
			zones[p.zone]++
		}
		if p.rack != "" {
			racks[p]++
		}
	}
	for _, id := range before {
		take(id)
	}
	rest := slices.Clone(order)
	out := make([]string, 0, len(order))
	for len(rest) > 0 {
		best := 0
		for i := range rest {
			a, b := places[rest[i]], places[rest[best]]
			if cmp.Or(cmp.Compare(zones[a.zone], zones[b.zone]), cmp.Compare(racks[a], racks[b])) < 0 {
				best = i
			}
		}
		take(rest[best])
		out = append(out, rest[best])
		rest = slices.Delete(rest, best, best+1)
	}
	return out
}

// layout is what placement follows from: the nodes that may be homes and where
// all of them stand. The same member rows give the same layout on every node,
// but for those that have been down for long (awayAfter).
type layout struct {
	self    string
	homes   []string // that may be homes, sorted
	present []string // of them, those that are not away for long
	live    []string // all that are live, sorted
	whole   bool     // all nodes of the site are live
	places  map[string]place
	floor   int // of copies that a push waits for, so of those that are kept

	// What the site and its projects want: another want is another layout.
	replicas int
	projects map[string]int
}

// mayBeHome says that a node keeps blobs for the site.
func mayBeHome(m member.Member) bool { return !m.Cache && m.Draining == 0 }

func newLayout(self string, members, live []member.Member, away func(id string) bool, floor int) layout {
	l := layout{self: self, live: ids(live), whole: len(live) >= len(members), places: map[string]place{}, floor: floor}
	for _, m := range members {
		if p := placeOf(m); p != (place{}) {
			l.places[m.ID] = p
		}
		if !mayBeHome(m) {
			continue
		}
		l.homes = append(l.homes, m.ID)
		if !away(m.ID) {
			l.present = append(l.present, m.ID)
		}
	}
	slices.Sort(l.homes)
	slices.Sort(l.present)
	return l
}

func (l layout) equal(o layout) bool {
	return l.sameHomes(o) && l.whole == o.whole && slices.Equal(l.live, o.live)
}

// sameHomes says that every blob has the same homes in both.
func (l layout) sameHomes(o layout) bool {
	return l.self == o.self && l.floor == o.floor && l.replicas == o.replicas && maps.Equal(l.projects, o.projects) &&
		slices.Equal(l.homes, o.homes) && slices.Equal(l.present, o.present) && maps.Equal(l.places, o.places)
}

// lonely says that there is no other node to copy to or from.
func (l layout) lonely() bool { return len(l.homes) == 1 && l.homes[0] == l.self && len(l.live) == 1 }

// wanted is how many homes a blob of so many replicas has: never fewer than a
// push waits for, never more than there are.
func (l layout) wanted(replicas int) int { return min(max(replicas, l.floor), len(l.homes)) }

// homesOf are the nodes that should hold a blob of so many replicas, best first.
func (l layout) homesOf(d digest.Digest, replicas int) []string {
	order := spread(placement(d, l.present), l.places)
	return order[:min(l.wanted(replicas), len(order))]
}

// isLive says that a node could be reached just now.
func (l layout) isLive(id string) bool {
	_, found := slices.BinarySearch(l.live, id)
	return found
}

// lead is the node that sees to a blob's copies: the first of its homes that is
// live, or of all that are when none of them is; "" when no node is.
func (l layout) lead(d digest.Digest, homes []string) string {
	for _, id := range homes {
		if l.isLive(id) {
			return id
		}
	}
	able := slices.DeleteFunc(slices.Clone(l.live), func(id string) bool { return !slices.Contains(l.homes, id) })
	if len(able) == 0 {
		able = l.live
	}
	if len(able) == 0 {
		return "" // this node was removed a moment ago, and stops
	}
	return placement(d, able)[0]
}

func ids(members []member.Member) []string {
	out := make([]string, len(members))
	for i, m := range members {
		out[i] = m.ID
	}
	slices.Sort(out)
	return out
}

// awayAfter is how long a home is missed before the next nodes of the placement
// stand in for it. A node that restarts moves nothing.
const awayAfter = 10 * time.Minute

// Policy says how many copies there are to be. Its functions are safe for
// concurrent use and cheap.
type Policy struct {
	// Durability is on how many nodes a push must be before it is acknowledged, as
	// soon as that many are live.
	Durability func() int
	// Replicas is how many nodes hold a blob in the long run, as far as there are
	// so many; never fewer than Durability.
	Replicas func() int
	// Release is after how long a node lets go of what others are to keep; 0: never,
	// as when it is nil.
	Release func() time.Duration
	// Projects says what projects want instead; nil: nothing.
	Projects Projects
	// Engines is how blobs move between nodes; nil: as EngineAuto.
	Engines func() Engines
	// Transport is what connections for blobs take; nil: as peernet.Auto.
	Transport func() peernet.Transport
}

// Projects knows how many replicas the projects want of what they link.
type Projects interface {
	// Replicas is what one project wants; ok is false when it wants what the site
	// does, and when there is no such project.
	Replicas(r table.Reader, project string) (n int, ok bool, err error)
	// AllReplicas are those that want something, by name.
	AllReplicas(v *table.View) (map[string]int, error)
}

// DefineSettings adds the settings of the policy.
func DefineSettings(s *settings.Settings) Policy {
	durability := settings.Define(s, settings.Spec[int]{
		Name: "peers.durability", Default: "2", Kind: settings.Count(1, 99),
		Summary: "on how many nodes a push must be before it is acknowledged, as soon as that many are up; with fewer, Atoll-Copies in the answer says so",
	})
	replicas := settings.Define(s, settings.Spec[int]{
		Name: "peers.replicas", Default: "3", Kind: settings.Kind[int]{Parse: project.ParseReplicas},
		Summary: "how many nodes keep each blob in the long run: a number, or all; a project may say otherwise, and peers.durability is the least",
	})
	release := settings.Define(s, settings.Spec[int]{
		Name: "peers.release-minutes", Default: "60", Kind: settings.Count(0, 365*24*60),
		Summary: "minutes after which a node lets go of a blob that other nodes are to keep, once all of those hold it; 0: it keeps it",
	})
	engines := settings.Define(s, settings.Spec[Engines]{
		Name: "peers.transfer-engine", Default: string(EngineAuto), Kind: settings.Kind[Engines]{Parse: parseEngines},
		Summary: "how blobs move between nodes: stream, bittorrent, or auto, which leaves the choice to Atoll; for some of them otherwise: project=NAME: ENGINE | class=NAME: ENGINE | ENGINE, where the first that holds counts, classes are pull, replication, repair and prefetch, and a comma joins two conditions",
	})
	transport := settings.Define(s, settings.Spec[peernet.Transport]{
		Name: "peers.transport", Default: string(peernet.Auto), Kind: settings.Kind[peernet.Transport]{Parse: parseTransport},
		Summary: "what new connections for blobs between nodes take: tcp, quic (UDP, the same port number), or auto, whichever gets through; a node that was started with --peer-transport keeps to that, and the cluster's own talk is always auto otherwise",
	})
	return Policy{Durability: durability.Value, Replicas: replicas.Value, Engines: engines.Value, Transport: transport.Value, Release: func() time.Duration { return time.Duration(release.Value()) * time.Minute }}
}

// placesAsked bounds the places of a blob that are looked at for the replicas that
// their projects want.
const placesAsked = 1000

// replicas is how many nodes are to hold a blob in the long run: the most that a
// project which links it wants.
func (p *Peers) replicas(v *table.View, d digest.Digest) (int, error) {
	site := p.Policy.Replicas()
	if p.projects.load() == nil {
		return site, nil // no project wants anything of its own
	}
	places, err := p.Records.Places(v, d, placesAsked)
	if err != nil {
		return 0, err
	}
	most, asked := 0, ""
	for _, place := range places {
		if place.Project == asked {
			continue // its repositories come one after the other
		}
		asked = place.Project
		n, ok, err := p.Policy.Projects.Replicas(v, asked)
		if err != nil {
			return 0, err
		}
		if !ok {
			n = site
		}
		most = max(most, n)
	}
	if most == 0 {
		return site, nil // not linked yet
	}
	return most, nil
}

// projectWants is which projects want replicas of their own, nil for none.
type projectWants struct {
	current atomic.Pointer[map[string]int]
}

func (w *projectWants) load() map[string]int {
	if m := w.current.Load(); m != nil && len(*m) > 0 {
		return *m
	}
	return nil
}

// refreshProjects reads what projects want.
func (p *Peers) refreshProjects(ctx context.Context) {
	if p.Policy.Projects == nil {
		return
	}
	err := p.DB.View(func(v *table.View) error {
		wants, err := p.Policy.Projects.AllReplicas(v)
		if err == nil {
			p.projects.current.Store(&wants)
		}
		return err
	})
	if err != nil && ctx.Err() == nil {
		p.Log.Warn("how many replicas projects want could not be read; what was known stays", "err", err)
	}
}

// watchProjects keeps up with what projects want until ctx ends.
func (p *Peers) watchProjects(ctx context.Context) error {
	for range p.DB.Watch(ctx, project.Table) {
		p.refreshProjects(ctx)
	}
	return nil
}

// layout is the site as it stands.
func (p *Peers) layout(v *table.View) (layout, error) {
	members, err := p.Roster.Members(v)
	if err != nil {
		return layout{}, err
	}
	live := p.Roster.Live()
	l := newLayout(p.Roster.Self(), members, live, p.away, p.Policy.Durability())
	l.replicas, l.projects = p.Policy.Replicas(), p.projects.load()
	return l, nil
}

// away says that a member has been down for awayAfter.
func (p *Peers) away(id string) bool {
	since, down := p.Roster.DownSince(id)
	return down && time.Since(since) >= awayAfter
}
