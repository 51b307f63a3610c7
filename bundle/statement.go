package bundle

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
)

// Paths of the format.
const (
	pathLayout    = "oci-layout"
	pathStatement = "atoll/statement.dsse.json"
	pathManifest  = "atoll/manifest.json"
	pathSignature = "atoll/manifest.json.sig"
	pathIndex     = "index.json"
	dirKeys       = "atoll/keys/"
	dirJournal    = "atoll/journal/"
	dirBlobs      = "blobs/"
)

const layoutContent = `{"imageLayoutVersion":"1.0.0"}`

// Types of the in-toto statement.
const (
	payloadType     = "application/vnd.in-toto+json"
	statementType   = "https://in-toto.io/Statement/v1"
	predicatePrefix = "https://github.com/atoll-registry/atoll/bundle/v"
)

// Limits, in bytes unless said otherwise. They bound what a reader holds in
// memory before and after it knows whom it listens to.
const (
	maxStatement = 4 << 20
	maxManifest  = 48 << 20
	maxSignature = 256
	maxKeys      = 1 << 20
	maxIndex     = 48 << 20
	maxNote      = 8 << 10
	maxOCI       = 16 << 20 // an image manifest or index
	maxScopes    = 4096     // logs
)

// Kinds of bundle.
const (
	KindFull        = "full"        // every log from its first entry
	KindIncremental = "incremental" // at least one log from a later one
)

// Origin is the site that wrote a bundle.
type Origin struct {
	Site        string `json:"site"`
	Incarnation string `json:"incarnation"`
	Name        string `json:"name"` // a label
}

// Mark is a place in a log: the number of entries before it.
type Mark struct {
	entry.LogID
	Size uint64 `json:"size"`
}

// Goal is where an import of the bundle takes a log.
type Goal struct {
	entry.LogID
	Project string `json:"project"` // its name at its origin
	Size    uint64 `json:"size"`
	Root    string `json:"root"`  // of the log's tree, hex
	State   string `json:"state"` // of the scope's state, hex
}

// Predicate is what the statement says of the bundle.
type Predicate struct {
	Format     int      `json:"format"`
	Bundle     string   `json:"bundle"` // the bundle's id
	Kind       string   `json:"kind"`
	Source     Origin   `json:"source"`
	Recipients []string `json:"recipients"` // site ids, sorted; none: whoever trusts the source
	Created    int64    `json:"created"`    // Unix seconds: the newest entry's, not the clock's
	Basis      []Mark   `json:"basis"`      // logs that do not begin at 0
	Target     []Goal   `json:"target"`
	Size       int64    `json:"size"` // of all files that the manifest names
	Reads      Level    `json:"reads"`
}

// Level is the newest that a site reads: formats, and features in them.
type Level struct {
	Format  int `json:"format"`
	Feature int `json:"feature"`
}

// From is the place where the bundle begins a log.
func (p *Predicate) From(log entry.LogID) uint64 {
	for _, mark := range p.Basis {
		if mark.LogID == log {
			return mark.Size
		}
	}
	return 0
}

type statement struct {
	Type          string    `json:"_type"`
	Subject       []subject `json:"subject"`
	PredicateType string    `json:"predicateType"`
	Predicate     Predicate `json:"predicate"`
}

type subject struct {
	Name   string            `json:"name"`
	Digest map[string]string `json:"digest"`
}

// File is one file that the manifest names, with one hash: a blob has the one
// that manifests and entries name it by, every other file SHA-256.
type File struct {
	Path   string `json:"path"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256,omitempty"` // hex
	SHA512 string `json:"sha512,omitempty"` // hex
	Role   string `json:"role"`
}

// Digest is the file's digest.
func (f File) Digest() digest.Digest {
	if f.SHA512 != "" {
		return digest.NewDigestFromEncoded(digest.SHA512, f.SHA512)
	}
	return digest.NewDigestFromEncoded(digest.SHA256, f.SHA256)
}

// blobFile is the file of a blob.
func blobFile(d digest.Digest, size int64, role string) File {
	f := File{Path: dirBlobs + d.Algorithm().String() + "/" + d.Encoded(), Size: size, Role: role}
	if d.Algorithm() == digest.SHA512 {
		f.SHA512 = d.Encoded()
	} else {
		f.SHA256 = d.Encoded()
	}
	return f
}

// manifest names every file of a bundle but the statement, itself and its
// signature, in the order of the tar.
type manifest struct {
	Format int             `json:"format"`
	Files  []File          `json:"entries"`
	Absent []digest.Digest `json:"absent"` // blobs that are known, not held, sorted
}

// newStatement builds the statement over a manifest; the id is computed here.
func newStatement(p Predicate, manifestSum [32]byte) (statement, error) {
	id, err := bundleID(p, manifestSum)
	if err != nil {
		return statement{}, err
	}
	p.Bundle = id
	return statement{
		Type:          statementType,
		Subject:       []subject{{Name: pathManifest, Digest: map[string]string{"sha256": hex.EncodeToString(manifestSum[:])}}},
		PredicateType: fmt.Sprintf("%s%d", predicatePrefix, Version),
		Predicate:     p,
	}, nil
}

// bundleID is the SHA-256, in hex, of the document of manifest hash, basis,
// target and recipients.
func bundleID(p Predicate, manifestSum [32]byte) (string, error) {
	document, err := entry.MarshalJSON(struct {
		Manifest   string   `json:"manifest"`
		Basis      []Mark   `json:"basis"`
		Target     []Goal   `json:"target"`
		Recipients []string `json:"recipients"`
	}{hex.EncodeToString(manifestSum[:]), p.Basis, p.Target, p.Recipients})
	if err != nil {
		return "", fmt.Errorf("compute bundle id: %w", err)
	}
	sum := sha256.Sum256(document)
	return hex.EncodeToString(sum[:]), nil
}

// statedFormat finds the format version in a statement of any version, so that
// a newer one is named and not called damaged.
func statedFormat(payload []byte) (int, bool) {
	var loose struct {
		PredicateType string `json:"predicateType"`
		Predicate     struct {
			Format int `json:"format"`
		} `json:"predicate"`
	}
	if json.Unmarshal(payload, &loose) != nil || !strings.HasPrefix(loose.PredicateType, predicatePrefix) {
		return 0, false
	}
	return loose.Predicate.Format, true
}

// check refuses a statement that a writer would not have written, given its
// manifest.
func (s *statement) check(m *manifest, manifestSum [32]byte) error {
	want, err := newStatement(s.Predicate, manifestSum)
	if err != nil {
		return err
	}
	p := &s.Predicate
	switch {
	case s.Type != want.Type || s.PredicateType != want.PredicateType || p.Format != Version || m.Format != Version:
		return altered("%s: not a statement of format %d", pathStatement, Version)
	case len(s.Subject) != 1 || s.Subject[0].Name != want.Subject[0].Name || len(s.Subject[0].Digest) != 1 ||
		s.Subject[0].Digest["sha256"] != want.Subject[0].Digest["sha256"]:
		return altered("%s is not the manifest that the statement was made for", pathManifest)
	case p.Bundle != want.Predicate.Bundle:
		return altered("%s: the bundle's id is not the one of its contents", pathStatement)
	case !entry.ValidID(p.Source.Site) || !entry.ValidID(p.Source.Incarnation) || len(p.Source.Name) > 255:
		return altered("%s: source %q", pathStatement, p.Source)
	case p.Recipients == nil || p.Basis == nil || p.Target == nil || m.Absent == nil:
		return altered("%s: an empty list is written as null", pathStatement)
	case p.Reads.Format < Version || p.Reads.Feature < 0:
		return altered("%s: reads format %d", pathStatement, p.Reads.Format)
	}
	if err := p.checkVectors(); err != nil {
		return err
	}
	var total int64
	for _, f := range m.Files {
		if f.Size < 0 || total > 1<<62-f.Size {
			return altered("%s: size of %s", pathManifest, f.Path)
		}
		total += f.Size
	}
	if total != p.Size {
		return altered("%s: says %d bytes, the manifest's entries have %d", pathStatement, p.Size, total)
	}
	return m.check(p)
}

func (p *Predicate) checkVectors() error {
	for i, site := range p.Recipients {
		if !entry.ValidID(site) || i > 0 && site <= p.Recipients[i-1] {
			return altered("%s: recipients are not sorted ids", pathStatement)
		}
	}
	if len(p.Target) == 0 || len(p.Target) > maxScopes {
		return altered("%s: %d logs, a bundle has 1 to %d", pathStatement, len(p.Target), maxScopes)
	}
	from := map[entry.LogID]uint64{}
	for i, mark := range p.Basis {
		if mark.Size == 0 || i > 0 && mark.LogID.Compare(p.Basis[i-1].LogID) <= 0 {
			return altered("%s: basis of log %s", pathStatement, mark.LogID)
		}
		from[mark.LogID] = mark.Size
	}
	kind, found := KindFull, 0
	for i, goal := range p.Target {
		_, rootOK := hex32(goal.Root)
		_, stateOK := hex32(goal.State)
		if goal.Validate() != nil || goal.Scope == entry.GlobalScope || i > 0 && goal.LogID.Compare(p.Target[i-1].LogID) <= 0 ||
			goal.Size == 0 || goal.Size < from[goal.LogID] || !rootOK || !stateOK || !entry.ValidProject(goal.Project) {
			return altered("%s: target of log %s", pathStatement, goal.LogID)
		}
		if from[goal.LogID] > 0 {
			kind = KindIncremental
			found++
		}
	}
	if found != len(p.Basis) || p.Kind != kind {
		return altered("%s: kind %q does not follow from the vectors", pathStatement, p.Kind)
	}
	return nil
}

// sites are the sites whose key chains a bundle brings: the source, then the
// other origins of its logs, sorted.
func (p *Predicate) sites() []string {
	var others []string
	for _, goal := range p.Target {
		if goal.Site != p.Source.Site && !slices.Contains(others, goal.Site) {
			others = append(others, goal.Site)
		}
	}
	slices.Sort(others)
	return append([]string{p.Source.Site}, others...)
}

// fixedFiles gives path and role of every file before the blobs, in order.
func (p *Predicate) fixedFiles() []File {
	files := []File{{Path: pathLayout, Role: RoleLayout}}
	for _, site := range p.sites() {
		files = append(files, File{Path: dirKeys + site + ".jsonl", Role: RoleKeys})
	}
	files = append(files, File{Path: pathIndex, Role: RoleIndex})
	for _, goal := range p.Target {
		base := dirJournal + goal.LogID.String()
		files = append(files, File{Path: base + ".checkpoint", Role: RoleCheckpoint}, File{Path: base + ".entries", Role: RoleEntries})
	}
	return files
}

// check refuses a manifest whose files are not those of the statement, in the
// one order that a bundle has.
func (m *manifest) check(p *Predicate) error {
	fixed := p.fixedFiles()
	if len(m.Files) < len(fixed) {
		return altered("%s: %d entries, want at least %d", pathManifest, len(m.Files), len(fixed))
	}
	seen := map[digest.Digest]bool{}
	for i, f := range m.Files {
		d, err := entry.ParseDigest(f.Digest().String())
		if err != nil {
			return altered("%s: hash of %s", pathManifest, f.Path)
		}
		if i < len(fixed) {
			if f.SHA512 != "" || f.Path != fixed[i].Path || f.Role != fixed[i].Role || f.Size > fixedLimit(f.Role) {
				return altered("%s: entry %d is %s, role %s, %d bytes; want %s", pathManifest, i, f.Path, f.Role, f.Size, fixed[i].Path)
			}
			continue
		}
		if f != blobFile(d, f.Size, f.Role) || blobRank(f.Role) < 0 || seen[d] || f.Role == RoleManifest && f.Size > maxOCI {
			return altered("%s: entry %d, %s, role %s, %d bytes", pathManifest, i, path.Base(f.Path), f.Role, f.Size)
		}
		seen[d] = true
		if last := m.Files[i-1]; i > len(fixed) && compareBlobs(last, f) >= 0 {
			return altered("%s: entry %d, %s, is out of order", pathManifest, i, f.Path)
		}
	}
	if first := m.Files[0]; first.Size != int64(len(layoutContent)) || first.SHA256 != hexSum([]byte(layoutContent)) {
		return altered("%s: entry 0 is not the one of %s", pathManifest, pathLayout)
	}
	for i, absent := range m.Absent {
		if _, err := entry.ParseDigest(absent.String()); err != nil || seen[absent] || i > 0 && absent <= m.Absent[i-1] {
			return altered("%s: absent blob %q", pathManifest, absent)
		}
	}
	return nil
}

func fixedLimit(role string) int64 {
	switch role {
	case RoleKeys:
		return maxKeys
	case RoleIndex:
		return maxIndex
	case RoleCheckpoint:
		return maxNote
	}
	return 1 << 62
}

// blobRank orders the roles of blobs; -1 for another role.
func blobRank(role string) int {
	return slices.Index([]string{RoleManifest, RoleConfig, RoleLayer}, role)
}

// compareBlobs orders the blobs of a bundle: by role, then by digest.
func compareBlobs(a, b File) int {
	return cmp.Or(blobRank(a.Role)-blobRank(b.Role), cmp.Compare(a.Digest(), b.Digest()))
}

func hex32(s string) (sum [32]byte, ok bool) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != 32 || hex.EncodeToString(b) != s {
		return sum, false
	}
	return [32]byte(b), true
}

func hexSum(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// project is the name that a log's project has at its origin.
func (p *Predicate) project(log entry.LogID) string {
	for _, goal := range p.Target {
		if goal.LogID == log {
			return goal.Project
		}
	}
	return ""
}

func preludeLimit(path string) int64 {
	switch path {
	case pathStatement:
		return maxStatement
	case pathManifest:
		return maxManifest
	}
	return maxSignature
}
