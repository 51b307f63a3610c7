package entry

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"

	"golang.org/x/mod/sumdb/tlog"
)

// Tree is the right edge of a log's RFC 6962 hash tree: the roots of the
// perfect subtrees that its leaves form, largest first. It is all that
// appending needs; its size is logarithmic. The zero Tree is an empty log.
type Tree struct {
	size uint64
	edge []tlog.Hash
}

// Append adds the next leaf.
func (t *Tree) Append(leaf tlog.Hash) {
	// Every trailing one bit of the old size is a subtree that the new leaf
	// completes to the next power of two.
	for n := t.size; n&1 == 1; n >>= 1 {
		last := len(t.edge) - 1
		leaf = tlog.NodeHash(t.edge[last], leaf)
		t.edge = t.edge[:last]
	}
	t.edge = append(t.edge, leaf)
	t.size++
}

// Size is the number of leaves.
func (t *Tree) Size() uint64 { return t.size }

// Root is the tree's root; of an empty tree, the SHA-256 of nothing.
func (t *Tree) Root() tlog.Hash {
	if t.size == 0 {
		return sha256.Sum256(nil)
	}
	root := t.edge[len(t.edge)-1]
	for i := len(t.edge) - 2; i >= 0; i-- {
		root = tlog.NodeHash(t.edge[i], root)
	}
	return root
}

// Edge is a copy of the right edge, largest subtree first.
func (t *Tree) Edge() []tlog.Hash { return slices.Clone(t.edge) }

// Clone is a tree that grows on its own.
func (t *Tree) Clone() *Tree { return &Tree{size: t.size, edge: slices.Clone(t.edge)} }

// NewTree rebuilds a tree from its size and right edge.
func NewTree(size uint64, edge []tlog.Hash) (*Tree, error) {
	if len(edge) != bits.OnesCount64(size) {
		return nil, fmt.Errorf("right edge of %d leaves: want %d hashes, have %d: %w", size, bits.OnesCount64(size), len(edge), ErrMalformed)
	}
	return &Tree{size: size, edge: slices.Clone(edge)}, nil
}

// MarshalBinary writes the size (8 bytes, big-endian) and the right edge.
func (t *Tree) MarshalBinary() ([]byte, error) {
	out := binary.BigEndian.AppendUint64(nil, t.size)
	for _, h := range t.edge {
		out = append(out, h[:]...)
	}
	return out, nil
}

// UnmarshalBinary reads what MarshalBinary wrote.
func (t *Tree) UnmarshalBinary(data []byte) error {
	if len(data) < 8 || (len(data)-8)%tlog.HashSize != 0 {
		return fmt.Errorf("right edge of %d bytes: %w", len(data), ErrMalformed)
	}
	size := binary.BigEndian.Uint64(data)
	var edge []tlog.Hash
	for rest := data[8:]; len(rest) > 0; rest = rest[tlog.HashSize:] {
		edge = append(edge, tlog.Hash(rest[:tlog.HashSize]))
	}
	read, err := NewTree(size, edge)
	if err != nil {
		return err
	}
	*t = *read
	return nil
}
