package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// randomBytes do not compress and were never pushed before.
func randomBytes(t *testing.T, n int) ([]byte, digest.Digest) {
	t.Helper()
	data := make([]byte, n)
	if _, err := rand.Read(data); err != nil {
		t.Fatal(err)
	}
	return data, digest.FromBytes(data)
}

// begin opens an upload session and gives its path.
func (w *wire) begin(ctx context.Context, repository string) string {
	w.t.Helper()
	return w.ask(w.request(ctx, http.MethodPost, "/v2/"+repository+"/blobs/uploads/", nil), http.StatusAccepted).header.Get("Location")
}

// piece makes the request that appends bytes which begin at an offset.
func (w *wire) piece(ctx context.Context, session string, data []byte, at int) *http.Request {
	w.t.Helper()
	r := w.request(ctx, http.MethodPatch, session, bytes.NewReader(data))
	r.Header.Set("Content-Range", fmt.Sprintf("%d-%d", at, at+len(data)-1))
	return r
}

// held is how many bytes of an upload the node says it has.
func (w *wire) held(ctx context.Context, session string) (n int) {
	w.t.Helper()
	said := w.ask(w.request(ctx, http.MethodGet, session, nil), http.StatusNoContent).header.Get("Range")
	if _, err := fmt.Sscanf(said, "0-%d", &n); err != nil {
		w.t.Fatalf("Range %q: %v", said, err)
	}
	return n + 1
}

func (w *wire) finish(ctx context.Context, session string, d digest.Digest) *http.Request {
	return w.request(ctx, http.MethodPut, session+"?digest="+d.String(), nil)
}

// pushBlob uploads a blob in one go.
func (w *wire) pushBlob(ctx context.Context, repository string, data []byte) digest.Digest {
	w.t.Helper()
	d := digest.FromBytes(data)
	w.ask(w.request(ctx, http.MethodPut, w.begin(ctx, repository)+"?digest="+d.String(), bytes.NewReader(data)), http.StatusCreated)
	return d
}

// wantBlob reads a blob back.
func (w *wire) wantBlob(ctx context.Context, repository string, d digest.Digest) {
	w.t.Helper()
	if got := digest.FromBytes(w.get(ctx, "/v2/"+repository+"/blobs/"+d.String(), http.StatusOK).body); got != d {
		w.t.Errorf("the blob %s reads as %s", d, got)
	}
}

// An upload that a kill -9 interrupts goes on, on the same session, after the
// last byte that the node then says it has.
func TestUploadGoesOnAfterKill(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 2*time.Minute)
	s := newSite(ctx, t, newLab(t), plan{name: "u", net: 77, nodes: 1})
	node := s.nodes[0]
	w := s.wire(node)
	data, d := randomBytes(t, 24<<20)
	const acknowledged = 8 << 20
	session := w.begin(ctx, "library/big")
	w.ask(w.piece(ctx, session, data[:acknowledged], 0), http.StatusAccepted)

	// The second piece stops in its middle, and the node dies.
	reader, writer := io.Pipe()
	broken := make(chan reply, 1)
	go func() { broken <- w.do(w.request(ctx, http.MethodPatch, session, reader)) }()
	if _, err := writer.Write(data[acknowledged : acknowledged+4<<20]); err != nil {
		t.Fatal(err)
	}
	node.Kill()
	writer.CloseWithError(errors.New("the client lost its node"))
	if a := <-broken; a.err == nil {
		t.Fatalf("a node that was killed answers %d", a.status)
	}
	if err := node.Start(ctx); err != nil {
		t.Fatal(err)
	}

	at := w.held(ctx, session)
	if at < acknowledged || at > acknowledged+4<<20 {
		t.Fatalf("after the restart the node has %d bytes; %d were acknowledged and %d were sent", at, acknowledged, acknowledged+4<<20)
	}
	w.ask(w.piece(ctx, session, data[at:], at), http.StatusAccepted)
	w.ask(w.finish(ctx, session, d), http.StatusCreated)
	w.wantBlob(ctx, "library/big", d)
}

// A session belongs to the node that opened it; every other node of the site
// passes its requests on, and says so when that node is gone.
func TestUploadThroughOtherNodes(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 2*time.Minute)
	s := newSite(ctx, t, newLab(t), plan{name: "f", net: 78, nodes: 3})
	first, second, third := s.wire(s.nodes[0]), s.wire(s.nodes[1]), s.wire(s.nodes[2])
	data, d := randomBytes(t, 6<<20)
	session := first.begin(ctx, "library/forwarded")
	if !strings.HasPrefix(session, "/v2/") {
		t.Fatalf("the session's Location is %q; want it relative to whichever node is asked", session)
	}
	second.ask(second.piece(ctx, session, data[:4<<20], 0), http.StatusAccepted)
	if at := third.held(ctx, session); at != 4<<20 {
		t.Fatalf("through the third node the upload has %d bytes", at)
	}
	// Out of order: refused with where it stands, nothing lost.
	gap := second.do(second.piece(ctx, session, data[5<<20:], 5<<20))
	gap.wantError(t, http.StatusRequestedRangeNotSatisfiable, "RANGE_INVALID", "next piece begins at 4194304")
	third.ask(third.piece(ctx, session, data[4<<20:], 4<<20), http.StatusAccepted)
	second.ask(second.finish(ctx, session, d), http.StatusCreated)
	for _, w := range []*wire{first, second, third} {
		w.wantBlob(ctx, "library/forwarded", d)
	}

	lost := first.begin(ctx, "library/forwarded")
	s.nodes[0].Kill()
	second.do(second.piece(ctx, lost, data, 0)).wantError(t, http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN", "start it again")
}

// holds says whether a node has a blob on its disk, whole.
func holds(node *lab.Node, d digest.Digest) bool {
	_, err := os.Stat(filepath.Join(node.Data, "content", "blobs", "sha256", d.Encoded()[:2], d.Encoded()))
	return err == nil
}

// A client reads a blob from a node that does not have it, while the blob is on
// its way there over a slow link. The node was down during the push, so that
// nothing of it is there before.
func TestBlobIsReadWhileItArrives(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 3*time.Minute)
	s := newSite(ctx, t, newLab(t), plan{name: "w", net: 79, nodes: 3})
	node := s.nodes[2]
	node.Kill()
	// As long as the others believe that it is up a push tells it to take a copy, which it
	// would do when it is back, whole, since what is pushed has no root yet.
	if err := s.nodes[0].WaitStatus(ctx, "the node to be missed", func(st lab.Status) bool {
		for _, n := range st.Nodes {
			if n.Name == node.Host.Name {
				return !n.Up
			}
		}
		return false
	}); err != nil {
		t.Fatal(err)
	}
	data, d := randomBytes(t, 48<<20)
	s.wire(s.nodes[0]).pushBlob(ctx, "library/slow", data)
	const rate = 6 << 20 // bytes a second
	if err := node.Host.Shape(ctx, rate); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	// A cache fetches nothing by itself: else repair may be first, whose order is
	// not that of a reader.
	if err := node.Start(ctx, asCache...); err != nil {
		t.Fatal(err)
	}
	w := s.wire(node)
	// It may not know yet what was pushed while it was down; it then says so.
	var resp *http.Response
	s.until(ctx, "the node to know of the blob", func() (ok bool) {
		var err error
		if resp, err = w.client.Do(w.request(ctx, http.MethodGet, "/v2/library/slow/blobs/"+d.String(), nil)); err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != http.StatusOK {
			resp.Body.Close()
		}
		return resp.StatusCode == http.StatusOK
	})
	defer resp.Body.Close()
	hash := sha256.New()
	if _, err := io.CopyN(hash, resp.Body, 64<<10); err != nil {
		t.Fatal(err)
	}
	first := time.Since(start)
	if _, err := io.Copy(hash, resp.Body); err != nil {
		t.Fatal(err)
	}
	whole := time.Since(start)
	if got := digest.NewDigest(digest.SHA256, hash); got != d {
		t.Fatalf("the client read %s, want %s", got, d)
	}
	// What the link can carry bounds the transfer from below, whatever the machine.
	least := time.Duration(float64(len(data)) / rate * float64(time.Second))
	t.Logf("first bytes after %v, all after %v; the link takes at least %v", first, whole, least)
	if whole < least*3/4 {
		t.Fatalf("the blob came in %v over a link that takes %v: the link was not slow, the test proves nothing", whole, least)
	}
	if first > whole*3/4 {
		t.Errorf("the first bytes came after %v of %v", first, whole)
	}
	s.until(ctx, "the node to keep what it fetched", func() bool { return holds(node, d) })
}

// sent is how much of uploads a node has on its disk.
func sent(node *lab.Node) (bytes int64) {
	files, _ := os.ReadDir(filepath.Join(node.Data, "content", "uploads")) // not there before the first
	for _, f := range files {
		if info, err := f.Info(); err == nil {
			bytes += info.Size()
		}
	}
	return bytes
}

// A client that others wrote does not go on with a session but begins again; a
// kill -9 in the middle of its push costs it no more than that.
func TestClientPushesAgainAfterKill(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 2*time.Minute)
	s := newSite(ctx, t, newLab(t), plan{name: "again", net: 86, nodes: 1})
	node := s.nodes[0]
	img := image(ctx, t, 24<<20)
	s.atoll(ctx, node, "settings", "set", "registry.upload-rate", "2MiB") // so that there is a middle
	pushed := make(chan error, 1)
	go func() {
		for {
			_, err := node.Host.RunEnv(ctx, s.env, "skopeo", "copy", "--all", "--preserve-digests", "--retry-times", "8",
				"oci:"+img.Dir+":"+img.Tag, "docker://"+node.Registry()+"/library/again:v1")
			if err != nil && strings.Contains(err.Error(), "broken pipe") {
				continue // the one way to see the kill that skopeo does not try again after; a person does
			}
			pushed <- err
			return
		}
	}()
	s.until(ctx, "the push to be in its middle", func() bool { return sent(node) > 4<<20 })
	node.Kill()
	if err := node.Start(ctx); err != nil {
		t.Fatal(err)
	}
	s.atoll(ctx, node, "settings", "reset", "registry.upload-rate")
	if err := <-pushed; err != nil {
		t.Fatal(err)
	}
	if got := s.pullAll(ctx, node, "library/again:v1"); got != img.Index.String() {
		t.Errorf("the image came back as %s, want %s", got, img.Index)
	}
}
