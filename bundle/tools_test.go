package bundle

// Integration tests with the tools that read a bundle without Atoll. They fail
// where a tool is missing: `make test` installs them.

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"oras.land/oras-go/v2"
	orasmemory "oras.land/oras-go/v2/content/memory"
	"oras.land/oras-go/v2/content/oci"
	"oras.land/oras-go/v2/registry"

	"github.com/atoll-registry/atoll/bundle/entry"
)

// onDisk writes the sample as a file and gives the digest of lib/app:v1.
func onDisk(t *testing.T) (s *site, file string, v1 digest.Digest) {
	t.Helper()
	s = newSite(t, "site-a", 10)
	data, written := s.write(s.spec(s.log("p1", s.project(), 0)))
	file = filepath.Join(t.TempDir(), "sample.tar")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return s, file, written.Images[1].Digest
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}

func TestSkopeoReadsABundle(t *testing.T) {
	_, file, v1 := onDisk(t)
	source := "oci-archive:" + file + ":lib--app--v1"
	if raw := run(t, "skopeo", "inspect", "--raw", source); digest.FromString(raw) != v1 {
		t.Errorf("inspect: digest %s, want %s", digest.FromString(raw), v1)
	}
	out := filepath.Join(t.TempDir(), "out")
	run(t, "skopeo", "copy", "--insecure-policy", "--all", "--preserve-digests", source, "oci:"+out+":v1")
	var copied index
	data, err := os.ReadFile(filepath.Join(out, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &copied); err != nil || copied.Manifests[0].Digest != v1 {
		t.Errorf("copy: %s, %v", data, err)
	}
}

func TestCranePushesAnExtractedBundle(t *testing.T) {
	_, file, v1 := onDisk(t)
	dir := t.TempDir()
	run(t, "tar", "-xf", file, "-C", dir)
	server := exec.CommandContext(t.Context(), "crane", "registry", "serve", "--address", "127.0.0.1:0")
	stderr, err := server.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Process.Kill(); _ = server.Wait() })
	log := bufio.NewReader(stderr)
	line, err := log.ReadString('\n')
	if err != nil {
		t.Fatalf("crane registry serve says nothing: %v", err)
	}
	go func() { _, _ = io.Copy(io.Discard, log) }()
	port := strings.TrimSpace(line[strings.LastIndexAny(line, " :")+1:])
	repository := "127.0.0.1:" + port + "/lib/app"
	run(t, "crane", "push", "--index", dir, repository+":all")
	if have := strings.TrimSpace(run(t, "crane", "digest", repository+"@"+v1.String())); have != v1.String() {
		t.Errorf("pushed digest %s, want %s", have, v1)
	}
}

func TestOrasReadsABundle(t *testing.T) {
	_, file, v1 := onDisk(t)
	store, err := oci.NewFromTar(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	d, err := oras.Copy(t.Context(), store, "lib--app--v1", orasmemory.New(), "", oras.DefaultCopyOptions)
	if err != nil || d.Digest != v1 {
		t.Errorf("copy: %v, %v", d, err)
	}
	referrers, err := registry.Referrers(t.Context(), store, d, "application/spdx+json")
	if err != nil || len(referrers) != 1 {
		t.Errorf("referrers: %v, %v", referrers, err)
	}
}

// The recipes of FORMAT.md, section 5, over a bundle with digests of both
// algorithms, whose longer names only a PAX header holds.
func TestTarAndSumsReadBothAlgorithms(t *testing.T) {
	s := newSite(t, "site-a", 10)
	data, written := s.write(s.spec(s.log("p1", s.mixed(), 0)))
	dir := t.TempDir()
	file := filepath.Join(dir, "mixed.tar")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "tar", "-xf", file, "-C", dir)
	content, err := os.ReadFile(filepath.Join(dir, filepath.FromSlash(pathManifest)))
	if err != nil {
		t.Fatal(err)
	}
	var m manifest
	if err := json.Unmarshal(content, &m); err != nil {
		t.Fatal(err)
	}
	lists := map[string]string{}
	for _, f := range m.Files {
		d := f.Digest()
		lists[d.Algorithm().String()+"sum"] += d.Encoded() + "  " + filepath.Join(dir, filepath.FromSlash(f.Path)) + "\n"
	}
	for tool, list := range lists {
		sums := filepath.Join(dir, tool)
		if err := os.WriteFile(sums, []byte(list), 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, tool, "--check", "--strict", sums)
	}
	if len(lists) != len(entry.Algorithms()) {
		t.Errorf("%d algorithms", len(lists))
	}
	store, err := oci.NewFromTar(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	for _, image := range written.Images {
		if image.Tag == "" {
			continue
		}
		if d, err := oras.Copy(t.Context(), store, image.Reference, orasmemory.New(), "", oras.DefaultCopyOptions); err != nil || d.Digest != image.Digest {
			t.Errorf("%s: %v, %v", image.Reference, d, err)
		}
	}
}

func TestOpensslVerifiesABundle(t *testing.T) {
	s, file, _ := onDisk(t)
	dir := t.TempDir()
	run(t, "tar", "-xf", file, "-C", dir)
	verify := func(message, signature []byte) string {
		t.Helper()
		put := func(name string, content []byte) string {
			path := filepath.Join(dir, name)
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			return path
		}
		return run(t, "openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", put("key.pem", s.key(s.online).PEM()), "-sigfile", put("sig", signature), "-in", put("message", message))
	}
	read := func(path string) []byte {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(dir, filepath.FromSlash(path)))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	signature, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(read(pathSignature))))
	if err != nil {
		t.Fatal(err)
	}
	if out := verify(read(pathManifest), signature); !strings.Contains(out, "Success") {
		t.Errorf("manifest: %s", out)
	}
	// The DSSE statement, by hand: PAE as the DSSE protocol defines it.
	var envelope struct {
		PayloadType, Payload string
		Signatures           []struct{ Keyid, Sig string }
	}
	if err := json.Unmarshal(read(pathStatement), &envelope); err != nil {
		t.Fatal(err)
	}
	payload, err := base64.StdEncoding.DecodeString(envelope.Payload)
	if err != nil {
		t.Fatal(err)
	}
	pae := append([]byte("DSSEv1 28 application/vnd.in-toto+json "+strconv.Itoa(len(payload))+" "), payload...)
	signature, err = base64.StdEncoding.DecodeString(envelope.Signatures[0].Sig)
	if err != nil {
		t.Fatal(err)
	}
	if out := verify(pae, signature); !strings.Contains(out, "Success") {
		t.Errorf("statement: %s", out)
	}
	if envelope.Signatures[0].Keyid != s.key(s.online).Fingerprint() {
		t.Errorf("keyid %s", envelope.Signatures[0].Keyid)
	}
}
