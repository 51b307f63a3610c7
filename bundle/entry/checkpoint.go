package entry

import (
	"crypto"
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Checkpoint commits to the first Size entries of a log.
type Checkpoint struct {
	Log  LogID
	Size uint64
	Root tlog.Hash
	// At is the At of the last entry, 0 of an empty log: not the time of
	// signing, so that an unchanged log has an unchanged checkpoint.
	At int64
}

// maxCheckpoint bounds a signed checkpoint, in bytes.
const maxCheckpoint = 8 << 10

// Text is the body that is signed: the C2SP tlog-checkpoint lines origin, size
// and root, then one extension line with the time.
func (c Checkpoint) Text() string {
	return fmt.Sprintf("%s%s\n%d\n%s\nat %d\n", originPrefix, c.Log, c.Size, c.Root, c.At)
}

// Sign writes the checkpoint as a note signed by an online key of the log's
// site. Ed25519 is deterministic: the same checkpoint and key give the same
// bytes.
func (c Checkpoint) Sign(key crypto.Signer) ([]byte, error) {
	if err := c.Log.Validate(); err != nil {
		return nil, fmt.Errorf("sign checkpoint: %w", err)
	}
	signer, err := newNoteSigner(c.Log.Site, key)
	if err != nil {
		return nil, fmt.Errorf("sign checkpoint of %s: %w", c.Log, err)
	}
	signed, err := note.Sign(&note.Note{Text: c.Text()}, signer)
	if err != nil {
		return nil, fmt.Errorf("sign checkpoint of %s: %w", c.Log, err)
	}
	return signed, nil
}

// ParseCheckpoint reads a signed checkpoint without verifying it: only to learn
// whose keys to verify it with.
func ParseCheckpoint(signed []byte) (Checkpoint, error) {
	text, _, ok := strings.Cut(string(signed), "\n\n")
	if !ok || len(signed) > maxCheckpoint {
		return Checkpoint{}, fmt.Errorf("checkpoint: no signature, or over %d bytes: %w", maxCheckpoint, ErrMalformed)
	}
	return parseText(text + "\n")
}

// OpenCheckpoint verifies a signed checkpoint with any of the keys (the ones a
// KeyChain gives for checkpoints) and reads it. It must carry exactly one
// signature and be written exactly as Sign writes it.
func OpenCheckpoint(signed []byte, keys ...Key) (Checkpoint, error) {
	c, err := ParseCheckpoint(signed)
	if err != nil {
		return Checkpoint{}, err
	}
	for _, key := range keys {
		verifier, err := newNoteVerifier(c.Log.Site, key)
		if err != nil {
			return Checkpoint{}, fmt.Errorf("verify checkpoint of %s: %w", c.Log, err)
		}
		n, err := note.Open(signed, note.VerifierList(verifier))
		if err != nil || len(n.Sigs) != 1 || len(n.UnverifiedSigs) != 0 {
			continue
		}
		sig := n.Sigs[0]
		if again := fmt.Sprintf("%s\n— %s %s\n", n.Text, sig.Name, sig.Base64); again != string(signed) || n.Text != c.Text() {
			return Checkpoint{}, fmt.Errorf("checkpoint of %s is not written as a signer writes it: %w", c.Log, ErrMalformed)
		}
		return c, nil
	}
	return Checkpoint{}, fmt.Errorf("checkpoint of %s is signed by none of the %d keys given for its site: %w", c.Log, len(keys), ErrSignature)
}

func parseText(text string) (Checkpoint, error) {
	bad := func(what string) (Checkpoint, error) {
		return Checkpoint{}, fmt.Errorf("checkpoint: %s: %w", what, ErrMalformed)
	}
	lines := strings.Split(text, "\n")
	if len(lines) != 5 || lines[4] != "" {
		return bad("want four lines")
	}
	id, ok := strings.CutPrefix(lines[0], originPrefix)
	if !ok {
		return bad("origin " + strconv.Quote(lines[0]))
	}
	log, err := ParseLogID(id)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("checkpoint: %w", err)
	}
	c := Checkpoint{Log: log}
	if c.Size, err = strconv.ParseUint(lines[1], 10, 63); err != nil {
		return bad("size " + strconv.Quote(lines[1]))
	}
	root, err := base64.StdEncoding.Strict().DecodeString(lines[2])
	if err != nil || len(root) != tlog.HashSize {
		return bad("root " + strconv.Quote(lines[2]))
	}
	c.Root = tlog.Hash(root)
	at, ok := strings.CutPrefix(lines[3], "at ")
	if c.At, err = strconv.ParseInt(at, 10, 64); err != nil || !ok {
		return bad("time " + strconv.Quote(lines[3]))
	}
	if c.Text() != text {
		return bad("numbers in another spelling")
	}
	return c, nil
}
