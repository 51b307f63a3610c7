package bundle

import (
	"bytes"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/opencontainers/go-digest"
)

func (b *Reader) fail(err error) error {
	if b.err == nil {
		b.err = err
	}
	return b.err
}

// take reads n bytes that belong to a file.
func (b *Reader) take(n int, path string) ([]byte, error) {
	// Grown as it arrives: a header may promise much more than there is.
	var out bytes.Buffer
	read, err := io.CopyN(&out, b.r, int64(n))
	b.offset += read
	if err != nil {
		return nil, b.short(err, path)
	}
	return out.Bytes(), nil
}

func (b *Reader) short(err error, path string) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		// io.EOF is not wrapped: to a caller it would be the good end.
		return Refuse(ErrTruncated, "the bundle ends after %d bytes, within %s: it is incomplete. Copy it again from its source; what was verified so far is not copied again", b.offset, path)
	}
	return fmt.Errorf("read bundle at byte %d, in %s: %w", b.offset, path, err)
}

func (b *Reader) skipPadding(size int64, path string) error {
	pad, err := b.take(int(padding(size)), path)
	if err != nil {
		return err
	}
	if !zero(pad) {
		return altered("the padding after %s is not zero", path)
	}
	return nil
}

func zero(b []byte) bool { return len(bytes.TrimLeft(b, "\x00")) == 0 }

// small reads a whole file that the manifest names and whose size it bounds.
func (b *Reader) small(f File) ([]byte, error) {
	body, err := b.enter(f)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if _, err := io.Copy(&out, body); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// enter reads the header of a file, which has to be the one that a writer gives
// it.
func (b *Reader) enter(f File) (*content, error) {
	want, err := header(f.Path, f.Size)
	if err != nil {
		return nil, altered("%v", err)
	}
	have, err := b.take(len(want), f.Path)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(have, want) {
		at := b.offset - int64(len(want))
		if stated := statedPath(have); stated != f.Path {
			return nil, altered("at byte %d stands %q where %s has to stand", at, stated, f.Path)
		}
		return nil, altered("the tar header of %s at byte %d was changed", f.Path, at)
	}
	b.open = &content{b: b, file: f, left: f.Size, h: f.Digest().Algorithm().Hash()}
	return b.open, nil
}

// drain reads and verifies what is left of the file being read.
func (b *Reader) drain() error {
	if b.open == nil {
		return b.err
	}
	_, err := io.Copy(io.Discard, b.open)
	return err
}

// content is one file as it arrives.
type content struct {
	b    *Reader
	file File
	left int64
	h    hash.Hash
	done bool
}

func (c *content) Read(p []byte) (int, error) {
	if c.done {
		return 0, io.EOF
	}
	if c.b.err != nil {
		return 0, c.b.err
	}
	if c.left == 0 {
		return 0, c.finish()
	}
	n, err := c.b.r.Read(p[:min(int64(len(p)), c.left)])
	c.h.Write(p[:n])
	c.left -= int64(n)
	c.b.offset += int64(n)
	if err != nil && (c.left > 0 || !errors.Is(err, io.EOF)) {
		return n, c.b.fail(c.b.short(err, c.file.Path))
	}
	return n, nil
}

// finish verifies hash and padding; io.EOF is the good end.
func (c *content) finish() error {
	want := c.file.Digest()
	if have := digest.NewDigest(want.Algorithm(), c.h); have != want {
		return c.b.fail(altered("%s has the hash %s", c.file.Path, have.Encoded()))
	}
	if err := c.b.skipPadding(c.file.Size, c.file.Path); err != nil {
		return c.b.fail(err)
	}
	c.done, c.b.open = true, nil
	return io.EOF
}
