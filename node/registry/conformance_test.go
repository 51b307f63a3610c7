package registry_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/bundle/entry"
)

// The requests of OCI Distribution 1.1 and of its development branch, once for
// each digest algorithm, to a single node and to a site of three where every
// request goes through another node than the one before.

// caller sends its requests to the nodes of a site by turns.
type caller struct {
	*testing.T
	nodes     []*node
	turn      int
	algorithm digest.Algorithm
}

func (c *caller) do(method, path string, body []byte, headers ...string) *answer {
	c.Helper()
	c.turn++
	client := *c.nodes[c.turn%len(c.nodes)].client
	client.t = c.T
	return client.do(method, path, body, headers...)
}

func (c *caller) digest(data []byte) string { return c.algorithm.FromBytes(data).String() }

// blob pushes a blob in one request and gives its descriptor.
func (c *caller) blob(name, mediaType string, data []byte) v1.Descriptor {
	c.Helper()
	d := c.digest(data)
	c.do("POST", "/v2/"+name+"/blobs/uploads/?digest="+d, data).want(201).
		has("Location", "/v2/"+name+"/blobs/"+d, "Docker-Content-Digest", d)
	return v1.Descriptor{MediaType: mediaType, Digest: digest.Digest(d), Size: int64(len(data))}
}

// manifest pushes a manifest under its digest and gives its descriptor.
func (c *caller) manifest(name, mediaType string, data []byte) v1.Descriptor {
	c.Helper()
	d := c.digest(data)
	c.do("PUT", "/v2/"+name+"/manifests/"+d, data, "Content-Type", mediaType).want(201).
		has("Location", "/v2/"+name+"/manifests/"+d, "Docker-Content-Digest", d)
	return v1.Descriptor{MediaType: mediaType, Digest: digest.Digest(d), Size: int64(len(data))}
}

// serves checks that content is there byte for byte, and says so to HEAD too.
func (c *caller) serves(path string, data []byte, headers ...string) {
	c.Helper()
	for range c.nodes {
		if a := c.do("GET", path, nil).want(200).has(headers...); !bytes.Equal(a.body, data) {
			c.Errorf("%s gave %d other bytes", path, len(a.body))
		}
		c.do("HEAD", path, nil).want(200).has(headers...).has("Content-Length", strconv.Itoa(len(data)))
	}
}

func (c *caller) gone(path, code string) {
	c.Helper()
	for range c.nodes {
		c.do("GET", path, nil).want(404, code)
		c.do("HEAD", path, nil).want(404)
	}
}

func TestConformance(t *testing.T) {
	rows := []struct {
		name string
		test func(c *caller)
	}{
		{"blobs in one request", pushesInOneRequest},
		{"blobs in two requests", pushesInTwoRequests},
		{"blobs in chunks", pushesInChunks},
		{"blobs under the wrong digest", refusesWrongDigests},
		{"mounts", mounts},
		{"ranges", servesRanges},
		{"manifests by digest", keepsManifests},
		{"tag parameters", setsTags},
		{"indexes", keepsIndexes},
		{"referrers", listsReferrers},
		{"deletion", deletes},
	}
	for _, nodes := range []int{1, 3} {
		for _, algorithm := range entry.Algorithms() {
			s := newSite(t)
			var all []*node
			for i := range nodes {
				all = append(all, s.start(fmt.Sprintf("n%d", i+1), t.TempDir()))
			}
			for _, row := range rows {
				t.Run(fmt.Sprintf("%s/nodes %d/%s", algorithm, nodes, row.name), func(t *testing.T) {
					row.test(&caller{T: t, nodes: all, algorithm: algorithm})
				})
			}
		}
	}
}

// "Single POST".
func pushesInOneRequest(c *caller) {
	for _, data := range [][]byte{{}, []byte("{}"), random(1000), random(300 << 10)} {
		path := "/v2/app/blobs/" + c.blob("app", "", data).Digest.String()
		c.serves(path, data, "Docker-Content-Digest", c.digest(data), "Content-Type", "application/octet-stream")
		c.blob("app", "", data) // again
	}
}

// "POST then PUT", with "digest-algorithm" and without, right and wrong.
func pushesInTwoRequests(c *caller) {
	for _, query := range []string{"", "?digest-algorithm=sha256", "?digest-algorithm=sha512"} {
		data := random(70000)
		d := c.digest(data)
		at := c.do("POST", "/v2/two/blobs/uploads/"+query, nil).want(202).has("Docker-Upload-Uuid", "*").location()
		done := c.do("PUT", at+"?digest="+d, data, "Content-Type", "application/octet-stream").want(201).has("Docker-Content-Digest", d)
		c.serves(done.location(), data, "Docker-Content-Digest", d)
		c.do("GET", at, nil).want(404, "BLOB_UPLOAD_UNKNOWN")
	}
	for _, bad := range []string{"", "md5", "sha384", "SHA512", "sha512:", "../x"} {
		c.do("POST", "/v2/two/blobs/uploads/?digest-algorithm="+bad, nil).want(400, "DIGEST_INVALID")
	}
}

// "Pushing a blob in chunks", "Cancelling".
func pushesInChunks(c *caller) {
	data := random(30000)
	d := c.digest(data)
	for _, query := range []string{"", "?digest-algorithm=" + c.algorithm.String()} {
		at := c.do("POST", "/v2/chunks/blobs/uploads/"+query, nil).want(202).has("Range", "0-0").location()
		for from := 0; from < 20000; from += 10000 {
			at = c.do("PATCH", at, data[from:from+10000], "Content-Range", fmt.Sprintf("%d-%d", from, from+9999)).want(202).
				has("Range", fmt.Sprintf("0-%d", from+9999)).location()
			c.do("GET", at, nil).want(204).has("Range", fmt.Sprintf("0-%d", from+9999), "Location", at)
			c.do("PATCH", at, data[:10000], "Content-Range", "0-9999").want(416, "RANGE_INVALID").has("Range", fmt.Sprintf("0-%d", from+9999), "Location", at)
		}
		done := c.do("PUT", at+"?digest="+d, data[20000:], "Content-Range", "20000-29999").want(201)
		c.serves(done.location(), data, "Docker-Content-Digest", d)
	}
	at := c.do("POST", "/v2/chunks/blobs/uploads/", nil).want(202).location()
	c.do("PATCH", at, data).want(202)
	c.do("DELETE", at, nil).want(204)
	c.do("GET", at, nil).want(404, "BLOB_UPLOAD_UNKNOWN")
	c.do("PUT", at+"?digest="+d, nil).want(404, "BLOB_UPLOAD_UNKNOWN")
}

func refusesWrongDigests(c *caller) {
	data, other := random(100), c.digest([]byte("other"))
	wrong := []string{
		other, "sha256:12", "sha512:12", "sha256:" + strings.Repeat("a", 128), "sha512:" + strings.Repeat("a", 64),
		digest.SHA384.FromBytes(data).String(), strings.ToUpper(c.digest(data)), "md5:d41d8cd98f00b204e9800998ecf8427e",
	}
	config := c.blob("wrong", v1.MediaTypeImageConfig, []byte("{}"))
	for _, d := range wrong {
		c.do("POST", "/v2/wrong/blobs/uploads/?digest="+d, data).want(400, "DIGEST_INVALID")
		at := c.do("POST", "/v2/wrong/blobs/uploads/", nil).want(202).location()
		c.do("PUT", at+"?digest="+d, data).want(400, "DIGEST_INVALID")
		c.do("PUT", "/v2/wrong/manifests/"+d, image(config, nil), "Content-Type", ociManifest).want(400, "DIGEST_INVALID")
	}
	for _, d := range wrong[1:] {
		c.do("GET", "/v2/wrong/blobs/"+d, nil).want(400, "DIGEST_INVALID")
		c.do("GET", "/v2/wrong/manifests/"+d, nil).want(400, "DIGEST_INVALID")
		c.do("GET", "/v2/wrong/referrers/"+d, nil).want(400, "DIGEST_INVALID")
	}
	c.gone("/v2/wrong/blobs/"+other, "BLOB_UNKNOWN")
	c.gone("/v2/wrong/blobs/"+c.digest(data), "BLOB_UNKNOWN")
}

// "Mounting a blob from another repository": named, found, and not there.
func mounts(c *caller) {
	data := random(100)
	d := c.blob("source/app", "", data).Digest.String()
	c.do("POST", "/v2/mount/one/blobs/uploads/?mount="+d+"&from=source/app", nil).want(201).has("Location", "/v2/mount/one/blobs/"+d, "Docker-Content-Digest", d)
	c.do("POST", "/v2/mount/two/blobs/uploads/?mount="+d, nil).want(201)
	c.serves("/v2/mount/one/blobs/"+d, data)
	c.serves("/v2/mount/two/blobs/"+d, data)
	at := c.do("POST", "/v2/mount/one/blobs/uploads/?mount="+c.digest([]byte("missing"))+"&from=source/app", nil).want(202).location()
	c.do("PUT", at+"?digest="+c.digest([]byte("missing")), []byte("missing")).want(201)
	// The bytes under the other algorithm are another blob.
	for _, other := range entry.Algorithms() {
		if other != c.algorithm {
			c.do("POST", "/v2/mount/one/blobs/uploads/?from=source/app&mount="+other.FromBytes(data).String(), nil).want(202)
			c.gone("/v2/source/app/blobs/"+other.FromBytes(data).String(), "BLOB_UNKNOWN")
		}
	}
}

func servesRanges(c *caller) {
	data := random(100000)
	path := "/v2/app/blobs/" + c.blob("app", "", data).Digest.String()
	for range c.nodes {
		if a := c.do("GET", path, nil, "Range", "bytes=100-70000").want(206).has("Content-Range", "bytes 100-70000/100000"); !bytes.Equal(a.body, data[100:70001]) {
			c.Error("the range has other bytes")
		}
		c.do("GET", path, nil, "Range", "bytes=100000-").want(416, "RANGE_INVALID")
		c.do("GET", path, nil, "If-None-Match", strconv.Quote(c.digest(data))).want(304)
	}
}

// "Pushing Manifests" by digest, of blobs under either algorithm, small and larger
// than a row.
func keepsManifests(c *caller) {
	config := c.blob("mixed/app", v1.MediaTypeImageConfig, []byte("{}"))
	var layers []v1.Descriptor
	for _, algorithm := range entry.Algorithms() {
		mixed := *c
		mixed.algorithm = algorithm
		layers = append(layers, mixed.blob("mixed/app", v1.MediaTypeImageLayer, random(50)))
	}
	small := image(config, nil, layers...)
	large := bytes.Replace(small, []byte(`"layers"`), []byte(`"padding":"`+strings.Repeat("p", 100<<10)+`","layers"`), 1)
	for _, data := range [][]byte{small, large} {
		d := c.manifest("mixed/app", ociManifest, data)
		path := "/v2/mixed/app/manifests/" + d.Digest.String()
		c.serves(path, data, "Docker-Content-Digest", d.Digest.String(), "Content-Type", ociManifest)
		c.manifest("mixed/app", ociManifest, data) // again
		// Under the other algorithm it is another manifest, until it is pushed too.
		for _, other := range entry.Algorithms() {
			if other != c.algorithm {
				twin := "/v2/mixed/app/manifests/" + other.FromBytes(data).String()
				c.gone(twin, "MANIFEST_UNKNOWN")
				c.do("PUT", twin, data, "Content-Type", ociManifest).want(201)
				c.serves(twin, data, "Docker-Content-Digest", other.FromBytes(data).String())
				c.do("DELETE", twin, nil).want(202)
				c.serves(path, data)
			}
		}
	}
	// What is under a tag alone is named by sha256.
	c.do("PUT", "/v2/mixed/app/manifests/plain", small, "Content-Type", ociManifest).want(201).
		has("Docker-Content-Digest", digest.SHA256.FromBytes(small).String())
	missing := v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: c.algorithm.FromString("missing"), Size: 7}
	a := c.do("PUT", "/v2/mixed/app/manifests/bad", image(config, nil, missing), "Content-Type", ociManifest).want(400, "MANIFEST_BLOB_UNKNOWN")
	if !strings.Contains(string(a.body), missing.Digest.String()) {
		c.Errorf("the missing blob is not named: %s", a.body)
	}
}

// "Pushing Manifests": tags as parameters of a push by digest.
func setsTags(c *caller) {
	data := image(c.blob("tags/app", v1.MediaTypeImageConfig, []byte("{}")), nil)
	d := c.digest(data)
	a := c.do("PUT", "/v2/tags/app/manifests/"+d+"?tag=one&tag=two", data, "Content-Type", ociManifest).want(201).has("Docker-Content-Digest", d)
	if tags := a.header.Values("OCI-Tag"); !slices.Equal(tags, []string{"one", "two"}) {
		c.Errorf("OCI-Tag is %v", tags)
	}
	for _, tag := range []string{"one", "two"} {
		c.serves("/v2/tags/app/manifests/"+tag, data, "Docker-Content-Digest", d)
	}
	var list struct{ Tags []string }
	c.do("GET", "/v2/tags/app/tags/list", nil).want(200).decode(&list)
	if !slices.Equal(list.Tags, []string{"one", "two"}) {
		c.Errorf("tags %v", list.Tags)
	}
	c.do("DELETE", "/v2/tags/app/manifests/one", nil).want(202)
	c.gone("/v2/tags/app/manifests/one", "MANIFEST_UNKNOWN")
	c.serves("/v2/tags/app/manifests/"+d, data)
}

// An index may list an index, and name its children by either algorithm.
func keepsIndexes(c *caller) {
	config := c.blob("index/app", v1.MediaTypeImageConfig, []byte("{}"))
	var children []v1.Descriptor
	for i, algorithm := range entry.Algorithms() {
		mixed := *c
		mixed.algorithm = algorithm
		children = append(children, mixed.manifest("index/app", ociManifest, image(config, nil, c.blob("index/app", v1.MediaTypeImageLayer, []byte{byte(i)}))))
	}
	inner := c.manifest("index/app", ociIndex, index(children...))
	outer := index(inner)
	c.do("PUT", "/v2/index/app/manifests/outer", outer, "Content-Type", ociIndex).want(201)
	c.serves("/v2/index/app/manifests/outer", outer, "Content-Type", ociIndex)
	unknown := v1.Descriptor{MediaType: ociManifest, Digest: c.algorithm.FromString("unknown"), Size: 7}
	c.do("PUT", "/v2/index/app/manifests/bad", index(unknown), "Content-Type", ociIndex).want(400, "MANIFEST_BLOB_UNKNOWN")
}

func index(children ...v1.Descriptor) []byte {
	x := v1.Index{MediaType: ociIndex, Manifests: children}
	x.SchemaVersion = 2
	data, _ := json.Marshal(x)
	return data
}

// "Listing Referrers": of a subject that is here and of one that is not, by
// referrers under either algorithm.
func listsReferrers(c *caller) {
	config := c.blob("refs/app", v1.MediaTypeImageConfig, []byte("{}"))
	here := c.manifest("refs/app", ociManifest, image(config, nil))
	later := v1.Descriptor{MediaType: ociManifest, Digest: c.algorithm.FromString("later"), Size: 5}
	for _, subject := range []v1.Descriptor{here, later} {
		path := "/v2/refs/app/referrers/" + subject.Digest.String()
		var want []digest.Digest
		for i, algorithm := range entry.Algorithms() {
			data := image(config, &subject, c.blob("refs/app", v1.MediaTypeImageLayer, fmt.Append(nil, subject.Digest, i)))
			d := algorithm.FromBytes(data)
			c.do("PUT", "/v2/refs/app/manifests/"+d.String(), data, "Content-Type", ociManifest).want(201).has("OCI-Subject", subject.Digest.String())
			want = append(want, d)
		}
		slices.Sort(want)
		for range c.nodes {
			if got := c.referrers(path); !slices.Equal(got, want) {
				c.Errorf("referrers %v, want %v", got, want)
			}
		}
		c.do("DELETE", "/v2/refs/app/manifests/"+want[0].String(), nil).want(202)
		if got := c.referrers(path); !slices.Equal(got, want[1:]) {
			c.Errorf("after a deletion: %v, want %v", got, want[1:])
		}
	}
	if got := c.referrers("/v2/refs/app/referrers/" + c.digest([]byte("nobody's"))); len(got) != 0 {
		c.Errorf("referrers of nothing: %v", got)
	}
}

func (c *caller) referrers(path string) (found []digest.Digest) {
	c.Helper()
	var list v1.Index
	c.do("GET", path, nil).want(200).has("Content-Type", ociIndex).decode(&list)
	for _, d := range list.Manifests {
		found = append(found, d.Digest)
	}
	slices.Sort(found)
	return found
}

// "Deleting tags, manifests, blobs", seen at once through every node.
func deletes(c *caller) {
	layer := c.blob("deleted/app", v1.MediaTypeImageLayer, random(60))
	data := image(c.blob("deleted/app", v1.MediaTypeImageConfig, []byte("{}")), nil, layer)
	d := c.manifest("deleted/app", ociManifest, data).Digest.String()
	c.do("PUT", "/v2/deleted/app/manifests/"+d+"?tag=v1", data, "Content-Type", ociManifest).want(201)
	blob := "/v2/deleted/app/blobs/" + layer.Digest.String()
	c.do("DELETE", blob, nil).want(405, "UNSUPPORTED") // the manifest needs it

	c.do("DELETE", "/v2/deleted/app/manifests/"+d, nil).want(202)
	c.gone("/v2/deleted/app/manifests/"+d, "MANIFEST_UNKNOWN")
	c.gone("/v2/deleted/app/manifests/v1", "MANIFEST_UNKNOWN")
	c.do("DELETE", "/v2/deleted/app/manifests/"+d, nil).want(404, "MANIFEST_UNKNOWN")
	c.do("DELETE", blob, nil).want(202)
	c.gone(blob, "BLOB_UNKNOWN")
	c.do("DELETE", blob, nil).want(404, "BLOB_UNKNOWN")
	c.blob("deleted/app", v1.MediaTypeImageLayer, []byte("after"))
	c.serves("/v2/deleted/app/blobs/"+c.digest([]byte("after")), []byte("after"))
}
