package e2e

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// cosign signs an index with its images, and attests to it, with a key pair and
// without a transparency log, in both ways of keeping signatures: as tags beside
// the image, and as artifacts that refer to it.
func cosign(ctx context.Context, b bench) {
	dir := b.t.TempDir()
	own := b.with("COSIGN_PASSWORD=a key's password", "HOME="+dir, "TUF_ROOT="+dir)
	for _, name := range []string{"ours", "other"} {
		own.run(ctx, b.push, "cosign", "generate-key-pair", "--output-key-prefix", filepath.Join(dir, name))
	}
	private, public, other := filepath.Join(dir, "ours.key"), filepath.Join(dir, "ours.pub"), filepath.Join(dir, "other.pub")
	predicate := filepath.Join(dir, "predicate.json")
	if err := os.WriteFile(predicate, []byte(`{"looked":"twice"}`), 0o644); err != nil {
		b.t.Fatal(err)
	}
	for _, scheme := range []struct {
		repository, bundle string
		stored             func(context.Context, bench, string)
	}{
		{"cosign/tagged", "false", tagged},
		{"cosign/referring", "true", referring},
	} {
		bundle := "--new-bundle-format=" + scheme.bundle
		verify := func(key, reference string) []string {
			return []string{"verify", "--key", key, "--insecure-ignore-tlog", bundle, "-a", "by=us", reference}
		}
		b.pushAll(ctx, b.push, b.img, scheme.repository, "v1")
		at := func(node *lab.Node) string {
			return node.Registry() + "/" + scheme.repository + "@" + b.img.Index.String()
		}
		if said := own.refused(ctx, b.use, "cosign", verify(public, at(b.use))...); !strings.Contains(said, "no signatures") && !strings.Contains(said, "no matching") {
			b.t.Errorf("before it was signed: %s", said)
		}
		offline := []string{"--key", private, "--yes", "--tlog-upload=false", "--use-signing-config=false", bundle}
		own.run(ctx, b.push, "cosign", slices.Concat([]string{"sign", "--recursive", "-a", "by=us"}, offline, []string{at(b.push)})...)
		own.run(ctx, b.push, "cosign", slices.Concat([]string{"attest", "--predicate", predicate, "--type", "custom"}, offline, []string{at(b.push)})...)
		scheme.stored(ctx, b, scheme.repository)

		own.run(ctx, b.use, "cosign", verify(public, at(b.use))...)
		own.run(ctx, b.use, "cosign", verify(public, b.use.Registry()+"/"+scheme.repository+":v1")...)
		own.run(ctx, b.use, "cosign", "verify-attestation", "--key", public, "--type", "custom", "--insecure-ignore-tlog", bundle, at(b.use))
		if said := own.refused(ctx, b.use, "cosign", verify(other, at(b.use))...); !strings.Contains(said, "signature") {
			b.t.Errorf("by a key that did not sign it: %s", said)
		}
		var index v1.Index
		b.manifest(ctx, scheme.repository+":v1", v1.MediaTypeImageIndex, &index)
		for _, image := range index.Manifests {
			own.run(ctx, b.use, "cosign", verify(public, b.use.Registry()+"/"+scheme.repository+"@"+image.Digest.String())...)
		}
	}
	copied := "/cosign-copy/app:v1"
	own.run(ctx, b.use, "cosign", "copy", b.use.Registry()+"/cosign/tagged:v1", b.use.Registry()+copied)
	own.run(ctx, b.push, "cosign", "verify", "--key", public, "--insecure-ignore-tlog", "--new-bundle-format=false", b.push.Registry()+copied)
}

// tagged checks that the signature and the attestation are tags named for the
// digest.
func tagged(ctx context.Context, b bench, repository string) {
	b.t.Helper()
	tags := string(b.wire(b.use).get(ctx, "/v2/"+repository+"/tags/list", http.StatusOK).body)
	for _, kind := range []string{".sig", ".att"} {
		if tag := strings.Replace(b.img.Index.String(), ":", "-", 1) + kind; !strings.Contains(tags, tag) {
			b.t.Errorf("the tag %s is not in %s", tag, tags)
		}
	}
}

// referring checks that they are artifacts that refer to the digest, and no tags.
func referring(ctx context.Context, b bench, repository string) {
	b.t.Helper()
	w := b.wire(b.use)
	list := string(w.get(ctx, "/v2/"+repository+"/referrers/"+b.img.Index.String(), http.StatusOK).body)
	if strings.Count(list, `"artifactType":"application/vnd.dev.sigstore.bundle`) != 2 {
		b.t.Errorf("the referrers are %s, want two bundles among them", list)
	}
	if tags := string(w.get(ctx, "/v2/"+repository+"/tags/list", http.StatusOK).body); strings.Contains(tags, "sha256-") {
		b.t.Errorf("there are tags for what refers: %s", tags)
	}
}
