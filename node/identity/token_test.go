package identity

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/google/go-cmp/cmp"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
)

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

// A node's tokens end with it, also those that were verified a moment ago, and no
// others do.
func TestTokensEndWithTheirNode(t *testing.T) {
	s := begin(t)
	ask := func() string {
		t.Helper()
		issued, err := s.issue(access.Principal{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Verify(t.Context(), issued.token); err != nil {
			t.Fatal(err)
		}
		return issued.token
	}
	first, gone := ask(), s.keys.self
	s.keys.join("second")
	second := ask()
	delete(s.keys.known, gone)
	for range 2 {
		if _, err := s.Verify(t.Context(), first); !fault.Is(err, fault.Unauthenticated) {
			t.Errorf("a token of a node that was removed: %v", err)
		}
	}
	if _, err := s.Verify(t.Context(), second); err != nil {
		t.Errorf("a token of a node that was not: %v", err)
	}
}

// A token of a node that joined a moment ago is good as soon as this one knows it.
func TestTokenOfANewNode(t *testing.T) {
	s := begin(t)
	s.keys.join("second")
	issued, err := s.issue(access.Principal{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	key := s.keys.known["second"]
	delete(s.keys.known, "second")
	if _, err := s.Verify(t.Context(), issued.token); !fault.Is(err, fault.Unauthenticated) {
		t.Errorf("before: %v", err)
	}
	s.keys.late = map[string]ed25519.PublicKey{"second": key}
	if _, err := s.Verify(t.Context(), issued.token); err != nil {
		t.Errorf("known behind a read index: %v", err)
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
	kid, private := s.keys.TokenKey()
	key := struct {
		id  string
		key ed25519.PrivateKey
	}{kid, private}
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
	issued, err := s.issue(access.Principal{}, nil)
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

func FuzzVerify(f *testing.F) {
	s := begin(f)
	issued, err := s.issue(access.Principal{}, []scope{{"repository", "library/app", []string{"pull"}}})
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
	for _, s := range []string{"repository:a/b:pull,push", "repository(plugin):host:5000/a/b:*", "registry:catalog:*", "a:b:c d:e:f", ":::", "(:0:"} {
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
	issued, err := s.issue(access.Principal{Kind: access.User, Name: "admin"}, []scope{{"repository", "library/app", []string{"pull"}}})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := s.Verify(b.Context(), issued.token); err != nil {
			b.Fatal(err)
		}
	}
}
