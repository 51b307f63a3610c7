package e2e

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// TestMirrors lets containerd and podman pull an image of Docker Hub from a site,
// by nothing but what atoll mirror-config wrote: no login, no CA that the machine
// knew before. When the node beside them is down its peers serve.
func TestMirrors(t *testing.T) {
	ctx := deadline(t, 3*time.Minute)
	s := newSite(ctx, t, newLab(t), plan{name: "mir", net: 83, nodes: 3})
	img := image(ctx, t, 1<<20)
	near := s.nodes[0]
	s.pushAll(ctx, near, img, "docker.io/library/busybox", "v1")
	public := s.wire(near).request(ctx, http.MethodPut, "/api/v2.0/projects/docker.io", strings.NewReader(`{"metadata":{"public":"true"}}`))
	public.Header.Set("Content-Type", "application/json")
	s.wire(near).ask(public, http.StatusOK)

	// The machine's own files are left alone: /etc of the engines is a layer above.
	root := t.TempDir()
	for _, name := range []string{"etc", "scratch"} {
		if err := os.Mkdir(filepath.Join(root, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, engine := range []string{"containerd", "podman"} {
		s.atoll(ctx, near, "mirror-config", "--for", engine, "--write", "--root", root)
	}
	hosts, err := os.ReadFile(filepath.Join(root, "etc/containerd/certs.d/docker.io/hosts.toml"))
	if err != nil {
		t.Fatal(err)
	}
	var at []int
	for _, node := range s.nodes {
		at = append(at, strings.Index(string(hosts), "https://"+node.Registry()))
	}
	if at[0] < 0 || at[1] < at[0] || at[2] < at[0] {
		t.Fatalf("the hosts are not the node on the machine, then its peers:\n%s", hosts)
	}

	ctr := newContainerd(ctx, s, near, root)
	podman := newPodman(s, near, root)
	pulls := func(when string) {
		t.Helper()
		if got := ctr("images", "pull", "--snapshotter", "native", "--all-platforms", "--hosts-dir", "/etc/containerd/certs.d", "docker.io/library/busybox:v1"); !strings.Contains(got, img.Index.String()) {
			t.Errorf("%s ctr pulled\n%s\nwant the digest %s", when, got, img.Index)
		}
		ctr("images", "rm", "--sync", "docker.io/library/busybox:v1")
		id := podman("pull", "--quiet", "--arch", "arm64", "docker.io/library/busybox:v1")
		if got := podman("image", "inspect", "--format", "{{.Architecture}} {{.RepoTags}}", id); got != "arm64 [docker.io/library/busybox:v1]" {
			t.Errorf("%s podman pulled %s", when, got)
		}
		podman("rmi", "--force", id)
	}
	pulls("with all nodes")
	near.Kill()
	pulls("with its own node down")

	for _, engine := range []string{"containerd", "podman"} {
		s.run(ctx, near, built.atoll, "mirror-config", "--for", engine, "--undo", "--root", root)
	}
	left, err := os.ReadDir(filepath.Join(root, "etc"))
	if err != nil || len(left) > 0 {
		t.Errorf("after the undo there are %v %v", left, err)
	}
}

// over runs a program with root/etc above the machine's /etc, which only it sees.
// What it writes there is lost.
func over(root string, command ...string) (name string, args []string) {
	const mount = `set -e; root=$1; shift
mount -t tmpfs none "$root/scratch"; mkdir "$root/scratch/upper" "$root/scratch/work"
mount -t overlay none -o "lowerdir=$root/etc:/etc,upperdir=$root/scratch/upper,workdir=$root/scratch/work" /etc
exec "$@"`
	return "sh", slices.Concat([]string{"-c", mount, "sh", root}, command)
}

// plain is the site's clients without logins and CA.
func plain(s *site) *site {
	home := s.t.TempDir()
	auth := filepath.Join(home, "auth.json")
	if err := os.WriteFile(auth, []byte("{}"), 0o600); err != nil {
		s.t.Fatal(err)
	}
	copied := *s
	copied.env = []string{"HOME=" + home, "DOCKER_CONFIG=" + home, "REGISTRY_AUTH_FILE=" + auth}
	return &copied
}

// newContainerd starts a containerd of its own on the node's host.
func newContainerd(ctx context.Context, s *site, node *lab.Node, root string) func(args ...string) string {
	s.t.Helper()
	dir := s.t.TempDir()
	socket := filepath.Join(dir, "sock")
	config := filepath.Join(dir, "config.toml")
	text := "version = 2\nroot = \"" + filepath.Join(dir, "root") + "\"\nstate = \"" + filepath.Join(dir, "state") +
		"\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = \"" + socket + "\"\n"
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		s.t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { log.Close() })
	daemon, err := node.Host.Start(ctx, log, nil, "containerd", "--config", config)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(daemon.Kill)
	s.until(ctx, "containerd to answer", func() bool {
		_, err := node.Host.Run(ctx, "ctr", "--address", socket, "version")
		return err == nil
	})
	clients := plain(s)
	return func(args ...string) string {
		s.t.Helper()
		name, all := over(root, append([]string{"ctr", "--address", socket}, args...)...)
		return clients.run(ctx, node, name, all...)
	}
}

// newPodman gives podman with images of its own on the node's host.
func newPodman(s *site, node *lab.Node, root string) func(args ...string) string {
	s.t.Helper()
	ctx := s.t.Context()
	run, err := os.MkdirTemp("", "at-run") // podman refuses long names
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { os.RemoveAll(run) })
	storage := filepath.Join(s.t.TempDir(), "images")
	clients := plain(s)
	return func(args ...string) string {
		s.t.Helper()
		all := append([]string{"podman", "--events-backend", "none", "--storage-driver", "vfs", "--root", storage, "--runroot", run}, args...)
		name, all := over(root, all...)
		return clients.run(ctx, node, name, all...)
	}
}
