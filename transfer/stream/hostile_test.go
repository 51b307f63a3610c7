package stream

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/plan"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// peers asks what it lists.
type peers []transfer.Peer

func (p peers) Candidates(context.Context, digest.Digest) []transfer.Peer { return p }

// mover runs an engine that dials plainly, since these peers lie in frames.
func mover(t *testing.T, store *transfertest.Store, ask transfer.Peers, change func(*Config)) *Engine {
	t.Helper()
	cfg := Config{
		Source: store, Sink: store, Peers: ask,
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", addr)
		},
		Patience: transfer.Patience{StallTimeout: 300 * time.Millisecond, AskTimeout: 5 * time.Second, Backoff: time.Millisecond},
	}
	if change != nil {
		change(&cfg)
	}
	e, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = e.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	return e
}

// listening accepts plain connections and hands them to serve.
func listening(t *testing.T, id string, serve func(ctx context.Context, ln net.Listener)) transfer.Peer {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { serve(ctx, ln) })
	t.Cleanup(func() {
		cancel()
		ln.Close()
		wg.Wait()
	})
	return transfer.Peer{ID: id, Addr: ln.Addr().String()}
}

func serving(t *testing.T, e *Engine) transfer.Peer {
	return listening(t, "honest", func(ctx context.Context, ln net.Listener) { _ = e.Serve(ctx, ln) })
}

// answering answers frames with raw bytes, whatever say gives for each.
func answering(t *testing.T, say func(k kind, body []byte) []byte) transfer.Peer {
	return listening(t, "hostile", func(ctx context.Context, ln net.Listener) {
		var wg sync.WaitGroup
		defer wg.Wait()
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				stop := context.AfterFunc(ctx, func() { c.Close() })
				defer stop()
				for {
					var head [frameHeader]byte
					if _, err := io.ReadFull(c, head[:]); err != nil {
						return
					}
					body := make([]byte, binary.BigEndian.Uint32(head[1:]))
					if _, err := io.ReadFull(c, body); err != nil {
						return
					}
					if _, err := c.Write(say(kind(head[0]), body)); err != nil {
						return
					}
				}
			})
		}
	})
}

func sample(t *testing.T, size int) ([]byte, transfer.Blob, []byte) {
	t.Helper()
	content := bytes.Repeat([]byte("the tide comes and goes\n"), size/24+1)[:size]
	table, err := transfer.HashPieces(bytes.NewReader(content), int64(size))
	if err != nil {
		t.Fatal(err)
	}
	raw, _ := table.MarshalBinary()
	return content, transfer.Blob{Digest: digest.FromBytes(content), Size: int64(size), Root: table.Root()}, raw
}

// claims is a frame's head that claims a length.
func claims(k kind, length uint32, then ...byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{byte(k)}, length), then...)
}

func number(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }

// Each answer is a lie or nonsense. Alone its author gets nowhere; beside an honest
// peer the blob arrives.
func TestLiesInFrames(t *testing.T) {
	content, blob, raw := sample(t, 5*transfer.PieceSize+100)
	whole := state{heldComplete, uint64(blob.Size)}.append(nil)
	part := frame(state{heldPart, uint64(blob.Size)}.append(nil), kindHaves, 0xfc)
	table := frame(nil, kindTable, raw...)
	piece := func(i int, data []byte) []byte { return frame(nil, kindPiece, append(number(uint32(i)), data...)...) }
	last := content[5*transfer.PieceSize:]
	type answers struct{ hello, table, ask []byte }
	for name, a := range map[string]answers{
		"not frames":              {hello: []byte("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")},
		"no state":                {hello: frame(nil, kindBeat)},
		"short state":             {hello: frame(nil, kindState, 2)},
		"endless state":           {hello: claims(kindState, 1<<31)},
		"unknown state":           {hello: frame(nil, kindState, 9, 0, 0, 0, 0, 0, 0, 0, 1)},
		"size of 2^31":            {hello: state{heldComplete, 1 << 31}.append(nil)},
		"negative size":           {hello: state{heldComplete, 1<<64 - 1}.append(nil)},
		"unknown kind":            {hello: whole, table: claims(200, 0)},
		"endless unknown kind":    {hello: whole, table: claims(200, 1<<31)},
		"table of 2^31":           {hello: whole, table: claims(kindTable, 1<<31)},
		"short table":             {hello: whole, table: frame(nil, kindTable, raw[:len(raw)-1]...)},
		"another table":           {hello: whole, table: frame(nil, kindTable, append(raw[:len(raw)-1:len(raw)-1], 0x55)...)},
		"table twice":             {hello: whole, table: append(bytes.Clone(table), table...)},
		"piece before the table":  {hello: append(bytes.Clone(whole), piece(0, content[:transfer.PieceSize])...)},
		"table that never comes":  {hello: whole},
		"two states":              {hello: whole, table: whole},
		"bye in the middle":       {hello: whole, table: table, ask: frame(nil, kindBye)},
		"gone":                    {hello: whole, table: table, ask: frame(nil, kindGone)},
		"refusals":                {hello: whole, table: table, ask: appendPieces(nil, kindRefuse, 0, 1, 2, 3, 4, 5)},
		"empty refusal":           {hello: whole, table: table, ask: frame(nil, kindRefuse)},
		"piece of 2^31":           {hello: whole, table: table, ask: claims(kindPiece, 1<<31, number(0)...)},
		"piece without number":    {hello: whole, table: table, ask: frame(nil, kindPiece, 1)},
		"piece beyond the end":    {hello: whole, table: table, ask: piece(1<<31, last)},
		"piece too short":         {hello: whole, table: table, ask: piece(0, content[:100])},
		"last piece too long":     {hello: whole, table: table, ask: piece(5, content[:101])},
		"piece under another one": {hello: whole, table: table, ask: piece(1, content[:transfer.PieceSize])},
		"bits beyond the end":     {hello: frame(state{heldPart, uint64(blob.Size)}.append(nil), kindHaves, 0xff)},
		"set of 2^31":             {hello: append(state{heldPart, uint64(blob.Size)}.append(nil), claims(kindHaves, 1<<31)...)},
		"list of 2^31":            {hello: append(state{heldPart, uint64(blob.Size)}.append(nil), claims(kindHave, 1<<31)...)},
		"has what is not":         {hello: append(state{heldPart, uint64(blob.Size)}.append(nil), appendPieces(nil, kindHave, 6)...)},
		"claims, never has":       {hello: part, table: table, ask: appendPieces(nil, kindRefuse, 0)},
		"wanter's frames":         {hello: whole, table: appendAsks(nil, []plan.Ask{{Piece: 0}})},
	} {
		t.Run(name, func(t *testing.T) {
			hostile := answering(t, func(k kind, _ []byte) []byte {
				switch k {
				case kindHello:
					return a.hello
				case kindTables:
					return a.table
				case kindAsk:
					return a.ask
				}
				return nil
			})
			store := transfertest.NewStore()
			idle := func(c *Config) { c.IdleTimeout = time.Second }
			// In a test of its own, whose end stops the mover: until then it may hold the
			// store's partial.
			t.Run("alone", func(t *testing.T) {
				fetch, err := mover(t, store, peers{hostile}, idle).Fetch(t.Context(), blob)
				if err != nil {
					t.Fatal(err)
				}
				var none *transfer.NoHolderError
				if err := fetch.Wait(t.Context()); !errors.As(err, &none) || len(none.Asked) != 1 {
					t.Fatalf("error is %v", err)
				}
			})
			full := transfertest.NewStore()
			full.Put(content)
			honest := serving(t, mover(t, full, peers(nil), nil))
			fetch, err := mover(t, store, peers{hostile, honest}, idle).Fetch(t.Context(), blob)
			if err != nil {
				t.Fatal(err)
			}
			if err := fetch.Wait(t.Context()); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(store.Bytes(blob.Digest), content) {
				t.Fatal("another blob arrived")
			}
		})
	}
}

// A peer that is asked for one piece and sends others for ever is dropped.
func TestUnaskedPiecesAreRefused(t *testing.T) {
	content, blob, raw := sample(t, 200*transfer.PieceSize)
	sent := atomic.Int64{}
	hostile := answering(t, func(k kind, _ []byte) []byte {
		switch k {
		case kindHello:
			return state{heldComplete, uint64(blob.Size)}.append(nil)
		case kindTables:
			return frame(nil, kindTable, raw...)
		case kindAsk:
			sent.Add(1)
			i := uint32(199) // right, but again and again
			return frame(nil, kindPiece, append(number(i), content[i*transfer.PieceSize:]...)...)
		}
		return nil
	})
	fetch, err := mover(t, transfertest.NewStore(), peers{hostile}, nil).Fetch(t.Context(), blob)
	if err != nil {
		t.Fatal(err)
	}
	if err := fetch.Wait(t.Context()); !errors.Is(err, transfer.ErrNoHolder) {
		t.Fatalf("error is %v", err)
	}
	if n := sent.Load(); n > 50 {
		t.Errorf("%d pieces were taken", n)
	}
}

// What a wanter may say that makes no sense ends its connection, and takes no memory.
func TestWantersThatMakeNoSense(t *testing.T) {
	content, blob, _ := sample(t, 2*transfer.PieceSize)
	store := transfertest.NewStore()
	store.Put(content)
	peer := serving(t, mover(t, store, peers(nil), nil))
	greet := hello{digest: blob.Digest, size: blob.Size, patience: time.Second}.append(nil)
	huge := hello{digest: digest.FromString("absent"), size: maxWire, patience: time.Second}.append(nil)
	for name, say := range map[string][]byte{
		"no hello":               frame(nil, kindBeat),
		"endless hello":          claims(kindHello, 1<<31),
		"another version":        frame(nil, kindHello, append([]byte{2}, greet[6:]...)...),
		"no digest":              frame(nil, kindHello, greet[5:19]...),
		"weak digest":            frame(nil, kindHello, append(bytes.Clone(greet[5:19]), "md5:d41d8cd98f00b204e9800998ecf8427e"...)...),
		"size beyond the wire":   hello{digest: blob.Digest, size: maxWire + 1}.append(nil),
		"ask beyond the end":     appendAsks(bytes.Clone(greet), []plan.Ask{{Piece: 2}}),
		"asks of 2^31":           append(bytes.Clone(greet), claims(kindAsk, 1<<31)...),
		"set of another size":    append(bytes.Clone(greet), claims(kindSkips, 1<<20)...),
		"set for a size claimed": append(bytes.Clone(huge), claims(kindSkips, 1<<28)...),
		"table twice":            frame(frame(bytes.Clone(greet), kindTables), kindTables),
		"class of two bytes":     append(bytes.Clone(greet), claims(kindClass, 2, 0, 0)...),
		"holder's frames":        append(bytes.Clone(greet), claims(kindHave, 0)...),
	} {
		t.Run(name, func(t *testing.T) {
			c, err := net.Dial("tcp", peer.Addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := c.Write(say); err != nil {
				t.Fatal(err)
			}
			if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
				t.Fatal(err)
			}
			// It goes on with signs of life for as long as it takes part.
			if _, err := io.Copy(io.Discard, c); timedOut(err) {
				t.Error("the connection stays open")
			}
		})
	}
}

func timedOut(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// Several sessions follow each other on one connection.
func TestConnectionsAreKept(t *testing.T) {
	full := transfertest.NewStore()
	var blobs []transfer.Blob
	for i := range 5 {
		content, blob, _ := sample(t, 3*transfer.PieceSize+i)
		full.Put(content)
		blobs = append(blobs, blob)
	}
	var dials atomic.Int64
	store := transfertest.NewStore()
	e := mover(t, store, peers{serving(t, mover(t, full, peers(nil), nil))}, func(c *Config) {
		c.StallTimeout = 10 * time.Second
		dial := c.Dial
		c.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			dials.Add(1)
			return dial(ctx, addr)
		}
	})
	for _, b := range blobs {
		f, err := e.Fetch(t.Context(), b)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the session to end", func() bool {
			e.links.mu.Lock()
			defer e.links.mu.Unlock()
			kept := 0
			for _, rs := range e.links.idle {
				kept += len(rs)
			}
			return kept == 1
		})
	}
	if n := dials.Load(); n != 1 {
		t.Errorf("%d connections for %d blobs", n, len(blobs))
	}
}

// waitFor waits until what is true.
func waitFor(t *testing.T, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	timeout := time.After(20 * time.Second)
	for !is() {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// More fetches than there are slots wait for their turn and all arrive; the piece
// buffers are fewer than the requests would like.
func TestFetchesTakeTurns(t *testing.T) {
	full := transfertest.NewStore()
	var blobs []transfer.Blob
	for i := range 12 {
		content, blob, _ := sample(t, 3*transfer.PieceSize+i)
		full.Put(content)
		blobs = append(blobs, blob)
	}
	honest := serving(t, mover(t, full, peers(nil), nil))
	store := transfertest.NewStore()
	e := mover(t, store, peers{honest}, func(c *Config) {
		c.Fetches, c.Pieces, c.StallTimeout = transfer.AtMost(2), transfer.AtMost(2), 10*time.Second
	})
	var fetches []*transfer.Fetch
	for _, b := range blobs {
		f, err := e.Fetch(t.Context(), b)
		if err != nil {
			t.Fatal(err)
		}
		fetches = append(fetches, f)
	}
	for _, f := range fetches {
		if err := f.Wait(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func TestFetchNeedsARunningEngine(t *testing.T) {
	_, blob, _ := sample(t, 10)
	store := transfertest.NewStore()
	e, err := New(Config{Source: store, Sink: store, Peers: peers(nil), Dial: func(context.Context, string) (net.Conn, error) { return nil, io.EOF }})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := e.Fetch(ctx, blob); !errors.Is(err, context.Canceled) {
		t.Errorf("before Run: %v", err)
	}
	if err := e.Run(ctx); err != nil {
		t.Error(err)
	}
	if _, err := e.Fetch(t.Context(), blob); !errors.Is(err, transfer.ErrStopped) {
		t.Errorf("after Run: %v", err)
	}
	for _, b := range []transfer.Blob{
		{Digest: "sha256:1", Size: 1},
		{Digest: blob.Digest, Size: -1},
		{Digest: blob.Digest, Size: 1, Root: []byte("short")},
		{Digest: blob.Digest, Size: transfer.MaxSize + 1, Root: blob.Root},
	} {
		if _, err := e.Fetch(t.Context(), b); err == nil || errors.Is(err, transfer.ErrStopped) {
			t.Errorf("%+v: %v", b, err)
		}
	}
}
