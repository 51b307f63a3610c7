package node

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
)

// What one node has answered as deleted no node shows any more, however little it
// has heard yet.
func TestDeletedForAllNodesAtOnce(t *testing.T) {
	nodes := three(t)
	// ask repeats what no leader confirmed in time, as on a machine that stalls.
	ask := func(n *running, method, path string) (a answer) {
		await(t, "an answer that a leader confirms", func() string {
			if a = n.do(method, path, nil); a.Status == 503 || a.Header.Get("Atoll-Stale") != "" {
				return fmt.Sprintf("%s answered %d, stale %q", a.what, a.Status, a.Header.Get("Atoll-Stale"))
			}
			return ""
		})
		return a
	}
	tags := func(n *running) (list []string) {
		a := ask(n, "GET", "/v2/library/app/tags/list")
		if a.Status == 404 {
			return nil // of the repository nothing is left
		}
		var got struct{ Tags []string }
		if err := json.Unmarshal(a.want(200).Body, &got); err != nil {
			t.Fatal(err)
		}
		return got.Tags
	}
	for i := range 6 {
		one, two, three := nodes[i%3], nodes[(i+1)%3], nodes[(i+2)%3]
		p := one.push("library/app", "v1", content(uint64(40+i), 1000))
		manifest := "/v2/library/app/manifests/"
		one.do("PUT", manifest+"v2", p.manifest, "Content-Type", "application/vnd.oci.image.manifest.v1+json").want(201)
		d := digest.FromBytes(p.manifest).String()

		// A tag goes and its manifest stays.
		one.do("DELETE", manifest+"v1", nil).want(202)
		for _, n := range []*running{two, three, one} {
			ask(n, "GET", manifest+"v1").want(404)
			ask(n, "HEAD", manifest+"v1").want(404)
			ask(n, "GET", manifest+"v2").want(200)
			ask(n, "GET", manifest+d).want(200)
			if list := tags(n); slices.Contains(list, "v1") || !slices.Contains(list, "v2") {
				t.Errorf("%s lists %v", n.config.Name, list)
			}
		}
		// A manifest goes with its tags.
		two.do("DELETE", manifest+d, nil).want(202)
		for _, n := range []*running{three, one, two} {
			for _, reference := range []string{"v2", d} {
				ask(n, "GET", manifest+reference).want(404)
			}
			if list := tags(n); len(list) != 0 {
				t.Errorf("%s lists %v", n.config.Name, list)
			}
		}
		// And its blobs, once nothing needs them.
		layer := fmt.Sprintf("/v2/library/app/blobs/%s", digest.FromBytes(p.blobs[1]))
		allLive(t, nodes) // a node that is not seen is not waited for
		three.do("DELETE", layer, nil).want(202)
		for _, n := range []*running{one, two, three} {
			ask(n, "GET", layer).want(404)
			ask(n, "HEAD", layer).want(404)
		}
	}
}
