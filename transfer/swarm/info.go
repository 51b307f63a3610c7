package swarm

import (
	"crypto/sha256"
	"fmt"

	"github.com/atoll-registry/atoll/transfer"
)

// chunkSize is what one request asks for: half a piece.
const chunkSize = 128 << 10

// hashSize of a BitTorrent v2 infohash; the handshake carries its first shortSize
// bytes.
const (
	hashSize  = sha256.Size
	shortSize = 20
)

// InfoDict gives the BEP 52 info dictionary of a blob: one file, named by the blob's
// digest, whose pieces root is the blob's. It follows from digest, size and root
// alone, so every node and every site comes to the same one. The blob must have a
// root and at least one byte.
func InfoDict(b transfer.Blob) []byte {
	name := fmt.Sprintf("%d:%s", len(b.Digest), b.Digest)
	return fmt.Appendf(nil, "d9:file treed%sd0:d6:lengthi%de11:pieces root%d:%seee12:meta versioni2e4:name%s12:piece lengthi%dee",
		name, b.Size, len(b.Root), b.Root, name, transfer.PieceSize)
}

// Infohash is the SHA-256 of the info dictionary, BitTorrent's name for the blob.
func Infohash(b transfer.Blob) [hashSize]byte { return sha256.Sum256(InfoDict(b)) }

// peerID is the BitTorrent peer id of a node: it follows from the node's id, which
// its certificate proves, so a connection cannot claim another's.
func peerID(node string) (id [shortSize]byte) {
	sum := sha256.Sum256([]byte("atoll peer " + node))
	copy(id[:], "-AT0001-")
	copy(id[8:], sum[:])
	return id
}

// layer is the piece layer as BEP 52 writes it, the hashes one after the other; ""
// for a blob of one piece, which has none.
func layer(t transfer.PieceTable) (string, error) {
	raw, err := t.MarshalBinary()
	if err != nil || t.Len() <= 1 {
		return "", err
	}
	return string(raw[len(raw)-t.Len()*transfer.HashSize:]), nil
}
