package e2e

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// torrents is how many blobs a node moves by BitTorrent.
func (s *site) torrents(ctx context.Context, i int) (n int) {
	s.t.Helper()
	for line := range strings.Lines(string(s.wire(s.nodes[i]).get(ctx, "/metrics", http.StatusOK).body)) {
		if _, err := fmt.Sscanf(line, "atoll_peers_torrents %d", &n); err == nil {
			return n
		}
	}
	s.t.Fatal("the metrics do not say how many torrents there are")
	return 0
}

// A site that is told to moves the blobs of a project by BitTorrent: push to one node, pull from
// another, and the holder that is killed midway is missed by nobody, for there is a
// second one.
func TestSiteByBitTorrent(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 5*time.Minute)
	s := newSite(ctx, t, newLab(t), plan{name: "bt", net: 97, nodes: 3})
	s.atoll(ctx, s.nodes[0], "settings", "set", "peers.transfer-engine", "project=library: bittorrent | stream")
	s.atoll(ctx, s.nodes[0], "settings", "set", "peers.replicas", "2")
	img := image(ctx, t, 24<<20)
	s.pushAll(ctx, s.nodes[0], img, "library/app", "v1")
	for _, n := range s.nodes { // so that a pull takes a while
		if err := n.Host.ShapeOut(ctx, 4<<20); err != nil {
			t.Fatal(err)
		}
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	until := func(what string, ok func() bool) {
		t.Helper()
		for !ok() {
			select {
			case <-tick.C:
			case <-ctx.Done():
				t.Fatal(what)
			}
		}
	}
	until("torrents that nobody uses are kept", func() bool { return s.torrents(ctx, 1)+s.torrents(ctx, 2) == 0 })
	type pulled struct{ node, index string }
	done := make(chan pulled, 2)
	for _, n := range s.nodes[1:] {
		go func() {
			dir := t.TempDir()
			out, err := n.Host.RunEnv(ctx, s.env, "skopeo", "copy", "--all", "--preserve-digests", "docker://"+n.Registry()+"/library/app:v1", "oci:"+dir+":x")
			if err != nil {
				out = err.Error()
			} else {
				out, _ = n.Host.RunEnv(ctx, s.env, "crane", "digest", n.Registry()+"/library/app:v1")
			}
			done <- pulled{n.Host.Name, strings.TrimSpace(out)}
		}()
	}
	// One of the two lacks a large blob, and fetches it.
	until("nothing is pulled by BitTorrent", func() bool { return s.torrents(ctx, 1)+s.torrents(ctx, 2) > 0 })
	s.nodes[0].Kill()
	for range 2 {
		if p := <-done; p.index != img.Index.String() {
			t.Errorf("%s gave %s, want %s", p.node, p.index, img.Index)
		}
	}
}
