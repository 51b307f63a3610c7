package bundle

import (
	"bytes"
	"cmp"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
)

// What a bundle holds is a function of its logs and of the manifests that they
// name. The writer computes it to know what to write; the reader computes it
// again to refuse everything else.

// ledger follows one log through the bundle.
type ledger struct {
	log       entry.LogID
	from      uint64
	project   string // as the newest project.put in the bundle says
	tree      *entry.Tree
	state     entry.State
	artifacts map[string]entry.Entry   // live, by repository NUL digest
	tags      map[string]digest.Digest // live, by repository NUL tag
	lastAt    int64
	seen      bool
}

func newLedger(log entry.LogID, tree *entry.Tree) *ledger {
	return &ledger{log: log, from: tree.Size(), tree: tree, artifacts: map[string]entry.Entry{}, tags: map[string]digest.Digest{}}
}

// add takes the next entry of the log.
func (l *ledger) add(value []byte) (entry.Entry, error) {
	seq := l.tree.Size()
	e, err := entry.Decode(value)
	if err != nil {
		return e, fmt.Errorf("entry %d: %w", seq, err)
	}
	if seq == 0 && e.Kind != entry.ProjectPut {
		return e, fmt.Errorf("entry 0 is a %s, a log begins with %s", e.Kind, entry.ProjectPut)
	}
	leaf, err := entry.Leaf(l.log, seq, value)
	if err != nil {
		return e, err
	}
	l.tree.Append(leaf)
	if err := l.state.Apply(e); err != nil {
		return e, fmt.Errorf("entry %d: %w", seq, err)
	}
	l.lastAt, l.seen = e.At, true
	switch e.Kind {
	case entry.ProjectPut:
		l.project = e.Name
	case entry.ArtifactPut:
		l.artifacts[e.Repository+"\x00"+string(e.Digest)] = e
	case entry.ArtifactDelete:
		delete(l.artifacts, e.Repository+"\x00"+string(e.Digest))
	case entry.TagPut:
		l.tags[e.Repository+"\x00"+e.Tag] = e.Digest
	case entry.TagDelete:
		delete(l.tags, e.Repository+"\x00"+e.Tag)
	}
	return e, nil
}

// sum is a digest in its short form: maps of them are what memory goes to.
type sum struct {
	algorithm uint8             // its place in entry.Algorithms
	hash      [sha512.Size]byte // zero after the end of a shorter one
}

func sumOf(d digest.Digest) (s sum, err error) {
	if _, err := entry.ParseDigest(d.String()); err != nil {
		return s, err
	}
	s.algorithm = uint8(slices.Index(entry.Algorithms(), d.Algorithm()))
	_, err = hex.Decode(s.hash[:], []byte(d.Encoded()))
	return s, err
}

func (s sum) digest() digest.Digest {
	a := entry.Algorithms()[s.algorithm]
	return digest.NewDigestFromBytes(a, s.hash[:a.Size()])
}

// compare orders sums as their digests are ordered.
func (s sum) compare(t sum) int {
	return cmp.Or(cmp.Compare(s.algorithm, t.algorithm), bytes.Compare(s.hash[:], t.hash[:]))
}

// reference is how one manifest, or an entry, names a blob.
//
// The size that a descriptor states is not looked at: a manifest is carried as
// its site accepted it, and the hash of every blob tells the truth anyway.
type reference struct {
	sum  sum
	rank int8 // index in the order of blob roles
}

// graph is the manifests of a bundle and what they name.
type graph struct {
	ledgers []*ledger
	edges   map[sum][]reference
}

// roots are the manifests that live artifact entries name.
func (g *graph) roots() ([]reference, error) {
	var roots []reference
	for _, l := range g.ledgers {
		for _, key := range slices.Sorted(maps.Keys(l.artifacts)) {
			e := l.artifacts[key]
			s, err := sumOf(e.Digest)
			if err != nil {
				return nil, fmt.Errorf("artifact of project %s, repository %s: %w", l.project, e.Repository, err)
			}
			roots = append(roots, reference{sum: s})
		}
	}
	return roots, nil
}

// descriptor is the part of an OCI descriptor that the format looks at.
type descriptor struct {
	MediaType string        `json:"mediaType"`
	Digest    digest.Digest `json:"digest"`
}

var manifestTypes = map[string]bool{
	"application/vnd.oci.image.manifest.v1+json":                true,
	"application/vnd.oci.image.index.v1+json":                   true,
	"application/vnd.oci.artifact.manifest.v1+json":             true,
	"application/vnd.docker.distribution.manifest.v2+json":      true,
	"application/vnd.docker.distribution.manifest.list.v2+json": true,
}

// add reads what a manifest names. A subject is not among it: a referrer
// travels by an entry of its own.
func (g *graph) add(s sum, manifest []byte) error {
	var parsed struct {
		Config    *descriptor  `json:"config"`
		Layers    []descriptor `json:"layers"`
		Blobs     []descriptor `json:"blobs"`
		Manifests []descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(manifest, &parsed); err != nil {
		return fmt.Errorf("manifest %s: %w", s.digest(), err)
	}
	edges := []reference{}
	name := func(d descriptor, role string) error {
		target, err := sumOf(d.Digest)
		if err != nil {
			return fmt.Errorf("manifest %s: %w", s.digest(), err)
		}
		edges = append(edges, reference{sum: target, rank: int8(blobRank(role))})
		return nil
	}
	if parsed.Config != nil {
		if err := name(*parsed.Config, RoleConfig); err != nil {
			return err
		}
	}
	for _, d := range slices.Concat(parsed.Layers, parsed.Blobs) {
		if err := name(d, RoleLayer); err != nil {
			return err
		}
	}
	for _, d := range parsed.Manifests {
		role := RoleLayer
		if manifestTypes[d.MediaType] {
			role = RoleManifest
		}
		if err := name(d, role); err != nil {
			return err
		}
	}
	g.edges[s] = edges
	return nil
}

// reach lists everything that the live artifacts reach, each blob once with the
// first role it has, in the order of the tar. A manifest whose edges were not
// added counts as a blob that names nothing.
func (g *graph) reach() ([]reference, error) {
	queue, err := g.roots()
	if err != nil {
		return nil, err
	}
	found := map[sum]reference{}
	for len(queue) > 0 {
		next := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		known, ok := found[next.sum]
		if ok && known.rank <= next.rank {
			continue
		}
		found[next.sum] = next
		if next.rank == 0 {
			queue = append(queue, g.edges[next.sum]...)
		}
	}
	return slices.SortedFunc(maps.Values(found), func(a, b reference) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), a.sum.compare(b.sum))
	}), nil
}

// Image is an artifact of a bundle as a person looks for it.
type Image struct {
	Project    string        `json:"project"` // at its origin
	Repository string        `json:"repository"`
	Tag        string        `json:"tag"` // "" for an untagged one
	Digest     digest.Digest `json:"digest"`
	MediaType  string        `json:"media_type"`
	Type       string        `json:"artifact_type,omitempty"`
	Size       int64         `json:"size"`
	Reference  string        `json:"reference"` // the name in index.json; "" for an untagged one

	log entry.LogID
}

func (i Image) full() string { return i.Project + "/" + i.Repository + ":" + i.Tag }

// images lists what index.json names, given the manifests that the bundle
// holds: every tag, then the manifests that neither a tag nor another manifest
// leads to.
func (g *graph) images(held map[sum]bool, project func(entry.LogID) string) ([]Image, error) {
	var tagged, bare []Image
	covered := map[sum]bool{}
	for s, edges := range g.edges {
		for _, edge := range edges {
			covered[edge.sum] = covered[edge.sum] || held[s]
		}
	}
	for _, l := range g.ledgers {
		for _, key := range slices.Sorted(maps.Keys(l.tags)) {
			repository, tag, _ := strings.Cut(key, "\x00")
			e, ok := l.artifacts[repository+"\x00"+string(l.tags[key])]
			if !ok {
				continue // of an artifact that came with an earlier bundle
			}
			s, err := sumOf(e.Digest)
			if err != nil || !held[s] {
				continue
			}
			covered[s] = true
			image := imageOf(l.log, project(l.log), e)
			image.Tag = tag
			tagged = append(tagged, image)
		}
	}
	for _, l := range g.ledgers {
		for _, key := range slices.Sorted(maps.Keys(l.artifacts)) {
			e := l.artifacts[key]
			s, err := sumOf(e.Digest)
			if err != nil || covered[s] || !held[s] {
				continue
			}
			covered[s] = true
			bare = append(bare, imageOf(l.log, project(l.log), e))
		}
	}
	name(tagged)
	slices.SortStableFunc(bare, func(a, b Image) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	return append(tagged, bare...), nil
}

func imageOf(log entry.LogID, project string, e entry.Entry) Image {
	return Image{log: log, Project: project, Repository: e.Repository, Digest: e.Digest, MediaType: e.MediaType, Type: e.ArtifactType, Size: e.Size}
}

// maxReference is the length of the longest valid tag.
const maxReference = 128

// name gives every tagged image its name in index.json: project, path elements
// of the repository and tag joined by "--". Where that is too long, or names
// two images, a hash of what it stands for makes it unique.
func name(images []Image) {
	plain := func(i Image) string {
		return strings.ReplaceAll(i.Project+"/"+i.Repository, "/", "--") + "--" + i.Tag
	}
	count := map[string]int{}
	for _, image := range images {
		count[plain(image)]++
	}
	for i, image := range images {
		name := plain(image)
		if count[name] > 1 || len(name) > maxReference {
			hash := "-" + hexSum([]byte(image.log.String() + " " + image.full()))[:16]
			name = name[:min(len(name), maxReference-len(hash))] + hash
		}
		images[i].Reference = name
	}
}

// index is index.json: fields in this order, so that the bytes are fixed.
type index struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Manifests     []indexEntry `json:"manifests"`
}

type indexEntry struct {
	MediaType    string            `json:"mediaType"`
	ArtifactType string            `json:"artifactType,omitempty"`
	Digest       digest.Digest     `json:"digest"`
	Size         int64             `json:"size"`
	Annotations  map[string]string `json:"annotations,omitempty"`
}

func indexContent(images []Image) ([]byte, error) {
	out := index{SchemaVersion: 2, MediaType: "application/vnd.oci.image.index.v1+json", Manifests: []indexEntry{}}
	for _, image := range images {
		e := indexEntry{MediaType: image.MediaType, ArtifactType: image.Type, Digest: image.Digest, Size: image.Size}
		if image.Tag != "" {
			e.Annotations = map[string]string{
				"io.containerd.image.name":          image.full(),
				"org.opencontainers.image.ref.name": image.Reference,
			}
		}
		out.Manifests = append(out.Manifests, e)
	}
	return entry.MarshalJSON(out)
}
