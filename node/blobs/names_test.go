package blobs

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

// No name from outside leads out of the directory that it belongs in, nor to
// another file than its own.
func FuzzNames(f *testing.F) {
	for _, seed := range []string{
		"", ".", "..", "../../etc/passwd", "sha256:", "sha256:..", "a/b", "import-1", "a\x00b", ".tmp", "A.state", "-x",
		"sha256:" + strings.Repeat("a", 64), "sha256:" + strings.Repeat("A", 64), "sha512:" + strings.Repeat("a", 128),
		"sha512-" + strings.Repeat("a", 128), "sha384:" + strings.Repeat("a", 96),
		"sha256:" + strings.Repeat("../", 21) + "x", strings.Repeat("0", 32), strings.Repeat("０", 32),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		inside := func(name, dir string) {
			t.Helper()
			if !filepath.IsLocal(name) || filepath.ToSlash(filepath.Clean(name)) != name || filepath.ToSlash(filepath.Dir(name)) != dir {
				t.Fatalf("%q becomes %q, which is not a name in %q", s, name, dir)
			}
		}
		if k, err := keyOf(digest.Digest(s)); err == nil {
			if string(k.digest()) != s || digest.Digest(s).Validate() != nil {
				t.Fatalf("%q is taken for digest %q", s, k)
			}
			inside(k.blob(), shardName(k.shard()))
			inside(k.partial(), partialsDir)
			if back, ok := keyIn(k.shard(), filepath.Base(k.blob())); !ok || back != k {
				t.Fatalf("the file of %q is taken for %q, %v", k, back, ok)
			}
			if back, ok := keyOfPlain(k.plain()); !ok || back != k {
				t.Fatalf("the plain name of %q is taken for %q, %v", k, back, ok)
			}
		}
		if k, ok := keyOfPlain(s); ok && k.plain() != s {
			t.Fatalf("%q is taken for %q", s, k)
		}
		if isUploadID(s) {
			inside(uploadName(s), uploadsDir)
		}
		if isStagingID(s) {
			inside(stagingDir+"/"+s, stagingDir)
		}
	})
}

func FuzzState(f *testing.F) {
	good := encodeState(uploadState{1 << 33, digest.SHA512, bytes.Repeat([]byte{7}, 108)})
	f.Add(good)
	f.Add(good[:len(good)-1])
	f.Add([]byte(stateMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		if st, err := decodeState(b); err == nil && !bytes.Equal(encodeState(st), b) {
			t.Fatalf("%x decodes to %+v, which encodes differently", b, st)
		}
	})
}

func FuzzHave(f *testing.F) {
	f.Add(encodeHave([]byte{5}, 3*PieceSize), int64(3*PieceSize))
	f.Add(encodeHave([]byte{255}, 3*PieceSize), int64(3*PieceSize))
	f.Add(encodeHave(nil, 0), int64(0))
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		if size < 0 || size > 1<<30 {
			return
		}
		if have, err := decodeHave(b, size); err == nil && !bytes.Equal(encodeHave(have, size), b) {
			t.Fatalf("%x decodes to %x, which encodes differently", b, have)
		}
	})
}

func TestTornListOfPieces(t *testing.T) {
	good := encodeHave([]byte{5}, 3*PieceSize)
	if have, err := decodeHave(good, 3*PieceSize); err != nil || have[0] != 5 {
		t.Fatalf("%x, %v", have, err)
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1
		if _, err := decodeHave(bad, 3*PieceSize); err == nil {
			t.Errorf("a flipped bit in byte %d went unseen", i)
		}
		if _, err := decodeHave(good[:i], 3*PieceSize); err == nil {
			t.Errorf("a list cut to %d bytes went unseen", i)
		}
	}
	if _, err := decodeHave(encodeHave([]byte{8}, 3*PieceSize), 3*PieceSize); err == nil {
		t.Error("a fourth piece of three went unseen")
	}
}
