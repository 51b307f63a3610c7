package peers

import (
	"bytes"
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/blobs/faultfs"
	"github.com/atoll-registry/atoll/transfer"
)

// A disk that fails while a peer fetches is told of, with the blob's file; the
// peer gets the blob from another node.
func TestUnreadableForAPeer(t *testing.T) {
	s := newSite(t, 3)
	disk := faultfs.New()
	store, err := blobs.Open("/", blobs.Options{FS: disk})
	if err != nil {
		t.Fatal(err)
	}
	content := []byte(strings.Repeat("atoll", 1000))
	d := digest.FromBytes(content)
	if _, err := store.Put(t.Context(), d, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	for _, name := range disk.Dump("blobs") {
		disk.Spoil(name, syscall.EIO)
	}
	broken := s.nodes[0]
	broken.Store = store
	told := make(chan error, 100)
	broken.Report(func(got digest.Digest, file blobs.File, cause error) {
		if got != d {
			t.Errorf("told of %s", got)
		}
		told <- errors.Join(cause, store.Quarantine(got, file))
	}, nil)
	// What the stream's server does for a peer.
	held, err := source{broken.Peers}.Open(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if _, err := held.ReadAt(make([]byte, 10), 0); !blobs.Unreadable(err) {
		t.Fatalf("reading it gives %v", err)
	}
	if err := <-told; !errors.Is(err, syscall.EIO) {
		t.Fatalf("told of %v", err)
	}
	if _, err := (source{broken.Peers}).Open(t.Context(), d); !errors.Is(err, transfer.ErrNotHeld) {
		t.Fatalf("a quarantined blob opens: %v", err)
	}
	// Bring gets it back, and says when nobody has it.
	s.run()
	if err := broken.Bring(t.Context(), d, int64(len(content))); !errors.Is(err, transfer.ErrNoHolder) {
		t.Fatalf("Bring of what nobody has: %v", err)
	}
	if _, err := s.nodes[2].Store.Put(t.Context(), d, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	other := s.nodes[1]
	if err := other.Bring(t.Context(), d, int64(len(content))); err != nil {
		t.Fatal(err)
	}
	if got, err := other.Store.Stat(d); err != nil || got.Size != int64(len(content)) {
		t.Fatalf("%+v, %v", got, err)
	}
	belongs := 0
	for _, n := range s.nodes {
		is, err := n.Belongs(d)
		if err != nil {
			t.Fatal(err)
		}
		if is {
			belongs++
		}
	}
	if want := min(replicas, len(s.nodes)); belongs != want {
		t.Fatalf("the blob belongs to %d nodes of %d, want %d", belongs, len(s.nodes), want)
	}
}
