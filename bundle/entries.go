package bundle

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/atoll-registry/atoll/bundle/entry"
)

// The entries of a log are a CBOR sequence (RFC 8742) of byte strings: first
// the right edge of the log's tree where the bundle begins it, then one entry's
// value after the other.

const maxEdge = 8 + 64*32

// itemHead is the head of a CBOR byte string in its shortest form.
func itemHead(length int) []byte {
	switch {
	case length < 24:
		return []byte{0x40 | byte(length)}
	case length < 1<<8:
		return []byte{0x58, byte(length)}
	case length < 1<<16:
		return binary.BigEndian.AppendUint16([]byte{0x59}, uint16(length))
	}
	return binary.BigEndian.AppendUint32([]byte{0x5a}, uint32(length))
}

func writeItem(w io.Writer, item []byte) error {
	if _, err := w.Write(itemHead(len(item))); err != nil {
		return err
	}
	_, err := w.Write(item)
	return err
}

// readItem reads one byte string of at most limit bytes. io.EOF means that the
// sequence is over; a sequence that ends within an item is malformed.
func readItem(r *bufio.Reader, limit int) ([]byte, error) {
	first, err := r.ReadByte()
	if err != nil {
		return nil, err
	}
	wide := map[byte]int{0x58: 1, 0x59: 2, 0x5a: 4}[first]
	length := int(first & 0x1f)
	if wide > 0 {
		var raw [4]byte
		if _, err := io.ReadFull(r, raw[4-wide:]); err != nil {
			return nil, within(err)
		}
		length = int(binary.BigEndian.Uint32(raw[:]))
	} else if first>>5 != 2 || length >= 24 {
		return nil, fmt.Errorf("not a byte string: %w", entry.ErrMalformed)
	}
	if len(itemHead(length)) != 1+wide {
		return nil, fmt.Errorf("length in another than the shortest form: %w", entry.ErrMalformed)
	}
	if length > limit {
		return nil, fmt.Errorf("%d bytes, at most %d are allowed: %w", length, limit, entry.ErrMalformed)
	}
	item := make([]byte, length)
	if _, err := io.ReadFull(r, item); err != nil {
		return nil, within(err)
	}
	return item, nil
}

func within(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("ends within an item: %w", entry.ErrMalformed)
	}
	return err
}

// ReadEntries reads a file of entries again, one that a Scope has checked:
// visit is called for each entry with its sequence number.
func ReadEntries(r io.Reader, visit func(seq uint64, value []byte) error) error {
	return readEntries(r, func(edge []byte) (uint64, error) {
		var tree entry.Tree
		err := tree.UnmarshalBinary(edge)
		return tree.Size(), err
	}, visit)
}

func readEntries(r io.Reader, begin func(edge []byte) (uint64, error), visit func(seq uint64, value []byte) error) error {
	buffered := bufio.NewReaderSize(r, 64<<10)
	edge, err := readItem(buffered, maxEdge)
	if err != nil {
		return fmt.Errorf("right edge: %w", within(err))
	}
	seq, err := begin(edge)
	if err != nil {
		return fmt.Errorf("right edge: %w", err)
	}
	for ; ; seq++ {
		value, err := readItem(buffered, entry.MaxValue)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("entry %d: %w", seq, err)
		}
		if err := visit(seq, value); err != nil {
			return err
		}
	}
}
