package swarm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"testing"

	"github.com/anacrolix/torrent/metainfo"
	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
)

// tide is content that anybody can make again: the line, over and over.
func tide(n int) []byte {
	line := []byte("the tide comes and goes\n")
	return bytes.Repeat(line, n/len(line)+1)[:n]
}

func blobOf(t testing.TB, content []byte) (transfer.Blob, transfer.PieceTable) {
	t.Helper()
	table, err := transfer.HashPieces(bytes.NewReader(content), int64(len(content)))
	if err != nil {
		t.Fatal(err)
	}
	return transfer.Blob{Digest: digest.FromBytes(content), Size: int64(len(content)), Root: table.Root()}, table
}

// The published vectors: every version of every node must come to these.
func TestInfohashVectors(t *testing.T) {
	for _, v := range vectors {
		content := tide(v.size)
		b, table := blobOf(t, content)
		hash := Infohash(b)
		if got := hex.EncodeToString(hash[:]); got != v.infohash {
			t.Errorf("%d bytes: infohash %s, want %s", v.size, got, v.infohash)
		}
		// And the library reads it as what it is meant to be.
		var info metainfo.Info
		mi := metainfo.MetaInfo{InfoBytes: InfoDict(b)}
		info, err := mi.UnmarshalInfo()
		if err != nil {
			t.Fatal(err)
		}
		if !info.HasV2() || info.HasV1() || info.PieceLength != transfer.PieceSize || info.TotalLength() != b.Size || info.NumPieces() != table.Len() {
			t.Errorf("%d bytes: read as %+v", v.size, info)
		}
		if got := mi.HashInfoBytes(); got == [20]byte{} {
			t.Error("no v1 hash of the bytes")
		}
		if sum := sha256.Sum256(mi.InfoBytes); sum != hash {
			t.Error("the infohash is not the SHA-256 of the dictionary")
		}
	}
	id := peerID("node-a")
	if got := hex.EncodeToString(id[:]); got != vectorPeerID {
		t.Errorf("peer id %s, want %s", got, vectorPeerID)
	}
}

// Two blobs that differ in anything differ in their infohash.
func TestInfohashTellsBlobsApart(t *testing.T) {
	b, _ := blobOf(t, tide(1000))
	root := bytes.Clone(b.Root)
	root[0] ^= 1
	seen := map[[hashSize]byte]bool{}
	for _, other := range []transfer.Blob{
		b, {Digest: b.Digest, Size: b.Size + 1, Root: b.Root}, {Digest: b.Digest, Size: b.Size, Root: root},
		{Digest: digest.FromString("other"), Size: b.Size, Root: b.Root},
	} {
		seen[Infohash(other)] = true
	}
	if len(seen) != 4 {
		t.Errorf("%d infohashes for 4 blobs", len(seen))
	}
}
