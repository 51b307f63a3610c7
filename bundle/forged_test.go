package bundle

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
)

// planned is a plan before its signatures.
func planned(t testing.TB, s *site) *plan {
	t.Helper()
	p := &plan{spec: s.spec(s.log("p1", s.project(), 0)), content: s.content, graph: graph{edges: map[sum][]reference{}}, sizes: map[sum]int64{}}
	for _, step := range []func(context.Context) error{p.readKeys, p.readLogs, p.readManifests, p.sizeBlobs, p.seal} {
		if err := step(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// forge writes a bundle with every signature in order, but with something that
// no writer writes: change strikes before the statement is signed. Where that
// makes it impossible to write to its end, zeros take the place of the rest.
func forge(t *testing.T, s *site, change func(*plan)) []byte {
	t.Helper()
	p := planned(t, s)
	change(p)
	if err := p.sign(t.Context()); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := p.emit(t.Context(), &out); err != nil {
		return append(out.Bytes(), make([]byte, 64<<10)...)
	}
	return out.Bytes()
}

func (p *plan) replace(path string, content []byte) {
	p.small[path] = content
	for i, f := range p.manifest.Files {
		if f.Path == path {
			p.predicate.Size += int64(len(content)) - f.Size
			p.manifest.Files[i].Size, p.manifest.Files[i].SHA256 = int64(len(content)), hexSum(content)
		}
	}
}

func (p *plan) values(change func([][]byte) [][]byte) {
	values := change(slices.Collect(func(yield func([]byte) bool) {
		for v := range p.spec.Logs[0].Values() {
			if !yield(v) {
				return
			}
		}
	}))
	p.spec.Logs[0].Values = each(values)
	hashed := newHashed(io.Discard, digest.SHA256)
	_ = p.eachItem(context.Background(), p.spec.Logs[0], func(item []byte, _ bool) error { return writeItem(hashed, item) })
	for i, f := range p.manifest.Files {
		if f.Role == RoleEntries {
			p.predicate.Size += hashed.size - f.Size
			p.manifest.Files[i].Size, p.manifest.Files[i].SHA256 = hashed.size, hashed.digest().Encoded()
		}
	}
}

func TestForgedBySomebodyWithTheKey(t *testing.T) {
	smuggled := digest.FromString("smuggled")
	file := blobFile(smuggled, 8, RoleLayer)
	insert := func(p *plan, f File) {
		at, _ := slices.BinarySearchFunc(p.manifest.Files[8:], f, compareBlobs)
		p.manifest.Files = slices.Insert(p.manifest.Files, 8+at, f)
		p.predicate.Size += f.Size
	}
	for name, change := range map[string]func(*plan){
		"a blob that nothing reaches":     func(p *plan) { insert(p, file) },
		"a manifest that nothing reaches": func(p *plan) { f := file; f.Role = RoleManifest; insert(p, f) },
		"a missing blob": func(p *plan) {
			last := len(p.manifest.Files) - 1
			p.predicate.Size -= p.manifest.Files[last].Size
			p.manifest.Files = p.manifest.Files[:last]
		},
		"an absent blob that nothing names": func(p *plan) { p.manifest.Absent = []digest.Digest{smuggled} },
		"an absent blob of no algorithm":    func(p *plan) { p.manifest.Absent = []digest.Digest{digest.Digest(smuggled.Encoded())} },
		"a blob with two hashes": func(p *plan) {
			f := &p.manifest.Files[len(p.manifest.Files)-1]
			f.SHA512 = digest.SHA512.FromBytes(p.content.(memory)[f.Digest()]).Encoded()
		},
		"a blob by another hash than it is named by": func(p *plan) {
			last := len(p.manifest.Files) - 1
			f := p.manifest.Files[last]
			data := p.content.(memory)[f.Digest()]
			p.manifest.Files[last] = blobFile(digest.SHA512.FromBytes(data), f.Size, f.Role)
		},
		"a blob without a hash": func(p *plan) { p.manifest.Files[len(p.manifest.Files)-1].SHA256 = "" },
		"an index by SHA-512": func(p *plan) {
			for i, f := range p.manifest.Files {
				if f.Role == RoleIndex {
					p.manifest.Files[i].SHA256, p.manifest.Files[i].SHA512 = "", digest.SHA512.FromBytes(p.index).Encoded()
				}
			}
		},
		"blobs out of order":     func(p *plan) { last := len(p.manifest.Files) - 1; slices.Reverse(p.manifest.Files[last-1:]) },
		"a blob in another role": func(p *plan) { p.manifest.Files[len(p.manifest.Files)-1].Role = RoleConfig },
		"a file outside":         func(p *plan) { p.manifest.Files[len(p.manifest.Files)-1].Path = "../etc/passwd" },
		"an unknown role":        func(p *plan) { p.manifest.Files[len(p.manifest.Files)-1].Role = "delta" },
		"an index with one tag more": func(p *plan) {
			var i index
			if err := json.Unmarshal(p.index, &i); err != nil {
				t.Fatal(err)
			}
			more := i.Manifests[0]
			more.Annotations = map[string]string{"org.opencontainers.image.ref.name": "lib--app--v9"}
			i.Manifests = append(i.Manifests, more)
			content, _ := entry.MarshalJSON(i)
			p.replace(pathIndex, content)
		},
		"an index with a space":  func(p *plan) { p.replace(pathIndex, append([]byte(" "), p.index...)) },
		"another layout":         func(p *plan) { p.replace(pathLayout, []byte(`{"imageLayoutVersion":"1.0.1"}`)) },
		"an entry more":          func(p *plan) { p.values(func(v [][]byte) [][]byte { return append(v, v[len(v)-1]) }) },
		"an entry less":          func(p *plan) { p.values(func(v [][]byte) [][]byte { return v[:len(v)-1] }) },
		"entries swapped":        func(p *plan) { p.values(func(v [][]byte) [][]byte { v[1], v[2] = v[2], v[1]; return v }) },
		"an entry of garbage":    func(p *plan) { p.values(func(v [][]byte) [][]byte { v[1] = []byte{1}; return v }) },
		"another root":           func(p *plan) { p.predicate.Target[0].Root = p.predicate.Target[0].State },
		"another state":          func(p *plan) { p.predicate.Target[0].State = p.predicate.Target[0].Root },
		"another project":        func(p *plan) { p.predicate.Target[0].Project = "other" },
		"a project that is none": func(p *plan) { p.predicate.Target[0].Project = "../x" },
		"a larger log":           func(p *plan) { p.predicate.Target[0].Size++ },
		"a basis that is not": func(p *plan) {
			p.predicate.Basis = []Mark{{p.predicate.Target[0].LogID, 3}}
			p.predicate.Kind = KindIncremental
		},
		"a basis of another log": func(p *plan) {
			p.predicate.Basis = []Mark{{entry.LogID{Site: "x", Incarnation: "y", Scope: "z"}, 3}}
		},
		"another kind":        func(p *plan) { p.predicate.Kind = KindIncremental },
		"another size":        func(p *plan) { p.predicate.Size++ },
		"a negative file":     func(p *plan) { p.manifest.Files[len(p.manifest.Files)-1].Size = -1 },
		"unsorted recipients": func(p *plan) { p.predicate.Recipients = []string{"b", "a"} },
		"no lists":            func(p *plan) { p.predicate.Recipients = nil },
		"the global scope":    func(p *plan) { p.predicate.Target[0].Scope = entry.GlobalScope },
		"a log twice":         func(p *plan) { p.predicate.Target = append(p.predicate.Target, p.predicate.Target[0]) },
		"an older format":     func(p *plan) { p.manifest.Format = 0 },
		"another checkpoint": func(p *plan) {
			c, err := entry.ParseCheckpoint(p.spec.Logs[0].Checkpoint)
			if err != nil {
				t.Fatal(err)
			}
			c.At++
			signed, _ := c.Sign(p.spec.Key)
			p.replace(dirJournal+p.spec.Logs[0].ID.String()+".checkpoint", signed)
		},
	} {
		s := newSite(t, "site-a", 10)
		s.content.put(digest.SHA256, "smuggled")
		data := forge(t, s, change)
		_, _, err := readAll(bytes.NewReader(data), s.trusted)
		if !errors.Is(err, ErrAltered) && !errors.Is(err, ErrNotBundle) && !errors.Is(err, ErrUntrusted) {
			t.Errorf("%s: %v", name, err)
		}
	}
	s := newSite(t, "site-a", 10)
	if _, _, err := readAll(bytes.NewReader(forge(t, s, func(*plan) {})), s.trusted); err != nil {
		t.Errorf("nothing changed: %v", err)
	}
}

func TestSignedByAnotherOnlineKey(t *testing.T) {
	s := newSite(t, "site-a", 10)
	data := forge(t, s, func(p *plan) { p.spec.Key = seeded(99) })
	if _, _, err := readAll(bytes.NewReader(data), s.trusted); !errors.Is(err, ErrUntrusted) {
		t.Errorf("have %v", err)
	}
}

func FuzzReader(f *testing.F) {
	s, data := sample(f)
	f.Add(data)
	f.Add(data[:len(data)/2])
	f.Add([]byte{})
	root := s.key(s.root)
	trusted := func(id string) (entry.Key, bool) { return root, id == "site-a" }
	f.Fuzz(func(t *testing.T, input []byte) {
		if _, _, err := readAll(bytes.NewReader(input), trusted); err == nil && !bytes.Equal(input, data) {
			t.Error("accepted what the site did not sign")
		}
		// With the key inside, everything is reached; nothing may panic.
		b, err := Open(bytes.NewReader(input))
		if err != nil {
			return
		}
		_, _, _ = readAll(bytes.NewReader(input), func(site string) (entry.Key, bool) {
			_, root, err := b.Chain(site).Claimed()
			return root, err == nil
		})
	})
}

// FuzzTrusted mutates what is signed, so that the rules behind the signatures
// are reached: manifest, predicate and entries.
func FuzzTrusted(f *testing.F) {
	s := newSite(f, "site-a", 10)
	p := planned(f, s)
	if err := p.sign(context.Background()); err != nil {
		f.Fatal(err)
	}
	payload, err := entry.MarshalJSON(p.statement)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(payload, p.prelude[1].content)
	f.Fuzz(func(t *testing.T, payload, content []byte) {
		var s statement
		var m manifest
		if entry.UnmarshalJSON(payload, &s) != nil || entry.UnmarshalJSON(content, &m) != nil {
			return
		}
		_ = s.check(&m, [32]byte{})
	})
}

func FuzzEntries(f *testing.F) {
	s := newSite(f, "site-a", 10)
	log := s.log("p1", s.project(), 0)
	var file bytes.Buffer
	p := &plan{}
	if err := p.eachItem(context.Background(), log, func(item []byte, _ bool) error { return writeItem(&file, item) }); err != nil {
		f.Fatal(err)
	}
	f.Add(file.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		var again bytes.Buffer
		var edge []byte
		err := readEntries(bytes.NewReader(data), func(e []byte) (uint64, error) { edge = e; return 0, writeItem(&again, e) }, func(_ uint64, value []byte) error {
			_, _ = entry.Decode(value)
			return writeItem(&again, value)
		})
		if err == nil && !bytes.Equal(again.Bytes(), data) {
			t.Errorf("read %x (edge %x), which is written as %x", data, edge, again.Bytes())
		}
	})
}

func FuzzManifest(f *testing.F) {
	s := newSite(f, "site-a", 10)
	for _, content := range s.project() {
		if data, ok := s.content[content.Digest]; ok {
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		g := graph{edges: map[sum][]reference{}}
		if err := g.add(sum{}, data); err == nil {
			if _, err := g.reach(); err != nil {
				t.Error(err)
			}
		}
	})
}
