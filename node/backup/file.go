package backup

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"filippo.io/age"
)

// A backup is
//
//	"ATOLL BACKUP 1\n"
//	header   4 bytes length (big-endian, as all lengths here), JSON (Header)
//	content  chunks of 4 bytes length and so many bytes, at most 1 MiB; length 0 ends it
//	summary  4 bytes length, JSON (Summary)
//	hash     SHA-256 of all before it, 32 bytes; nothing follows
//
// The content is a sequence of parts, encrypted by age when the header says so:
//
//	kind     1 byte: 'K' keys (JSON, Keys), 'M' metadata (a snapshot of cluster/kv),
//	         'B' a blob; 'Z' ends the content and has nothing after it
//	name     2 bytes length, text: a blob's digest, else empty
//	bytes    chunks as above; length 0 ends them
//	verdict  1 byte: 1 the part is whole, 0 its writer gave it up
//
// Keys are there only in encrypted content. A version changes the first line.
const (
	magic    = "ATOLL BACKUP 1\n"
	anyMagic = "ATOLL BACKUP "
	maxChunk = 1 << 20
	maxJSON  = 1 << 20
)

// Kinds of parts.
const (
	partKeys     byte = 'K'
	partMetadata byte = 'M'
	partBlob     byte = 'B'
	partEnd      byte = 'Z'
)

// Header says, readable by everybody, what a backup is of.
type Header struct {
	ID        string    `json:"id"` // random
	Version   string    `json:"version"`
	Site      string    `json:"site"`
	SiteName  string    `json:"site_name"`
	Node      string    `json:"node"` // name of the node that wrote it
	Addr      string    `json:"addr"` // of its peer port
	CA        string    `json:"ca"`   // PEM
	Epoch     string    `json:"epoch"`
	Revision  uint64    `json:"revision"` // of the metadata
	Created   time.Time `json:"created"`
	Encrypted bool      `json:"encrypted"`
	Blobs     bool      `json:"with_blobs"`
	// Expected is about how many bytes the content has.
	Expected int64 `json:"expected"`
}

// Summary ends a backup.
type Summary struct {
	Blobs   int   `json:"blobs"`
	Bytes   int64 `json:"bytes"` // of the blobs
	Missing int   `json:"missing"`
	// Examples are the first of the blobs that are missing, and why.
	Examples []string `json:"examples,omitempty"`
}

// Keys is what only the holder of a recipient's identity may read.
type Keys struct {
	ClusterKey []byte `json:"cluster_key"`
}

var (
	// ErrNoBackup: the file is something else.
	ErrNoBackup = errors.New("this is no backup of Atoll")
	// ErrDamaged: it is cut short or altered.
	ErrDamaged = errors.New("the backup is damaged")
	// ErrVersion: another version of Atoll wrote it.
	ErrVersion = errors.New("the backup has another format than this version of Atoll reads")
	// ErrIdentity: it is encrypted to somebody else.
	ErrIdentity = errors.New("the backup is encrypted, and none of the identities given opens it")
)

// chunks writes a stream as chunks.
type chunks struct{ to io.Writer }

func (c chunks) Write(p []byte) (written int, err error) {
	for len(p) > 0 {
		part := p[:min(len(p), maxChunk)]
		var head [4]byte
		binary.BigEndian.PutUint32(head[:], uint32(len(part)))
		if _, err := c.to.Write(head[:]); err != nil {
			return written, err
		}
		n, err := c.to.Write(part)
		written += n
		if err != nil {
			return written, err
		}
		p = p[n:]
	}
	return written, nil
}

func (c chunks) end() error {
	_, err := c.to.Write(make([]byte, 4))
	return err
}

// fileWriter writes a backup.
type fileWriter struct {
	out     io.Writer // what is written to it is hashed
	sum     hash.Hash
	outer   *bufio.Writer
	sealed  io.WriteCloser // nil unless encrypted
	content *bufio.Writer
}

// newFileWriter begins a backup. With recipients its content is encrypted.
func newFileWriter(w io.Writer, h Header, recipients []age.Recipient) (*fileWriter, error) {
	f := &fileWriter{sum: sha256.New()}
	f.out = io.MultiWriter(w, f.sum)
	if _, err := io.WriteString(f.out, magic); err != nil {
		return nil, err
	}
	h.Encrypted = len(recipients) > 0
	if err := writeJSON(f.out, h); err != nil {
		return nil, err
	}
	f.outer = bufio.NewWriterSize(chunks{f.out}, maxChunk/4)
	f.content = f.outer
	if h.Encrypted {
		var err error
		if f.sealed, err = age.Encrypt(f.outer, recipients...); err != nil {
			return nil, fmt.Errorf("encrypting the backup: %w", err)
		}
		f.content = bufio.NewWriterSize(f.sealed, 64<<10)
	}
	return f, nil
}

// errGivenUp marks a part that its writer gave up; the backup goes on.
var errGivenUp = errors.New("given up")

// part writes one part. When fill fails with an error that wraps errGivenUp, the
// part is marked and the backup is good without it.
func (f *fileWriter) part(kind byte, name string, fill func(io.Writer) error) error {
	head := append([]byte{kind}, binary.BigEndian.AppendUint16(nil, uint16(len(name)))...)
	if _, err := f.content.Write(append(head, name...)); err != nil {
		return err
	}
	body := bufio.NewWriterSize(chunks{f.content}, 64<<10)
	failed := fill(body)
	if failed != nil && !errors.Is(failed, errGivenUp) {
		return failed
	}
	verdict := byte(1)
	if failed != nil {
		verdict = 0
	}
	if err := errors.Join(body.Flush(), chunks{f.content}.end()); err != nil {
		return err
	}
	if err := f.content.WriteByte(verdict); err != nil {
		return err
	}
	return failed
}

// close ends the backup. It does not close what it was written to.
func (f *fileWriter) close(s Summary) error {
	if err := f.content.WriteByte(partEnd); err != nil {
		return err
	}
	if err := f.content.Flush(); err != nil {
		return err
	}
	if f.sealed != nil {
		if err := f.sealed.Close(); err != nil {
			return err
		}
	}
	if err := f.outer.Flush(); err != nil {
		return err
	}
	if err := (chunks{f.out}).end(); err != nil {
		return err
	}
	if err := writeJSON(f.out, s); err != nil {
		return err
	}
	_, err := f.out.Write(f.sum.Sum(nil))
	return err
}

func writeJSON(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...))
	return err
}

// fileReader reads a backup.
type fileReader struct {
	Header
	in      *hashing
	outer   *unchunk
	content *bufio.Reader
	open    bool // a part is being read
}

// hashing sums what is read through it.
type hashing struct {
	from *bufio.Reader
	sum  hash.Hash
}

func (h *hashing) Read(p []byte) (int, error) {
	n, err := h.from.Read(p)
	h.sum.Write(p[:n])
	return n, err
}

// unchunk reads chunks as a stream that ends where they do.
type unchunk struct {
	from io.Reader
	left int
	done bool
}

func (u *unchunk) Read(p []byte) (int, error) {
	if u.done {
		return 0, io.EOF
	}
	if u.left == 0 {
		var head [4]byte
		if _, err := io.ReadFull(u.from, head[:]); err != nil {
			return 0, cut(err)
		}
		n := binary.BigEndian.Uint32(head[:])
		if n == 0 {
			u.done = true
			return 0, io.EOF
		}
		if n > maxChunk {
			return 0, fmt.Errorf("%w: a chunk of %d bytes", ErrDamaged, n)
		}
		u.left = int(n)
	}
	n, err := u.from.Read(p[:min(len(p), u.left)])
	u.left -= n
	if n > 0 {
		return n, nil
	}
	return 0, cut(err)
}

// cut makes the early end of a file damage.
func cut(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it ends early", ErrDamaged)
	}
	return err
}

// openFile reads a backup's header. Its content is not proven before check, and
// parts of it are not before their end.
func openFile(r io.Reader) (*fileReader, error) {
	f := &fileReader{in: &hashing{bufio.NewReaderSize(r, 256<<10), sha256.New()}}
	line := make([]byte, len(magic))
	if _, err := io.ReadFull(f.in, line); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, err
	} else if string(line[:len(anyMagic)]) != anyMagic {
		return nil, ErrNoBackup
	}
	if string(line) != magic {
		return nil, fmt.Errorf("%w: it begins with %q; use the version that wrote it, or a newer one", ErrVersion, line)
	}
	if err := readJSON(f.in, &f.Header); err != nil {
		return nil, err
	}
	f.outer = &unchunk{from: f.in}
	return f, nil
}

func readJSON(r io.Reader, into any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return cut(err)
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxJSON {
		return fmt.Errorf("%w: %d bytes where at most %d can be", ErrDamaged, n, maxJSON)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return cut(err)
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return nil
}

// check reads what is left of the file and proves it whole.
func (f *fileReader) check() (Summary, error) {
	var s Summary
	if _, err := io.Copy(io.Discard, f.outer); err != nil {
		return s, err
	}
	if err := readJSON(f.in, &s); err != nil {
		return s, err
	}
	want := f.in.sum.Sum(nil)
	got := make([]byte, sha256.Size)
	if _, err := io.ReadFull(f.in.from, got); err != nil {
		return s, cut(err)
	}
	if string(got) != string(want) {
		return s, fmt.Errorf("%w: its hash is %x, not %x as it says", ErrDamaged, want, got)
	}
	if _, err := f.in.from.ReadByte(); err != io.EOF {
		return s, fmt.Errorf("%w: something follows its end", ErrDamaged)
	}
	return s, nil
}

// unseal makes the parts readable.
func (f *fileReader) unseal(identities []age.Identity) error {
	f.content = bufio.NewReaderSize(f.outer, 64<<10)
	if !f.Encrypted {
		return nil
	}
	if len(identities) == 0 {
		return fmt.Errorf("%w: name the file with the identity of one of its recipients (--identity KEYFILE)", ErrIdentity)
	}
	plain, err := age.Decrypt(f.content, identities...)
	var none *age.NoIdentityMatchError
	if errors.As(err, &none) {
		return ErrIdentity
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	f.content = bufio.NewReaderSize(plain, 64<<10)
	return nil
}

// part is one part. Its bytes have to be read to their end before the next.
type part struct {
	kind byte
	name string
	io.Reader
}

// next gives the next part; io.EOF after the last.
func (f *fileReader) next() (*part, error) {
	if f.open {
		return nil, errors.New("backup: a part was not read to its end")
	}
	var head [3]byte
	if _, err := io.ReadFull(f.content, head[:1]); err != nil {
		return nil, cut(err)
	}
	if head[0] == partEnd {
		if _, err := f.content.ReadByte(); err != io.EOF {
			return nil, fmt.Errorf("%w: something follows its content", ErrDamaged)
		}
		return nil, io.EOF
	}
	if _, err := io.ReadFull(f.content, head[1:]); err != nil {
		return nil, cut(err)
	}
	name := make([]byte, binary.BigEndian.Uint16(head[1:]))
	if _, err := io.ReadFull(f.content, name); err != nil {
		return nil, cut(err)
	}
	f.open = true
	return &part{head[0], string(name), &partReader{file: f, body: &unchunk{from: f.content}}}, nil
}

type partReader struct {
	file *fileReader
	body *unchunk
	err  error
}

// Read gives errGivenUp at the end of a part that its writer gave up.
func (p *partReader) Read(b []byte) (int, error) {
	if p.err != nil {
		return 0, p.err
	}
	n, err := p.body.Read(b)
	if err == nil {
		return n, nil
	}
	p.err = err
	if err == io.EOF {
		p.file.open = false
		verdict, err := p.file.content.ReadByte()
		switch {
		case err != nil:
			p.err = cut(err)
		case verdict == 0:
			p.err = errGivenUp
		case verdict != 1:
			p.err = fmt.Errorf("%w: a part's verdict is %d", ErrDamaged, verdict)
		}
	}
	return n, p.err
}
