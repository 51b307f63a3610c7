package kv

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/hashicorp/raft"
	"github.com/klauspost/compress/zstd"
)

// A snapshot is the 8 bytes "ATOLLKV" and the format version, then one zstd
// stream of
//
//	uvarint applied revision
//	records, each a kind byte and
//	  'R' a row:   bytes key, uvarint created, uvarint revision, bytes value
//	  'L' a log:   bytes name, uvarint length, uvarint first entry kept
//	  'E' an entry of the log before it: uvarint sequence, bytes value
//	  'S' a result: uvarint revision, 16 bytes ID, bytes result
//	  'Z' the end: the SHA-256 of the stream up to and including this 'Z'
//
// with rows in order of their keys, logs of their names and results of their
// revisions. Local rows are not in it.
const (
	snapshotMagic   = "ATOLLKV"
	snapshotVersion = 1

	// snapshotWindow bounds what compression and decompression hold in memory.
	snapshotWindow = 1 << 20
	// restoreBatch is about how many bytes one transaction restores.
	restoreBatch = 4 << 20
)

// Snapshot implements raft.FSM: it holds the state open and copies nothing.
func (m *Machine) Snapshot() (raft.FSMSnapshot, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		// Raft would drop the log up to entries that were never applied.
		return nil, m.err
	}
	s, err := m.engine.Open()
	if err != nil {
		return nil, fmt.Errorf("snapshot the state: %w", err)
	}
	return &fsmSnapshot{state: s, sync: m.engine.Sync}, nil
}

type fsmSnapshot struct {
	once  sync.Once
	state Snapshot
	sync  func() error
}

// Persist releases the state itself: raft.RecoverCluster never calls Release. A
// snapshot is kept only when the engine holds all that is in it: a start on an
// engine that is behind would have to restore it, and the log before it may be gone.
func (s *fsmSnapshot) Persist(sink raft.SnapshotSink) error {
	defer s.Release()
	err := WriteSnapshot(sink, s.state)
	// The engine waits for readers when its file outgrows what is mapped, and who
	// waits for the engine must not be one.
	s.Release()
	if err == nil {
		err = s.sync()
	}
	if err != nil {
		return errors.Join(fmt.Errorf("snapshot the state: %w", err), sink.Cancel())
	}
	return sink.Close()
}

func (s *fsmSnapshot) Release() { s.once.Do(s.state.Release) }

// WriteSnapshot writes a state in the snapshot format. What it holds in memory
// does not grow with the state.
func WriteSnapshot(w io.Writer, c Content) error {
	if _, err := w.Write(append([]byte(snapshotMagic), snapshotVersion)); err != nil {
		return err
	}
	z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(snapshotWindow))
	if err != nil {
		return err
	}
	out := &recordWriter{w: bufio.NewWriterSize(z, 64<<10), sum: sha256.New()}
	err = out.state(c)
	if err == nil {
		err = out.w.Flush()
	}
	return errors.Join(err, z.Close())
}

type recordWriter struct {
	w   *bufio.Writer
	sum hash.Hash
	buf []byte
}

func (o *recordWriter) write() error {
	o.sum.Write(o.buf)
	_, err := o.w.Write(o.buf)
	o.buf = o.buf[:0]
	return err
}

func (o *recordWriter) state(c Content) error {
	o.buf = binary.AppendUvarint(o.buf, Applied(c))
	if err := o.write(); err != nil {
		return err
	}
	for row := range ReadRows(c, nil, nil) {
		o.buf = appendBytes(append(o.buf, 'R'), row.Key)
		o.buf = binary.AppendUvarint(o.buf, row.Created)
		o.buf = binary.AppendUvarint(o.buf, row.Revision)
		o.buf = appendBytes(o.buf, row.Value)
		if err := o.write(); err != nil {
			return err
		}
	}
	for name := range c.Ascend(lengths, nil, nil) {
		if err := o.log(c, name); err != nil {
			return err
		}
	}
	for k, v := range c.Ascend(seen, nil, nil) {
		o.buf = binary.AppendUvarint(append(o.buf, 'S'), fromBE64(k))
		o.buf = append(o.buf, v[:16]...)
		o.buf = appendBytes(o.buf, v[16:])
		if err := o.write(); err != nil {
			return err
		}
	}
	o.buf = append(o.buf, 'Z')
	if err := o.write(); err != nil {
		return err
	}
	_, err := o.w.Write(o.sum.Sum(nil))
	return err
}

func (o *recordWriter) log(c Content, name []byte) error {
	l := readLength(c, name)
	o.buf = appendBytes(append(o.buf, 'L'), name)
	o.buf = binary.AppendUvarint(o.buf, l.length)
	o.buf = binary.AppendUvarint(o.buf, l.first)
	if err := o.write(); err != nil {
		return err
	}
	for seq, value := range ReadLog(c, name, 0) {
		o.buf = binary.AppendUvarint(append(o.buf, 'E'), seq)
		o.buf = appendBytes(o.buf, value)
		if err := o.write(); err != nil {
			return err
		}
	}
	return nil
}

// errSnapshotFormat is a snapshot of another format: no retry will help.
var errSnapshotFormat = errors.New("snapshot of an unknown format")

// Restore implements raft.FSM: the snapshot takes the place of the whole
// state, or, when it is cut short or altered, of nothing.
func (m *Machine) Restore(source io.ReadCloser) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return m.err
	}
	err := m.engine.Replace(func(tx func(func(Writer) error) error) error {
		return m.readSnapshot(source, tx)
	})
	if errors.Is(err, errSnapshotFormat) {
		return m.halt(err)
	}
	if err != nil {
		return fmt.Errorf("restore the state: %w", err)
	}
	if err := m.load(); err != nil {
		return m.halt(fmt.Errorf("read the restored state: %w", err))
	}
	m.hooks.Applied(m.applied.Load(), nil)
	return nil
}

func (m *Machine) readSnapshot(source io.Reader, tx func(func(Writer) error) error) error {
	head := make([]byte, len(snapshotMagic)+1)
	if _, err := io.ReadFull(source, head); err != nil {
		return fmt.Errorf("%w: cut short", ErrFormat)
	}
	if !bytes.HasPrefix(head, []byte(snapshotMagic)) {
		return fmt.Errorf("%w: it starts with %q", errSnapshotFormat, head)
	}
	if v := head[len(snapshotMagic)]; v != snapshotVersion {
		return fmt.Errorf("%w: version %d, this node reads %d; update this node", errSnapshotFormat, v, snapshotVersion)
	}
	z, err := zstd.NewReader(source, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(snapshotWindow), zstd.WithDecoderLowmem(true))
	if err != nil {
		return err
	}
	defer z.Close()
	in := &recordReader{r: bufio.NewReaderSize(z, 64<<10), sum: sha256.New()}
	applied := in.uvarint()
	for done := false; !done && in.err == nil; {
		err := tx(func(w Writer) error {
			for size := 0; size < restoreBatch && !done && in.err == nil; {
				n, err := m.readRecord(in, w)
				if err != nil {
					return err
				}
				size += n
				done = n == 0
			}
			return in.err
		})
		if err != nil {
			return err
		}
	}
	if in.err != nil {
		return in.err
	}
	return tx(func(w Writer) error {
		for k, v := range m.hooks.Marks() {
			if err := w.Set(Local, []byte(k), v); err != nil {
				return err
			}
		}
		return w.Set(meta, []byte(appliedKey), be64(applied))
	})
}

// readRecord writes one record to the new state and gives its size, 0 for the
// verified end.
func (m *Machine) readRecord(in *recordReader, w Writer) (int, error) {
	switch kind := in.byte(); kind {
	case 'R':
		key, created, revision, value := in.key(), in.uvarint(), in.uvarint(), in.bytes(MaxTxnBytes)
		if in.err != nil {
			return 0, in.err
		}
		for _, k := range m.hooks.Derive(key, value) {
			if err := w.Set(Local, k, key); err != nil {
				return 0, err
			}
		}
		return len(key) + len(value) + rowHeader, w.Set(rows, key, encodeRow(created, revision, value))
	case 'L':
		in.log = in.key()
		l := logLength{length: in.uvarint(), first: in.uvarint()}
		l.kept = l.first
		if in.err != nil {
			return 0, in.err
		}
		l, err := l.numbered(w)
		if err != nil {
			return 0, err
		}
		in.number = l.number
		return len(in.log) + 24, w.Set(lengths, in.log, l.encode())
	case 'E':
		seq, value := in.uvarint(), in.bytes(MaxTxnBytes)
		if in.err == nil && in.log == nil {
			in.fail("an entry of no log")
		}
		if in.err != nil {
			return 0, in.err
		}
		return len(in.log) + len(value) + 10, w.Set(entries, entryKey(in.number, seq), encodeEntry(value))
	case 'S':
		rev, id, result := in.uvarint(), in.full(16), in.bytes(MaxTxnBytes)
		if in.err != nil {
			return 0, in.err
		}
		return len(result) + 24, w.Set(seen, be64(rev), append(id, result...))
	case 'Z':
		return 0, in.end()
	default:
		in.fail("a record of kind %q", kind)
		return 0, in.err
	}
}

// recordReader reads and sums the stream. After the first failure it gives
// zero values.
type recordReader struct {
	r   *bufio.Reader
	sum hash.Hash
	buf [binary.MaxVarintLen64]byte
	log []byte // the name in the newest 'L'
	// number stands for it in the new state.
	number uint64
	err    error
}

func (i *recordReader) fail(format string, args ...any) {
	if i.err == nil {
		i.err = fmt.Errorf("%w: snapshot: %s", ErrFormat, fmt.Sprintf(format, args...))
	}
}

func (i *recordReader) full(n int) []byte {
	b := make([]byte, n)
	if i.err == nil {
		if _, err := io.ReadFull(i.r, b); err != nil {
			i.fail("%v", err)
		}
	}
	i.sum.Write(b)
	return b
}

func (i *recordReader) byte() byte {
	c, err := i.r.ReadByte()
	if err != nil {
		i.fail("%v", err)
	}
	i.buf[0] = c
	i.sum.Write(i.buf[:1])
	return c
}

func (i *recordReader) uvarint() uint64 {
	n := 0
	for n < len(i.buf) {
		c, err := i.r.ReadByte()
		if err != nil {
			i.fail("%v", err)
			return 0
		}
		i.buf[n] = c
		n++
		if c < 0x80 {
			break
		}
	}
	i.sum.Write(i.buf[:n])
	v, used := binary.Uvarint(i.buf[:n])
	if used <= 0 {
		i.fail("bad integer")
	}
	return v
}

func (i *recordReader) bytes(limit uint64) []byte {
	n := i.uvarint()
	if n > limit {
		i.fail("%d bytes where at most %d can be", n, limit)
	}
	if i.err != nil {
		return nil
	}
	return i.full(int(n))
}

func (i *recordReader) key() []byte {
	b := i.bytes(MaxKeyBytes)
	if i.err == nil && len(b) == 0 {
		i.fail("empty key")
	}
	return b
}

func (i *recordReader) end() error {
	want := i.sum.Sum(nil)
	if got := i.full(sha256.Size); i.err == nil && !bytes.Equal(got, want) {
		i.fail("its checksum is wrong")
	}
	if i.err == nil {
		if _, err := i.r.ReadByte(); err != io.EOF {
			i.fail("something after its end (%v)", err)
		}
	}
	return i.err
}
