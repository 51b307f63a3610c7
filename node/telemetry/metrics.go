package telemetry

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// NewRegistry makes a node's registry of metrics, with those of the process and
// the Go runtime in it. Rooms name theirs atoll_<room>_<noun>_<unit>.
func NewRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return r
}

// MetricsHandler serves /metrics. Who may read it is the caller's to check.
func MetricsHandler(r *prometheus.Registry) http.Handler {
	h := promhttp.HandlerFor(r, promhttp.HandlerOpts{Registry: r, MaxRequestsInFlight: 4})
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		SetRoute(req.Context(), "/metrics")
		h.ServeHTTP(w, req)
	})
}
