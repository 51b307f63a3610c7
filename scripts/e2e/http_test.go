package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// wire speaks plain HTTP to a node, for what no client lets one say. It asks as
// the admin unless anonymous is set.
type wire struct {
	t         *testing.T
	node      *lab.Node
	client    *http.Client
	anonymous bool
}

// reply is an answer that was read to its end.
type reply struct {
	status int
	header http.Header
	body   []byte
	err    error // of the connection
}

// ca is the file with the site's CA certificate.
func (s *site) ca() string {
	for _, variable := range s.env {
		if file, ok := strings.CutPrefix(variable, "SSL_CERT_FILE="); ok {
			return file
		}
	}
	s.t.Fatal("the site has no CA file")
	return ""
}

// wire makes a client on the node's host.
func (s *site) wire(node *lab.Node) *wire {
	s.t.Helper()
	pem, err := os.ReadFile(s.ca())
	if err != nil {
		s.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	transport := &http.Transport{DialContext: node.Host.Dial, TLSClientConfig: &tls.Config{RootCAs: pool}}
	s.t.Cleanup(transport.CloseIdleConnections)
	return &wire{t: s.t, node: node, client: &http.Client{Transport: transport}}
}

// request makes a request to a path of the node, or to a URL of it.
func (w *wire) request(ctx context.Context, method, target string, body io.Reader) *http.Request {
	w.t.Helper()
	if strings.HasPrefix(target, "/") {
		target = "https://" + w.node.Registry() + target
	}
	r, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		w.t.Fatal(err)
	}
	if !w.anonymous {
		r.SetBasicAuth("admin", lab.Password)
	}
	return r
}

// do sends a request; the reply's error tells if the connection broke.
func (w *wire) do(r *http.Request) reply {
	resp, err := w.client.Do(r)
	if err != nil {
		return reply{err: err}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 256<<20))
	return reply{resp.StatusCode, resp.Header, body, err}
}

// ask sends a request that must get the status.
func (w *wire) ask(r *http.Request, status int) reply {
	w.t.Helper()
	a := w.do(r)
	if a.err != nil || a.status != status {
		w.t.Fatalf("%s %s: %d %s %v; want status %d", r.Method, r.URL, a.status, a.body, a.err, status)
	}
	return a
}

// get reads a path.
func (w *wire) get(ctx context.Context, path string, status int) reply {
	w.t.Helper()
	return w.ask(w.request(ctx, http.MethodGet, path, nil), status)
}

// wantError checks that an answer is the registry's error with the code, and
// that its text says what is wanted.
func (a reply) wantError(t *testing.T, status int, code string, texts ...string) {
	t.Helper()
	var body struct {
		Errors []struct{ Code, Message string }
	}
	if a.err != nil || a.status != status || json.Unmarshal(a.body, &body) != nil || len(body.Errors) != 1 || body.Errors[0].Code != code {
		t.Errorf("the answer is %d %.500s %v; want %d with the code %s", a.status, a.body, a.err, status, code)
		return
	}
	for _, text := range texts {
		if !strings.Contains(body.Errors[0].Message, text) {
			t.Errorf("the error says %q; want it to say %q", body.Errors[0].Message, text)
		}
	}
}
