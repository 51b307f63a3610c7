package e2e

import (
	"testing"
	"time"
)

// The path to one node carries smaller packets than both ends believe, and nobody tells
// them: bulk gets through all the same, both ways, and the node stays a member.
func TestUnannouncedMTU(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 3*time.Minute)
	s := newSite(ctx, t, newLab(t), plan{name: "m", net: 100, nodes: 3})
	for _, node := range s.nodes {
		if err := node.Host.Segment(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.nodes[2].Host.Narrow(ctx, 1300); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	s.trade(ctx, "narrow")
	figure("unannounced_mtu_towards", time.Since(began).Seconds(), "s", 60)
	s.allUp(ctx)
	if *ballast <= atOnce {
		return // the other way takes as long again
	}
	began = time.Now()
	img := image(ctx, t, 2<<20)
	s.pushAll(ctx, s.nodes[2], img, "library/carried", "back")
	if got := s.pullAll(ctx, s.nodes[0], "carried:back"); got != img.Index.String() {
		t.Fatalf("%s serves %s, want %s", s.nodes[0].Host.Name, got, img.Index)
	}
	figure("unannounced_mtu_back", time.Since(began).Seconds(), "s", 60)
}
