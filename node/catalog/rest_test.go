package catalog_test

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/project"
	"github.com/atoll-registry/atoll/node/rest"
)

// byHeader takes the header As for who asks.
type byHeader struct{}

func (byHeader) Authenticate(r *http.Request) (access.Principal, error) {
	switch name := r.Header.Get("As"); name {
	case "":
		return access.Principal{}, nil
	default:
		return access.Principal{Kind: access.User, Name: name, Admin: name == "admin"}, nil
	}
}

type api struct {
	*site
	handler http.Handler
}

func newAPI(t *testing.T) *api {
	s := newSite(t, "site-a")
	k, err := rest.New(rest.Config{
		Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(), Authenticator: byHeader{}, Guard: s.projects, Version: "test",
	})
	must(t, err)
	s.projects.Operations(k)
	s.catalog.Operations(k)
	return &api{s, k.Handler()}
}

func (a *api) do(as, method, path string, body any) *httptest.ResponseRecorder {
	a.t.Helper()
	var in strings.Builder
	if body != nil {
		in.Write(encode(a.t, body))
	}
	r := httptest.NewRequest(method, path, strings.NewReader(in.String()))
	r.Header.Set("As", as)
	w := httptest.NewRecorder()
	a.handler.ServeHTTP(w, r)
	return w
}

func (a *api) want(status int, w *httptest.ResponseRecorder) *httptest.ResponseRecorder {
	a.t.Helper()
	if w.Code != status {
		a.t.Fatalf("status %d, want %d: %s", w.Code, status, w.Body)
	}
	return w
}

func (a *api) get(path string, into any) *httptest.ResponseRecorder {
	a.t.Helper()
	w := a.want(http.StatusOK, a.do("admin", "GET", path, nil))
	must(a.t, json.Unmarshal(w.Body.Bytes(), into))
	return w
}

func TestRepositoryOperations(t *testing.T) {
	a := newAPI(t)
	_, err := a.projects.Create(t.Context(), project.Draft{Name: "hidden"})
	must(t, err)
	for _, r := range []string{"app", "deep/er/app", "web"} {
		a.mustPush(r, "v1", a.image(r, "one"))
	}
	var list []struct {
		ID            int64  `json:"id"`
		ProjectID     int64  `json:"project_id"`
		Name          string `json:"name"`
		ArtifactCount int    `json:"artifact_count"`
	}
	w := a.get("/api/v2.0/projects/library/repositories?page_size=2", &list)
	if len(list) != 2 || list[0].Name != "library/app" || list[0].ArtifactCount != 1 || list[0].ID == 0 || w.Header().Get("X-Total-Count") != "3" {
		t.Fatalf("list is %+v, %v", list, w.Header())
	}
	if link := w.Header().Get("Link"); !strings.HasPrefix(link, "</api/v2.0/projects/library/repositories?page=2") {
		t.Fatalf("link is %q", link)
	}
	a.get("/api/v2.0/projects/library/repositories?q=name%3D~deep", &list)
	if len(list) != 1 || list[0].Name != "library/deep/er/app" {
		t.Fatalf("list is %+v", list)
	}
	var one struct{ Name string }
	for _, name := range []string{"deep%2Fer%2Fapp", "deep%252Fer%252Fapp"} {
		a.get("/api/v2.0/projects/library/repositories/"+name, &one)
		if one.Name != "library/deep/er/app" {
			t.Fatalf("%s is %+v", name, one)
		}
	}
	layer := digest.FromString("layer one").String()
	a.get("/api/v2.0/repositories?q=blob_digest="+layer+"&page_size=1&page_number=1", &list)
	if len(list) != 1 {
		t.Fatalf("a mountable blob is in %+v", list)
	}
	a.get("/api/v2.0/repositories?q=blob_digest="+digest.FromString("nowhere").String(), &list)
	if len(list) != 0 {
		t.Fatalf("an unknown blob is in %+v", list)
	}
	a.want(http.StatusNotFound, a.do("admin", "GET", "/api/v2.0/projects/library/repositories/none", nil))
	a.want(http.StatusNotFound, a.do("admin", "GET", "/api/v2.0/projects/none/repositories", nil))
	a.want(http.StatusUnauthorized, a.do("", "DELETE", "/api/v2.0/projects/library/repositories/web", nil))
	a.want(http.StatusForbidden, a.do("eve", "DELETE", "/api/v2.0/projects/library/repositories/web", nil))
	a.want(http.StatusForbidden, a.do("eve", "GET", "/api/v2.0/projects/hidden/repositories", nil))
	a.want(http.StatusOK, a.do("", "GET", "/api/v2.0/projects/library/repositories", nil))
	a.want(http.StatusOK, a.do("admin", "DELETE", "/api/v2.0/projects/library/repositories/deep%252Fer%252Fapp", nil))
	a.want(http.StatusNotFound, a.do("admin", "GET", "/api/v2.0/projects/library/repositories/deep%252Fer%252Fapp", nil))
}

func TestArtifactOperations(t *testing.T) {
	a := newAPI(t)
	child := a.mustPush("app", "v1", a.image("app", "one"))
	d := describe(child)
	d.Platform = &v1.Platform{OS: "linux", Architecture: "arm64"}
	index := v1.Index{MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{d}}
	index.SchemaVersion = 2
	parent := a.mustPush("app", "multi", encode(t, index))
	a.mustPush("app", "", a.image("app", "signature", subject(describe(child)), kind("application/vnd.dev.cosign.artifact.sig.v1+json")))

	type artifact struct {
		ID         int64
		Type       string
		Digest     string
		Tags       []struct{ Name string }
		References []struct {
			ChildDigest string `json:"child_digest"`
			Platform    struct{ Architecture string }
		}
		Accessories []struct{ Type string }
	}
	const under = "/api/v2.0/projects/library/repositories/app/artifacts"
	var list []artifact
	a.get(under+"?with_accessory=true", &list)
	if len(list) != 2 {
		t.Fatalf("an accessory is listed by itself: %+v", list)
	}
	for _, x := range list {
		switch x.Digest {
		case parent.Digest.String():
			if x.Type != "IMAGE" || len(x.References) != 1 || x.References[0].Platform.Architecture != "arm64" {
				t.Errorf("index is %+v", x)
			}
		case child.Digest.String():
			if diff := cmp.Diff([]struct{ Type string }{{"signature.cosign"}}, x.Accessories); diff != "" || x.Tags[0].Name != "v1" {
				t.Errorf("image is %+v: %s", x, diff)
			}
		}
	}
	a.get(under+"?q=tags%3Dmulti", &list)
	if len(list) != 1 || list[0].Digest != parent.Digest.String() {
		t.Fatalf("q=tags gave %+v", list)
	}
	var one artifact
	a.get(under+"/"+child.Digest.String()+"?with_tag=false", &one)
	if one.ID != child.ID || one.Tags != nil {
		t.Fatalf("artifact is %+v", one)
	}

	w := a.want(http.StatusCreated, a.do("admin", "POST", under+"/v1/tags", map[string]string{"name": "stable"}))
	if got := w.Header().Get("Location"); got != "/api/v2.0/projects/library/repositories/app/artifacts/v1/tags/stable" {
		t.Fatalf("location is %q", got)
	}
	a.want(http.StatusConflict, a.do("admin", "POST", under+"/v1/tags", map[string]string{"name": "stable"}))
	var tags []struct{ Name string }
	a.get(under+"/v1/tags", &tags)
	if len(tags) != 2 {
		t.Fatalf("tags are %+v", tags)
	}
	a.want(http.StatusNotFound, a.do("admin", "DELETE", under+"/multi/tags/stable", nil))
	a.want(http.StatusOK, a.do("admin", "DELETE", under+"/v1/tags/stable", nil))
	a.want(http.StatusPreconditionFailed, a.do("admin", "DELETE", under+"/v1", nil))
	a.want(http.StatusOK, a.do("admin", "DELETE", under+"/multi", nil))
	a.want(http.StatusOK, a.do("admin", "DELETE", under+"/v1", nil))
	a.want(http.StatusNotFound, a.do("admin", "GET", under+"/v1", nil))
}

// The answers have the keys of a real Harbor's, with the same JSON types, except
// for what belongs to rooms that are not there yet.
func TestShapesAreHarbors(t *testing.T) {
	a := newAPI(t)
	a.mustPush("app", "v1", a.image("app", "one"))
	const artifacts = "/api/v2.0/projects/library/repositories/app/artifacts"
	for _, c := range []struct{ path, keys string }{
		{"/api/v2.0/projects", "creation_time current_user_role_id current_user_role_ids cve_allowlist metadata name owner_id owner_name project_id repo_count update_time"},
		{"/api/v2.0/projects/library", "creation_time current_user_role_id current_user_role_ids cve_allowlist metadata name owner_id owner_name project_id repo_count update_time"},
		{"/api/v2.0/projects/library/summary", "project_admin_count quota repo_count"},
		{"/api/v2.0/repositories", "artifact_count creation_time id name project_id pull_count update_time"},
		{"/api/v2.0/projects/library/repositories/app", "artifact_count creation_time description id name project_id pull_count update_time"},
		{artifacts, "accessories addition_links artifact_type digest extra_attrs icon id labels manifest_media_type media_type project_id pull_time push_time references repository_id repository_name size tags type"},
		{artifacts + "/v1", "accessories addition_links artifact_type digest extra_attrs icon id labels manifest_media_type media_type project_id pull_time push_time references repository_id repository_name size tags type"},
		{artifacts + "/v1/tags", "artifact_id id immutable name pull_time push_time repository_id"},
	} {
		var got any
		a.get(c.path, &got)
		if list, ok := got.([]any); ok {
			if len(list) != 1 {
				t.Fatalf("%s: %d items", c.path, len(list))
			}
			got = list[0]
		}
		for key := range strings.FieldsSeq(c.keys) {
			if _, ok := got.(map[string]any)[key]; !ok {
				t.Errorf("%s: no %s", c.path, key)
			}
		}
	}
}

func TestStaleAbsenceIsUnavailable(t *testing.T) {
	a := newAPI(t)
	body := a.image("app", "one")
	a.mustPush("app", "v1", body)
	a.backend.SetLeader(false)
	_, fresh, err := a.catalog.Resolve(t.Context(), "library", "app", "v1")
	must(t, err)
	if !fresh.Stale {
		t.Error("the answer does not say that it is unconfirmed")
	}
	a.want(http.StatusServiceUnavailable, a.do("admin", "GET", "/api/v2.0/projects/library/repositories/none", nil))
	a.want(http.StatusServiceUnavailable, a.do("admin", "GET", "/api/v2.0/projects/none/repositories", nil))
	_, _, err = a.catalog.Referrers(t.Context(), catalog.Referrers{Project: "library", Repository: "app", Subject: digest.FromBytes(body)})
	wantKind(t, err, fault.Unavailable, "")
}

func FuzzParseManifest(f *testing.F) {
	for _, seed := range []string{
		`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}`,
		`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`,
		`{"schemaVersion":1}`, `[]`, `{"a":{"a":[[[]]]}}`, `{"schemaVersion":2,"schemaVersion":2}`, `{"Config":1}`, "",
	} {
		f.Add("", []byte(seed))
		f.Add(v1.MediaTypeImageManifest, []byte(seed))
	}
	if corpus, err := os.ReadFile("document.go"); err == nil {
		f.Add(v1.MediaTypeImageIndex, corpus)
	}
	f.Fuzz(func(t *testing.T, mediaType string, body []byte) {
		doc, err := catalog.ParseManifest(mediaType, body)
		if err != nil {
			return
		}
		for _, d := range append(doc.Blobs(), doc.Children...) {
			if d.Digest.Validate() != nil || d.Size < 0 || d.MediaType == "" {
				t.Fatalf("admitted %+v", d)
			}
		}
		again, err := catalog.ParseManifest(doc.MediaType, body)
		if err != nil || again.MediaType != doc.MediaType {
			t.Fatalf("under its own media type: %v", err)
		}
	})
}

func TestParseManifestRefusals(t *testing.T) {
	const empty = `{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2}`
	image := func(rest string) string { return `{"schemaVersion":2,"config":` + empty + rest + `}` }
	for _, c := range []struct{ name, mediaType, body, says string }{
		{"schema 1", "application/vnd.docker.distribution.manifest.v1+prettyjws", `{"schemaVersion":1}`, "schema 1"},
		{"schema 1 by body", v1.MediaTypeImageManifest, `{"schemaVersion":1}`, "schema 1"},
		{"another type in the body", v1.MediaTypeImageManifest, `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json"}`, "calls itself"},
		{"no type at all", "", image(""), "Content-Type"},
		{"unknown type", "text/plain", image(""), "not taken"},
		{"image and index", v1.MediaTypeImageManifest, image(`,"manifests":[]`), "both"},
		{"index and image", v1.MediaTypeImageIndex, `{"schemaVersion":2,"manifests":[],"layers":[]}`, "layers"},
		{"doubled field", v1.MediaTypeImageManifest, image(`,"config":` + empty), "twice"},
		{"doubled field in a descriptor", v1.MediaTypeImageManifest, image(`,"layers":[{"digest":"a","digest":"b"}]`), "twice"},
		{"field in another case", v1.MediaTypeImageManifest, image(`,"Layers":[]`), "must be written"},
		{"more than one value", v1.MediaTypeImageManifest, image("") + "{}", "after top-level"},
		{"too deep", v1.MediaTypeImageManifest, strings.Repeat("[", 100) + strings.Repeat("]", 100), "deep"},
		{"no config", v1.MediaTypeImageManifest, `{"schemaVersion":2,"layers":[]}`, "no config"},
		{"bad digest", v1.MediaTypeImageManifest, image(`,"layers":[{"mediaType":"a/b","digest":"sha256:x","size":1}]`), "not a digest"},
		{"negative size", v1.MediaTypeImageManifest, image(`,"layers":[{"mediaType":"a/b","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":-1}]`), "size"},
		{"truncated", v1.MediaTypeImageManifest, `{"schemaVersion":2`, "JSON"},
		{"too large", v1.MediaTypeImageManifest, strings.Repeat(" ", catalog.MaxManifest+1), "at most"},
	} {
		_, err := catalog.ParseManifest(c.mediaType, []byte(c.body))
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", c.name, err, c.says)
		}
	}
	doc, err := catalog.ParseManifest(v1.MediaTypeImageManifest+"; charset=utf-8", []byte(image("")))
	if err != nil || doc.ArtifactType != "application/vnd.oci.empty.v1+json" {
		t.Errorf("a parameter after the media type: %+v, %v", doc, err)
	}
}
