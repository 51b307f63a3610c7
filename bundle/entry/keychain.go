package entry

import (
	"crypto"
	"fmt"
	"slices"
)

// KeyChainType is the payload type of a key document.
const KeyChainType = "application/vnd.atoll.keys.v1+json"

// States of an online key in a key document.
const (
	KeyActive  = "active"  // signs now
	KeyRetired = "retired" // rotated: what it signed as checkpoints stays good
	KeyRevoked = "revoked" // lost or stolen: nothing it signed is good
)

const maxKeyDocuments = 64

// KeyDocument says which keys sign for a site. The root keys sign the document
// itself and may be kept offline; the online keys sign checkpoints and bundles.
// It does not name an incarnation: a site that had to begin a new one may not
// have its root at hand.
type KeyDocument struct {
	Site      string      `json:"site"`
	Serial    uint64      `json:"serial"` // 1 for the first, one more for each next
	Issued    int64       `json:"issued"` // Unix seconds by the site's clock: shown, never compared
	Threshold int         `json:"threshold"`
	Root      []Key       `json:"root"`
	Online    []OnlineKey `json:"online"`
}

// OnlineKey is a key that the root certifies, with its state.
type OnlineKey struct {
	Key   Key    `json:"key"`
	State string `json:"state"`
}

// Validate refuses documents that could not be used or written.
func (d KeyDocument) Validate() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("key document %d of site %q: %s: %w", d.Serial, d.Site, fmt.Sprintf(format, args...), ErrMalformed)
	}
	if !ValidID(d.Site) || d.Serial == 0 {
		return bad("no site or no serial")
	}
	if d.Threshold < 1 || d.Threshold > len(d.Root) || len(d.Root) > maxSignatures || len(d.Online) == 0 || len(d.Online) > 256 {
		return bad("threshold %d of %d root keys, %d online keys", d.Threshold, len(d.Root), len(d.Online))
	}
	seen := map[Key]bool{}
	check := func(key Key) error {
		if seen[key] {
			return bad("key %s stands in it twice", key.Fingerprint())
		}
		seen[key] = true
		_, err := key.Ed25519()
		return err
	}
	for _, key := range d.Root {
		if err := check(key); err != nil {
			return err
		}
	}
	for _, online := range d.Online {
		// A small site may run with one key for both: then it stands once in each list.
		if !slices.Contains(d.Root, online.Key) {
			if err := check(online.Key); err != nil {
				return err
			}
		}
		if !slices.Contains([]string{KeyActive, KeyRetired, KeyRevoked}, online.State) {
			return bad("key %s is %q", online.Key.Fingerprint(), online.State)
		}
	}
	return nil
}

// Sign writes the document as a DSSE envelope of KeyChainType, to be appended to
// the site's chain. The keys are root keys of the document and, for a document
// that changes the root, those of the one before it.
func (d KeyDocument) Sign(roots ...crypto.Signer) ([]byte, error) {
	if err := d.Validate(); err != nil {
		return nil, err
	}
	payload, err := MarshalJSON(d)
	if err != nil {
		return nil, fmt.Errorf("sign key document %d of site %s: %w", d.Serial, d.Site, err)
	}
	return SealEnvelope(KeyChainType, payload, roots...)
}

// KeyChain is a site's key documents in order, each an envelope of one line: a
// document is trusted because the one before it says whose keys to ask.
type KeyChain []byte

// Add returns the chain with one more signed document.
func (c KeyChain) Add(signed []byte) KeyChain { return slices.Concat(c, signed) }

// Claimed reads whose chain this says it is and which root key signed its first
// document. Nobody vouches for either: it serves to show what a file claims, and
// to check a chain of one's own.
func (c KeyChain) Claimed() (site string, root Key, err error) {
	documents, envelopes, err := c.parse()
	if err != nil {
		return "", "", err
	}
	signed, err := envelopes[0].Verify(documents[0].Root...)
	if err != nil {
		return "", "", fmt.Errorf("key chain of site %s: %w", documents[0].Site, err)
	}
	return documents[0].Site, signed[0], nil
}

// Keys is what a verified chain says.
type Keys struct {
	Site   string
	Serial uint64
	online []OnlineKey
}

// Verify follows the chain from a root key that was trusted beforehand for the
// site and returns the keys of its last document. The first document must be
// signed by its own root, which has to hold the trusted key or lead to a
// document that does; every later one by the root before it and by its own.
func (c KeyChain) Verify(site string, trusted Key) (Keys, error) {
	documents, envelopes, err := c.parse()
	if err != nil {
		return Keys{}, err
	}
	anchored := false
	for i, d := range documents {
		if d.Site != site {
			return Keys{}, fmt.Errorf("key chain of site %s: document %d is of site %s: %w", site, d.Serial, d.Site, ErrSignature)
		}
		accepted := slices.Clone(d.Root)
		if i > 0 {
			if d.Serial != documents[i-1].Serial+1 {
				return Keys{}, fmt.Errorf("key chain of site %s: document %d follows %d: %w", site, d.Serial, documents[i-1].Serial, ErrMalformed)
			}
			accepted = append(accepted, documents[i-1].Root...)
		}
		signed, err := envelopes[i].Verify(accepted...)
		if err != nil {
			return Keys{}, fmt.Errorf("key chain of site %s, document %d: %w", site, d.Serial, err)
		}
		if !d.enough(signed) || i > 0 && !documents[i-1].enough(signed) {
			return Keys{}, fmt.Errorf("key chain of site %s, document %d: %d signatures are not the root's %d: %w", site, d.Serial, len(signed), d.Threshold, ErrSignature)
		}
		anchored = anchored || slices.Contains(d.Root, trusted) && slices.Contains(signed, trusted)
	}
	if !anchored {
		return Keys{}, fmt.Errorf("key chain of site %s does not come from the trusted root key %s: %w", site, trusted.Fingerprint(), ErrSignature)
	}
	last := documents[len(documents)-1]
	return Keys{Site: site, Serial: last.Serial, online: last.Online}, nil
}

func (d KeyDocument) enough(signed []Key) bool {
	n := 0
	for _, key := range d.Root {
		if slices.Contains(signed, key) {
			n++
		}
	}
	return n >= d.Threshold
}

func (c KeyChain) parse() ([]KeyDocument, []*Envelope, error) {
	var documents []KeyDocument
	var envelopes []*Envelope
	for rest := []byte(c); len(rest) > 0; {
		end := slices.Index(rest, '\n') + 1
		if end == 0 || len(documents) == maxKeyDocuments {
			return nil, nil, fmt.Errorf("key chain: unfinished line, or over %d documents: %w", maxKeyDocuments, ErrMalformed)
		}
		envelope, err := ParseEnvelope(KeyChainType, rest[:end])
		if err != nil {
			return nil, nil, fmt.Errorf("key chain: %w", err)
		}
		var d KeyDocument
		if err := UnmarshalJSON(envelope.Payload, &d); err != nil {
			return nil, nil, fmt.Errorf("key chain: %w", err)
		}
		if err := d.Validate(); err != nil {
			return nil, nil, fmt.Errorf("key chain: %w", err)
		}
		documents, envelopes, rest = append(documents, d), append(envelopes, envelope), rest[end:]
	}
	if len(documents) == 0 {
		return nil, nil, fmt.Errorf("key chain: empty: %w", ErrMalformed)
	}
	return documents, envelopes, nil
}

// Signing are the keys whose new signatures are good: on bundles.
func (k Keys) Signing() []Key { return k.in(KeyActive) }

// Checkpoints are the keys whose signatures on checkpoints are good: rotation
// does not undo what was signed before it, revocation does.
func (k Keys) Checkpoints() []Key { return k.in(KeyActive, KeyRetired) }

func (k Keys) in(states ...string) []Key {
	var keys []Key
	for _, online := range k.online {
		if slices.Contains(states, online.State) {
			keys = append(keys, online.Key)
		}
	}
	return keys
}
