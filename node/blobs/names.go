package blobs

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/fault"
)

// The layout below the store's directory. Every name is built here, from parts
// that were checked here: hex digits and short plain words, so that no outside
// byte can leave the directory.
//
//	format                 the version of this layout
//	boot                   the run of the kernel that wrote last
//	blobs/sha256/ab/<hex>  whole, verified, durable blobs
//	uploads/<id>           bytes of a session; <id>.state its last checkpoint
//	partials/<hex>         a blob being fetched; <hex>.have its pieces
//	staging/<id>/<hex>     verified blobs of an import, not visible yet
//	quarantine/<hex>       blobs that were found damaged; made when first needed
const (
	formatName  = "format"
	bootName    = "boot"
	blobsDir    = "blobs/sha256"
	uploadsDir  = "uploads"
	partialsDir = "partials"
	stagingDir  = "staging"

	quarantineDir = "quarantine"

	stateSuffix = ".state"
	haveSuffix  = ".have"
	tempSuffix  = ".tmp"
)

// hexOf gives the hex digits of a SHA-256 digest in its one canonical spelling.
func hexOf(d digest.Digest) (string, error) {
	hex, ok := strings.CutPrefix(string(d), "sha256:")
	if !ok || !isHex(hex, 64) {
		return "", fault.New(fault.Invalid, "%.100q is not a sha256 digest: it is written sha256: and 64 lower-case hex digits", string(d)).WithCode("DIGEST_INVALID")
	}
	return hex, nil
}

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

func digestOf(hex string) digest.Digest { return digest.Digest("sha256:" + hex) }

func shardName(i int) string { return fmt.Sprintf("%s/%02x", blobsDir, i) }

// shardOf gives the number of a blob's directory: its digest's first byte.
func shardOf(hex string) int {
	n, _ := strconv.ParseUint(hex[:2], 16, 8)
	return int(n)
}

func blobName(hex string) string    { return blobsDir + "/" + hex[:2] + "/" + hex }
func uploadName(id string) string   { return uploadsDir + "/" + id }
func partialName(hex string) string { return partialsDir + "/" + hex }

func quarantineName(hex string) string { return quarantineDir + "/" + hex }

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
