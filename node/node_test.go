package node

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/node/fault"
)

func TestContentSurvivesARestart(t *testing.T) {
	done := leaks(t)
	n := start(t, config(t))
	if !n.Founded || n.PasswordFile != "" || n.PeerAddr == ownHost()+":0" || !strings.HasPrefix(n.URL, "http://"+ownHost()+":") {
		t.Fatalf("started as %+v", n.Started)
	}
	p := n.push("library/app", "v1", bytes.Repeat([]byte("layer "), 1000))
	if got := p.answer.Header.Get("Atoll-Copies"); got != "1" {
		t.Errorf("a lone node says that it made %q copies", got)
	}
	n = n.again()
	if n.Founded {
		t.Error("a start on a founded directory founded it again")
	}
	n.pull(p, "v1")
	n = n.again(func(c *Config) { c.Init, c.PeerListen = true, ownHost()+":0" }) // --init is harmless, the port may change
	n.pull(p, "v1")
	n.push("library/app", "v2", []byte("another"))
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	done()
}

func TestSocketIsTheSystems(t *testing.T) {
	n := start(t, config(t))
	info, err := os.Stat(filepath.Join(n.Data, SocketName))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("the socket is %v, %v; want mode 0600", info.Mode(), err)
	}
	ask := []byte(`{"ttl_seconds":60,"uses":1}`)
	var token struct{ Token string }
	n.socket("POST", "/api/atoll/v1/tokens", ask).want(201).decode(&token)
	if !strings.HasPrefix(token.Token, "ATOLL1-") {
		t.Fatalf("token is %q", token.Token)
	}
	json := []string{"Content-Type", "application/json"}
	n.as(login{}, "POST", "/api/atoll/v1/tokens", ask, json...).want(401)
	// Nothing that a client sends makes it somebody else.
	n.as(login{}, "POST", "/api/atoll/v1/tokens", ask, append(json, "Atoll-Principal", `{"Kind":3,"Name":"system","Admin":true}`)...).want(401)
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	if exists(filepath.Join(n.Data, SocketName)) {
		t.Error("the socket is still there after the node")
	}
}

func TestFirstStartIsCompletedByTheNext(t *testing.T) {
	c := config(t)
	c.AdminPassword = ""
	// The password cannot be kept, so there must be no admin yet.
	obstacle := filepath.Join(c.Data, PasswordName, "in", "the", "way")
	if err := os.MkdirAll(obstacle, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := tryStart(t, c); err == nil || !strings.Contains(err.Error(), PasswordName) {
		t.Fatalf("a start that cannot keep the password ended with %v", err)
	}
	if err := os.RemoveAll(filepath.Join(c.Data, PasswordName)); err != nil {
		t.Fatal(err)
	}
	c.Init = false
	n := start(t, c)
	info, err := os.Stat(n.PasswordFile)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("password file %q: %v, %v", n.PasswordFile, info, err)
	}
	secret, err := os.ReadFile(n.PasswordFile)
	if err != nil {
		t.Fatal(err)
	}
	n.as(login{"admin", strings.TrimSpace(string(secret))}, "GET", "/api/v2.0/projects/library", nil).want(200)
	n.as(login{"admin", "guess"}, "GET", "/api/v2.0/projects/library", nil).want(401)
}

func TestStopsBeforeItServes(t *testing.T) {
	done := leaks(t)
	c := config(t)
	ctx, cancel := context.WithCancel(t.Context())
	c.Log = slog.New(slog.DiscardHandler)
	n, err := New(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := n.Run(ctx); err != nil {
		t.Errorf("told to stop at once, the node ended with %v", err)
	}
	done()
}

func TestRefusals(t *testing.T) {
	n := start(t, config(t))
	taken := n.public.Addr().String()
	for name, test := range map[string]struct {
		change func(*Config)
		kind   fault.Kind
		text   string
	}{
		"directory of a running node": {func(c *Config) { c.Data = n.Data }, fault.Conflict, "another node runs with the data directory"},
		"registry's port in use":      {func(c *Config) { c.Listen = taken }, fault.Conflict, "choose another address with --listen"},
		"peers' port in use":          {func(c *Config) { c.PeerListen = n.PeerAddr }, fault.Conflict, "choose another address with --peer-listen"},
		"empty directory":             {func(c *Config) { c.Init = false }, fault.Invalid, "--init founds a new site, --join ADDR --token TOKEN joins one, or make a site of a backup in it with: atoll restore FILE"},
		"found and join":              {func(c *Config) { c.Join = []string{n.PeerAddr} }, fault.Invalid, "choose one"},
		"join without a token":        {func(c *Config) { c.Init, c.Join = false, []string{n.PeerAddr} }, fault.Invalid, "atoll token create"},
		"no address":                  {func(c *Config) { c.Listen = "5000" }, fault.Invalid, "HOST:PORT"},
		"no peer address":             {func(c *Config) { c.PeerListen = "here" }, fault.Invalid, "HOST:PORT"},
		"nothing to advertise":        {func(c *Config) { c.Advertise = "here" }, fault.Invalid, "HOST:PORT"},
		"unknown TLS":                 {func(c *Config) { c.TLS = "maybe" }, fault.Invalid, "off or auto"},
		"certificate without a key":   {func(c *Config) { c.CertFile = "cert.pem" }, fault.Invalid, "go together"},
		"no certificate there":        {func(c *Config) { c.CertFile, c.KeyFile = "/none.pem", "/none.key" }, fault.Invalid, "/none.pem"},
	} {
		t.Run(name, func(t *testing.T) {
			c := config(t)
			test.change(&c)
			_, err := tryStart(t, c)
			if !fault.Is(err, test.kind) || !strings.Contains(err.Error(), test.text) {
				t.Fatalf("got %v (%v), want %v with %q", err, fault.KindOf(err), test.kind, test.text)
			}
			if c.Data != n.Data && !strings.Contains(name, "TLS") && !strings.Contains(name, "certificate") && exists(filepath.Join(c.Data, "raft")) {
				t.Error("the refused start left the beginnings of a site")
			}
		})
	}
	n.do("GET", "/api/v2.0/projects/library", nil).want(200) // nobody took anything from it
}

// TestUnknownEntryEndsTheNode: a log entry of a newer version must not be skipped.
func TestUnknownEntryEndsTheNode(t *testing.T) {
	n := start(t, config(t))
	p := n.push("library/app", "v1", []byte("kept"))
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(n.Data, "raft", "log.db")
	log, err := kv.OpenLog(name)
	if err != nil {
		t.Fatal(err)
	}
	last, err := log.LastIndex()
	if err != nil {
		t.Fatal(err)
	}
	var entry raft.Log
	if err := log.GetLog(last, &entry); err != nil {
		t.Fatal(err)
	}
	newer := raft.Log{Index: last + 1, Term: entry.Term, Type: raft.LogCommand, Data: []byte{0xfe, 1, 2, 3}}
	if err := log.StoreLog(&newer); err != nil {
		t.Fatal(err)
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}

	c := n.config
	c.Init = false
	r, err := tryStart(t, c)
	if err == nil { // it may have begun to serve before it came to the entry
		err = <-r.done
		r.cancel = nil
	}
	if err == nil || !strings.Contains(err.Error(), "halted") || !strings.Contains(err.Error(), "format") {
		t.Fatalf("a node with an entry of another format ended with %v", err)
	}
	t.Log(err)

	// What was committed before is still there for the version that knows more.
	if err := cut(name, last+1); err != nil {
		t.Fatal(err)
	}
	start(t, c).pull(p, "v1")
}

// cut takes what begins at an index out of a log.
func cut(name string, from uint64) error {
	log, err := kv.OpenLog(name)
	if err != nil {
		return err
	}
	defer log.Close()
	last, err := log.LastIndex()
	if err != nil {
		return err
	}
	return log.DeleteRange(from, last)
}

func TestSiteCertificate(t *testing.T) {
	c := config(t)
	c.TLS, c.SANs = TLSAuto, []string{"registry.example"}
	n := start(t, c)
	if !strings.HasPrefix(n.URL, "https://") {
		t.Fatalf("URL %s", n.URL)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(n.socket("GET", "/api/atoll/v1/ca", nil).want(200).Body) {
		t.Fatal("the CA certificate is none")
	}
	for _, name := range []string{"registry.example", "localhost", "127.0.0.1"} {
		n.http = &http.Client{Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: name}, ForceAttemptHTTP2: true, DisableKeepAlives: true,
		}}
		n.do("GET", "/v2/", nil).want(200)
	}
	for major, offer := range map[int]bool{2: true, 1: false} {
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: offer, DisableKeepAlives: true}}
		resp, err := client.Get(n.URL + "/v2/")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.ProtoMajor != major {
			t.Errorf("a client that offers HTTP/2 (%v) was answered in %s", offer, resp.Proto)
		}
	}
	conn, err := tls.Dial("tcp", n.public.Addr().String(), &tls.Config{RootCAs: pool, ServerName: "other.example"})
	if err == nil {
		conn.Close()
		t.Fatal("the certificate is good for any name")
	}
}

// TestRequestUnderWayFinishes: a node that is told to stop answers what it has begun.
func TestRequestUnderWayFinishes(t *testing.T) {
	done := leaks(t)
	n := start(t, config(t))
	conn, err := net.Dial("tcp", n.public.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	// A body that is still to come.
	head := "POST /v2/library/app/blobs/uploads/?digest=sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae HTTP/1.1\r\n" +
		"Host: node\r\nAuthorization: Basic YWRtaW46Q29ycmVjdDFIb3JzZQ==\r\nContent-Type: application/octet-stream\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
	if _, err := conn.Write([]byte(head)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4096)
	k, err := conn.Read(got)
	if err != nil || !strings.HasPrefix(string(got[:k]), "HTTP/1.1 100") {
		t.Fatalf("%q, %v; want to be told to go on", got[:k], err)
	}
	n.cancel() // the handler reads by now
	await(t, "the address is closed", func() string {
		c, err := net.Dial("tcp", n.public.Addr().String())
		if err == nil {
			c.Close()
			return "it is open"
		}
		return ""
	})
	if _, err := conn.Write([]byte("foo")); err != nil {
		t.Fatal(err)
	}
	k, err = conn.Read(got)
	if err != nil || !strings.HasPrefix(string(got[:k]), "HTTP/1.1 201") {
		t.Fatalf("%.200q, %v; want 201", got[:k], err)
	}
	conn.Close()
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	done()
}

// A log that is lost in part is found while the node starts: it ends as one without a log.
func TestEndOfANodeThatLostItsLog(t *testing.T) {
	if err := ended(fmt.Errorf("%w: put it back", member.ErrLogLost), "data"); !fault.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "put it back") {
		t.Error(err)
	}
}
