package gossip

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/prometheus/client_golang/prometheus"
)

// delegate is what memberlist asks and tells, with its lock held.
type delegate struct{ g *Gossip }

var (
	_ memberlist.Delegate      = delegate{}
	_ memberlist.EventDelegate = delegate{}
	_ memberlist.AliveDelegate = delegate{}
)

// NodeMeta implements memberlist.Delegate, and so do the four below.
func (d delegate) NodeMeta(int) []byte             { return d.g.hint() }
func (d delegate) NotifyMsg([]byte)                {}
func (d delegate) GetBroadcasts(int, int) [][]byte { return nil }
func (d delegate) LocalState(bool) []byte          { return nil }
func (d delegate) MergeRemoteState([]byte, bool)   {}

// NotifyAlive refuses who is no member, and what would make exchanges fail later.
func (d delegate) NotifyAlive(n *memberlist.Node) error {
	if _, ok := d.g.peer(n.Name); !ok && n.Name != d.g.cfg.Self {
		return errStranger
	}
	if !n.Addr.Equal(nowhere) || n.Port != nowherePort || len(n.Meta) > maxMeta ||
		n.PMin > memberlist.ProtocolVersionMax || n.PMax < memberlist.ProtocolVersionMax || n.DMin != 0 {
		return fmt.Errorf("no alive message of ours: %s:%d, protocol %d to %d", n.Addr, n.Port, n.PMin, n.PMax)
	}
	return nil
}

// NotifyJoin implements memberlist.EventDelegate, and so do the two below.
func (d delegate) NotifyJoin(n *memberlist.Node)   { d.g.note(n.Name, true, n.Meta) }
func (d delegate) NotifyUpdate(n *memberlist.Node) { d.g.note(n.Name, true, n.Meta) }
func (d delegate) NotifyLeave(n *memberlist.Node)  { d.g.note(n.Name, false, nil) }

// note takes what memberlist believes now.
func (g *Gossip) note(id string, up bool, meta []byte) {
	g.mu.Lock()
	p, ok := g.peers[id]
	if ok {
		if p.up != up {
			p.up, p.since, p.asked = up, time.Now(), time.Time{}
		}
		p.meta = bytes.Clone(meta)
	}
	g.mu.Unlock()
	if ok {
		poke(g.changed)
	}
}

// hint is this node's.
func (g *Gossip) hint() []byte {
	if h := g.cfg.Hint(); len(h) <= MaxHint {
		return h
	}
	return nil
}

// Hint is what a member says of itself; nil when nothing is known.
func (g *Gossip) Hint(id string) []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p, ok := g.peers[id]; ok {
		return p.meta
	}
	return nil
}

// peer finds a member other than this node.
func (g *Gossip) peer(id string) (*peer, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	p, ok := g.peers[id]
	return p, ok
}

// heard notes a sign of life that this node got itself.
func (g *Gossip) heard(id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p, ok := g.peers[id]; ok {
		p.asked = time.Time{}
	}
}

// silent says that a peer owes this node an answer for longer than d.
func (g *Gossip) silent(p *peer, d time.Duration) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !p.asked.IsZero() && time.Since(p.asked) > d
}

// maxProbes that may be unanswered at once. This node has one of its own under way
// and those that others asked it to make.
const maxProbes = 128

// asking finds the peer that a packet goes to and notes which questions are in it.
func (g *Gossip) asking(packet []byte, to string, now time.Time) (*peer, error) {
	var seqs []uint32
	pings := false
	if err := readPacket(packet, func(m message, _ []byte) {
		if m.kind == kindPing || m.kind == kindIndirect {
			seqs = append(seqs, m.SeqNo)
			pings = pings || m.kind == kindPing
		}
	}); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	p, ok := g.peers[to]
	switch {
	case g.stopping:
		return nil, errStopping
	case !ok:
		return nil, fmt.Errorf("node %s: %w", to, errStranger)
	}
	if pings && p.asked.IsZero() {
		p.asked = now
	}
	for _, seq := range seqs {
		if len(g.probes) >= maxProbes {
			g.expire(now)
		}
		q := g.probes[seq]
		g.probes[seq] = probe{now, append(q.peers, to)}
	}
	return p, nil
}

// expire forgets questions that nobody waits for any more, and if there are too many
// all of them. It is called under mu.
func (g *Gossip) expire(now time.Time) {
	for seq, q := range g.probes {
		if now.Sub(q.at) > 8*g.cfg.Interval {
			delete(g.probes, seq)
		}
	}
	if len(g.probes) >= maxProbes {
		clear(g.probes)
	}
}

// outstanding are the questions that may still be waited for.
func (g *Gossip) outstanding() (seqs []uint32) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for seq := range g.probes {
		seqs = append(seqs, seq)
	}
	return seqs
}

// may says whether a peer may send a message.
func (g *Gossip) may(id string, m message) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	_, known := g.peers[m.Node]
	known = known || m.Node == g.cfg.Self
	switch m.kind {
	case kindPing:
		return m.SourceNode == id && m.Node == g.cfg.Self
	case kindIndirect:
		return m.SourceNode == id && known
	case kindAck, kindNack:
		return slices.Contains(g.probes[m.SeqNo].peers, id)
	}
	return known
}

// admit counts an accepted connection, or says that its peer has too many or is no
// member.
func (g *Gossip) admit(c net.Conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	p, ok := g.peers[peerOf(c)]
	if g.stopping || !ok || p.in >= connections {
		return false
	}
	p.in++
	g.open[c] = struct{}{}
	return true
}

func (g *Gossip) dismiss(c net.Conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.open, c)
	if p, ok := g.peers[peerOf(c)]; ok && p.in > 0 {
		p.in--
	}
}

func peerOf(c net.Conn) string {
	if proven, ok := c.(interface{ PeerID() string }); ok {
		return proven.PeerID()
	}
	return ""
}

// sink puts memberlist's log among this node's, as debug: what matters of it is said
// once by package member, in its own words, and a hostile peer cannot fill a log.
type sink struct{ log *slog.Logger }

func (s sink) Write(line []byte) (int, error) {
	text := strings.TrimSpace(string(line))
	if _, rest, ok := strings.Cut(text, "] "); ok {
		text = rest
	}
	s.log.Debug(strings.TrimPrefix(text, "memberlist: "))
	return len(line), nil
}

type metrics struct {
	sent, received prometheus.Counter
	dropped        *prometheus.CounterVec
}

func newMetrics(registry prometheus.Registerer, g *Gossip) (metrics, error) {
	m := metrics{
		sent:     prometheus.NewCounter(prometheus.CounterOpts{Name: "atoll_gossip_sent_bytes_total", Help: "Bytes of gossip packets to other members, without TLS."}),
		received: prometheus.NewCounter(prometheus.CounterOpts{Name: "atoll_gossip_received_bytes_total", Help: "Bytes of gossip packets of other members, without TLS."}),
		dropped:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "atoll_gossip_dropped_total", Help: "Packets, messages and connections of gossip that were dropped, by reason."}, []string{"reason"}),
	}
	if registry == nil {
		return m, nil
	}
	members := func(s State) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "atoll_gossip_members_count", Help: "Other members by how they are as far as this node knows.",
			ConstLabels: prometheus.Labels{"state": s.String()},
		}, func() float64 { return float64(g.count(s)) })
	}
	for _, c := range []prometheus.Collector{m.sent, m.received, m.dropped, members(Up), members(Suspect), members(Down)} {
		if err := registry.Register(c); err != nil {
			return m, fmt.Errorf("gossip: %w", err)
		}
	}
	return m, nil
}

func (g *Gossip) count(s State) int {
	g.mu.Lock()
	var ids []string
	for id := range g.peers {
		ids = append(ids, id)
	}
	g.mu.Unlock()
	n := 0
	for _, id := range ids {
		if g.State(id) == s {
			n++
		}
	}
	return n
}
