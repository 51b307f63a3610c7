package registry_test

import (
	"strings"
	"testing"

	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/registry"
)

func TestParsePath(t *testing.T) {
	const d = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	name := func(sent, project, repository string) registry.Name {
		return registry.Name{Sent: sent, Project: project, Repository: repository}
	}
	for path, want := range map[string]registry.Route{
		"/v2":                                    {Endpoint: registry.EndpointBase},
		"/v2/":                                   {Endpoint: registry.EndpointBase},
		"/v2/_catalog":                           {Endpoint: registry.EndpointCatalog},
		"/v2/app/tags/list":                      {Endpoint: registry.EndpointTags, Name: name("app", "library", "app")},
		"/v2/library/app/tags/list":              {Endpoint: registry.EndpointTags, Name: name("library/app", "library", "app")},
		"/v2/a/b/c/d/manifests/latest":           {Endpoint: registry.EndpointManifest, Name: name("a/b/c/d", "a", "b/c/d"), Reference: "latest"},
		"/v2/a/b/manifests/" + d:                 {Endpoint: registry.EndpointManifest, Name: name("a/b", "a", "b"), Reference: d},
		"/v2/a/b/blobs/" + d:                     {Endpoint: registry.EndpointBlob, Name: name("a/b", "a", "b"), Reference: d},
		"/v2/a/b/blobs/uploads/":                 {Endpoint: registry.EndpointUploads, Name: name("a/b", "a", "b")},
		"/v2/a/b/blobs/uploads":                  {Endpoint: registry.EndpointUploads, Name: name("a/b", "a", "b")},
		"/v2/a/b/blobs/uploads/n1-77":            {Endpoint: registry.EndpointSession, Name: name("a/b", "a", "b"), Reference: "n1-77"},
		"/v2/a/b/referrers/" + d:                 {Endpoint: registry.EndpointReferrers, Name: name("a/b", "a", "b"), Reference: d},
		"/v2/manifests/manifests/manifests":      {Endpoint: registry.EndpointManifest, Name: name("manifests", "library", "manifests"), Reference: "manifests"},
		"/v2/a/blobs/uploads/manifests/v1":       {Endpoint: registry.EndpointManifest, Name: name("a/blobs/uploads", "a", "blobs/uploads"), Reference: "v1"},
		"/v2/a/tags/list/tags/list":              {Endpoint: registry.EndpointTags, Name: name("a/tags/list", "a", "tags/list")},
		"/v2/a/blobs/blobs/uploads/":             {Endpoint: registry.EndpointUploads, Name: name("a/blobs", "a", "blobs")},
		"/v2/a/manifests/tags/list":              {Endpoint: registry.EndpointTags, Name: name("a/manifests", "a", "manifests")},
		"/v2/a/referrers/blobs/uploads/x-1":      {Endpoint: registry.EndpointSession, Name: name("a/referrers", "a", "referrers"), Reference: "x-1"},
		"/v2/0__a/b-----c/d.e_f/manifests/A.-_9": {Endpoint: registry.EndpointManifest, Name: name("0__a/b-----c/d.e_f", "0__a", "b-----c/d.e_f"), Reference: "A.-_9"},
	} {
		got, err := registry.ParsePath(path)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", path, got, err, want)
		}
	}
	for path, code := range map[string]string{
		"/":                         "NOT_FOUND",
		"/v1/":                      "NOT_FOUND",
		"/v2/app":                   "NOT_FOUND",
		"/v2/app/tags":              "NOT_FOUND",
		"/v2//manifests/latest":     "NAME_INVALID",
		"/v2/tags/list":             "NAME_INVALID",
		"/v2/blobs/uploads/":        "NAME_INVALID",
		"/v2/App/tags/list":         "NAME_INVALID",
		"/v2/a//b/tags/list":        "NAME_INVALID",
		"/v2/a/../b/tags/list":      "NAME_INVALID",
		"/v2/-a/tags/list":          "NAME_INVALID",
		"/v2/a-/tags/list":          "NAME_INVALID",
		"/v2/a..b/tags/list":        "NAME_INVALID",
		"/v2/a___b/tags/list":       "NAME_INVALID",
		"/v2/a._b/tags/list":        "NAME_INVALID",
		"/v2/a-.b/tags/list":        "NAME_INVALID",
		"/v2/a%2Fb/tags/list":       "NAME_INVALID", // escaped twice
		"/v2/caf\u00e9/tags/list":   "NAME_INVALID",
		"/v2/a b/tags/list":         "NAME_INVALID",
		"/v2/a\x00b/manifests/v1":   "NAME_INVALID",
		"/v2/a/b//blobs/uploads/":   "NAME_INVALID",
		"/v2/a/blobs/uploads/x/y/z": "NOT_FOUND",
		"/v2/" + strings.Repeat("a/", 200) + "a/tags/list": "NAME_INVALID",
	} {
		_, err := registry.ParsePath(path)
		if got, _, _ := fault.Public(err); err == nil || got != code {
			t.Errorf("%q: %v (%s), want %s", path, err, got, code)
		}
	}
}

func FuzzParsePath(f *testing.F) {
	for _, seed := range []string{"/v2/", "/v2/_catalog", "/v2/a/b/manifests/latest", "/v2/a/blobs/uploads/n-1", "/v2/a/tags/list", "/v2/a__b/c--d/referrers/sha256:00"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, path string) {
		route, err := registry.ParsePath(path)
		if err != nil {
			return
		}
		n := route.Name
		switch route.Endpoint {
		case registry.EndpointBase, registry.EndpointCatalog:
			if n != (registry.Name{}) {
				t.Fatalf("%q names repository %+v", path, n)
			}
			return
		}
		if n.Project == "" || n.Repository == "" || strings.Contains(n.Project, "/") || len(n.Sent) > 255 {
			t.Fatalf("%q: name %+v", path, n)
		}
		if n.Sent != n.Full() && "library/"+n.Sent != n.Full() {
			t.Fatalf("%q: sent %q is not %q", path, n.Sent, n.Full())
		}
		if strings.Contains(route.Reference, "/") || !strings.HasPrefix(path, "/v2/"+n.Sent+"/") {
			t.Fatalf("%q: %+v", path, route)
		}
		again, err := registry.ParseName(n.Full())
		if err != nil && len(n.Full()) <= 255 || err == nil && (again.Project != n.Project || again.Repository != n.Repository) {
			t.Fatalf("%q: full name %q reads as %+v, %v", path, n.Full(), again, err)
		}
	})
}
