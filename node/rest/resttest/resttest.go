// Package resttest lets rooms test their operations through the kernel, as
// clients see them, and holds the answers to the shapes of a real Harbor's.
package resttest

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest"
)

// Server is a kernel for tests. Register operations on Kernel, then call Do.
type Server struct {
	Kernel *rest.Kernel
	// As is who asks; a test changes it between requests. It starts as an admin.
	As access.Principal
	// Projects are what the guard knows, by reference as it is given: name or
	// id. An operation in any other project is decided as in a private one.
	Projects map[string]access.Project
	// Asked is what the guard was asked last.
	Asked Asked

	mu      sync.Mutex // over Asked: requests may run side by side
	handler http.Handler
	t       testing.TB
}

// Asked is one question to the guard.
type Asked struct {
	Want    access.Permission
	Project string
}

// New gives a server without operations.
func New(t testing.TB) *Server {
	t.Helper()
	s := &Server{t: t, As: access.Principal{Kind: access.User, Name: "admin", Admin: true}, Projects: map[string]access.Project{}}
	k, err := rest.New(rest.Config{
		Log: slog.New(slog.NewTextHandler(logWriter{t}, nil)), Registerer: prometheus.NewRegistry(), Authenticator: s, Guard: s,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Kernel, s.handler = k, k.Handler()
	return s
}

type logWriter struct{ t testing.TB }

func (w logWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", strings.TrimSpace(string(p)))
	return len(p), nil
}

// Authenticate is rest.Authenticator.
func (s *Server) Authenticate(*http.Request) (access.Principal, error) { return s.As, nil }

// Allow is rest.Guard.
func (s *Server) Allow(_ context.Context, p access.Principal, want access.Permission, project string) error {
	s.mu.Lock()
	s.Asked = Asked{want, project}
	s.mu.Unlock()
	allowed := access.InSystem(p, want)
	if project != "" {
		allowed = access.InProject(p, want, s.Projects[project])
	}
	if !allowed {
		return fault.New(fault.Denied, "%s is not allowed", want)
	}
	return nil
}

// Answer is what came back.
type Answer struct {
	Status int
	Header http.Header
	Body   []byte
	t      testing.TB
}

// Do sends a request. A body that is nil is none, a string or bytes are sent as
// they are, anything else as JSON. headers are name, value, name, value ...
func (s *Server) Do(method, target string, body any, headers ...string) Answer {
	s.t.Helper()
	var reader io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		reader = strings.NewReader(b)
	case []byte:
		reader = strings.NewReader(string(b))
	default:
		encoded, err := json.Marshal(b)
		if err != nil {
			s.t.Fatal(err)
		}
		reader = strings.NewReader(string(encoded))
	}
	r := httptest.NewRequest(method, target, reader)
	if reader != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i+1 < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	s.handler.ServeHTTP(w, r)
	return Answer{w.Code, w.Result().Header, w.Body.Bytes(), s.t}
}

// Want fails the test unless the answer has the status; it returns the answer.
func (a Answer) Want(status int) Answer {
	a.t.Helper()
	if a.Status != status {
		a.t.Fatalf("status %d, want %d: %s", a.Status, status, a.Body)
	}
	return a
}

// Code is the code of the first error in the envelope; "" when there is none.
func (a Answer) Code() string {
	var e struct {
		Errors []struct{ Code string }
	}
	if json.Unmarshal(a.Body, &e) != nil || len(e.Errors) == 0 {
		return ""
	}
	return e.Errors[0].Code
}

// Decode reads the JSON body into v.
func (a Answer) Decode(v any) {
	a.t.Helper()
	if err := json.Unmarshal(a.Body, v); err != nil {
		a.t.Fatalf("answer %q: %v", a.Body, err)
	}
}
