package identity

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

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

// keys are those of a site's nodes; self signs.
type keys struct {
	self    string
	private ed25519.PrivateKey
	known   map[string]ed25519.PublicKey
	late    map[string]ed25519.PublicKey // become known when they are asked for twice
}

func (k *keys) join(kid string) {
	public, private, _ := ed25519.GenerateKey(nil)
	k.self, k.private = kid, private
	k.known[kid] = public
}

func (k *keys) TokenKey() (string, ed25519.PrivateKey) { return k.self, k.private }

func (k *keys) TokenPublic(kid string) (ed25519.PublicKey, error) {
	found := k.known[kid]
	if late, ok := k.late[kid]; ok && found == nil {
		k.known[kid] = late
	}
	return found, nil
}

type site struct {
	*Identity
	clock time.Time
	keys  *keys
	log   bytes.Buffer
}

func (s *site) time() time.Time { return s.clock }

// begin opens a site with an admin and three projects.
func begin(t testing.TB) *site {
	t.Helper()
	s := &site{clock: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), keys: &keys{known: map[string]ed25519.PublicKey{}}}
	s.keys.join("0123456789abcdef0")
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
		DB: db, Keys: s.keys, Log: slog.New(slog.NewTextHandler(&s.log, nil)), Registerer: prometheus.NewRegistry(),
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
