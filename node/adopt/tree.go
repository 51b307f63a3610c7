package adopt

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/node/fault"
)

// tree is the storage directory of another registry. What it says is what is
// written there, no more.
type tree interface {
	kind() string
	// repositories lists the names of all repositories, sorted.
	repositories() ([]string, error)
	// read lists what a repository holds; what cannot be read is a problem.
	read(repository string) (contents, []Problem)
	// find gives the file that should hold a blob of a repository; an error that
	// is fs.ErrNotExist when there is none.
	find(repository string, d digest.Digest) (string, error)
}

// contents of a repository.
type contents struct {
	manifests []digest.Digest          // all, tagged or not
	types     map[digest.Digest]string // media types, where the directory knows them
	tags      map[string]digest.Digest
}

func newContents() contents {
	return contents{types: map[digest.Digest]string{}, tags: map[string]digest.Digest{}}
}

// add notes a manifest, once.
func (c *contents) add(d digest.Digest) {
	if !slices.Contains(c.manifests, d) {
		c.manifests = append(c.manifests, d)
	}
}

// open finds out what the directory is.
func open(dir string) (tree, error) {
	if _, err := os.Stat(dir); err != nil {
		return nil, fault.Wrap(err, fault.Invalid, "the node cannot read %s; the path is one on the node's machine, and the node's user must be able to read it: %v", dir, err)
	}
	for _, root := range []string{dir, filepath.Join(dir, "v2"), filepath.Join(dir, "registry", "v2"), filepath.Join(dir, "docker", "registry", "v2")} {
		if isDir(filepath.Join(root, "repositories")) && isDir(filepath.Join(root, "blobs")) {
			return &distribution{root}, nil
		}
	}
	z := &zot{root: dir}
	names, err := z.repositories()
	if err == nil && len(names) > 0 {
		return z, nil
	}
	return nil, fault.New(fault.Invalid, "%s is neither the storage directory of distribution's registry (no docker/registry/v2 with blobs and repositories in it) nor of zot (no OCI layout in it)", dir)
}

func isDir(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.IsDir()
}

// distribution is the tree of distribution's registry, from docker/registry/v2:
//
//	blobs/sha256/ab/<hex>/data
//	repositories/<name>/_manifests/revisions/sha256/<hex>/link
//	repositories/<name>/_manifests/tags/<tag>/current/link
type distribution struct{ root string }

func (t *distribution) kind() string { return "distribution" }

func (t *distribution) repositories() (names []string, err error) {
	top := filepath.Join(t.root, "repositories")
	err = filepath.WalkDir(top, func(name string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case !e.IsDir():
			return nil
		case e.Name() == "_manifests":
			repository, err := filepath.Rel(top, filepath.Dir(name))
			if err != nil {
				return err
			}
			names = append(names, filepath.ToSlash(repository))
			return fs.SkipDir
		case strings.HasPrefix(e.Name(), "_"):
			return fs.SkipDir
		}
		return nil
	})
	slices.Sort(names)
	return names, err
}

func (t *distribution) read(repository string) (contents, []Problem) {
	c := newContents()
	var problems []Problem
	top := filepath.Join(t.root, "repositories", filepath.FromSlash(repository), "_manifests")
	for _, algorithm := range entry.Algorithms() {
		dir := filepath.Join(top, "revisions", algorithm.String())
		for _, hex := range list(dir) {
			d, err := readLink(filepath.Join(dir, hex, "link"))
			if errors.Is(err, fs.ErrNotExist) {
				continue // deleted
			}
			if err == nil && d.Encoded() != hex {
				err = fmt.Errorf("its link names %s", d)
			}
			if err != nil {
				problems = append(problems, Problem{Repository: repository, Digest: algorithm.String() + ":" + hex, Reason: reason(err)})
				continue
			}
			c.add(d)
		}
	}
	for _, tag := range list(filepath.Join(top, "tags")) {
		d, err := readLink(filepath.Join(top, "tags", tag, "current", "link"))
		if err != nil {
			problems = append(problems, Problem{Repository: repository, Tag: tag, Reason: reason(err)})
			continue
		}
		if !slices.Contains(c.manifests, d) {
			// That registry answers 404 for such a tag too.
			problems = append(problems, Problem{Repository: repository, Tag: tag, Digest: d.String(), Reason: "the tag points to a manifest that its repository does not hold"})
			continue
		}
		c.tags[tag] = d
	}
	return c, problems
}

func (t *distribution) find(_ string, d digest.Digest) (string, error) {
	name := filepath.Join(t.root, "blobs", d.Algorithm().String(), d.Encoded()[:2], d.Encoded(), "data")
	_, err := os.Stat(name)
	return name, err
}

// readLink reads a file that holds a digest and nothing else.
func readLink(name string) (digest.Digest, error) {
	text, err := readBounded(name, 1<<10)
	if err != nil {
		return "", err
	}
	d, err := entry.ParseDigest(strings.TrimSpace(string(text)))
	if err != nil {
		return "", fmt.Errorf("the link holds no digest but %.80q", text)
	}
	return d, nil
}

// list gives the names in a directory; one that is not there has none.
func list(dir string) []string {
	entries, _ := os.ReadDir(dir) // what cannot be read is missed where it is needed
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names
}

func readBounded(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("it is larger than %d bytes", limit)
	}
	return b, err
}

// zot is the tree of zot: an OCI image layout for each repository, and among
// them directories of its own, whose names no repository can have.
//
//	<name>/oci-layout, <name>/index.json, <name>/blobs/sha256/<hex>
//
// zot keeps a blob that several repositories have once: the others hold a hard
// link, or an empty file where a store cannot link. So a blob may be found in
// another repository than the one that names it.
type zot struct {
	root  string
	names []string // of repositories, once read
}

func (t *zot) kind() string { return "zot" }

func (t *zot) repositories() (names []string, err error) {
	if t.names != nil {
		return t.names, nil
	}
	err = filepath.WalkDir(t.root, func(name string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case !e.IsDir():
			return nil
		case name != t.root && (strings.HasPrefix(e.Name(), ".") || strings.HasPrefix(e.Name(), "_")):
			return fs.SkipDir
		}
		if _, err := os.Stat(filepath.Join(name, v1.ImageIndexFile)); err == nil && isDir(filepath.Join(name, v1.ImageBlobsDir)) && name != t.root {
			repository, err := filepath.Rel(t.root, name)
			if err != nil {
				return err
			}
			names = append(names, filepath.ToSlash(repository))
		}
		if e.Name() == v1.ImageBlobsDir {
			if _, err := os.Stat(filepath.Join(filepath.Dir(name), v1.ImageIndexFile)); err == nil {
				return fs.SkipDir
			}
		}
		return nil
	})
	slices.Sort(names)
	t.names = names
	return names, err
}

func (t *zot) read(repository string) (contents, []Problem) {
	c := newContents()
	file := filepath.Join(t.root, filepath.FromSlash(repository), v1.ImageIndexFile)
	text, err := readBounded(file, 256<<20)
	var index v1.Index
	if err == nil {
		err = json.Unmarshal(text, &index)
	}
	if err != nil {
		return c, []Problem{{Repository: repository, Reason: "its index.json cannot be read: " + reason(err)}}
	}
	var problems []Problem
	for _, m := range index.Manifests {
		tag := m.Annotations[v1.AnnotationRefName]
		d, err := entry.ParseDigest(m.Digest.String())
		if err != nil {
			problems = append(problems, Problem{Repository: repository, Tag: tag, Digest: m.Digest.String(), Reason: "its index.json names it by no digest that is taken"})
			continue
		}
		c.add(d)
		c.types[d] = m.MediaType
		if tag != "" {
			c.tags[tag] = d
		}
	}
	return c, problems
}

func (t *zot) find(repository string, d digest.Digest) (string, error) {
	names, err := t.repositories()
	if err != nil {
		return "", err
	}
	for _, name := range append([]string{repository}, names...) {
		file := filepath.Join(t.root, filepath.FromSlash(name), v1.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
		info, err := os.Stat(file)
		if err == nil && (info.Size() > 0 || d == d.Algorithm().FromBytes(nil)) {
			return file, nil
		}
	}
	return "", fs.ErrNotExist
}

// reason is an error in words for a report, without what the file system adds.
func reason(err error) string {
	var path *fs.PathError
	if errors.As(err, &path) {
		err = path.Err
	}
	_, text, _ := fault.Public(err)
	if fault.KindOf(err) == fault.Internal {
		text = err.Error()
	}
	return text
}
