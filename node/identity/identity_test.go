package identity

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/cluster/table/tabletest"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
)

const goodPassword = "correct-horse"

type projects map[string]access.Project

func (p projects) Lookup(_ context.Context, name string) (access.Project, bool, error) {
	if name == "broken" {
		return access.Project{}, false, errors.New("disk broke")
	}
	found, ok := p[name]
	return found, ok, nil
}

// sealer binds the name and lets a test take the key away.
type sealer struct{ gone bool }

func (s *sealer) Seal(name string, plain []byte) ([]byte, error) {
	if s.gone {
		return nil, errors.New("no key")
	}
	return append([]byte(name+"|"), plain...), nil
}

func (s *sealer) Unseal(name string, sealed []byte) ([]byte, error) {
	plain, ok := bytes.CutPrefix(sealed, []byte(name+"|"))
	if !ok || s.gone {
		return nil, errors.New("no key")
	}
	return plain, nil
}

type site struct {
	*Identity
	clock  time.Time
	sealer *sealer
	log    bytes.Buffer
}

func (s *site) time() time.Time { return s.clock }

// begin opens a site with an admin and three projects.
func begin(t testing.TB) *site {
	t.Helper()
	s := &site{clock: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), sealer: &sealer{}}
	db := tabletest.Open(t)
	s.Identity = s.open(t, db)
	tabletest.Start(t, db)
	if err := s.EnsureAdmin(t.Context(), func() (string, error) { return goodPassword, nil }); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *site) open(t testing.TB, db *table.DB) *Identity {
	t.Helper()
	id, err := New(Config{
		DB: db, Sealer: s.sealer, Log: slog.New(slog.NewTextHandler(&s.log, nil)), Registerer: prometheus.NewRegistry(),
		Projects: projects{"library": {Name: "library", Public: true}, "secret": {Name: "secret"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	id.now = s.time
	return id
}

func request(name, password string) *http.Request {
	r := httptest.NewRequest("GET", "/", nil)
	if name != "" {
		r.SetBasicAuth(name, password)
	}
	return r
}

func TestEnsureAdminAsksOnce(t *testing.T) {
	s := begin(t)
	err := s.EnsureAdmin(t.Context(), func() (string, error) {
		t.Error("the password was asked for again")
		return "", nil
	})
	if err != nil {
		t.Error(err)
	}
	db := tabletest.Open(t)
	id := s.open(t, db)
	tabletest.Start(t, db)
	if err := id.SetAdminPassword(t.Context(), goodPassword); !fault.Is(err, fault.NotFound) {
		t.Errorf("set the password of nobody: %v", err)
	}
	wrong := errors.New("no such file")
	if err := id.EnsureAdmin(t.Context(), func() (string, error) { return "", wrong }); !errors.Is(err, wrong) {
		t.Errorf("password source failed: %v", err)
	}
	if err := id.EnsureAdmin(t.Context(), func() (string, error) { return "short", nil }); !fault.Is(err, fault.Invalid) {
		t.Errorf("short password: %v", err)
	}
}

func TestAuthenticate(t *testing.T) {
	s := begin(t)
	for _, test := range []struct {
		name  string
		r     *http.Request
		want  access.Principal
		wrong bool
	}{
		{"nothing", request("", ""), access.Principal{}, false},
		{"right", request("admin", goodPassword), access.Principal{Kind: access.User, Name: "admin", Admin: true}, false},
		{"right again", request("admin", goodPassword), access.Principal{Kind: access.User, Name: "admin", Admin: true}, false},
		{"wrong password", request("admin", "wrong-horse"), access.Principal{}, true},
		{"wrong name", request("nobody", goodPassword), access.Principal{}, true},
		{"case of name", request("Admin", goodPassword), access.Principal{}, true},
		{"no password", request("admin", ""), access.Principal{}, true},
		{"name of a table's key", request("admin\x00", goodPassword), access.Principal{}, true},
		{"huge password", request("admin", strings.Repeat("x", 1<<20)), access.Principal{}, true},
		{"bad base64", withHeader("Basic ???"), access.Principal{}, true},
		{"other scheme", withHeader("Digest x"), access.Principal{}, true},
		{"empty token", withHeader("Bearer "), access.Principal{}, true},
		{"no token of ours", withHeader("Bearer a.b.c"), access.Principal{}, true},
		{"huge token", withHeader("Bearer " + strings.Repeat("a", 1<<20)), access.Principal{}, true},
		{"socket", viaSocket(withHeader("Basic ???")), access.Principal{Kind: access.System, Name: "socket"}, false},
	} {
		p, err := s.Authenticate(test.r)
		if diff := cmp.Diff(test.want, p); diff != "" {
			t.Errorf("%s: %s", test.name, diff)
		}
		if (err != nil) != test.wrong || test.wrong && !fault.Is(err, fault.Unauthenticated) {
			t.Errorf("%s: %v", test.name, err)
		}
	}
	if strings.Contains(s.log.String(), "horse") {
		t.Errorf("a password is in the log: %s", &s.log)
	}
}

func withHeader(value string) *http.Request {
	r := request("", "")
	r.Header.Set("Authorization", value)
	return r
}

func viaSocket(r *http.Request) *http.Request {
	return r.WithContext(access.WithPrincipal(r.Context(), access.Principal{Kind: access.System, Name: "socket"}))
}

func TestChangedPasswordEndsTheOldOneAtOnce(t *testing.T) {
	s := begin(t)
	if _, err := s.Authenticate(request("admin", goodPassword)); err != nil {
		t.Fatal(err)
	}
	if err := s.SetAdminPassword(t.Context(), "battery-staple"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Authenticate(request("admin", goodPassword)); !fault.Is(err, fault.Unauthenticated) {
		t.Errorf("the old password still works: %v", err)
	}
	if _, err := s.Authenticate(request("admin", "battery-staple")); err != nil {
		t.Error(err)
	}
}

func TestFailedLoginsAreLimited(t *testing.T) {
	s := begin(t)
	login := func(name, password, from string) error {
		r := request(name, password)
		r.RemoteAddr = from
		_, err := s.Authenticate(r)
		return err
	}
	for i := range attemptBurst {
		if err := login("admin", "wrong-horse", "10.0.0.1:1"); !fault.Is(err, fault.Unauthenticated) {
			t.Fatalf("attempt %d: %v", i, err)
		}
	}
	err := login("admin", "wrong-horse", "10.0.0.1:2")
	if code, text, _ := fault.Public(err); !fault.Is(err, fault.Limit) || code != "TOO_MANY_REQUEST" || !strings.Contains(text, "10s") {
		t.Fatalf("after %d failures: %v", attemptBurst, err)
	}
	if err := login("admin", goodPassword, "10.0.0.1:3"); !fault.Is(err, fault.Limit) {
		t.Errorf("a right guess was let through: %v", err)
	}
	// Whoever logs in from elsewhere, or under another name, is not locked out.
	if err := login("admin", goodPassword, "10.0.0.2:1"); err != nil {
		t.Errorf("from elsewhere: %v", err)
	}
	if err := login("other", "wrong-horse", "10.0.0.1:1"); !fault.Is(err, fault.Unauthenticated) {
		t.Errorf("another name: %v", err)
	}
	s.clock = s.clock.Add(loginTTL + attemptEvery)
	if err := login("admin", goodPassword, "10.0.0.1:4"); err != nil {
		t.Errorf("after a while: %v", err)
	}
}

func TestAttemptsAreBounded(t *testing.T) {
	a := newAttempts()
	now := time.Now()
	for range attemptBurst {
		a.take("x", "victim", now)
	}
	for i := range maxAttempts * 2 {
		a.take("x", strings.Repeat("n", i%200)+time.Duration(i).String(), now)
	}
	if len(a.buckets) > maxAttempts {
		t.Errorf("%d pairs are remembered", len(a.buckets))
	}
	if a.take("x", "victim", now) == 0 {
		t.Error("trying many names freed the one that was tried often")
	}
}

func TestSource(t *testing.T) {
	for addr, want := range map[string]string{
		"10.1.2.3:4": "10.1.2.3", "[::ffff:10.1.2.3]:4": "10.1.2.3", "[2001:db8:1:2:3::4]:5": "2001:db8:1:2::/64",
		"[fe80::1%eth0]:5": "fe80::/64", "@": "@", "": "",
	} {
		if got := source(&http.Request{RemoteAddr: addr}); got != want {
			t.Errorf("%s: %s, want %s", addr, got, want)
		}
	}
}

func TestHashes(t *testing.T) {
	hash, err := newHash(goodPassword)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(hash, "$argon2id$v=19$m=19456,t=2,p=1$") {
		t.Errorf("the hash does not name its algorithm and cost: %s", hash)
	}
	if !matches(hash, goodPassword) || matches(hash, goodPassword+"x") {
		t.Error("the hash matches the wrong passwords")
	}
	for _, bad := range []string{
		"", "plain", "$argon2i$v=19$m=8,t=1,p=1$AAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAA",
		"$argon2id$v=16$m=8,t=1,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAA", strings.Replace(hash, "m=19456", "m=99999999", 1),
		strings.Replace(hash, "t=2", "t=0", 1), hash[:len(hash)-30] + "!", hash[:len(hash)-30],
	} {
		if _, err := parseHash(bad); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

// token asks the service, as a client does.
func (s *site) token(t testing.TB, r *http.Request) (int, map[string]any, http.Header) {
	t.Helper()
	w := httptest.NewRecorder()
	s.TokenService().ServeHTTP(w, r)
	var body map[string]any
	_ = json.Unmarshal(w.Body.Bytes(), &body)
	return w.Code, body, w.Result().Header
}

func tokenRequest(query, name, password string) *http.Request {
	r := httptest.NewRequest("GET", "/service/token?"+query, nil)
	if name != "" {
		r.SetBasicAuth(name, password)
	}
	return r
}

func TestTokenService(t *testing.T) {
	s := begin(t)
	const service = "service=harbor-registry"
	grant := func(repository string, actions ...string) access.Grant {
		return access.Grant{Repository: repository, Actions: append([]string{}, actions...)}
	}
	for _, test := range []struct {
		name, query string
		anonymous   bool
		want        []access.Grant
	}{
		{"login", "", false, []access.Grant{}},
		{"narrowed", "&scope=repository:secret/app:pull", false, []access.Grant{grant("secret/app", "pull")}},
		{"all", "&scope=repository:secret/app:pull,push,delete", false, []access.Grant{grant("secret/app", "pull", "push", "delete")}},
		{"star", "&scope=repository:secret/app:*", false, []access.Grant{grant("secret/app", "pull", "push", "delete")}},
		{"unknown action", "&scope=repository:secret/app:pull,fly", false, []access.Grant{grant("secret/app", "pull")}},
		{"project to come", "&scope=repository:new/app:pull,push", false, []access.Grant{grant("new/app", "pull", "push")}},
		{"two parameters", "&scope=repository:a/b:pull&scope=repository:c/d:push", false, []access.Grant{grant("a/b", "pull"), grant("c/d", "push")}},
		{"one with a space", "&scope=repository:a/b:pull%20repository:c/d:push", false, []access.Grant{grant("a/b", "pull"), grant("c/d", "push")}},
		{"no project", "&scope=repository:app:pull", false, []access.Grant{grant("library/app", "pull")}},
		{"catalog", "&scope=registry:catalog:*", false, []access.Grant{grant("*", "*")}},
		{"nonsense", "&scope=x&scope=repository:&scope=repository::pull", false, []access.Grant{}},
		{"anonymous public", "&scope=repository:library/app:pull,push", true, []access.Grant{grant("library/app", "pull")}},
		{"anonymous private", "&scope=repository:secret/app:pull", true, []access.Grant{grant("secret/app")}},
		{"anonymous unknown", "&scope=repository:new/app:pull,push", true, []access.Grant{grant("new/app")}},
		{"anonymous catalog", "&scope=registry:catalog:*", true, []access.Grant{grant("*")}},
		{"anonymous login", "", true, []access.Grant{}},
	} {
		t.Run(test.name, func(t *testing.T) {
			name := "admin"
			if test.anonymous {
				name = ""
			}
			status, body, _ := s.token(t, tokenRequest(service+test.query, name, goodPassword))
			if status != 200 {
				t.Fatalf("status %d: %v", status, body)
			}
			if body["expires_in"] != 1800.0 || body["issued_at"] != "2026-01-02T03:04:05Z" || body["token"] != body["access_token"] {
				t.Errorf("answer %v", body)
			}
			p, err := s.Authenticate(withHeader("Bearer " + body["token"].(string)))
			if err != nil {
				t.Fatal(err)
			}
			want := access.Principal{Kind: access.User, Name: "admin", Admin: true, Grants: test.want}
			if test.anonymous {
				want = access.Principal{Grants: test.want}
			}
			if diff := cmp.Diff(want, p); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestTokenServiceRefuses(t *testing.T) {
	s := begin(t)
	const good = "service=harbor-registry&scope=repository:library/app:pull"
	post := tokenRequest(good, "admin", goodPassword)
	post.Method = "POST"
	if status, _, header := s.token(t, post); status != 405 || header.Get("Allow") != "GET" {
		t.Errorf("POST: %d", status)
	}
	for _, query := range []string{"", "service=other", "service="} {
		if status, _, _ := s.token(t, tokenRequest(query, "", "")); status != 400 {
			t.Errorf("%q: %d", query, status)
		}
	}
	status, body, header := s.token(t, tokenRequest(good, "admin", "wrong-horse"))
	if status != 401 || header.Get("WWW-Authenticate") != `Basic realm="harbor"` || header.Get("X-Request-Id") == "" {
		t.Errorf("wrong password: %d %v %v", status, body, header)
	}
	if errs, _ := body["errors"].([]any); len(errs) != 1 {
		t.Errorf("wrong password: %v", body)
	}
	if status, body, _ := s.token(t, tokenRequest(good+strings.Repeat("&scope=repository:a/b:pull", 70), "", "")); status != 400 {
		t.Errorf("many scopes: %d %v", status, body)
	}
	if status, body, _ := s.token(t, tokenRequest("service=harbor-registry&scope=repository:broken/app:pull", "", "")); status != 500 ||
		strings.Contains(body["errors"].([]any)[0].(map[string]any)["message"].(string), "disk") {
		t.Errorf("lookup failed: %d %v", status, body)
	}
	_, body, _ = s.token(t, tokenRequest(good, "admin", goodPassword))
	r := tokenRequest(good, "", "")
	r.Header.Set("Authorization", "Bearer "+body["token"].(string))
	if status, _, _ := s.token(t, r); status != 401 {
		t.Errorf("a token gave another token: %d", status)
	}
}

// A node without the cluster's key says so, and still verifies.
func TestWithoutTheClusterKey(t *testing.T) {
	s := begin(t)
	_, body, _ := s.token(t, tokenRequest("service=harbor-registry", "admin", goodPassword))
	s.sealer.gone = true
	s.signers.opened = signer{}
	if status, body, header := s.token(t, tokenRequest("service=harbor-registry", "admin", goodPassword)); status != 503 || header.Get("Retry-After") == "" {
		t.Errorf("issue: %d %v", status, body)
	}
	if _, err := s.Verify(t.Context(), body["token"].(string)); err != nil {
		t.Errorf("verify: %v", err)
	}
}

func TestTokensOverTheSocket(t *testing.T) {
	s := begin(t)
	status, body, _ := s.token(t, viaSocket(tokenRequest("service=harbor-registry&scope=repository:new/app:push", "", "")))
	if status != 200 {
		t.Fatalf("%d %v", status, body)
	}
	p, err := s.Verify(t.Context(), body["token"].(string))
	want := access.Principal{Kind: access.System, Name: "socket", Grants: []access.Grant{{Repository: "new/app", Actions: []string{"push"}}}}
	if diff := cmp.Diff(want, p); diff != "" || err != nil {
		t.Error(err, diff)
	}
	if access.InSystem(p, access.NodeManage) || access.InProject(p, access.ProjectDelete, access.Project{}) {
		t.Error("a token gave more than its scope")
	}
}

func TestVerifyRefuses(t *testing.T) {
	s := begin(t)
	key, err := s.signer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	good := func() *claims {
		return &claims{
			Issuer: tokenIssuer, Subject: "admin", Audience: Service, Kind: kindUser,
			Expires: jwt.NewNumericDate(s.clock.Add(tokenLife)), NotBefore: jwt.NewNumericDate(s.clock),
		}
	}
	sign := func(method jwt.SigningMethod, secret any, kid any, change func(*claims)) string {
		c := good()
		change(c)
		token := jwt.NewWithClaims(method, c)
		token.Header["kid"] = kid
		signed, err := token.SignedString(secret)
		if err != nil {
			t.Fatal(err)
		}
		return signed
	}
	keep := func(*claims) {}
	if _, err := s.Verify(t.Context(), sign(jwt.SigningMethodEdDSA, key.key, key.id, keep)); err != nil {
		t.Fatalf("the good one: %v", err)
	}
	_, foreign, _ := ed25519.GenerateKey(nil)
	public := key.key.Public().(ed25519.PublicKey)
	eddsa := jwt.SigningMethodEdDSA
	for name, token := range map[string]string{
		"foreign key":        sign(eddsa, foreign, key.id, keep),
		"unknown key id":     sign(eddsa, key.key, "0123456789abcdef", keep),
		"no key id":          sign(eddsa, key.key, 7, keep),
		"path as key id":     sign(eddsa, key.key, "../../../../etc/x", keep),
		"unsigned":           sign(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, key.id, keep),
		"public key as HMAC": sign(jwt.SigningMethodHS256, []byte(public), key.id, keep),
		"expired":            sign(eddsa, key.key, key.id, func(c *claims) { c.Expires = jwt.NewNumericDate(s.clock.Add(-tokenSkew - time.Second)) }),
		"never expires":      sign(eddsa, key.key, key.id, func(c *claims) { c.Expires = nil }),
		"not yet":            sign(eddsa, key.key, key.id, func(c *claims) { c.NotBefore = jwt.NewNumericDate(s.clock.Add(tokenSkew + time.Minute)) }),
		"other audience":     sign(eddsa, key.key, key.id, func(c *claims) { c.Audience = "other" }),
		"other issuer":       sign(eddsa, key.key, key.id, func(c *claims) { c.Issuer = "other" }),
		"user gone":          sign(eddsa, key.key, key.id, func(c *claims) { c.Subject = "gone" }),
		"kind to come":       sign(eddsa, key.key, key.id, func(c *claims) { c.Kind = "robot" }),
		"empty":              "",
	} {
		if p, err := s.Verify(t.Context(), token); !fault.Is(err, fault.Unauthenticated) {
			t.Errorf("%s: %v, %v", name, p, err)
		}
	}
}

func TestVerifyHeedsTheClock(t *testing.T) {
	s := begin(t)
	issued, err := s.issue(t.Context(), access.Principal{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	made := s.clock
	for _, test := range []struct {
		after time.Duration
		good  bool
	}{
		{-tokenSkew, true}, // another node's clock is late
		{0, true},
		{tokenLife + tokenSkew - time.Second, true}, // another node's clock is early
		{tokenLife + tokenSkew, false},              // though it was verified a second ago
		{tokenLife + 2*tokenSkew, false},
	} {
		s.clock = made.Add(test.after)
		if _, err := s.Verify(t.Context(), issued.token); (err == nil) != test.good {
			t.Errorf("after %s: %v", test.after, err)
		}
	}
}

func TestKeysRotate(t *testing.T) {
	s := begin(t)
	ask := func() string {
		t.Helper()
		issued, err := s.issue(t.Context(), access.Principal{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return issued.token
	}
	first := ask()
	oldest, _ := s.signer(t.Context())
	if err := s.RotateTokenKey(t.Context()); err != nil {
		t.Fatal(err)
	}
	second := ask()
	if now, _ := s.signer(t.Context()); now.id == oldest.id {
		t.Error("the key is the same after rotation")
	}
	for _, token := range []string{first, second} {
		if _, err := s.Verify(t.Context(), token); err != nil {
			t.Error(err)
		}
	}
	s.clock = s.clock.Add(tokenLife + tokenSkew + time.Minute)
	for range 2 {
		if err := s.RotateTokenKey(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if key, err := s.lookupPublic(oldest.id); key != nil || err != nil {
		t.Errorf("the oldest key is still there: %v", err)
	}
}

// Two nodes that find no key at the same time agree on one.
func TestFirstKeyIsMadeOnce(t *testing.T) {
	s := begin(t)
	for range 2 {
		if err := s.newKey(t.Context(), false); err != nil {
			t.Fatal(err)
		}
	}
	n := 0
	err := s.config.DB.View(func(v *table.View) (err error) { n, err = s.keys.Count(v); return err })
	if n != 1 || err != nil {
		t.Errorf("%d keys, %v", n, err)
	}
}

func TestChallenge(t *testing.T) {
	s := begin(t)
	s.config.ExternalURL = "https://registry.example"
	_, body, _ := s.token(t, tokenRequest("service=harbor-registry", "admin", goodPassword))
	token, _ := body["token"].(string)
	const plain = `Bearer realm="http://10.0.0.1:5000/service/token",service="harbor-registry"`
	for _, test := range []struct {
		name, host, authorization string
		tls                       bool
		scopes                    []string
		want                      string
	}{
		{"plain", "10.0.0.1:5000", "", false, nil, plain},
		{"scopes", "10.0.0.1:5000", "", false, []string{"repository:a/b:pull", "repository:c/d:push"}, plain + `,scope="repository:a/b:pull repository:c/d:push"`},
		{"TLS", "10.0.0.1:5000", "", true, nil, strings.Replace(plain, "http:", "https:", 1)},
		{"behind a proxy", "registry.example", "", false, nil, `Bearer realm="https://registry.example/service/token",service="harbor-registry"`},
		{"hostile host", `x",y="`, "", false, nil, `Bearer realm="http://x,y=/service/token",service="harbor-registry"`},
		{"wrong password", "10.0.0.1:5000", "Basic eDp5", false, []string{"repository:a/b:pull"}, `Basic realm="harbor"`},
		{"bad token", "10.0.0.1:5000", "Bearer x", false, nil, plain + `,error="invalid_token"`},
		{"narrow token", "10.0.0.1:5000", "Bearer " + token, false, nil, plain + `,error="insufficient_scope"`},
	} {
		r := httptest.NewRequest("GET", "/v2/", nil)
		r.Host = test.host
		r.Header.Set("Authorization", test.authorization)
		if test.tls {
			r.TLS = &tls.ConnectionState{}
		}
		w := httptest.NewRecorder()
		s.Challenge(w, r, test.scopes...)
		if got := w.Header().Get("WWW-Authenticate"); got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
	}
}

func TestCacheIsBounded(t *testing.T) {
	c := newCache[int]([32]byte{}, 3)
	now := time.Now()
	for i := range 10 {
		c.put(c.key(time.Duration(i).String()), i, now.Add(time.Minute))
	}
	if len(c.entries) != 3 {
		t.Errorf("%d entries", len(c.entries))
	}
	c.put(c.key("x"), 1, now.Add(time.Minute))
	if _, ok := c.get(c.key("x"), now.Add(time.Minute)); ok {
		t.Error("an entry outlived its time")
	}
	if c.key("ab", "c") == c.key("a", "bc") {
		t.Error("the key does not separate its parts")
	}
}

func FuzzVerify(f *testing.F) {
	s := begin(f)
	issued, err := s.issue(f.Context(), access.Principal{}, []scope{{"repository", "library/app", []string{"pull"}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(issued.token)
	f.Add("a.b.c")
	f.Add("")
	f.Fuzz(func(t *testing.T, token string) {
		p, err := s.Verify(context.WithoutCancel(t.Context()), token)
		switch {
		case err == nil && token != issued.token:
			t.Fatalf("%q was believed: %v", token, p)
		case err != nil && !fault.Is(err, fault.Unauthenticated):
			t.Fatalf("%q: %v", token, err)
		}
	})
}

func FuzzParseScopes(f *testing.F) {
	for _, s := range []string{"repository:a/b:pull,push", "repository(plugin):host:5000/a/b:*", "registry:catalog:*", "a:b:c d:e:f", ":::"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, param string) {
		found, _ := parseScopes([]string{param})
		for _, s := range found {
			if s.Type == "" || s.Name == "" || s.Actions == nil || len(s.Actions) > maxActions || strings.ContainsAny(s.Name, " \"\\\x00") {
				t.Fatalf("%q: %+v", param, s)
			}
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	s := begin(b)
	issued, err := s.issue(b.Context(), access.Principal{Kind: access.User, Name: "admin"}, []scope{{"repository", "library/app", []string{"pull"}}})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := s.Verify(b.Context(), issued.token); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLogin(b *testing.B) {
	s := begin(b)
	r := request("admin", goodPassword)
	for b.Loop() {
		if _, err := s.Authenticate(r); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkHash(b *testing.B) {
	hash, _ := newHash(goodPassword)
	for b.Loop() {
		matches(hash, goodPassword)
	}
}
