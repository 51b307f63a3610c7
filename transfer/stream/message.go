package stream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/plan"
)

// protocolVersion is the first byte of a hello.
const protocolVersion = 1

// kind is the first byte of a frame; the length of what follows comes next, in four
// bytes, the highest first. All numbers are written so.
type kind byte

// From the wanter.
const (
	kindHello  kind = 1 // version, class, patience in ms (4), size (8), digest: a session begins
	kindAsk    kind = 2 // 5 bytes each: piece (4) or any, 1 when urgent, 2 when it is by now
	kindCancel kind = 3 // 4 bytes each: piece
	kindSkip   kind = 4 // 4 bytes each: piece
	kindNeed   kind = 5 // 4 bytes each: piece
	kindSkips  kind = 6 // the set of pieces to skip
	kindTables kind = 7 // empty: send the piece table
	kindClass  kind = 8 // class
	kindBye    kind = 9 // empty: the session ends; the holder says it back
)

// From the holder.
const (
	kindState    kind = 32 // what it holds (1), size (8): the answer to hello
	kindHave     kind = 33 // 4 bytes each: piece held by now
	kindHaves    kind = 34 // the set of pieces held
	kindComplete kind = 35 // empty: all are held by now
	kindGone     kind = 36 // empty: it does not hold the blob any more
	kindPiece    kind = 37 // piece (4), its bytes
	kindRefuse   kind = 38 // 4 bytes each: piece that cannot be read, or is not held
	kindTable    kind = 39 // the piece table
	kindBeat     kind = 40 // empty: still there
	kindWait     kind = 41 // empty: still there, and what is asked for is held back by a limit
	kindThin     kind = 42 // empty: the path is long and lossy, more connections carry more
	kindHops     kind = 43 // 1 byte: Arrival.Hops of its own fetch; 0 while it says nothing
)

// held says what a holder has of a blob.
type held byte

const (
	heldNothing  held = 0
	heldPart     held = 1
	heldComplete held = 2
	heldBusy     held = 3 // all of it, and as many are being served as may be
)

const (
	frameHeader = 5
	pieceHeader = 4
	maxHello    = 1 + 1 + 4 + 8 + 512
	// perFrame is how many pieces a frame names at most.
	perFrame = 1024
	anyPiece = 1<<32 - 1
	// maxWire is the largest blob that the protocol names pieces of: 2^32 of them but
	// the one that means any.
	maxWire = int64(anyPiece) * transfer.PieceSize
)

// limit is how long the body of a frame may be in a session about a blob of size
// bytes; it is compared before anything is allocated.
func limit(k kind, size int64) (int64, error) {
	pieces := int64(transfer.Pieces(size))
	switch k {
	case kindHello:
		return maxHello, nil
	case kindAsk:
		return perFrame * 5, nil
	case kindCancel, kindSkip, kindNeed, kindHave, kindRefuse:
		return perFrame * 4, nil
	case kindSkips, kindHaves:
		return (pieces + 7) / 8, nil
	case kindState:
		return 9, nil
	case kindPiece:
		return pieceHeader + min(transfer.PieceSize, size), nil
	case kindTable:
		return transfer.TableSize(min(size, transfer.MaxSize)), nil
	case kindClass, kindHops:
		return 1, nil
	case kindTables, kindBye, kindComplete, kindGone, kindBeat, kindWait, kindThin:
		return 0, nil
	}
	return 0, fmt.Errorf("frame of the unknown kind %d", k)
}

// errFrame: the peer sent what this protocol does not allow.
var errFrame = errors.New("frame is malformed")

// frame appends a whole frame.
func frame(to []byte, k kind, body ...byte) []byte {
	to = append(to, byte(k))
	to = binary.BigEndian.AppendUint32(to, uint32(len(body)))
	return append(to, body...)
}

// hello is what a wanter says first.
type hello struct {
	digest   digest.Digest
	size     int64
	class    transfer.Class
	patience time.Duration // within which the wanter expects a sign of life
}

func (h hello) append(to []byte) []byte {
	body := []byte{protocolVersion, byte(h.class)}
	body = binary.BigEndian.AppendUint32(body, uint32(min(h.patience.Milliseconds(), 1<<31)))
	body = binary.BigEndian.AppendUint64(body, uint64(h.size))
	return frame(to, kindHello, append(body, h.digest...)...)
}

func decodeHello(body []byte) (hello, error) {
	if len(body) < 14 {
		return hello{}, fmt.Errorf("hello of %d bytes: %w", len(body), errFrame)
	}
	if body[0] != protocolVersion {
		return hello{}, fmt.Errorf("the peer speaks version %d of the blob protocol, this node %d: %w", body[0], protocolVersion, errFrame)
	}
	size := binary.BigEndian.Uint64(body[6:])
	if size > uint64(maxWire) {
		return hello{}, fmt.Errorf("hello for %d bytes: %w", size, errFrame)
	}
	d, err := digest.Parse(string(body[14:]))
	if err != nil {
		return hello{}, fmt.Errorf("hello: %w: %w", errFrame, err)
	}
	return hello{
		digest:   d,
		size:     int64(size),
		class:    min(transfer.Class(body[1]), transfer.Prefetch),
		patience: time.Duration(binary.BigEndian.Uint32(body[2:])) * time.Millisecond,
	}, nil
}

// state is a holder's answer to hello.
type state struct {
	held held
	size uint64 // as the holder knows it; nothing says that it is a sound number
}

func (s state) append(to []byte) []byte {
	return frame(to, kindState, binary.BigEndian.AppendUint64([]byte{byte(s.held)}, s.size)...)
}

// serves says whether the session goes on.
func (s state) serves() bool { return s.held == heldPart || s.held == heldComplete }

// failure is why it does not.
func (s state) failure() *failure {
	if s.held == heldBusy {
		return fail(Gone, "%w", errBusy)
	}
	return fail(Gone, "%w", transfer.ErrNotHeld)
}

func decodeState(body []byte) (state, error) {
	if len(body) != 9 || body[0] > byte(heldBusy) {
		return state{}, fmt.Errorf("state: %w", errFrame)
	}
	return state{held(body[0]), binary.BigEndian.Uint64(body[1:])}, nil
}

// appendAsks appends asks, in as many frames as it takes.
func appendAsks(to []byte, asks []plan.Ask) []byte {
	for len(asks) > 0 {
		n := min(len(asks), perFrame)
		body := make([]byte, 0, 5*n)
		for _, a := range asks[:n] {
			piece, urgent := uint32(a.Piece), byte(0)
			if a.Piece == plan.Any {
				piece = anyPiece
			}
			if a.Urgent {
				urgent = 1
			}
			if a.Again {
				urgent = 2
			}
			body = append(binary.BigEndian.AppendUint32(body, piece), urgent)
		}
		to = frame(to, kindAsk, body...)
		asks = asks[n:]
	}
	return to
}

func decodeAsks(body []byte, pieces int) ([]plan.Ask, error) {
	if len(body)%5 != 0 || len(body) > 5*perFrame {
		return nil, fmt.Errorf("asks in %d bytes: %w", len(body), errFrame)
	}
	asks := make([]plan.Ask, 0, len(body)/5)
	for ; len(body) > 0; body = body[5:] {
		piece, urgent := binary.BigEndian.Uint32(body), body[4]
		switch {
		case urgent > 2:
			return nil, fmt.Errorf("ask: %w", errFrame)
		case piece == anyPiece:
			asks = append(asks, plan.Ask{Piece: plan.Any})
		case int64(piece) >= int64(pieces):
			return nil, fmt.Errorf("ask for piece %d of %d: %w", piece, pieces, errFrame)
		default:
			asks = append(asks, plan.Ask{Piece: int(piece), Urgent: urgent > 0, Again: urgent == 2})
		}
	}
	return asks, nil
}

// appendPieces appends frames that name pieces.
func appendPieces(to []byte, k kind, pieces ...int) []byte {
	for len(pieces) > 0 {
		n := min(len(pieces), perFrame)
		body := make([]byte, 0, 4*n)
		for _, i := range pieces[:n] {
			body = binary.BigEndian.AppendUint32(body, uint32(i))
		}
		to = frame(to, k, body...)
		pieces = pieces[n:]
	}
	return to
}

func decodePieces(body []byte, pieces int) ([]int, error) {
	if len(body)%4 != 0 || len(body) > 4*perFrame {
		return nil, fmt.Errorf("pieces in %d bytes: %w", len(body), errFrame)
	}
	list := make([]int, 0, len(body)/4)
	for ; len(body) > 0; body = body[4:] {
		i := binary.BigEndian.Uint32(body)
		if int64(i) >= int64(pieces) {
			return nil, fmt.Errorf("piece %d of %d: %w", i, pieces, errFrame)
		}
		list = append(list, int(i))
	}
	return list, nil
}

// decodePieceHeader reads which piece a frame of length bytes brings, and how many
// bytes it has; they must be those that the size implies.
func decodePieceHeader(header []byte, length, size int64) (piece int, n int64, err error) {
	if len(header) != pieceHeader {
		return 0, 0, fmt.Errorf("piece: %w", errFrame)
	}
	i := binary.BigEndian.Uint32(header)
	if int64(i) >= int64(transfer.Pieces(size)) {
		return 0, 0, fmt.Errorf("piece %d of a blob of %d bytes: %w", i, size, errFrame)
	}
	if _, n = transfer.PieceRange(size, int(i)); length != pieceHeader+n {
		return 0, 0, fmt.Errorf("piece %d has %d bytes, want %d: %w", i, length-pieceHeader, n, errFrame)
	}
	return int(i), n, nil
}
