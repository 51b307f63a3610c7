package bundle

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
)

func TestRoundTrip(t *testing.T) {
	s, data := sample(t)
	blobs, b, err := readAll(bytes.NewReader(data), s.trusted)
	if err != nil {
		t.Fatal(err)
	}
	gone := digest.FromString("deleted again")
	for d, content := range s.content {
		have, ok := blobs[string(d)]
		if d == gone || strings.Contains(string(content), string(gone)) || !ok {
			continue
		}
		if !bytes.Equal(have, content) {
			t.Errorf("blob %s differs", d)
		}
	}
	if _, ok := blobs[string(gone)]; ok || len(blobs) != len(s.content)-3 {
		t.Errorf("%d blobs of %d, the deleted artifact's layer among them: %v", len(blobs), len(s.content), ok)
	}
	var names []string
	for _, image := range b.Images() {
		names = append(names, image.Reference)
	}
	want := []string{"lib--app--latest", "lib--app--v1", "lib--tools--web--1.0", ""}
	if !slices.Equal(names, want) {
		t.Errorf("index.json names %q, want %q", names, want)
	}
	if p := b.Claims(); p.Kind != KindFull || p.Created != 1_700_000_104 || len(p.Bundle) != 64 {
		t.Errorf("statement: %+v", p)
	}
	if r, err := b.Reach(func(entry.LogID) bool { return true }); err != nil || len(r) != len(blobs) {
		t.Errorf("reach: %d of %d, %v", len(r), len(blobs), err)
	}
}

func TestEqualContentGivesEqualBytes(t *testing.T) {
	_, a := sample(t)
	_, b := sample(t)
	if !bytes.Equal(a, b) {
		t.Error("two runs give two files")
	}
}

func TestReadsFromSlowPipe(t *testing.T) {
	s, data := sample(t)
	if _, _, err := readAll(iotest.OneByteReader(bytes.NewReader(data)), s.trusted); err != nil {
		t.Error(err)
	}
	broken := errors.New("the stick was pulled out")
	_, _, err := readAll(io.MultiReader(bytes.NewReader(data[:len(data)/2]), iotest.ErrReader(broken)), s.trusted)
	if !errors.Is(err, broken) || errors.Is(err, ErrTruncated) {
		t.Errorf("an I/O error becomes: %v", err)
	}
}

// TestIsPlainTar holds the file against the standard library's reader and the
// order that the format promises.
func TestIsPlainTar(t *testing.T) {
	_, data := sample(t)
	r := tar.NewReader(bytes.NewReader(data))
	var paths []string
	files := map[string][]byte{}
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag != tar.TypeReg || h.Mode != 0o644 || h.Format != tar.FormatUSTAR || h.ModTime.Unix() != 0 {
			t.Errorf("%s: %+v", h.Name, h)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, h.Name)
		files[h.Name] = content
	}
	want := []string{
		"oci-layout", "atoll/statement.dsse.json", "atoll/manifest.json", "atoll/manifest.json.sig", "atoll/keys/site-a.jsonl", "index.json",
		"atoll/journal/site-a/inc1/p1.checkpoint", "atoll/journal/site-a/inc1/p1.entries",
	}
	if !slices.Equal(paths[:len(want)], want) {
		t.Errorf("order: %q", paths)
	}
	var m manifest
	if err := json.Unmarshal(files["atoll/manifest.json"], &m); err != nil {
		t.Fatal(err)
	}
	rank := 0
	for _, f := range m.Files {
		if hexSum(files[f.Path]) != f.SHA256 || int64(len(files[f.Path])) != f.Size {
			t.Errorf("%s is not what the manifest says", f.Path)
		}
		if now := blobRank(f.Role); now >= 0 {
			if now < rank {
				t.Errorf("%s comes after a later role", f.Path)
			}
			rank = now
		}
	}
}

func TestFlippedBits(t *testing.T) {
	// Small, so that every byte that says something can have its turn.
	s := newSite(t, "site-a", 10)
	app := s.image("app", "layer", nil)
	data, _ := s.write(s.spec(s.log("p1", []entry.Entry{{Kind: entry.ProjectPut, Name: "lib"}, app, tag(app, "v1")}, 0)))
	for i := range data {
		if data[i] == 0 && i > 2*blockSize && i%13 != 0 {
			continue
		}
		flipped := bytes.Clone(data)
		flipped[i] ^= 1 << (i % 8)
		_, _, err := readAll(bytes.NewReader(flipped), s.trusted)
		var refusal *Refusal
		if err == nil || !errors.As(err, &refusal) {
			t.Fatalf("bit %d of byte %d flipped: %v", i%8, i, err)
		}
	}
}

func TestTruncated(t *testing.T) {
	s, data := sample(t)
	for n := 0; n < len(data); n++ {
		if n%blockSize > 2 && n%97 != 0 {
			continue
		}
		if _, _, err := readAll(bytes.NewReader(data[:n]), s.trusted); !errors.Is(err, ErrTruncated) {
			t.Fatalf("cut at %d: %v", n, err)
		}
	}
}

func TestTrailingBytes(t *testing.T) {
	s, data := sample(t)
	for _, tail := range []string{"x", string(make([]byte, blockSize)), string(data)} {
		if _, _, err := readAll(bytes.NewReader(append(bytes.Clone(data), tail...)), s.trusted); !errors.Is(err, ErrAltered) {
			t.Errorf("%d bytes after the end: %v", len(tail), err)
		}
	}
}

func TestUntrusted(t *testing.T) {
	s, data := sample(t)
	_, _, err := readAll(bytes.NewReader(data), func(string) (entry.Key, bool) { return "", false })
	if !errors.Is(err, ErrUntrusted) || !strings.Contains(err.Error(), s.key(s.root).Fingerprint()) {
		t.Errorf("unknown site: %v", err)
	}
	other := s.key(seeded(99))
	if _, _, err = readAll(bytes.NewReader(data), func(string) (entry.Key, bool) { return other, true }); !errors.Is(err, ErrUntrusted) {
		t.Errorf("another root key: %v", err)
	}
	// The online key is vouched for by the root, but is not the root.
	if _, _, err = readAll(bytes.NewReader(data), func(string) (entry.Key, bool) { return s.key(s.online), true }); !errors.Is(err, ErrUntrusted) {
		t.Errorf("the online key as root: %v", err)
	}
}

func TestRevokedKeySignsNothing(t *testing.T) {
	s := newSite(t, "site-a", 10)
	log := s.log("p1", s.project(), 0)
	old, _ := s.write(s.spec(log))
	rotate := func(state string) []byte {
		next := seeded(77)
		document := entry.KeyDocument{Site: "site-a", Serial: 2, Threshold: 1, Root: []entry.Key{s.key(s.root)}, Online: []entry.OnlineKey{{Key: s.key(s.online), State: state}, {Key: s.key(next), State: entry.KeyActive}}}
		signed, err := document.Sign(s.root)
		if err != nil {
			t.Fatal(err)
		}
		spec := s.spec(log)
		spec.Chains["site-a"], spec.Key = s.chain.Add(signed), next
		var out bytes.Buffer
		if _, err := Write(t.Context(), &out, spec, s.content); err != nil {
			return nil
		}
		return out.Bytes()
	}
	if _, _, err := readAll(bytes.NewReader(rotate(entry.KeyRetired)), s.trusted); err != nil {
		t.Errorf("a checkpoint by a retired key: %v", err)
	}
	if rotate(entry.KeyRevoked) != nil {
		t.Error("a checkpoint by a revoked key is exported")
	}
	if _, b, err := readAll(bytes.NewReader(old), s.trusted); err != nil || b.Keys("site-a").Serial != 1 {
		t.Errorf("the old bundle: %v", err)
	}
}

func TestNewerFormat(t *testing.T) {
	s := newSite(t, "site-a", 10)
	payload := `{"_type":"https://in-toto.io/Statement/v1","predicateType":"https://github.com/atoll-registry/atoll/bundle/v7","predicate":{"format":7,"new":true}}`
	envelope, err := entry.SealEnvelope(payloadType, []byte(payload), s.online)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	for path, content := range map[string]string{pathLayout: layoutContent} {
		head, _ := header(path, int64(len(content)))
		out.Write(head)
		out.WriteString(content)
		out.Write(make([]byte, padding(int64(len(content)))))
	}
	head, _ := header(pathStatement, int64(len(envelope)))
	out.Write(head)
	out.Write(envelope)
	out.Write(make([]byte, padding(int64(len(envelope)))))
	_, _, err = readAll(&out, s.trusted)
	if !errors.Is(err, ErrNewerFormat) || !strings.Contains(err.Error(), "version 7") || !strings.Contains(err.Error(), "up to 1") {
		t.Errorf("have %v", err)
	}
}

func TestNotABundle(t *testing.T) {
	s := newSite(t, "site-a", 10)
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, path := range []string{"oci-layout", "index.json"} {
		if err := w.WriteHeader(&tar.Header{Name: path, Size: int64(len(layoutContent)), Mode: 0o644, Format: tar.FormatUSTAR, Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(layoutContent)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"another OCI archive": archive.Bytes(), "noise": bytes.Repeat([]byte("noise "), 500)} {
		if _, _, err := readAll(bytes.NewReader(data), s.trusted); !errors.Is(err, ErrNotBundle) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestIncremental(t *testing.T) {
	s := newSite(t, "site-a", 10)
	entries := s.project()
	before := len(entries)
	more := s.image("app", "layer of the next version", nil)
	entries = append(entries, more, tag(more, "v2"), tag(entries[3], "stable"))
	data, written := s.write(s.spec(s.log("p1", entries, before)))
	blobs, b, err := readAll(bytes.NewReader(data), s.trusted)
	if err != nil {
		t.Fatal(err)
	}
	if p := b.Claims(); p.Kind != KindIncremental || len(p.Basis) != 1 || p.From(p.Target[0].LogID) != uint64(before) || p.Target[0].Project != "lib" {
		t.Errorf("statement: %+v", p)
	}
	if len(blobs) != 3 || len(written.Images) != 1 || written.Images[0].Tag != "v2" {
		t.Errorf("%d blobs, images %+v", len(blobs), written.Images)
	}
}

// Content is carried under the algorithm by which it is named, and the same bytes
// under both are two files.
func TestBothAlgorithms(t *testing.T) {
	s := newSite(t, "site-a", 10)
	log := s.log("p1", s.mixed(), 0)
	data, written := s.write(s.spec(log))
	blobs, b, err := readAll(bytes.NewReader(data), s.trusted)
	if err != nil {
		t.Fatal(err)
	}
	if len(blobs) != len(s.content) {
		t.Errorf("%d blobs of %d", len(blobs), len(s.content))
	}
	for d, content := range s.content {
		if !bytes.Equal(blobs[string(d)], content) {
			t.Errorf("blob %s differs", d)
		}
	}
	if len(written.Images) != 4 || len(b.Absent()) != 0 {
		t.Errorf("images %+v, absent %v", written.Images, b.Absent())
	}
	files := map[string]digest.Digest{}
	r := tar.NewReader(bytes.NewReader(data))
	for h, err := r.Next(); err != io.EOF; h, err = r.Next() {
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		algorithm := digest.SHA256
		if strings.HasPrefix(h.Name, "blobs/sha512/") {
			algorithm = digest.SHA512
		}
		files[h.Name] = algorithm.FromBytes(content)
	}
	count := map[digest.Algorithm]int{}
	for _, f := range b.Files() {
		if files[f.Path] != f.Digest() {
			t.Errorf("%s is not what the manifest says", f.Path)
		}
		if blobRank(f.Role) >= 0 {
			count[f.Digest().Algorithm()]++
		}
	}
	if count[digest.SHA256] == 0 || count[digest.SHA256] != count[digest.SHA512] {
		t.Errorf("blobs by algorithm: %v", count)
	}

	// What is absent is named by its algorithm too.
	absent := []digest.Digest{digest.SHA256.FromString("the same layer"), digest.SHA512.FromString("the same layer")}
	delete(s.content, absent[1])
	delete(s.content, absent[0])
	data, _ = s.write(s.spec(log))
	if _, b, err := readAll(bytes.NewReader(data), s.trusted); err != nil || !slices.Equal(b.Absent(), absent) {
		t.Errorf("absent: %v", err)
	}
	flipped := bytes.Clone(data)
	at := bytes.Index(flipped, []byte("the bill of materials"))
	flipped[bytes.LastIndex(flipped, []byte("the bill of materials"))] ^= 1
	if _, _, err := readAll(bytes.NewReader(flipped), s.trusted); at < 0 || !errors.Is(err, ErrAltered) {
		t.Errorf("a flipped bit: %v", err)
	}
}

func TestAbsentBlobsAreNamed(t *testing.T) {
	s := newSite(t, "site-a", 10)
	entries := s.project()
	log := s.log("p1", entries, 0)
	layer, child := digest.FromString("layer of web"), entries[2].Digest
	delete(s.content, layer)
	delete(s.content, child)
	data, written := s.write(s.spec(log))
	want := []digest.Digest{layer, child}
	slices.Sort(want)
	if !slices.Equal(written.Absent, want) {
		t.Errorf("absent: %v, want %v", written.Absent, want)
	}
	if _, b, err := readAll(bytes.NewReader(data), s.trusted); err != nil || !slices.Equal(b.Absent(), want) {
		t.Errorf("read: %v", err)
	}
}

func TestRelayedLogVerifiesWithItsOrigin(t *testing.T) {
	a, b := newSite(t, "site-a", 10), newSite(t, "site-b", 20)
	log := a.log("p1", a.project(), 0)
	b.content = a.content
	spec := b.spec(log)
	spec.Chains["site-a"] = a.chain
	data, _ := b.write(spec)
	both := func(site string) (entry.Key, bool) {
		if key, ok := a.trusted(site); ok {
			return key, ok
		}
		return b.trusted(site)
	}
	if _, _, err := readAll(bytes.NewReader(data), both); err != nil {
		t.Error(err)
	}
	_, _, err := readAll(bytes.NewReader(data), b.trusted)
	if !errors.Is(err, ErrUntrusted) || !strings.Contains(err.Error(), "site-a") {
		t.Errorf("origin unknown: %v", err)
	}
}

func TestNamesThatCollide(t *testing.T) {
	s := newSite(t, "site-a", 10)
	project := entry.Entry{Kind: entry.ProjectPut, Name: "lib"}
	one, two := s.image("a--b/c", "one", nil), s.image("a/b--c", "two", nil)
	long := s.image(strings.Repeat("x", 60)+"/"+strings.Repeat("y", 60), "three", nil)
	_, written := s.write(s.spec(s.log("p1", []entry.Entry{project, one, two, long, tag(one, "v1"), tag(two, "v1"), tag(long, "v1")}, 0)))
	seen := map[string]bool{}
	for _, image := range written.Images {
		if seen[image.Reference] || len(image.Reference) > maxReference || image.Reference == "" {
			t.Errorf("reference %q", image.Reference)
		}
		seen[image.Reference] = true
	}
	if len(seen) != 3 {
		t.Errorf("%d names", len(seen))
	}
}

func TestWriterRefuses(t *testing.T) {
	for name, spoil := range map[string]func(s *site, spec *Spec){
		"another key":        func(s *site, spec *Spec) { spec.Key = seeded(99) },
		"no chain":           func(s *site, spec *Spec) { spec.Chains = nil },
		"wrong state":        func(s *site, spec *Spec) { spec.Logs[0].State[0] ^= 1 },
		"wrong size":         func(s *site, spec *Spec) { spec.Logs[0].Size-- },
		"damaged manifest":   func(s *site, spec *Spec) { s.content[s.project()[1].Digest] = []byte("{}") },
		"damaged layer":      func(s *site, spec *Spec) { s.content[digest.FromString("layer of web")] = []byte("layer 0f web") },
		"layer grown":        func(s *site, spec *Spec) { s.content[digest.FromString("layer of web")] = []byte("layer of web.") },
		"no log":             func(s *site, spec *Spec) { spec.Logs = nil },
		"malformed receiver": func(s *site, spec *Spec) { spec.Recipients = []string{"Site B"} },
	} {
		s := newSite(t, "site-a", 10)
		spec := s.spec(s.log("p1", s.project(), 0))
		spoil(s, &spec)
		if _, err := Write(t.Context(), io.Discard, spec, s.content); err == nil {
			t.Errorf("%s: written", name)
		}
	}
}

func TestHeader(t *testing.T) {
	for _, path := range []string{"oci-layout", dirBlobs + "sha256/" + strings.Repeat("a", 64), dirJournal + strings.Repeat("s", 64) + "/" + strings.Repeat("i", 64) + "/" + strings.Repeat("p", 64) + ".checkpoint"} {
		have, err := header(path, 1234)
		if err != nil {
			t.Fatal(err)
		}
		var want bytes.Buffer
		if err := tar.NewWriter(&want).WriteHeader(&tar.Header{Name: path, Size: 1234, Mode: 0o644, Typeflag: tar.TypeReg, Format: tar.FormatUSTAR}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(have, want.Bytes()) {
			t.Errorf("%s: not the header that the standard library writes", path)
		}
	}
	for _, size := range []int64{maxUSTAR, maxUSTAR + 1, 1 << 50} {
		head, err := header("blobs/sha256/x", size)
		if err != nil {
			t.Fatal(err)
		}
		if (len(head) > blockSize) != (size > maxUSTAR) || len(head)%blockSize != 0 {
			t.Errorf("size %d: header of %d bytes", size, len(head))
		}
		h, err := tar.NewReader(bytes.NewReader(head)).Next()
		if err != nil || h.Size != size || h.Name != "blobs/sha256/x" {
			t.Errorf("size %d: %+v, %v", size, h, err)
		}
	}
	long := "blobs/sha512/" + strings.Repeat("a", 128)
	for _, size := range []int64{0, 1234, maxUSTAR, maxUSTAR + 1} {
		head, err := header(long, size)
		if err != nil || len(head) != 3*blockSize {
			t.Fatalf("%d bytes, %v", len(head), err)
		}
		if h, err := tar.NewReader(bytes.NewReader(head)).Next(); err != nil || h.Size != size || h.Name != long {
			t.Errorf("size %d: %+v, %v", size, h, err)
		}
	}
	if _, err := header(strings.Repeat("x", 101), 1); err == nil {
		t.Error("a path that does not fit is accepted")
	}
}
