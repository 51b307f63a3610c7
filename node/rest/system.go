package rest

import (
	"context"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
)

// System is what the operations about the API itself answer with. They live
// here and not in a room of their own because they own no table and describe
// the API that the kernel serves: which one it is, whether it is up, where it is
// found.
type System struct {
	// Checks are run for /api/v2.0/health, side by side. Monitoring that was
	// made for Harbor looks for the names core, database, jobservice, portal,
	// redis, registry and registryctl; those that have no check here answer
	// with what core does.
	Checks []Check
	// ExternalURL is where clients find the node; "" for wherever the request
	// found it.
	ExternalURL string
	// Version of the product.
	Version string
	// Storage names where blobs are kept, such as filesystem.
	Storage string
	// HasCA says that the site's CA certificate can be downloaded.
	HasCA bool
	// ReadOnly reports whether writes are refused at the moment; nil: never.
	ReadOnly func() bool
}

// Check reports the health of one part of the node.
type Check struct {
	Name string
	// Run returns what is wrong, or nil; the public text of a fault is shown to
	// anybody who asks. It is given two seconds and must heed the context.
	Run func(ctx context.Context) error
}

// harborComponents are the parts that Harbor's health lists.
var harborComponents = [...]string{"core", "database", "jobservice", "portal", "redis", "registry", "registryctl"}

const healthTimeout = 2 * time.Second

type apiVersion struct {
	Version string `json:"version"`
}

type health struct {
	Status     string            `json:"status"`
	Components []componentHealth `json:"components"`
}

type componentHealth struct {
	Name   string `json:"name"`
	Status string `json:"status"`
	Error  string `json:"error,omitempty"`
}

// systemInfo has the keys of Harbor's answer; what Atoll does not have is empty.
type systemInfo struct {
	AuthMode                    string    `json:"auth_mode"`
	BannerMessage               string    `json:"banner_message"`
	CurrentTime                 time.Time `json:"current_time"`
	ExternalURL                 string    `json:"external_url"`
	HarborVersion               string    `json:"harbor_version,omitempty"`
	HasCARoot                   bool      `json:"has_ca_root"`
	NotificationEnable          bool      `json:"notification_enable"`
	OIDCProviderName            string    `json:"oidc_provider_name"`
	PrimaryAuthMode             bool      `json:"primary_auth_mode"`
	ProjectCreationRestriction  string    `json:"project_creation_restriction"`
	ReadOnly                    bool      `json:"read_only"`
	RegistryStorageProviderName string    `json:"registry_storage_provider_name"`
	RegistryURL                 string    `json:"registry_url"`
	SelfRegistration            bool      `json:"self_registration"`
	AtollVersion                string    `json:"atoll_version,omitempty"`
}

// harborVersion is the release whose API this one follows: clients choose their
// dialect by it.
const harborVersion = "v2.14.0"

type originInput struct {
	Origin string `from:"origin"`
}

// RegisterSystem adds the operations about the API itself.
func RegisterSystem(k *Kernel, s System) {
	Register(k, Operation[struct{}, apiVersion]{
		// Without this a replicating Harbor takes us for one of its first version.
		ID: "getAPIVersion", Method: "GET", Path: "/api/version", Tag: "api", Summary: "Version of the API", Anonymous: true,
		Do: func(context.Context, *struct{}) (apiVersion, error) { return apiVersion{"v2.0"}, nil },
	})
	RegisterStream(k, StreamOperation[struct{}]{
		ID: "getPing", Method: "GET", Path: "/api/v2.0/ping", Tag: "ping", Summary: "Whether the API answers", Anonymous: true,
		Produces: "text/plain",
		Do: func(_ context.Context, _ *struct{}, w http.ResponseWriter, _ *http.Request) error {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			_, err := w.Write([]byte("Pong"))
			return err
		},
	})
	h := &checker{checks: s.Checks, log: k.config.Log, running: make([]*checkRun, len(s.Checks))}
	Register(k, Operation[struct{}, health]{
		ID: "getHealth", Method: "GET", Path: "/api/v2.0/health", Tag: "health", Summary: "Health of the node's parts", Anonymous: true,
		Do: func(ctx context.Context, _ *struct{}) (health, error) { return h.report(ctx), nil },
	})
	Register(k, Operation[originInput, systemInfo]{
		ID: "getSystemInfo", Method: "GET", Path: "/api/v2.0/systeminfo", Tag: "systeminfo", Summary: "What clients need to know of the system", Anonymous: true,
		Do: func(ctx context.Context, in *originInput) (systemInfo, error) {
			return s.info(in.Origin, PrincipalFrom(ctx)), nil
		},
	})
}

// info answers getSystemInfo. Versions are for those who have logged in: they
// tell an attacker what to try.
func (s System) info(origin string, p access.Principal) systemInfo {
	if s.ExternalURL != "" {
		origin = s.ExternalURL
	}
	_, host, _ := strings.Cut(origin, "://")
	out := systemInfo{
		AuthMode:                    "db_auth",
		CurrentTime:                 time.Now().UTC(),
		ExternalURL:                 origin,
		HasCARoot:                   s.HasCA,
		ProjectCreationRestriction:  "adminonly",
		ReadOnly:                    s.ReadOnly != nil && s.ReadOnly(),
		RegistryStorageProviderName: s.Storage,
		RegistryURL:                 strings.TrimSuffix(host, "/"),
	}
	if p.Kind != access.Anonymous {
		out.HarborVersion, out.AtollVersion = harborVersion, s.Version
	}
	return out
}

// checker runs the health checks. Whoever asks while a check is under way joins
// it, so that polling the health of a node with a hung disk does not pile up
// goroutines.
type checker struct {
	checks []Check
	log    *slog.Logger

	mu      sync.Mutex
	running []*checkRun // by check; nil: none under way
}

type checkRun struct {
	done chan struct{}
	err  error // set before done is closed
}

// report runs all checks side by side.
func (c *checker) report(ctx context.Context) health {
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	runs := make([]*checkRun, len(c.checks))
	for i := range c.checks {
		runs[i] = c.start(ctx, i)
	}
	out := health{Status: "healthy"}
	core := componentHealth{Name: "core", Status: "healthy"}
	for i, check := range c.checks {
		one := componentHealth{Name: check.Name, Status: "healthy"}
		if err := runs[i].wait(ctx); err != nil {
			c.log.LogAttrs(ctx, slog.LevelWarn, "health check failed", slog.String("check", check.Name), slog.Any("error", err))
			_, one.Error, _ = fault.Public(err)
			one.Status, out.Status = "unhealthy", "unhealthy"
		}
		if check.Name == "core" {
			core = one
		}
		out.Components = append(out.Components, one)
	}
	for _, name := range harborComponents {
		if !slices.ContainsFunc(out.Components, func(h componentHealth) bool { return h.Name == name }) {
			out.Components = append(out.Components, componentHealth{Name: name, Status: core.Status, Error: core.Error})
		}
	}
	slices.SortFunc(out.Components, func(a, b componentHealth) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// start runs a check, or joins the run under way.
func (c *checker) start(ctx context.Context, i int) *checkRun {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.running[i] != nil {
		return c.running[i]
	}
	run := &checkRun{done: make(chan struct{})}
	c.running[i] = run
	// Not cancelled with the request that happened to start it: others may join.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), healthTimeout)
	go func() {
		defer cancel()
		run.err = c.checks[i].Run(ctx)
		c.mu.Lock()
		c.running[i] = nil
		c.mu.Unlock()
		close(run.done)
	}()
	return run
}

func (r *checkRun) wait(ctx context.Context) error {
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
		return fault.New(fault.Unavailable, "no answer within %s", healthTimeout)
	}
}
