package pki

import (
	"bytes"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"
)

const site, node = "5af3", "9c01"

func authority(t *testing.T, now time.Time) *Authority {
	t.Helper()
	a, err := NewAuthority(site, now)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestNodeCertificate(t *testing.T) {
	now := time.Now()
	a := authority(t, now)
	keyPEM, err := a.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	a, err = LoadAuthority(a.CertPEM(), keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csrDER, err := NewCSR(key)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := ParseCSR(csrDER)
	if err != nil {
		t.Fatal(err)
	}
	text, err := a.IssueNode(csr.PublicKey, site, node, now)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ParseCert(text)
	if err != nil {
		t.Fatal(err)
	}
	gotSite, gotNode, err := NodeOf(cert)
	if err != nil || gotSite != site || gotNode != node {
		t.Fatalf("NodeOf gave %q, %q, %v", gotSite, gotNode, err)
	}
	pool, err := Pool(a.CertPEM())
	if err != nil {
		t.Fatal(err)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
			t.Errorf("verifying for usage %v: %v", usage, err)
		}
	}
	slow := now.Add(-Backdate / 2) // the clock of a fresh node
	if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: slow}); err != nil {
		t.Errorf("a clock half a day slow does not accept a fresh certificate: %v", err)
	}
	other, err := Pool(authority(t, now).CertPEM())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cert.Verify(x509.VerifyOptions{Roots: other}); err == nil {
		t.Error("another site's authority verifies our node")
	}
}

func TestServerCertificate(t *testing.T) {
	now := time.Now()
	a := authority(t, now)
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	text, err := a.IssueServer(key.Public(), []string{"registry.lan", "192.0.2.7", "2001:db8::7"}, now)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ParseCert(text)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"registry.lan", "192.0.2.7", "2001:db8::7"} {
		if err := cert.VerifyHostname(name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := NodeOf(cert); err == nil {
		t.Error("a server certificate passes as a node's")
	}
	if _, err := a.IssueServer(key.Public(), nil, now); err == nil {
		t.Error("issued a server certificate for no name")
	}
}

func TestLoadAuthorityRefusesAnotherKey(t *testing.T) {
	a, b := authority(t, time.Now()), authority(t, time.Now())
	keyPEM, err := b.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := LoadAuthority(a.CertPEM(), keyPEM); err == nil {
		t.Error("took a key that does not belong to the certificate")
	}
}

func TestToken(t *testing.T) {
	pin := authority(t, time.Now()).Pin()
	token, err := NewToken(KindJoin, pin)
	if err != nil {
		t.Fatal(err)
	}
	text := token.String()
	for _, spelled := range []string{text, " " + text + "\n", strings.ToUpper(text)} {
		got, err := ParseToken(spelled)
		if err != nil {
			t.Fatalf("%q: %v", spelled, err)
		}
		if got.String() != text || !PinMatches(got.Pin, pin) {
			t.Errorf("%q came back as %q", spelled, got)
		}
		if !SecretMatches(HashSecret(token.Secret), got.Secret) {
			t.Error("the secret does not match its own hash")
		}
	}
	other, err := NewToken(KindJoin, pin)
	if err != nil {
		t.Fatal(err)
	}
	if SecretMatches(HashSecret(token.Secret), other.Secret) {
		t.Error("another secret matches")
	}
	parts := strings.Split(text, "-")
	with := func(i int, s string) string {
		p := append([]string(nil), parts...)
		p[i] = s
		return strings.Join(p, "-")
	}
	for name, bad := range map[string]string{
		"empty": "", "blank": " \n", "prefix only": "ATOLL1-", "other version": with(0, "ATOLL2"),
		"kind": with(1, "j0in"), "short pin": with(2, parts[2][:20]), "id": with(3, "../../x"),
		"truncated": text[:len(text)-1], "longer": text + "a", "six parts": text + "-a",
		"huge": strings.Repeat("A", 1<<20), "stray bits": text[:len(text)-1] + "b",
	} {
		if _, err := ParseToken(bad); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v, want ErrMalformed", name, err)
		} else if strings.Contains(err.Error(), parts[4]) {
			t.Errorf("%s: the error repeats the secret", name)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	token, err := NewToken(KindJoin, bytes.Repeat([]byte{7}, PinSize))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(token.String())
	f.Add("ATOLL1-join-a-b-c")
	f.Fuzz(func(t *testing.T, text string) {
		got, err := ParseToken(text)
		if err != nil {
			return
		}
		again, err := ParseToken(got.String())
		if err != nil || again.String() != got.String() {
			t.Errorf("%q parses but does not come back: %v", text, err)
		}
	})
}

func TestSeal(t *testing.T) {
	key, err := NewClusterKey()
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := Seal(key, "ca", []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(sealed, []byte("secret")) {
		t.Fatal("the sealed text shows the secret")
	}
	if plain, err := Open(key, "ca", sealed); err != nil || string(plain) != "secret" {
		t.Fatalf("opened as %q, %v", plain, err)
	}
	if _, err := Open(key, "token", sealed); err == nil {
		t.Error("opens under another name")
	}
	other, err := NewClusterKey()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(other, "ca", sealed); err == nil {
		t.Error("opens with another key")
	}
	for i := range sealed {
		bad := bytes.Clone(sealed)
		bad[i] ^= 1
		if _, err := Open(key, "ca", bad); err == nil {
			t.Errorf("opens with byte %d changed", i)
		}
		if _, err := Open(key, "ca", sealed[:i]); err == nil {
			t.Errorf("opens cut to %d bytes", i)
		}
	}
}
