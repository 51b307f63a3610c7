package cloud

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
)

// skip is up to how many bytes are read and dropped rather than asked for in a
// new request: what a request costs is about what they do.
const skip = 256 << 10

// file reads a blob by ranges. One stream is open at a time and goes on where
// the last read ended, so that reading in order, by Read or by ReadAt, is one
// request. It implements blobs.File.
type file struct {
	b    *Backend
	name string
	size int64

	mu     sync.Mutex
	pos    int64 // of Read
	body   io.ReadCloser
	at     int64 // of body
	moved  func()
	end    func()
	closed bool
}

// Read implements io.Reader.
func (f *file) Read(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.read(p, f.pos)
	f.pos += int64(n)
	return n, err
}

// ReadAt implements io.ReaderAt.
func (f *file) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, fmt.Errorf("reading at %d: %w", off, fs.ErrInvalid)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for n < len(p) && err == nil {
		var got int
		got, err = f.read(p[n:], off+int64(n))
		n += got
	}
	if n == len(p) {
		err = nil
	}
	return n, err
}

// Seek implements io.Seeker.
func (f *file) Seek(offset int64, whence int) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch whence {
	case io.SeekCurrent:
		offset += f.pos
	case io.SeekEnd:
		offset += f.size
	}
	if offset < 0 {
		return 0, fmt.Errorf("seeking to %d: %w", offset, fs.ErrInvalid)
	}
	f.pos = offset
	return offset, nil
}

// Close implements io.Closer. It ends the request under way.
func (f *file) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return fs.ErrClosed
	}
	f.closed = true
	f.drop()
	return nil
}

// read reads at an offset; the caller holds mu.
func (f *file) read(p []byte, off int64) (int, error) {
	switch {
	case f.closed:
		return 0, fs.ErrClosed
	case off >= f.size:
		return 0, io.EOF
	case len(p) == 0:
		return 0, nil
	}
	if err := f.goTo(off); err != nil {
		return 0, err
	}
	p = p[:min(int64(len(p)), f.size-off)]
	f.moved()
	n, err := f.body.Read(p)
	f.at += int64(n)
	if err == io.EOF && f.at < f.size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil || f.at == f.size {
		f.drop()
	}
	if n > 0 && errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil // the next read asks again from here
	}
	return n, err
}

// goTo makes the stream stand at an offset.
func (f *file) goTo(off int64) error {
	if f.body != nil && off >= f.at && off-f.at <= skip {
		n, err := io.CopyN(io.Discard, f.body, off-f.at)
		f.at += n
		if err == nil {
			return nil
		}
	}
	f.drop()
	var ctx context.Context
	ctx, f.moved, f.end = f.b.watch()
	body, err := f.b.driver.Reader(ctx, f.name, off)
	if err != nil {
		f.end()
		return gone(err)
	}
	f.body, f.at = body, off
	return nil
}

// drop ends the stream.
func (f *file) drop() {
	if f.body == nil {
		return
	}
	f.end() // first, so that closing does not read on to the end
	f.body.Close()
	f.body = nil
}
