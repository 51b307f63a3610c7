package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// What clients send wrongly gets the error that says what is wrong, and what was
// there before is still there.
func TestBadRequests(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 3*time.Minute)
	s := newSite(ctx, t, newLab(t), plan{name: "bad", net: 80, nodes: 1})
	node := s.nodes[0]
	w := s.wire(node)
	img := image(ctx, t, 0)
	s.pushAll(ctx, node, img, "library/good", "v1")
	data, d := randomBytes(t, 1<<20)
	_, other := randomBytes(t, 1)

	t.Run("wrong digest", func(t *testing.T) {
		session := w.begin(ctx, "library/bad")
		w.do(w.request(ctx, http.MethodPut, session+"?digest="+other.String(), bytes.NewReader(data))).
			wantError(t, http.StatusBadRequest, "DIGEST_INVALID", d.String(), other.String())
		for _, missing := range []digest.Digest{d, other} {
			w.get(ctx, "/v2/library/bad/blobs/"+missing.String(), http.StatusNotFound)
		}
		// A digest that is none leaves the session as it is.
		session = w.begin(ctx, "library/bad")
		w.do(w.request(ctx, http.MethodPut, session+"?digest=sha256:xyz", nil)).wantError(t, http.StatusBadRequest, "DIGEST_INVALID")
		w.held(ctx, session)
	})
	t.Run("truncated upload", func(t *testing.T) {
		session := w.begin(ctx, "library/bad")
		w.truncated(ctx, session+"?digest="+d.String(), data[:600_000], len(data))
		at := 0
		s.in(t).until(ctx, "the node to notice", func() bool {
			at = w.held(ctx, session)
			return at == 600_000
		})
		w.get(ctx, "/v2/library/bad/blobs/"+d.String(), http.StatusNotFound)
		// Nothing is lost: it goes on from there.
		w.ask(w.piece(ctx, session, data[at:], at), http.StatusAccepted)
		w.ask(w.finish(ctx, session, d), http.StatusCreated)
		w.wantBlob(ctx, "library/bad", d)
	})
	t.Run("manifest without its blobs", func(t *testing.T) {
		manifest, err := json.Marshal(v1.Manifest{
			MediaType: v1.MediaTypeImageManifest, Config: v1.Descriptor{MediaType: v1.MediaTypeImageConfig, Digest: d, Size: int64(len(data))},
			Layers: []v1.Descriptor{{MediaType: v1.MediaTypeImageLayer, Digest: other, Size: 1}},
		})
		if err != nil {
			t.Fatal(err)
		}
		manifest = bytes.Replace(manifest, []byte(`"schemaVersion":0`), []byte(`"schemaVersion":2`), 1)
		w.do(w.manifest(ctx, "library/bad", "v1", bytes.NewReader(manifest))).
			wantError(t, http.StatusBadRequest, "MANIFEST_BLOB_UNKNOWN", other.String())
		w.get(ctx, "/v2/library/bad/manifests/v1", http.StatusNotFound)
	})
	t.Run("huge manifest", func(t *testing.T) {
		const size = 100 << 20
		whole := w.manifest(ctx, "library/good", "v1", io.LimitReader(spaces{}, size))
		whole.ContentLength = size
		chunked := w.manifest(ctx, "library/good", "v1", io.LimitReader(spaces{}, size))
		for _, r := range []*http.Request{whole, chunked} {
			w.do(r).wantError(t, http.StatusRequestEntityTooLarge, "MANIFEST_INVALID", "push large content as blobs")
		}
	})
	t.Run("invalid names", func(t *testing.T) {
		for _, c := range []struct{ method, path, code string }{
			{http.MethodPost, "/v2/Upper/app/blobs/uploads/", "NAME_INVALID"},
			{http.MethodPost, "/v2/a..b/app/blobs/uploads/", "NAME_INVALID"},
			{http.MethodPost, "/v2/" + strings.Repeat("a", 300) + "/blobs/uploads/", "NAME_INVALID"},
			{http.MethodPost, "/v2/a%2F%2E%2E%2Fb/blobs/uploads/", "NAME_INVALID"},
			{http.MethodPut, "/v2/library/good/manifests/-no", "TAG_INVALID"},
			{http.MethodPut, "/v2/library/good/manifests/" + strings.Repeat("a", 129), "TAG_INVALID"},
			{http.MethodGet, "/v2/library/good/blobs/sha256:short", "DIGEST_INVALID"},
		} {
			r := w.request(ctx, c.method, c.path, strings.NewReader("{}"))
			r.Header.Set("Content-Type", v1.MediaTypeImageManifest)
			w.do(r).wantError(t, http.StatusBadRequest, c.code)
		}
		if found, err := os.ReadDir(filepath.Dir(node.Data)); err != nil || len(found) != 1 {
			t.Errorf("beside the data directory: %v %v", found, err)
		}
	})
	t.Run("credentials", func(t *testing.T) {
		r := w.request(ctx, http.MethodGet, "/v2/", nil)
		r.SetBasicAuth("admin", "wrong")
		w.do(r).wantError(t, http.StatusUnauthorized, "UNAUTHORIZED")
		r.Header.Set("Authorization", "Bearer x.y.z")
		w.do(r).wantError(t, http.StatusUnauthorized, "UNAUTHORIZED")
	})
	if got := s.pullAll(ctx, node, "good:v1"); got != img.Index.String() {
		t.Errorf("after all that the node serves %s, want %s", got, img.Index)
	}
}

// manifest makes the request that pushes a manifest.
func (w *wire) manifest(ctx context.Context, repository, reference string, body io.Reader) *http.Request {
	r := w.request(ctx, http.MethodPut, "/v2/"+repository+"/manifests/"+reference, body)
	r.Header.Set("Content-Type", v1.MediaTypeImageManifest)
	return r
}

// truncated announces so many bytes, sends some and hangs up.
func (w *wire) truncated(ctx context.Context, path string, data []byte, announced int) {
	w.t.Helper()
	raw, err := w.node.Host.Dial(ctx, "tcp", w.node.Registry())
	if err != nil {
		w.t.Fatal(err)
	}
	conn := tls.Client(raw, &tls.Config{RootCAs: w.client.Transport.(*http.Transport).TLSClientConfig.RootCAs, ServerName: w.node.Host.IP})
	r := w.request(ctx, http.MethodPut, path, nil)
	_, err = fmt.Fprintf(conn, "PUT %s HTTP/1.1\r\nHost: %s\r\nAuthorization: %s\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n%s",
		r.URL.RequestURI(), r.Host, r.Header.Get("Authorization"), announced, data)
	if err != nil {
		w.t.Fatal(err)
	}
	conn.Close()
}

// spaces is white space without end, which JSON may hold any amount of.
type spaces struct{}

func (spaces) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}

// A node joins with a token that is whole, fresh, unused and of this site; after
// a refusal its data directory is as good as new.
func TestBadTokens(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 3*time.Minute)
	l := newLab(t)
	s := newSite(ctx, t, l, plan{name: "ta", net: 81, nodes: 1})
	elsewhere := newSite(ctx, t, l, plan{name: "tb", net: 82, nodes: 1})
	first := s.nodes[0]
	host, err := l.Host(ctx, "joiner", "ta", "10.81.0.9/24")
	if err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(t.TempDir(), "joiner")
	join := func(token string) error {
		_, err := host.Run(ctx, built.atoll, "serve", "--data", data, "--listen", host.IP+":5000", "--join", first.PeerAddr(), "--token", token)
		return err
	}

	var short struct {
		Token     string
		ExpiresAt time.Time `json:"expires_at"`
	}
	if err := json.Unmarshal([]byte(s.atoll(ctx, first, "token", "create", "--ttl", "1s", "--format", "json")), &short); err != nil {
		t.Fatal(err)
	}
	used := s.atoll(ctx, first, "token", "create")
	second := lab.NewNode(host, built.atoll, filepath.Join(t.TempDir(), "second"), "--peer-listen", host.IP+":6001")
	if err := second.Start(ctx, "--join", first.PeerAddr(), "--token", used); err != nil {
		t.Fatal(err)
	}
	second.Kill()
	good := s.atoll(ctx, first, "token", "create")
	wait := time.NewTimer(time.Until(short.ExpiresAt.Add(time.Second))) // the site's clock is this one
	defer wait.Stop()
	select {
	case <-wait.C:
	case <-ctx.Done():
		t.Fatal(ctx.Err())
	}
	for _, c := range []struct{ name, token, want string }{
		{"expired", short.Token, "expired"},
		{"used", used, "the token was for 1 use(s), and all are taken"},
		{"of another site", elsewhere.atoll(ctx, elsewhere.nodes[0], "token", "create"), "another site"},
		{"cut short", good[:len(good)-7], "was all of it copied?"},
		{"no token", "hello", "does not begin with ATOLL1-"},
		{"unknown", altered(good), "the token is not known here"},
		{"empty", "", "make one on a node of the site with: atoll token create"},
	} {
		if err := join(c.token); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("a token that is %s: %v; want the error to say %q", c.name, err, c.want)
		}
	}
	// Not under the name of the node that was up a moment ago.
	third := lab.NewNode(host, built.atoll, data, "--name", "third")
	t.Cleanup(third.Kill)
	if err := third.Start(ctx, "--join", first.PeerAddr(), "--token", good); err != nil {
		t.Errorf("a good token after bad ones: %v", err)
	}
}

// altered gives a token with another secret.
func altered(token string) string {
	cut := strings.LastIndexByte(token, '-') + 1
	c := byte('a')
	if token[cut] == c {
		c = 'b'
	}
	return token[:cut] + string(c) + token[cut+1:]
}

// When a disk is full, pushes are refused with what to do, pulls go on, and pushes
// work again once there is space.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 2*time.Minute)
	l := newLab(t)
	host, err := l.Host(ctx, "full1", "full", "10.83.0.1/24")
	if err != nil {
		t.Fatal(err)
	}
	disk := t.TempDir()
	if err := syscall.Mount("atoll-test", disk, "tmpfs", 0, "size=400m"); err != nil {
		t.Fatalf("mount a small disk: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(disk, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	node := lab.NewNode(host, built.atoll, filepath.Join(disk, "data"))
	if err := node.Found(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(node.Kill)
	s := &site{t: t, nodes: []*lab.Node{node}}
	if s.env, err = lab.Clients(ctx, t.TempDir(), node); err != nil {
		t.Fatal(err)
	}
	img := image(ctx, t, 0)
	s.pushAll(ctx, node, img, "library/before", "v1")
	w := s.wire(node)
	data, d := randomBytes(t, 4<<20)
	session := w.begin(ctx, "library/more")
	w.ask(w.piece(ctx, session, data[:1<<20], 0), http.StatusAccepted)

	// Something else fills the disk, as logs do.
	filler := filepath.Join(disk, "filler")
	if err := fill(filler); err != nil {
		t.Fatal(err)
	}
	w.do(w.piece(ctx, session, data[1<<20:], 1<<20)).wantError(t, http.StatusInsufficientStorage, "INSUFFICIENT_STORAGE", "space")
	said := s.refused(ctx, node, "skopeo", "copy", "--all", "oci:"+image(ctx, t, 1<<20).Dir+":v1", "docker://"+node.Registry()+"/library/more:v1")
	if !strings.Contains(said, "space") && !strings.Contains(said, "507") {
		t.Errorf("skopeo says of a full disk: %s", said)
	}
	if got := s.pullAll(ctx, node, "before:v1"); got != img.Index.String() {
		t.Errorf("with a full disk the node serves %s, want %s", got, img.Index)
	}
	// It can also be started with a full disk.
	node.Kill()
	if err := node.Start(ctx); err != nil {
		t.Fatalf("start with a full disk: %v", err)
	}
	if got := s.pullAll(ctx, node, "before:v1"); got != img.Index.String() {
		t.Errorf("started with a full disk the node serves %s, want %s", got, img.Index)
	}

	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	// The upload under way had to give its space back; nothing else is lost.
	w.do(w.piece(ctx, session, data[1<<20:], 1<<20)).wantError(t, http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN", "begin a new one")
	if got := w.pushBlob(ctx, "library/more", data); got != d {
		t.Fatal(got)
	}
	w.wantBlob(ctx, "library/more", d)
	s.pushAll(ctx, node, img, "library/after", "v1")
}

// fill writes a file until the disk is full.
func fill(name string) error {
	file, err := os.Create(name)
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err = io.Copy(file, spaces{}); err == nil || !strings.Contains(err.Error(), syscall.ENOSPC.Error()) {
		return fmt.Errorf("filling the disk ended with: %w", err)
	}
	return nil
}
