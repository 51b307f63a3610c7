package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// Docker's own manifest formats.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
)

// engine is podman or buildah with images of its own, apart from the machine's,
// logged in to the nodes.
type engine struct {
	*site
	command []string
}

func newEngine(ctx context.Context, b bench, command ...string) engine {
	// podman refuses a run directory with a long name, as a test's is.
	run, err := os.MkdirTemp("", "at-run")
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		if err := os.RemoveAll(run); err != nil {
			b.t.Error(err)
		}
	})
	dir := b.t.TempDir()
	config := filepath.Join(dir, "storage.conf")
	text := fmt.Sprintf("[storage]\ndriver = \"vfs\"\ngraphroot = %q\nrunroot = %q\n", filepath.Join(dir, "images"), run)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		b.t.Fatal(err)
	}
	// It reads Docker's logins as well: it shall have its own only.
	e := engine{b.with("REGISTRY_AUTH_FILE="+filepath.Join(dir, "auth.json"), "DOCKER_CONFIG="+dir, "CONTAINERS_STORAGE_CONF="+config), command}
	for _, node := range []*lab.Node{b.push, b.use} {
		e.do(ctx, node, "login", "-u", "admin", "-p", lab.Password, node.Registry())
	}
	return e
}

func (e engine) do(ctx context.Context, node *lab.Node, args ...string) string {
	e.t.Helper()
	all := slices.Concat(e.command, args)
	return e.run(ctx, node, all[0], all[1:]...)
}

// manifest reads a manifest that must have a media type, and whose digest must be
// that of its bytes.
func (b bench) manifest(ctx context.Context, name, mediaType string, into any) digest.Digest {
	b.t.Helper()
	repository, tag, _ := strings.Cut(name, ":")
	got := b.wire(b.use).get(ctx, "/v2/"+repository+"/manifests/"+tag, http.StatusOK)
	d := digest.FromBytes(got.body)
	if kind := got.header.Get("Content-Type"); kind != mediaType || got.header.Get("Docker-Content-Digest") != d.String() {
		b.t.Errorf("%s has the type %s and the digest %s, want %s and %s", name, kind, got.header.Get("Docker-Content-Digest"), mediaType, d)
	}
	if err := json.Unmarshal(got.body, into); err != nil {
		b.t.Fatal(err)
	}
	return d
}

// podman pulls both platforms, puts them into a list of its own, and pushes that
// and one of its images in either format.
func podman(ctx context.Context, b bench) {
	e := newEngine(ctx, b, "podman", "--events-backend", "none")
	b.pushAll(ctx, b.push, b.img, "podman/app", "v1")
	e.do(ctx, b.push, "manifest", "create", "both")
	var id string
	for _, arch := range []string{"amd64", "arm64"} {
		id = e.do(ctx, b.use, "pull", "--quiet", "--arch", arch, b.use.Registry()+"/podman/app:v1")
		if got := e.do(ctx, b.use, "image", "inspect", "--format", "{{.Architecture}}", id); got != arch {
			b.t.Errorf("podman pulled an image for %s, want %s", got, arch)
		}
		e.do(ctx, b.push, "manifest", "add", "both", "containers-storage:"+id)
	}
	for format, kinds := range map[string]struct{ index, manifest string }{
		"oci":  {v1.MediaTypeImageIndex, v1.MediaTypeImageManifest},
		"v2s2": {dockerList, dockerManifest},
	} {
		name := "podman/" + format
		e.do(ctx, b.push, "push", "--quiet", "--format", format, id, b.push.Registry()+"/"+name+":one")
		var image v1.Manifest
		b.manifest(ctx, name+":one", kinds.manifest, &image)
		if len(image.Layers) != 3 {
			b.t.Errorf("podman pushed an image of %d layers, want 3", len(image.Layers))
		}
		e.do(ctx, b.push, "manifest", "push", "--quiet", "--all", "--format", format, "both", "docker://"+b.push.Registry()+"/"+name+":both")
		var index v1.Index
		b.manifest(ctx, name+":both", kinds.index, &index)
		var platforms []string
		for _, m := range index.Manifests {
			platforms = append(platforms, m.Platform.Architecture+" "+m.MediaType)
		}
		slices.Sort(platforms)
		if want := []string{"amd64 " + kinds.manifest, "arm64 " + kinds.manifest}; !slices.Equal(platforms, want) {
			b.t.Errorf("podman pushed a list of %v, want %v", platforms, want)
		}
		// A layout would want Docker's formats converted; a plain directory keeps them.
		b.run(ctx, b.use, "skopeo", "copy", "--all", "--preserve-digests", "docker://"+b.use.Registry()+"/"+name+":both", "dir:"+b.t.TempDir())

		other := newEngine(ctx, b, "podman", "--events-backend", "none")
		if got := other.do(ctx, b.use, "pull", "--quiet", "--arch", "arm64", b.use.Registry()+"/"+name+":both"); got != image.Config.Digest.Encoded() {
			b.t.Errorf("podman pulled the image %s, want %s", got, image.Config.Digest)
		}
	}
	e.do(ctx, b.use, "logout", b.use.Registry())
	for _, refusal := range []struct{ do, said []string }{
		{[]string{"login", "-u", "admin", "-p", "wrong", b.use.Registry()}, []string{"invalid username/password"}},
		{[]string{"pull", b.use.Registry() + "/podman/app:v1"}, []string{"authentication required", "unauthorized", "log in"}},
	} {
		said := e.refused(ctx, b.use, "podman", refusal.do...)
		if !slices.ContainsFunc(refusal.said, func(want string) bool { return strings.Contains(said, want) }) {
			b.t.Errorf("without a login: %s", said)
		}
	}
}

// buildah builds on an image of one node and pushes the result in either format.
func buildah(ctx context.Context, b bench) {
	e := newEngine(ctx, b, "buildah")
	b.pushAll(ctx, b.push, b.img, "buildah/base", "v1")
	dir := b.t.TempDir()
	files := map[string]string{
		"Containerfile": "FROM " + b.use.Registry() + "/buildah/base:v1\nCOPY note /etc/note\nLABEL built=here\n",
		"note":          "made on " + b.use.Host.Name,
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			b.t.Fatal(err)
		}
	}
	e.do(ctx, b.use, "build", "--isolation", "chroot", "--quiet", "--tag", "localhost/app", dir)
	for format, kind := range map[string]string{"oci": v1.MediaTypeImageManifest, "v2s2": dockerManifest} {
		name := "buildah/" + format
		e.do(ctx, b.push, "push", "--quiet", "--format", format, "localhost/app", "docker://"+b.push.Registry()+"/"+name+":v1")
		var image v1.Manifest
		want := b.manifest(ctx, name+":v1", kind, &image)
		if len(image.Layers) != 4 {
			b.t.Errorf("buildah pushed %d layers, want the 3 of the base and its own", len(image.Layers))
		}
		other := newEngine(ctx, b, "buildah")
		other.do(ctx, b.use, "pull", "--quiet", b.use.Registry()+"/"+name+"@"+want.String())
		container := other.do(ctx, b.use, "from", "--pull-never", b.use.Registry()+"/"+name+"@"+want.String())
		note, err := os.ReadFile(filepath.Join(other.do(ctx, b.use, "mount", container), "etc", "note"))
		if err != nil || string(note) != files["note"] {
			b.t.Errorf("the pulled image holds %q (%v), want %q", note, err, files["note"])
		}
		other.do(ctx, b.use, "rm", container)
	}
}

// umoci changes an image in the layout that skopeo pulled from one node, and
// skopeo pushes it to the other.
func umoci(ctx context.Context, b bench) {
	b.pushAll(ctx, b.use, b.img, "umoci/app", "v1")
	dir := b.t.TempDir()
	layout, bundle, again := filepath.Join(dir, "layout"), filepath.Join(dir, "bundle"), filepath.Join(dir, "again")
	b.run(ctx, b.push, "skopeo", "copy", "--override-arch", "arm64", "docker://"+b.push.Registry()+"/umoci/app:v1", "oci:"+layout+":v1")
	b.run(ctx, b.push, "umoci", "unpack", "--image", layout+":v1", bundle)
	if err := os.WriteFile(filepath.Join(bundle, "rootfs", "note"), []byte("repacked"), 0o644); err != nil {
		b.t.Fatal(err)
	}
	b.run(ctx, b.push, "umoci", "repack", "--image", layout+":v2", bundle)
	b.run(ctx, b.push, "umoci", "config", "--image", layout+":v2", "--config.label", "org.example.by=umoci")
	b.run(ctx, b.push, "skopeo", "copy", "--preserve-digests", "oci:"+layout+":v2", "docker://"+b.push.Registry()+"/umoci/app:v2")

	var image v1.Manifest
	b.manifest(ctx, "umoci/app:v2", v1.MediaTypeImageManifest, &image)
	if len(image.Layers) != 4 {
		b.t.Errorf("umoci made %d layers, want the 3 of the base and its own", len(image.Layers))
	}
	b.run(ctx, b.use, "skopeo", "copy", "--override-arch", "arm64", "docker://"+b.use.Registry()+"/umoci/app:v2", "oci:"+again+":v2")
	b.run(ctx, b.use, "umoci", "unpack", "--image", again+":v2", filepath.Join(dir, "unpacked"))
	if note, err := os.ReadFile(filepath.Join(dir, "unpacked", "rootfs", "note")); err != nil || string(note) != "repacked" {
		b.t.Errorf("the repacked image holds %q (%v)", note, err)
	}
}
