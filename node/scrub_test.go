package node

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/node/peers"
	"github.com/atoll-registry/atoll/node/scrub"
)

// file is where this node keeps a blob.
func (r *running) file(b []byte) string {
	r.t.Helper()
	f, _, err := r.rooms.store.OpenBlob(digest.FromBytes(b))
	if err != nil {
		r.t.Fatal(err)
	}
	defer f.Close()
	return f.(*os.File).Name()
}

func (r *running) scrubStatus() (s scrub.Status) {
	r.t.Helper()
	r.do("GET", "/api/atoll/v1/scrub", nil).want(200).decode(&s)
	return s
}

// A site of three: what one disk has lost comes back from the others; what all
// have lost is named, is unknown to clients, and comes back with the next push.
func TestScrub(t *testing.T) {
	nodes := three(t)
	layer := content(7, 900<<10)
	p := nodes[0].push("library/app", "v1", layer)
	await(t, "every node holds the layer", func() string {
		for _, n := range nodes {
			if !n.holds(layer) {
				return n.config.Name + " does not"
			}
		}
		return ""
	})
	name := nodes[1].file(layer)
	rotten := append([]byte{}, layer...)
	rotten[500<<10] ^= 4
	if err := os.WriteFile(name, rotten, 0o600); err != nil {
		t.Fatal(err)
	}
	var started scrub.Status
	nodes[1].do("POST", "/api/atoll/v1/scrub", nil).want(202).decode(&started)
	if !started.Running {
		t.Errorf("scrub start answers %+v", started)
	}
	await(t, "the damaged copy is healed", func() string {
		s := nodes[1].scrubStatus()
		if len(s.Findings) != 1 || s.Findings[0].State != scrub.Healed || s.Running {
			return fmt.Sprintf("%+v", s)
		}
		return ""
	})
	if f := nodes[1].scrubStatus().Findings[0]; f.Kind != scrub.Damaged || f.Digest != digest.FromBytes(layer) || f.Repositories[0] != "library/app" {
		t.Errorf("reported as %+v", f)
	}
	if got, err := os.ReadFile(nodes[1].file(layer)); err != nil || digest.FromBytes(got) != digest.FromBytes(layer) {
		t.Fatalf("the healed file has %d bytes of %s, %v", len(got), digest.FromBytes(got), err)
	}

	for _, n := range nodes {
		if err := os.Remove(n.file(layer)); err != nil {
			t.Fatal(err)
		}
	}
	nodes[0].do("POST", "/api/atoll/v1/scrub", nil).want(202)
	path := "/v2/library/app/blobs/" + digest.FromBytes(layer).String()
	for _, n := range nodes {
		await(t, "the blob is unknown", func() string {
			if got := n.do("HEAD", path, nil); got.Status != 404 {
				return fmt.Sprint(got.Status)
			}
			return ""
		})
	}
	var status peers.Status
	nodes[2].do("GET", "/api/atoll/v1/cluster", nil).want(200).decode(&status)
	if status.Lost != 1 || !strings.Contains(strings.Join(status.Advice, "\n"), "atoll scrub status") {
		t.Errorf("the state of the cluster is %+v", status)
	}
	nodes[2].push("library/other", "v1", layer)
	for _, n := range nodes {
		n.pull(p, "v1")
	}
	await(t, "nothing is lost", func() string {
		s := nodes[0].scrubStatus()
		if s.Lost != 0 || nodes[0].row(layer).Copies != 2 {
			return fmt.Sprintf("%+v, %+v", s, nodes[0].row(layer))
		}
		return ""
	})
}

// The row of a blob outlives its last copy: a node whose disk broke between the blob's push
// and its manifest's had the only one. Who pushes it again is told so at the second try.
func TestPushMendsWhatNobodyHolds(t *testing.T) {
	n := start(t, config(t))
	layer := content(9, 300<<10)
	p := n.push("library/app", "v1", layer)
	if err := os.Remove(n.file(layer)); err != nil {
		t.Fatal(err)
	}
	blob := "/v2/library/app/blobs/" + digest.FromBytes(layer).String()
	n.do("HEAD", blob, nil).want(200)
	n.do("PUT", "/v2/library/app/manifests/v2", p.manifest, "Content-Type", v1.MediaTypeImageManifest).want(503)
	await(t, "the blob is unknown", func() string {
		if got := n.do("HEAD", blob, nil); got.Status != 404 {
			return fmt.Sprint(got.Status)
		}
		return ""
	})
	n.push("library/app", "v2", layer)
	n.pull(p, "v1")
}
