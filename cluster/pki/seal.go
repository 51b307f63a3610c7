package pki

import (
	"crypto/rand"
	"errors"
	"fmt"

	"golang.org/x/crypto/chacha20poly1305"
)

// ClusterKeySize is the length in bytes of the key that seals a site's secrets.
const ClusterKeySize = chacha20poly1305.KeySize

// sealVersion names the algorithm: XChaCha20-Poly1305, random nonce in front,
// the secret's name as additional data.
const sealVersion = 1

// NewClusterKey makes the key that seals a site's secrets.
func NewClusterKey() ([]byte, error) {
	key := make([]byte, ClusterKeySize)
	if _, err := rand.Read(key); err != nil {
		return nil, fmt.Errorf("making the cluster key: %w", err)
	}
	return key, nil
}

// Seal encrypts a secret for storage. The name is bound to it, so that a
// sealed value moved to another row does not open there.
func Seal(key []byte, name string, plain []byte) ([]byte, error) {
	aead, err := chacha20poly1305.NewX(key)
	if err != nil {
		return nil, fmt.Errorf("sealing %s: %w", name, err)
	}
	out := make([]byte, 1+aead.NonceSize(), 1+aead.NonceSize()+len(plain)+aead.Overhead())
	out[0] = sealVersion
	if _, err := rand.Read(out[1:]); err != nil {
		return nil, fmt.Errorf("sealing %s: %w", name, err)
	}
	return aead.Seal(out, out[1:], plain, sealContext(name)), nil
}

// Open decrypts what Seal made under the same key and name.
func Open(key []byte, name string, sealed []byte) ([]byte, error) {
	aead, err := chacha20poly1305.NewX(key)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", name, err)
	}
	if len(sealed) < 1+aead.NonceSize()+aead.Overhead() {
		return nil, fmt.Errorf("opening %s: it is too short for a sealed secret", name)
	}
	if sealed[0] != sealVersion {
		return nil, fmt.Errorf("opening %s: it was sealed by a newer version of Atoll (format %d)", name, sealed[0])
	}
	nonce, body := sealed[1:1+aead.NonceSize()], sealed[1+aead.NonceSize():]
	plain, err := aead.Open(nil, nonce, body, sealContext(name))
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", name, errNotOpened)
	}
	return plain, nil
}

var errNotOpened = errors.New("it was sealed with another key or for another name, or is damaged")

func sealContext(name string) []byte { return []byte("atoll seal 1\x00" + name) }
