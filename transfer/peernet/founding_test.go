package peernet_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"testing"

	"github.com/atoll-registry/atoll/transfer/peernet"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// holder is a machine that holds a token; here the token is a site's CA.
func holder(t *testing.T, token *transfertest.Site, name string) *peernet.Founding {
	cert := token.Node(t, name)
	return &peernet.Founding{Cert: cert, Verify: func(leaf *x509.Certificate) error {
		_, err := leaf.Verify(x509.VerifyOptions{Roots: token.Pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		return err
	}}
}

func TestFounding(t *testing.T) { overBoth(t, testFounding) }

func testFounding(t *testing.T) {
	token, other := transfertest.NewSite(t, "token"), transfertest.NewSite(t, "other")
	a := open(t, peernet.Config{Transport: carried(t), Founding: holder(t, token, "a")})
	member := config(t, other, "node-b")
	member.Founding = holder(t, token, "b")
	b := open(t, member) // has a site already
	stranger := open(t, peernet.Config{Transport: carried(t), Founding: holder(t, other, "c")})
	closed := open(t, config(t, token, "node-d")) // knows of no founding
	at := echo(t, a.ListenFounding())
	echo(t, b.ListenFounding())
	echo(t, b.ListenJoin())
	echo(t, stranger.ListenFounding())
	echo(t, closed.ListenJoin())

	for from, to := range map[*port]*port{a: b, b: a} {
		c, err := from.DialFounding(within(t), to.addr)
		if err != nil {
			t.Fatal(err)
		}
		says(t, c, "hello")
		c.Close()
	}
	if id := <-at; id != "" {
		t.Errorf("a machine that founds has the node id %q", id)
	}
	if _, err := a.DialFounding(within(t), stranger.addr); !errors.Is(err, peernet.ErrOtherToken) {
		t.Errorf("a machine with another token: %v", err)
	}
	if _, err := a.DialFounding(within(t), closed.addr); err == nil || errors.Is(err, peernet.ErrOtherToken) {
		t.Errorf("a node that was given no token: %v", err)
	}
	if _, err := closed.DialFounding(within(t), a.addr); !errors.Is(err, peernet.ErrNoCertificate) {
		t.Errorf("without a token: %v", err)
	}
	// The port of a machine without a site opens for nothing else.
	pin := make([]byte, 32)
	if _, err := b.DialJoin(within(t), a.addr, pin); err == nil {
		t.Error("joined a machine that has no site")
	}
	if _, err := b.Dial(within(t), a.addr, peernet.ServiceRaft); err == nil {
		t.Error("a machine without a site takes part in a consensus")
	}
	// Nobody gets in with a certificate that is not the token's, or with none.
	for name, certs := range map[string][]tls.Certificate{"none": nil, "another token's": {other.Node(t, "x")}} {
		c, err := rawTLS(t, a.addr, &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{peernet.ProtoFound}, InsecureSkipVerify: true, Certificates: certs})
		if err != nil {
			continue
		}
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Errorf("got in with %s", name)
		}
		c.Close()
	}
}
