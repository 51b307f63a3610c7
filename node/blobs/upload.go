package blobs

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/node/fault"
)

const (
	// checkpointEvery bounds what a power cut takes from a session whose client
	// sends in chunks, in bytes. A checkpoint costs three syncs.
	checkpointEvery = 64 << 20
	// parkAfter is how long a session may pause before Expire closes its file.
	parkAfter = time.Minute
	// turnWait is how long a request waits for an older one on the same session
	// to notice that its client has gone.
	turnWait = 2 * time.Second
)

// Offset is the Detail of an Append at the wrong place: where to go on.
type Offset struct {
	Offset int64 `json:"offset"`
}

// Upload is a session that takes a blob in, in order and in any number of
// pieces. It survives a restart of the process with every byte, and a power cut
// with those up to its last checkpoint. It is safe for concurrent use; one
// request at a time writes.
//
// A session ends by Commit, also when the digest is wrong: bytes can only be
// added, so nothing could mend it. It also ends, and frees its space, by Cancel
// and Expire, when the disk fails or is full, and when the blob exceeds
// Options.MaxUpload. A client that breaks off does not end it.
type Upload struct {
	s  *Store
	id string

	turn chan struct{} // holds one token; who has it may use the fields below
	file Handle        // nil while parked
	sum  hash.Hash     // of the first size bytes; nil until loaded
	// algorithm is that of sum: sha256 unless the client said otherwise, since it
	// names the digest only at the end.
	algorithm digest.Algorithm
	// saved is how many bytes the last checkpoint covers.
	saved  int64
	stated bool // there may be a file with a checkpoint
	ended  bool

	mu   sync.Mutex
	size int64
	at   time.Time
}

// NewUpload opens a session.
func (s *Store) NewUpload(ctx context.Context) (*Upload, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := s.room(0); err != nil {
		return nil, err
	}
	var id [16]byte
	rand.Read(id[:])
	u := s.session(hex.EncodeToString(id[:]), 0)
	u.sum = u.algorithm.Hash()
	s.mu.Lock()
	full := len(s.sessions) >= s.o.MaxSessions
	if !full {
		s.sessions[u.id] = u
	}
	s.mu.Unlock()
	if full {
		return nil, fault.New(fault.Limit, "%d uploads are under way, as many as this node takes: try again later", s.o.MaxSessions).WithCode("TOOMANYREQUESTS")
	}
	file, err := s.fs.OpenFile(uploadName(u.id), os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		s.forget(u)
		return nil, u.failed(err, "opening")
	}
	u.file = file
	return u, nil
}

func (s *Store) session(id string, size int64) *Upload {
	return &Upload{s: s, id: id, turn: make(chan struct{}, 1), algorithm: digest.SHA256, size: size, at: time.Now()}
}

// Expect says, before the first byte, of which algorithm the digest will be.
// Nothing depends on it but time: Commit with another one reads the bytes again.
func (u *Upload) Expect(algorithm digest.Algorithm) {
	if !u.tryAcquire() {
		return
	}
	defer u.release()
	if u.Size() == 0 && algorithm.Available() {
		u.algorithm, u.sum = algorithm, algorithm.Hash()
	}
}

// Upload finds a session; fault.NotFound with code BLOB_UPLOAD_UNKNOWN.
func (s *Store) Upload(id string) (*Upload, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if u, ok := s.sessions[id]; ok {
		return u, nil
	}
	return nil, fault.New(fault.NotFound, "upload %.40q is not known to this node: it ended, expired or never began; begin a new one", id).WithCode("BLOB_UPLOAD_UNKNOWN")
}

func (s *Store) forget(u *Upload) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, u.id)
}

func (s *Store) allSessions() []*Upload {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*Upload, 0, len(s.sessions))
	for _, u := range s.sessions {
		all = append(all, u)
	}
	return all
}

// recoverUploads finds the sessions of an earlier process. What it wrote is in
// the files as long as the kernel has not restarted; else only what a
// checkpoint covers is certain, and the rest is cut off.
func (s *Store) recoverUploads(sameBoot bool) error {
	names, err := s.fs.ReadDir(uploadsDir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if !isUploadID(name) {
			continue
		}
		fi, err := s.fs.Stat(uploadName(name))
		if err != nil {
			return err
		}
		u := s.session(name, fi.Size())
		_, u.stated = slices.BinarySearch(names, name+stateSuffix)
		if !sameBoot {
			u.size = 0
			if state, err := u.readState(); err == nil && state.size <= fi.Size() {
				u.size = state.size
			}
			if err := u.truncate(); err != nil {
				return err
			}
		}
		s.sessions[name] = u
	}
	for _, name := range names {
		if _, ok := s.sessions[strings.TrimSuffix(name, stateSuffix)]; !ok || strings.HasSuffix(name, tempSuffix) {
			s.sweep(uploadName(name))
		}
	}
	return nil
}

// ID names the session in this store: 32 hex digits.
func (u *Upload) ID() string { return u.id }

// Size gives how many bytes the session has taken in.
func (u *Upload) Size() int64 {
	size, _ := u.Progress()
	return size
}

// Progress gives how many bytes the session has taken in and when it last
// received one, also while Append runs: who times out slow clients by progress
// looks here.
func (u *Upload) Progress() (size int64, at time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.size, u.at
}

func (u *Upload) grow(n int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.size += n
	u.at = time.Now()
}

// Append adds what r gives, until its end, and returns how many bytes were
// added: all that were received, also when r fails or ctx ends. at is where the
// client believes the bytes belong, or -1 when it does not say; elsewhere than
// at Size is fault.Invalid with code BLOB_UPLOAD_INVALID and an Offset as
// Detail. ctx is looked at between reads: a read that blocks must be ended by
// its owner, see Progress.
func (u *Upload) Append(ctx context.Context, r io.Reader, at int64) (n int64, err error) {
	if err := u.acquire(ctx); err != nil {
		return 0, err
	}
	defer u.release()
	if size := u.Size(); at >= 0 && at != size {
		return 0, fault.New(fault.Invalid, "upload %s holds %d bytes: go on there, not at %d", u.id, size, at).
			WithCode("BLOB_UPLOAD_INVALID").WithDetail(Offset{size})
	}
	if err := u.load(ctx); err != nil {
		return 0, err
	}
	n, err = u.take(ctx, r)
	if u.ended {
		return 0, err
	}
	if u.Size()-u.saved >= checkpointEvery {
		if failure := u.checkpoint(); failure != nil {
			u.end()
			return 0, u.failed(failure, "saving")
		}
	}
	return n, err
}

// take moves bytes from r to the file and the hash. A failure of the disk, or of
// a limit, ends the session; one of r or ctx keeps what was received.
func (u *Upload) take(ctx context.Context, r io.Reader) (n int64, err error) {
	buf := u.s.buffers.Get().(*[bufferSize]byte)
	defer u.s.buffers.Put(buf)
	look := int64(0) // at the free space when n gets here
	for {
		if n >= look {
			if err := u.s.room(0); err != nil {
				u.end()
				return 0, err
			}
			look = n + spaceEvery
		}
		got, rerr := u.fill(ctx, r, buf[:])
		if limit := u.s.o.MaxUpload; limit > 0 && u.Size()+int64(got) > limit {
			u.end()
			return 0, fault.New(fault.Limit, "upload %s exceeds the limit of %d bytes for a blob", u.id, limit).WithCode("SIZE_INVALID")
		}
		if got > 0 {
			wrote, err := u.file.WriteAt(buf[:got], u.Size())
			if err == nil && wrote < got {
				err = io.ErrShortWrite
			}
			if err != nil {
				u.end()
				return 0, u.failed(err, "writing")
			}
			u.sum.Write(buf[:got])
			u.grow(int64(got))
			n += int64(got)
		}
		switch {
		case rerr == nil:
		case rerr == io.EOF:
			return n, nil
		case ctx.Err() != nil:
			return n, fmt.Errorf("receiving upload %s: %w", u.id, context.Cause(ctx))
		default:
			return n, fault.Wrap(rerr, fault.Invalid, "the body of upload %s broke off: %d bytes are kept, go on there", u.id, u.Size()).
				WithCode("BLOB_UPLOAD_INVALID").WithDetail(Offset{u.Size()})
		}
	}
}

// fill reads until buf is full or r ends.
func (u *Upload) fill(ctx context.Context, r io.Reader, buf []byte) (n int, err error) {
	for n < len(buf) && err == nil {
		if err := ctx.Err(); err != nil {
			return n, err
		}
		var got int
		got, err = r.Read(buf[n:])
		if n += got; got > 0 {
			u.grow(0)
		}
	}
	return n, err
}

// Commit ends the session: if its bytes have the digest, the blob is durable and
// visible when it returns; else the failure is fault.Invalid with code
// DIGEST_INVALID and nothing is. A blob that is held already is a success. Only
// a digest that is none (also DIGEST_INVALID) leaves the session open.
func (u *Upload) Commit(ctx context.Context, want digest.Digest) (Info, error) {
	k, err := keyOf(want)
	if err != nil {
		return Info{}, err
	}
	if err := u.acquire(ctx); err != nil {
		return Info{}, err
	}
	defer u.release()
	if err := u.load(ctx); err != nil {
		return Info{}, err
	}
	if err := u.turnTo(ctx, k.algorithm()); err != nil {
		return Info{}, err
	}
	if err := ctx.Err(); err != nil {
		return Info{}, err
	}
	defer u.end()
	size := u.Size()
	if err := k.verify(u.sum, size); err != nil {
		return Info{}, err
	}
	if err := u.s.place(uploadName(u.id), k, size, u.file.Sync); err != nil {
		return Info{}, u.failed(err, "storing")
	}
	return Info{Digest: want, Size: size}, nil
}

// turnTo hashes the bytes again when the digest is of another algorithm than
// was expected. A disk that cannot be read ends the session.
func (u *Upload) turnTo(ctx context.Context, algorithm digest.Algorithm) error {
	if u.algorithm == algorithm {
		return nil
	}
	sum := algorithm.Hash()
	if err := u.s.hash(ctx, sum, u.file, 0, u.Size()); err != nil {
		if ctx.Err() == nil {
			u.end()
		}
		return u.failed(err, "reading")
	}
	u.algorithm, u.sum = algorithm, sum
	return nil
}

// verify holds the hash of size bytes against the digest.
func (k key) verify(sum hash.Hash, size int64) error {
	if got := digest.NewDigest(k.algorithm(), sum); got != k.digest() {
		return fault.New(fault.Invalid, "the %d bytes have digest %s, not %s: send the blob again", size, got, k).WithCode("DIGEST_INVALID")
	}
	return nil
}

// Cancel ends the session and frees its space. One that has ended is no error.
func (u *Upload) Cancel() error {
	timer := time.NewTimer(turnWait)
	defer timer.Stop()
	select {
	case u.turn <- struct{}{}:
		defer u.release()
		u.end()
		return nil
	case <-timer.C:
		return u.busy()
	}
}

// acquire waits for the session's turn; fault.NotFound when it has ended.
func (u *Upload) acquire(ctx context.Context) error {
	select {
	case u.turn <- struct{}{}:
	default:
		timer := time.NewTimer(turnWait)
		defer timer.Stop()
		select {
		case u.turn <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
			return u.busy()
		}
	}
	if u.ended {
		u.release()
		return fault.New(fault.NotFound, "upload %s has ended: begin a new one", u.id).WithCode("BLOB_UPLOAD_UNKNOWN")
	}
	return nil
}

func (u *Upload) busy() error {
	return fault.New(fault.Conflict, "another request is writing to upload %s: wait for it, then ask for the offset", u.id).WithCode("BLOB_UPLOAD_INVALID")
}

func (u *Upload) tryAcquire() bool {
	select {
	case u.turn <- struct{}{}:
	default:
		return false
	}
	if u.ended {
		u.release()
		return false
	}
	return true
}

func (u *Upload) release() { <-u.turn }

// end forgets the session and frees its space.
func (u *Upload) end() {
	if u.ended {
		return
	}
	u.ended = true
	u.s.forget(u)
	if u.file != nil {
		u.file.Close()
	}
	u.s.sweep(uploadName(u.id))
	if u.stated {
		u.s.sweep(uploadName(u.id) + stateSuffix)
	}
}

func (u *Upload) failed(err error, doing string) error {
	if full(err) {
		return noSpace(err)
	}
	return fmt.Errorf("%s upload %s: %w", doing, u.id, err)
}

// load opens the file and, for a session of an earlier process, hashes what the
// last checkpoint does not cover. A session that cannot be loaded ends.
func (u *Upload) load(ctx context.Context) error {
	if u.file != nil {
		return nil
	}
	file, err := u.s.fs.OpenFile(uploadName(u.id), os.O_RDWR)
	if err != nil {
		u.end()
		return u.failed(err, "opening")
	}
	u.file = file
	if u.sum != nil {
		return nil
	}
	if err := u.rehash(ctx); err != nil {
		u.sum, u.file = nil, nil
		if ctx.Err() == nil {
			u.end()
		}
		return errors.Join(u.failed(err, "reading"), file.Close())
	}
	return nil
}

func (u *Upload) rehash(ctx context.Context) error {
	u.saved = 0
	state, err := u.readState()
	if err == nil {
		u.algorithm = state.algorithm
	}
	u.sum = u.algorithm.Hash()
	if err == nil && state.size <= u.Size() {
		if err := u.sum.(encoding.BinaryUnmarshaler).UnmarshalBinary(state.sum); err != nil {
			u.sum.Reset() // of another version of Go: hash everything
		} else {
			u.saved = state.size
		}
	}
	return u.s.hash(ctx, u.sum, u.file, u.saved, u.Size())
}

// hash feeds a part of a file to a hash.
func (s *Store) hash(ctx context.Context, sum hash.Hash, f io.ReaderAt, from, to int64) error {
	buf := s.buffers.Get().(*[bufferSize]byte)
	defer s.buffers.Put(buf)
	for from < to {
		if err := ctx.Err(); err != nil {
			return err
		}
		part := buf[:min(bufferSize, to-from)]
		n, err := f.ReadAt(part, from)
		if n < len(part) {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		sum.Write(part)
		from += int64(n)
	}
	return nil
}

// park saves the session and closes its file until it is used again.
func (u *Upload) park() error {
	if u.file == nil {
		return nil
	}
	if u.Size() > u.saved {
		if err := u.checkpoint(); err != nil {
			u.end()
			return u.failed(err, "saving")
		}
	}
	err := u.file.Close()
	u.file = nil
	return err
}

// checkpoint makes the session survive a power cut up to here. The state is
// written only after the bytes are synced and says nothing of others, so it may
// itself be torn (the checksum tells), but is never ahead of them.
func (u *Upload) checkpoint() error {
	if err := u.file.Sync(); err != nil {
		return err
	}
	sum, err := u.sum.(encoding.BinaryMarshaler).MarshalBinary()
	if err != nil {
		return err
	}
	u.saved, u.stated = u.Size(), true
	return u.s.replace(uploadName(u.id)+stateSuffix, encodeState(uploadState{u.saved, u.algorithm, sum}))
}

// uploadState is what <id>.state holds: the magic, the size (big endian, 64
// bits), the algorithm's name and a NUL, the state of the hash as Go marshals it,
// and CRC-32C of all before.
type uploadState struct {
	size      int64
	algorithm digest.Algorithm
	sum       []byte
}

const stateMagic = "atoll-upload 1\n"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func encodeState(st uploadState) []byte {
	b := binary.BigEndian.AppendUint64([]byte(stateMagic), uint64(st.size))
	b = append(b, st.algorithm...)
	b = append(b, 0)
	b = append(b, st.sum...)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

var errState = errors.New("not a checkpoint")

func decodeState(b []byte) (uploadState, error) {
	if len(b) < len(stateMagic)+12 || len(b) > 4096 || string(b[:len(stateMagic)]) != stateMagic {
		return uploadState{}, errState
	}
	body, sum := b[:len(b)-4], b[len(b)-4:]
	if crc32.Checksum(body, castagnoli) != binary.BigEndian.Uint32(sum) {
		return uploadState{}, errState
	}
	body = body[len(stateMagic):]
	size := int64(binary.BigEndian.Uint64(body))
	name, state, ok := bytes.Cut(body[8:], []byte{0})
	algorithm, err := entry.ParseAlgorithm(string(name))
	if size < 0 || !ok || err != nil {
		return uploadState{}, errState
	}
	return uploadState{size, algorithm, state}, nil
}

func (u *Upload) readState() (uploadState, error) {
	b, err := u.s.read(uploadName(u.id) + stateSuffix)
	if err != nil {
		return uploadState{}, err
	}
	return decodeState(b)
}

// truncate cuts the file to the session's size.
func (u *Upload) truncate() error {
	f, err := u.s.fs.OpenFile(uploadName(u.id), os.O_RDWR)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(u.size), f.Close())
}
