//go:build s3 || gcs || azure || cloud

package cloud

import (
	"bytes"
	"context"
	"crypto/tls"
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

// serve runs the program of an object store until the test has ended. The
// arguments may name the address at which it is to listen. target installs it.
func serve(t *testing.T, program, target string, arguments func(host, port string) []string, env ...string) (address string) {
	t.Helper()
	program, err := exec.LookPath(program)
	if err != nil {
		text := fmt.Sprintf("the object store of this test is not there (%v): run make %s and put .cache/bin into PATH", err, target)
		if os.Getenv("ATOLL_TESTDEPS") == "" {
			t.Skip(text)
		}
		t.Fatal(text)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address = l.Addr().String()
	l.Close()
	host, port, _ := net.SplitHostPort(address)
	// Not the test's context: it ends before the cleanups, which still ask the server.
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	server := exec.CommandContext(ctx, program, arguments(host, port)...)
	server.Env = append(os.Environ(), env...)
	var output bytes.Buffer
	server.Stdout, server.Stderr = &output, &output
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stop()
		_ = server.Wait()
		if t.Failed() {
			t.Logf("%s says:\n%s", filepath.Base(program), output.String())
		}
	})
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for range 600 {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
			return address
		}
		<-tick.C
	}
	t.Fatalf("%s does not listen", program)
	return ""
}

// suite runs all that a backend has to pass over a real server, each part in a
// root directory of its own.
func suite(t *testing.T, ctx context.Context, kind string, parameters map[string]any) {
	n := 0
	conform(t, func(t *testing.T) blobs.Backend {
		n++
		return usable(t, ctx, kind, with(parameters, "rootdirectory", fmt.Sprintf("/test-%d", n)))
	})
}

func usable(t *testing.T, ctx context.Context, kind string, parameters map[string]any) *Backend {
	t.Helper()
	b, err := Open(ctx, kind, parameters)
	if err == nil {
		err = b.Check()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
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

// testPresigned fetches a blob as a client does that was sent to the bucket.
// reach makes of the address what leads to the test's server.
func testPresigned(t *testing.T, b *Backend, signature string, reach func(address string) string) {
	s := store(t, b)
	content := blobstest.Content(5, 5<<20)
	put(t, s, content)
	ask, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
	address, err := s.Redirect(ask, digest.FromBytes(content))
	if err != nil || !strings.Contains(address, signature+"=") {
		t.Fatalf("redirect to %q, %v", address, err)
	}
	fetch, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, reach(address), nil)
	fetch.Header.Set("Range", "bytes=1000-1999")
	// Some of the servers have a certificate of their own making.
	client := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	defer client.CloseIdleConnections()
	answer, err := client.Do(fetch)
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
func testWrong(t *testing.T, ctx context.Context, kind string, parameters map[string]any, secretName string) {
	b, err := Open(ctx, kind, parameters)
	if err == nil {
		err = b.Check()
	}
	if !fault.Is(err, fault.Unavailable) && !fault.Is(err, fault.Invalid) {
		t.Errorf("what cannot work opens: %v", err)
	}
	if _, text, _ := fault.Public(err); strings.Contains(text, fmt.Sprint(parameters[secretName])) {
		t.Errorf("the secret is shown: %s", text)
	}
}
