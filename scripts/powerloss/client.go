package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// deed is a request that was acknowledged, by the id of its answer.
type deed struct {
	id   string
	blob digest.Digest // a blob that was pushed, else
	tag  string        // a tag that was written
	to   digest.Digest // the manifest; "" when the tag was deleted
}

// client pushes to a node, one request after the other, to tags of its own.
type client struct {
	node  *node
	name  string
	dice  *rand.Rand
	deeds []deed
	err   error
}

// tags of a client; each is written several times.
const tags = 2

// work pushes so many images, and deletes a tag now and then.
func (c *client) work(ctx context.Context, pushes int) {
	for i := range pushes {
		tag := fmt.Sprint(c.name, "-", i%tags)
		if i >= tags && c.dice.IntN(4) == 0 {
			c.tell(ctx, question{method: http.MethodDelete, path: "/v2/" + repository + "/manifests/" + tag}, http.StatusAccepted, deed{tag: tag})
		}
		c.push(ctx, tag)
		if c.err != nil {
			return
		}
	}
}

// tell sends a request and keeps what its answer acknowledges.
func (c *client) tell(ctx context.Context, q question, want int, d deed) answer {
	if c.err != nil {
		return answer{}
	}
	q.id = fmt.Sprint(c.name, "-", len(c.deeds))
	d.id = q.id
	a, err := c.node.do(ctx, q)
	if err == nil && (a.status != want || a.header.Get("X-Request-Id") != q.id) {
		err = fmt.Errorf("%d %s %s", a.status, a.header.Get("X-Request-Id"), a.body)
	}
	if err != nil {
		c.err = fmt.Errorf("%s %s: %w", q.method, q.path, err)
		return a
	}
	c.deeds = append(c.deeds, d)
	return a
}

func (c *client) push(ctx context.Context, tag string) {
	layer := make([]byte, 1+c.dice.IntN(24<<10))
	for i := range layer {
		layer[i] = byte(c.dice.Uint32())
	}
	config := fmt.Appendf(nil, `{"architecture":"amd64","os":"linux","config":{"Labels":{"n":"%s-%d"}}}`, c.name, len(c.deeds))
	m := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		Config: c.blob(ctx, v1.MediaTypeImageConfig, config), Layers: []v1.Descriptor{c.blob(ctx, v1.MediaTypeImageLayer, layer)}}
	body, err := json.Marshal(m)
	if err != nil && c.err == nil {
		c.err = err
	}
	c.tell(ctx, question{method: http.MethodPut, path: "/v2/" + repository + "/manifests/" + tag, body: body, mediaType: v1.MediaTypeImageManifest},
		http.StatusCreated, deed{tag: tag, to: digest.FromBytes(body)})
}

// blob pushes a blob, in one request or in parts.
func (c *client) blob(ctx context.Context, mediaType string, b []byte) v1.Descriptor {
	d := digest.FromBytes(b)
	to, octets := "/v2/"+repository+"/blobs/uploads/", "application/octet-stream"
	if c.dice.IntN(3) > 0 {
		c.tell(ctx, question{method: http.MethodPost, path: to + "?digest=" + d.String(), body: b, mediaType: octets}, http.StatusCreated, deed{blob: d})
		return v1.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}
	}
	a := c.tell(ctx, question{method: http.MethodPost, path: to}, http.StatusAccepted, deed{})
	half := len(b) / 2
	for _, part := range [][]byte{b[:half], b[half:]} {
		if c.err == nil {
			a = c.tell(ctx, question{method: http.MethodPatch, path: a.header.Get("Location"), body: part, mediaType: octets}, http.StatusAccepted, deed{})
		}
	}
	if c.err == nil {
		c.tell(ctx, question{method: http.MethodPut, path: a.header.Get("Location") + "?digest=" + d.String()}, http.StatusCreated, deed{blob: d})
	}
	return v1.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}
}
