package node

import (
	"encoding/json"
	"net/url"
	"strings"
	"testing"

	"github.com/atoll-registry/atoll/node/rest/resttest"
)

func TestDocumentOfAllRooms(t *testing.T) {
	n := start(t, config(t))
	var doc map[string]any
	n.as(login{}, "GET", "/api/openapi.json", nil).want(200).decode(&doc)
	routes := n.rooms.kernel.Routes()
	for _, problem := range resttest.CheckDocument(doc, routes) {
		t.Error(problem)
	}
	if len(routes) < 30 {
		t.Errorf("%d routes: a room is missing", len(routes))
	}
}

// TestHarborsShapes holds the answers of a node with content to what a real Harbor
// answers.
func TestHarborsShapes(t *testing.T) {
	n := start(t, config(t))
	object := []string{"Content-Type", "application/json"}
	n.do("POST", "/api/v2.0/projects", []byte(`{"project_name":"shop","metadata":{"public":"false"}}`), object...).want(201)
	p := n.push("shop/tills/app", "v1", []byte("a layer"))
	n.push("library/app", "v1", []byte("another layer"))

	// What needs a room that is not built yet: scanning, labels, retention, the
	// build history, and the attributes that are read from an image's config.
	later := []string{
		"[].labels", "[].scan_overview", "labels", "[].metadata.retention_id", "metadata.retention_id",
		"[].metadata.auto_sbom_generation", "[].metadata.auto_scan", "[].metadata.enable_content_trust", "[].metadata.enable_content_trust_cosign",
		"[].metadata.prevent_vul", "[].metadata.proxy_cache_local_on_not_found", "[].metadata.reuse_sys_cve_allowlist", "[].metadata.severity",
		"metadata.auto_sbom_generation", "metadata.auto_scan", "metadata.enable_content_trust", "metadata.enable_content_trust_cosign",
		"metadata.prevent_vul", "metadata.proxy_cache_local_on_not_found", "metadata.reuse_sys_cve_allowlist", "metadata.severity",
		"description", "[].extra_attrs.author", "extra_attrs.author", "[].extra_attrs.created", "extra_attrs.created",
		"[].extra_attrs.architecture", "extra_attrs.architecture", "[].extra_attrs.os", "extra_attrs.os", "[].extra_attrs.config", "extra_attrs.config",
		"[].addition_links.build_history", "addition_links.build_history",
		"[].addition_links.sboms", "addition_links.sboms", "[].addition_links.vulnerabilities", "addition_links.vulnerabilities",
	}
	repository := "/api/v2.0/projects/shop/repositories/" + url.PathEscape(url.PathEscape("tills/app"))
	for _, test := range []struct{ operation, path string }{
		{"getHealth", "/api/v2.0/health"},
		{"getSystemInfo", "/api/v2.0/systeminfo"},
		{"listProjects", "/api/v2.0/projects"},
		{"getProject", "/api/v2.0/projects/shop"},
		{"getProjectSummary", "/api/v2.0/projects/shop/summary"},
		{"listAllRepositories", "/api/v2.0/repositories"},
		{"listRepositories", "/api/v2.0/projects/shop/repositories"},
		{"getRepository", repository},
		{"listArtifacts", repository + "/artifacts?with_tag=true"},
		{"getArtifact", repository + "/artifacts/" + p.digest.String()},
		{"getArtifact", repository + "/artifacts/v1"},
		{"listTags", repository + "/artifacts/v1/tags"},
	} {
		a := n.do("GET", test.path, nil).want(200)
		resttest.Shape(t, test.operation, 200, a.Body, later...)
		if test.operation[:4] == "list" && (a.Header.Get("X-Total-Count") == "" || a.Header.Get("X-Total-Count") == "0") {
			t.Errorf("%s: X-Total-Count %q: nothing was held to the shape", test.path, a.Header.Get("X-Total-Count"))
		}
		if a.Header.Get("X-Request-Id") == "" {
			t.Errorf("%s: no X-Request-Id", test.path)
		}
	}
	resttest.Shape(t, "createProject", 409, n.do("POST", "/api/v2.0/projects", []byte(`{"project_name":"shop"}`), object...).want(409).Body)
	resttest.Shape(t, "getArtifact", 404, n.do("GET", repository+"/artifacts/none", nil).want(404).Body)

	var version struct{ Version string }
	n.as(login{}, "GET", "/api/version", nil).want(200).decode(&version)
	if version.Version != "v2.0" {
		t.Errorf("version of the API is %q", version.Version)
	}
	if got := n.as(login{}, "GET", "/api/v2.0/ping", nil).want(200).Body; string(got) != "Pong" {
		t.Errorf("ping: %q", got)
	}
	var health struct{ Status string }
	n.as(login{}, "GET", "/api/v2.0/health", nil).want(200).decode(&health)
	if health.Status != "healthy" {
		t.Errorf("health: %q", health.Status)
	}

	// A private project with content: hidden, and not deleted.
	n.as(login{}, "GET", "/api/v2.0/projects/shop", nil).want(401)
	n.as(login{}, "GET", "/api/v2.0/projects/library/repositories", nil).want(200)
	n.do("DELETE", "/api/v2.0/projects/shop", nil).want(412)
	n.do("DELETE", repository, nil).want(200)
	n.do("DELETE", "/api/v2.0/projects/shop", nil).want(200)
	n.do("GET", "/api/v2.0/projects/shop", nil).want(404)
}

func TestMetrics(t *testing.T) {
	n := start(t, config(t))
	n.push("library/app", "v1", []byte("a layer"))
	text := string(n.as(login{}, "GET", "/metrics", nil).want(200).Body)
	for _, name := range []string{"atoll_peers_underreplicated_blobs 0", "atoll_cluster_leader_bool 1", "atoll_http_request_duration_seconds_count"} {
		if !strings.Contains(text, name) {
			t.Errorf("no %q in the metrics", name)
		}
	}
	if strings.Contains(text, "library") {
		t.Error("a label holds what a client chose")
	}

	c := config(t)
	c.Listen, c.TLS = "0.0.0.0:0", TLSOff
	open := start(t, c)
	a := open.as(login{}, "GET", "/metrics", nil).want(401)
	if a.Header.Get("WWW-Authenticate") == "" || !json.Valid(a.Body) {
		t.Errorf("the refusal is %v %s", a.Header, a.Body)
	}
	open.as(login{"admin", "guess"}, "GET", "/metrics", nil).want(401)
	open.do("GET", "/metrics", nil).want(200)
}

// TestPathsThatAreNotClean: no redirect may turn a push into something else.
func TestPathsThatAreNotClean(t *testing.T) {
	n := start(t, config(t))
	for _, path := range []string{
		"/v2/../metrics",
		"/v2/library//app/manifests/v1",
		"/v2/library/app/../app/manifests/v1",
		"/api/v2.0/projects/../projects/library",
		"/service/token/",
		"/metrics/",
	} {
		a := n.do("GET", path, nil)
		if a.Status/100 == 3 || a.Status/100 == 2 || a.Status >= 500 {
			t.Errorf("%s: %d %s, want a refusal", path, a.Status, a.Body)
		}
	}
}
