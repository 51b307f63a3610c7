// Package transfertest is what every Mover has to withstand: a conformance suite
// that runs an engine against honest and hostile peers over the real peer port, and
// the parts that it is made of (a site's certificates, a store in memory that
// survives its node, sources that lie).
//
// Nothing here sleeps: what must happen first is waited for, by gates and hooks.
package transfertest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"testing"
	"time"
)

// Site is a certificate authority for tests.
type Site struct {
	ID   string
	CA   *x509.Certificate
	Pool *x509.CertPool
	key  *ecdsa.PrivateKey
}

// NewSite makes a site with a CA of its own.
func NewSite(t testing.TB, id string) *Site {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "site " + id},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	s := &Site{ID: id, key: key, Pool: x509.NewCertPool()}
	s.CA = s.sign(t, template, template, key)
	s.Pool.AddCert(s.CA)
	return s
}

// Node makes a certificate for a node of the site, with the CA last in its chain.
// The changes are made to the template before it is signed.
func (s *Site) Node(t testing.TB, id string, changes ...func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: id},
		URIs:         []*url.URL{{Scheme: "atoll", Host: s.ID, Path: "/node/" + id}},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	for _, change := range changes {
		change(template)
	}
	leaf := s.sign(t, template, s.CA, key)
	return tls.Certificate{Certificate: [][]byte{leaf.Raw, s.CA.Raw}, PrivateKey: key, Leaf: leaf}
}

func (s *Site) sign(t testing.TB, template, parent *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), s.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
