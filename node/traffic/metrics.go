package traffic

import (
	"fmt"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/transfer"
)

// peersMax bounds the nodes that metrics tell apart.
const peersMax = 64

type metrics struct {
	bytes *prometheus.CounterVec
	held  *prometheus.CounterVec

	mu    sync.Mutex
	peers map[string]bool
}

func (t *Traffic) register() error {
	t.metrics.peers = map[string]bool{}
	t.metrics.bytes = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "atoll_traffic_bytes_total", Help: "Bytes of blobs by direction (in, out), class and peer (a node's id; clients; other, beyond the first 64 nodes).",
	}, []string{"direction", "class", "peer"})
	t.metrics.held = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "atoll_traffic_held_back_seconds_total", Help: "Time that transfers were told to wait, by class and kind of cap (node, node-in, site, link, project, user, budget).",
	}, []string{"class", "cap"})
	for _, c := range []prometheus.Collector{t.metrics.bytes, t.metrics.held} {
		if err := t.Registerer.Register(c); err != nil {
			return fmt.Errorf("traffic: %w", err)
		}
	}
	return nil
}

func (m *metrics) count(in bool, c transfer.Class, peer string, n int) {
	direction := "out"
	if in {
		direction = "in"
	}
	m.bytes.WithLabelValues(direction, label(c), m.label(peer)).Add(float64(n))
}

func (m *metrics) hold(kind string, c transfer.Class, wait time.Duration) {
	if wait > 0 {
		m.held.WithLabelValues(label(c), kind).Add(wait.Seconds())
	}
}

// label keeps a class of a newer version from making labels of its own.
func label(c transfer.Class) string { return min(c, transfer.Prefetch).String() }

func (m *metrics) label(peer string) string {
	if peer == "" {
		return "clients"
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.peers[peer] {
		if len(m.peers) >= peersMax {
			return "other"
		}
		m.peers[peer] = true
	}
	return peer
}
