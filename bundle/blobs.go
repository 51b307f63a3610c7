package bundle

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
)

// Blob is one blob as it arrives. Read returns io.EOF only when its content has
// the digest.
type Blob struct {
	File
	io.Reader
}

// NextBlob goes on to the next blob, io.EOF after the last and after everything
// else that has to be at the end. What is left of the blob before it is read
// and verified first. Manifests come first; the first blob that is none comes
// only if what the bundle holds is exactly what its entries reach.
func (b *Reader) NextBlob() (*Blob, error) {
	if b.err != nil {
		return nil, b.err
	}
	if b.stage == stageEnd {
		return nil, io.EOF
	}
	if b.stage != stageBlobs {
		return nil, b.fail(errors.New("read bundle: NextBlob wants NextLog to have returned io.EOF"))
	}
	if err := b.drain(); err != nil {
		return nil, err
	}
	more := b.next < len(b.manifest.Files)
	if !b.settled && (!more || b.manifest.Files[b.next].Role != RoleManifest) {
		if err := b.settle(); err != nil {
			return nil, b.fail(err)
		}
	}
	if !more {
		if err := b.readEnd(); err != nil {
			return nil, b.fail(err)
		}
		b.stage = stageEnd
		return nil, io.EOF
	}
	file := b.manifest.Files[b.next]
	b.next++
	if file.Role != RoleManifest {
		body, err := b.enter(file)
		if err != nil {
			return nil, b.fail(err)
		}
		return &Blob{File: file, Reader: body}, nil
	}
	data, err := b.small(file)
	if err != nil {
		return nil, b.fail(err)
	}
	s, err := sumOf(file.Digest())
	if err != nil {
		return nil, b.fail(err)
	}
	if err := b.graph.add(s, data); err != nil {
		return nil, b.fail(altered("%s: %v", file.Path, err).Because(err))
	}
	return &Blob{File: file, Reader: bytes.NewReader(data)}, nil
}

// Images lists what index.json names; after the last manifest has been read.
func (b *Reader) Images() []Image { return b.images }

// Reach lists the manifests and blobs that the live artifacts of the logs for
// which want answers true lead to; after the last manifest has been read.
func (b *Reader) Reach(want func(entry.LogID) bool) (map[digest.Digest]bool, error) {
	part := graph{edges: b.graph.edges}
	for _, l := range b.graph.ledgers {
		if want(l.log) {
			part.ledgers = append(part.ledgers, l)
		}
	}
	reached, err := part.reach()
	if err != nil {
		return nil, err
	}
	out := make(map[digest.Digest]bool, len(reached))
	for _, ref := range reached {
		out[ref.sum.digest()] = true
	}
	return out, nil
}

// settle compares what the bundle holds with what its entries reach, and
// index.json with what both give.
func (b *Reader) settle() error {
	reached, err := b.graph.reach()
	if err != nil {
		return altered("%v", err)
	}
	absent := map[digest.Digest]bool{}
	for _, a := range b.manifest.Absent {
		absent[a] = true
	}
	held := map[sum]bool{}
	for s := range maps.Keys(b.graph.edges) {
		held[s] = true
	}
	blobs := b.manifest.Files[len(b.Claims().fixedFiles()):]
	for _, ref := range reached {
		d := ref.sum.digest()
		if absent[d] {
			delete(absent, d)
			continue
		}
		if len(blobs) == 0 || blobs[0].Digest() != d || blobRank(blobs[0].Role) != int(ref.rank) {
			return altered("blob %s is named by a manifest, but is not in the bundle in its place", d)
		}
		blobs = blobs[1:]
	}
	if len(blobs) > 0 || len(absent) > 0 {
		return altered("it names %d blobs that no entry leads to", len(blobs)+len(absent))
	}
	if b.images, err = b.graph.images(held, b.Claims().project); err != nil {
		return altered("%v", err)
	}
	want, err := indexContent(b.images)
	if err != nil {
		return err
	}
	if !bytes.Equal(want, b.index) {
		return altered("%s does not list what the entries say", pathIndex)
	}
	b.settled, b.index = true, nil
	return nil
}

// readEnd reads two zero blocks and insists that nothing follows.
func (b *Reader) readEnd() error {
	end, err := b.take(2*blockSize, "the end of the tar")
	if err != nil {
		return err
	}
	if !zero(end) {
		return altered("something stands where the tar ends")
	}
	var more [1]byte
	switch _, err := io.ReadFull(b.r, more[:]); {
	case err == nil:
		return altered("bytes follow after its end, from byte %d on", b.offset)
	case err == io.EOF:
		return nil
	default:
		return fmt.Errorf("read bundle at byte %d: %w", b.offset, err)
	}
}
