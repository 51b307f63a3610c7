package registry_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/blobs/faultfs"
	"github.com/atoll-registry/atoll/node/registry"
)

// guardian quarantines, as scrub does, and remembers whom it was told of.
type guardian struct {
	store *blobs.Store

	mu       sync.Mutex
	suspects []digest.Digest
	broken   []digest.Digest
}

func (g *guardian) Unreadable(d digest.Digest, f blobs.File, _ error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.broken = append(g.broken, d)
	_ = g.store.Quarantine(d, f)
}

func (g *guardian) Suspect(d digest.Digest) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.suspects = append(g.suspects, d)
}

// damageable starts a node over a disk that can be damaged.
func (s *site) damageable(id string) (*node, *faultfs.FS, *guardian) {
	s.t.Helper()
	disk := faultfs.New()
	store, err := blobs.Open("/", blobs.Options{FS: disk})
	must(s.t, err)
	watch := &guardian{store: store}
	n := s.start(id, s.t.TempDir(), func(c *registry.Config) { c.Store, c.Guardian = store, watch })
	n.store = store
	return n, disk, watch
}

// A disk that fails to read a blob does not fail the pull: the client gets the
// rest from another node, from the right byte on.
func TestUnreadableBlob(t *testing.T) {
	s := newSite(t)
	n, disk, watch := s.damageable("n1")
	other := s.start("n2", t.TempDir())
	content := random(300 << 10)
	ranges := []struct {
		header   string
		status   int
		from, to int
	}{
		{"", 200, 0, len(content)},
		{"bytes=1000-200000", 206, 1000, 200_001},
		{"bytes=-10", 206, len(content) - 10, len(content)},
	}
	for i, r := range ranges {
		content[0] = byte(i)
		d := n.pushBlob("library/app", content).Digest
		other.pushBlob("library/app", content)
		for _, name := range disk.Dump("blobs") {
			disk.Spoil(name, syscall.EIO)
		}
		var headers []string
		if r.header != "" {
			headers = []string{"Range", r.header}
		}
		got := n.do("GET", "/v2/library/app/blobs/"+d.String(), nil, headers...).want(r.status)
		if string(got.body) != string(content[r.from:r.to]) {
			t.Fatalf("%q gave %d bytes, want %d, or others", r.header, len(got.body), r.to-r.from)
		}
		if len(watch.broken) != i+1 || watch.broken[i] != d {
			t.Fatalf("told of %v", watch.broken)
		}
		if _, err := n.store.Stat(d); err == nil {
			t.Fatal("a blob that cannot be read is still held")
		}
		// From now on it comes from the other node in the first place.
		n.do("GET", "/v2/library/app/blobs/"+d.String(), nil).want(200)
	}
}

// A blob that is marked lost is unknown to whoever asks, until it is pushed or
// somebody turns out to hold it.
func TestLostBlob(t *testing.T) {
	s := newSite(t)
	n, disk, watch := s.damageable("n1")
	content := random(5000)
	layer := n.pushBlob("library/app", content)
	d := layer.Digest
	config := n.pushBlob("library/app", []byte("{}"))
	config.MediaType = v1.MediaTypeImageConfig
	n.do("PUT", "/v2/library/app/manifests/1", image(config, nil, layer), "Content-Type", v1.MediaTypeImageManifest).want(201)
	path := "/v2/library/app/blobs/" + d.String()
	for _, name := range disk.Dump("blobs") {
		if filepath.Base(name) == d.Encoded() {
			must(t, disk.Remove(name))
		}
	}
	// Nobody has looked yet: it may be on a node that is down.
	n.do("GET", path, nil).want(503)
	if len(watch.suspects) != 1 || watch.suspects[0] != d {
		t.Fatalf("told of %v", watch.suspects)
	}
	must(t, s.records.MarkLost(t.Context(), d))
	n.do("HEAD", path, nil).want(404)
	n.do("GET", path, nil).want(404, "BLOB_UNKNOWN")
	n.do("GET", "/v2/library/app/manifests/1", nil).want(200)
	n.do("POST", fmt.Sprintf("/v2/library/copy/blobs/uploads/?mount=%s&from=library/app", d), nil).want(202)
	// Without a leader nothing is said to be unknown.
	s.backend.SetLeader(false)
	n.do("GET", path, nil).want(503)
	s.backend.SetLeader(true)
	// A node comes back that holds it after all, mark or not.
	other := s.start("n2", t.TempDir())
	_, err := other.store.Put(t.Context(), d, bytes.NewReader(content))
	must(t, err)
	n.do("HEAD", path, nil).want(200).has("Content-Length", "5000")
	other.stop()
	n.do("HEAD", path, nil).want(404)
	// A push mends every image that needs it.
	n.pushBlob("library/other", content)
	n.do("HEAD", path, nil).want(200)
	if got := n.do("GET", path, nil).want(200); string(got.body) != string(content) {
		t.Fatal("other bytes")
	}
	n.do("POST", fmt.Sprintf("/v2/library/copy/blobs/uploads/?mount=%s&from=library/app", d), nil).want(201)
}

// A file that is shorter than it was is not served at all.
func TestCutBlob(t *testing.T) {
	s := newSite(t)
	dir := t.TempDir()
	n := s.start("n1", dir)
	other := s.start("n2", t.TempDir())
	content := random(600 << 10)
	d := n.pushBlob("library/app", content).Digest
	other.pushBlob("library/app", content)
	f, _, err := n.store.OpenBlob(d)
	must(t, err)
	must(t, os.Truncate(f.(*os.File).Name(), 100))
	must(t, f.Close())
	if got := n.do("GET", "/v2/library/app/blobs/"+d.String(), nil).want(200); !bytes.Equal(got.body, content) {
		t.Fatalf("%d bytes of a file of 100", len(got.body))
	}
}
