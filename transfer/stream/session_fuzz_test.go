package stream

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/plan"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

// script is a connection whose other end says what it has to say and hangs up.
type script struct {
	says io.Reader

	mu   sync.Mutex
	hear bytes.Buffer
}

func (s *script) Read(p []byte) (int, error) { return s.says.Read(p) }

func (s *script) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hear.Write(p)
}

func (s *script) heard() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.hear.Bytes())
}

func (*script) Close() error                     { return nil }
func (*script) LocalAddr() net.Addr              { return nil }
func (*script) RemoteAddr() net.Addr             { return nil }
func (*script) SetDeadline(time.Time) error      { return nil }
func (*script) SetReadDeadline(time.Time) error  { return nil }
func (*script) SetWriteDeadline(time.Time) error { return nil }

// FuzzSession: whatever a wanter says, a holder's session ends with its connection and
// leaves nothing behind; what it was sent are whole frames, and pieces of the blob.
func FuzzSession(f *testing.F) {
	content, blob := random(2*transfer.PieceSize + 9)
	full := transfertest.NewStore()
	full.Put(content)
	f.Add(appendAsks(nil, []plan.Ask{{Piece: 2}, {Piece: plan.Any}, {Piece: 1, Urgent: true}}), false)
	f.Add(frame(appendAsks(frame(frame(nil, kindSkips, 0xa0), kindTables), []plan.Ask{{Piece: 0}}), kindClass, 3), false)
	f.Add(appendPieces(appendPieces(appendPieces(nil, kindSkip, 1), kindNeed, 1), kindCancel, 2), true)
	f.Add(hello{digest: blob.Digest, size: 5}.append(frame(nil, kindBye)), true)
	f.Fuzz(func(t *testing.T, said []byte, arriving bool) {
		store, ask := full, transfer.Peers(peers(nil))
		if arriving { // it is fetched here, of nobody who answers
			store, ask = transfertest.NewStore(), peers{{ID: "silent", Addr: "silent"}}
		}
		e := mover(t, store, ask, func(c *Config) {
			c.Dial = func(ctx context.Context, _ string) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
		})
		if arriving {
			if _, err := e.Fetch(t.Context(), blob); err != nil {
				t.Fatal(err)
			}
		}
		c := &script{says: io.MultiReader(bytes.NewReader(hello{digest: blob.Digest, size: blob.Size, patience: time.Second}.append(nil)), bytes.NewReader(said))}
		done := make(chan struct{})
		go func() { e.serveConn(t.Context(), c); close(done) }()
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			t.Fatal("the session does not end")
		}
		if n, _ := e.cfg.Sending.Use(); n != 0 {
			t.Errorf("%d buffers are not given back", n)
		}
		e.desk.mu.Lock()
		if len(e.desk.offers) != 0 {
			t.Error("the blob is still offered")
		}
		e.desk.mu.Unlock()
		spoken(t, c.heard(), content)
	})
}

// spoken checks what a holder said: the last frame may be cut.
func spoken(t *testing.T, b, content []byte) {
	t.Helper()
	size := int64(len(content))
	for len(b) >= frameHeader {
		k, n := kind(b[0]), int64(binary.BigEndian.Uint32(b[1:]))
		most, err := limit(k, size)
		if err != nil || n > most || k < kindState && k != kindBye {
			t.Fatalf("a holder sent %d bytes of kind %d: %v", n, k, err)
		}
		b = b[frameHeader:]
		if int64(len(b)) < n {
			return
		}
		if k == kindPiece {
			i := int(binary.BigEndian.Uint32(b))
			off, want := transfer.PieceRange(size, i)
			if n != pieceHeader+want || !bytes.Equal(b[pieceHeader:n], content[off:off+want]) {
				t.Fatalf("piece %d is not the blob's", i)
			}
		}
		b = b[n:]
	}
}

// FuzzTrade: whatever a holder says, with a root and without, a fetch ends and takes
// nothing that is not the blob's.
func FuzzTrade(f *testing.F) {
	content, blob := random(transfer.PieceSize + 9)
	table, _ := transfer.HashPieces(bytes.NewReader(content), blob.Size)
	raw, _ := table.MarshalBinary()
	has := state{heldComplete, uint64(blob.Size)}.append(nil)
	piece := append(number(1), content[transfer.PieceSize:]...)
	f.Add(frame(frame(bytes.Clone(has), kindTable, raw...), kindPiece, piece...), true)
	f.Add(frame(frame(bytes.Clone(has), kindBeat), kindPiece, piece...), false)
	f.Add(appendPieces(frame(frame(state{heldPart, uint64(blob.Size)}.append(nil), kindHaves, 0xc0), kindComplete), kindHave, 1), true)
	f.Add(appendPieces(frame(frame(bytes.Clone(has), kindWait), kindGone), kindRefuse, 0), false)
	f.Fuzz(func(t *testing.T, said []byte, rooted bool) {
		if len(said) > frameHeader && kind(said[0]) == kindState && held(said[frameHeader]) == heldBusy {
			return // one that is busy is waited for, minutes if need be
		}
		store := transfertest.NewStore()
		e := mover(t, store, peers{{ID: "hostile", Addr: "hostile"}}, func(c *Config) {
			c.Absence, c.AskAgain, c.IdleTimeout = time.Millisecond, 5*time.Millisecond, 50*time.Millisecond
			c.Dial = func(context.Context, string) (net.Conn, error) {
				return &script{says: bytes.NewReader(said)}, nil
			}
		})
		wanted := blob
		if !rooted {
			wanted.Root = nil
		}
		fetch, err := e.Fetch(t.Context(), wanted)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		err = fetch.Wait(ctx)
		if ctx.Err() != nil {
			t.Fatal("the fetch does not end")
		}
		if got := store.Bytes(blob.Digest); (err == nil) != bytes.Equal(got, content) || err != nil && got != nil {
			t.Fatalf("%v, and %d bytes are there", err, len(got))
		}
		if n, _ := e.cfg.Pieces.Use(); n != 0 {
			t.Errorf("%d buffers are not given back", n)
		}
	})
}
