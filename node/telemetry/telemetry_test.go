package telemetry_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/node/telemetry"
)

func TestSecretsNeverReachTheLog(t *testing.T) {
	const secret = "hunter2hunter2"
	const jwt = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJhZG1pbiJ9.c2lnbmF0dXJl"
	type held struct {
		Name string
		Pass telemetry.Secret
	}
	for _, format := range []telemetry.Format{telemetry.FormatJSON, telemetry.FormatText} {
		for name, attr := range map[string]slog.Attr{
			"by key":            slog.String("password", secret),
			"by end of key":     slog.String("admin_Password", secret),
			"in a group":        slog.Group("user", slog.String("token", secret)),
			"any value by key":  slog.Any("credentials", []string{secret}),
			"secret type":       slog.Any("x", telemetry.Secret(secret)),
			"secret in struct":  slog.Any("x", held{"n", secret}),
			"pointer to struct": slog.Any("x", &held{"n", secret}),
			"basic":             slog.String("x", "sent Basic "+secret),
			"bearer in error":   slog.Any("x", fmt.Errorf("answer to %w", errors.New("Bearer "+secret))),
			"jwt":               slog.String("x", "token is "+jwt),
			"join token":        slog.String("x", "ATOLL1-node-"+secret),
			"url":               slog.String("x", "https://user:"+secret+"@host/path"),
			"header":            slog.Any("x", http.Header{"Authorization": {"Basic " + secret}}),
		} {
			var out bytes.Buffer
			log, err := telemetry.NewLogger(&out, telemetry.LogOptions{Format: format})
			if err != nil {
				t.Fatal(err)
			}
			log.LogAttrs(t.Context(), slog.LevelInfo, "message", attr)
			if s := out.String(); strings.Contains(s, secret) || strings.Contains(s, jwt) || !strings.Contains(s, telemetry.Redacted) {
				t.Errorf("%s, %s: %s", name, format, s)
			}
		}
		var out bytes.Buffer
		log, _ := telemetry.NewLogger(&out, telemetry.LogOptions{Format: format})
		log.Info("sent Bearer "+secret, "digest", "sha256:0123", "tokens", 3, "url", "http://host:5000/v2/", "password", "")
		s := out.String()
		if strings.Contains(s, secret) {
			t.Errorf("message: %s", s)
		}
		for _, kept := range []string{"sha256:0123", "3", "http://host:5000/v2/"} {
			if !strings.Contains(s, kept) {
				t.Errorf("%q was taken for a secret: %s", kept, s)
			}
		}
	}
	for _, verb := range []string{"%s", "%v", "%+v", "%#v", "%q", "%x"} {
		if got := fmt.Sprintf(verb, held{"n", secret}); strings.Contains(got, secret) || strings.Contains(got, "68756e746572") {
			t.Errorf("%s prints %s", verb, got)
		}
	}
	if b, _ := json.Marshal(held{"n", secret}); strings.Contains(string(b), secret) {
		t.Errorf("JSON: %s", b)
	}
}

func TestLogger(t *testing.T) {
	var out bytes.Buffer
	log, err := telemetry.NewLogger(&out, telemetry.LogOptions{Level: slog.LevelWarn})
	if err != nil {
		t.Fatal(err)
	}
	log.Info("no")
	log.Warn("yes", "took", 1500*time.Millisecond)
	var line map[string]any
	if err := json.Unmarshal(out.Bytes(), &line); err != nil || line["msg"] != "yes" || line["took"] != "1.5s" {
		t.Errorf("not a terminal, so JSON was wanted: %q, %v", out.String(), err)
	}
	if _, err := telemetry.NewLogger(&out, telemetry.LogOptions{Format: "xml"}); err == nil {
		t.Error("format xml was accepted")
	}
	if l, err := telemetry.ParseLevel("debug"); err != nil || l != slog.LevelDebug {
		t.Errorf("level debug: %v, %v", l, err)
	}
	if _, err := telemetry.ParseLevel("loud"); err == nil {
		t.Error("level loud was accepted")
	}
}

func wrap(t *testing.T, log io.Writer, h http.HandlerFunc) (http.Handler, *prometheus.Registry) {
	t.Helper()
	logger, err := telemetry.NewLogger(log, telemetry.LogOptions{Format: telemetry.FormatJSON})
	if err != nil {
		t.Fatal(err)
	}
	registry := prometheus.NewRegistry()
	m, err := telemetry.NewMiddleware(logger, registry)
	if err != nil {
		t.Fatal(err)
	}
	return m.Wrap(h), registry
}

func TestMiddleware(t *testing.T) {
	var out bytes.Buffer
	h, registry := wrap(t, &out, func(w http.ResponseWriter, r *http.Request) {
		telemetry.SetRoute(r.Context(), "/v2/{name}/manifests/{reference}")
		telemetry.SetUser(r.Context(), "admin")
		if telemetry.RequestID(r.Context()) != w.Header().Get("X-Request-Id") {
			t.Error("context and answer disagree on the request's id")
		}
		w.WriteHeader(http.StatusTeapot)
		io.WriteString(w, "abc")
	})
	r := httptest.NewRequest("PURGE", "/v2/a/manifests/b?token=secretvalue", nil)
	r.Header.Set("X-Request-Id", "bad\nid")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	var line map[string]any
	if err := json.Unmarshal(out.Bytes(), &line); err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	for key, want := range map[string]any{
		"msg": "request", "method": "PURGE", "path": "/v2/a/manifests/b", "route": "/v2/{name}/manifests/{reference}",
		"status": 418.0, "bytes": 3.0, "user": "admin", "id": w.Header().Get("X-Request-Id"),
	} {
		if line[key] != want {
			t.Errorf("%s is %v, want %v", key, line[key], want)
		}
	}
	if strings.Contains(out.String(), "secretvalue") {
		t.Error("the query was logged")
	}
	if id := w.Header().Get("X-Request-Id"); len(id) != 24 {
		t.Errorf("request id %q", id)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	series := map[string]int{}
	for _, f := range families {
		series[f.GetName()] = len(f.GetMetric())
		if f.GetName() == "atoll_http_sent_bytes_total" && f.GetMetric()[0].GetCounter().GetValue() != 3 {
			t.Errorf("sent bytes: %v", f)
		}
	}
	if series["atoll_http_request_duration_seconds"] != 1 || series["atoll_http_sent_bytes_total"] != 1 {
		t.Errorf("series: %v", series)
	}
}

// Panics pass through, and the line tells that the answer was cut short.
func TestMiddlewareSeesPanics(t *testing.T) {
	var out bytes.Buffer
	h, _ := wrap(t, &out, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	defer func() {
		if recover() != http.ErrAbortHandler {
			t.Error("the panic was lost")
		}
		if !strings.Contains(out.String(), `"status":500`) || !strings.Contains(out.String(), `"cut":true`) {
			t.Errorf("the line does not tell: %s", out.String())
		}
	}()
	h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
}

// plainWriter records which way an answer's bytes took.
type plainWriter struct {
	*httptest.ResponseRecorder
	source  io.Reader
	flushed bool
}

func (w *plainWriter) ReadFrom(src io.Reader) (int64, error) {
	w.source = src
	return io.Copy(w.Body, src)
}

func (w *plainWriter) FlushError() error { w.flushed = true; return nil }

// A file handed to ServeContent must arrive at the connection's ReadFrom as a
// file, for only then does the kernel copy it.
func TestMiddlewareKeepsSendfile(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	io.WriteString(f, "content")
	var out bytes.Buffer
	h, _ := wrap(t, &out, func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, f)
		w.(http.Flusher).Flush()
		if err := http.NewResponseController(w).SetWriteDeadline(time.Time{}); !errors.Is(err, http.ErrNotSupported) {
			t.Errorf("the controller does not reach through: %v", err)
		}
	})
	w := &plainWriter{ResponseRecorder: httptest.NewRecorder()}
	h.ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	limited, ok := w.source.(*io.LimitedReader)
	if !ok {
		t.Fatalf("ReadFrom got %T", w.source)
	}
	if _, ok := limited.R.(*os.File); !ok {
		t.Errorf("the limited reader is over a %T", limited.R)
	}
	if w.Body.String() != "content" || !w.flushed || !strings.Contains(out.String(), `"bytes":7`) {
		t.Errorf("body %q, flushed %v, log %s", w.Body, w.flushed, out.String())
	}
}

func TestMetricsHandler(t *testing.T) {
	w := httptest.NewRecorder()
	telemetry.MetricsHandler(telemetry.NewRegistry()).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != 200 || !strings.Contains(w.Body.String(), "go_goroutines") {
		t.Errorf("%d: %s", w.Code, w.Body)
	}
}
