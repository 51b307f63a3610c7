// Package blobs keeps content by digest: the files (Store) and the rows that
// say which blobs the site has, who may see them and what refers to them
// (Records).
package blobs

import (
	"context"
	"io"
	"log/slog"
	"time"

	"github.com/opencontainers/go-digest"
)

// Options of a store; the zero value is usable.
type Options struct {
	FS FS // nil: the operating system's, below the directory given to Open
	// MinFree is the low-water mark in bytes: with less free space writes are
	// refused and reads go on. 0 is none.
	MinFree int64
	// MaxUpload bounds one blob in bytes; 0 is unbounded.
	MaxUpload int64
	// MaxSessions bounds the upload sessions under way; 0 is 4096.
	MaxSessions int
	// Boot identifies the run of the kernel; "" asks the kernel.
	Boot string
	Log  *slog.Logger // nil discards
}

// Info is what the store knows of a blob that it holds.
type Info struct {
	Digest digest.Digest
	Size   int64
}

// Offset is the Detail of an Append at the wrong place: where to go on.
type Offset struct {
	Offset int64 `json:"offset"`
}

// Usage is what the store occupies, in bytes.
type Usage struct {
	Blobs    int   // blobs held
	Bytes    int64 // by blobs held
	Uploads  int64 // by upload sessions
	Partials int64 // by fetches under way
	Staging  int64 // by imports under way
	Free     int64 // still free for the store
	Total    int64 // size of the disk
}

// Codes of failures that the OCI Distribution specification has no name for.
const (
	CodeNoSpace = "INSUFFICIENT_STORAGE" // kind fault.Limit
)

// PieceSize is the unit in which a Partial remembers what it holds, in bytes.
const PieceSize = 256 << 10

type Store struct{}

func Open(dir string, o Options) (*Store, error)                          { panic("being built") }
func (s *Store) Close() error                                             { panic("being built") }
func (s *Store) Stat(d digest.Digest) (Info, error)                       { panic("being built") }
func (s *Store) OpenBlob(d digest.Digest) (File, int64, error)            { panic("being built") }
func (s *Store) List(after digest.Digest, n int) ([]digest.Digest, error) { panic("being built") }
func (s *Store) Remove(d digest.Digest) error                             { panic("being built") }
func (s *Store) Pin(d digest.Digest) (release func())                     { panic("being built") }
func (s *Store) Usage(ctx context.Context) (Usage, error)                 { panic("being built") }
func (s *Store) Put(ctx context.Context, d digest.Digest, r io.Reader) (Info, error) {
	panic("being built")
}
func (s *Store) Expire(ctx context.Context, olderThan time.Duration) (int, error) {
	panic("being built")
}

// RemoveIf asks allowed under the digest's lock, so that nothing can bring the blob back between the answer and the unlink.
func (s *Store) RemoveIf(ctx context.Context, d digest.Digest, allowed func(context.Context) error) error {
	panic("being built")
}

type Upload struct{}

func (s *Store) NewUpload(ctx context.Context) (*Upload, error) { panic("being built") }

// Upload finds a session; fault.NotFound with code BLOB_UPLOAD_UNKNOWN.
func (s *Store) Upload(id string) (*Upload, error) { panic("being built") }

func (u *Upload) ID() string  { panic("being built") }
func (u *Upload) Size() int64 { panic("being built") }

// Progress gives when the session last took bytes in.
func (u *Upload) Progress() (size int64, at time.Time) { panic("being built") }
func (u *Upload) Append(ctx context.Context, r io.Reader, at int64) (int64, error) {
	panic("being built")
}
func (u *Upload) Commit(ctx context.Context, want digest.Digest) (Info, error) { panic("being built") }
func (u *Upload) Cancel() error                                                { panic("being built") }

type Partial struct{}

func (s *Store) NewPartial(ctx context.Context, d digest.Digest, size int64) (*Partial, error) {
	panic("being built")
}
func (p *Partial) Size() int64                              { panic("being built") }
func (p *Partial) WriteAt(b []byte, off int64) (int, error) { panic("being built") }
func (p *Partial) ReadAt(b []byte, off int64) (int, error)  { panic("being built") }
func (p *Partial) MarkPiece(i int) error                    { panic("being built") }
func (p *Partial) Have(i int) bool                          { panic("being built") }
func (p *Partial) Held() (pieces int, bytes int64)          { panic("being built") }
func (p *Partial) Commit(ctx context.Context) (Info, error) { panic("being built") }
func (p *Partial) Close() error                             { panic("being built") }
func (p *Partial) Abort() error                             { panic("being built") }

type Staging struct{}

func (s *Store) Staging(id string) (*Staging, error) { panic("being built") }
func (s *Store) Staged() ([]string, error)           { panic("being built") }
func (g *Staging) Put(ctx context.Context, d digest.Digest, size int64, r io.Reader) error {
	panic("being built")
}
func (g *Staging) Has(d digest.Digest) (bool, error)         { panic("being built") }
func (g *Staging) Open(d digest.Digest) (File, int64, error) { panic("being built") }
func (g *Staging) Commit(ctx context.Context) (int, error)   { panic("being built") }
func (g *Staging) Discard() error                            { panic("being built") }
