package swarm

import (
	"bytes"
	"errors"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
)

func TestHello(t *testing.T) {
	b, _ := blobOf(t, tide(300_000))
	sha512 := b
	sha512.Digest = digest.SHA512.FromBytes([]byte("x"))
	for _, want := range []transfer.Blob{b, sha512} {
		got, class, err := readHello(bytes.NewReader(marshalHello(want, transfer.Repair)))
		if err != nil || class != transfer.Repair || got.Digest != want.Digest || got.Size != want.Size || !bytes.Equal(got.Root, want.Root) {
			t.Errorf("%+v reads as %+v, %v", want, got, err)
		}
	}
	raw := marshalHello(b, transfer.Pull)
	for name, change := range map[string]func([]byte) []byte{
		"other magic":   func(r []byte) []byte { r[0] = 'X'; return r },
		"other version": func(r []byte) []byte { r[4] = 9; return r },
		"size 2^63":     func(r []byte) []byte { r[6] = 0x80; return r },
		"size 2^62":     func(r []byte) []byte { r[6] = 0x40; return r },
		"size 0":        func(r []byte) []byte { clear(r[6:14]); return r },
		"no digest":     func(r []byte) []byte { r[helloFixed-1] = 0; return r },
		"md5":           func(r []byte) []byte { copy(r[helloFixed:], "md5:aaaa"); return r },
		"long digest":   func(r []byte) []byte { r[helloFixed-1] = 255; return append(r, make([]byte, 255)...) },
	} {
		if _, _, err := readHello(bytes.NewReader(change(bytes.Clone(raw)))); !errors.Is(err, errHello) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for n := range raw {
		if _, _, err := readHello(bytes.NewReader(raw[:n])); err == nil {
			t.Errorf("%d bytes of it are a hello", n)
		}
	}
}

func TestAnswer(t *testing.T) {
	for s := complete; s <= linked; s++ {
		want := answer{s, 1 << 31}
		if got, err := readAnswer(bytes.NewReader(want.marshal())); err != nil || got != want {
			t.Errorf("%+v reads as %+v, %v", want, got, err)
		}
	}
	for _, s := range []status{0, linked + 1, 255} {
		if _, err := readAnswer(bytes.NewReader(answer{s, 1}.marshal())); err == nil {
			t.Errorf("status %d is taken", s)
		}
	}
}

// A holder's table is bounded by the blob's size, whatever the holder sends.
func TestReadTable(t *testing.T) {
	b, table := blobOf(t, tide(3*transfer.PieceSize))
	raw, _ := table.MarshalBinary()
	_, foreign := blobOf(t, bytes.Repeat([]byte("x"), 3*transfer.PieceSize))
	other, _ := foreign.MarshalBinary()
	read := func(in []byte) (int, error) {
		alive := 0
		_, err := readTable(bytes.NewReader(in), b, func() { alive++ }, func(int) {})
		return alive, err
	}
	if alive, err := read(append([]byte("wwt"), raw...)); err != nil || alive < 3 {
		t.Errorf("%d signs of life, %v", alive, err)
	}
	var f *failure
	if _, err := read(append([]byte("t"), other...)); !errors.As(err, &f) || f.why != transfer.BadTable {
		t.Errorf("a foreign table: %v", err)
	}
	for _, in := range [][]byte{nil, []byte("w"), []byte("x"), []byte("?"), append([]byte("t"), raw[:10]...)} {
		if _, err := read(in); err == nil {
			t.Errorf("%q is taken for a table", in)
		}
	}
}

func FuzzReadHello(f *testing.F) {
	b := transfer.Blob{Digest: digest.FromString("x"), Size: 7, Root: make([]byte, transfer.HashSize)}
	f.Add(marshalHello(b, transfer.Pull))
	f.Add(marshalHello(b, transfer.Repair))
	f.Add([]byte(helloMagic))
	f.Fuzz(func(t *testing.T, raw []byte) {
		b, class, err := readHello(bytes.NewReader(raw))
		if err != nil {
			return
		}
		if class > transfer.Prefetch || class != min(transfer.Class(raw[len(helloMagic)+1]), transfer.Prefetch) {
			t.Fatalf("%x is of %s", raw, class)
		}
		raw = bytes.Clone(raw)
		raw[len(helloMagic)+1] = byte(class) // of a newer version it may be less urgent still
		if err := b.Check(); err != nil || b.Size <= 0 || b.Root == nil {
			t.Fatalf("%+v is taken: %v", b, err)
		}
		if out := marshalHello(b, class); !bytes.Equal(out, raw[:len(out)]) {
			t.Fatalf("%x comes back as %x", raw, out)
		}
	})
}

func FuzzReadTable(f *testing.F) {
	content := tide(transfer.PieceSize + 1)
	table, _ := transfer.HashPieces(bytes.NewReader(content), int64(len(content)))
	b := transfer.Blob{Digest: digest.FromBytes(content), Size: int64(len(content)), Root: table.Root()}
	raw, _ := table.MarshalBinary()
	f.Add(append([]byte("wt"), raw...))
	f.Fuzz(func(t *testing.T, in []byte) {
		if got, err := readTable(bytes.NewReader(in), b, func() {}, func(int) {}); err == nil && !bytes.Equal(got.Root(), b.Root) {
			t.Fatal("a table of another root is taken")
		}
	})
}

// Whatever a peer sends, a message that is let through is within the blob.
func FuzzMessage(f *testing.F) {
	s := shape{5*transfer.PieceSize + 100, 6}
	f.Add([]byte{msgRequest, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 100}, uint32(13))
	f.Add([]byte{msgBitfield, 0xfc}, uint32(2))
	f.Add([]byte{msgPiece, 0, 0, 0, 0, 0, 2, 0, 0}, uint32(pieceHead+chunkSize))
	f.Add([]byte{20, 0}, uint32(1<<31))
	f.Fuzz(func(t *testing.T, raw []byte, n uint32) {
		if len(raw) == 0 || n == 0 {
			return
		}
		head, err := s.header(raw[0], n)
		if err != nil {
			return
		}
		if head < 1 || head > 1+13+chunkSize || uint32(head) > n {
			t.Fatalf("%d bytes of a message of %d are its head", head, n)
		}
		if len(raw) < head {
			return
		}
		m, err := s.parse(raw[:head], n)
		if err != nil {
			return
		}
		if m.trailing < 0 || head+m.trailing != int(n) {
			t.Fatalf("%d and %d bytes of %d", head, m.trailing, n)
		}
		if m.useless {
			return
		}
		if m.piece < 0 || m.piece >= s.pieces || int(m.chunk.piece) >= s.pieces {
			t.Fatalf("message %+v names a piece beyond the end", m)
		}
		off, size := transfer.PieceRange(s.size, int(m.chunk.piece))
		if int64(m.chunk.begin)+int64(m.chunk.length) > size || off+size > s.size {
			t.Fatalf("message %+v names bytes beyond the piece", m)
		}
	})
}
