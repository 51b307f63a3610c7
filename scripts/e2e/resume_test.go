package e2e

import (
	"context"
	"crypto/sha256"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// received is how many bytes have come to the node's host over its link.
func (s *site) received(ctx context.Context, node *lab.Node) int64 {
	s.t.Helper()
	out := s.run(ctx, node, "cat", "/sys/class/net/eth0/statistics/rx_bytes")
	n, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

// reading is a client that reads a blob; err is of the connection.
type reading struct {
	digest digest.Digest
	err    error
}

// read begins to read a blob at a node once it knows of it.
func (s *site) read(ctx context.Context, node *lab.Node, path string) <-chan reading {
	s.t.Helper()
	w := s.wire(node)
	var resp *http.Response
	s.until(ctx, "the node to serve "+path, func() (ok bool) {
		var err error
		if resp, err = w.client.Do(w.request(ctx, http.MethodGet, path, nil)); err != nil {
			s.t.Fatal(err)
		}
		if resp.StatusCode != http.StatusOK {
			resp.Body.Close()
		}
		return resp.StatusCode == http.StatusOK
	})
	ended := make(chan reading, 1)
	go func() {
		defer resp.Body.Close()
		sum := sha256.New()
		_, err := io.Copy(sum, resp.Body)
		ended <- reading{digest.NewDigest(digest.SHA256, sum), err}
	}()
	return ended
}

// A blob is on its way to a node over a slow link when the node that receives it, and
// then those that hold it, are killed with kill -9 and come back: what was verified does
// not cross the link again. The bytes are counted on the link.
func TestTransfersGoOnAfterKills(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 4*time.Minute)
	s := newSite(ctx, t, newLab(t), plan{name: "r", net: 99, nodes: 3})
	node := s.nodes[2]
	node.Kill()
	// See TestBlobIsReadWhileItArrives.
	if err := s.nodes[0].WaitStatus(ctx, "the node to be missed", func(st lab.Status) bool {
		for _, n := range st.Nodes {
			if n.Name == node.Host.Name {
				return !n.Up
			}
		}
		return false
	}); err != nil {
		t.Fatal(err)
	}
	const size = 16 << 20
	paths := map[digest.Digest]string{}
	var order []digest.Digest
	for range 2 {
		data, d := randomBytes(t, size)
		s.wire(s.nodes[0]).pushBlob(ctx, "library/resumed", data)
		paths[d] = "/v2/library/resumed/blobs/" + d.String()
		order = append(order, d)
	}
	if err := node.Host.Shape(ctx, 3<<20); err != nil {
		t.Fatal(err)
	}
	if err := node.Start(ctx, asCache...); err != nil { // which fetches nothing by itself
		t.Fatal(err)
	}
	// Headers, and what was under way when a node was killed.
	const most = size*106/100 + 2<<20
	half := func(d digest.Digest) {
		s.until(ctx, "half of the blob to be there", func() bool {
			return len(arrived(node, map[digest.Digest]int64{d: size})) >= pieceCount(size)/2
		})
		if holds(node, d) {
			t.Fatal("the blob came whole before anybody was killed: the test proves nothing")
		}
	}
	check := func(who string, d digest.Digest, r reading, before int64) {
		t.Helper()
		if r.err != nil || r.digest != d {
			t.Errorf("%s was killed: the client read %s, %v", who, r.digest, r.err)
		}
		crossed := s.received(ctx, node) - before
		figure("resume_after_kill_of_"+who, float64(crossed)/size, "F, on the wire", float64(most)/size)
		if crossed > most {
			t.Errorf("%s was killed: %d bytes crossed the link for a blob of %d, want at most %d", who, crossed, size, most)
		}
	}

	before := s.received(ctx, node)
	broken := s.read(ctx, node, paths[order[0]])
	half(order[0])
	node.Kill()
	if r := <-broken; r.err == nil {
		t.Fatal("the client of a node that was killed got all")
	}
	if err := node.Start(ctx, asCache...); err != nil {
		t.Fatal(err)
	}
	check("the_receiver", order[0], <-s.read(ctx, node, paths[order[0]]), before)

	before = s.received(ctx, node)
	going := s.read(ctx, node, paths[order[1]])
	half(order[1])
	for _, holder := range s.nodes[:2] {
		holder.Kill()
	}
	for _, holder := range s.nodes[:2] {
		if err := holder.Start(ctx); err != nil {
			t.Fatal(err)
		}
	}
	check("the_holders", order[1], <-going, before)
}
