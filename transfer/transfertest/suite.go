package transfertest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
)

const (
	// patient is a stall timeout for tests in which nobody stalls.
	patient = 20 * time.Second
	// hasty is one for tests in which somebody does.
	hasty = 500 * time.Millisecond
	// deadline for anything to happen; reached only when the engine is wrong.
	deadline = 30 * time.Second
)

// Run runs the suite against an engine.
func Run(t *testing.T, start Start) {
	for _, c := range []struct {
		name string
		test func(*testing.T, *fleet)
	}{
		{"AnySize", testAnySize},
		{"Empty", testEmpty},
		{"OtherAlgorithm", testOtherAlgorithm},
		{"HeldAlready", testHeldAlready},
		{"SharedByHolders", testSharedByHolders},
		{"OnlyDialsOut", testOnlyDialsOut},
		{"Joined", testJoined},
		{"Lie", testLie},
		{"LieWithoutRoot", testLieWithoutRoot},
		{"Replay", testReplay},
		{"ForeignTable", testForeignTable},
		{"WrongRoot", testWrongRoot},
		{"SizeLie", testSizeLie},
		{"Stall", testStall},
		{"SlowTable", testSlowTable},
		{"Short", testShort},
		{"ShortWithoutRoot", testShortWithoutRoot},
		{"Reset", testReset},
		{"OneOfThreeDies", testOneOfThreeDies},
		{"NoHolder", testNoHolder},
		{"Lost", testLost},
		{"AllLie", testAllLie},
		{"WrongPeer", testWrongPeer},
		{"Relay", testRelay},
		{"Resume", testResume},
		{"ResumeAfterRot", testResumeAfterRot},
		{"LimitsThatChange", testLimitsThatChange},
		{"SinkFails", testSinkFails},
		{"ReadWhileArriving", testReadWhileArriving},
		{"ReadersAtOffsets", testReadersAtOffsets},
		{"ReaderLeaves", testReaderLeaves},
		{"ReaderOfFailure", testReaderOfFailure},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.test(t, &fleet{t: t, site: NewSite(t, "site-a"), start: start, stall: patient})
		})
	}
}

// A node that cannot be dialled serves, and is served.
func testOnlyDialsOut(t *testing.T, f *fleet) {
	wall, err := net.Listen("tcp", "127.0.0.1:0") // and nobody accepts
	if err != nil {
		t.Fatal(err)
	}
	defer wall.Close()
	f.roll = &roll{}
	theirs, ours := fresh(9*transfer.PieceSize+1), fresh(5*transfer.PieceSize)
	outside, inside := holding(theirs), holding(ours)
	open := f.node("outside", outside, options{})
	shut := f.node("inside", inside, options{wall: wall.Addr().String()}, open)
	open.mu.Lock()
	open.asks = []*node{shut}
	open.mu.Unlock()
	f.arrives(open, outside, ours, blobOf(t, ours))
	f.arrives(shut, inside, theirs, blobOf(t, theirs))
	if open.movedFrom("inside") != int64(len(ours)) || shut.movedFrom("outside") != int64(len(theirs)) {
		t.Errorf("%d and %d bytes moved", open.movedFrom("inside"), shut.movedFrom("outside"))
	}
}

// fresh makes content that no other test has.
func fresh(size int) []byte {
	b := make([]byte, size)
	var seed [32]byte
	for i := range seed {
		seed[i] = byte(rand.Uint32())
	}
	rand.NewChaCha8(seed).Read(b)
	return b
}

// blobOf names content, with its root.
func blobOf(t testing.TB, content []byte) transfer.Blob {
	t.Helper()
	table, err := transfer.HashPieces(bytes.NewReader(content), int64(len(content)))
	if err != nil {
		t.Fatal(err)
	}
	return transfer.Blob{Digest: digest.FromBytes(content), Size: int64(len(content)), Root: table.Root()}
}

func rootless(b transfer.Blob) transfer.Blob {
	b.Root = nil
	return b
}

// holding makes a store that holds the content.
func holding(content []byte) *Store {
	s := NewStore()
	s.Put(content)
	return s
}

func (f *fleet) ctx() context.Context {
	ctx, cancel := context.WithTimeout(f.t.Context(), deadline)
	f.t.Cleanup(cancel)
	return ctx
}

func (f *fleet) fetch(n *node, b transfer.Blob) *transfer.Fetch {
	f.t.Helper()
	fetch, err := n.Fetch(f.ctx(), b)
	if err != nil {
		f.t.Fatal(err)
	}
	return fetch
}

// arrives fetches a blob and wants it to arrive whole.
func (f *fleet) arrives(n *node, store *Store, content []byte, b transfer.Blob) {
	f.t.Helper()
	if err := f.fetch(n, b).Wait(f.ctx()); err != nil {
		f.t.Fatal(err)
	}
	if !bytes.Equal(store.Bytes(b.Digest), content) {
		f.t.Fatal("the store does not hold the blob that was fetched")
	}
}

func (f *fleet) await(what string, ch <-chan struct{}) {
	f.t.Helper()
	select {
	case <-ch:
	case <-f.ctx().Done():
		f.t.Fatalf("%s: did not happen", what)
	}
}

// awaitDrop waits until the node has dropped the peer.
func (f *fleet) awaitDrop(n *node, peer string) {
	f.t.Helper()
	for {
		select {
		case who := <-n.drops:
			if who == peer {
				return
			}
		case <-f.ctx().Done():
			f.t.Fatalf("%s was not dropped", peer)
		}
	}
}

// gated makes a source whose reads wait for a gate.
func gated(g *Gate) func(transfer.Source) transfer.Source {
	return func(s transfer.Source) transfer.Source {
		return &Hostile{Source: s, Read: func(ctx context.Context, _ []byte, _ int64, read func() (int, error)) (int, error) {
			if err := g.Pass(ctx); err != nil {
				return 0, err
			}
			return read()
		}}
	}
}

func testAnySize(t *testing.T, f *fleet) {
	a := NewStore()
	from := f.node("a", a, options{})
	for _, size := range []int{1, transfer.LeafSize, transfer.PieceSize - 1, transfer.PieceSize, transfer.PieceSize + 1, 21*transfer.PieceSize + 77} {
		for _, root := range []bool{true, false} {
			content := fresh(size)
			a.Put(content)
			b := blobOf(t, content)
			if !root {
				b = rootless(b)
			}
			store := NewStore()
			to := f.node("b", store, options{}, from)
			f.arrives(to, store, content, b)
			if got := to.movedFrom("a"); got != b.Size {
				t.Errorf("size %d, root %v: %d bytes moved", size, root, got)
			}
			to.stop()
		}
	}
}

// A blob that is named by sha512 is pieced by sha256 like any other, verified by
// its own digest in the end, and without a root by that alone.
func testOtherAlgorithm(t *testing.T, f *fleet) {
	f.stall = hasty
	for _, root := range []bool{true, false} {
		content, other := fresh(3*transfer.PieceSize+5), fresh(3*transfer.PieceSize+5)
		b := blobOf(t, content)
		b.Digest = digest.SHA512.FromBytes(content)
		if !root {
			b = rootless(b)
		}
		a := NewStore()
		a.PutAs(digest.SHA512, content)
		store := NewStore()
		to := f.node("to", store, options{}, f.node("from", a, options{}))
		f.arrives(to, store, content, b)
		to.stop()

		// The right digest of its pieces does not help bytes that are not the blob's.
		liar := f.node("liar", a, options{source: reads(func(_ context.Context, p []byte, off int64, _ func() (int, error)) (int, error) {
			return copy(p, other[off:]), nil
		})})
		to = f.node("to", NewStore(), options{}, liar)
		if err := f.fetch(to, b).Wait(f.ctx()); err == nil {
			t.Fatalf("root %v: other bytes were taken", root)
		}
		f.awaitDrop(to, "liar")
		to.stop()
	}
}

func testEmpty(t *testing.T, f *fleet) {
	store := NewStore()
	n := f.node("a", store, options{})
	b := transfer.Blob{Digest: digest.FromBytes(nil)}
	if err := f.fetch(n, b).Wait(f.ctx()); err != nil {
		t.Fatal(err)
	}
}

func testHeldAlready(t *testing.T, f *fleet) {
	content := fresh(3 * transfer.PieceSize)
	n := f.node("a", holding(content), options{})
	fetch := f.fetch(n, blobOf(t, content))
	r := fetch.Reader(f.ctx())
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if err := fetch.Wait(f.ctx()); err != nil {
		t.Fatal(err)
	}
}

// Three holders; none of them gets on before each was asked, so each has a part.
func testSharedByHolders(t *testing.T, f *fleet) {
	content := fresh(64 * transfer.PieceSize)
	asked := make(chan string, 1024)
	g := NewGate()
	var from []*node
	for _, id := range []string{"a", "b", "c"} {
		from = append(from, f.node(id, holding(content), options{source: func(s transfer.Source) transfer.Source {
			return &Hostile{Source: s, Read: func(ctx context.Context, _ []byte, _ int64, read func() (int, error)) (int, error) {
				select {
				case asked <- id:
				default:
				}
				if err := g.Pass(ctx); err != nil {
					return 0, err
				}
				return read()
			}}
		}}))
	}
	store := NewStore()
	to := f.node("d", store, options{}, from...)
	fetch := f.fetch(to, blobOf(t, content))
	seen := map[string]bool{}
	for len(seen) < 3 {
		select {
		case id := <-asked:
			seen[id] = true
		case <-f.ctx().Done():
			t.Fatalf("only %v were asked for pieces", seen)
		}
	}
	g.Open()
	if err := fetch.Wait(f.ctx()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(store.Bytes(digest.FromBytes(content)), content) {
		t.Fatal("another blob arrived")
	}
	for id := range seen {
		if to.movedFrom(id) == 0 {
			t.Errorf("nothing came from %s", id)
		}
	}
	if got := to.movedFrom(""); got != int64(len(content)) {
		t.Errorf("%d bytes moved for a blob of %d", got, len(content))
	}
}

func testJoined(t *testing.T, f *fleet) {
	content := fresh(8 * transfer.PieceSize)
	g := NewGate()
	from := f.node("a", holding(content), options{source: gated(g)})
	store := NewStore()
	to := f.node("b", store, options{}, from)
	b := blobOf(t, content)
	first, second := f.fetch(to, b), f.fetch(to, rootless(b))
	if first != second {
		t.Error("two fetches of one blob")
	}
	wrong := b
	wrong.Size++
	if _, err := to.Fetch(f.ctx(), wrong); err == nil {
		t.Error("a fetch was joined with another size")
	}
	g.Open()
	if err := second.Wait(f.ctx()); err != nil {
		t.Fatal(err)
	}
	if got := to.movedFrom(""); got != b.Size {
		t.Errorf("%d bytes moved for a blob of %d", got, b.Size)
	}
}

func testNoHolder(t *testing.T, f *fleet) {
	a, b := f.node("a", NewStore(), options{}), f.node("b", NewStore(), options{})
	b.stop() // unreachable, where a only holds nothing
	to := f.node("c", NewStore(), options{}, a, b)
	for _, blob := range []transfer.Blob{blobOf(t, fresh(9)), rootless(blobOf(t, fresh(9)))} {
		err := f.fetch(to, blob).Wait(f.ctx())
		var none *transfer.NoHolderError
		if !errors.As(err, &none) || !errors.Is(err, transfer.ErrNoHolder) {
			t.Fatalf("error is %v", err)
		}
		if none.Digest != blob.Digest || len(none.Asked) != 2 {
			t.Errorf("error names %s and %v", none.Digest, none.Asked)
		}
		for _, asked := range none.Asked {
			if asked.Reason == nil {
				t.Errorf("no reason for %s", asked.Peer.ID)
			}
		}
	}
	alone := f.node("d", NewStore(), options{})
	if err := f.fetch(alone, blobOf(t, fresh(9))).Wait(f.ctx()); !errors.Is(err, transfer.ErrNoHolder) {
		t.Errorf("alone: %v", err)
	}
}

// Nodes that all look at the same moment for a blob that nobody holds do not wait for each
// other, and get it as soon as one of them holds it.
func testLost(t *testing.T, f *fleet) {
	const soon = 10 * time.Second // a third of what a fetch waits for holders that bring nothing
	content := [][]byte{fresh(1000), fresh(5*transfer.PieceSize + 1)}
	stores := []*Store{NewStore(), NewStore(), NewStore()}
	var nodes []*node
	for i, id := range []string{"a", "b", "c"} {
		nodes = append(nodes, f.node(id, stores[i], options{}))
	}
	for _, n := range nodes {
		n.mu.Lock()
		for _, other := range nodes {
			if other != n {
				n.asks = append(n.asks, other)
			}
		}
		n.mu.Unlock()
	}
	for _, c := range content {
		for _, b := range []transfer.Blob{blobOf(t, c), rootless(blobOf(t, c))} {
			began := time.Now()
			var fetches []*transfer.Fetch
			for _, n := range nodes {
				fetches = append(fetches, f.fetch(n, b))
			}
			for i, fetch := range fetches {
				if err := fetch.Wait(f.ctx()); !errors.Is(err, transfer.ErrNoHolder) {
					t.Errorf("%s: error is %v", nodes[i].id, err)
				}
			}
			if took := time.Since(began); took > soon {
				t.Errorf("%d bytes, root %v: it took %v", b.Size, b.Root != nil, took)
			}
		}
		stores[0].Put(c)
		f.arrives(nodes[1], stores[1], c, blobOf(t, c))
		f.arrives(nodes[2], stores[2], c, rootless(blobOf(t, c)))
	}
}

func testSinkFails(t *testing.T, f *fleet) {
	content := fresh(5 * transfer.PieceSize)
	from := f.node("a", holding(content), options{})
	store := NewStore()
	store.WriteErr = errors.New("no space left on device")
	to := f.node("b", store, options{}, from)
	for _, b := range []transfer.Blob{blobOf(t, content), rootless(blobOf(t, content))} {
		err := f.fetch(to, b).Wait(f.ctx())
		if !errors.Is(err, store.WriteErr) {
			t.Errorf("error is %v", err)
		}
	}
	if to.liar("a") {
		t.Error("the holder is blamed")
	}
}
