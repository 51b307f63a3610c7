package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// What a client does, in the words of the report.
const (
	pushing = iota
	pulling
	listing
	deleting
	leaving
	kindsOf
)

var kinds = [kindsOf]string{"images pushed", "images pulled", "lists read", "images deleted", "uploads cancelled"}

// Layers come from a pool, so that the disk does not fill however long it lasts:
// few large ones, many small ones, about 60 MiB in all.
const (
	layers     = 600
	tagsEach   = 8 // images that a client keeps
	repository = "library/soak"
)

// load is the clients.
type load struct {
	url      string
	layers   []v1.Descriptor
	clients  []*client
	requests atomic.Int64
	failed   atomic.Int64
	done     [kindsOf]atomic.Int64

	mu    sync.Mutex
	shown []string
}

// client is one of them, with its connections, its images and its dice.
type client struct {
	*load
	number int
	http   *http.Client
	dice   *rand.Rand
	images map[string]digest.Digest // by tag
	count  int
	pushed []byte // the last manifest
}

func newLoad(n *node, clients int) *load {
	l := &load{url: n.url}
	for i := range clients {
		l.clients = append(l.clients, &client{
			load: l, number: i, dice: rand.New(rand.NewPCG(uint64(i), 7)), images: map[string]digest.Digest{},
			http: &http.Client{Timeout: time.Minute, Transport: &http.Transport{MaxIdleConnsPerHost: 2}},
		})
	}
	return l
}

// layer gives a layer of the pool, the same for every client.
func layer(i int) []byte {
	size := 1 << 10 << (i % 7) // 1 to 64 KiB
	if i%50 == 0 {
		size = 2 * mib
	}
	b := make([]byte, size+i)
	_, _ = rand.NewChaCha8([32]byte{byte(i), byte(i >> 8), 's'}).Read(b) // never fails
	return b
}

// prepare pushes the pool and one image of each client.
func (l *load) prepare(ctx context.Context) error {
	for i := range layers {
		b := layer(i)
		d := v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.FromBytes(b), Size: int64(len(b))}
		l.layers = append(l.layers, d)
		if err := l.clients[i%len(l.clients)].blob(ctx, repository, b, d.Digest); err != nil {
			return err
		}
	}
	for _, c := range l.clients {
		if err := c.push(ctx); err != nil {
			return err
		}
	}
	return nil
}

// rest closes the clients' connections.
func (l *load) rest() {
	for _, c := range l.clients {
		c.http.CloseIdleConnections()
	}
}

// run lets the clients work until ctx ends; requests under way are finished.
func (l *load) run(ctx context.Context, work func(*client, context.Context)) {
	var group sync.WaitGroup
	for _, c := range l.clients {
		group.Go(func() {
			for ctx.Err() == nil {
				work(c, context.WithoutCancel(ctx))
			}
		})
	}
	group.Wait()
}

// retag moves a tag from one image to another and back: each request is a
// transaction, which the mix makes of one request in six.
func (c *client) retag(ctx context.Context) {
	var bodies [2][]byte
	for i := range bodies {
		if err := c.push(ctx); err != nil {
			c.fail(err)
			return
		}
		bodies[i] = c.pushed
	}
	for i := range 50 {
		path := fmt.Sprintf("/v2/%s/manifests/warm-%d", repository, c.number)
		if _, _, err := c.ask(ctx, "PUT", path, payload{bodies[i%2], v1.MediaTypeImageManifest}, 201); err != nil {
			c.fail(err)
			return
		}
	}
}

func (c *client) fail(err error) {
	c.failed.Add(1)
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.shown) < 10 {
		c.shown = append(c.shown, err.Error())
	}
}

// mixed does one thing of the mix.
func (c *client) mixed(ctx context.Context) {
	kind, do := pulling, c.pull
	switch n := c.dice.IntN(100); {
	case n < 20:
		kind, do = pushing, c.push
	case n < 30:
		kind, do = listing, c.list
	case n < 40:
		kind, do = deleting, c.remove
	case n < 42:
		kind, do = leaving, c.leave
	}
	if err := do(ctx); err != nil {
		c.fail(err)
		return
	}
	c.done[kind].Add(1)
}

func (l *load) examples() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.shown
}

// payload is the body of a request.
type payload struct {
	data      []byte
	mediaType string
}

var nothing = payload{}

func bytesOf(b []byte) payload { return payload{b, "application/octet-stream"} }

// ask sends a request and reads the answer to its end.
func (c *client) ask(ctx context.Context, method, path string, b payload, want int) (*http.Response, []byte, error) {
	if path[0] == '/' {
		path = c.url + path
	}
	q, err := http.NewRequestWithContext(ctx, method, path, bytes.NewReader(b.data))
	if err != nil {
		return nil, nil, err
	}
	q.SetBasicAuth("admin", password)
	if b.mediaType != "" {
		q.Header.Set("Content-Type", b.mediaType)
	}
	c.requests.Add(1)
	resp, err := c.http.Do(q)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	if resp.StatusCode != want {
		return nil, nil, fmt.Errorf("%s %s: answered %d, want %d: %.300s", method, path, resp.StatusCode, want, answer)
	}
	return resp, answer, nil
}

func (c *client) blob(ctx context.Context, repository string, b []byte, d digest.Digest) error {
	_, _, err := c.ask(ctx, "HEAD", "/v2/"+repository+"/blobs/"+d.String(), nothing, 200)
	if err == nil {
		return nil
	}
	resp, _, err := c.ask(ctx, "POST", "/v2/"+repository+"/blobs/uploads/", nothing, 202)
	if err != nil {
		return err
	}
	half := len(b) / 2
	resp, _, err = c.ask(ctx, "PATCH", resp.Header.Get("Location"), bytesOf(b[:half]), 202)
	if err != nil {
		return err
	}
	_, _, err = c.ask(ctx, "PUT", resp.Header.Get("Location")+"?digest="+d.String(), bytesOf(b[half:]), 201)
	return err
}

// push pushes an image of layers of the pool with a configuration of its own. One
// of four layers is pushed again.
func (c *client) push(ctx context.Context) error {
	c.count++
	tag := fmt.Sprintf("c%d-%d", c.number, c.dice.IntN(tagsEach))
	config := fmt.Appendf(nil, `{"architecture":"arm64","os":"linux","author":"client %d, image %d"}`, c.number, c.count)
	m := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		Config: v1.Descriptor{MediaType: v1.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))}}
	for range 3 {
		i := c.dice.IntN(layers)
		m.Layers = append(m.Layers, c.layers[i])
		if c.dice.IntN(4) > 0 {
			continue
		}
		d := c.layers[i].Digest
		if _, _, err := c.ask(ctx, "POST", "/v2/"+repository+"/blobs/uploads/?digest="+d.String(), bytesOf(layer(i)), 201); err != nil {
			return err
		}
	}
	if err := c.blob(ctx, repository, config, m.Config.Digest); err != nil {
		return err
	}
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if _, _, err := c.ask(ctx, "PUT", "/v2/"+repository+"/manifests/"+tag, payload{b, m.MediaType}, 201); err != nil {
		return err
	}
	c.images[tag], c.pushed = digest.FromBytes(b), b
	return nil
}

// any chooses one of the client's images.
func (c *client) any() (tag string, d digest.Digest, ok bool) {
	n := c.dice.IntN(max(1, len(c.images)))
	for i := range tagsEach {
		tag = fmt.Sprintf("c%d-%d", c.number, i)
		if d, ok = c.images[tag]; ok {
			if n == 0 {
				return tag, d, true
			}
			n--
		}
	}
	return "", "", false
}

func (c *client) pull(ctx context.Context) error {
	tag, d, ok := c.any()
	if !ok {
		return c.push(ctx)
	}
	return c.pullImage(ctx, tag, d)
}

// pullImage pulls an image and holds it to what was pushed.
func (c *client) pullImage(ctx context.Context, tag string, want digest.Digest) error {
	_, b, err := c.ask(ctx, "GET", "/v2/"+repository+"/manifests/"+tag, nothing, 200)
	if err != nil {
		return err
	}
	if got := digest.FromBytes(b); got != want {
		return fmt.Errorf("tag %s leads to %s, pushed was %s", tag, got, want)
	}
	var m v1.Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return err
	}
	for _, d := range append(m.Layers, m.Config) {
		_, b, err := c.ask(ctx, "GET", "/v2/"+repository+"/blobs/"+d.Digest.String(), nothing, 200)
		if err != nil {
			return err
		}
		if digest.FromBytes(b) != d.Digest {
			return fmt.Errorf("blob %s came as %d other bytes", d.Digest, len(b))
		}
	}
	return nil
}

func (c *client) list(ctx context.Context) error {
	path := fmt.Sprintf("/v2/%s/tags/list?n=50&last=c%d", repository, c.number)
	if c.dice.IntN(4) == 0 {
		path = "/v2/_catalog?n=50"
	}
	_, _, err := c.ask(ctx, "GET", path, nothing, 200)
	return err
}

// remove deletes an image. Its digest may be that of another tag of this client
// no more, since every configuration is another one.
func (c *client) remove(ctx context.Context) error {
	tag, d, ok := c.any()
	if !ok || len(c.images) < 2 {
		return c.push(ctx)
	}
	if _, _, err := c.ask(ctx, "DELETE", "/v2/"+repository+"/manifests/"+d.String(), nothing, 202); err != nil {
		return err
	}
	delete(c.images, tag)
	_, _, err := c.ask(ctx, "HEAD", "/v2/"+repository+"/manifests/"+tag, nothing, 404)
	return err
}

// leave begins an upload and cancels it, with bytes in it.
func (c *client) leave(ctx context.Context) error {
	resp, _, err := c.ask(ctx, "POST", "/v2/"+repository+"/blobs/uploads/", nothing, 202)
	if err != nil {
		return err
	}
	resp, _, err = c.ask(ctx, "PATCH", resp.Header.Get("Location"), bytesOf(layer(c.dice.IntN(layers))), 202)
	if err != nil {
		return err
	}
	_, _, err = c.ask(ctx, "DELETE", resp.Header.Get("Location"), nothing, 204)
	return err
}

// verify pulls all that is there at the end.
func (l *load) verify(ctx context.Context) (checked, wrong int) {
	for _, c := range l.clients {
		for tag, d := range c.images {
			checked++
			if err := c.pullImage(ctx, tag, d); err != nil {
				wrong++
				l.mu.Lock()
				l.shown = append(l.shown, err.Error())
				l.mu.Unlock()
			}
		}
	}
	return checked, wrong
}
