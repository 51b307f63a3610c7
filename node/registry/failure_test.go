package registry_test

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/registry"
)

// What is wrong with a request is said in the specification's words, and nothing
// of it stays.
func TestBadInput(t *testing.T) {
	n := single(t)
	config := n.pushBlob("app", []byte("{}"))
	good := image(config, nil, n.pushBlob("app", random(10)))
	missing := v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.FromString("missing"), Size: 7}
	lies := config
	lies.Size = 3
	put := func(name, reference string, data []byte) *answer {
		return n.do("PUT", "/v2/"+name+"/manifests/"+reference, data, "Content-Type", ociManifest)
	}
	session := func() string { return n.do("POST", "/v2/app/blobs/uploads/", nil).want(202).location() }
	for _, c := range []struct {
		name   string
		got    *answer
		status int
		code   string
	}{
		{"manifest that is empty", put("app", "bad", nil), 400, "MANIFEST_INVALID"},
		{"manifest that is no JSON", put("app", "bad", []byte("hello")), 400, "MANIFEST_INVALID"},
		{"manifest of another version", put("app", "bad", []byte(`{"schemaVersion":1}`)), 400, "MANIFEST_INVALID"},
		{"manifest naming a missing blob", put("app", "bad", image(config, nil, missing)), 400, "MANIFEST_BLOB_UNKNOWN"},
		{"manifest naming a missing config", put("app", "bad", image(missing, nil)), 400, "MANIFEST_BLOB_UNKNOWN"},
		{"manifest with a wrong size", put("app", "bad", image(lies, nil)), 400, "MANIFEST_INVALID"},
		{"manifest naming another repository's blob", put("other", "bad", good), 400, "MANIFEST_BLOB_UNKNOWN"},
		{"index naming a missing manifest", n.do("PUT", "/v2/app/manifests/bad", index(missing), "Content-Type", ociIndex), 400, "MANIFEST_BLOB_UNKNOWN"},
		{"manifest of another type than it says", n.do("PUT", "/v2/app/manifests/bad", good, "Content-Type", dockerManifest), 400, "MANIFEST_INVALID"},
		{"manifest of a type that is none", n.do("PUT", "/v2/app/manifests/bad", []byte("{}"), "Content-Type", "text/plain"), 400, "MANIFEST_INVALID"},
		{"manifest under a wrong digest", put("app", missing.Digest.String(), good), 400, "DIGEST_INVALID"},
		{"manifest under no digest", put("app", "sha256:baddigeststring", good), 400, "DIGEST_INVALID"},
		{"manifest under sha384", put("app", digest.SHA384.FromBytes(good).String(), good), 400, "DIGEST_INVALID"},
		{"manifest under a bad tag", put("app", ".bad", good), 400, "TAG_INVALID"},
		{"manifest under a long tag", put("app", strings.Repeat("a", 129), good), 400, "TAG_INVALID"},
		{"manifest in a bad repository", put("App/app", "bad", good), 400, "NAME_INVALID"},
		{"manifest in a bad project", put("a--b/app", "bad", good), 400, "NAME_INVALID"},
		{"blob with a wrong digest", n.do("PUT", session()+"?digest="+missing.Digest.String(), []byte("x")), 400, "DIGEST_INVALID"},
		{"blob with a wrong digest at once", n.do("POST", "/v2/app/blobs/uploads/?digest="+missing.Digest.String(), []byte("x")), 400, "DIGEST_INVALID"},
		{"blob without a digest", n.do("PUT", session(), []byte("x")), 400, "DIGEST_INVALID"},
		{"blob with half a digest", n.do("PUT", session()+"?digest=sha256:12", []byte("x")), 400, "DIGEST_INVALID"},
		{"blob under sha384", n.do("POST", "/v2/app/blobs/uploads/?digest-algorithm=sha384", nil), 400, "DIGEST_INVALID"},
		{"upload that never was", n.do("PATCH", "/v2/app/blobs/uploads/n1-0123", []byte("x")), 404, "BLOB_UPLOAD_UNKNOWN"},
		{"upload of no node", n.do("PATCH", "/v2/app/blobs/uploads/whatever", []byte("x")), 404, "BLOB_UPLOAD_UNKNOWN"},
		{"upload of an unknown node", n.do("GET", "/v2/app/blobs/uploads/n9-0123", nil), 404, "BLOB_UPLOAD_UNKNOWN"},
		{"upload at a path out of the store", n.do("GET", "/v2/app/blobs/uploads/n1-..%2F..%2Fx", nil), 404, "NOT_FOUND"},
		{"method of no meaning", n.do("PATCH", "/v2/app/manifests/v1", nil), 405, "UNSUPPORTED"},
	} {
		t.Run(c.name, func(t *testing.T) { c.got.t = t; c.got.want(c.status, c.code) })
	}
	a := put("app", "bad", image(config, nil, missing))
	if !strings.Contains(string(a.body), missing.Digest.String()) {
		t.Errorf("the missing blob is not named: %s", a.body)
	}
	n.do("GET", "/v2/app/manifests/bad", nil).want(404, "NAME_UNKNOWN") // nothing was ever pushed
	n.do("GET", "/v2/app/blobs/"+missing.Digest.String(), nil).want(404, "BLOB_UNKNOWN")
}

// A manifest of 100 MiB is refused without being kept, and a client that reads
// only once it has sent everything hears so as well.
func TestHugeManifest(t *testing.T) {
	n := single(t)
	const size = 100 << 20
	zeros := func() io.Reader { return io.LimitReader(zeroReader{}, size) }
	for _, length := range []int64{size, -1} {
		r, err := http.NewRequest("PUT", n.url+"/v2/app/manifests/big", zeros())
		must(t, err)
		r.ContentLength = length
		r.SetBasicAuth("admin", password)
		n.send(r).want(413, "MANIFEST_INVALID")
	}
	conn := n.raw("PUT", "/v2/app/manifests/big", fmt.Sprintf("Content-Length: %d", size))
	_, err := io.Copy(conn, zeros())
	must(t, err)
	resp := conn.response()
	if resp.StatusCode != 413 {
		t.Errorf("answered %s", resp.Status)
	}
	n.do("GET", "/v2/app/manifests/big", nil).want(404)
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// rawConn is a client's connection on which a test decides what is sent when.
type rawConn struct {
	net.Conn
	t testing.TB
}

func (n *node) raw(method, path string, headers ...string) *rawConn {
	n.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(n.url, "http://"))
	must(n.t, err)
	n.t.Cleanup(func() { conn.Close() })
	fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: test\r\nAuthorization: Basic %s\r\n%s\r\n\r\n", method, path,
		base64.StdEncoding.EncodeToString([]byte("admin:"+password)), strings.Join(headers, "\r\n"))
	return &rawConn{conn, n.t}
}

func (c *rawConn) response() *http.Response {
	c.t.Helper()
	must(c.t, c.SetReadDeadline(time.Now().Add(20*time.Second)))
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	must(c.t, err)
	return resp
}

// until asks again and again, since a server notices later than its client what
// has happened to a connection.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	end := time.After(20 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("%s: not so after 20 seconds", what)
		}
	}
}

// A client that goes away in the middle of an upload goes on where it was.
func TestTruncatedUpload(t *testing.T) {
	n := single(t)
	data := random(100_000)
	at := n.do("POST", "/v2/app/blobs/uploads/", nil).want(202).location()
	conn := n.raw("PATCH", at, "Content-Length: 100000")
	_, err := conn.Write(data[:40_000])
	must(t, err)
	must(t, conn.Close())
	until(t, "what was sent is kept", func() bool {
		return n.do("GET", at, nil).want(204).header.Get("Range") == "0-39999"
	})
	n.do("PATCH", at, data[40_000:], "Content-Range", "40000-99999").want(202).has("Range", "0-99999")
	n.do("PUT", at+"?digest="+digest.FromBytes(data).String(), nil).want(201)
}

// A session outlives its node's process, and is finished through another.
func TestRestartDuringUpload(t *testing.T) {
	s := newSite(t)
	n := s.start("n1", t.TempDir())
	data := random(3 << 20)
	at := n.do("POST", "/v2/app/blobs/uploads/", nil).want(202).location()
	n.do("PATCH", at, data[:1<<20], "Content-Range", "0-1048575").want(202)
	n.stop()
	n = s.start("n1", n.dir)
	n.do("GET", at, nil).want(204).has("Range", "0-1048575")
	n.do("PATCH", at, data[1<<20:], "Content-Range", "1048576-3145727").want(202)
	d := digest.FromBytes(data).String()
	n.do("PUT", at+"?digest="+d, nil).want(201)
	if a := n.do("GET", "/v2/app/blobs/"+d, nil).want(200); !bytes.Equal(a.body, data) {
		t.Error("the blob changed over the restart")
	}
}

// Any node takes the requests of a session; its owner does the work.
func TestForwardedUpload(t *testing.T) {
	s := newSite(t)
	one, two := s.start("n1", t.TempDir()), s.start("n2", t.TempDir())
	data := random(500_000)
	d := digest.FromBytes(data).String()
	at := one.do("POST", "/v2/app/blobs/uploads/", nil).want(202).location()
	two.do("PATCH", at, data[:200_000], "Content-Range", "0-199999").want(202).
		has("Range", "0-199999", "Location", at, "Docker-Distribution-Api-Version", "registry/2.0", "X-Request-Id", "*")
	two.do("GET", at, nil).want(204).has("Range", "0-199999")
	two.do("PATCH", at, data[:10], "Content-Range", "5-14").want(416, "RANGE_INVALID").has("Range", "0-199999")
	two.do("PUT", at+"?digest="+d, data[200_000:], "Content-Range", "200000-499999").want(201).has("Docker-Content-Digest", d)
	if _, err := two.store.Stat(digest.Digest(d)); !fault.Is(err, fault.NotFound) {
		t.Errorf("the passing node keeps the blob: %v", err)
	}
	// The node without the blob serves it from the one with it.
	if a := two.do("GET", "/v2/app/blobs/"+d, nil).want(200).has("Content-Length", "500000"); !bytes.Equal(a.body, data) {
		t.Error("another blob came over")
	}
	if a := two.do("GET", "/v2/app/blobs/"+d, nil, "Range", "bytes=1000-1999").want(206); !bytes.Equal(a.body, data[1000:2000]) {
		t.Error("another range came over")
	}
	two.do("HEAD", "/v2/app/blobs/"+d, nil).want(200).has("Content-Length", "500000")

	lost := one.do("POST", "/v2/app/blobs/uploads/", nil).want(202).location()
	two.as("").do("PATCH", lost, data).want(401)
	one.stop()
	two.do("PATCH", lost, data).want(404, "BLOB_UPLOAD_UNKNOWN").has("Docker-Distribution-Api-Version", "registry/2.0")
	two.do("GET", lost, nil).want(404, "BLOB_UPLOAD_UNKNOWN")
	two.do("GET", "/v2/app/blobs/"+d, nil).want(503, "UNAVAILABLE").has("Retry-After", "*")
}

// Pushes of one blob at the same time all succeed and share its space.
func TestConcurrentPushes(t *testing.T) {
	n := single(t)
	data := random(1 << 20)
	d := digest.FromBytes(data)
	var all sync.WaitGroup
	for i := range 12 {
		all.Go(func() {
			name := fmt.Sprintf("team%d/app", i%4)
			at := n.do("POST", "/v2/"+name+"/blobs/uploads/", nil).want(202).location()
			at = n.do("PATCH", at, data[:500_000]).want(202).location()
			n.do("PUT", at+"?digest="+d.String(), data[500_000:]).want(201)
			n.do("GET", "/v2/"+name+"/blobs/"+d.String(), nil).want(200)
		})
	}
	all.Wait()
	if list, err := n.store.List("", 10); err != nil || len(list) != 1 {
		t.Errorf("the store has %v, %v", list, err)
	}
}

// Deadlines follow progress: a silent client is cut off, a slow one is not.
func TestSlowClients(t *testing.T) {
	n := single(t, func(c *registry.Config) { c.Idle = 400 * time.Millisecond })
	at := n.do("POST", "/v2/app/blobs/uploads/", nil).want(202).location()
	conn := n.raw("PATCH", at, "Content-Length: 1000")
	_, err := conn.Write(make([]byte, 100))
	must(t, err)
	if resp := conn.response(); resp.StatusCode != http.StatusRequestTimeout {
		t.Errorf("a silent upload was answered %s", resp.Status)
	}
	n.do("GET", at, nil).want(204).has("Range", "0-99")

	conn = n.raw("PATCH", at, "Content-Length: 20")
	tick := time.NewTicker(60 * time.Millisecond)
	defer tick.Stop()
	for range 20 { // takes three times as long as a connection may be silent
		<-tick.C
		_, err := conn.Write([]byte{0})
		must(t, err)
	}
	if resp := conn.response(); resp.StatusCode != 202 {
		t.Errorf("a slow upload was answered %s", resp.Status)
	}

	data := random(32 << 20)
	d := n.pushBlob("app", data).Digest
	conn = n.raw("GET", "/v2/app/blobs/"+d.String())
	got := conn.response()
	for range 20 {
		<-tick.C
	}
	if size, err := io.Copy(io.Discard, got.Body); err == nil || size == int64(len(data)) {
		t.Errorf("a client that did not read was sent all %d bytes", size)
	}
	// The connection of a request that was served well has no deadline left.
	n.do("GET", "/v2/", nil).want(200)
	for range 10 {
		<-tick.C
	}
	n.do("GET", "/v2/", nil).want(200)
}

// Without a leader reads go on and say how old they are; no absence is claimed.
func TestNoLeader(t *testing.T) {
	n := single(t)
	manifest := n.pushImage("app", "v1")
	var m v1.Manifest
	must(t, json.Unmarshal(manifest, &m))
	n.site.backend.SetLeader(false)
	for _, path := range []string{"/v2/app/manifests/v1", "/v2/app/tags/list", "/v2/_catalog"} {
		n.do("GET", path, nil).want(200).has("Atoll-Stale", "*")
	}
	n.do("GET", "/v2/app/blobs/"+m.Layers[0].Digest.String(), nil).want(200)
	for _, path := range []string{"/v2/app/manifests/v2", "/v2/none/manifests/v1", "/v2/none/app/manifests/v1", "/v2/none/tags/list",
		"/v2/app/blobs/" + digest.FromString("other").String(), "/v2/app/referrers/" + digest.FromString("other").String()} {
		n.do("GET", path, nil).want(503).has("Retry-After", "*")
	}
	n.do("PUT", "/v2/app/manifests/v2", manifest, "Content-Type", ociManifest).want(503).has("Retry-After", "*")
	n.do("DELETE", "/v2/app/manifests/v1", nil).want(503)
	n.site.backend.SetLeader(true)
	n.do("GET", "/v2/app/manifests/v2", nil).want(404, "MANIFEST_UNKNOWN")
	n.do("PUT", "/v2/app/manifests/v2", manifest, "Content-Type", ociManifest).want(201)
}

// While a leader is being elected, or does not answer at once, nothing that is not here
// is refused: a client would fail that asks for what another node has acknowledged.
func TestAbsencesWaitForALeader(t *testing.T) {
	n := single(t)
	n.pushImage("app", "v1")
	n.site.db.SetPatience(15 * time.Second)
	other := digest.FromString("other").String()
	for path, want := range map[string]int{
		"/v2/app/manifests/v2": 404, "/v2/none/manifests/v1": 404, "/v2/none/tags/list": 404, "/v2/app/blobs/" + other: 404,
		"/v2/app/referrers/" + other: 200, "/v2/nowhere/app/manifests/v1": 404,
	} {
		n.site.backend.SetLeader(false)
		time.AfterFunc(300*time.Millisecond, func() { n.site.backend.SetLeader(true) })
		a := n.do("GET", path, nil).want(want)
		if a.header.Get("Atoll-Stale") != "" {
			t.Errorf("%s is stale", path)
		}
	}
}

// A push is acknowledged with what the other nodes have made durable.
func TestCopies(t *testing.T) {
	n := single(t)
	config := n.pushBlob("app", []byte("{}"))
	layer := n.pushBlob("app", random(10))
	within(t, "an early copy", n.copies.called)
	until(t, "early copies of both", func() bool {
		n.copies.mu.Lock()
		defer n.copies.mu.Unlock()
		return len(n.copies.asked) == 2
	})
	manifest := image(config, nil, layer)
	put := func() *answer { return n.do("PUT", "/v2/app/manifests/v1", manifest, "Content-Type", ociManifest) }
	n.copies.set(0, fault.New(fault.Unavailable, "no node that is up holds it"))
	put().want(503)
	n.copies.set(0, io.ErrUnexpectedEOF)
	put().want(503)
	n.do("GET", "/v2/app/manifests/v1", nil).want(404)
	n.copies.set(1, nil)
	put().want(201).has("Atoll-Copies", "1")
	if got := fmt.Sprint(n.copies.asked); got != fmt.Sprint([][]digest.Digest{{config.Digest, layer.Digest}}) {
		t.Errorf("the push waited for %v", got)
	}
}

// Who may not push is told what would help.
func TestDenied(t *testing.T) {
	n := single(t)
	n.pushImage("app", "v1")
	n.pushImage("secret/app", "v1")
	alice := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Del("Authorization")
		n.server.Config.Handler.ServeHTTP(w, r.WithContext(access.WithPrincipal(r.Context(), access.Principal{Kind: access.User, Name: "alice"})))
	}))
	t.Cleanup(alice.Close)
	c := &client{t: t, http: alice.Client(), url: alice.URL}
	c.do("GET", "/v2/app/manifests/v1", nil).want(200)
	hidden, missing := c.do("GET", "/v2/secret/app/manifests/v1", nil).want(403, "DENIED"), c.do("GET", "/v2/nowhere/app/manifests/v1", nil).want(403, "DENIED")
	if strings.ReplaceAll(string(hidden.body), "secret", "nowhere") != string(missing.body) {
		t.Errorf("a hidden project can be told from a missing one: %s, %s", hidden.body, missing.body)
	}
	c.do("POST", "/v2/app/blobs/uploads/", nil).want(403, "DENIED")
	c.do("DELETE", "/v2/app/manifests/v1", nil).want(403, "DENIED")
	c.do("GET", "/v2/_catalog", nil).want(403, "DENIED")
	a := c.do("POST", "/v2/fresh/app/blobs/uploads/", nil).want(403, "DENIED")
	if !strings.Contains(string(a.body), `\"project_name\":\"fresh\"`) || !strings.Contains(string(a.body), "/api/v2.0/projects") {
		t.Errorf("it does not say how to make the project: %s", a.body)
	}
	// A mount takes the right to pull the source.
	d := n.pushBlob("secret/app", []byte("secret")).Digest.String()
	c.do("POST", "/v2/app/blobs/uploads/?mount="+d+"&from=secret/app", nil).want(403, "DENIED")
}

// The mirror of another site's project takes no pushes, and says whose it is.
func TestMirror(t *testing.T) {
	n := single(t)
	_, err := n.site.db.Update(t.Context(), func(tx *table.Tx) error {
		return n.site.projects.CreateMirror(tx, "theirs", entry.LogID{Site: "far-away", Incarnation: "aa", Scope: "bb"}, "admin")
	})
	must(t, err)
	for _, a := range []*answer{
		n.do("POST", "/v2/theirs/app/blobs/uploads/", nil),
		n.do("PUT", "/v2/theirs/app/manifests/v1", []byte("{}")),
		n.do("DELETE", "/v2/theirs/app/manifests/v1", nil),
	} {
		if a.want(403, "DENIED"); !strings.Contains(string(a.body), "far-away") {
			t.Errorf("the owner is not named: %s", a.body)
		}
	}
}

// A file reaches net/http as a file, so that the kernel sends it.
func TestSendfile(t *testing.T) {
	n := single(t)
	data := random(1 << 20)
	d := n.pushBlob("app", data).Digest
	for _, ranges := range []string{"", "bytes=10-900000"} {
		r := httptest.NewRequest("GET", "/v2/app/blobs/"+d.String(), nil)
		r.SetBasicAuth("admin", password)
		if ranges != "" {
			r.Header.Set("Range", ranges)
		}
		w := &fileSpy{ResponseRecorder: httptest.NewRecorder()}
		n.server.Config.Handler.ServeHTTP(w, r)
		if w.files == 0 || w.other > 0 {
			t.Errorf("%q: %d pieces came as files, %d did not", ranges, w.files, w.other)
		}
		if ranges == "" && !bytes.Equal(w.Body.Bytes(), data) {
			t.Error("the blob changed")
		}
	}
}

// fileSpy sees what kernel-side sending would be given.
type fileSpy struct {
	*httptest.ResponseRecorder
	files, other int
}

func (w *fileSpy) ReadFrom(src io.Reader) (int64, error) {
	limited, ok := src.(*io.LimitedReader)
	if ok {
		_, ok = limited.R.(*os.File)
	}
	if ok {
		w.files++
	} else {
		w.other++
	}
	return io.Copy(w.ResponseRecorder, src)
}
