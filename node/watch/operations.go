package watch

import (
	"context"
	"fmt"
	"net/http"
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest"
)

// The names of Harbor's components, and what of a node stands for each.
const (
	partDatabase = "database"   // the metadata
	partSite     = "redis"      // what the nodes share: the agreement among them
	partRegistry = "registry"   // the blobs
	partJobs     = "jobservice" // the work in the background, which needs the disk
	partPortal   = "portal"     // the public address
)

// Report is what a node finds wrong.
type Report struct {
	// Fit is false while the node refuses writes.
	Fit        bool        `json:"fit"`
	Conditions []Condition `json:"conditions"`
}

// Operations adds the room's operations to the API.
func (w *Watch) Operations(k *rest.Kernel) {
	rest.Register(k, rest.Operation[struct{}, Report]{
		ID: "listConditions", Method: http.MethodGet, Path: "/api/atoll/v1/conditions", Tag: "cluster",
		Summary: "What is wrong with this node or its site, since when, and what to do", Permission: access.NodeRead,
		Do: func(context.Context, *struct{}) (Report, error) {
			return Report{Fit: w.Refusal() == nil, Conditions: w.Conditions()}, nil
		},
	})
}

// Check gives what the health says of a part: the worst condition that bears on
// it, or what the part's own check says. Anybody may ask for the health, so it
// has the text and no remedy.
func (w *Watch) Check(part string, own func(context.Context) error) rest.Check {
	return rest.Check{Name: part, Run: func(ctx context.Context) error {
		for _, c := range w.Conditions() {
			if c.Severity == Critical && slices.Contains(c.parts, part) {
				return fault.New(fault.Unavailable, "%s", c.Text)
			}
		}
		if own == nil {
			return nil
		}
		return own(ctx)
	}}
}

// Checks are the parts of Harbor's health that nobody else answers for.
func (w *Watch) Checks() []rest.Check {
	return []rest.Check{w.Check(partSite, nil), w.Check(partJobs, nil), w.Check(partPortal, nil)}
}

// Protect refuses requests that write while this node cannot, instead of letting
// them wait for its disk. Reads go on.
func (w *Watch) Protect(next http.Handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, q *http.Request) {
		switch q.Method {
		case http.MethodGet, http.MethodHead, http.MethodOptions:
		default:
			if err := w.Refusal(); err != nil {
				rw.Header().Set("Retry-After", "10")
				rest.WriteError(rw, err)
				return
			}
		}
		next.ServeHTTP(rw, q)
	})
}

// register adds the room's metrics.
func (c Config) register(w *Watch) error {
	conditions := conditionsCollector{w, prometheus.NewDesc("atoll_watch_condition_bool",
		"1 for each condition that holds, by code, subject and severity.", []string{"code", "subject", "severity"}, nil)}
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
	}
	for _, m := range []prometheus.Collector{
		conditions,
		gauge("atoll_watch_fit_bool", "0 while this node refuses writes.", func() float64 {
			if w.Refusal() != nil {
				return 0
			}
			return 1
		}),
		gauge("atoll_watch_probe_seconds", "How long the last small write to the disk took, or the present one has taken so far.", func() float64 { return w.disk.last().Seconds() }),
		gauge("atoll_watch_free_bytes", "Free space of the disk with the data directory.", func() float64 { return float64(w.disk.saw().free) }),
		gauge("atoll_watch_disk_bytes", "Size of that disk.", func() float64 { return float64(w.disk.saw().total) }),
		gauge("atoll_watch_ballast_bytes", "Space set aside for the metadata when the disk is full; 0 when it was given up.", func() float64 { return float64(c.Ballast.Held()) }),
	} {
		if err := c.Registerer.Register(m); err != nil {
			return fmt.Errorf("watch: %w", err)
		}
	}
	return nil
}

type conditionsCollector struct {
	w    *Watch
	desc *prometheus.Desc
}

// Describe implements prometheus.Collector.
func (c conditionsCollector) Describe(ch chan<- *prometheus.Desc) { ch <- c.desc }

// Collect implements prometheus.Collector.
func (c conditionsCollector) Collect(ch chan<- prometheus.Metric) {
	for _, o := range c.w.Conditions() {
		ch <- prometheus.MustNewConstMetric(c.desc, prometheus.GaugeValue, 1, o.Code, o.Subject, o.Severity.String())
	}
}
