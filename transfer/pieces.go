package transfer

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
)

const (
	// PieceSize is the unit that is requested, verified and passed on.
	PieceSize = 256 << 10
	// LeafSize is the unit that is hashed, BEP 52's block.
	LeafSize = 16 << 10
	// HashSize of SHA-256.
	HashSize = sha256.Size
	// MaxPieces a table may have: its encoding stays under 32 MiB and 64 KiB.
	MaxPieces = 1 << 20
	// MaxSize of a blob with a piece table: 256 GiB.
	MaxSize = int64(MaxPieces) * PieceSize

	pieceLeaves  = PieceSize / LeafSize
	tableMagic   = "ATPT"
	tableVersion = 1
	tableHeader  = len(tableMagic) + 1 + 8
)

// hash of a tree node; the zero hash stands for leaves beyond the blob's end.
type hash = [HashSize]byte

// PieceTable is the layer of a blob's hash tree that has one hash per piece.
//
// The tree is that of BEP 52: leaves are the SHA-256 of 16 KiB blocks (the last
// may be shorter), padded with zero hashes to a power of two; a node is the
// SHA-256 of its two children. A piece's hash is the node above its 16 leaves; a
// blob of one piece has a tree no taller than its own leaves need, and its only
// piece hash is the root. An empty blob has no pieces; its root is the zero hash.
//
// The tree does not tell leaves from nodes, so a root means something only
// together with the blob's size, which fixes the tree's shape. Blob carries both.
//
// A PieceTable is an immutable value.
type PieceTable struct {
	size   int64
	hashes []hash
}

// Pieces says how many pieces a blob of size bytes has; size must not be negative.
func Pieces(size int64) int {
	return int((size + PieceSize - 1) / PieceSize)
}

// PieceRange gives offset and length of a piece of a blob of size bytes.
func PieceRange(size int64, piece int) (off, n int64) {
	off = int64(piece) * PieceSize
	return off, min(PieceSize, size-off)
}

// HashPieces reads exactly size bytes and makes their table. One pass, 256 KiB of
// memory beside the table. A reader that is shorter or longer than size is an error.
func HashPieces(r io.Reader, size int64) (PieceTable, error) {
	if size < 0 || size > MaxSize {
		return PieceTable{}, fmt.Errorf("piece table: size %d is not within 0 and %d", size, MaxSize)
	}
	t := PieceTable{size: size, hashes: make([]hash, Pieces(size))}
	buf := make([]byte, min(PieceSize, size))
	for i := range t.hashes {
		_, n := PieceRange(size, i)
		if _, err := io.ReadFull(r, buf[:n]); err != nil {
			return PieceTable{}, fmt.Errorf("piece table: reading piece %d of %d: %w", i, len(t.hashes), err)
		}
		t.hashes[i] = hashPiece(buf[:n], t.leaves())
	}
	if n, _ := io.ReadFull(r, make([]byte, 1)); n != 0 {
		return PieceTable{}, fmt.Errorf("piece table: the content goes on after %d bytes", size)
	}
	return t, nil
}

// Size of the blob in bytes.
func (t PieceTable) Size() int64 { return t.size }

// Len is the number of pieces.
func (t PieceTable) Len() int { return len(t.hashes) }

// Root of the hash tree, HashSize bytes.
func (t PieceTable) Root() []byte {
	if len(t.hashes) == 0 {
		return make([]byte, HashSize)
	}
	var pad hash
	for span := 1; span < t.leaves(); span *= 2 {
		pad = hashPair(pad, pad)
	}
	layer := make([]hash, len(t.hashes))
	copy(layer, t.hashes)
	for len(layer) > 1 {
		if len(layer)%2 == 1 {
			layer = append(layer, pad)
		}
		for i := range len(layer) / 2 {
			layer[i] = hashPair(layer[2*i], layer[2*i+1])
		}
		layer = layer[:len(layer)/2]
		pad = hashPair(pad, pad)
	}
	return layer[0][:]
}

// VerifyPiece says whether data is the piece: ErrBadPiece when it is not.
func (t PieceTable) VerifyPiece(piece int, data []byte) error {
	if piece < 0 || piece >= len(t.hashes) {
		return fmt.Errorf("piece %d of %d: %w", piece, len(t.hashes), ErrBadPiece)
	}
	if _, n := PieceRange(t.size, piece); int64(len(data)) != n {
		return fmt.Errorf("piece %d has %d bytes, want %d: %w", piece, len(data), n, ErrBadPiece)
	}
	if hashPiece(data, t.leaves()) != t.hashes[piece] {
		return fmt.Errorf("piece %d: %w", piece, ErrBadPiece)
	}
	return nil
}

// Verify says whether the table is that of the blob, which must have a root.
func (t PieceTable) Verify(b Blob) error {
	if t.size != b.Size {
		return fmt.Errorf("piece table is for %d bytes, the blob has %d: %w", t.size, b.Size, ErrBadTable)
	}
	if len(b.Root) != HashSize || !bytes.Equal(t.Root(), b.Root) {
		return ErrBadTable
	}
	return nil
}

// SinglePiece makes the table of a blob of at most one piece, whose root says
// everything; ok is false for a blob without a root or with more pieces.
func SinglePiece(b Blob) (t PieceTable, ok bool) {
	if len(b.Root) != HashSize || b.Size < 0 || b.Size > PieceSize {
		return PieceTable{}, false
	}
	t = PieceTable{size: b.Size}
	if b.Size > 0 {
		t.hashes = []hash{hash(b.Root)}
	}
	return t, t.Verify(b) == nil
}

// TableSize is the length of a table's encoding for a blob of size bytes.
func TableSize(size int64) int64 { return int64(tableHeader) + int64(Pieces(size))*HashSize }

// MarshalBinary gives the wire form: "ATPT", version 1, the blob's size as eight
// bytes big-endian, then the piece hashes in order. It never fails.
func (t PieceTable) MarshalBinary() ([]byte, error) {
	b := make([]byte, 0, TableSize(t.size))
	b = append(b, tableMagic...)
	b = append(b, tableVersion)
	b = binary.BigEndian.AppendUint64(b, uint64(t.size))
	for _, h := range t.hashes {
		b = append(b, h[:]...)
	}
	return b, nil
}

// DecodePieceTable reads the wire form and nothing more or less. It checks the
// shape only; Verify compares with the root. Errors wrap ErrBadTable.
func DecodePieceTable(b []byte) (PieceTable, error) {
	if len(b) < tableHeader || string(b[:len(tableMagic)]) != tableMagic {
		return PieceTable{}, fmt.Errorf("not a piece table: %w", ErrBadTable)
	}
	if v := b[len(tableMagic)]; v != tableVersion {
		return PieceTable{}, fmt.Errorf("piece table of version %d, this node reads %d: %w", v, tableVersion, ErrBadTable)
	}
	size := binary.BigEndian.Uint64(b[len(tableMagic)+1:])
	if size > uint64(MaxSize) {
		return PieceTable{}, fmt.Errorf("piece table for %d bytes, at most %d are possible: %w", size, MaxSize, ErrBadTable)
	}
	if want := TableSize(int64(size)); int64(len(b)) != want {
		return PieceTable{}, fmt.Errorf("piece table has %d bytes, want %d: %w", len(b), want, ErrBadTable)
	}
	t := PieceTable{size: int64(size), hashes: make([]hash, Pieces(int64(size)))}
	for i := range t.hashes {
		t.hashes[i] = hash(b[tableHeader+i*HashSize:])
	}
	return t, nil
}

// leaves that a piece's subtree has, padding included.
func (t PieceTable) leaves() int {
	if len(t.hashes) > 1 {
		return pieceLeaves
	}
	blocks := int((t.size + LeafSize - 1) / LeafSize)
	if blocks <= 1 {
		return 1
	}
	return 1 << bits.Len(uint(blocks-1))
}

// hashPiece is the node above the leaves of a piece; leaves is a power of two.
func hashPiece(data []byte, leaves int) hash {
	var layer [pieceLeaves]hash
	for i := 0; i < leaves && len(data) > 0; i++ {
		n := min(LeafSize, len(data))
		layer[i] = sha256.Sum256(data[:n])
		data = data[n:]
	}
	for n := leaves; n > 1; n /= 2 {
		for i := range n / 2 {
			layer[i] = hashPair(layer[2*i], layer[2*i+1])
		}
	}
	return layer[0]
}

func hashPair(a, b hash) hash {
	var pair [2 * HashSize]byte
	copy(pair[:], a[:])
	copy(pair[HashSize:], b[:])
	return sha256.Sum256(pair[:])
}
