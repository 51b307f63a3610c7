package entry

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"

	"golang.org/x/mod/sumdb/note"
)

// ErrSignature is wrapped by every refusal of a signature: missing, wrong, or
// by a key that nobody vouches for.
var ErrSignature = errors.New("signature not accepted")

// ErrUnknownKey is wrapped, together with ErrSignature, where the signer is not
// among the keys given: nobody vouches for it, or it was revoked.
var ErrUnknownKey = errors.New("unknown key")

// Key is a public key in base64 of its X.509 SubjectPublicKeyInfo, which names
// the algorithm; between PEM's BEGIN PUBLIC KEY and END PUBLIC KEY lines it is a
// file that openssl and cosign read. This version knows Ed25519 only.
type Key string

// KeyOf gives the Key of an Ed25519 public or private key.
func KeyOf(key any) (Key, error) {
	if private, ok := key.(crypto.Signer); ok {
		key = private.Public()
	}
	public, ok := key.(ed25519.PublicKey)
	if !ok {
		return "", fmt.Errorf("key of type %T: this version signs with Ed25519 only", key)
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", fmt.Errorf("encode public key: %w", err)
	}
	return Key(base64.StdEncoding.EncodeToString(der)), nil
}

// Ed25519 gives the key in the form of the standard library.
func (k Key) Ed25519() (ed25519.PublicKey, error) {
	der, err := base64.StdEncoding.Strict().DecodeString(string(k))
	if err != nil || base64.StdEncoding.EncodeToString(der) != string(k) {
		return nil, fmt.Errorf("public key %q is not in base64: %w", string(k), ErrMalformed)
	}
	parsed, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, fmt.Errorf("public key %q: %w: %w", string(k), err, ErrMalformed)
	}
	public, ok := parsed.(ed25519.PublicKey)
	if !ok {
		return nil, fmt.Errorf("public key %q is a %T, this version knows Ed25519 only: %w", string(k), parsed, ErrMalformed)
	}
	if again, err := KeyOf(public); err != nil || again != k {
		return nil, fmt.Errorf("public key %q is in another spelling than %q: %w", string(k), string(again), ErrMalformed)
	}
	return public, nil
}

// Fingerprint is what people compare: "SHA256:" and the unpadded base64 of the
// SHA-256 of the SubjectPublicKeyInfo. "" for a malformed key.
func (k Key) Fingerprint() string {
	der, err := base64.StdEncoding.Strict().DecodeString(string(k))
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(der)
	return "SHA256:" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// PEM is the key as a file for openssl and cosign.
func (k Key) PEM() []byte {
	der, err := base64.StdEncoding.DecodeString(string(k))
	if err != nil {
		return nil
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

// Verify checks an Ed25519 signature.
func (k Key) Verify(message, signature []byte) error {
	public, err := k.Ed25519()
	if err != nil {
		return err
	}
	if !ed25519.Verify(public, message, signature) {
		return fmt.Errorf("signature of key %s does not match: %w", k.Fingerprint(), ErrSignature)
	}
	return nil
}

// Sign signs with Ed25519 over the message itself, whoever holds the key.
func Sign(key crypto.Signer, message []byte) ([]byte, error) {
	if _, err := KeyOf(key); err != nil {
		return nil, err
	}
	return key.Sign(rand.Reader, message, crypto.Hash(0))
}

// noteSigner lets any holder of a key sign notes.
type noteSigner struct {
	name string
	hash uint32
	key  crypto.Signer
}

func (s noteSigner) Name() string                    { return s.name }
func (s noteSigner) KeyHash() uint32                 { return s.hash }
func (s noteSigner) Sign(msg []byte) ([]byte, error) { return Sign(s.key, msg) }

func newNoteSigner(site string, key crypto.Signer) (note.Signer, error) {
	public, err := KeyOf(key)
	if err != nil {
		return nil, err
	}
	verifier, err := newNoteVerifier(site, public)
	if err != nil {
		return nil, err
	}
	return noteSigner{name: verifier.Name(), hash: verifier.KeyHash(), key: key}, nil
}

func newNoteVerifier(site string, key Key) (note.Verifier, error) {
	public, err := key.Ed25519()
	if err != nil {
		return nil, err
	}
	vkey, err := note.NewEd25519VerifierKey(site, public)
	if err != nil {
		return nil, err
	}
	return note.NewVerifier(vkey)
}
