package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// Story 4: a bundle carries everything to a site that shares no network.
func TestBundleCrossesTheAirGap(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 4*time.Minute)
	l := newLab(t)
	a := newSite(ctx, t, l, plan{name: "a", net: 73, nodes: 1})
	b := newSite(ctx, t, l, plan{name: "b", net: 74, nodes: 1})
	from, to := a.nodes[0], b.nodes[0]
	if _, err := to.Host.Run(ctx, "ping", "-c1", "-W1", from.Host.IP); err == nil {
		t.Fatal("the sites share a network: the test proves nothing")
	}
	img := image(ctx, t, 8<<20)
	a.pushAll(ctx, from, img, "ship/app", "v1")

	stick := t.TempDir()
	file := filepath.Join(stick, "site-a.tar")
	identity := filepath.Join(stick, "site-a.json")
	a.atoll(ctx, from, "bundle", "export", "--project", "ship", "-o", file)
	if err := os.WriteFile(identity, []byte(a.atoll(ctx, from, "site", "show", "--format", "json")), 0o644); err != nil {
		t.Fatal(err)
	}

	// It is an OCI layout to everybody.
	out := a.run(ctx, from, "skopeo", "inspect", "--raw", "oci-archive:"+file+":ship--app--v1")
	if !strings.Contains(out, "arm64") {
		t.Fatalf("skopeo reads from the bundle: %s", out)
	}
	a.run(ctx, from, "skopeo", "copy", "--all", "--preserve-digests", "oci-archive:"+file+":ship--app--v1", "oci:"+t.TempDir()+":x")
	if got := a.run(ctx, from, built.orasgo, "copy", "oci:"+file+":ship--app--v1", "oci:"+t.TempDir()+":x"); got != img.Index.String() {
		t.Fatalf("oras-go reads %s from the bundle, want %s", got, img.Index)
	}
	extracted := t.TempDir()
	a.run(ctx, from, "tar", "-xf", file, "-C", extracted)
	a.run(ctx, from, "crane", "push", "--index", extracted, from.Registry()+"/extracted/bundle:v1")

	// A laptop with no node proves it.
	laptop := b.nodes[0].Host
	if out, err := laptop.Run(ctx, built.atoll, "bundle", "verify", file, "--trust", identity); err != nil || !strings.Contains(out, "verified") {
		t.Fatalf("verify: %v %s", err, out)
	}

	// Not before B was told to trust A, and for that project.
	if said, err := to.Atoll(ctx, "bundle", "import", file); err == nil || !strings.Contains(err.Error(), "trust") {
		t.Fatalf("import from an unknown site: %v %s", err, said)
	}
	b.atoll(ctx, to, "site", "trust", identity)
	if _, err := to.Atoll(ctx, "bundle", "import", file); err == nil || !strings.Contains(err.Error(), "--accept") {
		t.Fatalf("import of a project that was not accepted: %v; want the way out", err)
	}
	b.atoll(ctx, to, "site", "trust", identity, "--accept", "ship")

	// One flipped bit anywhere is refused and changes nothing.
	flipped := filepath.Join(stick, "flipped.tar")
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int{600, len(whole) / 3, len(whole) / 2, len(whole) - 2000, len(whole) - 10} {
		bad := append([]byte(nil), whole...)
		bad[at] ^= 1
		if err := os.WriteFile(flipped, bad, 0o644); err != nil {
			t.Fatal(err)
		}
		if out, err := to.Atoll(ctx, "bundle", "import", flipped); err == nil {
			t.Fatalf("bit flipped in byte %d of %d: imported: %s", at, len(whole), out)
		}
	}
	if err := os.WriteFile(flipped, whole[:len(whole)*2/3], 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := to.Atoll(ctx, "bundle", "import", flipped); err == nil || !strings.Contains(err.Error(), "truncated") && !strings.Contains(err.Error(), "ends") {
		t.Fatalf("a truncated bundle: %v", err)
	}
	b.refused(ctx, to, "crane", "digest", to.Registry()+"/ship/app:v1")

	b.atoll(ctx, to, "bundle", "import", "--dry-run", file)
	b.refused(ctx, to, "crane", "digest", to.Registry()+"/ship/app:v1")

	b.atoll(ctx, to, "bundle", "import", file)
	if got := b.pullAll(ctx, to, "ship/app:v1"); got != img.Index.String() {
		t.Fatalf("site B serves %s, want %s", got, img.Index)
	}
	found := b.run(ctx, to, built.orasgo, "-u", "admin", "-p", lab.Password, "discover", to.Registry()+"/ship/app:v1")
	if !strings.Contains(found, img.SBOM.String()) {
		t.Fatalf("site B does not list the SBOM among the referrers: %q", found)
	}
	// Twice is once.
	b.atoll(ctx, to, "bundle", "import", file)

	// The mirror refuses pushes and says where to push.
	said := b.refused(ctx, to, "crane", "tag", to.Registry()+"/ship/app:v1", "v2")
	if !strings.Contains(said, "mirror") {
		t.Fatalf("a push to a mirror: %s", said)
	}

	// A name that is taken here wants another one.
	a.pushAll(ctx, from, img, "library/app", "v1")
	second := filepath.Join(stick, "library.tar")
	a.atoll(ctx, from, "bundle", "export", "--project", "library", "-o", second)
	b.atoll(ctx, to, "site", "trust", identity, "--accept", "*")
	if _, err := to.Atoll(ctx, "bundle", "import", second); err == nil || !strings.Contains(err.Error(), "--as library=") {
		t.Fatalf("import of a project whose name is taken: %v; want the way out", err)
	}
	b.atoll(ctx, to, "bundle", "import", second, "--as", "library=library-of-a")
	if got := b.pullAll(ctx, to, "library-of-a/app:v1"); got != img.Index.String() {
		t.Fatalf("site B serves %s under the other name", got)
	}
}
