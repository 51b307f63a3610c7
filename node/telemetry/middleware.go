package telemetry

import (
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Middleware logs one line a request and counts it by route template, method
// and status.
type Middleware struct {
	log      *slog.Logger
	seconds  *prometheus.HistogramVec
	sent     *prometheus.CounterVec
	inFlight prometheus.Gauge
}

// NewMiddleware makes the middleware; its metrics go on the registerer.
func NewMiddleware(log *slog.Logger, registerer prometheus.Registerer) (*Middleware, error) {
	m := &Middleware{
		log: log,
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "atoll_http_request_duration_seconds", Help: "Time to answer HTTP requests, by route template.",
			Buckets: []float64{.001, .005, .025, .1, .5, 2.5, 10, 60},
		}, []string{"route", "method", "status"}),
		sent: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "atoll_http_sent_bytes_total", Help: "Bytes of HTTP answer bodies, by route template.",
		}, []string{"route"}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "atoll_http_requests_in_flight", Help: "HTTP requests being answered now.",
		}),
	}
	for _, c := range []prometheus.Collector{m.seconds, m.sent, m.inFlight} {
		if err := registerer.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// quiet routes are asked all the time by machines: their lines are debug unless
// they fail.
var quiet = [...]string{"/metrics", "/api/v2.0/ping", "/api/v2.0/health", "/api/version"}

// Wrap puts the middleware around a handler.
func (m *Middleware) Wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		r = Begin(w, r)
		rec := recordOf(r.Context())
		resp := &response{ResponseWriter: w}
		m.inFlight.Inc()
		cut := true // stays so when the handler panics, which cuts the connection
		defer func() {
			m.inFlight.Dec()
			m.finish(r, rec, resp, time.Since(start), cut)
		}()
		next.ServeHTTP(resp, r)
		cut = false
	})
}

func (m *Middleware) finish(r *http.Request, rec *record, resp *response, took time.Duration, cut bool) {
	status := resp.status
	switch {
	case cut && status < http.StatusBadRequest:
		status = http.StatusInternalServerError // what was begun was not finished
	case status == 0:
		status = http.StatusOK
	}
	route := rec.route
	if route == "" {
		route = "other"
	}
	method := r.Method
	switch method {
	case "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS":
	default:
		method = "other" // a client chooses it: keep the label bounded
	}
	m.seconds.WithLabelValues(route, method, strconv.Itoa(status)).Observe(took.Seconds())
	m.sent.WithLabelValues(route).Add(float64(resp.bytes))

	level := slog.LevelInfo
	if status < 400 && slices.Contains(quiet[:], route) {
		level = slog.LevelDebug
	}
	if !m.log.Enabled(r.Context(), level) {
		return
	}
	// The path without the query: queries may hold what is not for logs.
	m.log.LogAttrs(r.Context(), level, "request",
		slog.String("id", rec.id), slog.String("method", r.Method), slog.String("path", clip(r.URL.EscapedPath(), 512)),
		slog.String("route", route), slog.Int("status", status), slog.Int64("bytes", resp.bytes),
		slog.Duration("took", took), slog.String("from", r.RemoteAddr), slog.String("user", rec.user), slog.Bool("cut", cut))
}

func clip(s string, n int) string {
	if len(s) > n {
		return s[:n] + "..."
	}
	return s
}

// response notes status and size of an answer. It keeps io.ReaderFrom, so that
// a file handed to http.ServeContent still reaches the kernel's sendfile;
// http.Flusher; and Unwrap, for http.ResponseController.
type response struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (w *response) WriteHeader(status int) {
	if w.status == 0 && status >= 200 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *response) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	n, err := w.ResponseWriter.Write(p)
	w.bytes += int64(n)
	return n, err
}

func (w *response) ReadFrom(src io.Reader) (int64, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	n, err := io.Copy(w.ResponseWriter, src)
	w.bytes += n
	return n, err
}

func (w *response) Flush() {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	// Flushing is a hint: a writer that cannot flush simply does not.
	_ = http.NewResponseController(w.ResponseWriter).Flush()
}

func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }
