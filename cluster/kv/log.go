package kv

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"os"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"github.com/klauspost/compress/zstd"
	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// The log's file is one of bbolt with three buckets: "format" holds logFormat
// under formatKey, "stable" what raft keeps beside the log and, under committedKey,
// up to which entry the log was known to be committed when it was written last, and,
// under beginsKey, where the log begins, and "log" each entry under its index (8 bytes,
// big-endian) as
//
//	1        type of the entry
//	1        1 when its data is compressed, else 0
//	uvarint  term
//	varint   when it was appended, in nanoseconds since 1970; 0 for never
//	uvarint  length of its extensions, then those
//	         its data
const (
	logFormat = 1
	// packFrom is from which size on, in bytes, data is compressed.
	packFrom = 256
	// spareLog, and so many times what is written at once, is about how much of the file
	// is free, in bytes, while there are entries before the log's start; at most three
	// times that. Each commit writes the list of all free pages, 8 bytes for 4 KiB.
	spareLog   = 512 << 10
	spareShare = 16
	// fillLog packs the pages of the log, which grows at its end only.
	fillLog = 0.98
)

// logDictionary is text that the transactions of today often have, given to the
// compression so that each need not say it itself: the log takes a third less. What
// it says means nothing, and what it lacks is only longer. It is part of the file's
// format, since what was compressed with it is read with it: never change it, add
// another with the next number.
const logDictionary = "application/vnd.docker.image.rootfs.diff.tar.gzip\x00application/vnd.docker.container.image.v1+json\x00" +
	"application/vnd.docker.distribution.manifest.list.v2+json\x00application/vnd.docker.distribution.manifest.v2+json\x00" +
	"application/vnd.oci.empty.v1+json\x00application/vnd.oci.image.index.v1+json\x00application/vnd.oci.image.layer.v1.tar+gzip\x00" +
	"application/vnd.oci.image.config.v1+json\x00application/vnd.oci.image.manifest.v1+json" +
	`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:","size":},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"sha256:","size":}],"annotations":{}}` +
	"\x00blob\x00link\x00ref\x00index_member\x00manifest\x00manifest_holder\x00esizefcopieslivestate\xa1ebytesY\x01\xabdslot\x00dsizeetotaleactor" +
	"eadminfabsent\xf4gsubject`hwithheld\xf4ipushed_at\x1ajmedia_typex*application/vnd.oci.image.manifest.v1+jsonkconfig_type" +
	"x(application/vnd.oci.image.config.v1+jsonmartifact_type`\xa8bat\x1aeS\xf1\x00dkindlartifact.puteactoreadmindsize\x19jmedia_typejrepository" +
	"\x06\x01\x0fproject\x00library\x02\x01\tsite\x00self\x01\x01dartifact\x00library\x00\x00sha256:\x05\x01#tag\x00library\x00\x01\x1erepository\x00library\x00" +
	"\x05\x01ntagged\x00library\x00\x00sha256:\x00\x03\x01#tag\x00library\x00p\xa4dslot\x00fdigestxGsha256:hwithheld\xf4ipushed_at\x1aeS\xf1\x00\x01n" +
	"tagged\x00library\x00sha256:\x01\xa0\x04njournal/\xa8\x01\xa7bat\x1aeS\xf1\x00ctagkdkindgtag.puteactoreadminfdigestxGsha256:ipushed_at\x1aeS\xf1\x00jrepositoryk"

// logDictionaryID is written into what was compressed with it.
const logDictionaryID = 1

var (
	logFormatBucket = []byte("format")
	logStableBucket = []byte("stable")
	logBucket       = []byte("log")
	committedKey    = []byte("committed") // 8 bytes, big-endian
	beginsKey       = []byte("begins")    // 8 bytes, big-endian
)

// ErrNotFound is the answer to a key that was never set. Raft knows it by its text.
var ErrNotFound = errors.New("not found")

// Log keeps raft's log and the little that raft stores beside it (term, vote) in
// one file, synced on every write. Transactions are compressed on their way to
// the disk: they repeat names and digests, and most take a third. What nodes send
// each other stays as it is. It is a raft.LogStore and a raft.StableStore, and
// safe for use by many goroutines.
type Log struct {
	db        *bbolt.DB
	pack      *zstd.Encoder
	unpack    *zstd.Decoder
	mapped    *mappedPages
	begins    atomic.Uint64 // entries below are cut off, and are in the file until their room is needed
	high      int64         // how long the file was when entries were stored last; of who writes
	committed atomic.Uint64 // is written with the next entries
	mark      *os.File      // see Reached; nil when the disk had no room for it
}

var (
	_ raft.LogStore    = (*Log)(nil)
	_ raft.StableStore = (*Log)(nil)
)

// OpenLog opens the log's file at path, which it creates when there is none. The
// file is locked: a second process gets an error.
func OpenLog(path string) (*Log, error) {
	options := *bbolt.DefaultOptions
	options.Timeout = time.Second
	if err := createBolt(path); err != nil {
		return nil, fmt.Errorf("opening the log %s: %w", path, err)
	}
	db, err := bbolt.Open(path, 0o600, &options)
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("%s is in use: another process runs on this data directory", path)
	} else if err != nil {
		return nil, fmt.Errorf("opening the log %s: %w", path, err)
	}
	l, err := newLog(db)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening the log %s: %w", path, err), db.Close())
	}
	// Without it nothing is lost, and a start must not fail on a full disk.
	l.mark, _ = os.OpenFile(path+markSuffix, os.O_RDWR|os.O_CREATE, 0o600)
	return l, nil
}

func newLog(db *bbolt.DB) (*Log, error) {
	if err := db.Update(prepareLog); err != nil {
		return nil, err
	}
	pack, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(64<<10), zstd.WithLowerEncoderMem(true), zstd.WithEncoderDictRaw(logDictionaryID, []byte(logDictionary)))
	if err != nil {
		return nil, err
	}
	unpack, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(MaxTxnBytes), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderDictRaw(logDictionaryID, []byte(logDictionary)))
	if err != nil {
		return nil, err
	}
	l := &Log{db: db, pack: pack, unpack: unpack, mapped: newMappedPages(logLeast, 0)}
	begins, err := l.GetUint64(beginsKey)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return nil, err
	}
	l.begins.Store(begins)
	return l, nil
}

// prepareLog makes the buckets of a new file and checks the format of an old one.
func prepareLog(tx *bbolt.Tx) error {
	if k, _ := tx.Cursor().First(); k != nil {
		var format []byte
		if b := tx.Bucket(logFormatBucket); b != nil {
			format = b.Get([]byte(formatKey))
		}
		if len(format) != 1 || format[0] != logFormat {
			return fmt.Errorf("the file has format %x and this version of atoll reads and writes format %d; run the version that wrote it, "+
				"or remove this node from its site and let it join again with an empty data directory", format, logFormat)
		}
		return nil
	}
	for _, name := range [][]byte{logStableBucket, logBucket} {
		if _, err := tx.CreateBucket(name); err != nil {
			return err
		}
	}
	b, err := tx.CreateBucket(logFormatBucket)
	if err != nil {
		return err
	}
	return b.Put([]byte(formatKey), []byte{logFormat})
}

// Close waits for reads and writes under way to end.
func (l *Log) Close() error {
	err := l.db.Close()
	if l.mark != nil {
		err = errors.Join(err, l.mark.Close())
	}
	l.mapped.close()
	l.unpack.Close()
	return err
}

// FirstIndex implements raft.LogStore: 0 for an empty log.
func (l *Log) FirstIndex() (first uint64, err error) {
	err = l.db.View(func(tx *bbolt.Tx) error {
		first = l.first(tx)
		return nil
	})
	return first, err
}

func (l *Log) first(tx *bbolt.Tx) uint64 {
	k, _ := tx.Bucket(logBucket).Cursor().Seek(be64(l.begins.Load()))
	return indexOf(k)
}

// LastIndex implements raft.LogStore: 0 for an empty log.
func (l *Log) LastIndex() (last uint64, err error) {
	err = l.db.View(func(tx *bbolt.Tx) error {
		k, _ := tx.Bucket(logBucket).Cursor().Last()
		last = indexOf(k)
		return nil
	})
	return last, err
}

// indexOf is 0 for no key.
func indexOf(key []byte) uint64 {
	if key == nil {
		return 0
	}
	return fromBE64(key)
}

// GetLog implements raft.LogStore: raft.ErrLogNotFound for an entry that is not
// there.
func (l *Log) GetLog(index uint64, out *raft.Log) error {
	if index < l.begins.Load() {
		return raft.ErrLogNotFound
	}
	return l.db.View(func(tx *bbolt.Tx) error {
		defer l.mapped.touch(tx, 1)
		stored := tx.Bucket(logBucket).Get(be64(index))
		if stored == nil {
			return raft.ErrLogNotFound
		}
		if err := l.decode(stored, out); err != nil {
			return fmt.Errorf("entry %d of the log is damaged: %w", index, err)
		}
		out.Index = index
		return nil
	})
}

// StoreLog implements raft.LogStore.
func (l *Log) StoreLog(entry *raft.Log) error { return l.StoreLogs([]*raft.Log{entry}) }

// StoreLogs implements raft.LogStore. The entries stay the caller's, unchanged.
func (l *Log) StoreLogs(logs []*raft.Log) error {
	committed := l.committed.Load()
	stored, size := make([][]byte, len(logs)), 0
	for i, entry := range logs {
		if begins := l.begins.Load(); entry.Index < begins {
			return fmt.Errorf("entry %d lies before the log, which begins with %d", entry.Index, begins)
		}
		stored[i] = l.encode(entry)
		size += len(stored[i])
	}
	return l.db.Update(func(tx *bbolt.Tx) error {
		defer l.mapped.touch(tx, len(logs)+size/faultBytes)
		if err := l.reclaim(tx, size); err != nil {
			return err
		}
		b := tx.Bucket(logBucket)
		b.FillPercent = fillLog
		for i, entry := range logs {
			if err := b.Put(be64(entry.Index), stored[i]); err != nil {
				return err
			}
		}
		if committed == 0 {
			return nil
		}
		return tx.Bucket(logStableBucket).Put(committedKey, be64(committed))
	})
}

// Stage tells up to which entry the log is committed, which is kept with the
// entries that are stored next. What is committed is never taken back.
func (l *Log) Stage(committed uint64) {
	for was := l.committed.Load(); was < committed && !l.committed.CompareAndSwap(was, committed); {
		was = l.committed.Load()
	}
}

// Beside the log lies a file of one mark, the newest entry that is known to be
// committed: its index and term (8 bytes each, big-endian), the CRC-32C of its data
// and that of what goes before. It is written in place and never synced: it costs a
// commit a microsecond and no flush, a process that is killed leaves it as it was,
// and a power cut leaves it old or unreadable, which is no more than not to know.
const (
	markSuffix = ".committed"
	markBytes  = 24
)

// Reached tells that an entry, which must be in the log, is committed. Stage tells the
// same with the entries that follow; of the last ones nothing would be known until
// others come.
func (l *Log) Reached(entry *raft.Log) {
	if l.mark != nil {
		// A mark that cannot be written is an old one.
		_, _ = l.mark.WriteAt(markOf(entry), 0)
	}
}

func markOf(entry *raft.Log) []byte {
	table := crc32.MakeTable(crc32.Castagnoli)
	b := make([]byte, 0, markBytes)
	b = binary.BigEndian.AppendUint64(b, entry.Index)
	b = binary.BigEndian.AppendUint64(b, entry.Term)
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(entry.Data, table))
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, table))
}

// Committed gives an index up to which the stored log is certain to be committed;
// there may be more. 0 when nothing is known.
func (l *Log) Committed() (uint64, error) {
	committed, err := l.GetUint64(committedKey)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return 0, err
	}
	marked, err := l.marked()
	return max(committed, marked), err
}

// marked gives the index of the mark when the log has the very entry that it names,
// and so, as logs do, all the entries before it that the others had; else 0.
func (l *Log) marked() (uint64, error) {
	var stored [markBytes]byte
	if l.mark == nil {
		return 0, nil
	}
	if _, err := l.mark.ReadAt(stored[:], 0); err != nil {
		return 0, nil // there is none yet
	}
	var entry raft.Log
	err := l.GetLog(fromBE64(stored[:]), &entry)
	if errors.Is(err, raft.ErrLogNotFound) || err == nil && !bytes.Equal(markOf(&entry), stored[:]) {
		return 0, nil
	}
	return entry.Index, err
}

// reclaim takes entries before the log's start out of the file when there is not much
// room in it beside what is to be written, or when the file has grown all the same:
// what is free in small pieces is no room for what is large.
func (l *Log) reclaim(tx *bbolt.Tx, size int) error {
	begins, want := l.begins.Load(), spareLog+spareShare*size
	grown := tx.Size() > l.high
	l.high = tx.Size()
	if begins > 0 && (grown || l.db.Stats().FreeAlloc < want) {
		return l.drop(tx, 0, begins-1, want)
	}
	return nil
}

// drop takes entries first..last out of the file, but about so many bytes at most.
func (l *Log) drop(tx *bbolt.Tx, first, last uint64, most int) error {
	c := tx.Bucket(logBucket).Cursor()
	for k, v := c.Seek(be64(first)); k != nil && fromBE64(k) <= last && most > 0; k, v = c.Seek(be64(first)) {
		// To look for the first one again would pass all pages that are empty by now.
		first, most = fromBE64(k)+1, most-len(k)-len(v)
		if err := c.Delete(); err != nil {
			return err
		}
		l.mapped.touch(tx, 1)
	}
	return nil
}

// DeleteRange implements raft.LogStore: first and last included. The start of a log
// that goes on, cut behind a snapshot and maybe hundreds of megabytes, stays in the file
// until its room is needed: with all of it free the list of free pages, which each
// commit writes, would be longer than all else that a commit writes. A version that does
// not know of that finds a log that begins earlier. All else goes at once, in one
// transaction: entries in conflict with a leader's are at the end, and a crash that left
// some of them would leave a hole before those.
func (l *Log) DeleteRange(first, last uint64) error {
	begins := l.begins.Load()
	if last < begins {
		return nil
	}
	err := l.db.Update(func(tx *bbolt.Tx) error {
		stable, from := tx.Bucket(logStableBucket), l.first(tx)
		end, _ := tx.Bucket(logBucket).Cursor().Last()
		switch {
		case first > from:
		case last < indexOf(end):
			begins = last + 1
			if err := l.drop(tx, 0, last, spareLog); err != nil {
				return err
			}
			return stable.Put(beginsKey, be64(begins))
		default: // nothing is left for the start to lie before
			first, begins = 0, 0
			if err := stable.Delete(beginsKey); err != nil {
				return err
			}
		}
		return l.drop(tx, first, last, math.MaxInt)
	})
	if err == nil {
		l.begins.Store(begins)
	}
	return err
}

func (l *Log) encode(entry *raft.Log) []byte {
	data, packed := entry.Data, byte(0)
	if entry.Type == raft.LogCommand && len(data) >= packFrom && len(data) <= MaxTxnBytes {
		if small := l.pack.EncodeAll(data, nil); len(small) < len(data) {
			data, packed = small, 1
		}
	}
	b := append(make([]byte, 0, 24+len(entry.Extensions)+len(data)), byte(entry.Type), packed)
	b = binary.AppendUvarint(b, entry.Term)
	at := int64(0)
	if !entry.AppendedAt.IsZero() {
		at = entry.AppendedAt.UnixNano()
	}
	b = binary.AppendVarint(b, at)
	return append(appendBytes(b, entry.Extensions), data...)
}

// decode copies everything: what is stored is gone when the transaction ends.
func (l *Log) decode(stored []byte, out *raft.Log) error {
	p := parser{rest: stored}
	kind, packed, term := p.byte(), p.byte(), p.uvarint()
	at, n := binary.Varint(p.rest)
	if n <= 0 {
		return fmt.Errorf("%w: bad time", ErrFormat)
	}
	p.take(uint64(n))
	extensions := p.bytes()
	if p.err != nil {
		return p.err
	}
	*out = raft.Log{Type: raft.LogType(kind), Term: term, Extensions: bytes.Clone(extensions)}
	if at != 0 {
		out.AppendedAt = time.Unix(0, at).UTC()
	}
	switch packed {
	case 0:
		out.Data = bytes.Clone(p.rest)
		return nil
	case 1:
		data, err := l.unpack.DecodeAll(p.rest, nil)
		out.Data = data
		return err
	}
	return fmt.Errorf("%w: compression %d", ErrFormat, packed)
}

// Set implements raft.StableStore.
func (l *Log) Set(key, value []byte) error {
	return l.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(logStableBucket).Put(key, value) })
}

// Get implements raft.StableStore: ErrNotFound when there is none.
func (l *Log) Get(key []byte) (value []byte, err error) {
	err = l.db.View(func(tx *bbolt.Tx) error {
		stored := tx.Bucket(logStableBucket).Get(key)
		if stored == nil {
			return ErrNotFound
		}
		value = bytes.Clone(stored)
		return nil
	})
	return value, err
}

// SetUint64 implements raft.StableStore.
func (l *Log) SetUint64(key []byte, value uint64) error { return l.Set(key, be64(value)) }

// GetUint64 implements raft.StableStore: ErrNotFound when there is none.
func (l *Log) GetUint64(key []byte) (uint64, error) {
	value, err := l.Get(key)
	if err != nil {
		return 0, err
	}
	if len(value) != 8 {
		return 0, fmt.Errorf("%q in the log's file has %d bytes, not 8: the file is damaged", key, len(value))
	}
	return fromBE64(value), nil
}
