package rest_test

import (
	"context"
	"errors"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/rest"
	"github.com/atoll-registry/atoll/node/rest/resttest"
)

func TestSystem(t *testing.T) {
	s := resttest.New(t)
	broken := error(nil)
	rest.RegisterSystem(s.Kernel, rest.System{
		Version: "v0.1", Storage: "filesystem",
		Checks: []rest.Check{
			{Name: "core", Run: func(context.Context) error { return nil }},
			{Name: "registry", Run: func(context.Context) error { return broken }},
		},
	})
	if got := string(s.Do("GET", "/api/version", nil).Want(200).Body); got != "{\"version\":\"v2.0\"}\n" {
		t.Errorf("version: %q", got)
	}
	if got := string(s.Do("GET", "/api/v2.0/ping", nil).Want(200).Body); got != "Pong" {
		t.Errorf("ping: %q", got)
	}
	info := s.Do("GET", "/api/v2.0/systeminfo", nil).Want(200)
	resttest.Shape(t, "getSystemInfo", 200, info.Body)
	var fields map[string]any
	info.Decode(&fields)
	if fields["registry_url"] != "example.com" || fields["external_url"] != "http://example.com" {
		t.Errorf("systeminfo: %s", info.Body)
	}
	s.As = access.Principal{}
	if strings.Contains(string(s.Do("GET", "/api/v2.0/systeminfo", nil).Want(200).Body), "version") {
		t.Error("systeminfo tells strangers the version")
	}
	resttest.Shape(t, "getHealth", 200, s.Do("GET", "/api/v2.0/health", nil).Want(200).Body)
	broken = fault.Wrap(errors.New("secret"), fault.Unavailable, "the disk is full")
	var health struct {
		Status     string
		Components []struct{ Name, Status, Error string }
	}
	s.Do("GET", "/api/v2.0/health", nil).Want(200).Decode(&health)
	seen := ""
	for _, c := range health.Components {
		seen += c.Name + "=" + c.Status + c.Error + " "
	}
	const want = "core=healthy database=healthy jobservice=healthy portal=healthy redis=healthy registry=unhealthythe disk is full registryctl=healthy "
	if health.Status != "unhealthy" || seen != want {
		t.Errorf("health %s: %s", health.Status, seen)
	}
}

func TestHungCheckDoesNotPileUp(t *testing.T) {
	s := resttest.New(t)
	started := make(chan struct{}, 10)
	release := make(chan struct{})
	rest.RegisterSystem(s.Kernel, rest.System{Checks: []rest.Check{{Name: "core", Run: func(context.Context) error {
		started <- struct{}{}
		<-release
		return nil
	}}}})
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // the askers are gone at once: nobody waits two seconds
	for range 3 {
		w := httptest.NewRecorder()
		s.Kernel.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/api/v2.0/health", nil).WithContext(ctx))
		if !strings.Contains(w.Body.String(), "unhealthy") {
			t.Errorf("health: %s", w.Body)
		}
	}
	<-started
	if len(started) != 0 {
		t.Errorf("%d more runs were started", len(started))
	}
	close(release)
}
