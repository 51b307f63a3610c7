package swarm

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// proven is a connection whose peer is known, as one of the peer port.
type proven struct {
	net.Conn
	id string
}

func (p proven) PeerID() string { return p.id }

// wire is a network of engines and of hostile peers in one process.
type wire struct {
	mu            sync.Mutex
	at            map[string]func(from string, c net.Conn)
	conns         sync.WaitGroup
	stall, linger time.Duration
	lines         map[string]*uplink // by node; nil: as fast as it goes
	config        func(*Config)      // changes an engine's; may be nil
}

func (w *wire) dial(from string) func(context.Context, string) (net.Conn, error) {
	return func(_ context.Context, addr string) (net.Conn, error) {
		w.mu.Lock()
		accept := w.at[addr]
		w.mu.Unlock()
		if accept == nil {
			return nil, errors.New("nobody there")
		}
		near, far := net.Pipe()
		if w.lines != nil {
			near, far = shaped{near, w.lines[from]}, shaped{far, w.lines[addr]}
		}
		w.conns.Go(func() { accept(from, far) })
		return proven{near, addr}, nil
	}
}

type asks []transfer.Peer

func (a asks) Candidates(context.Context, digest.Digest) []transfer.Peer { return a }

// rig is an engine and what surrounds it.
type rig struct {
	*Engine
	mu      sync.Mutex
	arrives map[digest.Digest]*transfer.Arrival
	drops   map[string]transfer.Reason
}

// engine runs one named id over a store, that asks peers.
func (w *wire) engine(t testing.TB, id string, store *transfertest.Store, peers ...string) *rig {
	t.Helper()
	r := &rig{arrives: make(map[digest.Digest]*transfer.Arrival), drops: make(map[string]transfer.Reason)}
	var ask asks
	for _, p := range peers {
		ask = append(ask, transfer.Peer{ID: p, Addr: p})
	}
	cfg := Config{
		Node: id, Source: store, Peers: ask, Dial: w.dial(id),
		Arriving: func(d digest.Digest) (*transfer.Arrival, bool) {
			r.mu.Lock()
			defer r.mu.Unlock()
			a, ok := r.arrives[d]
			return a, ok
		},
		Hooks: transfer.Hooks{Dropped: func(peer string, _ digest.Digest, why transfer.Reason) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.drops[peer] = why
		}},
		Patience: transfer.Patience{StallTimeout: cmp.Or(w.stall, 600*time.Millisecond), AskTimeout: 5 * time.Second, Backoff: time.Millisecond, IdleTimeout: cmp.Or(w.stall, time.Second)},
		Linger:   w.linger,
	}
	if w.config != nil {
		w.config(&cfg)
	}
	e, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.Engine = e
	ln := &queue{conns: make(chan net.Conn), done: make(chan struct{})}
	w.mu.Lock()
	w.at[id] = func(from string, c net.Conn) {
		select {
		case ln.conns <- proven{c, from}:
		case <-ln.done:
			c.Close()
		}
	}
	w.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = e.Run(ctx) })
	wg.Go(func() { _ = e.Serve(ln) })
	t.Cleanup(func() {
		ln.Close()
		cancel()
		wg.Wait()
	})
	return r
}

type queue struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}
func (q *queue) Close() error   { q.once.Do(func() { close(q.done) }); return nil }
func (q *queue) Addr() net.Addr { return peerAddr("test") }

// fetch carries a blob to a store, for a pull.
func (r *rig) fetch(ctx context.Context, store *transfertest.Store, b transfer.Blob) error {
	return r.fetchFor(ctx, store, b, transfer.Pull)
}

func (r *rig) fetchFor(ctx context.Context, store disk, b transfer.Blob, class transfer.Class) error {
	a := transfer.NewArrival(b, func(ctx context.Context) (transfer.Content, error) { return store.Open(ctx, b.Digest) })
	a.For(class)
	p, err := store.Create(ctx, b)
	if err != nil {
		return err
	}
	a.Begin(p)
	r.mu.Lock()
	r.arrives[b.Digest] = a
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		delete(r.arrives, b.Digest)
		r.mu.Unlock()
	}()
	if err := r.Carry(ctx, a); err != nil {
		a.Fail(err)
		return err
	}
	return a.Commit(ctx)
}

// say writes a message of a kind.
func say(c net.Conn, kind byte, body ...byte) error {
	out := binary.BigEndian.AppendUint32(nil, uint32(1+len(body)))
	_, err := c.Write(append(append(out, kind), body...))
	return err
}

func handshake(b transfer.Blob, node string) []byte {
	hash, id := Infohash(b), peerID(node)
	out := append([]byte(protocol), 0, 0, 0, 0, 0, 0, 0, fastBit)
	return append(append(out, hash[:shortSize]...), id[:]...)
}

// evil is what a hostile peer does once BitTorrent has begun.
type evil func(c net.Conn, b transfer.Blob)

// after shakes hands properly, then does evil; what comes in meanwhile is read.
func after(node string, do func(c net.Conn)) evil {
	return func(c net.Conn, b transfer.Blob) {
		if _, err := c.Write(handshake(b, node)); err != nil {
			return
		}
		do(c)
	}
}

func repeat(n int, kind byte, body ...byte) func(net.Conn) {
	return func(c net.Conn) {
		for range n {
			if say(c, kind, body...) != nil {
				return
			}
		}
	}
}

func raw(b ...byte) func(net.Conn) { return func(c net.Conn) { _, _ = c.Write(b) } }

// evils are told to both ends: a holder does them, and one who wants a blob.
func evils(node string, b transfer.Blob) map[string]evil {
	big := make([]byte, 9+chunkSize)
	return map[string]evil{
		"not BitTorrent":        func(c net.Conn, _ transfer.Blob) { _, _ = c.Write(bytes.Repeat([]byte("GET / HTTP/1.1\r\n"), 8)) },
		"nothing":               func(net.Conn, transfer.Blob) {},
		"another's peer id":     func(c net.Conn, b transfer.Blob) { _, _ = c.Write(handshake(b, "somebody else")) },
		"unknown infohash":      func(c net.Conn, _ transfer.Blob) { o := b; o.Size++; _, _ = c.Write(handshake(o, node)) },
		"length 2^31":           after(node, raw(0x80, 0, 0, 0, msgPiece)),
		"length 2^32-1":         after(node, raw(0xff, 0xff, 0xff, 0xff, msgBitfield)),
		"long bitfield":         after(node, repeat(1, msgBitfield, 0xff, 0xff, 0xff, 0xff)),
		"short bitfield":        after(node, repeat(1, msgBitfield)),
		"bits beyond the end":   after(node, repeat(1, msgBitfield, 0xff)),
		"have beyond the end":   after(node, repeat(1, msgHave, 0, 0, 0, 5)),
		"have 2^32-1":           after(node, repeat(1, msgHave, 0xff, 0xff, 0xff, 0xff)),
		"allowed fast beyond":   after(node, repeat(1, msgAllowedFast, 0xff, 0xff, 0xff, 0xff)),
		"suggest beyond":        after(node, repeat(1, msgSuggest, 0x7f, 0xff, 0xff, 0xff)),
		"push beyond the end":   after(node, repeat(1, msgPush, 0, 0, 0, 99)),
		"push again and again":  after(node, repeat(3, msgPush, 0, 0, 0, 0)),
		"choose at length":      after(node, repeat(1, msgChoose, 1, 1)),
		"unasked piece":         after(node, repeat(1, msgPiece, big[1:]...)),
		"piece beyond the end":  after(node, repeat(1, msgPiece, append([]byte{0, 0, 0, 9, 0, 0, 0, 0}, big[9:]...)...)),
		"unasked reject":        after(node, repeat(1, msgReject, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0)),
		"request beyond":        after(node, repeat(1, msgRequest, 0, 0, 0, 99, 0, 0, 0, 0, 0, 2, 0, 0)),
		"request of 2^31 bytes": after(node, repeat(1, msgRequest, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0, 0)),
		"request at 2^32-1":     after(node, repeat(1, msgRequest, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 2, 0, 0)),
		"request twice":         after(node, repeat(2, msgRequest, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0)),
		"metadata requests":     after(node, repeat(1000, 20, append([]byte{1}, []byte("d8:msg_typei0e5:piecei0ee")...)...)),
		"extended handshake":    after(node, repeat(1000, 20, append([]byte{0}, []byte("d1:md6:ut_pexi1eee")...)...)),
		"huge extension":        after(node, raw(0x00, 0x10, 0, 0, 20)),
		"port":                  after(node, repeat(1000, 9, 0, 80)),
		"hash requests":         after(node, repeat(1000, 21, make([]byte, 48)...)),
		"unknown message":       after(node, repeat(1000, 200)),
		"empty message flood": after(node, func(c net.Conn) {
			for range 10_000 {
				if _, err := c.Write(make([]byte, 4)); err != nil {
					return
				}
			}
		}),
		"choke for ever": after(node, func(c net.Conn) {
			_ = say(c, msgHaveAll)
			pace := time.NewTicker(time.Millisecond)
			defer pace.Stop()
			for say(c, msgChoke) == nil {
				<-pace.C
			}
		}),
	}
}

// hostileHolder says that it holds the blob and does evil instead of sending it.
func hostileHolder(table transfer.PieceTable, do evil) func(string, net.Conn) {
	return func(_ string, c net.Conn) {
		defer c.Close()
		b, _, err := readHello(c)
		if err != nil {
			return
		}
		_, _ = c.Write(answer{complete, b.Size}.marshal())
		var ask [1]byte
		for {
			if _, err := io.ReadFull(c, ask[:]); err != nil {
				return
			}
			if ask[0] == askBegin {
				break
			}
			raw, _ := table.MarshalBinary()
			_, _ = c.Write(append([]byte{tableIs}, raw...))
		}
		read := make(chan struct{})
		go func() {
			defer close(read)
			_, _ = io.Copy(io.Discard, c)
		}()
		do(c, b)
		<-read
	}
}

// A holder that does evil is dropped, alone, and beside an honest one the blob arrives.
func TestHostileHolders(t *testing.T) {
	content := tide(3*transfer.PieceSize + 7)
	b, table := blobOf(t, content)
	for name, do := range evils("hostile", b) {
		t.Run(name, func(t *testing.T) {
			w := &wire{at: make(map[string]func(string, net.Conn))}
			w.at["hostile"] = hostileHolder(table, do)
			honest := transfertest.NewStore()
			honest.Put(content)
			w.engine(t, "honest", honest)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			alone := w.engine(t, "alone", transfertest.NewStore(), "hostile")
			var none *transfer.NoHolderError
			if err := alone.fetch(ctx, transfertest.NewStore(), b); !errors.As(err, &none) || len(none.Asked) != 1 {
				t.Errorf("alone: %v", err)
			}
			alone.mu.Lock()
			if why := alone.drops["hostile"]; why != transfer.Broken && why != transfer.Stalled {
				t.Errorf("dropped for %q", why)
			}
			alone.mu.Unlock()
			store := transfertest.NewStore()
			if err := w.engine(t, "to", store, "hostile", "honest").fetch(ctx, store, b); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(store.Bytes(b.Digest), content) {
				t.Error("another blob arrived")
			}
		})
	}
}

// Somebody who wants a blob and does evil instead is hung up on, and others are served.
func TestHostileWanters(t *testing.T) {
	content := tide(3*transfer.PieceSize + 7)
	b, _ := blobOf(t, content)
	held := transfertest.NewStore()
	held.Put(content)
	w := &wire{at: make(map[string]func(string, net.Conn))}
	holder := w.engine(t, "holder", held)
	for name, do := range evils("hostile", b) {
		switch name {
		case "nothing", "empty message flood", "choke for ever", "allowed fast beyond":
			if name != "allowed fast beyond" {
				continue // no harm to a holder; it waits for the idle timeout
			}
		}
		t.Run(name, func(t *testing.T) {
			c, err := w.dial("hostile")(t.Context(), "holder")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			_, _ = c.Write(marshalHello(b, transfer.Pull))
			if ans, err := readAnswer(c); err != nil || ans.status != complete {
				t.Fatalf("%+v, %v", ans, err)
			}
			if _, err := c.Write([]byte{askBegin}); err != nil {
				t.Fatal(err)
			}
			read := make(chan error, 1)
			go func() {
				_, err := io.Copy(io.Discard, c)
				read <- err
			}()
			do(c, b)
			if err := <-read; err != nil && !errors.Is(err, io.ErrClosedPipe) && !errors.Is(err, io.EOF) {
				t.Errorf("not hung up on: %v", err)
			}
		})
	}
	store := transfertest.NewStore()
	if err := w.engine(t, "to", store, "holder").fetch(t.Context(), store, b); err != nil {
		t.Fatal(err)
	}
	if n, _ := holder.Torrents(); n > 1 {
		t.Errorf("%d torrents of one blob", n)
	}
}

// A torrent that nobody uses goes, with all that it had; blobs that nobody asks for
// never have one.
func TestIdleTorrentsGo(t *testing.T) {
	const held, wanted = 50_000, 5
	w := &wire{at: make(map[string]func(string, net.Conn)), linger: 50 * time.Millisecond}
	full := transfertest.NewStore()
	var blobs []transfer.Blob
	for i := range held {
		content := binary.BigEndian.AppendUint32(nil, uint32(i))
		full.Put(content)
		if i < wanted {
			b, _ := blobOf(t, content)
			blobs = append(blobs, b)
		}
	}
	holder, store := w.engine(t, "holder", full), transfertest.NewStore()
	to := w.engine(t, "to", store, "holder")
	before, heap := runtime.NumGoroutine(), heapNow()
	for _, b := range blobs {
		if err := to.fetch(t.Context(), store, b); err != nil {
			t.Fatal(err)
		}
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for until := time.Now().Add(10 * time.Second); ; <-tick.C {
		a, ac := holder.Torrents()
		b, bc := to.Torrents()
		if a+ac+b+bc == 0 && runtime.NumGoroutine() <= before {
			break
		}
		if time.Now().After(until) {
			t.Fatalf("%d and %d torrents, %d and %d connections, %d goroutines after %d", a, b, ac, bc, runtime.NumGoroutine(), before)
		}
	}
	if grown := int64(heapNow()) - int64(heap); grown > 5<<20 {
		t.Errorf("%d bytes of memory are kept", grown)
	}
}

func heapNow() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
