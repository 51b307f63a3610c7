package registry_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/registry"
)

// says checks that the message of a refusal tells what to do.
func (a *answer) says(words ...string) *answer {
	a.t.Helper()
	for _, word := range words {
		if !strings.Contains(string(a.body), word) {
			a.t.Errorf("%s: answered %s, which does not say %q", a.what, a.body, word)
		}
	}
	return a
}

// padded is a manifest of exactly so many bytes.
func padded(t testing.TB, config v1.Descriptor, size int) []byte {
	m := v1.Manifest{MediaType: ociManifest, Config: config, Layers: []v1.Descriptor{}, Annotations: map[string]string{"pad": ""}}
	m.SchemaVersion = 2
	data, err := json.Marshal(m)
	must(t, err)
	m.Annotations["pad"] = strings.Repeat("x", size-len(data))
	data, err = json.Marshal(m)
	must(t, err)
	return data
}

func TestManifestLimits(t *testing.T) {
	n := single(t)
	config := n.pushBlob("app", []byte("{}"))
	put := func(tag string, body []byte) *answer {
		return n.do("PUT", "/v2/app/manifests/"+tag, body, "Content-Type", ociManifest)
	}
	put("full", padded(t, config, 4<<20)).want(201)
	put("over", padded(t, config, 4<<20+1)).want(413, "MANIFEST_INVALID").says("4MiB", "atoll settings set registry.max-manifest")
	n.set("registry.max-manifest", "8MiB")
	put("over", padded(t, config, 4<<20+1)).want(201)
	n.set("registry.max-manifest", "64KiB")
	put("small", padded(t, config, 64<<10)).want(201)
	put("over", padded(t, config, 64<<10+1)).want(413, "MANIFEST_INVALID").says("64KiB")
	// The length is not known beforehand.
	r, err := http.NewRequestWithContext(t.Context(), "PUT", n.url+"/v2/app/manifests/over", io.MultiReader(bytes.NewReader(padded(t, config, 70<<10))))
	must(t, err)
	r.Header.Set("Content-Type", ociManifest)
	r.SetBasicAuth("admin", password)
	n.send(r).want(413, "MANIFEST_INVALID")
	n.do("GET", "/v2/app/manifests/full", nil).want(200) // what is here stays readable

	n.set("registry.max-layers", "2")
	var layers []v1.Descriptor
	for i := range 3 {
		layers = append(layers, n.pushBlob("app", fmt.Appendf(nil, "layer %d", i)))
	}
	put("two", image(config, nil, layers[:2]...)).want(201)
	put("three", image(config, nil, layers...)).want(413, "MANIFEST_INVALID").says("3 layers", "registry.max-layers")
}

// Manifests that are large wait for a place: their memory is bounded.
func TestLargeManifestsAtOnce(t *testing.T) {
	n := single(t)
	config := n.pushBlob("app", []byte("{}"))
	var all sync.WaitGroup
	for i := range 24 {
		all.Go(func() {
			body := padded(t, config, 100<<10+i)
			n.do("PUT", fmt.Sprintf("/v2/app/manifests/m%d", i), body, "Content-Type", ociManifest).want(201)
		})
	}
	all.Wait()
}

func TestBlobLimit(t *testing.T) {
	n := single(t)
	n.set("registry.max-blob", "1MiB")
	fits, over := random(1<<20), random(1<<20+1)
	n.pushBlob("app", fits)
	// Announced, and so refused before it is sent.
	n.do("POST", "/v2/app/blobs/uploads/?digest="+digest.FromBytes(over).String(), over).
		want(413, "SIZE_INVALID").says("1MiB", "atoll settings set registry.max-blob")
	// In pieces, of which the last is too much.
	at := n.do("POST", "/v2/app/blobs/uploads/", nil).want(202).location()
	at = n.do("PATCH", at, over[:1<<20]).want(202).location()
	n.do("PATCH", at, over[1<<20:]).want(413, "SIZE_INVALID")
	n.do("GET", at, nil).want(404, "BLOB_UPLOAD_UNKNOWN") // its space is free again
	// Without a length.
	at = n.do("POST", "/v2/app/blobs/uploads/", nil).want(202).location()
	r, err := http.NewRequestWithContext(t.Context(), "PATCH", n.url+at, io.MultiReader(bytes.NewReader(over)))
	must(t, err)
	r.SetBasicAuth("admin", password)
	n.send(r).want(413, "SIZE_INVALID")
	n.do("GET", at, nil).want(404, "BLOB_UPLOAD_UNKNOWN")
	if files := uploadFiles(t, n); len(files) > 0 {
		t.Errorf("files of uploads that were refused: %v", files)
	}
	n.set("registry.max-blob", "0")
	n.pushBlob("app", over)
}

// uploadFiles lists what sessions have on disk.
func uploadFiles(t testing.TB, n *node) []string {
	files, err := filepath.Glob(filepath.Join(n.dir, "uploads", "*"))
	must(t, err)
	return files
}

func TestUploadsOfAUser(t *testing.T) {
	n := single(t)
	n.set("registry.max-uploads", "2")
	open := func() *answer { return n.do("POST", "/v2/app/blobs/uploads/", nil) }
	first, second := open().want(202).location(), open().want(202).location()
	open().want(429, "TOOMANYREQUESTS").has("Retry-After", "*").says("2 are allowed", "cancel", "registry.max-uploads")
	n.do("POST", "/v2/app/blobs/uploads/?digest="+digest.FromString("x").String(), []byte("x")).want(429, "TOOMANYREQUESTS")
	// Cancelled, finished, refused and lost ones count no more.
	n.do("DELETE", first, nil).want(204)
	first = open().want(202).location()
	n.do("PUT", second+"?digest="+digest.FromString("x").String(), []byte("x")).want(201)
	second = open().want(202).location()
	n.do("PUT", second+"?digest="+digest.FromString("x").String(), []byte("y")).want(400, "DIGEST_INVALID")
	n.do("POST", "/v2/app/blobs/uploads/?digest="+digest.FromString("x").String(), []byte("x")).want(201)
	open().want(202)
	if _, err := n.store.Expire(t.Context(), -time.Hour); err != nil {
		t.Fatal(err)
	}
	open().want(202)
	open().want(202)
	open().want(429, "TOOMANYREQUESTS")
	n.set("registry.max-uploads", "3")
	open().want(202)
}

// The rate that is set holds for what a client sends.
func TestUploadRate(t *testing.T) {
	n := single(t)
	n.set("registry.upload-rate", "64KiB")
	began := time.Now()
	var all sync.WaitGroup
	for range 2 {
		all.Go(func() { n.pushBlob("app", random(24<<10)) })
	}
	all.Wait()
	if took := time.Since(began); took < 600*time.Millisecond {
		t.Errorf("48 KiB at 64 KiB/s took %v", took)
	}
}

// A registry removes what nobody went on with, and its space is free.
func TestAbandonedUploads(t *testing.T) {
	s := newSite(t)
	n := s.start("n1", t.TempDir())
	abandoned := n.do("POST", "/v2/app/blobs/uploads/", nil).want(202).location()
	n.do("PATCH", abandoned, random(1<<20), "Content-Range", "0-1048575").want(202)
	n.stop()
	n = s.start("n1", n.dir) // within its time
	n.do("GET", abandoned, nil).want(204).has("Range", "0-1048575")
	n.stop()
	n = s.start("n1", n.dir, func(c *registry.Config) { c.UploadTTL = time.Nanosecond })
	until(t, "the upload is gone", func() bool {
		return n.do("GET", abandoned, nil).status == 404 && len(uploadFiles(t, n)) == 0
	})
	n.do("PATCH", abandoned, []byte("more")).want(404, "BLOB_UPLOAD_UNKNOWN")
}

// Below the low-water mark pushes are refused and pulls go on, without a restart.
func TestLowWaterMark(t *testing.T) {
	var mark atomic.Int64
	store, err := blobs.Open(t.TempDir(), blobs.Options{LowWater: mark.Load})
	must(t, err)
	defer func() { must(t, store.Close()) }()
	n := single(t, func(c *registry.Config) { c.Store = store })
	layer := n.pushBlob("app", random(1000))
	manifest := n.pushImage("app", "v1")
	mark.Store(1 << 60)
	n.do("POST", "/v2/app/blobs/uploads/", nil).want(507, "INSUFFICIENT_STORAGE").says("reserve", "until space is freed", "pulls go on")
	n.do("POST", "/v2/app/blobs/uploads/?digest="+digest.FromString("x").String(), []byte("x")).want(507, "INSUFFICIENT_STORAGE")
	n.do("GET", "/v2/app/blobs/"+layer.Digest.String(), nil).want(200)
	if got := n.do("GET", "/v2/app/manifests/v1", nil).want(200); !bytes.Equal(got.body, manifest) {
		t.Errorf("the manifest is %s", got.body)
	}
	mark.Store(0)
	n.pushBlob("app", random(1000))
}

// Pushes of one blob at the same time leave one file.
func TestOneBlobPushedByMany(t *testing.T) {
	n := single(t)
	blob := random(300 << 10)
	want := digest.FromBytes(blob)
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() { n.pushBlob(fmt.Sprintf("app%d", i%3), blob) })
	}
	all.Wait()
	n.pushBlob("app0", blob) // held already
	if files := uploadFiles(t, n); len(files) > 0 {
		t.Errorf("files of uploads that ended: %v", files)
	}
	var size int64
	must(t, filepath.WalkDir(n.dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			info, err := d.Info()
			if err != nil {
				return err
			}
			size += info.Size()
		}
		return err
	}))
	if size > 310<<10 {
		t.Errorf("the store has %d bytes of one blob of %d", size, len(blob))
	}
	for i := range 3 {
		if got := n.do("GET", fmt.Sprintf("/v2/app%d/blobs/%s", i, want), nil).want(200); !bytes.Equal(got.body, blob) {
			t.Errorf("app%d has other bytes", i)
		}
	}
}
