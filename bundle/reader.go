package bundle

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"io"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
)

// Reader reads a bundle in one pass, in this order: Open, Claims to learn what
// it says it is, Authenticate, NextLog until io.EOF (with Check on each), then
// NextBlob until io.EOF. Only that last io.EOF means that the bundle is whole.
// The first error is final. A Reader is used by one goroutine.
type Reader struct {
	r      io.Reader
	offset int64
	err    error
	stage  stage
	open   *content // the file being read

	envelope    *entry.Envelope
	statement   statement
	manifest    manifest
	rawManifest []byte
	manifestSum [32]byte
	signature   []byte
	chains      map[string]entry.KeyChain
	keys        map[string]entry.Keys

	index   []byte
	next    int // file of the manifest that comes next
	log     int // log of the target that comes next
	pending *Scope
	graph   graph
	settled bool
	images  []Image
}

type stage int

const (
	stageClaims stage = iota
	stageLogs
	stageBlobs
	stageEnd
)

// Open reads what stands before everything else: statement, manifest and key
// chains. Nothing of it is verified yet; Authenticate does that.
func Open(r io.Reader) (*Reader, error) {
	b := &Reader{r: bufio.NewReaderSize(r, 256<<10), chains: map[string]entry.KeyChain{}, keys: map[string]entry.Keys{}, graph: graph{edges: map[sum][]reference{}}}
	if err := b.readPrelude(); err != nil {
		return nil, err
	}
	return b, nil
}

func (b *Reader) readPrelude() error {
	if err := b.readLayout(); err != nil {
		return err
	}
	payload, err := b.readStated(pathStatement)
	if err != nil {
		return err
	}
	if b.envelope, err = entry.ParseEnvelope(payloadType, payload); err != nil {
		return altered("%s: %v", pathStatement, err)
	}
	if format, ok := statedFormat(b.envelope.Payload); ok && format > Version {
		return Refuse(ErrNewerFormat, "the bundle has format version %d, this build reads versions up to %d: update Atoll here, or export again with a version of Atoll that writes format %d", format, Version, Version)
	}
	if err := entry.UnmarshalJSON(b.envelope.Payload, &b.statement); err != nil {
		return altered("%s: %v", pathStatement, err)
	}
	if b.rawManifest, err = b.readStated(pathManifest); err != nil {
		return err
	}
	b.manifestSum = sha256.Sum256(b.rawManifest)
	if err := entry.UnmarshalJSON(b.rawManifest, &b.manifest); err != nil {
		return altered("%s: %v", pathManifest, err)
	}
	if err := b.statement.check(&b.manifest, b.manifestSum); err != nil {
		return err
	}
	text, err := b.readStated(pathSignature)
	if err != nil {
		return err
	}
	b.signature, err = base64.StdEncoding.Strict().DecodeString(string(bytes.TrimSuffix(text, []byte("\n"))))
	if err != nil || base64.StdEncoding.EncodeToString(b.signature)+"\n" != string(text) {
		return altered("%s is not one line of base64", pathSignature)
	}
	return b.readChains()
}

// readLayout reads the first file, by which a bundle is told from other files.
func (b *Reader) readLayout() error {
	want, err := header(pathLayout, int64(len(layoutContent)))
	if err != nil {
		return err
	}
	have, err := b.take(blockSize, pathLayout)
	if err != nil {
		return err
	}
	if !bytes.Equal(have, want) {
		return Refuse(ErrNotBundle, "this is not an Atoll bundle: it does not begin as one. A bundle is written by `atoll bundle export`; another OCI archive is pushed with skopeo or oras")
	}
	return b.skipContent([]byte(layoutContent), pathLayout)
}

func (b *Reader) skipContent(want []byte, path string) error {
	have, err := b.take(len(want), path)
	if err != nil {
		return err
	}
	if !bytes.Equal(have, want) {
		return altered("%s has another content than in every bundle", path)
	}
	return b.skipPadding(int64(len(want)), path)
}

// readStated reads a file whose size only its own header tells.
func (b *Reader) readStated(path string) ([]byte, error) {
	block, err := b.take(blockSize, path)
	if err != nil {
		return nil, err
	}
	if path == pathStatement && statedPath(block) != path {
		return nil, Refuse(ErrNotBundle, "this is not an Atoll bundle: after %s it has no %s. It may be another tool's OCI archive; push that with skopeo or oras", pathLayout, pathStatement)
	}
	size, ok := statedSize(block)
	if !ok {
		return nil, altered("the tar header of %s", path)
	}
	if want, err := header(path, size); err != nil || !bytes.Equal(block, want) {
		return nil, altered("the tar header of %s", path)
	}
	if size > preludeLimit(path) {
		return nil, altered("%s has %d bytes, at most %d are allowed", path, size, preludeLimit(path))
	}
	data, err := b.take(int(size), path)
	if err != nil {
		return nil, err
	}
	return data, b.skipPadding(size, path)
}

// readChains reads the key chains, which the manifest names by hash.
func (b *Reader) readChains() error {
	for b.next = 1; b.next < len(b.manifest.Files) && b.manifest.Files[b.next].Role == RoleKeys; b.next++ {
		data, err := b.small(b.manifest.Files[b.next])
		if err != nil {
			return err
		}
		b.chains[b.statement.Predicate.sites()[b.next-1]] = data
	}
	return nil
}

// Claims is what the bundle says of itself; until Authenticate, that is only
// what somebody wrote into a file.
func (b *Reader) Claims() *Predicate { return &b.statement.Predicate }

// Chain is the key chain that the bundle brings for a site.
func (b *Reader) Chain(site string) entry.KeyChain { return b.chains[site] }

// Keys are the verified keys of a site; after Authenticate.
func (b *Reader) Keys(site string) entry.Keys { return b.keys[site] }

// Files are the files that the manifest names.
func (b *Reader) Files() []File { return b.manifest.Files }

// Absent are the blobs that the bundle knows but does not hold.
func (b *Reader) Absent() []digest.Digest {
	return slices.Clone(b.manifest.Absent)
}

// Authenticate verifies the key chains of the source and of the origin of every
// log against root keys from outside, then the signatures of statement and
// manifest.
func (b *Reader) Authenticate(trusted Trusted) error {
	if b.err != nil || b.stage != stageClaims {
		return b.fail(errors.Join(b.err, errors.New("read bundle: Authenticate is called once, first")))
	}
	p := b.Claims()
	for _, site := range p.sites() {
		root, ok := trusted(site)
		if !ok {
			return b.fail(b.unknownSite(site))
		}
		keys, err := b.chains[site].Verify(site, root)
		if errors.Is(err, entry.ErrMalformed) {
			return b.fail(altered("%s%s.jsonl: %v", dirKeys, site, err).Because(err))
		}
		if err != nil {
			return b.fail(Refuse(ErrUntrusted, "the bundle brings keys for site %s that do not come from the root key this site trusts, %s: %v. Somebody else made it, or the site was founded anew: compare fingerprints with its operator before anything else", site, root.Fingerprint(), err).Because(err))
		}
		b.keys[site] = keys
	}
	_, err := b.envelope.Verify(b.keys[p.Source.Site].Signing()...)
	if errors.Is(err, entry.ErrUnknownKey) {
		return b.fail(Refuse(ErrUntrusted, "the statement is signed by a key that site %s (%s) does not vouch for: %v", p.Source.Site, p.Source.Name, err).Because(err))
	}
	if err != nil {
		return b.fail(altered("%s: %v", pathStatement, err).Because(err))
	}
	signed := func(key entry.Key) bool { return key.Verify(b.rawManifest, b.signature) == nil }
	if !slices.ContainsFunc(b.keys[p.Source.Site].Signing(), signed) {
		return b.fail(altered("%s does not match", pathSignature))
	}
	b.rawManifest, b.stage = nil, stageLogs
	return b.readIndex()
}

func (b *Reader) unknownSite(site string) error {
	p := b.Claims()
	claim := "its keys are malformed"
	if _, root, err := b.chains[site].Claimed(); err == nil {
		claim = "it claims the root key " + root.Fingerprint()
	}
	if site == p.Source.Site {
		return Refuse(ErrUntrusted, "the bundle comes from site %s (%q), which this site was not told to trust; %s. To accept it: get that site's document (`atoll site show --format json`) by a way you trust, then `atoll site trust FILE --accept PROJECT`", site, p.Source.Name, claim)
	}
	return Refuse(ErrUntrusted, "the bundle relays projects of site %s, which this site was not told to trust; %s. To accept them: `atoll site trust FILE --accept PROJECT` with that site's document, or have the bundle exported without its projects", site, claim)
}

func (b *Reader) readIndex() error {
	data, err := b.small(b.manifest.Files[b.next])
	if err != nil {
		return b.fail(err)
	}
	b.index = data
	b.next++
	return nil
}
