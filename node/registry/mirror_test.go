package registry_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/node/project"
)

// mirror is a node with the projects of two upstreams: docker.io, which all may
// read, and quay.io, which nobody may.
func mirror(t testing.TB) *node {
	n := single(t)
	public := true
	n.pushImage("docker.io/library/busybox", "v1")
	n.pushImage("docker.io/acme/tool", "v1")
	n.pushImage("quay.io/acme/tool", "v1")
	must(t, n.site.projects.Update(t.Context(), "docker.io", project.Change{Public: &public}))
	return n
}

// token asks for a token as a client does that knows only the name that it
// sends: without ns, and with the scope of the path.
func (c *client) token(scope string) string {
	c.t.Helper()
	var got struct{ Token string }
	c.do("GET", "/service/token?service=harbor-registry&scope="+scope, nil).want(200).decode(&got)
	return "Bearer " + got.Token
}

func (n *node) set(name, value string) {
	n.t.Helper()
	_, err := n.site.tuning.Set(n.t.Context(), name, value, "test")
	must(n.t, err)
}

// What containerd sends to a mirror.
func TestMirrorByNamespace(t *testing.T) {
	n := mirror(t)
	want := n.do("GET", "/v2/docker.io/library/busybox/manifests/v1", nil).want(200).body
	d := digest.FromBytes(want).String()
	var m v1.Manifest
	n.do("GET", "/v2/docker.io/library/busybox/manifests/v1", nil).decode(&m)
	layer := m.Layers[0].Digest.String()

	nobody := n.as("")
	nobody.do("HEAD", "/v2/library/busybox/manifests/v1?ns=docker.io", nil).want(401).
		has("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/service/token",service="harbor-registry",scope="repository:library/busybox:pull"`, n.url))
	auth := nobody.token("repository:library/busybox:pull")
	get := func(method, path string) *answer { return nobody.do(method, path, nil, "Authorization", auth) }
	for _, path := range []string{
		"/v2/library/busybox/manifests/v1?ns=docker.io", "/v2/busybox/manifests/v1?ns=docker.io",
		"/v2/library/busybox/manifests/" + d + "?ns=docker.io", "/v2/library/busybox/manifests/v1?ns=registry-1.docker.io",
		"/v2/library/busybox/manifests/v1?ns=Docker.IO",
	} {
		get("HEAD", path).want(200).has("Docker-Content-Digest", d)
		if got := get("GET", path).want(200); string(got.body) != string(want) {
			t.Errorf("%s: %s", path, got.body)
		}
	}
	get("HEAD", "/v2/library/busybox/blobs/"+layer+"?ns=docker.io").want(200)
	get("GET", "/v2/library/busybox/blobs/"+layer+"?ns=docker.io").want(200)
	get("GET", "/v2/library/busybox/referrers/"+d+"?ns=docker.io").want(200)
	var list struct {
		Name string
		Tags []string
	}
	get("GET", "/v2/library/busybox/tags/list?ns=docker.io").want(200).decode(&list)
	if list.Name != "library/busybox" || len(list.Tags) != 1 {
		t.Errorf("tags: %+v", list)
	}
	// Not docker.io's, so not library's: nothing of this site shows through.
	get("GET", "/v2/library/busybox/manifests/v1").want(404, "NAME_UNKNOWN")
	get("GET", "/v2/library/busybox/manifests/v1?ns=ghcr.io").want(401)
	get("GET", "/v2/library/busybox/manifests/v1?ns=quay.io/x").want(400, "NAME_INVALID")
	get("GET", "/v2/library/busybox/manifests/none?ns=docker.io").want(404, "MANIFEST_UNKNOWN")
	// A name of this node itself.
	n.pushImage("library/own", "v1")
	get("GET", "/v2/library/own/manifests/v1?ns="+strings.TrimPrefix(n.url, "http://")).want(401) // the token is of another repository
	n.do("GET", "/v2/library/own/manifests/v1?ns="+strings.TrimPrefix(n.url, "http://"), nil).want(200)

	// A client that pulled one name asks for the next by its scope alone. The
	// project acme is not here: what the token says of it is nothing.
	auth = nobody.token("repository:acme/tool:pull")
	get("GET", "/v2/acme/tool/manifests/v1?ns=docker.io").want(200)
	get("GET", "/v2/acme/tool/manifests/v1?ns=quay.io").want(401)

	// Where the project is private the user must have the right, and the token
	// must be for this name.
	n.do("GET", "/v2/acme/tool/manifests/v1?ns=quay.io", nil).want(200)
	auth = n.token("repository:acme/tool:pull")
	get("GET", "/v2/acme/tool/manifests/v1?ns=quay.io").want(200)
	auth = n.token("repository:quay.io/acme/tool:pull")
	get("GET", "/v2/acme/tool/manifests/v1?ns=quay.io").want(200)
	auth = n.token("repository:other/tool:pull")
	get("GET", "/v2/acme/tool/manifests/v1?ns=quay.io").want(401)
}

// Nothing is written through a mirror's name.
func TestMirrorOnlyReads(t *testing.T) {
	n := mirror(t)
	blob := []byte("mine")
	at := n.do("POST", "/v2/acme/tool/blobs/uploads/?ns=docker.io", nil).want(202).location()
	n.do("PUT", at+"?ns=docker.io&digest="+digest.FromBytes(blob).String(), blob).want(201)
	n.do("HEAD", "/v2/acme/tool/blobs/"+digest.FromBytes(blob).String(), nil).want(200)
	n.do("HEAD", "/v2/docker.io/acme/tool/blobs/"+digest.FromBytes(blob).String(), nil).want(404)
	n.do("DELETE", "/v2/acme/tool/manifests/v1?ns=docker.io", nil).want(404)
	n.do("GET", "/v2/docker.io/acme/tool/manifests/v1", nil).want(200)
}

func TestMirrorTable(t *testing.T) {
	n := mirror(t)
	n.pushImage("hub/library/busybox", "v2")
	n.pushImage("registry.example-5000/app/web", "v1")
	n.pushImage("library/web", "v1")
	n.set("mirror.projects", "docker.io=hub, site.example=")
	n.do("GET", "/v2/library/busybox/manifests/v2?ns=docker.io", nil).want(200)
	n.do("GET", "/v2/library/busybox/manifests/v1?ns=docker.io", nil).want(404)
	n.do("GET", "/v2/app/web/manifests/v1?ns=registry.example:5000", nil).want(200)
	n.do("GET", "/v2/library/web/manifests/v1?ns=site.example", nil).want(200)
	n.do("GET", "/v2/library/web/manifests/v1?ns=other.example", nil).want(404)
	for _, bad := range []string{"docker.io", "docker.io=Hub", "docker.io/x=hub", "=hub", "docker.io=a/b"} {
		if _, err := n.site.tuning.Set(t.Context(), "mirror.projects", bad, ""); err == nil {
			t.Errorf("mirror.projects took %q", bad)
		}
	}
	if _, err := n.site.tuning.Set(t.Context(), "mirror.fallback", "no host", ""); err == nil {
		t.Error("mirror.fallback took nonsense")
	}
}

// What docker sends to a mirror: names of Docker Hub, and not whose they are.
func TestMirrorFallback(t *testing.T) {
	n := mirror(t)
	nobody := n.as("")
	auth := nobody.token("repository:library/busybox:pull")
	get := func(method, path string) *answer { return nobody.do(method, path, nil, "Authorization", auth) }
	get("GET", "/v2/library/busybox/manifests/v1").want(404)
	n.set("mirror.fallback", "docker.io")
	var m v1.Manifest
	get("GET", "/v2/library/busybox/manifests/v1").want(200).decode(&m)
	layer := "/v2/library/busybox/blobs/" + m.Layers[0].Digest.String()
	get("GET", layer).want(200)
	get("GET", "/v2/library/missing/manifests/v1").want(401) // its token is for another name
	auth = nobody.token("repository:acme/tool:pull")
	get("GET", "/v2/acme/tool/manifests/v1").want(200)

	// Who pushes sees what is under the name itself: a layer that only the
	// upstream has must not be left out of the push.
	auth = n.token("repository:library/busybox:pull,push")
	get("HEAD", layer).want(404)
	get("HEAD", "/v2/library/busybox/manifests/v1").want(404)
	auth = n.token("repository:library/busybox:pull")
	get("HEAD", layer).want(404)
	get("HEAD", "/v2/library/busybox/manifests/v1").want(200)

	// What is here comes first.
	n.pushImage("library/busybox", "mine")
	auth = nobody.token("repository:library/busybox:pull")
	get("GET", "/v2/library/busybox/manifests/mine").want(200)
	get("GET", "/v2/library/busybox/manifests/v1").want(404, "MANIFEST_UNKNOWN")
}

// podman's location with a prefix needs no mapping.
func TestMirrorByPrefix(t *testing.T) {
	n := mirror(t)
	nobody := n.as("")
	auth := nobody.token("repository:docker.io/library/busybox:pull")
	nobody.do("GET", "/v2/docker.io/library/busybox/manifests/v1", nil, "Authorization", auth).want(200)
}
