package blobs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math/bits"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/fault"
)

const (
	// PieceSize is the unit in which a Partial remembers what it holds, in bytes.
	PieceSize = 256 << 10
	// flushEvery is after how many new pieces a Partial saves what it holds.
	flushEvery = 32 << 20 / PieceSize
	// maxPartial bounds the size that a peer can make the store believe in.
	maxPartial = 1 << 44
)

// Partial is a blob that arrives in pieces of PieceSize in any order. What is
// marked survives the end of the process, and a power cut but for the last few: the
// list of pieces on disk names only those that were synced before it was written, and
// what is noted besides is believed only while the kernel runs that has the bytes.
// Nothing in a Partial is visible as a blob before Commit. It is safe for
// concurrent use.
type Partial struct {
	s    *Store
	key  key
	size int64
	file Handle
	seen Handle // a bit for each piece, noted when it is marked and not synced

	flushing sync.Mutex   // held by whoever syncs; taken first
	writing  sync.RWMutex // writers share it; Commit has it alone
	noting   sync.Mutex   // held by whoever writes to seen

	mu     sync.Mutex
	have   []byte // a bit for each piece, the first in the lowest bit
	marked int
	dirty  int   // marked since the last flush
	broken error // why the file was dropped
	placed bool
	closed bool
}

// NewPartial opens the partial of a blob of the given size, with the pieces that
// an earlier one left. One at a time: else fault.Conflict. fault.Limit when the
// blob does not fit on the disk.
func (s *Store) NewPartial(ctx context.Context, d digest.Digest, size int64) (*Partial, error) {
	k, err := keyOf(d)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if size < 0 || size > maxPartial {
		return nil, fault.New(fault.Invalid, "blob %s cannot have %d bytes", d, size).WithCode("SIZE_INVALID")
	}
	s.mu.Lock()
	open := s.partials[k]
	s.partials[k] = true
	s.mu.Unlock()
	if open {
		return nil, fault.New(fault.Conflict, "blob %s is being fetched already", d)
	}
	p := &Partial{s: s, key: k, size: size, have: make([]byte, (pieces(size)+7)/8)}
	if err := p.open(); err != nil {
		s.closePartial(k)
		return nil, err
	}
	return p, nil
}

func pieces(size int64) int { return int((size + PieceSize - 1) / PieceSize) }

func (s *Store) closePartial(k key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.partials, k)
}

func (p *Partial) open() error {
	p.remember()
	if err := p.s.room(p.size - p.bytes()); err != nil {
		return err
	}
	f, err := p.s.fs.OpenFile(p.key.partial(), os.O_RDWR|os.O_CREATE)
	if err != nil {
		return p.failed(err, "opening")
	}
	fi, err := f.Stat()
	if err == nil && fi.Size() != p.size {
		// Not the file that the lists speak of. They go first: after a crash they must
		// not vouch for the new file.
		clear(p.have)
		p.marked = 0
		if err = p.s.disown(p.key); err == nil {
			err = f.Truncate(p.size)
		}
	}
	if err == nil {
		p.seen, err = p.s.fs.OpenFile(p.key.partial()+seenSuffix, os.O_RDWR|os.O_CREATE)
	}
	if err != nil {
		return errors.Join(p.failed(err, "opening"), f.Close())
	}
	p.file = f
	return nil
}

// remember reads which pieces an earlier Partial left.
func (p *Partial) remember() {
	if b, err := p.s.read(p.key.partial() + haveSuffix); err == nil {
		if have, err := decodeHave(b, p.size); err == nil {
			p.have = have
		}
	}
	if b, err := p.s.read(p.key.partial() + seenSuffix); err == nil {
		for i := range min(len(b), len(p.have)) {
			p.have[i] |= b[i]
		}
		if last := pieces(p.size) % 8; last != 0 {
			p.have[len(p.have)-1] &= 1<<last - 1
		}
	}
	for _, b := range p.have {
		p.marked += bits.OnesCount8(b)
	}
}

// disown removes what vouches for the pieces of a partial.
func (s *Store) disown(k key) error {
	for _, suffix := range []string{haveSuffix, seenSuffix} {
		if err := s.fs.Remove(k.partial() + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (p *Partial) failed(err error, doing string) error {
	if full(err) {
		return noSpace(err)
	}
	return fmt.Errorf("%s the partial of blob %s: %w", doing, p.key, err)
}

// Size gives the size of the whole blob in bytes.
func (p *Partial) Size() int64 { return p.size }

// WriteAt writes unverified bytes; MarkPiece says when a piece is good.
func (p *Partial) WriteAt(b []byte, off int64) (int, error) {
	if off < 0 || off > p.size-int64(len(b)) {
		return 0, fault.New(fault.Invalid, "bytes %d to %d are not in blob %s of %d bytes", off, off+int64(len(b)), p.key, p.size)
	}
	p.writing.RLock()
	defer p.writing.RUnlock()
	p.mu.Lock()
	broken, over := p.broken, p.placed || p.closed
	p.mu.Unlock()
	if broken != nil {
		return 0, broken
	}
	if over {
		return 0, fmt.Errorf("writing the partial of blob %s: %w", p.key, fs.ErrClosed)
	}
	n, err := p.file.WriteAt(b, off)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return n, p.failed(err, "writing")
	}
	return n, nil
}

// ReadAt reads what is in the file, verified or not: see Have. It goes on after
// Commit, until Close.
func (p *Partial) ReadAt(b []byte, off int64) (int, error) { return p.file.ReadAt(b, off) }

// Have reports whether piece i was marked.
func (p *Partial) Have(i int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return i >= 0 && i < pieces(p.size) && p.have[i/8]&(1<<(i%8)) != 0
}

// Held gives how many pieces are marked and their bytes.
func (p *Partial) Held() (pieces int, bytes int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.marked, p.bytes()
}

func (p *Partial) bytes() int64 {
	n := int64(p.marked) * PieceSize
	if last := pieces(p.size) - 1; last >= 0 && p.have[last/8]&(1<<(last%8)) != 0 {
		n -= int64(last+1)*PieceSize - p.size
	}
	return n
}

// MarkPiece says that piece i is written and was verified, and notes it. Now and then
// it also syncs the file and saves the list; a failure of that drops the partial.
func (p *Partial) MarkPiece(i int) error {
	p.mu.Lock()
	if i < 0 || i >= pieces(p.size) {
		p.mu.Unlock()
		return fault.New(fault.Invalid, "blob %s has no piece %d", p.key, i)
	}
	if bit := byte(1) << (i % 8); p.have[i/8]&bit == 0 {
		p.have[i/8] |= bit
		p.marked++
		p.dirty++
	}
	due := p.dirty >= flushEvery
	p.mu.Unlock()
	p.note(i)
	if due && p.flushing.TryLock() {
		defer p.flushing.Unlock()
		return p.flush()
	}
	return nil
}

// note has the kernel keep the mark of a piece beyond a kill of this process. What the
// disk refuses here would cost that piece then, and nothing now.
func (p *Partial) note(i int) {
	p.noting.Lock()
	defer p.noting.Unlock()
	p.mu.Lock()
	b := [1]byte{p.have[i/8]}
	p.mu.Unlock()
	_, _ = p.seen.WriteAt(b[:], int64(i/8))
}

// flush saves the list of pieces. The caller holds p.flushing.
func (p *Partial) flush() error {
	p.mu.Lock()
	list, dirty, broken := encodeHave(p.have, p.size), p.dirty, p.broken
	p.dirty = 0
	p.mu.Unlock()
	if broken != nil || dirty == 0 {
		return broken
	}
	err := p.file.Sync()
	if err == nil {
		err = p.s.replace(p.key.partial()+haveSuffix, list)
	}
	if err != nil {
		// What a failed sync leaves in memory may look right and never reach the
		// disk, so nothing of this file is kept.
		err = p.failed(err, "saving")
		p.drop(err)
	}
	return err
}

// Commit hashes the whole file and makes it a blob, durable and visible when it
// returns. With another digest than the blob's it is fault.Invalid with code
// DIGEST_INVALID; if by then every piece was marked, a mark was wrong, and all
// is dropped. Close must follow.
func (p *Partial) Commit(ctx context.Context) (Info, error) {
	p.flushing.Lock()
	defer p.flushing.Unlock()
	p.writing.Lock()
	defer p.writing.Unlock()
	p.mu.Lock()
	broken, placed, complete := p.broken, p.placed, p.marked == pieces(p.size)
	p.mu.Unlock()
	if broken != nil || placed {
		return Info{Digest: p.key.digest(), Size: p.size}, broken
	}
	sum := p.key.algorithm().Hash()
	if err := p.s.hash(ctx, sum, p.file, 0, p.size); err != nil {
		return Info{}, p.failed(err, "verifying")
	}
	if err := p.key.verify(sum, p.size); err != nil {
		if complete {
			p.drop(err)
		}
		return Info{}, err
	}
	err := p.file.Sync()
	if err == nil {
		err = p.s.place(p.key.partial(), p.key, p.size, nil)
	}
	if err != nil {
		err = p.failed(err, "storing")
		p.drop(err)
		return Info{}, err
	}
	p.mu.Lock()
	p.placed = true
	p.mu.Unlock()
	p.s.sweep(p.key.partial() + haveSuffix)
	p.s.sweep(p.key.partial() + seenSuffix)
	return Info{Digest: p.key.digest(), Size: p.size}, nil
}

// drop forgets what the partial holds; err answers every later call.
func (p *Partial) drop(err error) {
	p.mu.Lock()
	p.broken = err
	p.mu.Unlock()
	p.s.sweep(p.key.partial() + haveSuffix) // before the file that they vouch for
	p.s.sweep(p.key.partial() + seenSuffix)
	p.s.sweep(p.key.partial())
}

// Close saves what is marked, for a later NewPartial, and closes the file.
func (p *Partial) Close() error {
	p.flushing.Lock()
	defer p.flushing.Unlock()
	p.mu.Lock()
	closed, placed, broken := p.closed, p.placed, p.broken
	p.closed = true
	p.mu.Unlock()
	if closed {
		return nil
	}
	defer p.s.closePartial(p.key)
	var err error
	if !placed && broken == nil {
		err = p.flush()
	}
	return errors.Join(err, p.seen.Close(), p.file.Close())
}

// Abort drops what the partial holds and closes it.
func (p *Partial) Abort() error {
	p.mu.Lock()
	if done := p.closed || p.placed; !done {
		p.mu.Unlock()
		p.drop(fault.New(fault.Unavailable, "the fetch of blob %s was given up", p.key))
	} else {
		p.mu.Unlock()
	}
	return p.Close()
}

// recoverPartials sweeps lists without a file and files of unfinished writes. What was
// noted without a sync goes with the kernel that had the bytes.
func (s *Store) recoverPartials(sameBoot bool) error {
	names, err := s.fs.ReadDir(partialsDir)
	if err != nil {
		return err
	}
	files := map[string]bool{}
	for _, name := range names {
		if _, ok := keyOfPlain(name); ok {
			files[name] = true
		}
	}
	for _, name := range names {
		if noted := strings.HasSuffix(name, seenSuffix); noted && !sameBoot {
			if err := s.fs.Remove(partialsDir + "/" + name); err != nil {
				return err
			}
		} else if !files[strings.TrimSuffix(strings.TrimSuffix(name, haveSuffix), seenSuffix)] {
			s.sweep(partialsDir + "/" + name)
		}
	}
	return nil
}

func (s *Store) expirePartials(ctx context.Context, olderThan time.Duration) (n int, err error) {
	names, err := s.fs.ReadDir(partialsDir)
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		if ctx.Err() != nil {
			return n, ctx.Err()
		}
		k, ok := keyOfPlain(name)
		fi, err := s.fs.Stat(partialsDir + "/" + name)
		if !ok || err != nil || time.Since(fi.ModTime()) <= olderThan {
			continue
		}
		s.mu.Lock()
		open := s.partials[k]
		if !open {
			s.partials[k] = true
		}
		s.mu.Unlock()
		if open {
			continue
		}
		s.sweep(k.partial() + haveSuffix)
		s.sweep(k.partial() + seenSuffix)
		s.sweep(k.partial())
		s.closePartial(k)
		n++
	}
	return n, nil
}

// What <algorithm>-<hex>.have holds: the magic, the blob's size and the piece size (big
// endian, 64 bits each), the bits, and CRC-32C of all before.
const haveMagic = "atoll-pieces 1\n"

func encodeHave(have []byte, size int64) []byte {
	b := binary.BigEndian.AppendUint64([]byte(haveMagic), uint64(size))
	b = binary.BigEndian.AppendUint64(b, PieceSize)
	b = append(b, have...)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

var errHave = errors.New("not a list of this blob's pieces")

func decodeHave(b []byte, size int64) ([]byte, error) {
	n := (pieces(size) + 7) / 8
	want := encodeHave(make([]byte, n), size)
	head := len(haveMagic) + 16
	if len(b) != len(want) || string(b[:head]) != string(want[:head]) {
		return nil, errHave
	}
	if crc32.Checksum(b[:head+n], castagnoli) != binary.BigEndian.Uint32(b[head+n:]) {
		return nil, errHave
	}
	have := b[head : head+n]
	if last := pieces(size) % 8; last != 0 && have[n-1]>>last != 0 {
		return nil, errHave
	}
	return have, nil
}
