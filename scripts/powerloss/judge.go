package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// bootFile is where the content store keeps which run of the kernel opened it.
const bootFile = "content/boot"

// otherBoot is a run of the kernel before this one: a power cut ends it.
const otherBoot = "00000000-0000-4000-8000-000000000000"

// scene is what a start finds after a loss, and what it must hold then.
type scene struct {
	moment int // the change of the disk after which the power went
	loss   loss
	image  image
	held   held
}

// held is what was acknowledged up to a moment.
type held struct {
	blobs     []digest.Digest
	manifests []digest.Digest
	// tags may be what was acknowledged last, or what was under way after it; ""
	// is none.
	tags map[string][]digest.Digest
}

// holding gives what must be held when these ids were answered.
func holding(deeds []deed, answered map[string]bool) held {
	h := held{tags: map[string][]digest.Digest{}}
	for _, d := range deeds {
		switch known := h.tags[d.tag]; {
		case !answered[d.id]:
			if d.tag != "" && len(known) < 2 { // one client writes the tag, one write after the other
				if known == nil {
					known = []digest.Digest{""}
				}
				h.tags[d.tag] = append(known, d.to)
			}
		case d.tag != "":
			h.tags[d.tag] = []digest.Digest{d.to}
			if d.to != "" {
				h.manifests = append(h.manifests, d.to)
			}
		case d.blob != "":
			h.blobs = append(h.blobs, d.blob)
		}
	}
	return h
}

// mark is equal for scenes with the same files and the same to hold.
func (s scene) mark(seed maphash.Seed) uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	for _, path := range slices.Sorted(maps.Keys(s.image)) {
		fmt.Fprintf(&h, "%q", path)
		if c := s.image[path]; c != nil {
			c.mark(&h, seed)
		}
	}
	fmt.Fprintf(&h, "%v %v", s.loss == killed, s.held) // fmt sorts maps
	return h.Sum64()
}

// lay writes an image to a directory. After a power cut another run of the kernel
// opens it.
func (s scene) lay(root, boot string) error {
	for path, b := range s.image {
		name := filepath.Join(root, path)
		if b == nil {
			if err := os.MkdirAll(name, 0o700); err != nil {
				return err
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			return err
		}
		if path == bootFile && s.loss != killed && string(b.bytes()) == boot {
			b = &content{}
			b.put(0, []byte(otherBoot))
		}
		if err := b.lay(name); err != nil {
			return err
		}
	}
	return nil
}

// lay writes a file without its zeros.
func (c *content) lay(name string) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = f.Truncate(c.size)
	for i := 0; i < len(c.pages) && err == nil; i++ {
		if b := c.part(i); b != nil {
			_, err = f.WriteAt(b, int64(i)*pageSize)
		}
	}
	return errors.Join(err, f.Close())
}

// judge starts a node on what a loss has left and asks it for everything that was
// acknowledged; the error says what is missing.
func (s scene) judge(ctx context.Context, binary, dir, boot string) (err error) {
	root, err := os.MkdirTemp(dir, "scene")
	if err != nil {
		return err
	}
	defer func() {
		if err == nil {
			err = os.RemoveAll(root)
			return
		}
		err = fmt.Errorf("after change %d, %s: %w (the directory is kept: %s)", s.moment, s.loss, err, root)
	}()
	data := filepath.Join(root, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		return err
	}
	if err := s.lay(data, boot); err != nil {
		return err
	}
	n, err := start(ctx, elsewhere(), data, binary)
	if err != nil {
		return err
	}
	defer n.kill()
	if err := s.held.ask(ctx, n); err != nil {
		return fmt.Errorf("%w\n%s", err, n.end())
	}
	// It goes on as a node does.
	c := &client{node: n, name: "after", dice: rand.New(rand.NewPCG(1, uint64(s.moment)))}
	c.push(ctx, "after")
	if c.err != nil {
		return fmt.Errorf("the node takes no push any more: %w\n%s", c.err, n.end())
	}
	last := c.deeds[len(c.deeds)-1]
	if err := pull(ctx, n, "after", last.to); err != nil {
		return err
	}
	return verified(filepath.Join(data, "content/blobs"))
}

// ask pulls all that must be held.
func (h held) ask(ctx context.Context, n *node) error {
	for _, d := range h.blobs {
		if err := blob(ctx, n, d); err != nil {
			return err
		}
	}
	for _, d := range h.manifests {
		if err := pull(ctx, n, d.String(), d); err != nil {
			return err
		}
	}
	for tag, may := range h.tags {
		a, err := n.read(ctx, "/manifests/"+tag)
		if err != nil {
			return err
		}
		var is digest.Digest
		switch a.status {
		case http.StatusOK:
			is = digest.FromBytes(a.body)
		case http.StatusNotFound:
		default:
			return fmt.Errorf("tag %s: %d %s", tag, a.status, a.body)
		}
		if !slices.Contains(may, is) {
			return fmt.Errorf("tag %s is %q and may be %q", tag, is, may)
		}
	}
	return nil
}

// pull pulls a manifest and its blobs and compares the digests.
func pull(ctx context.Context, n *node, reference string, want digest.Digest) error {
	a, err := n.read(ctx, "/manifests/"+reference)
	if err != nil {
		return err
	}
	if a.status != http.StatusOK || digest.FromBytes(a.body) != want {
		return fmt.Errorf("manifest %s, acknowledged as %s: %d %.300s", reference, want, a.status, a.body)
	}
	var m v1.Manifest
	if err := json.Unmarshal(a.body, &m); err != nil {
		return err
	}
	for _, d := range append(m.Layers, m.Config) {
		if err := blob(ctx, n, d.Digest); err != nil {
			return err
		}
	}
	return nil
}

func blob(ctx context.Context, n *node, want digest.Digest) error {
	a, err := n.read(ctx, "/blobs/"+want.String())
	if err == nil && (a.status != http.StatusOK || digest.FromBytes(a.body) != want) {
		err = fmt.Errorf("blob %s, acknowledged: %d %.300q", want, a.status, a.body)
	}
	return err
}

// verified says which visible blob is not what its name says.
func verified(blobs string) error {
	return filepath.WalkDir(blobs, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || strings.HasSuffix(path, ".tmp") {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		algorithm := digest.Algorithm(filepath.Base(filepath.Dir(filepath.Dir(path))))
		if !algorithm.Available() || algorithm.FromBytes(b).Encoded() != e.Name() {
			return fmt.Errorf("%s is visible and has other bytes", path)
		}
		return nil
	})
}
