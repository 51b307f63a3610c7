package main

import (
	"bytes"
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

// client is a registry client with a token, as docker is after its login.
type client struct {
	base  string
	token string
}

func login(ctx context.Context, addr string) (*client, error) {
	c := &client{base: "http://" + addr}
	target := c.base + "/service/token?service=harbor-registry&scope=" + url.QueryEscape("repository:library/bench:pull,push")
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return nil, err
	}
	req.SetBasicAuth("admin", password)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var answer struct{ Token string }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return nil, err
	}
	if answer.Token == "" {
		return nil, fmt.Errorf("no token: %s", resp.Status)
	}
	c.token = answer.Token
	return c, nil
}

// do sends a request and wants a status; the answer's body is read to its end.
func (c *client) do(ctx context.Context, method, target string, b body, want int) (http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, method, target, b.Reader)
	if err != nil {
		return nil, err
	}
	req.ContentLength = b.size
	req.Header.Set("Authorization", "Bearer "+c.token)
	req.Header.Set("Content-Type", b.mediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err == nil && resp.StatusCode != want {
		err = fmt.Errorf("%s %s: %s: %s", method, target, resp.Status, text)
	}
	return resp.Header, err
}

func (c *client) push(ctx context.Context, repository string, b body) error {
	header, err := c.do(ctx, http.MethodPost, c.base+"/v2/"+repository+"/blobs/uploads/", body{mediaType: octets}, http.StatusAccepted)
	if err != nil {
		return err
	}
	location, err := url.Parse(header.Get("Location"))
	if err != nil {
		return err
	}
	base, err := url.Parse(c.base)
	if err != nil {
		return err
	}
	target := base.ResolveReference(location)
	query := target.Query()
	query.Set("digest", b.digest.String())
	target.RawQuery = query.Encode()
	_, err = c.do(ctx, http.MethodPut, target.String(), b, http.StatusCreated)
	return err
}

func (c *client) pushManifest(ctx context.Context, repository, tag string) ([]byte, error) {
	config := body{bytes.NewReader([]byte("{}")), digest.FromString("{}"), 2, octets}
	if err := c.push(ctx, repository, config); err != nil {
		return nil, err
	}
	empty := v1.Descriptor{MediaType: v1.MediaTypeEmptyJSON, Digest: config.digest, Size: 2}
	data, err := json.Marshal(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		ArtifactType: "application/vnd.example.bench", Config: empty, Layers: []v1.Descriptor{empty},
	})
	if err != nil {
		return nil, err
	}
	manifest := body{bytes.NewReader(data), digest.FromBytes(data), int64(len(data)), v1.MediaTypeImageManifest}
	_, err = c.do(ctx, http.MethodPut, c.base+"/v2/"+repository+"/manifests/"+tag, manifest, http.StatusCreated)
	return data, err
}

func (c *client) pull(ctx context.Context, repository string, d digest.Digest, size int64) error {
	return get(ctx, c.base+"/v2/"+repository+"/blobs/"+d.String(), c.token, size)
}

func (c *client) manifest(ctx context.Context, repository, tag string, size int64) error {
	return get(ctx, c.base+"/v2/"+repository+"/manifests/"+tag, c.token, size)
}

func get(ctx context.Context, target, token string, size int64) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	req.Header.Set("Accept", v1.MediaTypeImageManifest)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	n, err := io.Copy(io.Discard, resp.Body)
	if err == nil && (resp.StatusCode != http.StatusOK || n != size) {
		err = fmt.Errorf("GET %s: %s with %d bytes, want %d", target, resp.Status, n, size)
	}
	return err
}

func put(ctx context.Context, target string, b body) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, target, b.Reader)
	if err != nil {
		return err
	}
	req.ContentLength = b.size
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		return fmt.Errorf("PUT %s: %s", target, resp.Status)
	}
	return nil
}
