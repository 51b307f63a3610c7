package entry

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

func TestParseDigest(t *testing.T) {
	for _, good := range []string{
		"sha256:" + strings.Repeat("0a", 32),
		"sha512:" + strings.Repeat("0f", 64),
	} {
		if d, err := ParseDigest(good); err != nil || string(d) != good || d.Validate() != nil {
			t.Errorf("ParseDigest(%q) = %q, %v", good, d, err)
		}
	}
	for _, bad := range []string{
		"", ":", "sha256", "sha256:", "sha512:",
		strings.Repeat("a", 64),
		"sha256:" + strings.Repeat("a", 63),
		"sha256:" + strings.Repeat("A", 64),
		"sha256:" + strings.Repeat("g", 64),
		"sha256:" + strings.Repeat("a", 128),
		"sha512:" + strings.Repeat("a", 64),
		"SHA512:" + strings.Repeat("a", 128),
		"sha384:" + strings.Repeat("a", 96),
		"sha512:" + strings.Repeat("a", 127) + "\n",
		"sha512:" + strings.Repeat("../", 42) + "xx",
		"sha1:" + strings.Repeat("a", 40),
		"md5:" + strings.Repeat("a", 32),
	} {
		if d, err := ParseDigest(bad); !errors.Is(err, ErrMalformed) || d != "" {
			t.Errorf("ParseDigest(%q) = %q, %v", bad, d, err)
		}
	}
}

// What is taken can also be computed, and is listed in the order of names.
func TestAlgorithms(t *testing.T) {
	all := Algorithms()
	if !slices.IsSorted(all) {
		t.Errorf("%v are not in order", all)
	}
	for _, a := range all {
		d := a.FromString("content")
		if got, err := ParseDigest(d.String()); err != nil || got != d {
			t.Errorf("%s: %q, %v", a, got, err)
		}
		if got, err := ParseAlgorithm(a.String()); err != nil || got != a {
			t.Errorf("%s: %q, %v", a, got, err)
		}
	}
	for _, bad := range []digest.Algorithm{"", digest.SHA384, "SHA256", "sha512 "} {
		if got, err := ParseAlgorithm(bad.String()); !errors.Is(err, ErrMalformed) {
			t.Errorf("ParseAlgorithm(%q) = %q, %v", bad, got, err)
		}
	}
}
