package pki

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

func TestSiteToken(t *testing.T) {
	token, err := NewSiteToken()
	if err != nil {
		t.Fatal(err)
	}
	read, err := ParseToken(token.String())
	if err != nil || !strings.HasPrefix(token.String(), "ATOLL1-site-") {
		t.Fatalf("%s: %v", token, err)
	}
	a, err := NewPairing(token)
	if err != nil {
		t.Fatal(err)
	}
	b, err := NewPairing(read)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := a.Certificate()
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Verify(cert.Leaf); err != nil {
		t.Errorf("two who hold the token: %v", err)
	}
	for _, secret := range [][]byte{token.Secret, a.signer.Seed()} {
		if bytes.Contains(cert.Certificate[0], secret) {
			t.Error("the certificate tells the secret")
		}
	}

	other, err := NewSiteToken()
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewPairing(other)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Verify(cert.Leaf); err == nil {
		t.Error("who holds another token takes the certificate")
	}
	forged := *cert.Leaf
	forged.RawTBSCertificate = append([]byte{0}, forged.RawTBSCertificate...)
	if err := a.Verify(&forged); err == nil {
		t.Error("a changed certificate is taken")
	}

	// Same machine and site, same grant; else another.
	grant := func(p *Pairing, site, machine string) string {
		g, err := p.Grant(site, machine, make([]byte, PinSize))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseToken(g.String()); err != nil || g.Kind != KindJoin {
			t.Errorf("%s: %v", g, err)
		}
		return g.String()
	}
	one := grant(a, "s", "m")
	if grant(b, "s", "m") != one {
		t.Error("two grants of one machine differ")
	}
	for _, g := range []string{grant(c, "s", "m"), grant(a, "s", "n"), grant(a, "r", "m")} {
		if g == one {
			t.Error("two machines, sites or tokens have one grant")
		}
	}

	mixed := token
	mixed.Secret = other.Secret
	join := token
	join.Kind = KindJoin
	for _, bad := range []Token{mixed, join} {
		if _, err := NewPairing(bad); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", bad.Kind, err)
		}
	}
}
