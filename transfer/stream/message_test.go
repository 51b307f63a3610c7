package stream

import (
	"bytes"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/plan"
)

// malformed wants every refusal to be one of the protocol's.
func malformed(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, errFrame) {
		t.Fatalf("error of another kind: %v", err)
	}
}

func FuzzHello(f *testing.F) {
	f.Add(hello{digest: digest.FromString("a"), size: 5, class: transfer.Repair, patience: time.Second}.append(nil)[frameHeader:])
	f.Add([]byte{1, 0, 0xff, 0xff, 0xff, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 's'})
	f.Fuzz(func(t *testing.T, body []byte) {
		h, err := decodeHello(body)
		if err != nil {
			malformed(t, err)
			return
		}
		if h.size < 0 || h.size > maxWire || h.class > transfer.Prefetch || h.patience < 0 || h.digest.Validate() != nil {
			t.Fatalf("%+v", h)
		}
		again, err := decodeHello(h.append(nil)[frameHeader:])
		if err != nil || again != h {
			t.Fatalf("%+v becomes %+v, %v", h, again, err)
		}
	})
}

func FuzzState(f *testing.F) {
	f.Add(state{heldPart, 1 << 63}.append(nil)[frameHeader:])
	f.Fuzz(func(t *testing.T, body []byte) {
		s, err := decodeState(body)
		if err != nil {
			malformed(t, err)
			return
		}
		if !bytes.Equal(s.append(nil)[frameHeader:], body) {
			t.Fatalf("%+v has two wire forms", s)
		}
	})
}

func FuzzAsks(f *testing.F) {
	f.Add(appendAsks(nil, []plan.Ask{{Piece: 3}, {Piece: plan.Any}, {Piece: 4, Urgent: true}})[frameHeader:], 5)
	f.Add([]byte{0xff, 0xff, 0xff, 0xfe, 0}, 1<<20)
	f.Fuzz(func(t *testing.T, body []byte, pieces int) {
		asks, err := decodeAsks(body, pieces)
		if err != nil {
			malformed(t, err)
			return
		}
		for _, a := range asks {
			if a.Piece != plan.Any && (a.Piece < 0 || a.Piece >= pieces) {
				t.Fatalf("%+v of %d", a, pieces)
			}
		}
	})
}

func FuzzPieces(f *testing.F) {
	f.Add(appendPieces(nil, kindHave, 1, 2, 3)[frameHeader:], 4)
	f.Add([]byte{0x80, 0, 0, 0}, 7)
	f.Fuzz(func(t *testing.T, body []byte, pieces int) {
		list, err := decodePieces(body, pieces)
		if err != nil {
			malformed(t, err)
			return
		}
		if slices.ContainsFunc(list, func(i int) bool { return i < 0 || i >= pieces }) {
			t.Fatalf("%v of %d", list, pieces)
		}
		if len(list) > 0 && !bytes.Equal(appendPieces(nil, kindHave, list...)[frameHeader:], body) {
			t.Fatal("a list has two wire forms")
		}
	})
}

func FuzzPieceHeader(f *testing.F) {
	f.Add(number(0), int64(pieceHeader+7), int64(7))
	f.Add(number(1<<31), int64(1<<31), int64(1<<40))
	f.Fuzz(func(t *testing.T, header []byte, length, size int64) {
		if size < 0 || size > maxWire {
			return
		}
		i, n, err := decodePieceHeader(header, length, size)
		if err != nil {
			malformed(t, err)
			return
		}
		if off, want := transfer.PieceRange(size, i); n != want || n <= 0 || n > transfer.PieceSize || off+n > size {
			t.Fatalf("piece %d has %d bytes of %d", i, n, size)
		}
	})
}

// No frame may be longer than what its kind and the blob's size imply, whatever they are.
func FuzzLimit(f *testing.F) {
	f.Add(byte(kindPiece), int64(1<<40))
	f.Fuzz(func(t *testing.T, k byte, size int64) {
		if size < 0 || size > maxWire {
			return
		}
		n, err := limit(kind(k), size)
		if err == nil && (n < 0 || n > 33<<20 && n > size/transfer.PieceSize/8+1) {
			t.Fatalf("kind %d of %d bytes may have %d", k, size, n)
		}
	})
}

func TestLongListsTakeSeveralFrames(t *testing.T) {
	var asks []plan.Ask
	var list []int
	for i := range 2*perFrame + 1 {
		asks, list = append(asks, plan.Ask{Piece: i}), append(list, i)
	}
	for _, b := range [][]byte{appendAsks(nil, asks), appendPieces(nil, kindSkip, list...)} {
		frames := 0
		for len(b) > 0 {
			n := int(b[3])<<8 | int(b[4])
			if most, err := limit(kind(b[0]), 1<<40); err != nil || int64(n) > most {
				t.Fatalf("a frame of %d bytes, %v", n, err)
			}
			b = b[frameHeader+n:]
			frames++
		}
		if frames != 3 {
			t.Errorf("%d frames", frames)
		}
	}
}
