// Package pki is a site's own certificate authority: node and server
// certificates, the tokens that let a node join, and the sealing of secrets
// with the cluster key.
//
// Invariants: a node certificate carries exactly one identity, the URI
// atoll://SITE/node/NODE; certificates are backdated, so that a fresh node with
// a slow clock accepts them; comparing a secret takes constant time.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"strings"
	"time"
)

// Lifetimes of what the authority signs, and how far each is backdated.
const (
	AuthorityLife = 30 * 365 * 24 * time.Hour
	NodeLife      = 90 * 24 * time.Hour
	ServerLife    = 90 * 24 * time.Hour
	Backdate      = 24 * time.Hour
)

// PinSize is the length in bytes of an authority's pin.
const PinSize = sha256.Size

// Authority signs the certificates of one site.
type Authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// NewKey makes the private key of a node, a server or an authority.
func NewKey() (crypto.Signer, error) {
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

// NewAuthority founds the authority of a site.
func NewAuthority(siteID string, now time.Time) (*Authority, error) {
	key, err := NewKey()
	if err != nil {
		return nil, fmt.Errorf("making the site's authority key: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "Atoll site " + siteID + " " + serial.Text(36)[:6]},
		NotBefore:             now.Add(-Backdate),
		NotAfter:              now.Add(AuthorityLife),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("signing the site's authority certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("reading back the site's authority certificate: %w", err)
	}
	return &Authority{cert: cert, key: key}, nil
}

// LoadAuthority reads what CertPEM and MarshalKey wrote.
func LoadAuthority(certPEM, keyPEM []byte) (*Authority, error) {
	cert, err := ParseCert(certPEM)
	if err != nil {
		return nil, fmt.Errorf("reading the site's authority: %w", err)
	}
	key, err := ParseKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("reading the site's authority: %w", err)
	}
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(cert.PublicKey) {
		return nil, errors.New("the site's authority key does not belong to its certificate")
	}
	return &Authority{cert: cert, key: key}, nil
}

// CertPEM is the authority's certificate.
func (a *Authority) CertPEM() []byte { return encodeCert(a.cert.Raw) }

// KeyPEM is the authority's private key; store it sealed only.
func (a *Authority) KeyPEM() ([]byte, error) { return MarshalKey(a.key) }

// Signer signs in the authority's name what is no certificate. What it signs has
// to say what it is, in words that no certificate begins with.
func (a *Authority) Signer() crypto.Signer { return a.key }

// Link certifies the key of next by this authority: by it, who trusts this one
// accepts what next signs.
func (a *Authority) Link(next *Authority) ([]byte, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               next.cert.Subject,
		NotBefore:             a.cert.NotBefore,
		NotAfter:              a.cert.NotAfter,
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              next.cert.KeyUsage,
		SubjectKeyId:          next.cert.SubjectKeyId,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, next.key.Public(), a.key)
	if err != nil {
		return nil, fmt.Errorf("signing the new authority with the old one: %w", err)
	}
	return encodeCert(der), nil
}

// Pin identifies the authority: see PinOf.
func (a *Authority) Pin() []byte { return PinOf(a.cert) }

// PinOf is the SHA-256 of a certificate's public key information. A renewed
// authority certificate with the same key keeps its pin.
func PinOf(cert *x509.Certificate) []byte {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return sum[:]
}

// PinPEM is the pin of a certificate in PEM.
func PinPEM(certPEM []byte) ([]byte, error) {
	cert, err := ParseCert(certPEM)
	if err != nil {
		return nil, err
	}
	return PinOf(cert), nil
}

// KeyHash identifies a public key: hex of the SHA-256 of its DER form.
func KeyHash(public crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", fmt.Errorf("encoding a public key: %w", err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(der)), nil
}

// NodeURI is the identity that a node's certificate carries.
func NodeURI(siteID, nodeID string) *url.URL {
	return &url.URL{Scheme: "atoll", Host: siteID, Path: "/node/" + nodeID}
}

// NodeOf reads the identity out of a node's certificate. It does not verify
// the certificate.
func NodeOf(cert *x509.Certificate) (siteID, nodeID string, err error) {
	if len(cert.URIs) != 1 {
		return "", "", fmt.Errorf("the certificate carries %d URIs, a node's has exactly one", len(cert.URIs))
	}
	u := cert.URIs[0]
	nodeID, ok := strings.CutPrefix(u.Path, "/node/")
	if u.Scheme != "atoll" || !ok || !ValidID(u.Host) || !ValidID(nodeID) || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return "", "", fmt.Errorf("the certificate's URI %q is not a node's", u)
	}
	return u.Host, nodeID, nil
}

// ValidID reports whether an id of a site or a node is well formed: 1 to 64
// lower-case letters and digits.
func ValidID(id string) bool {
	if len(id) == 0 || len(id) > 64 {
		return false
	}
	for _, c := range id {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return false
		}
	}
	return true
}

// NewCSR asks for a certificate of the key. Who it is for is decided by the
// signer, never read from the request.
func NewCSR(key crypto.Signer) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("making a certificate request: %w", err)
	}
	return der, nil
}

// ParseCSR reads a request and checks that the asker holds its private key.
func ParseCSR(der []byte) (*x509.CertificateRequest, error) {
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("reading a certificate request: %w", err)
	}
	key, ok := csr.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("reading a certificate request: the key must be ECDSA P-256")
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("checking a certificate request: %w", err)
	}
	return csr, nil
}

// IssueNode signs a node's certificate, good for both ends of a connection.
func (a *Authority) IssueNode(public crypto.PublicKey, siteID, nodeID string, now time.Time) ([]byte, error) {
	if !ValidID(siteID) || !ValidID(nodeID) {
		return nil, fmt.Errorf("issuing a node certificate: %q or %q is no id", siteID, nodeID)
	}
	return a.issue(&x509.Certificate{
		Subject:     pkix.Name{CommonName: "Atoll node " + nodeID},
		NotBefore:   now.Add(-Backdate),
		NotAfter:    now.Add(NodeLife),
		URIs:        []*url.URL{NodeURI(siteID, nodeID)},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, public)
}

// IssueServer signs a certificate for the public listener. Each name is a DNS
// name or an IP address. It carries no node identity: holding it gives no
// access between nodes.
func (a *Authority) IssueServer(public crypto.PublicKey, names []string, now time.Time) ([]byte, error) {
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "Atoll registry"},
		NotBefore:   now.Add(-Backdate),
		NotAfter:    now.Add(ServerLife),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	if len(names) == 0 {
		return nil, errors.New("issuing a server certificate: it needs at least one name or address")
	}
	return a.issue(template, public)
}

func (a *Authority) issue(template *x509.Certificate, public crypto.PublicKey) ([]byte, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	template.BasicConstraintsValid = true
	if template.NotBefore.Before(a.cert.NotBefore) {
		template.NotBefore = a.cert.NotBefore
	}
	if template.NotAfter.After(a.cert.NotAfter) {
		template.NotAfter = a.cert.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, public, a.key)
	if err != nil {
		return nil, fmt.Errorf("signing a certificate: %w", err)
	}
	return encodeCert(der), nil
}

func newSerial() (*big.Int, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("choosing a serial number: %w", err)
	}
	return serial, nil
}

// EncodeCert writes a certificate in PEM.
func EncodeCert(c *x509.Certificate) []byte { return encodeCert(c.Raw) }

func encodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// ParseCert reads the first certificate of a PEM text.
func ParseCert(text []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("no certificate in PEM form")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("reading a certificate: %w", err)
	}
	return cert, nil
}

// ParseCerts reads all certificates of a PEM text; there is at least one.
func ParseCerts(text []byte) (certs []*x509.Certificate, err error) {
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("a %s where only certificates belong", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("reading a certificate: %w", err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, errors.New("no certificate in PEM form")
	}
	return certs, nil
}

// VerifyPinned checks that a node's certificate comes from the authority with the
// pin, which is among the certificates of bundle, be it by links that are there
// too. It does not look at the clock.
func VerifyPinned(leaf *x509.Certificate, bundle, pin []byte) error {
	certs, err := ParseCerts(bundle)
	if err != nil {
		return err
	}
	roots, others, found := x509.NewCertPool(), x509.NewCertPool(), false
	for _, c := range certs {
		if c.IsCA && PinMatches(PinOf(c), pin) && c.CheckSignatureFrom(c) == nil {
			roots.AddCert(c)
			found = true
		} else {
			others.AddCert(c)
		}
	}
	if !found {
		return errNotPinned
	}
	_, err = leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: others, CurrentTime: leaf.NotBefore.Add(Backdate),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return fmt.Errorf("the certificate of a node: %w", err)
	}
	return nil
}

var errNotPinned = errors.New("the authority that the token names is not there")

// MarshalKey writes a private key as PKCS #8 in PEM.
func MarshalKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding a private key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// ParseKey reads what MarshalKey wrote.
func ParseKey(text []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, errors.New("no private key in PEM form")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("reading a private key: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a private key of type %T cannot sign", key)
	}
	return signer, nil
}

// Pool is the set of the certificates in a PEM text.
func Pool(text []byte) (*x509.CertPool, error) {
	certs, err := ParseCerts(text)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	for _, c := range certs {
		pool.AddCert(c)
	}
	return pool, nil
}
