package registry_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Conditional requests (RFC 9110, section 13) for content that never changes and
// for tags, which do.
func TestConditionalRequests(t *testing.T) {
	s := newSite(t)
	n, other := s.start("n1", t.TempDir()), s.start("n2", t.TempDir())
	manifest := n.pushImage("app", "v1")
	blob := n.pushBlob("app", random(100))
	for _, c := range []struct {
		at   *node
		path string
		tag  string
	}{
		{n, "/v2/app/manifests/v1", digest.FromBytes(manifest).String()},
		{n, "/v2/app/manifests/" + digest.FromBytes(manifest).String(), digest.FromBytes(manifest).String()},
		{n, "/v2/app/blobs/" + blob.Digest.String(), blob.Digest.String()},
		{other, "/v2/app/blobs/" + blob.Digest.String(), blob.Digest.String()}, // which does not hold it
	} {
		tag := strconv.Quote(c.tag)
		for _, condition := range []string{tag, "W/" + tag, `"other", ` + tag, "*"} {
			for _, method := range []string{"GET", "HEAD"} {
				a := c.at.do(method, c.path, nil, "If-None-Match", condition).want(304).has("Etag", tag, "Docker-Content-Digest", c.tag)
				if len(a.body) > 0 || a.header.Get("Content-Length") != "" {
					t.Errorf("%s: 304 with %q %v", c.path, a.body, a.header)
				}
			}
		}
		for _, condition := range []string{`"other"`, strings.Trim(tag, `"`), ""} {
			c.at.do("GET", c.path, nil, "If-None-Match", condition).want(200).has("Etag", tag)
		}
		c.at.do("GET", c.path, nil, "If-Match", `"other"`).want(412)
		c.at.do("GET", c.path, nil, "If-Match", tag).want(200)
		c.at.do("GET", c.path, nil, "Range", "bytes=0-3", "If-Range", tag).want(206)
		c.at.do("GET", c.path, nil, "Range", "bytes=0-3", "If-Range", `"other"`).want(200)
	}
	n.pushImage("app", "v1")
	n.do("GET", "/v2/app/manifests/v1", nil, "If-None-Match", strconv.Quote(digest.FromBytes(manifest).String())).want(200)
	// Only those who may read learn whether they have the content.
	n.as("").do("GET", "/v2/app/blobs/"+blob.Digest.String(), nil, "If-None-Match", "*").want(401)
}

// What a gate holds back cannot be had blob by blob either.
func TestBlobsOfWithheldManifests(t *testing.T) {
	n := single(t)
	push := func(name, tag string, layers ...v1.Descriptor) {
		config := n.pushBlob(name, []byte("{}"))
		config.MediaType = v1.MediaTypeImageConfig
		n.do("PUT", "/v2/"+name+"/manifests/"+tag, image(config, nil, layers...), "Content-Type", ociManifest).want(201)
	}
	common, secret := n.pushBlob("app", random(100)), n.pushBlob("app", random(100))
	blob := func(name string, d v1.Descriptor) string { return "/v2/" + name + "/blobs/" + d.Digest.String() }
	n.do("GET", blob("app", secret), nil).want(200) // nothing names it yet
	n.site.gates.holding(true)
	push("app", "held", common, secret)
	n.site.gates.holding(false)
	n.do("GET", "/v2/app/manifests/held", nil).want(412, "DENIED")
	n.do("GET", blob("app", secret), nil).want(412, "DENIED")
	n.do("GET", blob("app", secret), nil, "Range", "bytes=0-1").want(412, "DENIED")
	n.do("GET", blob("app", secret), nil, "If-None-Match", "*").want(412, "DENIED")
	n.do("GET", blob("app", common), nil).want(412, "DENIED")
	n.do("HEAD", blob("app", secret), nil).want(200) // a push must know that it need not send it

	push("app", "open", common)
	n.do("GET", blob("app", common), nil).want(200)
	n.do("GET", blob("app", secret), nil).want(412, "DENIED")

	// Nor through another repository.
	n.do("POST", "/v2/other/blobs/uploads/?from=app&mount="+secret.Digest.String(), nil).want(202)
	n.do("POST", "/v2/other/blobs/uploads/?mount="+secret.Digest.String(), nil).want(202)
	n.do("POST", "/v2/other/blobs/uploads/?from=app&mount="+common.Digest.String(), nil).want(201)
	n.do("GET", blob("other", secret), nil).want(404)
}

// document is something pushed that must come back as it was.
type document struct {
	name, mediaType string
	body            string
	blobs           []string // contents that it names
	children        []string // documents that it names, pushed before it
	childType       string
}

func described(mediaType, content string, more ...string) string {
	return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d%s}`, mediaType, digest.FromString(content), len(content), strings.Join(more, ""))
}

// artifactOf is an image manifest with a config of some media type.
func artifactOf(configType, config, layerType, layer string, more ...string) string {
	return fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":%s,"layers":[%s]%s}`,
		ociManifest, described(configType, config), described(layerType, layer), strings.Join(more, ""))
}

// documents are what clients of all kinds push.
func documents() []document {
	const (
		dockerConfig = "application/vnd.docker.container.image.v1+json"
		dockerLayer  = "application/vnd.docker.image.rootfs.diff.tar.gzip"
		foreignLayer = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
		ociLayer     = v1.MediaTypeImageLayerGzip
		emptyType    = "application/vnd.oci.empty.v1+json"
	)
	config, layer := `{"architecture":"arm64","os":"linux"}`, "the layer's bytes"
	docker := fmt.Sprintf("{\n   \"schemaVersion\": 2,\n   \"mediaType\": %q,\n   \"config\": %s,\n   \"layers\": [\n      %s\n   ]\n}",
		dockerManifest, described(dockerConfig, config), described(dockerLayer, layer))
	oci := artifactOf(v1.MediaTypeImageConfig, config, ociLayer, layer)
	platform := `,"platform":{"architecture":"arm64","os":"linux","os.version":"10.0","variant":"v8","features":["x"]}`
	index := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[%s],"annotations":{"a":"b"}}`, ociIndex, described(ociManifest, oci, platform))
	subject := described(ociManifest, oci)
	sbom := artifactOf(emptyType, "{}", "application/spdx+json", `{"spdxVersion":"SPDX-2.3"}`, `,"artifactType":"application/spdx+json","subject":`, subject)
	all := []document{
		{name: "docker schema 2", mediaType: dockerManifest, body: docker, blobs: []string{config, layer}},
		{name: "docker manifest list", mediaType: dockerList, children: []string{docker}, childType: dockerManifest,
			body: fmt.Sprintf("{\"schemaVersion\":2,\"mediaType\":%q,\"manifests\":[%s]}\n", dockerList, described(dockerManifest, docker, platform))},
		{name: "docker foreign layer", mediaType: dockerManifest, blobs: []string{config},
			body: fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":%s,"layers":[%s]}`, dockerManifest, described(dockerConfig, config),
				described(foreignLayer, "never pushed", `,"urls":["https://example.com/layer"]`))},
		{name: "oci image", mediaType: ociManifest, body: oci, blobs: []string{config, layer}},
		{name: "oci image without mediaType", mediaType: ociManifest, blobs: []string{config, layer},
			body: fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":[%s]}`, described(v1.MediaTypeImageConfig, config), described(ociLayer, layer))},
		{name: "zstd layer", mediaType: ociManifest, body: artifactOf(v1.MediaTypeImageConfig, config, v1.MediaTypeImageLayerZstd, layer), blobs: []string{config, layer}},
		{name: "oci non-distributable layer", mediaType: ociManifest, blobs: []string{config},
			body: artifactOf(v1.MediaTypeImageConfig, config, "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "not pushed")},
		{name: "layer twice", mediaType: ociManifest, blobs: []string{config, layer},
			body: fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":%s,"layers":[%s,%[3]s]}`, ociManifest, described(v1.MediaTypeImageConfig, config), described(ociLayer, layer))},
		{name: "no layers", mediaType: ociManifest, blobs: []string{config},
			body: fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":%s,"layers":[]}`, ociManifest, described(v1.MediaTypeImageConfig, config))},
		{name: "empty config and data field", mediaType: ociManifest, blobs: []string{"{}", layer},
			body: fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"artifactType":"application/vnd.example+type","config":%s,"layers":[%s]}`,
				ociManifest, described(emptyType, "{}", `,"data":"e30="`), described("application/vnd.example", layer))},
		{name: "oci index", mediaType: ociIndex, body: index, children: []string{oci}, childType: ociManifest},
		{name: "nested index", mediaType: ociIndex, children: []string{index}, childType: ociIndex,
			body: fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[%s]}`, ociIndex, described(ociIndex, index))},
		{name: "empty index", mediaType: ociIndex, body: fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[]}`, ociIndex)},
		{name: "index with artifactType and subject", mediaType: ociIndex,
			body: fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"artifactType":"application/vnd.example","manifests":[],"subject":%s}`, ociIndex, subject)},
		{name: "SBOM of an image", mediaType: ociManifest, body: sbom, blobs: []string{"{}", `{"spdxVersion":"SPDX-2.3"}`}},
		{name: "signature of the SBOM", mediaType: ociManifest, blobs: []string{"{}", "signature"},
			body: artifactOf(emptyType, "{}", "application/vnd.dev.cosign.simplesigning.v1+json", "signature", `,"artifactType":"application/vnd.example.sig","subject":`, described(ociManifest, sbom))},
		{name: "subject that is not here", mediaType: ociManifest, blobs: []string{"{}", "x"},
			body: artifactOf(emptyType, "{}", "text/plain", "x", `,"artifactType":"text/plain","subject":`, described(ociManifest, "elsewhere"))},
		{name: "odd whitespace and unknown fields", mediaType: ociManifest, blobs: []string{config, layer},
			body: fmt.Sprintf("\n\t{ \"zz\" : [1.50, 1E2, null, {\"\\u00e9\":\"\\/\"}],\r\n\"layers\":[ %s ],\"config\":%s , \"schemaVersion\" :2,\"x-vendor\":{\"deep\":{}}, \"annotations\":{\"k\":\"\u00fc <&>\"}}\n\n",
				described(ociLayer, layer, `,"x":"y"`), described(v1.MediaTypeImageConfig, config))},
	}
	for _, c := range [...]struct{ name, config, layer string }{
		{"Helm", "application/vnd.cncf.helm.config.v1+json", "application/vnd.cncf.helm.chart.content.v1.tar+gzip"},
		{"CNAB", "application/vnd.cnab.config.v1+json", "application/vnd.cnab.bundle.thick.v1-rc.1+gzip"},
		{"OPA", "application/vnd.cncf.openpolicyagent.config.v1+json", "application/vnd.cncf.openpolicyagent.policy.layer.v1+rego"},
		{"Singularity", "application/vnd.sylabs.sif.config.v1+json", "application/vnd.sylabs.sif.layer.v1.sif"},
		{"WASM", "application/vnd.wasm.config.v0+json", "application/wasm"},
		{"in-toto", "application/vnd.oci.image.config.v1+json", "application/vnd.in-toto+json"},
		{"ORAS without config type", "application/vnd.unknown.config.v1+json", "text/plain"},
	} {
		all = append(all, document{name: c.name, mediaType: ociManifest, body: artifactOf(c.config, "{}", c.layer, c.name+" content"), blobs: []string{"{}", c.name + " content"}})
	}
	return all
}

// What was pushed is served byte for byte, under its digest and media type,
// whatever the client would rather have.
func TestDocumentsComeBackAsPushed(t *testing.T) {
	n := single(t)
	for i, doc := range documents() {
		t.Run(doc.name, func(t *testing.T) {
			repository, tag := fmt.Sprintf("library/doc%d", i), "v1"
			for _, content := range doc.blobs {
				n.pushBlob(repository, []byte(content))
			}
			for _, child := range doc.children {
				n.pushTree(repository, doc.childType, child)
			}
			d := digest.FromString(doc.body).String()
			n.do("PUT", "/v2/"+repository+"/manifests/"+tag, []byte(doc.body), "Content-Type", doc.mediaType).want(201).has("Docker-Content-Digest", d)
			n.do("PUT", "/v2/"+repository+"/manifests/"+d, []byte(doc.body), "Content-Type", doc.mediaType).want(201) // again, by digest
			for _, reference := range []string{tag, d} {
				for _, accept := range []string{"", "*/*", doc.mediaType, dockerManifest, "application/json"} {
					got := n.do("GET", "/v2/"+repository+"/manifests/"+reference, nil, "Accept", accept).want(200).
						has("Content-Type", doc.mediaType, "Docker-Content-Digest", d, "Content-Length", strconv.Itoa(len(doc.body)))
					if string(got.body) != doc.body {
						t.Fatalf("pushed %q\ngot    %q", doc.body, got.body)
					}
				}
				n.do("HEAD", "/v2/"+repository+"/manifests/"+reference, nil).want(200).
					has("Content-Type", doc.mediaType, "Docker-Content-Digest", d, "Content-Length", strconv.Itoa(len(doc.body)))
			}
			for _, content := range doc.blobs {
				got := n.do("GET", "/v2/"+repository+"/blobs/"+digest.FromString(content).String(), nil).want(200)
				if !bytes.Equal(got.body, []byte(content)) {
					t.Errorf("blob %q came back as %q", content, got.body)
				}
			}
		})
	}
}

// pushTree pushes a document with all that it names, each blob being one of those
// that the table's documents have.
func (c *client) pushTree(repository, mediaType, body string) {
	c.t.Helper()
	known := map[string]string{}
	kinds := map[string]string{}
	for _, doc := range documents() {
		for _, content := range doc.blobs {
			known[digest.FromString(content).String()] = content
		}
		known[digest.FromString(doc.body).String()], kinds[digest.FromString(doc.body).String()] = doc.body, doc.mediaType
	}
	var names struct {
		Config            *v1.Descriptor
		Layers, Manifests []v1.Descriptor
	}
	must(c.t, json.Unmarshal([]byte(body), &names))
	if names.Config != nil {
		names.Layers = append(names.Layers, *names.Config)
	}
	for _, layer := range names.Layers {
		c.pushBlob(repository, []byte(known[layer.Digest.String()]))
	}
	for _, child := range names.Manifests {
		c.pushTree(repository, kinds[child.Digest.String()], known[child.Digest.String()])
	}
	c.do("PUT", "/v2/"+repository+"/manifests/"+digest.FromString(body).String(), []byte(body), "Content-Type", mediaType).want(201)
}

// Who is sent a part of a blob from another node has that part fetched first.
func TestRangesOfRemoteBlobs(t *testing.T) {
	one := single(t)
	two := one.site.start("n2", t.TempDir())
	data := random(100_000)
	d := one.pushBlob("app", data).Digest
	for _, c := range []struct {
		ranges, match string
		begins        int64
		status        int
	}{
		{"", "", 0, 200},
		{"bytes=70000-", "", 70_000, 206},
		{"bytes=70000-80000", strconv.Quote(d.String()), 70_000, 206},
		{"bytes=70000-80000", `"another"`, 0, 200},
		{"bytes=-1000", "", 99_000, 206},
		{"bytes=-200000", "", 0, 206},
		{"bytes= 500-600 , 10-20", "", 500, 206},
		{"bytes=100000-", "", 0, 416},
		{"lines=5-6", "", 0, 416},
	} {
		headers := []string{"Range", c.ranges}
		if c.match != "" {
			headers = append(headers, "If-Range", c.match)
		}
		if c.ranges == "" {
			headers = nil
		}
		two.begun = nil
		two.do("GET", "/v2/app/blobs/"+d.String(), nil, headers...).want(c.status)
		if len(two.begun) != 1 || two.begun[0] != c.begins {
			t.Errorf("%q, if %q: read from %v, want %d", c.ranges, c.match, two.begun, c.begins)
		}
	}
}
