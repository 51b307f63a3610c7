package pki

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"errors"
	"fmt"
	"strings"
)

// Kinds of token.
const KindJoin = "join" // lets a new node join the site

const (
	tokenVersion    = "ATOLL1"
	tokenIDSize     = 10
	tokenSecretSize = 32
	maxTokenText    = 256
)

// ErrMalformed is the cause of every refusal of ParseToken.
var ErrMalformed = errors.New("not a token")

// Token is what an operator carries from `atoll token create` to a new node:
//
//	ATOLL1-<kind>-<CA pin>-<id>-<secret>
//
// The pin names the authority that the new node must see before it says
// anything; the secret is stored by the site as a hash only.
type Token struct {
	Kind   string
	Pin    []byte // PinSize bytes
	ID     string // lower-case base32 of 10 random bytes
	Secret []byte // 32 random bytes
}

// NewToken makes a token for the authority with the pin.
func NewToken(kind string, pin []byte) (Token, error) {
	if !validKind(kind) || len(pin) != PinSize {
		return Token{}, fmt.Errorf("making a token: kind %q or a pin of %d bytes is not valid", kind, len(pin))
	}
	random := make([]byte, tokenIDSize+tokenSecretSize)
	if _, err := rand.Read(random); err != nil {
		return Token{}, fmt.Errorf("making a token: %w", err)
	}
	return Token{Kind: kind, Pin: pin, ID: encode32(random[:tokenIDSize]), Secret: random[tokenIDSize:]}, nil
}

// String is the text that ParseToken reads. It holds the secret: print it to
// its owner only.
func (t Token) String() string {
	return strings.Join([]string{tokenVersion, t.Kind, encode32(t.Pin), t.ID, encode32(t.Secret)}, "-")
}

// ParseToken reads a token as a person may have pasted it: blanks around it
// are ignored, and so is its case. Each failure wraps ErrMalformed and says
// what is wrong without repeating the secret.
func ParseToken(text string) (Token, error) {
	text = strings.TrimSpace(text)
	if text == "" {
		return Token{}, fmt.Errorf("%w: it is empty", ErrMalformed)
	}
	if len(text) > maxTokenText {
		return Token{}, fmt.Errorf("%w: it is longer than %d characters", ErrMalformed, maxTokenText)
	}
	parts := strings.Split(strings.ToLower(text), "-")
	if parts[0] != strings.ToLower(tokenVersion) {
		return Token{}, fmt.Errorf("%w: it does not begin with %s-", ErrMalformed, tokenVersion)
	}
	if len(parts) != 5 {
		return Token{}, fmt.Errorf("%w: it has %d parts instead of 5; was all of it copied?", ErrMalformed, len(parts))
	}
	if !validKind(parts[1]) {
		return Token{}, fmt.Errorf("%w: its kind is not valid", ErrMalformed)
	}
	pin, err := decode32(parts[2], PinSize)
	if err != nil {
		return Token{}, fmt.Errorf("%w: the authority's pin in it is damaged", ErrMalformed)
	}
	if _, err := decode32(parts[3], tokenIDSize); err != nil {
		return Token{}, fmt.Errorf("%w: the id in it is damaged", ErrMalformed)
	}
	secret, err := decode32(parts[4], tokenSecretSize)
	if err != nil {
		return Token{}, fmt.Errorf("%w: the secret in it is damaged; was all of it copied?", ErrMalformed)
	}
	return Token{Kind: parts[1], Pin: pin, ID: parts[3], Secret: secret}, nil
}

// HashSecret is what the site stores of a token's secret. The secret has 256
// random bits, so a plain hash cannot be reversed by guessing.
func HashSecret(secret []byte) []byte {
	sum := sha256.Sum256(append([]byte("atoll token secret\x00"), secret...))
	return sum[:]
}

// SecretMatches compares a secret with a stored hash in constant time.
func SecretMatches(hash, secret []byte) bool {
	return subtle.ConstantTimeCompare(hash, HashSecret(secret)) == 1
}

// PinMatches compares two pins in constant time.
func PinMatches(a, b []byte) bool {
	return len(a) == PinSize && subtle.ConstantTimeCompare(a, b) == 1
}

func validKind(kind string) bool {
	if len(kind) == 0 || len(kind) > 16 {
		return false
	}
	for _, c := range kind {
		if c < 'a' || c > 'z' {
			return false
		}
	}
	return true
}

func encode32(b []byte) string {
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(b))
}

// decode32 accepts exactly what encode32 writes for size bytes: one text per
// value, so that an id cannot be spelled in two ways.
func decode32(text string, size int) ([]byte, error) {
	b, err := base32.StdEncoding.WithPadding(base32.NoPadding).DecodeString(strings.ToUpper(text))
	if err != nil {
		return nil, err
	}
	if len(b) != size || encode32(b) != text {
		return nil, errors.New("wrong length or stray bits")
	}
	return b, nil
}
