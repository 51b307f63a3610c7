package registry_test

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
)

// Tags are moved and deleted on the condition of what they point at.
func TestConditionalTags(t *testing.T) {
	n := single(t)
	var manifests [3][]byte
	var at [3]string // entity tags
	for i := range manifests {
		manifests[i] = image(n.pushBlob("app", []byte("{}")), nil, n.pushBlob("app", random(10)))
		at[i] = strconv.Quote(digest.FromBytes(manifests[i]).String())
	}
	put := func(i int, headers ...string) *answer {
		return n.do("PUT", "/v2/app/manifests/v1", manifests[i], append(headers, "Content-Type", ociManifest)...)
	}
	points := func(i int) {
		t.Helper()
		n.do("GET", "/v2/app/manifests/v1", nil).want(200).has("Etag", at[i])
	}

	put(0, "If-Match", at[0]).want(412, "PRECONDITION") // none is there
	put(0, "If-Match", "*").want(412, "PRECONDITION")
	n.do("GET", "/v2/app/manifests/v1", nil).want(404)
	put(0, "If-None-Match", "*").want(201)
	put(1, "If-None-Match", "*").want(412, "PRECONDITION")
	put(0, "If-None-Match", "*").want(412, "PRECONDITION") // also when it would change nothing
	points(0)

	put(1, "If-Match", at[2]).want(412, "PRECONDITION")
	put(1, "If-Match", at[2]+", "+at[0]).want(201)
	refused := put(2, "If-Match", at[0]).want(412, "PRECONDITION")
	var e struct {
		Errors []struct {
			Message string
			Detail  struct{ Tag, Digest string }
		}
	}
	must(t, json.Unmarshal(refused.body, &e))
	if d := e.Errors[0].Detail; d.Tag != "v1" || strconv.Quote(d.Digest) != at[1] || !strings.Contains(e.Errors[0].Message, d.Digest) {
		t.Errorf("the refusal does not say where the tag is: %s", refused.body)
	}
	points(1)
	put(2, "If-None-Match", at[1]).want(412, "PRECONDITION")
	put(2, "If-None-Match", at[0]).want(201)
	put(1, "If-Match", "*").want(201)

	// By digest with one tag in the query it is the same; with none or two there
	// is nothing that a condition could mean.
	byDigest := "/v2/app/manifests/" + digest.FromBytes(manifests[2]).String()
	n.do("PUT", byDigest+"?tag=v1", manifests[2], "Content-Type", ociManifest, "If-Match", at[0]).want(412, "PRECONDITION")
	n.do("PUT", byDigest+"?tag=v1", manifests[2], "Content-Type", ociManifest, "If-Match", at[1]).want(201)
	n.do("PUT", byDigest+"?tag=v1&tag=v2", manifests[2], "Content-Type", ociManifest, "If-Match", at[2]).want(400)
	n.do("PUT", byDigest, manifests[2], "Content-Type", ociManifest, "If-None-Match", "*").want(400)
	n.do("DELETE", byDigest, nil, "If-Match", at[2]).want(400)
	for _, nonsense := range []string{"v1", digest.FromBytes(manifests[2]).String(), "W/" + at[2], `"sha256:12"`, ",", `"`, ""} {
		put(0, "If-Match", nonsense).want(400)
		n.do("DELETE", "/v2/app/manifests/v1", nil, "If-None-Match", nonsense).want(400)
	}
	points(2)

	n.do("DELETE", "/v2/app/manifests/none", nil, "If-Match", at[2]).want(404, "MANIFEST_UNKNOWN")
	n.do("DELETE", "/v2/app/manifests/v1", nil, "If-Match", at[1]).want(412, "PRECONDITION")
	points(2)
	n.do("DELETE", "/v2/app/manifests/v1", nil, "If-Match", at[2]).want(202)
	n.do("GET", "/v2/app/manifests/v1", nil).want(404)
}

// Clients that move a tag on If-Match lose none of each other's moves: the tag
// passes through as many manifests as moves were acknowledged.
func TestCompareAndSwapOfATag(t *testing.T) {
	n := single(t)
	config := n.pushBlob("app", []byte("{}"))
	const clients, moves = 6, 4
	images := make([][][]byte, clients)
	for i := range images {
		for j := range moves {
			images[i] = append(images[i], image(config, nil, n.pushBlob("app", fmt.Append(nil, i, " ", j))))
		}
	}
	n.do("PUT", "/v2/app/manifests/v1", image(config, nil), "Content-Type", ociManifest).want(201)
	var mu sync.Mutex
	next := map[string]string{} // by entity tag, what was pushed on it
	var refused atomic.Int64
	var all sync.WaitGroup
	for i := range clients {
		all.Go(func() {
			for _, m := range images[i] {
				for {
					on := n.do("GET", "/v2/app/manifests/v1", nil).want(200).header.Get("Etag")
					a := n.do("PUT", "/v2/app/manifests/v1", m, "Content-Type", ociManifest, "If-Match", on)
					if a.status == 412 {
						refused.Add(1)
						continue
					}
					a.want(201)
					mu.Lock()
					if other, ok := next[on]; ok {
						t.Errorf("both %s and %x were pushed on %s", other, m[:8], on)
					}
					next[on] = strconv.Quote(digest.FromBytes(m).String())
					mu.Unlock()
					break
				}
			}
		})
	}
	all.Wait()
	at, passed := strconv.Quote(digest.FromBytes(image(config, nil)).String()), 0
	for ; next[at] != ""; passed++ {
		at = next[at]
	}
	if passed != clients*moves {
		t.Errorf("the tag passed through %d of %d manifests; %d pushes were refused", passed, clients*moves, refused.Load())
	}
	n.do("GET", "/v2/app/manifests/v1", nil).want(200).has("Etag", at)
}
