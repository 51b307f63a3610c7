package backup

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"testing"

	"filippo.io/age"
	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/node/fault"
)

// write makes a backup with a blob of each size, of which every third is given
// up in the middle.
func write(t testing.TB, sizes []int, recipients ...age.Recipient) []byte {
	t.Helper()
	var out bytes.Buffer
	f, err := newFileWriter(&out, Header{ID: "id", Site: "site"}, recipients)
	if err != nil {
		t.Fatal(err)
	}
	for i, size := range sizes {
		body := make([]byte, size)
		rand.Read(body)
		err := f.part(partBlob, digest.FromBytes(body).String(), func(w io.Writer) error {
			if i%3 == 2 {
				_, err := w.Write(body[:size/2])
				return errors.Join(err, fmt.Errorf("%w: rotten", errGivenUp))
			}
			_, err := w.Write(body)
			return err
		})
		if err != nil && !errors.Is(err, errGivenUp) {
			t.Fatal(err)
		}
	}
	if err := f.close(Summary{Blobs: len(sizes)}); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

var sizes = []int{0, 1, 70000, 2 << 20, maxChunk, 5}

func TestFile(t *testing.T) {
	one, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	two, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	for name, file := range map[string][]byte{"plain": write(t, sizes), "encrypted": write(t, sizes, one.Recipient(), two.Recipient())} {
		for _, identity := range []age.Identity{one, two} {
			v, err := Verify(bytes.NewReader(file), []age.Identity{identity})
			if err != nil || !v.Opened || v.Summary.Blobs != len(sizes) || v.Site != "site" || v.Encrypted != (name == "encrypted") {
				t.Errorf("%s: %+v, %v", name, v, err)
			}
		}
		v, err := Verify(bytes.NewReader(file), nil)
		if err != nil || v.Opened != (name == "plain") {
			t.Errorf("%s without an identity: %+v, %v", name, v, err)
		}
	}
	stranger, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(bytes.NewReader(write(t, sizes, one.Recipient())), []age.Identity{stranger}); !fault.Is(err, fault.Denied) {
		t.Errorf("a stranger opens it: %v", err)
	}
}

// What is sealed while the site changes its key opens with one of the keys.
func TestJoinKeys(t *testing.T) {
	a, b, c := bytes.Repeat([]byte("a"), pki.ClusterKeySize), bytes.Repeat([]byte("b"), pki.ClusterKeySize), bytes.Repeat([]byte("c"), pki.ClusterKeySize)
	if got := joinKeys(a, a); !bytes.Equal(got, a) {
		t.Errorf("one key twice is %q", got)
	}
	if got := joinKeys(append(bytes.Clone(a), b...), append(bytes.Clone(b), c...)); string(got) != string(a)+string(b)+string(c) {
		t.Errorf("a, b and b, c are %q", got)
	}
}

func FuzzVerify(f *testing.F) {
	f.Add(write(f, []int{3, 300, 9}))
	f.Add([]byte(magic))
	f.Add([]byte("ATOLL BACKUP 2\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := Verify(bytes.NewReader(b), nil)
		if err == nil && !bytes.HasPrefix(b, []byte(magic)) {
			t.Errorf("taken for a backup: %+v", v)
		}
		if err != nil && fault.Is(err, fault.Internal) {
			t.Errorf("an error that says nothing: %v", err)
		}
	})
}
