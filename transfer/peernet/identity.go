package peernet

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Pin of a CA: SHA-256 of its certificate's SubjectPublicKeyInfo.
func Pin(ca *x509.Certificate) []byte {
	sum := sha256.Sum256(ca.RawSubjectPublicKeyInfo)
	return sum[:]
}

// Identity reads atoll://<site>/node/<node> from a certificate's one URI.
func Identity(cert *x509.Certificate) (site, node string, err error) {
	if len(cert.URIs) != 1 {
		return "", "", errors.New("peer certificate is not a node's: it does not have exactly one URI")
	}
	u := cert.URIs[0]
	node, ok := strings.CutPrefix(u.EscapedPath(), "/node/")
	plain := u.User == nil && u.Port() == "" && u.RawQuery == "" && u.Fragment == "" && u.Opaque == ""
	if !ok || u.Scheme != "atoll" || u.Host == "" || node == "" || strings.ContainsAny(node, "/%") || !plain {
		return "", "", fmt.Errorf("peer certificate is not a node's: its URI is %q", u.Redacted())
	}
	return u.Host, node, nil
}

// verify proves a node of this site; usage is what the peer uses its certificate for.
func (n *Net) verify(cs tls.ConnectionState, usage x509.ExtKeyUsage) (site, node string, err error) {
	if len(cs.PeerCertificates) == 0 {
		return "", "", errors.New("peer sent no certificate")
	}
	leaf := cs.PeerCertificates[0]
	if site, node, err = Identity(leaf); err != nil {
		return "", "", err
	}
	if site != n.cfg.SiteID {
		return "", "", fmt.Errorf("peer's certificate is of site %s, this node's site is %s: %w", site, n.cfg.SiteID, ErrOtherSite)
	}
	opts := x509.VerifyOptions{
		Roots:         n.cfg.CA(),
		Intermediates: intermediates(cs.PeerCertificates),
		CurrentTime:   n.cfg.Now(),
		KeyUsages:     []x509.ExtKeyUsage{usage},
	}
	if _, err := leaf.Verify(opts); err != nil {
		return "", "", fmt.Errorf("certificate of node %s: %w", node, err)
	}
	return site, node, nil
}

// verifyFounding proves one who holds the token of Config.Founding.
func (n *Net) verifyFounding(cs tls.ConnectionState) error {
	if len(cs.PeerCertificates) == 0 {
		return errors.New("peer sent no certificate")
	}
	if err := n.cfg.Founding.Verify(cs.PeerCertificates[0]); err != nil {
		return fmt.Errorf("%w: %w", ErrOtherToken, err)
	}
	return nil
}

// verifyPinned proves a node of the site whose CA has the pin.
func verifyPinned(cs tls.ConnectionState, pin []byte, now time.Time) (site, node string, err error) {
	if len(cs.PeerCertificates) == 0 {
		return "", "", errors.New("peer sent no certificate")
	}
	leaf := cs.PeerCertificates[0]
	roots, found := x509.NewCertPool(), false
	for _, c := range cs.PeerCertificates[1:] {
		if c.IsCA && subtle.ConstantTimeCompare(Pin(c), pin) == 1 {
			roots.AddCert(c)
			found = true
		}
	}
	if site, node, err = Identity(leaf); err != nil {
		return "", "", err
	}
	if !found {
		return "", "", fmt.Errorf("site %s does not have the CA that the token names: %w; take a token of the site that this address belongs to", site, ErrOtherSite)
	}
	// A machine that joins may have woken up in 1970. The token, not the clock, says
	// whom to trust, so a clock before the certificate's start is taken as the start.
	if now.Before(leaf.NotBefore) {
		now = leaf.NotBefore
	}
	opts := x509.VerifyOptions{
		Roots:         roots,
		Intermediates: intermediates(cs.PeerCertificates),
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if _, err := leaf.Verify(opts); err != nil {
		return "", "", fmt.Errorf("certificate of node %s: %w", node, err)
	}
	return site, node, nil
}

func intermediates(chain []*x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, c := range chain[1:] {
		if !bytes.Equal(c.RawIssuer, c.RawSubject) {
			pool.AddCert(c)
		}
	}
	return pool
}
