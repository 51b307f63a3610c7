package registry_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/node/fault"
)

const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	ociManifest    = v1.MediaTypeImageManifest
	ociIndex       = v1.MediaTypeImageIndex
)

// The tests of this file follow the order of the OCI Distribution specification
// 1.1 and cite its sections.

// "Determining Support".
func TestBase(t *testing.T) {
	n := single(t)
	for _, path := range []string{"/v2/", "/v2"} {
		n.do("GET", path, nil).want(200).has("Docker-Distribution-Api-Version", "registry/2.0", "X-Request-Id", "*")
	}
	n.do("HEAD", "/v2/", nil).want(200)
	n.do("POST", "/v2/", nil).want(405, "UNSUPPORTED").has("Allow", "GET, HEAD")
	n.do("GET", "/v2/", nil, "X-Request-Id", "mine-1").want(200).has("X-Request-Id", "mine-1")
}

// Who asks for what, and what the answer tells them to do.
func TestAuthentication(t *testing.T) {
	n := single(t)
	n.pushImage("library/app", "v1")
	n.pushImage("secret/app", "v1")
	bearer := func(scope string) string {
		return fmt.Sprintf(`Bearer realm="%s/service/token",service="harbor-registry",scope="%s"`, n.url, scope)
	}
	nobody := n.as("")
	nobody.do("GET", "/v2/", nil).want(401, "UNAUTHORIZED").has("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/service/token",service="harbor-registry"`, n.url))
	for _, c := range []struct{ method, path, scope string }{
		{"HEAD", "/v2/library/app/manifests/v1", "repository:library/app:pull"},
		{"GET", "/v2/app/manifests/v1", "repository:app:pull"}, // as it was sent
		{"HEAD", "/v2/app/blobs/" + digest.FromString("").String(), "repository:app:pull"},
		{"POST", "/v2/app/blobs/uploads/", "repository:app:pull,push"},
		{"POST", "/v2/app/blobs/uploads/?mount=" + digest.FromString("").String() + "&from=secret/app", "repository:app:pull,push repository:secret/app:pull"},
		{"PUT", "/v2/app/manifests/v1", "repository:app:pull,push"},
		{"DELETE", "/v2/app/manifests/v1", "repository:app:delete"},
		{"GET", "/v2/app/tags/list", "repository:app:pull"},
		{"GET", "/v2/app/referrers/" + digest.FromString("").String(), "repository:app:pull"},
		{"GET", "/v2/_catalog", "registry:catalog:*"},
	} {
		nobody.do(c.method, c.path, nil).want(401).has("WWW-Authenticate", bearer(c.scope))
	}
	n.as("admin").do("GET", "/v2/", nil, "Authorization", "Basic YWRtaW46d3Jvbmc=").want(401, "UNAUTHORIZED").has("WWW-Authenticate", `Basic realm="harbor"`)
	n.do("GET", "/v2/", nil, "Authorization", "Bearer nonsense").want(401, "UNAUTHORIZED")

	token := func(c *client, scopes ...string) string {
		path := "/service/token?service=harbor-registry"
		for _, s := range scopes {
			path += "&scope=" + s
		}
		var got struct{ Token string }
		c.do("GET", path, nil).want(200).decode(&got)
		return "Bearer " + got.Token
	}
	with := func(method, path, auth string) *answer { return nobody.do(method, path, nil, "Authorization", auth) }

	// Anybody pulls from a public project, once there is a token.
	anonymous := token(nobody, "repository:library/app:pull")
	with("GET", "/v2/library/app/manifests/v1", anonymous).want(200)
	with("GET", "/v2/app/manifests/v1", anonymous).want(200)
	with("POST", "/v2/app/blobs/uploads/", anonymous).want(401, "UNAUTHORIZED")
	with("GET", "/v2/secret/app/manifests/v1", token(nobody, "repository:secret/app:pull")).want(401, "UNAUTHORIZED")
	with("GET", "/v2/missing/app/manifests/v1", token(nobody, "repository:missing/app:pull")).want(401, "UNAUTHORIZED")
	with("GET", "/v2/_catalog", token(nobody, "registry:catalog:*")).want(401, "UNAUTHORIZED")

	// A token reaches no further than what it was asked for; the challenge says how to get on.
	narrow := token(n.client, "repository:secret/app:pull")
	with("GET", "/v2/secret/app/manifests/v1", narrow).want(200)
	a := with("POST", "/v2/secret/app/blobs/uploads/", narrow).want(401, "UNAUTHORIZED")
	if c := a.header.Get("WWW-Authenticate"); !strings.Contains(c, `scope="repository:secret/app:pull,push"`) || !strings.Contains(c, `error="insufficient_scope"`) {
		t.Errorf("challenge %q", c)
	}
	with("GET", "/v2/secret/other/manifests/v1", narrow).want(401, "UNAUTHORIZED")
	with("GET", "/v2/_catalog", narrow).want(401, "UNAUTHORIZED")
	with("GET", "/v2/_catalog", token(n.client, "registry:catalog:*")).want(200)
	with("POST", "/v2/secret/app/blobs/uploads/", token(n.client, "repository:secret/app:pull,push")).want(202)
	with("POST", "/v2/fresh/app/blobs/uploads/", token(n.client, "repository:fresh/app:pull,push")).want(202)
}

// "Pull": "Pulling manifests", "Checking if content exists in the registry".
func TestPullManifest(t *testing.T) {
	n := single(t)
	manifest := n.pushImage("library/app", "v1")
	d := digest.FromBytes(manifest)
	for _, path := range []string{"/v2/library/app/manifests/v1", "/v2/app/manifests/v1", "/v2/library/app/manifests/" + d.String(),
		"/v2/app/manifests/" + strings.Replace(d.String(), ":", "%3A", 1), "/v2/library%2Fapp/manifests/v1"} {
		a := n.do("GET", path, nil).want(200)
		a.has("Content-Type", ociManifest, "Docker-Content-Digest", d.String(), "Content-Length", strconv.Itoa(len(manifest)), "Etag", `"`+d.String()+`"`)
		if !bytes.Equal(a.body, manifest) {
			t.Errorf("%s: the manifest changed", path)
		}
		if _, stale := a.header["Atoll-Stale"]; stale {
			t.Errorf("%s is marked as stale", path)
		}
		a = n.do("HEAD", path, nil).want(200).has("Content-Type", ociManifest, "Docker-Content-Digest", d.String(), "Content-Length", strconv.Itoa(len(manifest)))
		if len(a.body) > 0 {
			t.Errorf("HEAD %s has a body", path)
		}
	}
	// Nothing is converted to what a client would rather have.
	n.do("GET", "/v2/app/manifests/v1", nil, "Accept", dockerManifest).want(200).has("Content-Type", ociManifest)
	n.do("GET", "/v2/app/manifests/v1", nil, "If-None-Match", `"`+d.String()+`"`).want(304)
	n.do("GET", "/v2/app/manifests/v1", nil, "If-None-Match", `"sha256:other"`).want(200)

	other := digest.FromString("other").String()
	for _, c := range []struct {
		path   string
		status int
		code   string
	}{
		{"/v2/app/manifests/v2", 404, "MANIFEST_UNKNOWN"},
		{"/v2/app/manifests/" + other, 404, "MANIFEST_UNKNOWN"},
		{"/v2/app/manifests/.not-a-tag", 404, "MANIFEST_UNKNOWN"},
		{"/v2/app/manifests/sha256:tooshort", 400, "DIGEST_INVALID"},
		{"/v2/none/manifests/v1", 404, "NAME_UNKNOWN"},
		{"/v2/none/app/manifests/v1", 404, "NAME_UNKNOWN"},
		{"/v2/Upper/app/manifests/v1", 400, "NAME_INVALID"},
	} {
		n.do("GET", c.path, nil).want(c.status, c.code)
		n.do("HEAD", c.path, nil).want(c.status)
	}
	if sum := digest.FromString("x").String(); n.do("GET", "/v2/app/manifests/sha512:"+sum[7:]+sum[7:], nil).status != 404 {
		t.Error("a manifest under the other algorithm is not there")
	}
}

// What is pushed is served byte for byte, whatever its kind.
func TestByteFidelity(t *testing.T) {
	n := single(t)
	config := n.pushBlob("app", []byte("{}"))
	layer := n.pushBlob("app", random(50))
	manifest := func(kind string) []byte {
		return fmt.Appendf(nil, "{\n   \"schemaVersion\": 2,\n\t\"mediaType\": %q,\n   \"config\": {\"mediaType\":\"application/vnd.example+json\",\"size\":2,\"digest\":%q},\n   \"layers\": [ {\"size\":50, \"digest\":%q,\"mediaType\":\"application/vnd.docker.image.rootfs.diff.tar.gzip\"} ],\"unknown\":{\"kept\":[1,2.50,null]} }\n\n",
			kind, config.Digest, layer.Digest)
	}
	child := manifest(dockerManifest)
	list := func(kind string) []byte {
		return fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"manifests":[{"mediaType":%q,"size":%d,"digest":%q,"platform":{"os":"linux","architecture":"amd64"}}]} `,
			kind, dockerManifest, len(child), digest.FromBytes(child))
	}
	large := bytes.Replace(manifest(ociManifest), []byte(`"kept"`), []byte(`"`+strings.Repeat("k", 100<<10)+`"`), 1)
	for i, c := range []struct {
		kind string
		data []byte
	}{{dockerManifest, child}, {ociManifest, manifest(ociManifest)}, {dockerList, list(dockerList)}, {ociIndex, list(ociIndex)}, {ociManifest, large}} {
		path := fmt.Sprintf("/v2/app/manifests/t%d", i)
		n.do("PUT", path, c.data, "Content-Type", c.kind+"; charset=utf-8").want(201)
		a := n.do("GET", path, nil).want(200).has("Content-Type", c.kind)
		if !bytes.Equal(a.body, c.data) {
			t.Errorf("%d: %s came back changed", i, c.kind)
		}
	}
}

// "Pulling blobs", with the ranges of RFC 9110, section 14.
func TestPullBlob(t *testing.T) {
	n := single(t)
	data := random(1 << 20)
	d := n.pushBlob("app", data).Digest
	path := "/v2/app/blobs/" + d.String()
	a := n.do("GET", path, nil).want(200).has("Content-Length", "1048576", "Docker-Content-Digest", d.String(), "Content-Type", "application/octet-stream", "Accept-Ranges", "bytes")
	if !bytes.Equal(a.body, data) {
		t.Error("the blob changed")
	}
	n.do("HEAD", path, nil).want(200).has("Content-Length", "1048576", "Docker-Content-Digest", d.String())
	n.do("GET", path, nil, "If-None-Match", `"`+d.String()+`"`).want(304)
	for spec, want := range map[string]string{
		"bytes=0-0":             "bytes 0-0/1048576",
		"bytes=500-1499":        "bytes 500-1499/1048576",
		"bytes=1048570-":        "bytes 1048570-1048575/1048576",
		"bytes=-10":             "bytes 1048566-1048575/1048576",
		"bytes=1048000-9999999": "bytes 1048000-1048575/1048576",
	} {
		var from, to int
		if _, err := fmt.Sscanf(want, "bytes %d-%d/", &from, &to); err != nil {
			t.Fatal(err)
		}
		a := n.do("GET", path, nil, "Range", spec).want(206).has("Content-Range", want, "Content-Length", strconv.Itoa(to-from+1))
		if !bytes.Equal(a.body, data[from:to+1]) {
			t.Errorf("%s gave other bytes", spec)
		}
	}
	a = n.do("GET", path, nil, "Range", "bytes=0-9,100-109,-5").want(206)
	if kind := a.header.Get("Content-Type"); !strings.HasPrefix(kind, "multipart/byteranges; boundary=") {
		t.Errorf("several ranges came as %s", kind)
	}
	for _, part := range [][]byte{data[:10], data[100:110], data[len(data)-5:]} {
		if !bytes.Contains(a.body, part) {
			t.Error("a range is missing")
		}
	}
	n.do("GET", path, nil, "Range", "bytes=0-9", "If-Range", `"sha256:other"`).want(200)
	n.do("GET", path, nil, "Range", "bytes=2000000-").want(416, "RANGE_INVALID").has("Content-Range", "bytes */1048576")

	n.do("GET", "/v2/app/blobs/"+digest.FromString("other").String(), nil).want(404, "BLOB_UNKNOWN")
	n.do("GET", "/v2/app/blobs/sha256:bad", nil).want(400, "DIGEST_INVALID")
	n.do("GET", "/v2/app/blobs/md5:d41d8cd98f00b204e9800998ecf8427e", nil).want(400, "DIGEST_INVALID")
	// A blob is there only for the repositories that link it.
	n.pushBlob("other", random(10))
	n.do("GET", "/v2/other/blobs/"+d.String(), nil).want(404, "BLOB_UNKNOWN")
	n.do("HEAD", "/v2/other/blobs/"+d.String(), nil).want(404)
}

// "Pushing blobs": "Pushing a blob monolithically" in both ways.
func TestPushMonolithic(t *testing.T) {
	n := single(t)
	for _, data := range [][]byte{random(1000), {}, []byte("{}")} {
		d := digest.FromBytes(data)
		for _, name := range []string{"app", "team/deep/er/app"} {
			start := n.do("POST", "/v2/"+name+"/blobs/uploads/", nil).want(202).has("Range", "0-0", "Content-Length", "0")
			done := n.do("PUT", start.location()+"?digest="+d.String(), data, "Content-Type", "application/octet-stream").want(201)
			done.has("Location", "/v2/"+name+"/blobs/"+d.String(), "Docker-Content-Digest", d.String())
			if got := n.do("GET", done.location(), nil).want(200); !bytes.Equal(got.body, data) {
				t.Error("another blob came back")
			}
			n.do("GET", start.location(), nil).want(404, "BLOB_UPLOAD_UNKNOWN")
		}
		at := n.do("POST", "/v2/single/blobs/uploads/?digest="+d.String(), data).want(201).location()
		n.do("GET", at, nil).want(200)
	}
	// The project of a push is made, and private.
	p, ok, err := n.site.projects.Lookup(t.Context(), "team")
	if err != nil || !ok || p.Public {
		t.Errorf("project %+v, %v, %v", p, ok, err)
	}
}

// "Pushing a blob in chunks".
func TestPushChunked(t *testing.T) {
	n := single(t)
	data := random(30000)
	d := digest.FromBytes(data)
	at := n.do("POST", "/v2/app/blobs/uploads/", nil, "Content-Length", "0").want(202).location()
	at = n.do("PATCH", at, data[:10000], "Content-Range", "0-9999").want(202).has("Range", "0-9999").location()
	n.do("GET", at, nil).want(204).has("Range", "0-9999", "Location", at)

	for _, wrong := range []string{"0-9999", "20000-29999", "9999-19998"} {
		n.do("PATCH", at, data[:10000], "Content-Range", wrong).want(416, "RANGE_INVALID").has("Range", "0-9999", "Location", at)
		n.do("PUT", at+"?digest="+d.String(), data[:10000], "Content-Range", wrong).want(416, "RANGE_INVALID").has("Range", "0-9999")
	}
	n.do("PATCH", at, data[:10], "Content-Range", "10000-10000").want(400, "SIZE_INVALID")
	for _, wrong := range []string{"10000", "a-b", "10000-9000", "-5", "1-99999999999999999999999"} {
		n.do("PATCH", at, data[:10], "Content-Range", wrong).want(400, "BLOB_UPLOAD_INVALID")
	}
	at = n.do("PATCH", at, data[10000:20000], "Content-Range", "10000-19999").want(202).has("Range", "0-19999").location()
	n.do("PUT", at+"?digest="+d.String(), data[20000:], "Content-Range", "20000-29999").want(201)
	if a := n.do("GET", "/v2/app/blobs/"+d.String(), nil).want(200); !bytes.Equal(a.body, data) {
		t.Error("the pieces were put together wrongly")
	}

	// A stream without Content-Range, in several pieces, some of unknown length.
	at = n.do("POST", "/v2/other/blobs/uploads/", nil).want(202).location()
	at = n.do("PATCH", at, data[:7]).want(202).has("Range", "0-6").location()
	r, err := http.NewRequest("PATCH", n.url+at, struct{ *bytes.Reader }{bytes.NewReader(data[7:])})
	must(t, err)
	r.ContentLength = -1
	r.SetBasicAuth("admin", password)
	at = n.send(r).want(202).has("Range", "0-29999").location()
	n.do("PUT", at+"?digest="+d.String(), nil).want(201)

	// "Cancel a blob upload".
	at = n.do("POST", "/v2/app/blobs/uploads/", nil).want(202).location()
	n.do("DELETE", at, nil).want(204)
	n.do("GET", at, nil).want(404, "BLOB_UPLOAD_UNKNOWN")
	n.do("PATCH", at, data).want(404, "BLOB_UPLOAD_UNKNOWN")
	n.do("PUT", at+"?digest="+d.String(), data).want(404, "BLOB_UPLOAD_UNKNOWN")
	n.do("DELETE", at, nil).want(404, "BLOB_UPLOAD_UNKNOWN")
}

// "Mounting a blob from another repository".
func TestMount(t *testing.T) {
	n := single(t)
	data := random(100)
	d := n.pushBlob("source/app", data).Digest.String()
	n.do("POST", "/v2/target/app/blobs/uploads/?mount="+d+"&from=source/app", nil).want(201).has("Location", "/v2/target/app/blobs/"+d, "Docker-Content-Digest", d)
	n.do("GET", "/v2/target/app/blobs/"+d, nil).want(200)
	// From where it is not: an upload begins.
	for _, from := range []string{"source/none", "none/app", "BAD", "app"} {
		at := n.do("POST", "/v2/third/app/blobs/uploads/?mount="+d+"&from="+from, nil).want(202).location()
		n.do("PUT", at+"?digest="+digest.FromString("else").String(), []byte("else")).want(201)
	}
	n.do("HEAD", "/v2/third/app/blobs/"+d, nil).want(404)
	missing := digest.FromString("missing").String()
	n.do("POST", "/v2/third/app/blobs/uploads/?mount="+missing+"&from=source/app", nil).want(202)
	n.do("POST", "/v2/third/app/blobs/uploads/?mount="+missing, nil).want(202)
	n.do("POST", "/v2/third/app/blobs/uploads/?mount=bad&from=source/app", nil).want(400, "DIGEST_INVALID")
	// Without a source, wherever the user may pull it.
	n.do("POST", "/v2/third/app/blobs/uploads/?mount="+d, nil).want(201)
	n.do("GET", "/v2/third/app/blobs/"+d, nil).want(200)

	// A token has to reach the source as well.
	var got struct{ Token string }
	n.do("GET", "/service/token?service=harbor-registry&scope=repository:fourth/app:pull,push", nil).want(200).decode(&got)
	a := n.do("POST", "/v2/fourth/app/blobs/uploads/?mount="+d+"&from=source/app", nil, "Authorization", "Bearer "+got.Token).want(401, "UNAUTHORIZED")
	if c := a.header.Get("WWW-Authenticate"); !strings.Contains(c, `scope="repository:fourth/app:pull,push repository:source/app:pull"`) {
		t.Errorf("challenge %q", c)
	}
	n.do("POST", "/v2/fourth/app/blobs/uploads/?mount="+d, nil, "Authorization", "Bearer "+got.Token).want(202)
	n.do("GET", "/service/token?service=harbor-registry&scope=repository:fourth/app:pull,push&scope=repository:source/app:pull", nil).want(200).decode(&got)
	n.do("POST", "/v2/fourth/app/blobs/uploads/?mount="+d+"&from=source/app", nil, "Authorization", "Bearer "+got.Token).want(201)
}

// "Pushing Manifests", "Pushing Manifests with Subject".
func TestPushManifest(t *testing.T) {
	n := single(t)
	config := n.pushBlob("app", []byte("{}"))
	manifest := image(config, nil, n.pushBlob("app", random(10)))
	d := digest.FromBytes(manifest)
	n.do("PUT", "/v2/app/manifests/v1", manifest, "Content-Type", ociManifest).want(201).
		has("Location", "/v2/app/manifests/"+d.String(), "Docker-Content-Digest", d.String(), "Atoll-Copies", "2")
	n.do("PUT", "/v2/app/manifests/v1", manifest, "Content-Type", ociManifest).want(201) // again
	n.do("PUT", "/v2/app/manifests/"+d.String(), manifest).want(201)                     // names its own type

	// By digest, with tags.
	a := n.do("PUT", "/v2/app/manifests/"+d.String()+"?tag=a&tag=b", manifest, "Content-Type", ociManifest).want(201)
	if tags := a.header.Values("OCI-Tag"); strings.Join(tags, ",") != "a,b" {
		t.Errorf("OCI-Tag %v", tags)
	}
	n.do("GET", "/v2/app/manifests/b", nil).want(200)
	n.do("PUT", "/v2/app/manifests/"+d.String()+"?tag=-", manifest).want(400, "TAG_INVALID")
	n.do("PUT", "/v2/app/manifests/"+d.String()+"?tag=a"+strings.Repeat("&tag=a", 40), manifest).want(414)

	// The subject need not be here.
	subject := v1.Descriptor{MediaType: ociManifest, Digest: digest.FromString("later"), Size: 5}
	n.do("PUT", "/v2/app/manifests/signed", image(config, &subject), "Content-Type", ociManifest).want(201).has("OCI-Subject", subject.Digest.String())
}

// "Listing Tags".
func TestListTags(t *testing.T) {
	n := single(t)
	manifest := n.pushImage("app", "t00")
	for i := 1; i < 25; i++ {
		n.do("PUT", fmt.Sprintf("/v2/app/manifests/t%02d", i), manifest, "Content-Type", ociManifest).want(201)
	}
	type list struct {
		Name string
		Tags []string
	}
	var all list
	n.do("GET", "/v2/app/tags/list", nil).want(200).has("Content-Type", "application/json; charset=utf-8").decode(&all)
	if all.Name != "app" || len(all.Tags) != 25 || all.Tags[0] != "t00" || all.Tags[24] != "t24" {
		t.Fatalf("got %+v", all)
	}
	var same list
	n.do("GET", "/v2/library/app/tags/list", nil).want(200).decode(&same)
	if same.Name != "library/app" || len(same.Tags) != 25 {
		t.Errorf("under its full name: %+v", same)
	}
	var walked []string
	for path, pages := "/v2/app/tags/list?n=10", 0; path != ""; pages++ {
		var page list
		a := n.do("GET", path, nil).want(200)
		a.decode(&page)
		walked = append(walked, page.Tags...)
		path = ""
		if link := a.header.Get("Link"); link != "" {
			path, _, _ = strings.Cut(strings.TrimPrefix(link, "<"), ">; rel=\"next\"")
		}
		if pages > 3 {
			t.Fatal("pages do not end")
		}
	}
	if strings.Join(walked, ",") != strings.Join(all.Tags, ",") {
		t.Errorf("pages gave %v", walked)
	}
	for query, want := range map[string]string{
		"?n=0": "", "?n=2&last=t03": "t04,t05", "?last=t22": "t23,t24", "?n=5&last=zz": "", "?n=99999999999": strings.Join(all.Tags, ","),
		"?n=25": strings.Join(all.Tags, ","),
	} {
		var page list
		a := n.do("GET", "/v2/app/tags/list"+query, nil).want(200)
		a.decode(&page)
		if page.Tags == nil || strings.Join(page.Tags, ",") != want || query != "?n=2&last=t03" && a.header.Get("Link") != "" {
			t.Errorf("%s gave %v, Link %q", query, page.Tags, a.header.Get("Link"))
		}
	}
	n.do("GET", "/v2/app/tags/list?n=-1", nil).want(400, "PAGINATION_NUMBER_INVALID")
	n.do("GET", "/v2/app/tags/list?n=x", nil).want(400, "PAGINATION_NUMBER_INVALID")
	n.do("GET", "/v2/none/tags/list", nil).want(404, "NAME_UNKNOWN")
	n.do("GET", "/v2/none/tags/list?n=0", nil).want(404, "NAME_UNKNOWN")
}

func TestCatalog(t *testing.T) {
	n := single(t)
	for _, name := range []string{"app", "team/b", "team/a/deep"} {
		n.pushImage(name, "v1")
	}
	var got struct{ Repositories []string }
	n.do("GET", "/v2/_catalog", nil).want(200).decode(&got)
	if strings.Join(got.Repositories, " ") != "library/app team/a/deep team/b" {
		t.Errorf("got %v", got.Repositories)
	}
	a := n.do("GET", "/v2/_catalog?n=2", nil).want(200).has("Link", `</v2/_catalog?last=team%2Fa%2Fdeep&n=2>; rel="next"`)
	a.decode(&got)
	n.do("GET", "/v2/_catalog?last=team%2Fa%2Fdeep&n=2", nil).want(200).decode(&got)
	if strings.Join(got.Repositories, " ") != "team/b" {
		t.Errorf("second page %v", got.Repositories)
	}
}

// "Listing Referrers".
func TestReferrers(t *testing.T) {
	n := single(t)
	subjectBytes := n.pushImage("app", "v1")
	subject := v1.Descriptor{MediaType: ociManifest, Digest: digest.FromBytes(subjectBytes), Size: int64(len(subjectBytes))}
	empty := n.pushBlob("app", []byte("{}"))
	var pushed []digest.Digest
	for i, kind := range []string{"application/vnd.example.sbom", "application/vnd.example.sbom", "application/vnd.example.signature"} {
		m := v1.Manifest{MediaType: ociManifest, ArtifactType: kind, Config: empty, Layers: []v1.Descriptor{}, Subject: &subject, Annotations: map[string]string{"n": strconv.Itoa(i)}}
		m.Config.MediaType = v1.MediaTypeEmptyJSON
		m.SchemaVersion = 2
		data, err := json.Marshal(m)
		must(t, err)
		d := digest.FromBytes(data)
		n.do("PUT", "/v2/app/manifests/"+d.String(), data, "Content-Type", ociManifest).want(201).has("OCI-Subject", subject.Digest.String())
		pushed = append(pushed, d)
	}
	list := func(path string) (v1.Index, *answer) {
		var index v1.Index
		a := n.do("GET", path, nil).want(200).has("Content-Type", ociIndex)
		a.decode(&index)
		if index.SchemaVersion != 2 || index.MediaType != ociIndex || index.Manifests == nil {
			t.Errorf("%s is no index: %s", path, a.body)
		}
		return index, a
	}
	path := "/v2/app/referrers/" + subject.Digest.String()
	index, a := list(path)
	if len(index.Manifests) != 3 || a.header.Get("OCI-Filters-Applied") != "" {
		t.Fatalf("got %s", a.body)
	}
	for _, m := range index.Manifests {
		if m.MediaType != ociManifest || m.Size == 0 || m.ArtifactType == "" || m.Annotations["n"] == "" {
			t.Errorf("descriptor %+v", m)
		}
	}
	index, a = list(path + "?artifactType=application/vnd.example.signature")
	a.has("OCI-Filters-Applied", "artifactType")
	if len(index.Manifests) != 1 || index.Manifests[0].Digest != pushed[2] {
		t.Errorf("filtered: %s", a.body)
	}
	index, a = list(path + "?n=2")
	next, _, _ := strings.Cut(strings.TrimPrefix(a.header.Get("Link"), "<"), ">")
	rest, _ := list(next)
	if len(index.Manifests) != 2 || len(rest.Manifests) != 1 {
		t.Errorf("pages of %d and %d", len(index.Manifests), len(rest.Manifests))
	}
	// Never 404, so that no client falls back to tags.
	for _, path := range []string{"/v2/app/referrers/", "/v2/none/referrers/", "/v2/none/none/referrers/"} {
		if index, _ := list(path + digest.FromString("unknown").String()); len(index.Manifests) != 0 {
			t.Errorf("%s has referrers", path)
		}
	}
	n.do("GET", "/v2/app/referrers/v1", nil).want(400, "DIGEST_INVALID")
	// Deleting one takes it off the list.
	n.do("DELETE", "/v2/app/manifests/"+pushed[0].String(), nil).want(202)
	if index, _ := list(path); len(index.Manifests) != 2 {
		t.Errorf("%d referrers after a deletion", len(index.Manifests))
	}
}

// "Content Management": deleting tags, manifests and blobs.
func TestDelete(t *testing.T) {
	n := single(t)
	manifest := n.pushImage("app", "v1")
	d := digest.FromBytes(manifest).String()
	n.do("PUT", "/v2/app/manifests/v2", manifest, "Content-Type", ociManifest).want(201)
	var m v1.Manifest
	must(t, json.Unmarshal(manifest, &m))
	layer := "/v2/app/blobs/" + m.Layers[0].Digest.String()

	n.do("DELETE", layer, nil).want(405, "UNSUPPORTED")
	n.do("GET", layer, nil).want(200)

	n.do("DELETE", "/v2/app/manifests/v1", nil).want(202)
	n.do("GET", "/v2/app/manifests/v1", nil).want(404, "MANIFEST_UNKNOWN")
	n.do("GET", "/v2/app/manifests/v2", nil).want(200)
	n.do("DELETE", "/v2/app/manifests/v1", nil).want(404, "MANIFEST_UNKNOWN")

	n.do("DELETE", "/v2/app/manifests/"+d, nil).want(202)
	for _, reference := range []string{d, "v2"} {
		n.do("GET", "/v2/app/manifests/"+reference, nil).want(404, "MANIFEST_UNKNOWN")
	}
	n.do("DELETE", "/v2/app/manifests/"+d, nil).want(404, "MANIFEST_UNKNOWN")

	n.do("DELETE", layer, nil).want(202)
	n.do("GET", layer, nil).want(404, "BLOB_UNKNOWN")
	n.do("DELETE", layer, nil).want(404, "BLOB_UNKNOWN")
	n.do("DELETE", "/v2/none/app/manifests/v1", nil).want(404, "NAME_UNKNOWN")
	// Another repository's view is its own.
	n.pushBlob("other", []byte("shared"))
	n.pushBlob("app", []byte("shared"))
	shared := digest.FromString("shared").String()
	n.do("DELETE", "/v2/app/blobs/"+shared, nil).want(202)
	n.do("GET", "/v2/other/blobs/"+shared, nil).want(200)
}

// Gates are asked on every way in and out, and their words reach the client.
func TestGates(t *testing.T) {
	n := single(t)
	manifest := n.pushImage("app", "v1")
	n.site.gates.refuse(nil, fault.New(fault.Precondition, "scan it first").WithCode("PROJECTPOLICYVIOLATION"))
	n.do("GET", "/v2/app/manifests/v1", nil).want(412, "PROJECTPOLICYVIOLATION")
	n.site.gates.refuse(fault.New(fault.Denied, "the project's quota is used up"), nil)
	n.do("PUT", "/v2/app/manifests/v2", manifest, "Content-Type", ociManifest).want(403, "DENIED")
	n.site.gates.refuse(nil, nil)
	n.do("GET", "/v2/app/manifests/v1", nil).want(200)
	n.do("GET", "/v2/app/manifests/v2", nil).want(404, "MANIFEST_UNKNOWN")
}
