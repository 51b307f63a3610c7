package swarm

import (
	"encoding/binary"
	"fmt"

	"github.com/atoll-registry/atoll/transfer"
)

// Messages of the peer protocol that are of use between nodes (BEP 3 and BEP 6).
const (
	msgChoke         = 0
	msgUnchoke       = 1
	msgInterested    = 2
	msgNotInterested = 3
	msgHave          = 4
	msgBitfield      = 5
	msgRequest       = 6
	msgPiece         = 7
	msgCancel        = 8
	msgSuggest       = 13
	msgHaveAll       = 14
	msgHaveNone      = 15
	msgReject        = 16
	msgAllowedFast   = 17
)

// Messages that BitTorrent does not have. The library does not see them.
const (
	msgHeld   = 160 // a limit holds back what was asked for
	msgClass  = 161 // what the blob is wanted for
	msgChoose = 162 // 1: this end chooses what it sends from now on, 0: it does so no more
	msgPush   = 163 // a piece comes that was not asked for
	msgHops   = 164 // Arrival.Hops of the fetch at this end; 0 until it is said
)

const (
	lengthSize = 4
	pieceHead  = 9 // type, piece and offset
	// maxIgnored bounds a message that is of no use here, and how many of them one
	// connection may bring.
	maxIgnored      = 16 << 10
	maxIgnoredCount = 64
)

// chunk is a part of a piece, as a request names it.
type chunk struct{ piece, begin, length uint32 }

// chunksOf lists the chunks of a piece.
func (s shape) chunksOf(piece int) (all []chunk) {
	_, n := transfer.PieceRange(s.size, piece)
	for at := int64(0); at < n; at += chunkSize {
		all = append(all, chunk{uint32(piece), uint32(at), uint32(min(chunkSize, n-at))})
	}
	return all
}

// shape of a blob bounds what a message may say about it.
type shape struct {
	size   int64
	pieces int
}

// chunks is how many a piece has.
func (s shape) chunks(piece int) int {
	_, n := transfer.PieceRange(s.size, piece)
	return int((n + chunkSize - 1) / chunkSize)
}

// check says whether a chunk is one that this engine asks for: aligned, no longer
// than a chunk and within its piece.
func (s shape) check(c chunk) error {
	if int64(c.piece) >= int64(s.pieces) {
		return fmt.Errorf("names piece %d of %d", c.piece, s.pieces)
	}
	_, n := transfer.PieceRange(s.size, int(c.piece))
	if c.begin%chunkSize != 0 || int64(c.begin) >= n || int64(c.length) != min(chunkSize, n-int64(c.begin)) {
		return fmt.Errorf("names %d bytes at %d of piece %d, which has %d", c.length, c.begin, c.piece, n)
	}
	return nil
}

// message is what came from a peer but for the bytes of a piece.
type message struct {
	kind     byte
	piece    int             // of have, push, suggest and allowed fast
	chunk    chunk           // of request, piece, cancel and reject
	have     transfer.Bitmap // of bitfield; aliases the input
	class    transfer.Class
	hops     int
	on       bool // of choose
	useless  bool // to be ignored
	trailing int  // bytes of the piece that follow
}

// header is how much of a message of n bytes and a kind is read before parse: all of
// it, but for the bytes of a piece and of what is ignored. It says whether a message
// of this length may be at all.
func (s shape) header(kind byte, n uint32) (int, error) {
	want, exact := 1, true
	switch kind {
	case msgChoke, msgUnchoke, msgInterested, msgNotInterested, msgHaveAll, msgHaveNone, msgHeld:
	case msgClass, msgChoose, msgHops:
		want = 2
	case msgHave, msgPush, msgSuggest, msgAllowedFast:
		want = 5
	case msgRequest, msgCancel, msgReject:
		want = 13
	case msgBitfield:
		want = 1 + (s.pieces+7)/8
	case msgPiece:
		want, exact = pieceHead, false
		if n > pieceHead+chunkSize {
			return 0, fmt.Errorf("sends a piece message of %d bytes", n)
		}
	default:
		if n > maxIgnored {
			return 0, fmt.Errorf("sends %d bytes of message %d, which nobody asked for", n, kind)
		}
		return 1, nil
	}
	if exact && int64(n) != int64(want) || !exact && int64(n) < int64(want) {
		return 0, fmt.Errorf("sends %d bytes of message %d, which has %d", n, kind, want)
	}
	return want, nil
}

// parse reads the header of a message, whose length is what header said.
func (s shape) parse(head []byte, n uint32) (m message, err error) {
	m.kind = head[0]
	body := head[1:]
	switch m.kind {
	case msgChoke, msgUnchoke, msgInterested, msgNotInterested, msgHaveAll, msgHaveNone, msgHeld:
	case msgClass:
		m.class = min(transfer.Class(body[0]), transfer.Prefetch)
	case msgChoose:
		m.on = body[0] != 0
	case msgHops:
		m.hops = int(body[0])
	case msgHave, msgPush, msgSuggest, msgAllowedFast:
		i := binary.BigEndian.Uint32(body)
		if int64(i) >= int64(s.pieces) {
			return m, fmt.Errorf("message %d names piece %d of %d", m.kind, i, s.pieces)
		}
		m.piece = int(i)
	case msgRequest, msgCancel, msgReject:
		m.chunk = chunk{binary.BigEndian.Uint32(body), binary.BigEndian.Uint32(body[4:]), binary.BigEndian.Uint32(body[8:])}
		if err := s.check(m.chunk); err != nil {
			return m, fmt.Errorf("message %d %w", m.kind, err)
		}
	case msgBitfield:
		if m.have, err = transfer.DecodeBitmap(body, s.pieces); err != nil {
			return m, err
		}
	case msgPiece:
		m.trailing = int(n) - pieceHead
		m.chunk = chunk{binary.BigEndian.Uint32(body), binary.BigEndian.Uint32(body[4:]), uint32(m.trailing)}
		if err := s.check(m.chunk); err != nil {
			return m, fmt.Errorf("a piece message %w", err)
		}
	default:
		m.useless, m.trailing = true, int(n)-1
	}
	return m, nil
}

// appendPush appends the message that a piece comes.
func appendPush(b []byte, piece int) []byte {
	return binary.BigEndian.AppendUint32(append(b, 0, 0, 0, 5, msgPush), uint32(piece))
}

// appendChoose appends the message that the sender chooses from now on, or no more.
func appendChoose(b []byte, on bool) []byte {
	if on {
		return append(b, 0, 0, 0, 2, msgChoose, 1)
	}
	return append(b, 0, 0, 0, 2, msgChoose, 0)
}

// appendReject appends the message that a chunk will not be sent.
func appendReject(b []byte, c chunk) []byte { return appendChunk(b, msgReject, c) }

func appendChunk(b []byte, kind byte, c chunk) []byte {
	b = append(b, 0, 0, 0, 13, kind)
	for _, v := range [...]uint32{c.piece, c.begin, c.length} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return b
}

func appendClass(b []byte, c transfer.Class) []byte { return append(b, 0, 0, 0, 2, msgClass, byte(c)) }

func appendHops(b []byte, hops int) []byte { return append(b, 0, 0, 0, 2, msgHops, byte(hops)) }

func appendHeld(b []byte) []byte { return append(b, 0, 0, 0, 1, msgHeld) }

// appendInterested appends the message without which nothing may be asked for.
func appendInterested(b []byte) []byte { return append(b, 0, 0, 0, 1, msgInterested) }
