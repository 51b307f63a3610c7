package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// body is content of a known size.
type body struct {
	io.Reader
	digest    digest.Digest
	size      int64
	mediaType string
}

const octets = "application/octet-stream"

// newBody makes size bytes that no other round has; they do not compress.
func newBody(size int64, round byte) body {
	hash := sha256.New()
	io.CopyN(hash, stream(round), size) // neither can fail
	return body{io.LimitReader(stream(round), size), digest.NewDigestFromBytes(digest.SHA256, hash.Sum(nil)), size, octets}
}

func stream(round byte) io.Reader { return rand.NewChaCha8([32]byte{round, 'a', 't', 'o', 'l', 'l'}) }

func bytesBody(data []byte, mediaType string) body {
	return body{bytes.NewReader(data), digest.FromBytes(data), int64(len(data)), mediaType}
}

// manifest makes a manifest that no other number has. Its config is empty.
func manifest(number int) ([]byte, error) {
	return json.Marshal(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		ArtifactType: "application/vnd.example.bench", Config: v1.DescriptorEmptyJSON, Layers: []v1.Descriptor{v1.DescriptorEmptyJSON},
		Annotations: map[string]string{"org.example.number": fmt.Sprintf("%08d", number)},
	})
}

// target is a server as a client sees it: a registry, or the floor.
type target interface {
	push(ctx context.Context, repository string, b body) error
	pull(ctx context.Context, repository string, d digest.Digest, size int64) error
	putManifest(ctx context.Context, repository, tag string, data []byte) error
	manifest(ctx context.Context, repository, tag string, size int64) error
}

// registry is a client of a registry with a token, as docker is after its login.
type registry struct {
	base  string
	token string
	http  *http.Client
	admin string // its password; "" is the benchmark's own
}

// login asks for a token that reaches the benchmark's repositories.
func (c *registry) login(ctx context.Context) error {
	query := url.Values{"service": {service}}
	for _, name := range repositories {
		query.Add("scope", "repository:"+name+":pull,push")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+"/service/token?"+query.Encode(), nil)
	if err != nil {
		return err
	}
	req.SetBasicAuth("admin", cmp.Or(c.admin, password))
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var answer struct{ Token string }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return err
	}
	if answer.Token == "" {
		return fmt.Errorf("no token: %s", resp.Status)
	}
	c.token = answer.Token
	return nil
}

// do sends a request and wants a status; the answer's body is read to its end.
func (c *registry) do(ctx context.Context, method, target string, b body) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, target, b.Reader)
	if err != nil {
		return nil, err
	}
	req.ContentLength = b.size
	req.Header.Set("Authorization", "Bearer "+c.token)
	if b.mediaType != "" {
		req.Header.Set("Content-Type", b.mediaType)
	}
	want := http.StatusCreated
	if method == http.MethodPost {
		want = http.StatusAccepted
	}
	return send(c.http, req, want)
}

// send reads the answer to its end, or its beginning when it is not the wanted one.
func send(client *http.Client, req *http.Request, want int) (*http.Response, error) {
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err == nil && resp.StatusCode != want {
		err = fmt.Errorf("%s %s: %s: %s", req.Method, req.URL, resp.Status, text)
	}
	return resp, err
}

func (c *registry) push(ctx context.Context, repository string, b body) error {
	resp, err := c.do(ctx, http.MethodPost, c.base+"/v2/"+repository+"/blobs/uploads/", body{})
	if err != nil {
		return err
	}
	location, err := resp.Location()
	if err != nil {
		return err
	}
	query := location.Query()
	query.Set("digest", b.digest.String())
	location.RawQuery = query.Encode()
	_, err = c.do(ctx, http.MethodPut, location.String(), b)
	return err
}

// config pushes what every manifest of the benchmark names.
func (c *registry) config(ctx context.Context, repository string) error {
	return c.push(ctx, repository, bytesBody(v1.DescriptorEmptyJSON.Data, octets))
}

func (c *registry) putManifest(ctx context.Context, repository, tag string, data []byte) error {
	_, err := c.do(ctx, http.MethodPut, c.base+"/v2/"+repository+"/manifests/"+tag, bytesBody(data, v1.MediaTypeImageManifest))
	return err
}

func (c *registry) pull(ctx context.Context, repository string, d digest.Digest, size int64) error {
	return c.get(ctx, c.base+"/v2/"+repository+"/blobs/"+d.String(), size)
}

func (c *registry) manifest(ctx context.Context, repository, tag string, size int64) error {
	return c.get(ctx, c.base+"/v2/"+repository+"/manifests/"+tag, size)
}

// tags asks for one page of a repository's tags.
func (c *registry) tags(ctx context.Context, repository, last string, n int) error {
	query := url.Values{"n": {fmt.Sprint(n)}, "last": {last}}
	return c.get(ctx, c.base+"/v2/"+repository+"/tags/list?"+query.Encode(), -1)
}

func (c *registry) get(ctx context.Context, target string, size int64) error {
	return fetch(ctx, c.http, target, header{"Bearer " + c.token, size})
}

// header is what a GET is sent with, and the size that it must bring: -1 for any.
type header struct {
	authorization string
	size          int64
}

func fetch(ctx context.Context, client *http.Client, target string, h header) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return err
	}
	if h.authorization != "" {
		req.Header.Set("Authorization", h.authorization)
	}
	req.Header.Set("Accept", v1.MediaTypeImageManifest)
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	n, err := io.Copy(io.Discard, resp.Body)
	if err == nil && (resp.StatusCode != http.StatusOK || h.size >= 0 && n != h.size) {
		err = fmt.Errorf("GET %s: %s with %d bytes, want %d", target, resp.Status, n, h.size)
	}
	return err
}

// files is a client of the floor: everything is a file.
type files struct {
	base string
	http *http.Client
}

func (f *files) put(ctx context.Context, name string, b body) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, f.base+"/"+name, b.Reader)
	if err != nil {
		return err
	}
	req.ContentLength = b.size
	_, err = send(f.http, req, http.StatusCreated)
	return err
}

func (f *files) push(ctx context.Context, _ string, b body) error {
	return f.put(ctx, b.digest.Encoded(), b)
}

func (f *files) pull(ctx context.Context, _ string, d digest.Digest, size int64) error {
	return fetch(ctx, f.http, f.base+"/"+d.Encoded(), header{"", size})
}

func (f *files) putManifest(ctx context.Context, _, tag string, data []byte) error {
	return f.put(ctx, tag, bytesBody(data, octets))
}

func (f *files) manifest(ctx context.Context, _, tag string, size int64) error {
	return fetch(ctx, f.http, f.base+"/"+tag, header{"", size})
}
