package node

import (
	"encoding/json"
	"fmt"
	"os"
	"testing"

	"github.com/atoll-registry/atoll/node/peers"
)

// status asks a node for the state of its cluster.
func (r *running) status() (s peers.Status) {
	r.t.Helper()
	a := r.do("GET", "/api/atoll/v1/cluster", nil)
	a.want(200)
	if err := json.Unmarshal(a.Body, &s); err != nil {
		r.t.Fatal(err)
	}
	return s
}

// settled waits until no blob lacks a copy, as a node sees it.
func (r *running) settled(nodes int) {
	r.t.Helper()
	await(r.t, "no blob lacks a copy", func() string {
		s := r.status()
		if s.Counting || s.UnderReplicated > 0 || len(s.Nodes) != nodes {
			return fmt.Sprintf("%d nodes, %d lack copies, still counting: %v", len(s.Nodes), s.UnderReplicated, s.Counting)
		}
		return ""
	})
}

// Whatever was acknowledged with two copies outlives the disk of any one node; what lacks copies is counted until a node of the
// same name has taken its place and holds it.
func TestADestroyedDiskLosesNothingAcknowledged(t *testing.T) {
	nodes := three(t)
	var images []pushed
	for i := range 12 {
		p := nodes[i%3].push("library/app", fmt.Sprint("v", i), content(uint64(40+i), 1<<20))
		images = append(images, p)
		if got := p.answer.Header.Get("Atoll-Copies"); got != "" && got != "2" {
			t.Errorf("push %d was acknowledged with %q copies", i, got)
		}
	}
	lost := nodes[2]
	if err := lost.stop(); err != nil { // the very moment of the last answer
		t.Fatal(err)
	}
	if err := os.RemoveAll(lost.config.Data); err != nil {
		t.Fatal(err)
	}
	await(t, "the loss is a figure", func() string {
		if s := nodes[0].status(); s.Counting || s.UnderReplicated == 0 {
			return fmt.Sprintf("%d blobs lack copies, still counting: %v", s.UnderReplicated, s.Counting)
		}
		return ""
	})
	pullAll := func(n *running) {
		t.Helper()
		for i, p := range images {
			n.pull(p, fmt.Sprint("v", i))
		}
	}
	pullAll(nodes[0])
	pullAll(nodes[1])
	heir := join(t, nodes[0], "three")
	nodes[0].settled(3)
	for i, p := range images {
		for _, b := range p.blobs {
			if !heir.holds(b) {
				t.Errorf("the node in its place lacks a blob of push %d", i)
			}
		}
	}
	pullAll(heir)
}
