package swarm

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
)

// Before BitTorrent begins, the one who dials says which blob it wants and the
// holder says what it has of it. So a holder makes a torrent of a blob only when
// somebody asks for it, and nobody waits for a handshake that will never come.
//
//	hello:   "ATBT" 1 class:1 size:8 root:32 length:1 digest:length
//	answer:  status:1 size:8
//	request: 'T' for the piece table, or 'B': from here on it is BitTorrent
//	table:   'w' now and then while it is computed, 'f' and a byte when the holder's own
//	         fetch has other Hops, then 't' and the table's wire form, or 'x'
const (
	helloMagic   = "ATBT"
	helloVersion = 1
	helloFixed   = len(helloMagic) + 1 + 1 + 8 + transfer.HashSize + 1
	maxDigest    = 200
	answerSize   = 1 + 8

	askTable = 'T'
	askBegin = 'B'
	tableIs  = 't'
	tableYet = 'w'
	tableFar = 'f'
	tableNot = 'x'
)

// status of a blob at a holder.
type status uint8

const (
	complete status = iota + 1 // held
	partial                    // on its way there
	gone                       // neither
	busy                       // too much is going on there at the moment
	linked                     // there is a connection for this blob already
)

var errHello = errors.New("not a hello of this protocol")

// marshalHello says which blob is wanted, which must have a root, and what for.
func marshalHello(b transfer.Blob, class transfer.Class) []byte {
	out := append(make([]byte, 0, helloFixed+len(b.Digest)), helloMagic...)
	out = append(out, helloVersion, byte(class))
	out = binary.BigEndian.AppendUint64(out, uint64(b.Size))
	out = append(out, b.Root...)
	out = append(out, byte(len(b.Digest)))
	return append(out, b.Digest...)
}

// readHello reads what the other end wants, and what for. Errors wrap errHello when it
// makes no sense.
func readHello(r io.Reader) (transfer.Blob, transfer.Class, error) {
	var fixed [helloFixed]byte
	if _, err := io.ReadFull(r, fixed[:]); err != nil {
		return transfer.Blob{}, 0, fmt.Errorf("reading a hello: %w", err)
	}
	at := len(helloMagic)
	if string(fixed[:at]) != helloMagic || fixed[at] != helloVersion {
		return transfer.Blob{}, 0, fmt.Errorf("%w: it begins with %q", errHello, fixed[:at+1])
	}
	name := make([]byte, fixed[helloFixed-1])
	if len(name) > maxDigest {
		return transfer.Blob{}, 0, fmt.Errorf("%w: a digest of %d bytes", errHello, len(name))
	}
	if _, err := io.ReadFull(r, name); err != nil {
		return transfer.Blob{}, 0, fmt.Errorf("reading a hello: %w", err)
	}
	b := transfer.Blob{
		Digest: digest.Digest(name),
		Size:   int64(binary.BigEndian.Uint64(fixed[at+2:])),
		Root:   append([]byte(nil), fixed[at+10:at+10+transfer.HashSize]...),
	}
	if err := b.Check(); err != nil || b.Size == 0 {
		return transfer.Blob{}, 0, fmt.Errorf("%w: %w", errHello, errors.Join(err, errEmpty(b)))
	}
	return b, min(transfer.Class(fixed[at+1]), transfer.Prefetch), nil
}

func errEmpty(b transfer.Blob) error {
	if b.Size == 0 {
		return errors.New("nobody has to ask for an empty blob")
	}
	return nil
}

// answer is what a holder says of a blob.
type answer struct {
	status status
	size   int64
}

func (a answer) marshal() []byte {
	return binary.BigEndian.AppendUint64([]byte{byte(a.status)}, uint64(a.size))
}

func readAnswer(r io.Reader) (answer, error) {
	var raw [answerSize]byte
	if _, err := io.ReadFull(r, raw[:]); err != nil {
		return answer{}, err
	}
	a := answer{status(raw[0]), int64(binary.BigEndian.Uint64(raw[1:]))}
	if a.status < complete || a.status > linked {
		return answer{}, fmt.Errorf("answered with the unknown status %d", raw[0])
	}
	return a, nil
}

// readTable reads the answer to askTable for the blob and verifies it; alive is
// called for each sign of life, far with the Hops of the holder's own fetch.
func readTable(r io.Reader, b transfer.Blob, alive func(), far func(hops int)) (transfer.PieceTable, error) {
	var kind [1]byte
	for {
		if _, err := io.ReadFull(r, kind[:]); err != nil {
			return transfer.PieceTable{}, err
		}
		alive()
		switch kind[0] {
		case tableYet:
			continue
		case tableFar:
			if _, err := io.ReadFull(r, kind[:]); err != nil {
				return transfer.PieceTable{}, err
			}
			far(int(kind[0]))
			continue
		case tableNot:
			return transfer.PieceTable{}, &failure{transfer.Broken, errors.New("has no piece table at the moment")}
		case tableIs:
		default:
			return transfer.PieceTable{}, &failure{transfer.Broken, fmt.Errorf("answered with %q instead of a piece table", kind[0])}
		}
		break
	}
	raw := make([]byte, transfer.TableSize(b.Size))
	for at := 0; at < len(raw); {
		next := min(at+transfer.LeafSize, len(raw))
		if _, err := io.ReadFull(r, raw[at:next]); err != nil {
			return transfer.PieceTable{}, err
		}
		at = next
		alive()
	}
	t, err := transfer.DecodePieceTable(raw)
	if err == nil {
		err = t.Verify(b)
	}
	if err != nil {
		return transfer.PieceTable{}, &failure{transfer.BadTable, err}
	}
	return t, nil
}

// failure is why a link to a holder came to nothing.
type failure struct {
	why transfer.Reason
	err error
}

func (f *failure) Error() string { return string(f.why) + ": " + f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

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
