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
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// bench is a site with the node that clients push to and the one that they then
// use.
type bench struct {
	*site
	push, use *lab.Node
	img       lab.Image
}

// TestClients runs each client that others wrote against one node, and against a
// site of three of which it pushes to the first and uses the last.
func TestClients(t *testing.T) {
	img := image(deadline(t, time.Minute), t, 2<<20)
	clients := []struct {
		name string
		run  func(context.Context, bench)
	}{
		{"skopeo", skopeo}, {"schema2", schema2}, {"anonymous", anonymous}, {"names", names},
		{"crane", crane}, {"oras", oras}, {"containerd", containerd},
		{"podman", podman}, {"buildah", buildah}, {"umoci", umoci}, {"helm", helm}, {"cosign", cosign},
	}
	everywhere := []string{"--listen", "0.0.0.0:5000", "--peer-listen", ":5001"} // the address to advertise is found
	for _, p := range []plan{{name: "one", net: 75, nodes: 1}, {name: "three", net: 76, nodes: 3, args: everywhere}} {
		t.Run(fmt.Sprintf("nodes=%d", p.nodes), func(t *testing.T) {
			t.Parallel()
			ctx := deadline(t, 3*time.Minute)
			s := newSite(ctx, t, newLab(t), p)
			for _, client := range clients {
				t.Run(client.name, func(t *testing.T) {
					client.run(ctx, bench{s.in(t), s.nodes[0], s.nodes[len(s.nodes)-1], img})
				})
			}
		})
	}
}

func skopeo(ctx context.Context, b bench) {
	login := b.with("REGISTRY_AUTH_FILE=" + filepath.Join(b.t.TempDir(), "auth.json"))
	for _, node := range []*lab.Node{b.push, b.use} {
		said := login.refused(ctx, node, "skopeo", "login", "-u", "admin", "-p", "wrong", node.Registry())
		if !strings.Contains(said, "invalid username/password") && !strings.Contains(said, "unauthorized") {
			b.t.Errorf("a wrong password: %s", said)
		}
		login.run(ctx, node, "skopeo", "login", "-u", "admin", "-p", lab.Password, node.Registry())
	}
	pushed, used := "docker://"+b.push.Registry()+"/skopeo/app:v1", "docker://"+b.use.Registry()+"/skopeo/app:v1"
	login.run(ctx, b.push, "skopeo", "copy", "--all", "--preserve-digests", "oci:"+b.img.Dir+":"+b.img.Tag, pushed)
	if raw := login.run(ctx, b.use, "skopeo", "inspect", "--raw", used); digest.FromString(raw) != b.img.Index {
		b.t.Errorf("skopeo reads an index with the digest %s, want %s", digest.FromString(raw), b.img.Index)
	}
	var info struct {
		Digest   digest.Digest
		RepoTags []string
		Layers   []string
	}
	out := login.run(ctx, b.use, "skopeo", "inspect", used)
	if err := json.Unmarshal([]byte(out), &info); err != nil || info.Digest != b.img.Index || !slices.Equal(info.RepoTags, []string{"v1"}) || len(info.Layers) != 3 {
		b.t.Errorf("skopeo inspect: %v %s", err, out)
	}
	login.run(ctx, b.use, "skopeo", "copy", "--all", "--preserve-digests", used, "oci:"+b.t.TempDir()+":x")

	login.run(ctx, b.push, "skopeo", "delete", pushed)
	if said := login.refused(ctx, b.use, "skopeo", "inspect", used); !strings.Contains(said, "manifest unknown") && !strings.Contains(said, "MANIFEST_UNKNOWN") && !strings.Contains(said, "there is no") {
		b.t.Errorf("after the deletion: %s", said)
	}
}

// Docker's own format is stored and served byte for byte.
func schema2(ctx context.Context, b bench) {
	dir := b.t.TempDir()
	b.run(ctx, b.push, "skopeo", "copy", "--format", "v2s2", "oci:"+b.img.Dir+":"+b.img.Tag, "dir:"+dir)
	want, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
	if err != nil {
		b.t.Fatal(err)
	}
	b.run(ctx, b.push, "skopeo", "copy", "--preserve-digests", "dir:"+dir, "docker://"+b.push.Registry()+"/docker/app:v1")
	got := b.wire(b.use).get(ctx, "/v2/docker/app/manifests/v1", http.StatusOK)
	if string(got.body) != string(want) || got.header.Get("Docker-Content-Digest") != digest.FromBytes(want).String() {
		b.t.Errorf("pushed %s\ngot %s %s", want, got.header.Get("Docker-Content-Digest"), got.body)
	}
	if kind := got.header.Get("Content-Type"); kind != "application/vnd.docker.distribution.manifest.v2+json" {
		b.t.Errorf("the manifest has the type %s", kind)
	}
	b.pullAll(ctx, b.use, "docker/app:v1")
}

// Anybody may pull from library; what a push made is private.
func anonymous(ctx context.Context, b bench) {
	b.pushAll(ctx, b.push, b.img, "library/open", "v1")
	b.pushAll(ctx, b.push, b.img, "made/closed", "v1")
	b.run(ctx, b.use, "skopeo", "copy", "--all", "--src-no-creds", "docker://"+b.use.Registry()+"/library/open:v1", "oci:"+b.t.TempDir()+":x")
	said := b.refused(ctx, b.use, "skopeo", "inspect", "--no-creds", "docker://"+b.use.Registry()+"/made/closed:v1")
	if !strings.Contains(said, "authentication required") && !strings.Contains(said, "unauthorized") && !strings.Contains(said, "log in") {
		b.t.Errorf("an anonymous pull of a private project: %s", said)
	}
	said = b.refused(ctx, b.use, "skopeo", "copy", "--dest-no-creds", "oci:"+b.img.Dir+":"+b.img.Tag, "docker://"+b.use.Registry()+"/library/open:mine")
	if !strings.Contains(said, "authentication required") && !strings.Contains(said, "unauthorized") && !strings.Contains(said, "log in") {
		b.t.Errorf("an anonymous push: %s", said)
	}
	var made struct {
		Name     string
		Metadata struct{ Public string }
	}
	answer := b.wire(b.use).get(ctx, "/api/v2.0/projects/made", http.StatusOK)
	if err := json.Unmarshal(answer.body, &made); err != nil || made.Name != "made" || made.Metadata.Public != "false" {
		b.t.Errorf("the project that the push made: %v %s; want it private", err, answer.body)
	}
}

// A name of one part is in library, however it is spelled.
func names(ctx context.Context, b bench) {
	b.pushAll(ctx, b.push, b.img, "short", "v1")
	b.pushAll(ctx, b.push, b.img, "library/long", "v1")
	for _, name := range []string{"short", "library/short", "long", "library/long"} {
		if got := b.run(ctx, b.use, "crane", "digest", b.use.Registry()+"/"+name+":v1"); got != b.img.Index.String() {
			b.t.Errorf("%s is %s, want %s", name, got, b.img.Index)
		}
	}
}

func crane(ctx context.Context, b bench) {
	own := b.with("DOCKER_CONFIG=" + b.t.TempDir())
	for _, node := range []*lab.Node{b.push, b.use} {
		own.run(ctx, node, "crane", "auth", "login", node.Registry(), "-u", "admin", "-p", lab.Password)
	}
	at := func(node *lab.Node, name string) string { return node.Registry() + "/" + name }
	pushed := own.run(ctx, b.push, "crane", "push", "--index", b.img.Dir, at(b.push, "crane/app:v1"))
	_, want, _ := strings.Cut(pushed, "@")
	if got := own.run(ctx, b.use, "crane", "digest", at(b.use, "crane/app:v1")); got != want {
		b.t.Errorf("crane digest says %s, want %s", got, want)
	}
	own.run(ctx, b.use, "crane", "pull", "--format", "oci", at(b.use, "crane/app:v1"), filepath.Join(b.t.TempDir(), "out"))
	b.pullAll(ctx, b.use, "crane/app@"+b.img.Index.String())

	// A copy within the registry moves no blob: the layers are mounted.
	before := b.counter(ctx, b.push, `atoll_registry_mounts_total{outcome="mounted"}`)
	own.run(ctx, b.push, "crane", "copy", at(b.push, "crane/app:v1"), at(b.push, "crane-copy/app:v1"))
	if after := b.counter(ctx, b.push, `atoll_registry_mounts_total{outcome="mounted"}`); after <= before {
		b.t.Errorf("crane copy mounted %v blobs", after-before)
	}
	b.pullAll(ctx, b.use, "crane-copy/app@"+b.img.Index.String())

	own.run(ctx, b.use, "crane", "tag", at(b.use, "crane/app:v1"), "v2")
	if got := own.run(ctx, b.push, "crane", "ls", at(b.push, "crane/app")); got != "v1\nv2" {
		b.t.Errorf("crane ls: %q", got)
	}
	if got := strings.Fields(own.run(ctx, b.use, "crane", "catalog", b.use.Registry())); !slices.Contains(got, "crane/app") || !slices.Contains(got, "crane-copy/app") {
		b.t.Errorf("crane catalog: %v", got)
	}
	own.run(ctx, b.push, "crane", "delete", at(b.push, "crane/app@"+want))
	if said := own.refused(ctx, b.use, "crane", "digest", at(b.use, "crane/app:v2")); !strings.Contains(said, "404") && !strings.Contains(said, "MANIFEST_UNKNOWN") {
		b.t.Errorf("after the deletion: %s", said)
	}
	if got := own.run(ctx, b.use, "crane", "digest", at(b.use, "crane-copy/app:v1")); got != want {
		b.t.Errorf("the copy is %s after its source was deleted, want %s", got, want)
	}
}

// counter reads a metric of a node; 0 when it is not there yet.
func (s *site) counter(ctx context.Context, node *lab.Node, name string) float64 {
	s.t.Helper()
	w := s.wire(node)
	anonymous := *w
	anonymous.anonymous = true
	anonymous.get(ctx, "/metrics", http.StatusUnauthorized)
	for line := range strings.Lines(string(w.get(ctx, "/metrics", http.StatusOK).body)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			var n float64
			if _, err := fmt.Sscan(value, &n); err != nil {
				s.t.Fatalf("metric %s: %v", line, err)
			}
			return n
		}
	}
	return 0
}

func oras(ctx context.Context, b bench) {
	command := func(node *lab.Node, args ...string) string {
		b.t.Helper()
		return b.run(ctx, node, built.orasgo, append([]string{"-u", "admin", "-p", lab.Password}, args...)...)
	}
	pushed, used := b.push.Registry()+"/oras/app:v1", b.use.Registry()+"/oras/app:v1"
	if got := command(b.push, "copy", "oci:"+b.img.Dir+":"+b.img.Tag, pushed); got != b.img.Index.String() {
		b.t.Fatalf("oras-go pushed %s, want %s", got, b.img.Index)
	}
	note := filepath.Join(b.t.TempDir(), "note")
	if err := os.WriteFile(note, []byte("looked at by "+b.use.Host.Name), 0o644); err != nil {
		b.t.Fatal(err)
	}
	const noteType = "application/vnd.example.note"
	attached := command(b.use, "attach", used, noteType, note)
	if all := command(b.push, "discover", pushed); !strings.Contains(all, attached) || !strings.Contains(all, b.img.SBOM.String()) {
		b.t.Errorf("discover: %q; want %s and %s", all, attached, b.img.SBOM)
	}
	if some := command(b.push, "discover", pushed, noteType); some != attached+" "+noteType {
		b.t.Errorf("discover of one type: %q; want %s alone", some, attached)
	}
	dir := b.t.TempDir()
	command(b.use, "copy", used, "oci:"+dir+":x")
	for _, want := range []string{b.img.Index.String(), b.img.SBOM.String(), attached} {
		if _, err := os.Stat(filepath.Join(dir, "blobs", strings.Replace(want, ":", "/", 1))); err != nil {
			b.t.Errorf("copied with its referrers: %v", err)
		}
	}
}

// containerd finds the registry by hosts.toml: as itself, and as the mirror of
// another registry, whose content is in the project of that registry's name.
func containerd(ctx context.Context, b bench) {
	b.pushAll(ctx, b.push, b.img, "docker.io/library/mirrored", "v1")
	b.pushAll(ctx, b.push, b.img, "ctr/app", "v1")
	dir := b.t.TempDir()
	host := fmt.Sprintf("[host.%q]\n  capabilities = [\"pull\", \"resolve\", \"push\"]\n  ca = %q\n", "https://"+b.use.Registry(), b.ca())
	for name, server := range map[string]string{"docker.io": "https://registry-1.docker.io", b.use.Registry(): "https://" + b.use.Registry()} {
		if err := os.MkdirAll(filepath.Join(dir, "hosts", name), 0o755); err != nil {
			b.t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "hosts", name, "hosts.toml"), []byte(fmt.Sprintf("server = %q\n\n%s", server, host)), 0o644); err != nil {
			b.t.Fatal(err)
		}
	}
	config := filepath.Join(dir, "config.toml")
	text := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = %q\n",
		filepath.Join(dir, "root"), filepath.Join(dir, "state"), filepath.Join(dir, "sock"))
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		b.t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		b.t.Fatal(err)
	}
	defer log.Close()
	daemon, err := b.use.Host.Start(ctx, log, nil, "containerd", "--config", config)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(daemon.Kill)
	ctr := func(args ...string) string {
		b.t.Helper()
		return b.run(ctx, b.use, "ctr", append([]string{"--address", filepath.Join(dir, "sock")}, args...)...)
	}
	b.until(ctx, "containerd to answer", func() bool {
		_, err := b.use.Host.Run(ctx, "ctr", "--address", filepath.Join(dir, "sock"), "version")
		return err == nil
	})
	hosts := filepath.Join(dir, "hosts")
	for _, image := range []string{"docker.io/library/mirrored:v1", b.use.Registry() + "/ctr/app:v1"} {
		ctr("images", "pull", "--snapshotter", "native", "--all-platforms", "--hosts-dir", hosts, "--user", "admin:"+lab.Password, image)
	}
	if list := ctr("images", "ls"); strings.Count(list, b.img.Index.String()) != 2 {
		b.t.Errorf("ctr has\n%s\nwant two images with the digest %s", list, b.img.Index)
	}
	ctr("images", "tag", b.use.Registry()+"/ctr/app:v1", b.use.Registry()+"/ctr/again:v1")
	ctr("images", "push", "--hosts-dir", hosts, "--user", "admin:"+lab.Password, b.use.Registry()+"/ctr/again:v1")
	if got := b.run(ctx, b.push, "crane", "digest", b.push.Registry()+"/ctr/again:v1"); got != b.img.Index.String() {
		b.t.Errorf("ctr pushed %s, want %s", got, b.img.Index)
	}
}

// until polls until ok, within the test's deadline.
func (s *site) until(ctx context.Context, what string, ok func() bool) {
	s.t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			s.t.Fatalf("waiting for %s: %v", what, ctx.Err())
		case <-tick.C:
		}
	}
}
