package registry

import (
	"bytes"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
)

// What is taken for a range of an upload is one that could have been sent, and
// says so again when it is written out.
func FuzzContentRange(f *testing.F) {
	for _, seed := range []string{"0-0", "0-99", "5-4", "bytes 0-99/*", "bytes 7-9/100", "-1-5", "9223372036854775807-9223372036854775807", "0-4611686018427387903", "+1-2", "1-2-3", " 0-1", ""} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		start, length, err := parseContentRange(s)
		if err != nil {
			if !fault.Is(err, fault.Invalid) {
				t.Fatalf("%q: %v", s, err)
			}
			return
		}
		if start < 0 || length <= 0 || start+length <= 0 {
			t.Fatalf("%q is %d bytes from %d", s, length, start)
		}
		if a, b, err := parseContentRange(fmt.Sprintf("%d-%d", start, start+length-1)); err != nil || a != start || b != length {
			t.Fatalf("%q is %d bytes from %d, which reads as %d from %d, %v", s, length, start, b, a, err)
		}
	})
}

// A reference is a tag by the specification's grammar, a digest in its one
// spelling, or an error that is the client's; never two of them.
func FuzzReference(f *testing.F) {
	for _, seed := range []string{
		"latest", "v1.0-rc_1", "-x", ".x", strings.Repeat("a", 129), "sha256:" + strings.Repeat("0", 64), "sha512:" + strings.Repeat("f", 128),
		"SHA256:" + strings.Repeat("0", 64), "sha256:" + strings.Repeat("G", 64), "sha256:", "sha384:00", "a:b", "sha256+b64:x", "", "\x00", "é",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, digestErr := parseDigest(s)
		tagErr := catalog.CheckTag(s)
		switch {
		case digestErr == nil && tagErr == nil:
			t.Fatalf("%q is a tag and a digest", s)
		case digestErr == nil:
			if string(d) != s || d.Validate() != nil || !isDigest(s) || strings.ContainsAny(s, "/%?\\") {
				t.Fatalf("%q is taken for the digest %q", s, d)
			}
			if d.Algorithm() != digest.SHA256 && d.Algorithm() != digest.SHA512 {
				t.Fatalf("%q has algorithm %s", s, d.Algorithm())
			}
		case tagErr == nil:
			if isDigest(s) || len(s) > 128 || strings.Trim(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-") != "" || s[0] == '.' || s[0] == '-' {
				t.Fatalf("%q is taken for a tag", s)
			}
		}
		if err := readable(s); err != nil && !fault.Is(err, fault.Invalid) && !fault.Is(err, fault.NotFound) {
			t.Fatalf("%q: %v", s, err)
		}
	})
}

// Whatever ranges and conditions a client asks for, the answer is one of the
// four that RFC 9110 has for it, and its bytes are those that it says they are.
func FuzzRange(f *testing.F) {
	const condition = `"x"`
	for _, seed := range []string{"", "bytes=0-0", "bytes=5-", "bytes=-5", "bytes=0-0,2-3", "bytes=0-999999", "bytes=7-3", "bytes=1000-", "lines=1-2", "bytes=,", "bytes=0-,0-,0-,0-", "bytes= 1 - 2 "} {
		f.Add(seed, condition)
	}
	content := []byte(strings.Repeat("0123456789", 30))
	f.Fuzz(func(t *testing.T, ranges, ifRange string) {
		r := httptest.NewRequest(http.MethodGet, "/v2/a/blobs/b", nil)
		r.Header.Set("Range", ranges)
		r.Header.Set("If-Range", ifRange)
		w := httptest.NewRecorder()
		c := newCall(w, r, 0)
		c.w.Header().Set("Content-Type", "application/octet-stream")
		c.w.Header().Set("Etag", condition)
		err := (&Registry{}).send(c, bytes.NewReader(content))
		switch {
		case err != nil:
			if code, _, _ := fault.Public(err); code != codeRangeInvalid || w.Body.Len() > 0 {
				t.Fatalf("%q: %v and %d bytes", ranges, err, w.Body.Len())
			}
		case w.Code == http.StatusOK:
			if !bytes.Equal(w.Body.Bytes(), content) {
				t.Fatalf("%q: 200 with %d bytes", ranges, w.Body.Len())
			}
		case w.Code == http.StatusPartialContent:
			checkParts(t, w, content)
		default:
			t.Fatalf("%q: answered %d", ranges, w.Code)
		}
	})
}

// checkParts holds each part of an answer to its Content-Range.
func checkParts(t *testing.T, w *httptest.ResponseRecorder, content []byte) {
	t.Helper()
	check := func(header string, body []byte) {
		t.Helper()
		var first, last, size int
		if n, err := fmt.Sscanf(header, "bytes %d-%d/%d", &first, &last, &size); n != 3 || err != nil || size != len(content) {
			t.Fatalf("Content-Range %q", header)
		}
		if !bytes.Equal(body, content[first:last+1]) {
			t.Fatalf("Content-Range %q with %q", header, body)
		}
	}
	kind, parameters, err := mime.ParseMediaType(w.Header().Get("Content-Type"))
	if err != nil || kind != "multipart/byteranges" {
		check(w.Header().Get("Content-Range"), w.Body.Bytes())
		return
	}
	total := 0
	for parts := multipart.NewReader(w.Body, parameters["boundary"]); ; {
		part, err := parts.NextPart()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(part)
		if err != nil {
			t.Fatal(err)
		}
		check(part.Header.Get("Content-Range"), body)
		total += len(body)
	}
	if total > len(content) {
		t.Fatalf("%d bytes of parts of %d", total, len(content))
	}
}

// A condition that names the content, and only such a one, spares sending it.
func FuzzUnchanged(f *testing.F) {
	d := digest.FromString("x")
	for _, seed := range []string{`"` + d.String() + `"`, `W/"` + d.String() + `"`, "*", `"a", "` + d.String() + `"`, d.String(), "", `"`, `""`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, tags string) {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Header.Set("If-None-Match", tags)
		if unchanged(r, d) && tags != "*" && !strings.Contains(tags, d.String()) && !strings.Contains(tags, "*") {
			t.Fatalf("%q is taken to name %s", tags, d)
		}
	})
}
