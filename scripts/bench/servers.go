package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

const (
	password = "Bench-Password-1"
	service  = "harbor-registry"
)

// The repositories that the rows use.
const (
	small = "library/bench"
	large = "library/large"
)

var repositories = [...]string{small, large}

// server is one of those that are compared.
type server struct {
	*process
	*program
	target
	name     string
	registry *registry // nil for the floor
}

func (s *server) stop() { s.process.stop() }

// fleet is the servers of one run: Atoll first, the floor second, then the peer,
// when it is installed.
type fleet []*server

func (f fleet) stop() {
	for _, s := range f {
		s.stop()
	}
}

// place is where and how a fleet serves.
type place struct {
	dir   string
	tls   bool
	http2 bool
	atoll string // path of Atoll
	peer  string // path of distribution's registry; "" leaves it out
}

// launch starts all servers.
func launch(ctx context.Context, p place) (f fleet, err error) {
	defer func() {
		if err != nil {
			f.stop()
		}
	}()
	var pair certificate
	if p.tls {
		if pair, err = certify(p.dir); err != nil {
			return nil, err
		}
	}
	client := newClient(p)
	makers := []func(context.Context, place, certificate, *http.Client) (*server, error){launchAtoll, launchFloor}
	if p.peer != "" {
		makers = append(makers, launchPeer)
	}
	for _, start := range makers {
		s, err := start(ctx, p, pair, client)
		if err != nil {
			return f, err
		}
		f = append(f, s)
		if s.registry != nil {
			for _, name := range repositories {
				if err := s.registry.config(ctx, name); err != nil {
					return f, fmt.Errorf("%s: %w", s.name, err)
				}
			}
		}
	}
	return f, nil
}

func newClient(p place) *http.Client {
	t := &http.Transport{
		MaxIdleConnsPerHost: 100, DisableCompression: true, WriteBufferSize: 64 << 10, ReadBufferSize: 64 << 10,
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, // loopback, and nothing secret
		ForceAttemptHTTP2: p.http2,
	}
	if !p.http2 {
		t.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
	}
	return &http.Client{Transport: t}
}

func (p place) url(addr string) string {
	if p.tls {
		return "https://" + addr
	}
	return "http://" + addr
}

func launchAtoll(ctx context.Context, p place, pair certificate, client *http.Client) (*server, error) {
	dir := filepath.Join(p.dir, "atoll")
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	peers, err := freeAddr()
	if err != nil {
		return nil, err
	}
	prog := &program{
		path: p.atoll, env: []string{"ATOLL_ADMIN_PASSWORD=" + password}, url: p.url(addr) + "/v2/", dir: dir,
		args: []string{"serve", "--init", "--data", dir, "--listen", addr, "--peer-listen", peers, "--log-level", "warn"},
	}
	if p.tls {
		prog.args = append(prog.args, "--tls-cert", pair.cert, "--tls-key", pair.key)
	}
	run, err := prog.start(ctx, client)
	if err != nil {
		return nil, err
	}
	user := &registry{base: p.url(addr), http: client}
	return &server{run, prog, user, "atoll", user}, user.login(ctx)
}

func launchFloor(ctx context.Context, p place, pair certificate, client *http.Client) (*server, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(p.dir, "floor")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	prog := &program{path: self, args: []string{"floor", dir, addr}, url: p.url(addr), dir: dir}
	if p.tls {
		prog.args = append(prog.args, pair.cert, pair.key)
	}
	run, err := prog.start(ctx, client)
	if err != nil {
		return nil, err
	}
	return &server{run, prog, &files{p.url(addr), client}, "floor", nil}, nil
}

// launchPeer starts distribution's registry as its users run it: files, its cache
// of blob descriptors in memory, and tokens, whose key is ours.
func launchPeer(ctx context.Context, p place, pair certificate, client *http.Client) (*server, error) {
	dir := filepath.Join(p.dir, "distribution")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	token, keys, err := peerToken()
	if err != nil {
		return nil, err
	}
	keyFile, configFile := filepath.Join(p.dir, "jwks.json"), filepath.Join(p.dir, "distribution.yml")
	config := fmt.Sprintf(`version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: %s}, cache: {blobdescriptor: inmemory}, maintenance: {uploadpurging: {enabled: false}}}
http: {addr: %q, tls: {certificate: %q, key: %q}}
auth: {token: {realm: http://%s/token, service: %s, issuer: bench, jwks: %s}}
`, dir, addr, pair.cert, pair.key, addr, service, keyFile)
	err = errors.Join(os.WriteFile(keyFile, keys, 0o600), os.WriteFile(configFile, []byte(config), 0o600))
	if err != nil {
		return nil, err
	}
	prog := &program{
		path: p.peer, args: []string{"serve", configFile}, url: p.url(addr) + "/v2/", dir: dir,
		env: []string{"OTEL_TRACES_EXPORTER=none"},
	}
	run, err := prog.start(ctx, client)
	if err != nil {
		return nil, err
	}
	user := &registry{base: p.url(addr), token: token, http: client}
	return &server{run, prog, user, "distribution", user}, nil
}

// peerToken makes a token and the key set that proves it.
func peerToken() (token string, keys []byte, err error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return "", nil, err
	}
	const kid = "bench"
	keys, err = json.Marshal(map[string]any{"keys": []any{map[string]string{
		"kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA", "kid": kid, "x": base64.RawURLEncoding.EncodeToString(public),
	}}})
	if err != nil {
		return "", nil, err
	}
	var access []any
	for _, name := range repositories {
		access = append(access, map[string]any{"type": "repository", "name": name, "actions": []string{"pull", "push"}})
	}
	now := time.Now().Unix()
	t := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.MapClaims{
		"iss": "bench", "sub": "admin", "aud": service, "exp": now + 24*3600, "nbf": now - 60, "iat": now, "jti": "1", "access": access,
	})
	t.Header["kid"] = kid
	token, err = t.SignedString(private)
	return token, keys, err
}

// certificate is the files of a server's certificate and its key.
type certificate struct{ cert, key string }

// certify makes a certificate for the loopback address.
func certify(dir string) (certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return certificate{}, err
	}
	plan := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, plan, plan, &key.PublicKey, key)
	if err != nil {
		return certificate{}, err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return certificate{}, err
	}
	c := certificate{filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")}
	return c, errors.Join(
		os.WriteFile(c.cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(c.key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600))
}
