//go:build s3 || cloud

package cloud

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/blobs/blobstest"
	"github.com/atoll-registry/atoll/node/fault"
)

// s3server runs a real S3 server and gives the parameters of a bucket in it, to
// which each test adds a root directory of its own.
func s3server(t *testing.T) map[string]any {
	t.Helper()
	program, err := exec.LookPath("versitygw")
	if err != nil {
		text := "versitygw, the S3 server of this test, is not there: run make testdeps and put .cache/bin into PATH"
		if os.Getenv("ATOLL_TESTDEPS") == "" {
			t.Skip(text)
		}
		t.Fatal(text)
	}
	dir := t.TempDir()
	for _, name := range []string{"data/bucket", "attributes"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	access, secret := rand.Text(), rand.Text()
	// Not the test's context: it ends before the cleanups, which still ask the server.
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	// Attributes in files: a temporary directory may be where the kernel has none.
	server := exec.CommandContext(ctx, program, "--port", address, "--access", access, "--secret", secret, "--quiet",
		"posix", "--sidecar", filepath.Join(dir, "attributes"), filepath.Join(dir, "data"))
	var output bytes.Buffer
	server.Stdout, server.Stderr = &output, &output
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stop()
		_ = server.Wait()
		if t.Failed() {
			t.Logf("the S3 server says:\n%s", output.String())
		}
	})
	parameters := map[string]any{
		"accesskey": access, "secretkey": secret, "bucket": "bucket", "region": "us-east-1", "forcepathstyle": "true",
		"regionendpoint": "http://" + address, "secure": "false",
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for range 200 {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
			return parameters
		}
		<-tick.C
	}
	t.Fatal("the S3 server does not listen")
	return nil
}

func with(parameters map[string]any, name string, value any) map[string]any {
	out := map[string]any{name: value}
	for n, v := range parameters {
		if n != name {
			out[n] = v
		}
	}
	return out
}

func TestConformanceS3(t *testing.T) {
	bucket := s3server(t)
	n := 0
	conform(t, func(t *testing.T) blobs.Backend {
		n++
		b, err := Open(t.Context(), "s3", with(bucket, "rootdirectory", fmt.Sprintf("/test-%d", n)))
		if err == nil {
			err = b.Check()
		}
		if err != nil {
			t.Fatal(err)
		}
		return b
	})
	t.Run("presigned", func(t *testing.T) { testPresigned(t, bucket) })
	t.Run("wrong", func(t *testing.T) { testWrong(t, bucket) })
}

// testPresigned fetches a blob as a client does that was sent to the bucket.
func testPresigned(t *testing.T, bucket map[string]any) {
	b, err := Open(t.Context(), "s3", with(bucket, "rootdirectory", "/presigned"))
	if err != nil {
		t.Fatal(err)
	}
	s := store(t, b)
	content := blobstest.Content(5, 5<<20)
	put(t, s, content)
	ask, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
	url, err := s.Redirect(ask, digest.FromBytes(content))
	if err != nil || !strings.Contains(url, "Signature=") {
		t.Fatalf("redirect to %q, %v", url, err)
	}
	fetch, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	fetch.Header.Set("Range", "bytes=1000-1999")
	answer, err := http.DefaultClient.Do(fetch)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	got, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != http.StatusPartialContent || !bytes.Equal(got, content[1000:2000]) {
		t.Fatalf("the bucket answers %s with %d bytes, %v", answer.Status, len(got), err)
	}
}

// testWrong opens what cannot work: it says so at once and keeps the secret.
func testWrong(t *testing.T, bucket map[string]any) {
	for name, value := range map[string]string{"bucket": "none-such", "secretkey": "wrong-secret-" + rand.Text(), "region": ""} {
		parameters := with(bucket, name, value)
		if name == "region" {
			delete(parameters, "regionendpoint")
		}
		b, err := Open(t.Context(), "s3", parameters)
		if err == nil {
			err = b.Check()
		}
		if !fault.Is(err, fault.Unavailable) && !fault.Is(err, fault.Invalid) {
			t.Errorf("with another %s: %v", name, err)
		}
		if _, text, _ := fault.Public(err); strings.Contains(text, fmt.Sprint(parameters["secretkey"])) {
			t.Errorf("with another %s the secret is shown: %s", name, text)
		}
	}
}
