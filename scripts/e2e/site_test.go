package e2e

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// Stories 2 and 3: push to one node, pull from another, kill any one.
func TestSiteOfThreeSurvivesKills(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 5*time.Minute)
	s := newSite(ctx, t, newLab(t), plan{name: "a", net: 71, nodes: 3})
	img := image(ctx, t, 24<<20)
	s.pushAll(ctx, s.nodes[0], img, "library/app", "v1")

	third := s.nodes[2]
	if got := s.pullAll(ctx, third, "app:v1"); got != img.Index.String() {
		t.Fatalf("node 3 serves %s by tag, want %s", got, img.Index)
	}
	if got := s.pullAll(ctx, third, "library/app@"+img.Index.String()); got != img.Index.String() {
		t.Fatalf("node 3 serves %s by digest, want %s", got, img.Index)
	}
	found := s.run(ctx, third, built.orasgo, "-u", "admin", "-p", lab.Password, "discover", third.Registry()+"/library/app:v1")
	if !strings.Contains(found, img.SBOM.String()) {
		t.Fatalf("node 3 does not list the SBOM %s among the referrers: %q", img.SBOM, found)
	}

	for round, victim := range s.nodes {
		tag := fmt.Sprintf("round%d", round)
		victim.Kill()
		rest := []*lab.Node{s.nodes[(round+1)%3], s.nodes[(round+2)%3]}
		for _, node := range rest {
			if got := s.pullAll(ctx, node, "app:v1"); got != img.Index.String() {
				t.Fatalf("with %s killed, %s serves %s", victim.Host.Name, node.Host.Name, got)
			}
		}
		// A write may wait for a new leader, and goes on.
		small := image(ctx, t, 0)
		s.pushAll(ctx, rest[0], small, "library/app", tag)
		if got := s.pullAll(ctx, rest[1], "app:"+tag); got != small.Index.String() {
			t.Fatalf("with %s killed, the push to %s is %s on %s", victim.Host.Name, rest[0].Host.Name, got, rest[1].Host.Name)
		}
		if err := victim.Start(ctx); err != nil {
			t.Fatal(err)
		}
		// It catches up by itself: what was pushed meanwhile is there.
		if got := s.pullAll(ctx, victim, "app:"+tag); got != small.Index.String() {
			t.Fatalf("%s came back and serves %s", victim.Host.Name, got)
		}
		if err := victim.WaitStatus(ctx, "everything to have its copies", func(st lab.Status) bool {
			up := 0
			for _, n := range st.Nodes {
				if n.Up {
					up++
				}
			}
			return up == 3 && st.Quorum && !st.Counting && st.UnderReplicated == 0
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// Without quorum pulls go on and say how old they may be; pushes are refused with
// the reason.
func TestLastNodeServesPullsAndRefusesPushes(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 3*time.Minute)
	s := newSite(ctx, t, newLab(t), plan{name: "q", net: 72, nodes: 3})
	img := image(ctx, t, 0)
	s.pushAll(ctx, s.nodes[0], img, "library/app", "v1")
	if got := s.pullAll(ctx, s.nodes[2], "app:v1"); got != img.Index.String() {
		t.Fatalf("node 3 serves %s", got)
	}
	if err := s.nodes[2].WaitStatus(ctx, "repair to be done", func(st lab.Status) bool { return !st.Counting && st.UnderReplicated == 0 }); err != nil {
		t.Fatal(err)
	}
	last := s.nodes[2]
	s.nodes[0].Kill()
	s.nodes[1].Kill()
	if got := s.pullAll(ctx, last, "app:v1"); got != img.Index.String() {
		t.Fatalf("the last node serves %s", got)
	}
	// On the wire, since clients try again and again what may go well later.
	w := s.wire(last)
	manifest := w.get(ctx, "/v2/library/app/manifests/v1", http.StatusOK)
	if manifest.header.Get("Atoll-Stale") == "" {
		t.Error("an answer that no leader confirmed does not say how old it may be")
	}
	w.get(ctx, "/v2/library/app/manifests/nothing", http.StatusServiceUnavailable) // nobody can know
	push := w.request(ctx, http.MethodPut, "/v2/library/app/manifests/v2", bytes.NewReader(manifest.body))
	push.Header.Set("Content-Type", manifest.header.Get("Content-Type"))
	refused := w.do(push)
	refused.wantError(t, http.StatusServiceUnavailable, "UNAVAILABLE", "no leader")
	if refused.header.Get("Retry-After") == "" {
		t.Error("a push without quorum is not told when to try again")
	}
}
