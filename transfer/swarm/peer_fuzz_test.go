package swarm

import (
	"bytes"
	"context"
	"io"
	"net"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/transfertest"
)

func FuzzAnswer(f *testing.F) {
	f.Add(answer{partial, 1 << 40}.marshal())
	f.Fuzz(func(t *testing.T, raw []byte) {
		a, err := readAnswer(bytes.NewReader(raw))
		if err == nil && (a.status < complete || a.status > linked || !bytes.Equal(a.marshal(), raw[:answerSize])) {
			t.Fatalf("%x reads as %+v", raw, a)
		}
	})
}

// messages are what fuzzing begins with: kind and body.
func messages(of ...[]byte) (out []byte) {
	for _, m := range of {
		out = append(append(out, 0, 0, 0, byte(len(m))), m...)
	}
	return out
}

// FuzzHolder: whatever a holder says once BitTorrent has begun, the fetch ends, takes
// nothing that is not the blob's and gives all memory back.
func FuzzHolder(f *testing.F) {
	content := tide(transfer.PieceSize + 100)
	b, table := blobOf(f, content)
	raw, _ := table.MarshalBinary()
	f.Add(messages([]byte{msgHaveAll}, []byte{msgUnchoke}, append([]byte{msgPiece, 0, 0, 0, 1, 0, 0, 0, 0}, content[transfer.PieceSize:]...)))
	f.Add(messages([]byte{msgBitfield, 0xc0}, []byte{msgSuggest, 0, 0, 0, 1}, []byte{msgHeld}, []byte{msgReject, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0}))
	f.Add(messages([]byte{msgHaveNone}, []byte{msgHave, 0, 0, 0, 0}, []byte{msgClass, 9}, []byte{77, 1, 2}, nil, []byte{msgChoke}))
	f.Add(messages([]byte{msgChoose, 1}, []byte{msgUnchoke}, []byte{msgPush, 0, 0, 0, 1}, append([]byte{msgPiece, 0, 0, 0, 1, 0, 0, 0, 0}, content[transfer.PieceSize:]...), []byte{msgPush, 0, 0, 0, 1}, []byte{msgChoose, 0}))
	f.Fuzz(func(t *testing.T, said []byte) {
		w := &wire{at: make(map[string]func(string, net.Conn)), stall: 100 * time.Millisecond}
		store := transfertest.NewStore()
		to := w.engine(t, "to", store, "evil")
		w.at["evil"] = func(_ string, c net.Conn) {
			defer c.Close()
			if _, _, err := readHello(c); err != nil {
				return
			}
			_, _ = c.Write(answer{complete, b.Size}.marshal())
			var ask [1]byte
			for {
				if _, err := io.ReadFull(c, ask[:]); err != nil || ask[0] == askBegin {
					break
				}
				_, _ = c.Write(append([]byte{tableIs}, raw...))
			}
			go func() { _, _ = io.Copy(io.Discard, c) }() // ends with the connection
			_, _ = c.Write(append(handshake(b, "evil"), said...))
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		err := to.fetch(ctx, store, b)
		if ctx.Err() != nil {
			t.Fatal("the fetch does not end")
		}
		if got := store.Bytes(b.Digest); (err == nil) != bytes.Equal(got, content) || err != nil && got != nil {
			t.Fatalf("%v, and %d bytes are there", err, len(got))
		}
		if n, _ := to.cfg.Pieces.Use(); n != 0 {
			t.Errorf("%d pieces still have memory", n)
		}
	})
}

// FuzzWanter: whatever a wanter says, from its handshake on, the holder hangs up in the
// end, and goes on to serve others.
func FuzzWanter(f *testing.F) {
	content := tide(transfer.PieceSize + 100)
	b, _ := blobOf(f, content)
	f.Add(append(handshake(b, "evil"), messages([]byte{msgInterested}, []byte{msgRequest, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 100}, []byte{msgClass, 2})...))
	f.Add(append(handshake(b, "evil"), messages([]byte{msgRequest, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0}, []byte{msgCancel, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0})...))
	f.Add(handshake(b, "another"))
	f.Fuzz(func(t *testing.T, said []byte) {
		w := &wire{at: make(map[string]func(string, net.Conn)), stall: 2 * time.Second}
		held := transfertest.NewStore()
		held.Put(content)
		w.engine(t, "from", held)
		near, far := net.Pipe()
		w.at["from"]("evil", far)
		gone := make(chan struct{})
		go func() { _, _ = io.Copy(io.Discard, near); close(gone) }()
		_ = near.SetWriteDeadline(time.Now().Add(5 * time.Second))
		for _, part := range [][]byte{marshalHello(b, transfer.Pull), {askBegin}, said} {
			if _, err := near.Write(part); err != nil {
				break
			}
		}
		near.Close()
		<-gone
		store := transfertest.NewStore()
		to := w.engine(t, "to", store, "from")
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if err := to.fetch(ctx, store, b); err != nil || !bytes.Equal(store.Bytes(b.Digest), content) {
			t.Fatalf("an honest one is not served any more: %v", err)
		}
	})
}
