package entry

import (
	_ "crypto/sha256" // the hashes of the algorithms below
	_ "crypto/sha512"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Algorithms lists the digest algorithms that content may be addressed by, in
// the order of their names. It is the one place that says so: what a node
// stores, admits and serves, what a journal names and a bundle carries all ask
// here. The image specification registers sha384 too, without a client that
// writes it, so it is not taken.
func Algorithms() []digest.Algorithm { return []digest.Algorithm{digest.SHA256, digest.SHA512} }

// ParseDigest reads a digest in its one spelling: an algorithm of Algorithms, a
// colon and lower-case hexadecimal digits.
func ParseDigest(s string) (digest.Digest, error) {
	name, hex, _ := strings.Cut(s, ":")
	a := digest.Algorithm(name)
	if slices.Contains(Algorithms(), a) && len(hex) == 2*a.Size() && lowerHex(hex) {
		return digest.Digest(s), nil
	}
	return "", fmt.Errorf("%.140q is not a digest that is taken; write sha256: and 64, or sha512: and 128, lower-case hexadecimal digits: %w", s, ErrMalformed)
}

// ParseAlgorithm reads the name of a digest algorithm.
func ParseAlgorithm(s string) (digest.Algorithm, error) {
	if a := digest.Algorithm(s); slices.Contains(Algorithms(), a) {
		return a, nil
	}
	return "", fmt.Errorf("%.40q is not a digest algorithm that is taken; sha256 and sha512 are: %w", s, ErrMalformed)
}

func lowerHex(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
