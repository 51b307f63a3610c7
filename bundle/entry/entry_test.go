package entry

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"maps"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"golang.org/x/mod/sumdb/tlog"
)

var testLog = LogID{Site: "site-a", Incarnation: "i1", Scope: "p1"}

func testKey(seed byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize))
}

func mustKey(t testing.TB, key any) Key {
	t.Helper()
	k, err := KeyOf(key)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// samples has one valid entry of each kind.
func samples() []Entry {
	d := digest.FromString("manifest")
	return []Entry{
		{Kind: ProjectPut, At: 1, Actor: "admin", Name: "lib", Public: true, Metadata: map[string]string{"b": "2", "a": "1"}},
		{Kind: ArtifactPut, At: 2, Repository: "web/app", Digest: d, MediaType: "application/vnd.oci.image.manifest.v1+json", Size: 7, Subject: digest.FromString("s"), PushedAt: 2},
		{Kind: TagPut, At: 3, Repository: "web/app", Tag: "v1", Digest: d, PushedAt: 3},
		{Kind: TagDelete, At: 4, Repository: "web/app", Tag: "v1"},
		{Kind: ArtifactDelete, At: 5, Repository: "web/app", Digest: d},
	}
}

func TestEncodeDecode(t *testing.T) {
	for _, e := range samples() {
		value, err := e.Encode()
		if err != nil {
			t.Fatalf("%s: %v", e.Kind, err)
		}
		back, err := Decode(value)
		if err != nil {
			t.Fatalf("%s: %v", e.Kind, err)
		}
		if diff := cmp.Diff(e, back); diff != "" {
			t.Errorf("%s: %s", e.Kind, diff)
		}
	}
}

func TestEncodingIsFixed(t *testing.T) {
	value, err := Entry{Kind: TagDelete, At: 4, Repository: "app", Tag: "v1"}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	// {"at": 4, "tag": "v1", "kind": "tag.delete", "repository": "app"}: keys by length, then bytes... as RFC 8949 4.2.1 sorts encoded keys.
	const want = "a4" + "626174" + "04" + "63746167" + "627631" + "646b696e64" + "6a7461672e64656c657465" + "6a7265706f7369746f7279" + "63617070"
	if got := hex.EncodeToString(value); got != want {
		t.Errorf("have %s, want %s", got, want)
	}
}

func TestEncodeRefuses(t *testing.T) {
	good := samples()
	for name, change := range map[string]func() Entry{
		"unknown kind":       func() Entry { return Entry{Kind: "label.put"} },
		"no kind":            func() Entry { return Entry{} },
		"bad project":        func() Entry { e := good[0]; e.Name = "Lib"; return e },
		"bad repository":     func() Entry { e := good[1]; e.Repository = "../x"; return e },
		"bad digest":         func() Entry { e := good[1]; e.Digest = "sha256:12"; return e },
		"bad tag":            func() Entry { e := good[2]; e.Tag = "-v1"; return e },
		"field of another":   func() Entry { e := good[3]; e.Digest = good[2].Digest; return e },
		"metadata on a tag":  func() Entry { e := good[3]; e.Metadata = map[string]string{"a": "b"}; return e },
		"artifact of size 0": func() Entry { e := good[1]; e.Size = 0; return e },
		"too large": func() Entry {
			e := good[0]
			e.Metadata = map[string]string{"a": strings.Repeat("x", MaxValue)}
			return e
		},
	} {
		if _, err := change().Encode(); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestDecodeKeepsTheUnknown(t *testing.T) {
	value, err := Marshal(map[string]any{"kind": "label.put", "at": 9, "actor": "x", "colour": "red"})
	if err != nil {
		t.Fatal(err)
	}
	e, err := Decode(value)
	if err != nil || e.Known() || e.Kind != "label.put" || e.At != 9 {
		t.Errorf("unknown kind: %+v, %v", e, err)
	}
	value, err = Marshal(map[string]any{"kind": TagDelete, "at": 9, "repository": "app", "tag": "v1", "why": "old"})
	if err != nil {
		t.Fatal(err)
	}
	if e, err = Decode(value); err != nil || e.Tag != "v1" {
		t.Errorf("unknown field: %+v, %v", e, err)
	}
}

func TestDecodeRefusesOtherEncodings(t *testing.T) {
	for name, h := range map[string]string{
		"long integer":      "a4" + "626174" + "1804" + "63746167" + "627631" + "646b696e64" + "6a7461672e64656c657465" + "6a7265706f7369746f7279" + "63617070",
		"keys out of order": "a4" + "63746167" + "627631" + "626174" + "04" + "646b696e64" + "6a7461672e64656c657465" + "6a7265706f7369746f7279" + "63617070",
		"indefinite map":    "bf" + "626174" + "04" + "63746167" + "627631" + "646b696e64" + "6a7461672e64656c657465" + "6a7265706f7369746f7279" + "63617070" + "ff",
		"trailing byte":     "a4" + "626174" + "04" + "63746167" + "627631" + "646b696e64" + "6a7461672e64656c657465" + "6a7265706f7369746f7279" + "63617070" + "00",
		"empty":             "",
		"not a map":         "04",
	} {
		data, err := hex.DecodeString(h)
		if err != nil {
			t.Fatal(err)
		}
		if e, err := Decode(data); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %+v, %v", name, e, err)
		}
	}
}

func TestLeafCoversEverything(t *testing.T) {
	seen := map[tlog.Hash]string{}
	add := func(name string, l LogID, seq uint64, value string) {
		leaf, err := Leaf(l, seq, []byte(value))
		if err != nil {
			t.Fatal(err)
		}
		if other, ok := seen[leaf]; ok {
			t.Errorf("%s and %s have one leaf", name, other)
		}
		seen[leaf] = name
	}
	add("base", testLog, 1, "v")
	add("seq", testLog, 2, "v")
	add("value", testLog, 1, "w")
	add("site", LogID{"site-b", "i1", "p1"}, 1, "v")
	add("incarnation", LogID{"site-a", "i2", "p1"}, 1, "v")
	add("scope", LogID{"site-a", "i1", "p2"}, 1, "v")
}

func TestTreeAgreesWithTlog(t *testing.T) {
	var stored []tlog.Hash
	reader := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		var out []tlog.Hash
		for _, i := range indexes {
			out = append(out, stored[i])
		}
		return out, nil
	})
	var tree Tree
	for n := range int64(70) {
		want, err := tlog.TreeHash(n, reader)
		if err != nil {
			t.Fatal(err)
		}
		if tree.Size() != uint64(n) || tree.Root() != want {
			t.Fatalf("size %d: root %v, want %v", n, tree.Root(), want)
		}
		data, _ := tree.MarshalBinary()
		var back Tree
		if err := back.UnmarshalBinary(data); err != nil || back.Root() != want {
			t.Fatalf("size %d: read back: %v", n, err)
		}
		record := []byte{byte(n)}
		hashes, err := tlog.StoredHashes(n, record, reader)
		if err != nil {
			t.Fatal(err)
		}
		stored = append(stored, hashes...)
		tree.Append(tlog.RecordHash(record))
	}
	if err := new(Tree).UnmarshalBinary(make([]byte, 40)); !errors.Is(err, ErrMalformed) {
		t.Errorf("an edge that does not fit its size: %v", err)
	}
}

func TestCheckpoint(t *testing.T) {
	key, other := testKey(1), testKey(2)
	c := Checkpoint{Log: testLog, Size: 3, Root: tlog.RecordHash([]byte("x")), At: -5}
	signed, err := c.Sign(key)
	if err != nil {
		t.Fatal(err)
	}
	if again, _ := c.Sign(key); !bytes.Equal(again, signed) {
		t.Error("signing twice gives other bytes")
	}
	back, err := OpenCheckpoint(signed, mustKey(t, other), mustKey(t, key))
	if err != nil || back != c {
		t.Fatalf("%+v, %v", back, err)
	}
	if _, err := OpenCheckpoint(signed, mustKey(t, other)); !errors.Is(err, ErrSignature) {
		t.Errorf("another key: %v", err)
	}
	for i := range len(signed) * 8 {
		flipped := bytes.Clone(signed)
		flipped[i/8] ^= 1 << (i % 8)
		if _, err := OpenCheckpoint(flipped, mustKey(t, key)); err == nil {
			t.Errorf("bit %d of byte %d flipped: accepted", i%8, i/8)
		}
	}
	if _, err := (Checkpoint{Log: LogID{"a/b", "c", "d"}}).Sign(key); !errors.Is(err, ErrMalformed) {
		t.Errorf("bad id: %v", err)
	}
}

func TestState(t *testing.T) {
	var grown, direct State
	for _, e := range samples()[:3] {
		if err := grown.Apply(e); err != nil {
			t.Fatal(err)
		}
	}
	moved := samples()[2]
	moved.Tag, moved.At, moved.Actor = "v2", 99, "somebody"
	e := samples()
	for _, e := range []Entry{moved, {Kind: TagDelete, Repository: "web/app", Tag: "v2"}, {Kind: "label.put"}} {
		if err := grown.Apply(e); err != nil {
			t.Fatal(err)
		}
	}
	for _, e := range []Entry{e[2], e[1], e[0]} {
		if err := direct.Apply(e); err != nil {
			t.Fatal(err)
		}
	}
	a, err := grown.Root()
	if err != nil {
		t.Fatal(err)
	}
	b, err := direct.Root()
	if err != nil || a != b {
		t.Errorf("the same state, reached by two ways, has two roots (%v)", err)
	}
	if empty, _ := new(State).Root(); empty == a {
		t.Error("the state does not count")
	}
	pairs := maps.Collect(func(yield func(string, []byte) bool) {
		for p := range grown.Pairs() {
			if !yield(p.Key, p.Value) {
				return
			}
		}
	})
	if len(pairs) != 3 {
		t.Errorf("%d pairs, want 3", len(pairs))
	}
	unsorted := func(yield func(Pair, error) bool) {
		_ = yield(Pair{Key: "b"}, nil) && yield(Pair{Key: "a"}, nil)
	}
	if _, err := StateRoot(unsorted); !errors.Is(err, ErrMalformed) {
		t.Errorf("unsorted pairs: %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	for _, e := range samples() {
		value, err := e.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(value)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := Decode(data)
		if err != nil || !e.Known() {
			return
		}
		if _, _, _, err := e.State(); err != nil {
			t.Errorf("decoded, but has no state: %v", err)
		}
		if again, err := e.Encode(); err != nil {
			t.Errorf("decoded, but cannot be encoded: %v", err)
		} else if len(again) == len(data) && !bytes.Equal(again, data) {
			t.Errorf("two encodings of one entry: %x and %x", data, again)
		}
	})
}
