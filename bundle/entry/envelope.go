package entry

import (
	"bytes"
	"crypto"
	"encoding/base64"
	"encoding/json"
	"fmt"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"
)

// maxSignatures bounds the signatures of an envelope, so that a hostile one
// does not buy unlimited verifications.
const maxSignatures = 16

// SealEnvelope signs a payload as a DSSE envelope with every key given, in that
// order, and returns the envelope's one encoding: JSON without spaces, fields in
// the order payloadType, payload, signatures (keyid, sig), then a line feed. The
// keyid is the key's fingerprint.
func SealEnvelope(payloadType string, payload []byte, keys ...crypto.Signer) ([]byte, error) {
	e := dsse.Envelope{PayloadType: payloadType, Payload: base64.StdEncoding.EncodeToString(payload)}
	for _, key := range keys {
		public, err := KeyOf(key)
		if err != nil {
			return nil, fmt.Errorf("sign %s: %w", payloadType, err)
		}
		signature, err := Sign(key, dsse.PAE(payloadType, payload))
		if err != nil {
			return nil, fmt.Errorf("sign %s: %w", payloadType, err)
		}
		e.Signatures = append(e.Signatures, dsse.Signature{KeyID: public.Fingerprint(), Sig: base64.StdEncoding.EncodeToString(signature)})
	}
	if len(e.Signatures) == 0 || len(e.Signatures) > maxSignatures {
		return nil, fmt.Errorf("sign %s: %d keys given, an envelope takes 1 to %d", payloadType, len(keys), maxSignatures)
	}
	return MarshalJSON(e)
}

// Envelope is a DSSE envelope that is well formed but not yet verified.
type Envelope struct {
	Payload     []byte
	payloadType string
	signatures  []dsse.Signature
}

// ParseEnvelope reads an envelope of the payload type and refuses any encoding
// that SealEnvelope would not have written. It verifies no signature.
func ParseEnvelope(payloadType string, data []byte) (*Envelope, error) {
	var e dsse.Envelope
	if err := UnmarshalJSON(data, &e); err != nil {
		return nil, fmt.Errorf("envelope of %s: %w", payloadType, err)
	}
	payload, err := base64.StdEncoding.Strict().DecodeString(e.Payload)
	if err != nil || base64.StdEncoding.EncodeToString(payload) != e.Payload {
		return nil, fmt.Errorf("envelope of %s: payload is not in base64: %w", payloadType, ErrMalformed)
	}
	if e.PayloadType != payloadType || len(e.Signatures) == 0 || len(e.Signatures) > maxSignatures {
		return nil, fmt.Errorf("envelope of %s: holds a %q with %d signatures: %w", payloadType, e.PayloadType, len(e.Signatures), ErrMalformed)
	}
	return &Envelope{Payload: payload, payloadType: payloadType, signatures: e.Signatures}, nil
}

// Verify returns the keys, of those given, that signed the envelope. A signature
// by another key, one that does not match, or two by one key refuse the whole:
// nothing in a verified envelope is beyond its signatures.
func (e *Envelope) Verify(keys ...Key) ([]Key, error) {
	byID := map[string]Key{}
	for _, key := range keys {
		byID[key.Fingerprint()] = key
	}
	var signed []Key
	message := dsse.PAE(e.payloadType, e.Payload)
	for _, s := range e.signatures {
		key, ok := byID[s.KeyID]
		if !ok {
			return nil, fmt.Errorf("verify %s: signed by key %s, which is not accepted here: %w: %w", e.payloadType, s.KeyID, ErrUnknownKey, ErrSignature)
		}
		delete(byID, s.KeyID)
		signature, err := base64.StdEncoding.Strict().DecodeString(s.Sig)
		if err != nil || base64.StdEncoding.EncodeToString(signature) != s.Sig {
			return nil, fmt.Errorf("verify %s: signature of key %s is not in base64: %w", e.payloadType, s.KeyID, ErrMalformed)
		}
		if err := key.Verify(message, signature); err != nil {
			return nil, fmt.Errorf("verify %s: %w", e.payloadType, err)
		}
		signed = append(signed, key)
	}
	return signed, nil
}

// MarshalJSON writes a document of this format: no spaces, fields in the order
// of the struct, map keys sorted, no HTML escapes, one line feed at the end.
func MarshalJSON(v any) ([]byte, error) {
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// UnmarshalJSON reads a document that MarshalJSON wrote from a T and refuses
// every other spelling of it, unknown fields included.
func UnmarshalJSON[T any](data []byte, v *T) error {
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(v); err != nil {
		return fmt.Errorf("%w: %w", err, ErrMalformed)
	}
	again, err := MarshalJSON(*v)
	if err != nil || !bytes.Equal(again, data) {
		return fmt.Errorf("not written as this format writes it: %w", ErrMalformed)
	}
	return nil
}
