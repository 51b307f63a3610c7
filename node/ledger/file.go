package ledger

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"github.com/fxamacker/cbor/v2"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/node/catalog"
)

// The file is blocks: 4 bytes length (big-endian), 4 bytes CRC-32C of what
// follows, and so many bytes of one zstd frame, in which are records as CBOR, one
// behind the other. Neighbours are much alike, so a block takes a third of what
// its records would.
const (
	// fullBlock ends a block, in bytes of records.
	fullBlock = 64 << 10
	// maxRecord bounds a record: a manifest in a row, an entry, and their names.
	maxRecord = catalog.MaxRow + entry.MaxValue + 4096
	maxBlock  = fullBlock + maxRecord + 4096 // what does not compress grows a little
)

// place is where a record is: its block in the file, and its number there.
type place struct {
	block  int64
	number int
}

// writer makes blocks.
type writer struct {
	to      io.Writer
	packer  *zstd.Encoder // made with the first block
	records bytes.Buffer
	size    int64 // bytes written
}

func newWriter(to io.Writer) *writer { return &writer{to: to} }

func (w *writer) write(r record) error {
	if err := cbor.MarshalToBuffer(r, &w.records); err != nil || w.records.Len() < fullBlock {
		return err
	}
	return w.flush()
}

// flush ends the block.
func (w *writer) flush() (err error) {
	if w.records.Len() == 0 {
		return nil
	}
	if w.packer == nil {
		if w.packer, err = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithWindowSize(2*fullBlock), zstd.WithEncoderCRC(false)); err != nil {
			return err
		}
	}
	block := w.packer.EncodeAll(w.records.Bytes(), make([]byte, 8, 8+w.records.Len()/2))
	w.records.Reset()
	binary.BigEndian.PutUint32(block, uint32(len(block)-8))
	binary.BigEndian.PutUint32(block[4:], checksum(block[8:]))
	w.size += int64(len(block))
	_, err = w.to.Write(block)
	return err
}

func checksum(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }

// read gives the records of a ledger in order, each with its place in the file;
// fs.ErrNotExist when there is none. It ends at the first block that is damaged,
// with an error after those before it were given.
func read(dir string, give func(at place, r record)) (name string, err error) {
	p, err := readPosition(dir)
	if err != nil {
		return "", err
	}
	name = filepath.Join(dir, p.File)
	file, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer file.Close()
	in := bufio.NewReaderSize(io.LimitReader(file, p.Size), 256<<10)
	for at := int64(0); at < p.Size; {
		records, n, err := readBlock(in)
		if err != nil {
			return name, fmt.Errorf("the ledger is damaged at byte %d of %d: %w", at, p.Size, err)
		}
		for i, r := range records {
			give(place{at, i}, r)
		}
		at += n
	}
	return name, nil
}

// readBlock reads a block, which takes n bytes of the file.
func readBlock(in io.Reader) (records []record, n int64, err error) {
	var head [8]byte
	if _, err := io.ReadFull(in, head[:]); err != nil {
		return nil, 0, err
	}
	size := binary.BigEndian.Uint32(head[:4])
	if size > maxBlock {
		return nil, 0, fmt.Errorf("a block of %d bytes", size)
	}
	packed := make([]byte, size)
	if _, err := io.ReadFull(in, packed); err != nil {
		return nil, 0, err
	}
	if checksum(packed) != binary.BigEndian.Uint32(head[4:]) {
		return nil, 0, errors.New("its checksum is wrong")
	}
	unpacker, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxBlock))
	if err != nil {
		return nil, 0, err
	}
	defer unpacker.Close()
	body, err := unpacker.DecodeAll(packed, nil)
	if err != nil {
		return nil, 0, err
	}
	for len(body) > 0 {
		var r record
		if body, err = cbor.UnmarshalFirst(body, &r); err != nil {
			return nil, 0, err
		}
		records = append(records, r)
	}
	return records, int64(len(head)) + int64(size), nil
}

// manifestAt reads the manifest of one record again.
func manifestAt(file io.ReaderAt, at place, d digest.Digest) ([]byte, error) {
	records, _, err := readBlock(io.NewSectionReader(file, at.block, maxBlock+8))
	if err != nil {
		return nil, err
	}
	if at.number >= len(records) || d.Algorithm().FromBytes(records[at.number].Manifest) != d {
		return nil, fmt.Errorf("manifest %s is damaged in the ledger", d)
	}
	return records[at.number].Manifest, nil
}
