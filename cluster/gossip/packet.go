package gossip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/hashicorp/go-msgpack/v2/codec"
)

// kind is the first byte of a message of memberlist's.
type kind byte

// Kinds that travel here, by memberlist's numbers. Compressed, encrypted and user
// messages are refused: nobody here sends them, and the first can grow a
// thousandfold when it is read.
const (
	kindPing     kind = 0
	kindIndirect kind = 1
	kindAck      kind = 2
	kindSuspect  kind = 3
	kindAlive    kind = 4
	kindDead     kind = 5
	kindPushPull kind = 6
	kindCompound kind = 7
	kindNack     kind = 11
	kindCRC      kind = 12
	kindError    kind = 13
)

// Bounds of what is read from a peer, in bytes.
const (
	// maxPacket is the longest packet: what memberlist makes for a datagram, and
	// its check sum.
	maxPacket = packetSize + 5
	// maxExchange is the longest message of a stream, a whole site's states.
	maxExchange = 256 << 10
	// maxStates is how many nodes an exchange of states may name.
	maxStates = 512
	// maxMeta is what a node says of itself, at most.
	maxMeta = 512
)

var errPacket = errors.New("not a gossip message")

// message is what is read of a single message. Each kind fills some of it.
type message struct {
	kind kind

	SeqNo      uint32
	Node       string // whom it is about
	SourceNode string // who asks
}

// readPacket takes a packet apart into single messages, in order, and calls each
// with every one that is well formed: what it names, and its bytes, which share the
// packet's. What follows something malformed is not read.
func readPacket(packet []byte, each func(m message, raw []byte)) error {
	if len(packet) == 0 || len(packet) > maxPacket {
		return fmt.Errorf("%w: %d bytes", errPacket, len(packet))
	}
	if kind(packet[0]) == kindCRC {
		if len(packet) < 6 {
			return fmt.Errorf("%w: cut short", errPacket)
		}
		packet = packet[5:] // TLS has checked more than this sum would
	}
	if kind(packet[0]) != kindCompound {
		return readMessage(packet, each)
	}
	packet = packet[1:]
	if len(packet) < 1 || len(packet) < 1+2*int(packet[0]) {
		return fmt.Errorf("%w: cut short", errPacket)
	}
	lengths, parts := packet[1:1+2*int(packet[0])], packet[1+2*int(packet[0]):]
	for ; len(lengths) > 0; lengths = lengths[2:] {
		length := int(binary.BigEndian.Uint16(lengths))
		if length > len(parts) {
			return fmt.Errorf("%w: cut short", errPacket)
		}
		if err := readMessage(parts[:length], each); err != nil {
			return err
		}
		parts = parts[length:]
	}
	return nil
}

// readMessage reads a single message.
func readMessage(raw []byte, each func(m message, raw []byte)) error {
	if len(raw) < 2 {
		return fmt.Errorf("%w: cut short", errPacket)
	}
	m := message{kind: kind(raw[0])}
	switch m.kind {
	case kindPing, kindIndirect, kindAck, kindSuspect, kindAlive, kindDead, kindNack:
	default:
		return fmt.Errorf("%w: kind %d", errPacket, m.kind)
	}
	rest, err := skipValue(raw[1:], maxNesting)
	if err != nil {
		return err
	}
	if len(rest) != 0 {
		return fmt.Errorf("%w: bytes behind the end", errPacket)
	}
	if err := decode(raw[1:], &m); err != nil {
		return err
	}
	each(m, raw)
	return nil
}

// states is the head of an exchange of states.
type states struct {
	Nodes        int
	UserStateLen int
	Join         bool
}

// checkExchange passes a message of a stream that memberlist can read without
// taking more memory than the message has.
func checkExchange(raw []byte) error {
	if len(raw) < 2 || len(raw) > maxExchange {
		return fmt.Errorf("%w: %d bytes", errPacket, len(raw))
	}
	values := 1
	rest, err := skipValue(raw[1:], maxNesting)
	if err != nil {
		return err
	}
	switch kind(raw[0]) {
	case kindPing, kindAck, kindError:
	case kindPushPull:
		var head states
		if err := decode(raw[1:len(raw)-len(rest)], &head); err != nil {
			return err
		}
		if head.Nodes < 0 || head.Nodes > maxStates || head.UserStateLen != 0 {
			return fmt.Errorf("%w: states of %d nodes and %d bytes besides", errPacket, head.Nodes, head.UserStateLen)
		}
		values += head.Nodes
	default:
		return fmt.Errorf("%w: kind %d", errPacket, raw[0])
	}
	for range values - 1 {
		if rest, err = skipValue(rest, maxNesting); err != nil {
			return err
		}
	}
	if len(rest) != 0 {
		return fmt.Errorf("%w: bytes behind the end", errPacket)
	}
	return nil
}

// decode reads a msgpack value that skipValue has passed.
func decode(raw []byte, into any) error {
	if err := codec.NewDecoderBytes(raw, &codec.MsgpackHandle{}).Decode(into); err != nil {
		return fmt.Errorf("%w: %w", errPacket, err)
	}
	return nil
}

// maxNesting of values in values; a message of memberlist's is a flat map.
const maxNesting = 3

// skipValue gives what follows the first msgpack value of b. Every length is held
// against the bytes that are there, so that nobody allocates for what was only
// announced. Extension types are refused: no message has one.
func skipValue(b []byte, depth int) ([]byte, error) {
	if len(b) == 0 || depth == 0 {
		return nil, fmt.Errorf("%w: cut short, or too deep", errPacket)
	}
	c := b[0]
	b = b[1:]
	bytes, values, width := 0, 0, 0 // that follow; of the length
	switch {
	case c <= 0x7f, c >= 0xe0, c == 0xc0, c == 0xc2, c == 0xc3: // small numbers, nil, booleans
	case c <= 0x8f:
		values = 2 * int(c&0xf)
	case c <= 0x9f:
		values = int(c & 0xf)
	case c <= 0xbf:
		bytes = int(c & 0x1f)
	case c >= 0xca && c <= 0xd3: // numbers of fixed size
		bytes = [...]int{4, 8, 1, 2, 4, 8, 1, 2, 4, 8}[c-0xca]
	case c == 0xc4, c == 0xd9:
		width = 1
	case c == 0xc5, c == 0xda, c == 0xdc, c == 0xde:
		width = 2
	case c == 0xc6, c == 0xdb, c == 0xdd, c == 0xdf:
		width = 4
	default:
		return nil, fmt.Errorf("%w: type %#x", errPacket, c)
	}
	if width > 0 {
		if len(b) < width {
			return nil, fmt.Errorf("%w: cut short", errPacket)
		}
		length := 0
		for _, x := range b[:width] {
			length = length<<8 | int(x)
		}
		b = b[width:]
		if length < 0 || length > len(b) { // each value has a byte at least
			return nil, fmt.Errorf("%w: a length of %d where %d bytes are left", errPacket, length, len(b))
		}
		switch c {
		case 0xdc, 0xdd:
			values = length
		case 0xde, 0xdf:
			values = 2 * length
		default:
			bytes = length
		}
	}
	if bytes > len(b) {
		return nil, fmt.Errorf("%w: cut short", errPacket)
	}
	b = b[bytes:]
	for range values {
		var err error
		if b, err = skipValue(b, depth-1); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// Frames. On a connection for packets each has its length in 2 bytes before it, on
// one for exchanges in 4.

// appendFrame appends a packet with its length.
func appendFrame(to, packet []byte) []byte {
	return append(binary.BigEndian.AppendUint16(to, uint16(len(packet))), packet...)
}

// readFrame reads a packet into buf, which has room for the longest.
func readFrame(r io.Reader, buf []byte) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(length[:]))
	if n == 0 || n > maxPacket || n > len(buf) {
		return nil, fmt.Errorf("%w: a packet of %d bytes", errPacket, n)
	}
	_, err := io.ReadFull(r, buf[:n])
	return buf[:n], err
}

// readExchange reads a stream's message. Memory grows with what arrives, not with
// what is announced.
func readExchange(r io.Reader) ([]byte, error) {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(length[:])
	if n == 0 || n > maxExchange {
		return nil, fmt.Errorf("%w: an exchange of %d bytes", errPacket, n)
	}
	raw, err := io.ReadAll(io.LimitReader(r, int64(n)))
	if err == nil && len(raw) < int(n) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, err
	}
	return raw, checkExchange(raw)
}
