package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/cluster/clustertest"
	"github.com/atoll-registry/atoll/scripts/lab"
)

const (
	repository = "library/chaos"
	tags       = 3                // registers, written by all clients
	patience   = 25 * time.Second // a write waits 15 s for a leader
)

// config is the configuration of every image.
var config = []byte(`{"architecture":"amd64","os":"linux"}`)

// load is the clients and what they saw.
type load struct {
	site    *site
	ca      string
	history clustertest.History

	mu       sync.Mutex
	acked    []image // pushes that were acknowledged
	failures []string

	reads, stale, lost, failedPulls, judged atomic.Int64
}

// image is a manifest and its layer.
type image struct {
	manifest digest.Digest
	layer    digest.Digest
}

// client is one of them: its connections to each node and its dice.
type client struct {
	*load
	number int
	dice   *rand.Rand
	http   []*http.Client // by node
}

func newLoad(s *site, ca string) *load { return &load{site: s, ca: ca} }

func (l *load) client(number int, seed uint64) (*client, error) {
	pem, err := os.ReadFile(l.ca)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	c := &client{load: l, number: number, dice: rand.New(rand.NewPCG(seed, uint64(number)))}
	for _, b := range l.site.nodes {
		c.http = append(c.http, &http.Client{Transport: &http.Transport{
			DialContext: b.Host.Dial, TLSClientConfig: &tls.Config{RootCAs: pool},
		}})
	}
	return c, nil
}

// work uses the site until ctx ends; what is under way is finished.
func (c *client) work(ctx context.Context) {
	for ctx.Err() == nil {
		node, tag := c.dice.IntN(len(c.site.nodes)), fmt.Sprint("t", c.dice.IntN(tags))
		op, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
		switch n := c.dice.IntN(10); {
		case n < 3:
			c.push(op, node, tag)
		case n < 4:
			c.remove(op, node, tag)
		case n < 6:
			c.pullAnchor(op, node)
		default:
			c.read(op, node, tag)
		}
		cancel()
		pause := time.NewTimer(time.Duration(c.dice.Int64N(int64(300 * time.Millisecond))))
		select {
		case <-pause.C:
		case <-ctx.Done():
		}
		pause.Stop()
	}
	for _, h := range c.http {
		h.CloseIdleConnections()
	}
}

// answer is what came back, read to its end.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// question is a request to a node.
type question struct {
	method, path string
	body         []byte
	mediaType    string
}

func (c *client) do(ctx context.Context, node int, q question) (answer, error) {
	r, err := http.NewRequestWithContext(ctx, q.method, "https://"+c.site.nodes[node].Registry()+"/v2/"+repository+q.path, bytes.NewReader(q.body))
	if err != nil {
		return answer{}, err
	}
	r.SetBasicAuth("admin", lab.Password)
	if q.mediaType != "" {
		r.Header.Set("Content-Type", q.mediaType)
	}
	resp, err := c.http[node].Do(r)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	return answer{resp.StatusCode, resp.Header, b}, err
}

func (c *client) get(ctx context.Context, node int, path string) (answer, error) {
	return c.do(ctx, node, question{method: http.MethodGet, path: path})
}

// blob pushes a blob in one request; ok when it was acknowledged.
func (c *client) blob(ctx context.Context, node int, b []byte) (digest.Digest, bool) {
	d := digest.FromBytes(b)
	a, err := c.do(ctx, node, question{http.MethodPost, "/blobs/uploads/?digest=" + d.String(), b, "application/octet-stream"})
	return d, err == nil && a.status == http.StatusCreated
}

// push pushes a new image under a tag; ok when it was acknowledged.
func (c *client) push(ctx context.Context, node int, tag string) bool {
	layer := make([]byte, 1+c.dice.IntN(48<<10))
	for i := range layer {
		layer[i] = byte(c.dice.Uint32())
	}
	d, ok := c.blob(ctx, node, layer)
	if !ok {
		return false
	}
	conf, ok := c.blob(ctx, node, config)
	if !ok {
		return false
	}
	body, err := json.Marshal(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		Config: v1.Descriptor{MediaType: v1.MediaTypeImageConfig, Digest: conf, Size: int64(len(config))},
		Layers: []v1.Descriptor{{MediaType: v1.MediaTypeImageLayer, Digest: d, Size: int64(len(layer))}},
	})
	if err != nil {
		c.fail("%v", err)
		return false
	}
	manifest := digest.FromBytes(body)
	call := c.history.Write(c.number, tag, manifest.String())
	a, err := c.do(ctx, node, question{http.MethodPut, "/manifests/" + tag, body, v1.MediaTypeImageManifest})
	switch {
	case err == nil && a.status == http.StatusCreated:
		call.Done("")
		c.mu.Lock()
		c.acked = append(c.acked, image{manifest, d})
		c.mu.Unlock()
		return true
	case err == nil && a.status < 500:
		c.fail("a push to %s of blobs that it has got the answer %d %s", c.site.nodes[node].Host.Name, a.status, a.body)
	default:
		call.Lost()
		c.lost.Add(1)
	}
	return false
}

func (c *client) remove(ctx context.Context, node int, tag string) {
	write, read := c.history.Write(c.number, tag, ""), c.history.Read(c.number, tag)
	a, err := c.do(ctx, node, question{method: http.MethodDelete, path: "/manifests/" + tag})
	switch {
	case err == nil && a.status == http.StatusAccepted:
		write.Done("")
	case err == nil && a.status == http.StatusNotFound:
		read.Done("") // it saw that there is none
	case err == nil && a.status < 500:
		c.fail("deleting a tag on %s got the answer %d %s", c.site.nodes[node].Host.Name, a.status, a.body)
	default:
		write.Lost()
		c.lost.Add(1)
	}
}

func (c *client) read(ctx context.Context, node int, tag string) {
	call := c.history.Read(c.number, tag)
	a, err := c.get(ctx, node, "/manifests/"+tag)
	switch {
	case err != nil:
	case a.header.Get("Atoll-Stale") != "":
		c.stale.Add(1)
		c.reads.Add(1)
	case a.status == http.StatusNotFound:
		call.Done("")
		c.reads.Add(1)
	case a.status == http.StatusOK:
		call.Done(digest.FromBytes(a.body).String())
		c.reads.Add(1)
	case a.status < 500:
		c.fail("reading a tag on %s got the answer %d %s", c.site.nodes[node].Host.Name, a.status, a.body)
	}
}

// pullAnchor pulls the image that is there from the beginning. On a node that
// nothing is done to meanwhile, that has to succeed, whoever leads or does not.
func (c *client) pullAnchor(ctx context.Context, node int) {
	b := c.site.nodes[node]
	before, healthy := b.health()
	began := time.Now()
	err := c.pull(ctx, node, "anchor")
	if after, still := b.health(); !healthy || !still || before != after {
		return
	}
	c.judged.Add(1)
	if err != nil {
		c.failedPulls.Add(1)
		c.fail("a pull from %s, to which nothing was done, from %s to %s: %v", b.Host.Name, began.Format(time.TimeOnly), time.Now().Format(time.TimeOnly), err)
	}
}

// pull pulls a manifest and all its blobs and compares their digests.
func (c *client) pull(ctx context.Context, node int, reference string) error {
	a, err := c.get(ctx, node, "/manifests/"+reference)
	if err != nil || a.status != http.StatusOK {
		return fmt.Errorf("manifest %s: %d %s %w", reference, a.status, a.body, err)
	}
	if d, err := digest.Parse(reference); err == nil && digest.FromBytes(a.body) != d {
		return fmt.Errorf("manifest %s has other bytes", d)
	}
	var m v1.Manifest
	if err := json.Unmarshal(a.body, &m); err != nil {
		return err
	}
	for _, d := range append(m.Layers, m.Config) {
		a, err := c.get(ctx, node, "/blobs/"+d.Digest.String())
		if err != nil || a.status != http.StatusOK {
			return fmt.Errorf("blob %s: %d %w", d.Digest, a.status, err)
		}
		if digest.FromBytes(a.body) != d.Digest {
			return fmt.Errorf("blob %s has other bytes", d.Digest)
		}
	}
	return nil
}

func (l *load) fail(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failures = append(l.failures, fmt.Sprintf(format, args...))
}
