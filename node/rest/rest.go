// Package rest is the kernel of the management API: rooms register typed
// operations, and the kernel routes, authenticates, asks whether the operation
// is allowed, decodes, validates, encodes, and answers every failure in one
// envelope.
//
// Invariants:
//   - An operation names the permission it needs, or says that it is open to
//     all; registering one that does neither panics, at start.
//   - What a request must look like is compiled when the operation is registered:
//     a wrong tag panics at start and never at the first request.
//   - A handler returns its error. Here it is logged, once, and here its public
//     text, and nothing else of it, is sent.
//   - The OpenAPI document is made of the table that routes.
package rest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path"
	"runtime/debug"
	"slices"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/telemetry"
)

// Authenticator says who makes a request. A request without credentials is
// Anonymous and no error; wrong credentials are fault.Unauthenticated.
type Authenticator interface {
	Authenticate(r *http.Request) (access.Principal, error)
}

// Guard decides whether a principal may do something in a project, or in the
// system when project is "". The project is a reference as ParseProject reads
// it. Refusals are fault.Denied (or fault.NotFound, where the existence of the
// project is not for the asker to know).
type Guard interface {
	Allow(ctx context.Context, p access.Principal, want access.Permission, project string) error
}

// Config of a Kernel. All fields are needed.
type Config struct {
	Log           *slog.Logger
	Registerer    prometheus.Registerer
	Authenticator Authenticator
	Guard         Guard
	// Version of the product, for the OpenAPI document.
	Version string
}

// Kernel holds the table of operations. Register everything, then serve
// Handler; registering while serving is a mistake.
type Kernel struct {
	config   Config
	mux      *http.ServeMux
	routes   []route
	ids      map[string]bool
	failures *prometheus.CounterVec
	document func() []byte
}

// route is one operation in the table, as the OpenAPI document needs it.
type route struct {
	id, method, path, tag, summary string
	permission                     access.Permission
	status                         int
	input                          *plan
	output                         *outputPlan
	consumes, produces             string
}

// Route is one row of the table, for tests that hold the table to something.
type Route struct{ ID, Method, Path string }

// New makes a kernel without operations; it serves its own OpenAPI document.
func New(c Config) (*Kernel, error) {
	if c.Log == nil || c.Registerer == nil || c.Authenticator == nil || c.Guard == nil {
		return nil, errors.New("rest kernel: log, registerer, authenticator and guard are all needed")
	}
	k := &Kernel{
		config: c,
		mux:    http.NewServeMux(),
		ids:    make(map[string]bool),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "atoll_rest_failures_total", Help: "Operations that answered with an error, by operation and kind of failure.",
		}, []string{"operation", "kind"}),
	}
	if err := c.Registerer.Register(k.failures); err != nil {
		return nil, fmt.Errorf("rest kernel: %w", err)
	}
	k.document = sync.OnceValue(k.openAPI)
	RegisterStream(k, StreamOperation[struct{}]{
		ID: "getOpenAPI", Method: "GET", Path: "/api/openapi.json", Tag: "api", Summary: "This document",
		Anonymous: true, Produces: "application/json",
		Do: func(_ context.Context, _ *struct{}, w http.ResponseWriter, _ *http.Request) error {
			w.Header().Set("Content-Type", "application/json")
			_, err := w.Write(k.document())
			return err
		},
	})
	return k, nil
}

// Routes lists the table in the order of registration.
func (k *Kernel) Routes() []Route {
	out := make([]Route, 0, len(k.routes))
	for _, r := range k.routes {
		out = append(out, Route{r.id, r.method, r.path})
	}
	return out
}

// add puts an operation in the table. Whatever is wrong with it is a mistake in
// the program and stops it at start.
func (k *Kernel) add(r route, serve http.HandlerFunc) {
	name := r.method + " " + r.path
	switch {
	case r.id == "" || r.method == "" || !strings.HasPrefix(r.path, "/") || r.summary == "" || r.tag == "":
		panic(fmt.Sprintf("rest: operation %q (%s) must have an id, method, path, tag and summary", r.id, name))
	case k.ids[r.id]:
		panic(fmt.Sprintf("rest: operation id %q is registered twice", r.id))
	}
	k.ids[r.id] = true
	k.routes = append(k.routes, r)
	k.mux.HandleFunc(name, func(w http.ResponseWriter, req *http.Request) {
		telemetry.SetRoute(req.Context(), r.path)
		serve(w, req)
	})
}

// Handler serves every registered operation, and an error in the envelope for
// everything else.
func (k *Kernel) Handler() http.Handler { return http.HandlerFunc(k.serve) }

func (k *Kernel) serve(w http.ResponseWriter, r *http.Request) {
	r = telemetry.Begin(w, r)
	defer func() {
		switch p := recover(); p {
		case nil:
		case http.ErrAbortHandler:
			panic(p)
		default:
			k.fail(w, r, "panic", fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
		}
	}()
	// ServeMux would answer a path that is not clean with a redirect, which
	// clients of an API do not follow with their credentials and body.
	escaped := r.URL.EscapedPath()
	if clean := path.Clean(escaped); clean != escaped && clean+"/" != escaped {
		k.fail(w, r, "unrouted", fault.New(fault.NotFound, "no operation at %s", r.URL.Path))
		return
	}
	handler, pattern := k.mux.Handler(r)
	if pattern != "" {
		k.mux.ServeHTTP(w, r)
		return
	}
	// Not routed: find out from the mux whether the method or the path is
	// unknown, and say it in the envelope.
	probe := &probe{header: make(http.Header)}
	handler.ServeHTTP(probe, r)
	if probe.status == http.StatusMethodNotAllowed {
		w.Header().Set("Allow", probe.header.Get("Allow"))
		k.fail(w, r, "unrouted", fault.New(fault.Invalid, "%s is not among the methods of %s: %s",
			r.Method, r.URL.Path, probe.header.Get("Allow")).WithCode(codeMethodNotAllowed))
		return
	}
	k.fail(w, r, "unrouted", fault.New(fault.NotFound, "no operation at %s", r.URL.Path))
}

// probe takes the answer of a handler and keeps status and headers only.
type probe struct {
	header http.Header
	status int
}

func (p *probe) Header() http.Header         { return p.header }
func (p *probe) WriteHeader(status int)      { p.status = status }
func (p *probe) Write(b []byte) (int, error) { return len(b), nil }

// admit authenticates the request and gives a context that carries the
// principal.
func (k *Kernel) admit(r *http.Request) (context.Context, access.Principal, error) {
	p, err := k.config.Authenticator.Authenticate(r)
	if err != nil {
		return nil, p, err
	}
	if p.Grants != nil {
		return nil, p, fault.New(fault.Unauthenticated,
			"a registry token is for /v2/ only: use the name and password here")
	}
	ctx := r.Context()
	telemetry.SetUser(ctx, p.Name)
	return access.WithPrincipal(ctx, p), p, nil
}

// allow asks the guard. An anonymous asker is told to log in rather than that
// it lacks the right.
func (k *Kernel) allow(ctx context.Context, p access.Principal, want access.Permission, project string) error {
	if want == (access.Permission{}) {
		return nil
	}
	err := k.config.Guard.Allow(ctx, p, want, project)
	if p.Kind == access.Anonymous && fault.Is(err, fault.Denied) {
		return fault.Wrap(err, fault.Unauthenticated, "log in to do this")
	}
	return err
}

// PrincipalFrom gives who makes the request that the context belongs to.
func PrincipalFrom(ctx context.Context) access.Principal { return access.From(ctx) }

// wildcards lists the names in a path template, in order.
func wildcards(template string) []string {
	var names []string
	for _, segment := range strings.Split(template, "/") {
		if strings.HasPrefix(segment, "{") && strings.HasSuffix(segment, "}") {
			names = append(names, strings.TrimSuffix(segment[1:len(segment)-1], "..."))
		}
	}
	slices.Sort(names)
	return names
}
