package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/atoll-registry/atoll/node"
	"github.com/atoll-registry/atoll/node/fault"
)

// clientFlags adds the flags by which a command finds its node.
func clientFlags(cmd *cobra.Command) {
	cmd.PersistentFlags().String("server", "", "URL of a node, for example https://registry.example:443; else the node on this machine is asked through its socket")
	cmd.PersistentFlags().String("data", "", "data directory of the node on this machine (default "+node.DefaultDataDir()+")")
	cmd.PersistentFlags().String("ca", "", "file with the CA certificate of the site (what atoll ca prints)")
}

// client speaks to one node.
type client struct {
	base     string // scheme and host, no trailing slash
	name     string // how messages call the node
	http     *http.Client
	username string
	password string
}

// newClient finds the node: --server, else the socket in --data or in the
// default data directory, else the server of the last atoll login.
func newClient(cmd *cobra.Command) (*client, error) {
	server, _ := cmd.Flags().GetString("server")
	data, _ := cmd.Flags().GetString("data")
	ca, _ := cmd.Flags().GetString("ca")
	saved, err := readLogins()
	if err != nil {
		return nil, err
	}
	if server == "" {
		dir := data
		if dir == "" {
			dir = node.DefaultDataDir()
		}
		socket := filepath.Join(dir, node.SocketName)
		if _, err := os.Stat(socket); err == nil {
			return socketClient(socket), nil
		} else if data != "" {
			return nil, fault.Wrap(err, fault.Unavailable, "no node runs with the data directory %s (there is no %s in it); start one with atoll serve --data %s", dir, node.SocketName, dir)
		}
		if server = saved.Last; server == "" {
			return nil, fault.New(fault.Unavailable, "no node found: none runs on this machine with its data in %s; name its directory with --data DIR, or a node elsewhere with --server URL", dir)
		}
	}
	return serverClient(server, ca, saved)
}

// socketBase is the base of requests over a socket; its host means nothing.
const socketBase = "http://atoll"

func socketClient(socket string) *client {
	return &client{base: socketBase, name: "the node at " + socket, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}}
}

func serverClient(server, ca string, saved logins) (*client, error) {
	if !strings.Contains(server, "://") {
		server = "https://" + server
	}
	server = strings.TrimRight(server, "/")
	if u, err := url.Parse(server); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, usageError{fmt.Errorf("--server %s is no URL of a node, such as https://registry.example:443", server)}
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	login := saved.Servers[server]
	pem := []byte(login.CA)
	if ca != "" {
		var err error
		if pem, err = os.ReadFile(ca); err != nil {
			return nil, err
		}
	}
	if len(pem) > 0 {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, usageError{fmt.Errorf("--ca %s holds no certificate in PEM; make it with: atoll ca > %s", ca, ca)}
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	c := &client{base: server, name: server, http: &http.Client{Transport: transport}, username: os.Getenv("ATOLL_USERNAME"), password: os.Getenv("ATOLL_PASSWORD")}
	if c.username == "" {
		c.username, c.password = login.Username, login.Password
	}
	return c, nil
}

// call sends a request with a JSON body (nil for none) and decodes the JSON
// answer into out (nil to drop it).
func (c *client) call(ctx context.Context, method, path string, body, out any) error {
	var sent *payload
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return err
		}
		sent = &payload{bytes.NewReader(data), "application/json", int64(len(data))}
	}
	answer, err := c.stream(ctx, method, path, sent)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(answer.Body, 64<<20)).Decode(out); err != nil {
		return fmt.Errorf("reading the answer of %s: %w", c.name, err)
	}
	return nil
}

// payload is the body of a request.
type payload struct {
	io.Reader
	mediaType string
	length    int64 // -1 when unknown
}

// stream sends a request, with nil for no body, and gives the answer once its
// status says success; the caller closes the answer's body.
func (c *client) stream(ctx context.Context, method, path string, body *payload) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, nil)
	if err != nil {
		return nil, usageError{fmt.Errorf("--server: %w", err)}
	}
	if body != nil {
		req.Body = io.NopCloser(body.Reader)
		req.ContentLength = body.length
		req.Header.Set("Content-Type", body.mediaType)
	}
	if c.username != "" {
		req.SetBasicAuth(c.username, c.password)
	}
	answer, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	if answer.StatusCode >= 300 {
		defer answer.Body.Close()
		return nil, c.decodeError(answer)
	}
	return answer, nil
}

func (c *client) explain(err error) error {
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.As(err, &unknown):
		return fault.Wrap(err, fault.Unavailable, "the certificate of %s is not signed by a CA that this machine knows; get the site's with atoll ca on a node and pass it with --ca FILE", c.name)
	case errors.Is(err, fs.ErrPermission):
		return fault.Wrap(err, fault.Denied, "this user may not open the socket of %s; run the command as the node's user, or use --server URL with a login", c.name)
	}
	return fault.Wrap(err, fault.Unavailable, "%s does not answer", c.name)
}

// decodeError turns an answer in Harbor's error envelope into a fault.
func (c *client) decodeError(answer *http.Response) error {
	var envelope struct {
		Errors []struct{ Code, Message string }
	}
	data, _ := io.ReadAll(io.LimitReader(answer.Body, 1<<20))
	text, code := "", ""
	if json.Unmarshal(data, &envelope) == nil && len(envelope.Errors) > 0 {
		text, code = envelope.Errors[0].Message, envelope.Errors[0].Code
	} else {
		text = fmt.Sprintf("%s answered %s", c.name, answer.Status)
	}
	return fault.New(kindOfStatus(answer.StatusCode), "%s", text).WithCode(code)
}

func kindOfStatus(status int) fault.Kind {
	switch status {
	case http.StatusBadRequest, http.StatusUnprocessableEntity:
		return fault.Invalid
	case http.StatusUnauthorized:
		return fault.Unauthenticated
	case http.StatusForbidden:
		return fault.Denied
	case http.StatusNotFound:
		return fault.NotFound
	case http.StatusConflict:
		return fault.Conflict
	case http.StatusPreconditionFailed:
		return fault.Precondition
	case http.StatusRequestEntityTooLarge, http.StatusTooManyRequests, http.StatusInsufficientStorage:
		return fault.Limit
	case http.StatusServiceUnavailable, http.StatusBadGateway, http.StatusGatewayTimeout:
		return fault.Unavailable
	}
	return fault.Internal
}
