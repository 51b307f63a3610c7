package transfer

import (
	"errors"
	"fmt"
	"math/bits"
)

// Bitmap is a set of pieces, the first piece in the highest bit of the first byte
// as in BitTorrent. Its length comes from PiecesBitmap or DecodeBitmap.
type Bitmap []byte

// PiecesBitmap makes an empty set for n pieces.
func PiecesBitmap(n int) Bitmap { return make(Bitmap, (n+7)/8) }

// DecodeBitmap reads a set of exactly n pieces; spare bits must be zero. The
// result aliases b.
func DecodeBitmap(b []byte, n int) (Bitmap, error) {
	if len(b) != (n+7)/8 {
		return nil, fmt.Errorf("piece set has %d bytes, want %d for %d pieces", len(b), (n+7)/8, n)
	}
	if n%8 != 0 && b[len(b)-1]&(0xff>>(n%8)) != 0 {
		return nil, errors.New("piece set names pieces beyond the blob's end")
	}
	return b, nil
}

// Has says whether the piece is in the set; a piece beyond its end is not.
func (b Bitmap) Has(i int) bool {
	return i >= 0 && i/8 < len(b) && b[i/8]&(0x80>>(i%8)) != 0
}

// Add puts a piece in the set.
func (b Bitmap) Add(i int) { b[i/8] |= 0x80 >> (i % 8) }

// Count of the pieces in the set.
func (b Bitmap) Count() int {
	n := 0
	for _, x := range b {
		n += bits.OnesCount8(x)
	}
	return n
}

// Clone copies the set.
func (b Bitmap) Clone() Bitmap { return append(Bitmap(nil), b...) }
