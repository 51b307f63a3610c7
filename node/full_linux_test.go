package node

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// filler takes a node's disk away, from outside its namespace.
type filler struct {
	t   *testing.T
	dir string // of the node, as this process reaches it
}

// leave writes files until so many bytes are free.
func (f filler) leave(free int64) {
	f.t.Helper()
	for i := 0; ; i++ {
		var st syscall.Statfs_t
		if err := syscall.Statfs(f.dir, &st); err != nil {
			f.t.Fatal(err)
		}
		// A block of the file system's own: the last ones go one by one.
		left := int64(st.Bavail)*st.Bsize - free
		if left < int64(st.Bsize) {
			return
		}
		name := filepath.Join(f.dir, fmt.Sprint("filler-", free, "-", i))
		if err := os.WriteFile(name, make([]byte, min(left, 1<<20)), 0o600); err != nil && !errors.Is(err, syscall.ENOSPC) {
			f.t.Fatal(err)
		}
	}
}

// clear gives it back.
func (f filler) clear() {
	f.t.Helper()
	names, err := filepath.Glob(filepath.Join(f.dir, "filler-*"))
	for _, name := range names {
		err = errors.Join(err, os.Remove(name))
	}
	if err != nil {
		f.t.Fatal(err)
	}
}

// A real process on a real disk of 96 MB that fills to the last byte: pushes are
// refused with a sentence before there is harm, pulls go on throughout, the
// process lives, and with space again everything is as before, by itself.
func TestDiskFillsToTheLastByte(t *testing.T) {
	c := startChild(t, childStart{Name: "one", Disk: "96m"})
	n := c.running()
	disk := filler{t, filepath.Join("/proc", fmt.Sprint(c.cmd.Process.Pid), "root", c.Data)}
	n.do("PUT", "/api/atoll/v1/settings/storage.min-free", []byte(`{"value":"16MiB"}`), "Content-Type", "application/json").want(http.StatusOK)
	await(t, "the node is well", func() string {
		if got := n.conditions(); len(got) > 0 {
			return fmt.Sprint(got)
		}
		return ""
	})
	kept := []pushed{n.push("library/app", "v0", content(90, 4<<20))}
	layer := content(91, 100<<10)
	for round := range 2 {
		disk.leave(12 << 20)
		n.awaitCondition("disk-low", true)
		a := n.do("POST", "/v2/library/app/blobs/uploads/?digest="+describe("", layer).Digest.String(), layer, "Content-Type", "application/octet-stream").want(http.StatusInsufficientStorage)
		if !strings.Contains(string(a.Body), "INSUFFICIENT_STORAGE") {
			t.Errorf("a push below the mark: %s", a.Body)
		}
		pullAll(n, kept)

		// To the last byte, again and again: what the ballast gives is taken as well.
		await(t, "the disk is full", func() string {
			disk.leave(0)
			// Writes of metadata go on for as long as there is room, and are
			// acknowledged or refused, never lost.
			tag := fmt.Sprint("full-", round, "-", len(kept))
			p := filling(t, kept[0], uint64(1000*round+len(kept)))
			p.answer = n.do("PUT", "/v2/library/app/manifests/"+tag, p.manifest, "Content-Type", "application/vnd.oci.image.manifest.v1+json")
			if p.answer.Status == http.StatusCreated {
				p.repository, p.tag = "library/app", tag
				kept = append(kept, p)
			}
			if got := n.conditions(); !slices.Contains(got, "disk-full") {
				return fmt.Sprint(got, p.answer.Status)
			}
			return ""
		})
		a = n.do("PUT", "/v2/library/app/manifests/none", kept[0].manifest, "Content-Type", "application/vnd.oci.image.manifest.v1+json").want(http.StatusServiceUnavailable)
		if !strings.Contains(string(a.Body), "is full") || !strings.Contains(string(a.Body), "pulls go on") {
			t.Errorf("a push on a full disk: %s", a.Body)
		}
		pullAll(n, kept)

		disk.clear()
		await(t, "the node is well again", func() string {
			if got := n.conditions(); len(got) > 0 {
				return fmt.Sprint(got)
			}
			return ""
		})
		p := n.push("library/app", fmt.Sprint("after-", round), content(uint64(92+round), 1<<20))
		p.tag = fmt.Sprint("after-", round)
		kept = append(kept, p)
		pullAll(n, kept)
		n.do("GET", "/v2/library/app/manifests/none", nil).want(http.StatusNotFound)
	}
	t.Logf("%d pushes were acknowledged, all are there", len(kept))
}

// filling is an image with the blobs of another and a manifest that takes room.
func filling(t *testing.T, p pushed, seed uint64) pushed {
	t.Helper()
	manifest, err := json.Marshal(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		Config: describe(v1.MediaTypeImageConfig, p.blobs[0]), Layers: []v1.Descriptor{describe(v1.MediaTypeImageLayer, p.blobs[1])},
		Annotations: map[string]string{"filling": base64.StdEncoding.EncodeToString(content(seed, 40<<10))},
	})
	if err != nil {
		t.Fatal(err)
	}
	p.manifest, p.digest = manifest, digest.FromBytes(manifest)
	return p
}

// pullAll holds the node to everything that it has acknowledged.
func pullAll(n *running, all []pushed) {
	n.t.Helper()
	for _, p := range all {
		tag := p.tag
		if tag == "" {
			tag = "v0"
		}
		n.pull(p, tag)
	}
}
