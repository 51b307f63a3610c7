package bundle

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/atoll-registry/atoll/bundle/entry"
)

var update = flag.Bool("update", false, "write the published vectors anew: only for a new format version")

// vectors is testdata/v1/vectors.json: what another implementation of FORMAT.md
// has to compute.
type vectors struct {
	Comment     string            `json:"comment"`
	RootSeed    string            `json:"root_seed"`
	OnlineSeed  string            `json:"online_seed"`
	RootKey     entry.Key         `json:"root_key"`
	Fingerprint string            `json:"root_fingerprint"`
	Log         string            `json:"log"`
	Entries     []vector          `json:"entries"`
	Checkpoint  string            `json:"checkpoint"`
	State       string            `json:"state_root"`
	Bundles     map[string]string `json:"bundles"`
	Index       string            `json:"index_json"`
}

type vector struct {
	Kind  string `json:"kind"`
	Value string `json:"value"`
	Leaf  string `json:"leaf"`
	Root  string `json:"root_after"`
}

// published makes the bundles and the vectors of this version.
func published(t *testing.T) (files map[string][]byte) {
	s := newSite(t, "site-a", 10)
	entries := s.project()
	before := len(entries)
	full, written := s.write(s.spec(s.log("p1", entries, 0)))
	more := s.image("app", "layer of the next version", nil)
	entries = append(entries, more, tag(more, "v2"))
	spec := s.spec(s.log("p1", entries, before))
	spec.Recipients = []string{"site-b"}
	incremental, next := s.write(spec)

	mixed, both := s.write(s.spec(s.log("p2", s.mixed(), 0)))

	log := s.log("p1", entries[:before], 0)
	v := vectors{
		Comment:  "full.tar and incremental.tar beside this file are of these keys and entries, mixed.tar is of the same keys; hashes and CBOR in hex",
		RootSeed: hex.EncodeToString(s.root.Seed()), OnlineSeed: hex.EncodeToString(s.online.Seed()),
		RootKey: s.key(s.root), Fingerprint: s.key(s.root).Fingerprint(), Log: log.ID.String(), Checkpoint: string(log.Checkpoint),
		State:   hex.EncodeToString(log.State[:]),
		Bundles: map[string]string{"full.tar": written.Bundle, "incremental.tar": next.Bundle, "mixed.tar": both.Bundle},
	}
	var tree entry.Tree
	for value := range log.Values() {
		leaf, err := entry.Leaf(log.ID, tree.Size(), value)
		if err != nil {
			t.Fatal(err)
		}
		tree.Append(leaf)
		e, err := entry.Decode(value)
		if err != nil {
			t.Fatal(err)
		}
		root := tree.Root()
		v.Entries = append(v.Entries, vector{Kind: e.Kind, Value: hex.EncodeToString(value), Leaf: hex.EncodeToString(leaf[:]), Root: hex.EncodeToString(root[:])})
	}
	index, err := indexContent(written.Images)
	if err != nil {
		t.Fatal(err)
	}
	v.Index = string(index)
	document, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{"full.tar": full, "incremental.tar": incremental, "mixed.tar": mixed, "vectors.json": append(document, '\n')}
}

// TestPublishedVectors holds this build against the files of its format version
// that were published: they never change again.
func TestPublishedVectors(t *testing.T) {
	dir := filepath.Join("testdata", "v1")
	for name, want := range published(t) {
		path := filepath.Join(dir, name)
		if *update {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		have, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(have, want) && filepath.Ext(name) == ".json" {
			t.Errorf("%s: %s", path, cmp.Diff(string(have), string(want)))
		} else if !bytes.Equal(have, want) {
			t.Errorf("%s: this build writes other bytes", path)
		}
		if filepath.Ext(name) != ".tar" {
			continue
		}
		s := newSite(t, "site-a", 10)
		if _, _, err := readAll(bytes.NewReader(have), s.trusted); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
}
