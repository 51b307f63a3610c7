package node

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
)

// content gives bytes that no two tests share.
func content(seed uint64, n int) []byte {
	b := make([]byte, n)
	source := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	_, _ = source.Read(b) // never fails
	return b
}

// join starts one more node of a site.
func join(t *testing.T, via *running, name string, change ...func(*Config)) *running {
	t.Helper()
	token, err := via.member.CreateToken(t.Context(), time.Hour, 1)
	if err != nil {
		t.Fatal(err)
	}
	c := config(t)
	c.Init, c.Join, c.Token, c.Name, c.AdminPassword = false, []string{via.PeerAddr}, token, name, ""
	for _, f := range change {
		f(&c)
	}
	n := start(t, c)
	if n.Founded || n.PasswordFile != "" {
		t.Errorf("a node that joined started as %+v", n.Started)
	}
	return n
}

// three starts a site of three voters.
func three(t *testing.T) []*running {
	t.Helper()
	first := start(t, config(t))
	nodes := []*running{first, join(t, first, "two"), join(t, first, "three")}
	allLive(t, nodes)
	await(t, "three voters", func() string {
		s, err := first.member.Status(t.Context())
		voters := 0
		for _, m := range s.Members {
			if m.Voter {
				voters++
			}
		}
		if err != nil || voters != 3 {
			return fmt.Sprint(voters, err)
		}
		return ""
	})
	return nodes
}

// allLive waits until the nodes see each other and nobody else.
func allLive(t *testing.T, nodes []*running) {
	t.Helper()
	await(t, "the nodes see each other", func() string {
		for _, n := range nodes {
			if live := len(n.member.Live()); live != len(nodes) {
				return fmt.Sprintf("%s sees %d", n.config.Name, live)
			}
		}
		return ""
	})
}

func (r *running) holds(b []byte) bool {
	_, err := r.rooms.store.Stat(digest.FromBytes(b))
	return err == nil
}

// lacks holds a node of several to knowing that something is not there. While the
// site elects a leader, which costs a busy machine a moment now and then, none can.
func (r *running) lacks(path string) {
	r.t.Helper()
	await(r.t, "an answer that a leader confirms", func() string {
		a := r.do("HEAD", path, nil)
		if a.Status == 503 {
			return r.config.Name + " cannot be sure"
		}
		a.want(404)
		return ""
	})
}

func (r *running) row(b []byte) (row blobs.Blob) {
	r.t.Helper()
	if err := r.db.View(func(v *table.View) (err error) {
		row, _, err = r.rooms.records.Get(v, digest.FromBytes(b))
		return err
	}); err != nil {
		r.t.Fatal(err)
	}
	return row
}

func TestPushHerePullThere(t *testing.T) {
	done := leaks(t)
	nodes := three(t)
	p := nodes[0].push("library/app", "v1", content(1, 3<<20))
	if got := p.answer.Header.Get("Atoll-Copies"); got != "" && got != "2" {
		t.Errorf("a push with three nodes up says that it made %q copies", got)
	}
	layer, holders := p.blobs[1], 0
	for _, n := range nodes {
		if n.holds(layer) {
			holders++
		}
	}
	if holders < 2 {
		t.Fatalf("acknowledged with the layer on %d nodes", holders)
	}
	// Each has it, by a pull or by repair, whichever is first. A pull may go on
	// without a piece root when no holder gives one in time; a repair has none yet.
	for _, n := range nodes {
		n.pull(p, "v1")
	}
	await(t, "every home holds the layer, its root is known", func() string {
		for _, n := range nodes {
			if row := n.row(layer); !n.holds(layer) || row.Root == nil || row.Copies != 2 {
				return fmt.Sprintf("%s holds it: %v, row %+v", n.config.Name, n.holds(layer), row)
			}
		}
		return ""
	})
	for _, n := range nodes {
		if err := n.stop(); err != nil {
			t.Error(err)
		}
	}
	done()
}

// TestSHA512: content named by sha512 is copied, found and served like any other,
// in either order of who pushes what where.
func TestSHA512(t *testing.T) {
	nodes := three(t)
	layer, config := content(7, 2<<20), []byte(`{"os":"linux","architecture":"arm64"}`)
	named := func(b []byte, mediaType string) v1.Descriptor {
		return v1.Descriptor{MediaType: mediaType, Digest: digest.SHA512.FromBytes(b), Size: int64(len(b))}
	}
	session := nodes[0].do("POST", "/v2/library/app/blobs/uploads/?digest-algorithm=sha512", nil).want(202).Header.Get("Location")
	session = nodes[1].do("PATCH", session, layer[:1<<20], "Content-Type", "application/octet-stream").want(202).Header.Get("Location")
	nodes[2].do("PUT", session+"?digest="+digest.SHA512.FromBytes(layer).String(), layer[1<<20:], "Content-Type", "application/octet-stream").want(201)
	nodes[1].do("POST", "/v2/library/app/blobs/uploads/?digest="+digest.SHA512.FromBytes(config).String(), config).want(201)
	manifest, err := json.Marshal(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		Config: named(config, v1.MediaTypeImageConfig), Layers: []v1.Descriptor{named(layer, v1.MediaTypeImageLayer)},
	})
	if err != nil {
		t.Fatal(err)
	}
	d := named(manifest, "").Digest.String()
	a := nodes[2].do("PUT", "/v2/library/app/manifests/"+d+"?tag=v1", manifest, "Content-Type", v1.MediaTypeImageManifest).want(201)
	if copies := a.Header.Get("Atoll-Copies"); copies != "2" {
		t.Errorf("acknowledged with %q copies", copies)
	}
	for _, n := range nodes {
		for _, reference := range []string{"v1", d} {
			if a := n.do("GET", "/v2/library/app/manifests/"+reference, nil).want(200); !bytes.Equal(a.Body, manifest) || a.Header.Get("Docker-Content-Digest") != d {
				t.Errorf("%s gives %s as %s", n.config.Name, reference, a.Header.Get("Docker-Content-Digest"))
			}
		}
		for _, b := range [][]byte{config, layer} {
			path := "/v2/library/app/blobs/" + digest.SHA512.FromBytes(b).String()
			if got := n.do("GET", path, nil).want(200).Body; !bytes.Equal(got, b) {
				t.Errorf("%s gives %d other bytes", n.config.Name, len(got))
			}
			n.lacks("/v2/library/app/blobs/" + digest.FromBytes(b).String())
		}
	}
}

// TestLeaderHandsOver: a graceful stop costs the site no election timeout.
func TestLeaderHandsOver(t *testing.T) {
	nodes := three(t)
	leader := 0
	for i, n := range nodes {
		if n.member.Self() == nodes[0].member.Leader() {
			leader = i
		}
	}
	if err := nodes[leader].stop(); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(nodes[leader].logs.String(), "was not handed over") {
		t.Error("the leader left without handing over")
	}
	other := nodes[(leader+1)%3]
	p := other.push("library/app", "v1", content(2, 1000))
	other.pull(p, "v1")
}

// TestNodesGoAndReturn: what is down is skipped, and what lacks blobs gets them.
func TestNodesGoAndReturn(t *testing.T) {
	nodes := three(t)
	if err := nodes[2].stop(); err != nil {
		t.Fatal(err)
	}
	allLive(t, nodes[:2])
	p := nodes[0].push("library/app", "v1", content(3, 600<<10))
	if row := nodes[0].row(p.blobs[1]); row.Copies != 2 || !nodes[1].holds(p.blobs[1]) {
		t.Errorf("with two of three up: %+v, held by the other: %v", row, nodes[1].holds(p.blobs[1]))
	}

	// The third returns with its state, but its disk for content is a new one.
	if err := os.RemoveAll(filepath.Join(nodes[2].Data, "content")); err != nil {
		t.Fatal(err)
	}
	nodes[2] = nodes[2].again()
	await(t, "the node that returned has the layer again", func() string {
		if !nodes[2].holds(p.blobs[1]) {
			return nodes[2].logs.String()
		}
		return ""
	})
	nodes[2].pull(p, "v1")

	// Without a majority reads go on and say that they may be old; an absence
	// nobody can be sure of.
	for _, n := range nodes[:2] {
		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
	}
	allLive(t, nodes[2:])
	nodes[2].pull(p, "v1")
	nodes[2].do("GET", "/v2/library/app/manifests/none", nil).want(503)
	nodes[2].do("PUT", "/v2/library/app/manifests/v2", p.manifest, "Content-Type", "application/vnd.oci.image.manifest.v1+json").want(503)
}

// TestUploadThroughAnyNode: a session lives on one node and goes on through all.
func TestUploadThroughAnyNode(t *testing.T) {
	nodes := three(t)
	b := content(4, 300<<10)
	place := func(a answer) string {
		u, err := url.Parse(a.Header.Get("Location"))
		if err != nil || u.Path == "" {
			t.Fatalf("Location %q: %v", a.Header.Get("Location"), err)
		}
		return u.RequestURI()
	}
	session := place(nodes[0].do("POST", "/v2/library/app/blobs/uploads/", nil).want(202))
	// The header by which nodes tell each other the user is nothing to clients.
	system := []string{"Atoll-Principal", `{"Kind":3,"Name":"system","Admin":true}`, "Content-Type", "application/octet-stream"}
	for _, n := range nodes {
		n.as(login{}, "PATCH", session, b[:10], system...).want(401)
		n.as(login{}, "PATCH", session, b[:10], append(system, "Connection", "Atoll-Principal")...).want(401)
	}
	session = place(nodes[1].do("PATCH", session, b[:100<<10], "Content-Type", "application/octet-stream", "Atoll-Principal", `{"Kind":0}`).want(202))
	session = place(nodes[2].do("PATCH", session, b[100<<10:], "Content-Type", "application/octet-stream").want(202))
	at := nodes[1].do("GET", session, nil).want(204).Header.Get("Range")
	if want := fmt.Sprintf("0-%d", len(b)-1); at != want {
		t.Errorf("the session is at %s, want %s", at, want)
	}
	separator := "?"
	if strings.Contains(session, "?") {
		separator = "&"
	}
	nodes[2].do("PUT", session+separator+"digest="+digest.FromBytes(b).String(), nil).want(201)
	if !nodes[0].holds(b) {
		t.Error("the blob is not on the node that opened the session")
	}
	if got := nodes[1].do("GET", "/v2/library/app/blobs/"+digest.FromBytes(b).String(), nil).want(200).Body; !bytes.Equal(got, b) {
		t.Error("the blob came back as another")
	}

	// The owner is gone: the client starts again.
	session = place(nodes[0].do("POST", "/v2/library/app/blobs/uploads/", nil).want(202))
	if err := nodes[0].stop(); err != nil {
		t.Fatal(err)
	}
	allLive(t, nodes[1:])
	a := nodes[1].do("PATCH", session, b, "Content-Type", "application/octet-stream").want(404)
	if !strings.Contains(string(a.Body), "BLOB_UPLOAD_UNKNOWN") {
		t.Errorf("the owner is gone, and the answer is %s", a.Body)
	}
}

func TestJoinWithNoToken(t *testing.T) {
	n := start(t, config(t))
	c := config(t)
	c.Init, c.Join, c.Token = false, []string{n.PeerAddr}, "ATOLL1-nonsense"
	if _, err := tryStart(t, c); err == nil || !strings.Contains(err.Error(), "token") {
		t.Errorf("joined with nonsense: %v", err)
	}
	if exists(filepath.Join(c.Data, "raft")) {
		t.Error("the refused join left the beginnings of a node")
	}
}
