package bundle

import (
	"bufio"
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"iter"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
)

// Spec says what a bundle is to hold.
type Spec struct {
	Source     Origin
	Recipients []string                  // site ids; none: whoever trusts the source
	Key        crypto.Signer             // an active online key of the source
	Chains     map[string]entry.KeyChain // of the source and of every origin of a log
	Logs       []Log
}

// Log is one log of a bundle. It is read twice and has to be the same twice.
type Log struct {
	ID         entry.LogID
	Project    string      // its name at its origin; "" takes the one of the entries
	Basis      *entry.Tree // of the entries before the first one carried; nil: none are
	Size       uint64      // entries before the end, as the checkpoint says
	Checkpoint []byte      // signed by the origin
	State      [32]byte    // of the scope at Size
	Values     func() iter.Seq2[[]byte, error]
}

// Written says what a bundle holds.
type Written struct {
	Predicate
	Images []Image
	Absent []digest.Digest // named by a manifest, not held at the source
	// Configs and Layers count blobs, BlobBytes is their size together.
	Configs, Layers int
	BlobBytes       int64
}

// Write writes a bundle. An error of the source (a journal that contradicts its
// checkpoint, a damaged blob) ends it, and what was written until then is
// refused by every reader.
func Write(ctx context.Context, w io.Writer, spec Spec, content Content) (Written, error) {
	p := &plan{spec: spec, content: content, graph: graph{edges: map[sum][]reference{}}, sizes: map[sum]int64{}}
	p.spec.Logs = slices.SortedFunc(slices.Values(spec.Logs), func(a, b Log) int { return a.ID.Compare(b.ID) })
	for _, step := range []func(context.Context) error{p.readKeys, p.readLogs, p.readManifests, p.sizeBlobs, p.seal, p.sign, p.review} {
		if err := step(ctx); err != nil {
			return Written{}, fmt.Errorf("write bundle: %w", err)
		}
	}
	if err := p.emit(ctx, w); err != nil {
		return Written{}, fmt.Errorf("write bundle: %w", err)
	}
	written := Written{Predicate: p.predicate, Images: p.images}
	for _, f := range p.blobs {
		switch f.Role {
		case RoleConfig:
			written.Configs++
		case RoleLayer:
			written.Layers++
		default:
			continue
		}
		written.BlobBytes += f.Size
	}
	written.Absent = slices.Clone(p.manifest.Absent)
	return written, nil
}

// plan is a bundle before its first byte: everything that the statement says has
// to be known by then.
type plan struct {
	spec      Spec
	content   Content
	keys      map[string]entry.Keys
	graph     graph
	entries   []File // per log, size and hash
	sizes     map[sum]int64
	blobs     []File
	images    []Image
	predicate Predicate
	index     []byte
	small     map[string][]byte
	manifest  manifest
	statement statement
	prelude   []prelude
}

type prelude struct {
	path    string
	content []byte
}

// readKeys checks the chains against themselves, so that a mistake shows here
// and not at the importer.
func (p *plan) readKeys(context.Context) error {
	p.keys = map[string]entry.Keys{}
	for site, chain := range p.spec.Chains {
		_, root, err := chain.Claimed()
		if err != nil {
			return err
		}
		if p.keys[site], err = chain.Verify(site, root); err != nil {
			return err
		}
	}
	own, err := entry.KeyOf(p.spec.Key)
	if err != nil {
		return err
	}
	if !slices.Contains(p.keys[p.spec.Source.Site].Signing(), own) {
		return fmt.Errorf("key %s is no active online key in the key chain of site %s", own.Fingerprint(), p.spec.Source.Site)
	}
	return nil
}

func (p *plan) readLogs(ctx context.Context) error {
	p.predicate = Predicate{
		Format: Version, Kind: KindFull, Source: p.spec.Source, Reads: Level{Format: Version, Feature: 1},
		Recipients: slices.Compact(slices.Sorted(slices.Values(p.spec.Recipients))), Basis: []Mark{}, Target: []Goal{},
	}
	if p.predicate.Recipients == nil {
		p.predicate.Recipients = []string{}
	}
	for _, log := range p.spec.Logs {
		if err := p.readLog(ctx, log); err != nil {
			return fmt.Errorf("log %s of project %s: %w", log.ID, log.Project, err)
		}
	}
	return nil
}

func (p *plan) readLog(ctx context.Context, log Log) error {
	basis := &entry.Tree{}
	if log.Basis != nil {
		basis = log.Basis.Clone()
	}
	l := newLedger(log.ID, basis)
	hashed := newHashed(io.Discard, digest.SHA256)
	err := p.eachItem(ctx, log, func(item []byte, first bool) error {
		if !first {
			if _, err := l.add(item); err != nil {
				return err
			}
		}
		return writeItem(hashed, item)
	})
	if err != nil {
		return err
	}
	keys, ok := p.keys[log.ID.Site]
	if !ok {
		return fmt.Errorf("no key chain of its site is given")
	}
	checkpoint, err := entry.OpenCheckpoint(log.Checkpoint, keys.Checkpoints()...)
	if err != nil {
		return err
	}
	root := l.tree.Root()
	if checkpoint.Log != log.ID || checkpoint.Size != log.Size || l.tree.Size() != log.Size || checkpoint.Root != root ||
		l.seen && checkpoint.At != l.lastAt {
		return fmt.Errorf("the checkpoint over %d entries does not fit the journal's %d entries with root %s", checkpoint.Size, l.tree.Size(), root)
	}
	if l.from == 0 {
		state, err := l.state.Root()
		if err != nil {
			return err
		}
		if state != log.State {
			return fmt.Errorf("alarm: the rows have the state %x, the entries give %x: run nothing from this site before this is explained", log.State, state)
		}
	}
	name := log.Project
	if l.project != "" {
		name = l.project
	}
	p.predicate.Target = append(p.predicate.Target, Goal{LogID: log.ID, Project: name, Size: log.Size, Root: hex.EncodeToString(root[:]), State: hex.EncodeToString(log.State[:])})
	if l.from > 0 {
		p.predicate.Kind = KindIncremental
		p.predicate.Basis = append(p.predicate.Basis, Mark{LogID: log.ID, Size: l.from})
	}
	p.predicate.Created = max(p.predicate.Created, checkpoint.At)
	p.entries = append(p.entries, File{Size: hashed.size, SHA256: hashed.digest().Encoded()})
	p.graph.ledgers = append(p.graph.ledgers, l)
	return nil
}

// eachItem gives the items of a log's file of entries, the right edge first.
func (p *plan) eachItem(ctx context.Context, log Log, visit func(item []byte, first bool) error) error {
	basis := &entry.Tree{}
	if log.Basis != nil {
		basis = log.Basis
	}
	edge, err := basis.MarshalBinary()
	if err != nil {
		return err
	}
	if err := visit(edge, true); err != nil {
		return err
	}
	for value, err := range log.Values() {
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			err = visit(value, false)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// readManifests follows the live artifacts through every manifest held.
func (p *plan) readManifests(ctx context.Context) error {
	queue, err := p.graph.roots()
	if err != nil {
		return err
	}
	asked := map[sum]bool{}
	for len(queue) > 0 {
		next := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		if next.rank != 0 || asked[next.sum] {
			continue
		}
		asked[next.sum] = true
		data, err := p.load(ctx, next.sum)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		p.sizes[next.sum] = int64(len(data))
		if err := p.graph.add(next.sum, data); err != nil {
			return err
		}
		queue = append(queue, p.graph.edges[next.sum]...)
	}
	return nil
}

func (p *plan) load(ctx context.Context, s sum) ([]byte, error) {
	d := s.digest()
	r, err := p.content.Open(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("open manifest %s: %w", d, err)
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, maxOCI+1))
	if err != nil {
		return nil, fmt.Errorf("read manifest %s: %w", d, err)
	}
	if len(data) > maxOCI {
		return nil, fmt.Errorf("manifest %s has over %d bytes, a bundle carries none so large", d, maxOCI)
	}
	if d.Algorithm().FromBytes(data) != d {
		return nil, fmt.Errorf("manifest %s is damaged here: its content has another hash", d)
	}
	return data, nil
}

// sizeBlobs asks the size of every blob reached and sorts out the absent.
func (p *plan) sizeBlobs(ctx context.Context) error {
	reached, err := p.graph.reach()
	if err != nil {
		return err
	}
	p.manifest.Absent = []digest.Digest{}
	for _, ref := range reached {
		if err := ctx.Err(); err != nil {
			return err
		}
		d := ref.sum.digest()
		size, ok := p.sizes[ref.sum]
		if !ok && ref.rank != 0 {
			size, err = p.content.Size(ctx, d)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("size of blob %s: %w", d, err)
			}
			ok = err == nil
		}
		if !ok {
			p.manifest.Absent = append(p.manifest.Absent, d)
			continue
		}
		role := []string{RoleManifest, RoleConfig, RoleLayer}[ref.rank]
		p.blobs = append(p.blobs, blobFile(d, size, role))
	}
	slices.Sort(p.manifest.Absent)
	return nil
}

// seal fixes the manifest.
func (p *plan) seal(context.Context) error {
	held := map[sum]bool{}
	for s := range p.graph.edges {
		held[s] = true
	}
	var err error
	if p.images, err = p.graph.images(held, p.predicate.project); err != nil {
		return err
	}
	if p.index, err = indexContent(p.images); err != nil {
		return fmt.Errorf("encode %s: %w", pathIndex, err)
	}
	p.manifest.Format = Version
	p.small = p.contents()
	log := 0
	for _, f := range p.predicate.fixedFiles() {
		switch f.Role {
		case RoleEntries:
			f.Size, f.SHA256 = p.entries[log].Size, p.entries[log].SHA256
			log++
		default:
			content := p.small[f.Path]
			f.Size, f.SHA256 = int64(len(content)), hexSum(content)
		}
		p.manifest.Files = append(p.manifest.Files, f)
	}
	p.manifest.Files = append(p.manifest.Files, p.blobs...)
	for _, f := range p.manifest.Files {
		p.predicate.Size += f.Size
	}
	return nil
}

// sign makes statement and signatures over the manifest.
func (p *plan) sign(context.Context) error {
	content, err := entry.MarshalJSON(p.manifest)
	if err != nil {
		return fmt.Errorf("encode %s: %w", pathManifest, err)
	}
	manifestSum := sha256.Sum256(content)
	s, err := newStatement(p.predicate, manifestSum)
	if err != nil {
		return err
	}
	p.statement, p.predicate = s, s.Predicate
	payload, err := entry.MarshalJSON(s)
	if err != nil {
		return fmt.Errorf("encode %s: %w", pathStatement, err)
	}
	envelope, err := entry.SealEnvelope(payloadType, payload, p.spec.Key)
	if err != nil {
		return err
	}
	raw, err := entry.Sign(p.spec.Key, content)
	if err != nil {
		return fmt.Errorf("sign %s: %w", pathManifest, err)
	}
	signature := base64.StdEncoding.EncodeToString(raw) + "\n"
	p.prelude = []prelude{{pathStatement, envelope}, {pathManifest, content}, {pathSignature, []byte(signature)}}
	return nil
}

// review holds the plan against what a reader accepts, before the first byte.
func (p *plan) review(context.Context) error {
	for _, part := range p.prelude {
		if int64(len(part.content)) > preludeLimit(part.path) {
			return fmt.Errorf("%s would have %d bytes, a bundle allows %d: export fewer projects at a time", part.path, len(part.content), preludeLimit(part.path))
		}
	}
	if err := p.statement.check(&p.manifest, sha256.Sum256(p.prelude[1].content)); err != nil {
		return fmt.Errorf("this bundle would be refused: %w", err)
	}
	return nil
}

// contents gives the files that are held in memory, by path.
func (p *plan) contents() map[string][]byte {
	files := map[string][]byte{pathLayout: []byte(layoutContent), pathIndex: p.index}
	for _, site := range p.predicate.sites() {
		files[dirKeys+site+".jsonl"] = p.spec.Chains[site]
	}
	for _, log := range p.spec.Logs {
		files[dirJournal+log.ID.String()+".checkpoint"] = log.Checkpoint
	}
	return files
}

// emit writes the tar.
func (p *plan) emit(ctx context.Context, w io.Writer) error {
	out := bufio.NewWriterSize(w, 256<<10)
	log := 0
	for i, f := range p.manifest.Files {
		var err error
		switch f.Role {
		case RoleEntries:
			item := p.spec.Logs[log]
			err = emitFile(out, f, func(w io.Writer) error {
				return p.eachItem(ctx, item, func(item []byte, _ bool) error { return writeItem(w, item) })
			})
			log++
		case RoleManifest, RoleConfig, RoleLayer:
			err = emitFile(out, f, func(w io.Writer) error { return p.copyBlob(ctx, w, f.Digest()) })
		default:
			err = emitFile(out, f, func(w io.Writer) error { _, err := w.Write(p.small[f.Path]); return err })
		}
		if err != nil {
			return err
		}
		if i > 0 {
			continue
		}
		for _, part := range p.prelude {
			f := File{Path: part.path, Size: int64(len(part.content)), SHA256: hexSum(part.content)}
			if err := emitFile(out, f, func(w io.Writer) error { _, err := w.Write(part.content); return err }); err != nil {
				return err
			}
		}
	}
	if _, err := out.Write(make([]byte, 2*blockSize)); err != nil {
		return err
	}
	return out.Flush()
}

func (p *plan) copyBlob(ctx context.Context, w io.Writer, d digest.Digest) error {
	r, err := p.content.Open(ctx, d)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.Copy(w, &cancelled{ctx: ctx.Err, r: r})
	return err
}

// cancelled ends a copy when its context does.
type cancelled struct {
	ctx func() error
	r   io.Reader
}

func (c *cancelled) Read(p []byte) (int, error) {
	if err := c.ctx(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// emitFile writes header, content and padding, and insists that the content is
// the one that the manifest names.
func emitFile(w io.Writer, f File, content func(io.Writer) error) error {
	head, err := header(f.Path, f.Size)
	if err != nil {
		return err
	}
	if _, err := w.Write(head); err != nil {
		return err
	}
	hashed := newHashed(w, f.Digest().Algorithm())
	hashed.limit = f.Size
	if err := content(hashed); err != nil {
		return fmt.Errorf("%s: %w", f.Path, err)
	}
	if hashed.size != f.Size || hashed.digest() != f.Digest() {
		return fmt.Errorf("%s: the content here is damaged or changed meanwhile: %d bytes with hash %s, want %d with %s", f.Path, hashed.size, hashed.digest(), f.Size, f.Digest())
	}
	_, err = w.Write(make([]byte, padding(f.Size)))
	return err
}

// hashed counts and hashes what is written through it.
type hashed struct {
	w         io.Writer
	algorithm digest.Algorithm
	h         hash.Hash
	size      int64
	limit     int64
}

func newHashed(w io.Writer, algorithm digest.Algorithm) *hashed {
	return &hashed{w: w, algorithm: algorithm, h: algorithm.Hash(), limit: 1<<63 - 1}
}

func (h *hashed) Write(p []byte) (int, error) {
	if int64(len(p)) > h.limit-h.size {
		return 0, fmt.Errorf("the content has over the %d bytes that it had before", h.limit)
	}
	n, err := h.w.Write(p)
	h.h.Write(p[:n])
	h.size += int64(n)
	return n, err
}

func (h *hashed) digest() digest.Digest { return digest.NewDigest(h.algorithm, h.h) }
