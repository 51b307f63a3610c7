package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/klauspost/compress/zstd"
)

// record is one record of a snapshot of the state, whose format cluster/kv
// publishes (cluster/kv/snapshot.go).
type record struct {
	kind  byte   // 'R', 'L', 'E', 'S', 'Z'
	key   []byte // of a row, the name of a log, the ID of a result
	a, b  uint64 // created and revision, length and first, sequence, revision
	value []byte
}

const snapshotHead = "ATOLLKV\x01"

// readState reads a snapshot; each gets the records but the last, which ends it.
func readState(r io.Reader, each func(applied uint64, rec record) error) error {
	head := make([]byte, len(snapshotHead))
	if _, err := io.ReadFull(r, head); err != nil || string(head) != snapshotHead {
		return fmt.Errorf("a snapshot that begins with %q (%w): this benchmark knows %q", head, err, snapshotHead)
	}
	z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return err
	}
	defer z.Close()
	in := &stateReader{r: bufio.NewReaderSize(z, 64<<10)}
	applied := in.number()
	for in.err == nil {
		kind, err := in.r.ReadByte()
		if err != nil {
			return err
		}
		rec := record{kind: kind}
		switch kind {
		case 'R':
			rec.key, rec.a, rec.b, rec.value = in.bytes(), in.number(), in.number(), in.bytes()
		case 'L':
			rec.key, rec.a, rec.b = in.bytes(), in.number(), in.number()
		case 'E':
			rec.a, rec.value = in.number(), in.bytes()
		case 'S':
			rec.a, rec.key, rec.value = in.number(), in.full(16), in.bytes()
		case 'Z':
			return in.err
		default:
			return fmt.Errorf("a record of kind %q in a snapshot", kind)
		}
		if in.err == nil {
			in.err = each(applied, rec)
		}
	}
	return in.err
}

type stateReader struct {
	r   *bufio.Reader
	err error
}

func (i *stateReader) number() uint64 {
	n, err := binary.ReadUvarint(i.r)
	i.err = errors.Join(i.err, err)
	return n
}

func (i *stateReader) full(n int) []byte {
	b := make([]byte, n)
	_, err := io.ReadFull(i.r, b)
	i.err = errors.Join(i.err, err)
	return b
}

func (i *stateReader) bytes() []byte {
	n := i.number()
	if i.err != nil || n > 1<<20 {
		i.err = errors.Join(i.err, fmt.Errorf("%d bytes in a snapshot", n))
		return nil
	}
	return i.full(int(n))
}

// stateWriter writes a snapshot.
type stateWriter struct {
	z   *zstd.Encoder
	w   *bufio.Writer
	sum hash.Hash
	buf []byte
}

func writeState(w io.Writer, applied uint64) (*stateWriter, error) {
	if _, err := io.WriteString(w, snapshotHead); err != nil {
		return nil, err
	}
	z, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20), zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return nil, err
	}
	o := &stateWriter{z: z, w: bufio.NewWriterSize(z, 64<<10), sum: sha256.New()}
	o.buf = binary.AppendUvarint(nil, applied)
	return o, o.flush()
}

func (o *stateWriter) flush() error {
	o.sum.Write(o.buf)
	_, err := o.w.Write(o.buf)
	o.buf = o.buf[:0]
	return err
}

func (o *stateWriter) bytes(b []byte) {
	o.buf = append(binary.AppendUvarint(o.buf, uint64(len(b))), b...)
}

func (o *stateWriter) put(rec record) error {
	o.buf = append(o.buf, rec.kind)
	switch rec.kind {
	case 'R':
		o.bytes(rec.key)
		o.buf = binary.AppendUvarint(binary.AppendUvarint(o.buf, rec.a), rec.b)
		o.bytes(rec.value)
	case 'L':
		o.bytes(rec.key)
		o.buf = binary.AppendUvarint(binary.AppendUvarint(o.buf, rec.a), rec.b)
	case 'E':
		o.buf = binary.AppendUvarint(o.buf, rec.a)
		o.bytes(rec.value)
	case 'S':
		o.buf = append(binary.AppendUvarint(o.buf, rec.a), rec.key...)
		o.bytes(rec.value)
	}
	return o.flush()
}

// end writes the last record and the sum over all.
func (o *stateWriter) end() error {
	o.buf = append(o.buf, 'Z')
	err := o.flush()
	_, wrote := o.w.Write(o.sum.Sum(nil))
	return errors.Join(err, wrote, o.w.Flush(), o.z.Close())
}

// form is bytes with the names of an artifact taken out.
type form struct {
	parts [][]byte
	holes []int // which name is behind each part but the last
}

// formOf takes the names out, wherever they are.
func formOf(b []byte, from *[names][]byte) (f form) {
	for {
		at, which := len(b), -1
		for i := range from {
			if j := bytes.Index(b, from[i]); j >= 0 && j < at {
				at, which = j, i
			}
		}
		f.parts = append(f.parts, b[:at])
		if which < 0 {
			return f
		}
		f.holes = append(f.holes, which)
		b = b[at+len(from[which]):]
	}
}

// with puts another artifact's names in their places, behind b.
func (f form) with(b []byte, names *[names][]byte) []byte {
	for i, part := range f.parts {
		b = append(b, part...)
		if i < len(f.holes) {
			b = append(b, names[f.holes[i]]...)
		}
	}
	return b
}
