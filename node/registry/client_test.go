package registry_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/memory"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// orasRepository is a repository as the oras client sees it, with credentials
// that it exchanges for tokens.
func orasRepository(t *testing.T, n *node, name string, credential auth.Credential) *remote.Repository {
	t.Helper()
	host := strings.TrimPrefix(n.url, "http://")
	repo, err := remote.NewRepository(host + "/" + name)
	must(t, err)
	repo.PlainHTTP = true
	repo.Client = &auth.Client{Client: n.http, Cache: auth.NewCache(), Credential: auth.StaticCredential(host, credential)}
	repo.TagListPageSize, repo.ReferrerListPageSize = 2, 1
	return repo
}

// The oras client pushes, tags, attaches, discovers, copies between repositories
// by mounts, pulls and deletes.
func TestOras(t *testing.T) {
	n := single(t)
	ctx := t.Context()
	admin := auth.Credential{Username: "admin", Password: password}
	repo := orasRepository(t, n, "library/app", admin)

	local := memory.New()
	add := func(mediaType string, data []byte) v1.Descriptor {
		d := content.NewDescriptorFromBytes(mediaType, data)
		must(t, local.Push(ctx, d, bytes.NewReader(data)))
		return d
	}
	layer := add("application/vnd.example.data", random(200_000))
	manifest, err := oras.PackManifest(ctx, local, oras.PackManifestVersion1_1, "application/vnd.example.app", oras.PackManifestOptions{Layers: []v1.Descriptor{layer}})
	must(t, err)
	must(t, local.Tag(ctx, manifest, "v1"))
	for _, tag := range []string{"v1", "v2", "v3"} {
		_, err = oras.Copy(ctx, local, "v1", repo, tag, oras.DefaultCopyOptions)
		must(t, err)
	}
	var tags []string
	must(t, repo.Tags(ctx, "", func(page []string) error { tags = append(tags, page...); return nil }))
	if strings.Join(tags, " ") != "v1 v2 v3" {
		t.Errorf("tags %v", tags)
	}

	// Attach: two artifacts that refer to the first, and a signature of one.
	var attached []v1.Descriptor
	for _, kind := range []string{"application/vnd.example.sbom", "application/vnd.example.signature"} {
		blob := content.NewDescriptorFromBytes("application/octet-stream", []byte(kind))
		must(t, repo.Push(ctx, blob, strings.NewReader(kind)))
		d, err := oras.PackManifest(ctx, repo, oras.PackManifestVersion1_1, kind, oras.PackManifestOptions{Subject: &manifest, Layers: []v1.Descriptor{blob}})
		must(t, err)
		attached = append(attached, d)
	}
	found := map[digest.Digest]string{}
	must(t, repo.Referrers(ctx, manifest, "", func(page []v1.Descriptor) error {
		for _, d := range page {
			found[d.Digest] = d.ArtifactType
		}
		return nil
	}))
	if len(found) != 2 || found[attached[0].Digest] != "application/vnd.example.sbom" {
		t.Errorf("discovered %v", found)
	}
	found = map[digest.Digest]string{}
	must(t, repo.Referrers(ctx, manifest, "application/vnd.example.signature", func(page []v1.Descriptor) error {
		for _, d := range page {
			found[d.Digest] = d.ArtifactType
		}
		return nil
	}))
	if len(found) != 1 {
		t.Errorf("filtered to %v", found)
	}

	// The whole graph into another, private repository; blobs are mounted.
	other := orasRepository(t, n, "team/deep/copy", admin)
	must(t, other.Mount(ctx, layer, "library/app", func() (io.ReadCloser, error) {
		return nil, errors.New("the blob was not mounted")
	}))
	_, err = oras.ExtendedCopy(ctx, repo, "v1", other, "copied", oras.DefaultExtendedCopyOptions)
	must(t, err)
	back := memory.New()
	got, err := oras.ExtendedCopy(ctx, other, "copied", back, "", oras.DefaultExtendedCopyOptions)
	must(t, err)
	if got.Digest != manifest.Digest {
		t.Errorf("%s came back as %s", manifest.Digest, got.Digest)
	}
	data, err := content.FetchAll(ctx, back, attached[1])
	must(t, err)
	if digest.FromBytes(data) != attached[1].Digest {
		t.Error("the signature came back changed")
	}

	// Anybody reads the public project; the private one is closed.
	_, err = oras.Copy(ctx, orasRepository(t, n, "app", auth.EmptyCredential), "v1", memory.New(), "v1", oras.DefaultCopyOptions)
	must(t, err)
	if _, err = orasRepository(t, n, "team/deep/copy", auth.EmptyCredential).Resolve(ctx, "copied"); err == nil {
		t.Error("anybody reads the private project")
	}
	if err := pushAs(ctx, orasRepository(t, n, "app", auth.EmptyCredential)); err == nil {
		t.Error("anybody pushes")
	}

	must(t, repo.Delete(ctx, manifest))
	if _, err := repo.Resolve(ctx, "v2"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("after the deletion: %v", err)
	}
	must(t, repo.Blobs().Delete(ctx, layer))
}

func pushAs(ctx context.Context, repo *remote.Repository) error {
	data := []byte("not mine")
	return repo.Push(ctx, content.NewDescriptorFromBytes("application/octet-stream", data), bytes.NewReader(data))
}

// The same over HTTP/2, which has no connection to take over.
func TestHTTP2(t *testing.T) {
	n := single(t)
	server := httptest.NewUnstartedServer(n.server.Config.Handler)
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	c := &client{t: t, http: server.Client(), url: server.URL, user: "admin"}
	data := random(5 << 20)
	d := c.pushBlob("app", data).Digest.String()
	if a := c.do("GET", "/v2/app/blobs/"+d, nil).want(200); !bytes.Equal(a.body, data) {
		t.Error("the blob changed")
	}
	if a := c.do("GET", "/v2/app/blobs/"+d, nil, "Range", "bytes=100-4000000").want(206); !bytes.Equal(a.body, data[100:4000001]) {
		t.Error("the range changed")
	}
	c.do("GET", "/v2/app/blobs/"+d, nil, "Range", "bytes=0-1,5-6").want(206)
	c.pushImage("app", "v1")
	c.do("GET", "/v2/app/manifests/v1", nil).want(200)
	c.do("PUT", "/v2/app/manifests/v2", make([]byte, 5<<20), "Content-Type", ociManifest).want(413, "MANIFEST_INVALID")
	at := c.do("POST", "/v2/app/blobs/uploads/", nil).want(202).location()
	c.do("PATCH", at, data, "Content-Range", "5-9").want(400, "SIZE_INVALID")
	c.do("PATCH", at, data[:5], "Content-Range", "5-9").want(416, "RANGE_INVALID")
	if a := c.as("").do("GET", "/v2/", nil).want(401); !strings.HasPrefix(a.header.Get("WWW-Authenticate"), `Bearer realm="https://`) {
		t.Errorf("challenge %q", a.header.Get("WWW-Authenticate"))
	}
}
