package blobs

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/node/fault"
)

// The layout below the store's directory. Every name is built here, from parts
// that were checked here: hex digits and short plain words, so that no outside
// byte can leave the directory. <algorithm> is sha256 or sha512.
//
//	format                            the version of this layout
//	boot                              the run of the kernel that wrote last
//	blobs/<algorithm>/ab/<hex>        whole, verified, durable blobs
//	uploads/<id>                      bytes of a session; <id>.state its last checkpoint
//	partials/<algorithm>-<hex>        a blob being fetched; <algorithm>-<hex>.have its pieces,
//	                                  .seen those too that are not synced yet
//	staging/<id>/<algorithm>-<hex>    verified blobs of an import, not visible yet
//	quarantine/<algorithm>-<hex>      blobs that were found damaged; made when first needed
const (
	formatName  = "format"
	bootName    = "boot"
	blobsDir    = "blobs"
	uploadsDir  = "uploads"
	partialsDir = "partials"
	stagingDir  = "staging"

	quarantineDir = "quarantine"

	stateSuffix = ".state"
	haveSuffix  = ".have"
	seenSuffix  = ".seen"
	tempSuffix  = ".tmp"
)

// shardsEach is the number of directories that the blobs of one algorithm are in:
// one for each first byte of a digest.
const shardsEach = 256

// key is a digest that was checked: a name can be made of it.
type key digest.Digest

// keyOf checks a digest.
func keyOf(d digest.Digest) (key, error) {
	if _, err := entry.ParseDigest(string(d)); err != nil {
		return "", fault.Wrap(err, fault.Invalid, "%.140q is not a digest: it is written sha256: and 64, or sha512: and 128, lower-case hex digits", string(d)).WithCode("DIGEST_INVALID")
	}
	return key(d), nil
}

func (k key) digest() digest.Digest       { return digest.Digest(k) }
func (k key) algorithm() digest.Algorithm { return k.digest().Algorithm() }

// shard gives the number of the blob's directory: those of an algorithm stand
// together, in the order of the digests' first bytes.
func (k key) shard() int {
	algorithm, hex, _ := strings.Cut(string(k), ":")
	n, _ := strconv.ParseUint(hex[:2], 16, 8)
	return slices.Index(entry.Algorithms(), digest.Algorithm(algorithm))*shardsEach + int(n)
}

// blob names the blob's file.
func (k key) blob() string {
	algorithm, hex, _ := strings.Cut(string(k), ":")
	return blobsDir + "/" + algorithm + "/" + hex[:2] + "/" + hex
}

// plain is the digest as the name of a file.
func (k key) plain() string { return strings.Replace(string(k), ":", "-", 1) }

// partial names the file of a fetch.
func (k key) partial() string { return partialsDir + "/" + k.plain() }

// quarantined names the file of a damaged blob.
func (k key) quarantined() string { return quarantineDir + "/" + k.plain() }

// keyOfPlain reads what plain has written.
func keyOfPlain(name string) (key, bool) {
	k, err := keyOf(digest.Digest(strings.Replace(name, "-", ":", 1)))
	return k, err == nil && k.plain() == name
}

// shardName names a directory of blobs.
func shardName(i int) string {
	return fmt.Sprintf("%s/%s/%02x", blobsDir, entry.Algorithms()[i/shardsEach], i%shardsEach)
}

// keyIn gives the blob whose file has the name in a directory of blobs; false
// for a file that is not ours.
func keyIn(shard int, name string) (key, bool) {
	k, err := keyOf(digest.Digest(entry.Algorithms()[shard/shardsEach].String() + ":" + name))
	return k, err == nil && k.shard() == shard
}

func uploadName(id string) string { return uploadsDir + "/" + id }

func isHex(s string, n int) bool {
	if len(s) != n {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// isUploadID reports whether s could be the name of an upload session.
func isUploadID(s string) bool { return isHex(s, 32) }

// isStagingID reports whether s may name a staging area: up to 80 letters,
// digits, '-', '_' and '.', with a letter or digit in front.
func isStagingID(s string) bool {
	if s == "" || len(s) > 80 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		plain := c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !plain && (i == 0 || c != '-' && c != '_' && c != '.') {
			return false
		}
	}
	return true
}
