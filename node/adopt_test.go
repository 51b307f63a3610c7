package node

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/memory"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/atoll-registry/atoll/node/adopt"
)

// otherRegistry runs distribution's registry over a directory until stop is
// called, and gives its address.
func otherRegistry(t *testing.T, dir string) (address string, stop func()) {
	t.Helper()
	program, err := exec.LookPath("registry")
	if err != nil {
		text := "distribution's registry, which this test fills and adopts, is not there: run make testdeps and put .cache/bin into PATH"
		if os.Getenv("ATOLL_TESTDEPS") == "" {
			t.Skip(text)
		}
		t.Fatal(text)
	}
	l, err := net.Listen("tcp", ownHost()+":0")
	must(t, err)
	address = l.Addr().String()
	l.Close()
	file := filepath.Join(t.TempDir(), "config.yml")
	must(t, os.WriteFile(file, fmt.Appendf(nil, "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %q}}\nhttp: {addr: %q}\n", dir, address), 0o600))
	ctx, cancel := context.WithCancel(context.Background())
	command := exec.CommandContext(ctx, program, "serve", file)
	var output bytes.Buffer
	command.Stdout, command.Stderr = &output, &output
	must(t, command.Start())
	stop = func() {
		cancel()
		_ = command.Wait()
	}
	t.Cleanup(func() {
		if stop(); t.Failed() {
			t.Logf("the registry says:\n%s", output.String())
		}
	})
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for range 500 {
		if answer, err := http.Get("http://" + address + "/v2/"); err == nil {
			answer.Body.Close()
			return address, stop
		}
		<-tick.C
	}
	t.Fatal("the registry does not answer")
	return "", nil
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// repository is one as a real client sees it.
func repository(t *testing.T, address, name string) *remote.Repository {
	t.Helper()
	r, err := remote.NewRepository(address + "/" + name)
	must(t, err)
	r.PlainHTTP = true
	r.Client = &auth.Client{Credential: auth.StaticCredential(address, auth.Credential{Username: "admin", Password: password})}
	return r
}

// A registry of another make is filled by a real client, stopped and adopted;
// the client then finds everything here, byte for byte.
func TestAdoptRealRegistry(t *testing.T) {
	dir := t.TempDir()
	address, stop := otherRegistry(t, dir)
	ctx := t.Context()
	source := memory.New()
	push := func(mediaType string, content []byte) v1.Descriptor {
		d := v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}
		must(t, source.Push(ctx, d, bytes.NewReader(content)))
		return d
	}
	layer := push(v1.MediaTypeImageLayer, bytes.Repeat([]byte("layer"), 1<<18))
	var images []v1.Descriptor
	for _, arch := range []string{"amd64", "arm64"} {
		config := push(v1.MediaTypeImageConfig, fmt.Appendf(nil, `{"architecture":%q,"os":"linux"}`, arch))
		d, err := oras.PackManifest(ctx, source, oras.PackManifestVersion1_1, "", oras.PackManifestOptions{ConfigDescriptor: &config, Layers: []v1.Descriptor{layer}})
		must(t, err)
		d.Platform = &v1.Platform{Architecture: arch, OS: "linux"}
		images = append(images, d)
	}
	index := v1.Index{MediaType: v1.MediaTypeImageIndex, Manifests: images}
	index.SchemaVersion = 2
	body, err := json.Marshal(index)
	must(t, err)
	root := push(v1.MediaTypeImageIndex, body)
	must(t, source.Tag(ctx, root, "v1"))
	sbom := push("application/spdx+json", []byte(`{"spdxVersion":"SPDX-2.3"}`))
	attached, err := oras.PackManifest(ctx, source, oras.PackManifestVersion1_1, "application/spdx+json", oras.PackManifestOptions{Subject: &root, Layers: []v1.Descriptor{sbom}})
	must(t, err)
	must(t, source.Tag(ctx, attached, "sbom"))
	names := []string{"app", "team/tools/app"}
	for _, name := range names {
		for _, tag := range []string{"v1", "sbom"} {
			_, err := oras.Copy(ctx, source, tag, repository(t, address, name), tag, oras.DefaultCopyOptions)
			must(t, err)
		}
	}
	stop()

	c := config(t)
	c.Data = filepath.Join(t.TempDir(), "data") // on the same file system as dir
	n := start(t, c)
	report := adoptDir(t, n, dir)
	// A client without a referrers API to use leaves an index under a tag as well.
	if report.Repositories != 2 || report.Tags < 4 || len(report.Problems) != 0 || report.Blobs.Copied != 0 || report.Blobs.Linked != 5 {
		t.Fatalf("the report is %+v", report)
	}
	for _, name := range names {
		from := repository(t, n.URL[len("http://"):], name)
		back := memory.New()
		for tag, want := range map[string]v1.Descriptor{"v1": root, "sbom": attached} {
			got, err := oras.Copy(ctx, from, tag, back, tag, oras.DefaultCopyOptions)
			must(t, err)
			if got.Digest != want.Digest {
				t.Fatalf("%s:%s has digest %s, not %s", name, tag, got.Digest, want.Digest)
			}
		}
		found := 0
		must(t, from.Referrers(ctx, root, "application/spdx+json", func(list []v1.Descriptor) error { found += len(list); return nil }))
		if found != 1 {
			t.Fatalf("%s has %d referrers", name, found)
		}
	}
	if again := adoptDir(t, n, dir); again.Blobs.Linked != 0 || len(again.Problems) != 0 {
		t.Fatalf("adopting again: %+v", again)
	}
}

// adoptDir adopts as the command does, through the node's API.
func adoptDir(t *testing.T, n *running, dir string) adopt.Report {
	t.Helper()
	body, err := json.Marshal(adopt.Request{Dir: dir})
	must(t, err)
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, n.URL+"/api/atoll/v1/adopt", bytes.NewReader(body))
	must(t, err)
	r.SetBasicAuth("admin", password)
	r.Header.Set("Content-Type", "application/json")
	answer, err := n.http.Do(r)
	must(t, err)
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(answer.Body)
		t.Fatalf("%s: %s", answer.Status, text)
	}
	for lines := json.NewDecoder(answer.Body); ; {
		var line adopt.Line
		must(t, lines.Decode(&line))
		if line.Failure != "" {
			t.Fatal(line.Failure)
		}
		if line.Report != nil {
			return *line.Report
		}
	}
}
