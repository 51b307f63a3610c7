package node

import (
	"bytes"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/jobs"
	"github.com/atoll-registry/atoll/node/prefetch"
)

// A cache has an image before anybody asked it, all of it, and keeps it.
func TestPrefetchToACache(t *testing.T) {
	// At the beginning of a minute, so that the next one is near and still far enough.
	now := time.Now()
	ahead := now.Truncate(time.Minute).Add(time.Minute + time.Second).Sub(now)
	clock := func() time.Time { return time.Now().Add(ahead) }
	c := config(t)
	c.clock = clock
	one := start(t, c)
	two := join(t, one, "two", func(c *Config) { c.Cache, c.CacheSize, c.clock = true, 64<<20, clock })
	allLive(t, []*running{one, two})
	layer := bytes.Repeat([]byte("a layer of an image "), 30<<10)
	one.push("library/app", "v1.0", layer)
	other := []byte("another image's layer")
	one.push("library/app", "v2.0", other)
	if two.holds(layer) {
		t.Fatal("the cache holds the layer already")
	}
	one.set("traffic.timezone", "UTC")
	body := fmt.Sprintf(`{"repository":"library/app","tags":["v1.*"],"to":["two"],"before":%q}`, clock().UTC().Add(time.Minute).Format("15:04"))
	var v prefetch.View
	one.do("POST", "/api/atoll/v1/prefetch", []byte(body), "Content-Type", "application/json").want(http.StatusCreated).decode(&v)
	await(t, "the prefetch to succeed", func() string {
		one.do("GET", "/api/atoll/v1/prefetch/"+v.ID, nil).want(http.StatusOK).decode(&v)
		if v.State != jobs.Success {
			return fmt.Sprintf("%+v", v)
		}
		return ""
	})
	if !two.holds(layer) || two.holds(other) {
		t.Errorf("the cache holds what was meant: %v, and what was not: %v", two.holds(layer), two.holds(other))
	}
	if d := digest.FromBytes(layer); !two.rooms.prefetch.Pinned(d) || two.rooms.prefetch.Pinned(digest.FromBytes(other)) {
		t.Error("what was prefetched may be let go of")
	}
	if p := v.Progress.Nodes["two"]; p.Missing != 0 || p.Blobs != 2 {
		t.Errorf("progress: %+v", p)
	}
}
