package storage_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/distribution/v3/registry/storage/driver/inmemory"
	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/blobs/blobstest"
	"github.com/atoll-registry/atoll/node/blobs/cloud"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/storage"
)

const secret = "very-secret-key"

// world is the machine of a node and the object stores that it can reach.
type world struct {
	t     *testing.T
	data  string
	nodes int
	log   bytes.Buffer

	mu      sync.Mutex
	buckets map[string]*bucket
}

// bucket is an object store that can be away.
type bucket struct {
	storagedriver.StorageDriver
	world *world
	away  bool
	puts  int
	until int // puts that succeed before it goes away; 0: all
}

var errAway = errors.New("no route to " + secret)

func (b *bucket) answer() error {
	b.world.mu.Lock()
	defer b.world.mu.Unlock()
	if b.away {
		return errAway
	}
	return nil
}

func (b *bucket) Stat(ctx context.Context, path string) (storagedriver.FileInfo, error) {
	if err := b.answer(); err != nil {
		return nil, err
	}
	return b.StorageDriver.Stat(ctx, path)
}

func (b *bucket) PutContent(ctx context.Context, path string, content []byte) error {
	b.world.mu.Lock()
	if b.puts++; b.until > 0 && b.puts > b.until {
		b.away = true
	}
	b.world.mu.Unlock()
	if err := b.answer(); err != nil {
		return err
	}
	return b.StorageDriver.PutContent(ctx, path, content)
}

func newWorld(t *testing.T) *world {
	return &world{t: t, data: t.TempDir(), nodes: 1, buckets: map[string]*bucket{}}
}

func (w *world) bucket(name string) *bucket {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.buckets[name] == nil {
		w.buckets[name] = &bucket{StorageDriver: inmemory.New(), world: w}
	}
	return w.buckets[name]
}

func (w *world) open(ctx context.Context, kind string, parameters map[string]any) (storage.Checked, error) {
	if kind != "s3" {
		return nil, fault.New(fault.Invalid, "%q is no storage", kind)
	}
	return cloud.New(ctx, w.bucket(parameters["bucket"].(string)), cloud.Direct), nil
}

func choice(name string) storage.Choice {
	if name == "" || name == storage.Local {
		return storage.Choice{Kind: name}
	}
	return storage.Choice{Kind: "s3", Parameters: map[string]any{"bucket": name, "secretkey": secret}}
}

// node is one process of the node.
type node struct {
	*storage.Storage
	t     *testing.T
	store *blobs.Store
	stop  func()
}

// start starts the node with a choice ("" none) and lets it run when told to.
func (w *world) start(asked storage.Choice, run bool) (*node, error) {
	w.t.Helper()
	store, err := blobs.Open(filepath.Join(w.data, "content"), blobs.Options{})
	if err != nil {
		w.t.Fatal(err)
	}
	n := &node{t: w.t, store: store, stop: func() {}}
	n.Storage, err = storage.New(w.t.Context(), storage.Config{
		Data: w.data, Store: store, Members: func() (int, error) { return w.nodes, nil }, Open: w.open,
		Log: slog.New(slog.NewTextHandler(&w.log, nil)),
	}, asked)
	if err != nil || !run {
		return n, err
	}
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	})
	w.t.Cleanup(n.stop)
	return n, nil
}

func (w *world) must(asked storage.Choice) *node {
	w.t.Helper()
	n, err := w.start(asked, true)
	if err != nil {
		w.t.Fatal(err)
	}
	return n
}

func (n *node) put(content []byte) {
	n.t.Helper()
	if _, err := n.store.Put(n.t.Context(), digest.FromBytes(content), bytes.NewReader(content)); err != nil {
		n.t.Fatal(err)
	}
}

// until waits for a state of the move.
func (n *node) until(what string, ok func(storage.Status) bool) storage.Status {
	n.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	late := time.After(30 * time.Second)
	for {
		if now := n.Status(); ok(now) {
			return now
		}
		select {
		case <-tick.C:
		case <-late:
			n.t.Fatalf("waiting for %s: %+v", what, n.Status())
		}
	}
}

func over(s storage.Status) bool { return s.State != storage.Running }

func contents(n int) (all [][]byte) {
	for i := range n {
		all = append(all, blobstest.Content(uint64(i+1), 1000+i))
	}
	return all
}

// From the disk to a bucket, on to another and back, with readers all the while
// and a restart after each step.
func TestMove(t *testing.T) {
	w := newWorld(t)
	all := contents(20)
	n := w.must(choice(""))
	for _, c := range all {
		n.put(c)
	}
	for _, to := range []string{"one", "two", storage.Local} {
		began, err := n.Begin(t.Context(), storage.Request{To: choice(to), Delete: true})
		if err != nil || began.State != storage.Running {
			t.Fatalf("to %s: %+v, %v", to, began, err)
		}
		pushed := blobstest.Content(uint64(len(all)+1), 500)
		n.put(pushed)
		for _, c := range all {
			blobstest.Check(t, n.store, c) // wherever it is at the moment
		}
		all = append(all, pushed)
		done := n.until("the move", over)
		if done.State != storage.Done || done.Checked != done.Total || len(done.Problems) != 0 {
			t.Fatalf("to %s: %+v", to, done)
		}
		n.stop()
		n = w.must(choice(""))
		for _, c := range all {
			blobstest.Check(t, n.store, c)
		}
		if left, err := n.store.Elsewhere("", 100); err != nil || len(left) != 0 {
			t.Fatalf("%d blobs stay behind, %v", len(left), err)
		}
	}
	if strings.Contains(w.log.String(), secret) {
		t.Error("the log holds the secret")
	}
}

// The bucket goes away in the middle, the node is killed while it waits, and the
// next process goes on.
func TestMoveGoesOn(t *testing.T) {
	w := newWorld(t)
	all := contents(20)
	n := w.must(choice(storage.Local))
	for _, c := range all {
		n.put(c)
	}
	b := w.bucket("one")
	b.until = 8 // one of them is the check
	if _, err := n.Begin(t.Context(), storage.Request{To: choice("one"), Delete: true}); err != nil {
		t.Fatal(err)
	}
	waiting := n.until("the bucket to be missed", func(s storage.Status) bool { return s.Waiting != "" })
	if waiting.Moved != 7 || waiting.State != storage.Running || strings.Contains(waiting.Waiting, secret) {
		t.Fatalf("%+v", waiting)
	}
	n.stop()
	w.mu.Lock()
	b.until = 0
	w.mu.Unlock()
	n, err := w.start(choice(storage.Local), false) // with the old command line, and the bucket still away
	if err != nil {
		t.Fatal(err)
	}
	if now := n.Status(); now.State != storage.Running {
		t.Fatalf("%+v", now)
	}
	w.mu.Lock()
	b.away = false
	w.mu.Unlock()
	n = w.must(choice(storage.Local))
	if done := n.until("the move", over); done.State != storage.Done || done.Moved != 13 {
		t.Fatalf("%+v", done)
	}
	for _, c := range all {
		blobstest.Check(t, n.store, c)
	}
}

// A damaged blob stays, is named, and keeps the old place in use; mended, the
// move can be finished.
func TestMoveNamesDamage(t *testing.T) {
	w := newWorld(t)
	n := w.must(choice(""))
	good, bad := blobstest.Content(1, 100), blobstest.Content(2, 100)
	n.put(good)
	n.put(bad)
	d := digest.FromBytes(bad)
	file := filepath.Join(w.data, "content", "blobs", "sha256", d.Encoded()[:2], d.Encoded())
	if err := os.WriteFile(file, append(bad[:99:99], bad[99]^1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Begin(t.Context(), storage.Request{To: choice("one"), Delete: true}); err != nil {
		t.Fatal(err)
	}
	if now := n.until("the move", over); now.State != storage.Incomplete || len(now.Problems) != 1 || now.Problems[0].Digest != d.String() {
		t.Fatalf("%+v", now)
	}
	if _, err := n.Begin(t.Context(), storage.Request{To: choice("two")}); !fault.Is(err, fault.Conflict) {
		t.Fatalf("another move begins: %v", err)
	}
	if err := os.WriteFile(file, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Begin(t.Context(), storage.Request{To: choice("one"), Delete: true}); err != nil {
		t.Fatal(err)
	}
	if now := n.until("the move", over); now.State != storage.Done {
		t.Fatalf("%+v", now)
	}
	blobstest.Check(t, n.store, good)
	blobstest.Check(t, n.store, bad)
}

// A start never leaves blobs behind in silence, and nobody empties what other
// nodes read.
func TestRefusals(t *testing.T) {
	w := newWorld(t)
	n := w.must(choice("one"))
	content := blobstest.Content(1, 100)
	n.put(content)
	n.stop()
	for _, wrong := range []storage.Choice{
		{Parameters: map[string]any{"bucket": "one"}}, {Kind: storage.Local, Parameters: map[string]any{"bucket": "one"}}, {Kind: "tape"},
	} {
		if err := wrong.Check(); !fault.Is(err, fault.Invalid) {
			t.Errorf("%+v: %v", wrong, err)
		}
	}
	for name, asked := range map[string]storage.Choice{"another bucket": choice("two"), "the disk": choice(storage.Local)} {
		if _, err := w.start(asked, false); !fault.Is(err, fault.Invalid) || strings.Contains(err.Error(), secret) {
			t.Errorf("a start with %s: %v", name, err)
		}
	}
	rotated := choice("one")
	rotated.Parameters["secretkey"] = "another"
	n = w.must(rotated)
	blobstest.Check(t, n.store, content)
	w.nodes = 3
	if _, err := n.Begin(t.Context(), storage.Request{To: choice(storage.Local), Delete: true}); !fault.Is(err, fault.Invalid) {
		t.Fatalf("a shared bucket is emptied: %v", err)
	}
	if _, err := n.Begin(t.Context(), storage.Request{To: storage.Choice{Kind: "tape"}}); !fault.Is(err, fault.Invalid) {
		t.Fatalf("tape: %v", err)
	}
	w.bucket("two").away = true
	if _, err := n.Begin(t.Context(), storage.Request{To: choice("two")}); !fault.Is(err, fault.Unavailable) {
		t.Fatalf("a bucket that is away: %v", err)
	}
	file := filepath.Join(w.data, "storage.json")
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("the file with the secret: %v, %v", info, err)
	}
	f, size, err := n.store.OpenBlob(digest.FromBytes(content))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got, err := io.ReadAll(f); err != nil || int64(len(got)) != size {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
}
