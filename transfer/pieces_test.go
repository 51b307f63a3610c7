package transfer_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/atoll-registry/atoll/transfer"
)

// naiveRoot is the definition said in the plainest way: hash the 16 KiB blocks, pad
// with zero hashes to a power of two, fold.
func naiveRoot(content []byte) []byte {
	var layer [][]byte
	for at := 0; at < len(content); at += 16384 {
		sum := sha256.Sum256(content[at:min(at+16384, len(content))])
		layer = append(layer, sum[:])
	}
	width := 1
	for width < len(layer) {
		width *= 2
	}
	for len(layer) < width || len(layer) == 0 {
		layer = append(layer, make([]byte, 32))
	}
	for len(layer) > 1 {
		var above [][]byte
		for i := 0; i < len(layer); i += 2 {
			sum := sha256.Sum256(append(append([]byte{}, layer[i]...), layer[i+1]...))
			above = append(above, sum[:])
		}
		layer = above
	}
	return layer[0]
}

func pattern(size int) []byte {
	b := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(size), byte(size >> 8), byte(size >> 16)}).Read(b)
	return b
}

var sizes = []int{
	0, 1, 16383, 16384, 16385, 3 * 16384, 3*16384 + 1, 262143, 262144, 262145,
	2 * 262144, 3*262144 + 5, 5 * 262144, 7*262144 + 16385, 9 * 262144,
}

func table(t testing.TB, content []byte) transfer.PieceTable {
	t.Helper()
	pt, err := transfer.HashPieces(bytes.NewReader(content), int64(len(content)))
	if err != nil {
		t.Fatal(err)
	}
	return pt
}

func TestRootAgreesWithTheDefinition(t *testing.T) {
	for _, size := range sizes {
		content := pattern(size)
		if got, want := table(t, content).Root(), naiveRoot(content); !bytes.Equal(got, want) {
			t.Errorf("size %d: root %x, want %x", size, got, want)
		}
	}
}

// The roots of blobs of zero bytes: whoever writes another implementation can check
// it against these without our code.
func TestRootVectors(t *testing.T) {
	for _, v := range []struct {
		size int
		root string
	}{
		{0, "0000000000000000000000000000000000000000000000000000000000000000"},
		{1, "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"},
		{16384, "4fe7b59af6de3b665b67788cc2f99892ab827efae3a467342b3bb4e3bc8e5bfe"},
		{262144, "0ee38dbbe040ef1d6f2435117c70f2579e768215c91a640e7d855a647084869c"},
		{262145, "6a98ab9a5e06809956df7a33632224de1457c43f1785b4c23b09bd7a1eb8f7fe"},
		{1048576, "515ea9181744b817744ded9d2e8e9dc6a8450c0b0c52e24b5077f302ffbd9008"},
	} {
		if got := hex.EncodeToString(table(t, make([]byte, v.size)).Root()); got != v.root {
			t.Errorf("%d zero bytes: root %s, want %s", v.size, got, v.root)
		}
	}
}

func TestPieceTableWireForm(t *testing.T) {
	for _, size := range sizes {
		content := pattern(size)
		pt := table(t, content)
		raw, _ := pt.MarshalBinary()
		if int64(len(raw)) != transfer.TableSize(int64(size)) {
			t.Fatalf("size %d: %d bytes, TableSize says %d", size, len(raw), transfer.TableSize(int64(size)))
		}
		back, err := transfer.DecodePieceTable(raw)
		if err != nil {
			t.Fatalf("size %d: %v", size, err)
		}
		blob := transfer.Blob{Size: int64(size), Root: pt.Root()}
		if err := back.Verify(blob); err != nil {
			t.Errorf("size %d: %v", size, err)
		}
		for i := range back.Len() {
			off, n := transfer.PieceRange(int64(size), i)
			piece := bytes.Clone(content[off : off+n])
			if err := back.VerifyPiece(i, piece); err != nil {
				t.Errorf("size %d: %v", size, err)
			}
			piece[n/2] ^= 1
			if err := back.VerifyPiece(i, piece); !errors.Is(err, transfer.ErrBadPiece) {
				t.Errorf("size %d: an altered piece %d gives %v", size, i, err)
			}
			if err := back.VerifyPiece(i, piece[:n-1]); !errors.Is(err, transfer.ErrBadPiece) {
				t.Errorf("size %d: a short piece %d gives %v", size, i, err)
			}
		}
		for cut := range min(len(raw), 64) {
			if _, err := transfer.DecodePieceTable(raw[:cut]); !errors.Is(err, transfer.ErrBadTable) {
				t.Errorf("size %d: the first %d bytes give %v", size, cut, err)
			}
		}
		if _, err := transfer.DecodePieceTable(append(raw, 0)); !errors.Is(err, transfer.ErrBadTable) {
			t.Errorf("size %d: a byte too many gives %v", size, err)
		}
	}
}

func TestTableOfAnotherBlobIsRefused(t *testing.T) {
	a, b := table(t, pattern(3*transfer.PieceSize)), table(t, make([]byte, 3*transfer.PieceSize))
	for _, blob := range []transfer.Blob{
		{Size: a.Size(), Root: b.Root()},
		{Size: a.Size() - 1, Root: a.Root()},
		{Size: a.Size()},
	} {
		if err := a.Verify(blob); !errors.Is(err, transfer.ErrBadTable) {
			t.Errorf("%+v gives %v", blob, err)
		}
	}
}

func TestSinglePieceNeedsNoTable(t *testing.T) {
	for _, size := range sizes {
		content := pattern(size)
		pt := table(t, content)
		got, ok := transfer.SinglePiece(transfer.Blob{Size: int64(size), Root: pt.Root()})
		if want := size <= transfer.PieceSize; ok != want {
			t.Errorf("size %d: %v, want %v", size, ok, want)
		}
		if ok && size > 0 && got.VerifyPiece(0, content) != nil {
			t.Errorf("size %d: the piece is not accepted", size)
		}
	}
	if _, ok := transfer.SinglePiece(transfer.Blob{Size: 0, Root: bytes.Repeat([]byte{1}, 32)}); ok {
		t.Error("an empty blob has a root other than zero")
	}
}

func TestHashPiecesWantsTheExactSize(t *testing.T) {
	for _, size := range []int64{-1, 9, 11, transfer.MaxSize + 1} {
		if _, err := transfer.HashPieces(bytes.NewReader(make([]byte, 10)), size); err == nil {
			t.Errorf("10 bytes pass for %d", size)
		}
	}
}

func FuzzDecodePieceTable(f *testing.F) {
	for _, size := range []int{0, 1, 262145, 3 * 262144} {
		pt, err := transfer.HashPieces(bytes.NewReader(make([]byte, size)), int64(size))
		if err != nil {
			f.Fatal(err)
		}
		raw, _ := pt.MarshalBinary()
		f.Add(raw)
	}
	f.Add([]byte("ATPT\x01\xff\xff\xff\xff\xff\xff\xff\xff"))
	f.Add([]byte("ATPT\x02\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		pt, err := transfer.DecodePieceTable(raw)
		if err != nil {
			if !errors.Is(err, transfer.ErrBadTable) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		again, _ := pt.MarshalBinary()
		if !bytes.Equal(again, raw) {
			t.Fatal("a table has two wire forms")
		}
		if len(pt.Root()) != transfer.HashSize {
			t.Fatal("no root")
		}
	})
}

func FuzzDecodeBitmap(f *testing.F) {
	f.Add([]byte{0xff, 0x80}, 9)
	f.Add([]byte{0xff, 0xc0}, 9)
	f.Add([]byte{}, 0)
	f.Fuzz(func(t *testing.T, raw []byte, n int) {
		if n < 0 || n > transfer.MaxPieces {
			return
		}
		set, err := transfer.DecodeBitmap(raw, n)
		if err != nil {
			return
		}
		count := 0
		for i := range n {
			if set.Has(i) {
				count++
			}
		}
		if count != set.Count() || set.Has(n) || set.Has(-1) {
			t.Fatal("pieces beyond the end")
		}
	})
}
