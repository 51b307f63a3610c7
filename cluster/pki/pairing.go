package pki

import (
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"time"
)

// KindSite is a token by which machines found a site together, before there is an
// authority.
const KindSite = "site"

// NewSiteToken makes a token of KindSite. Its pin is that of a key which is derived
// from its secret, so that everybody who holds the token knows the key, and a
// token that was copied badly is told from a good one.
func NewSiteToken() (Token, error) {
	t, err := NewToken(KindSite, make([]byte, PinSize))
	if err != nil {
		return Token{}, err
	}
	p, err := derivePairing(t)
	if err != nil {
		return Token{}, err
	}
	t.Pin, err = p.pin()
	return t, err
}

// Pairing proves to others, and has them prove, that they hold one token of
// KindSite, without telling it: certificates of both ends are signed by a key that
// only the secret gives.
type Pairing struct {
	token  Token
	signer ed25519.PrivateKey
}

// NewPairing derives the key; ErrMalformed when the token is of another kind or
// damaged.
func NewPairing(t Token) (*Pairing, error) {
	if t.Kind != KindSite {
		return nil, fmt.Errorf("%w: it is one for %q, not for founding a site; make one with: atoll token create --bootstrap", ErrMalformed, t.Kind)
	}
	p, err := derivePairing(t)
	if err != nil {
		return nil, err
	}
	pin, err := p.pin()
	if err != nil {
		return nil, err
	}
	if !PinMatches(pin, t.Pin) {
		return nil, fmt.Errorf("%w: its parts do not belong together; was all of it copied?", ErrMalformed)
	}
	return p, nil
}

func derivePairing(t Token) (*Pairing, error) {
	p := &Pairing{token: t}
	seed, err := p.derive("founding certificates", ed25519.SeedSize)
	if err != nil {
		return nil, err
	}
	p.signer = ed25519.NewKeyFromSeed(seed)
	return p, nil
}

func (p *Pairing) derive(what string, size int) ([]byte, error) {
	return hkdf.Key(sha256.New, p.token.Secret, []byte(p.token.ID), "atoll site token: "+what, size)
}

func (p *Pairing) pin() ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(p.signer.Public())
	if err != nil {
		return nil, fmt.Errorf("encoding a public key: %w", err)
	}
	sum := sha256.Sum256(der)
	return sum[:], nil
}

// ID names the token without telling it.
func (p *Pairing) ID() string { return p.token.ID }

// Certificate makes a certificate with a key of its own. It is good for as long as
// the token is held, whatever the clocks say: machines that were never set up have
// none that could be trusted.
func (p *Pairing) Certificate() (tls.Certificate, error) {
	key, err := NewKey()
	if err != nil {
		return tls.Certificate{}, err
	}
	serial, err := newSerial()
	if err != nil {
		return tls.Certificate{}, err
	}
	issuer := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Atoll site token " + p.token.ID}}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "Atoll founding"},
		NotBefore:    time.Date(1970, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, issuer, key.Public(), p.signer)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("signing a certificate of the site token: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, err
}

// Verify says whether a certificate was made by a holder of the token. That its
// key is held by who shows it is the handshake's to prove.
func (p *Pairing) Verify(leaf *x509.Certificate) error {
	public, _ := p.signer.Public().(ed25519.PublicKey)
	if leaf.SignatureAlgorithm != x509.PureEd25519 || leaf.IsCA || !ed25519.Verify(public, leaf.RawTBSCertificate, leaf.Signature) {
		return errors.New("its certificate was not made with this token")
	}
	return nil
}

// Grant is the join token of one machine at one site, for the authority with the
// pin: the same whoever of the site makes it, and however often.
func (p *Pairing) Grant(site, machine string, pin []byte) (Token, error) {
	b, err := p.derive("grant of site "+site+" for "+machine, tokenIDSize+tokenSecretSize)
	if err != nil {
		return Token{}, err
	}
	return Token{Kind: KindJoin, Pin: pin, ID: encode32(b[:tokenIDSize]), Secret: b[tokenIDSize:]}, nil
}
