// Package joining is the talk with nodes that have no certificate of the site:
// small requests over connections of their own, one each. A Server bounds what
// strangers may ask of a node, Post asks, and a Refusal says why not on both ends.
//
// The rule for what is said: a field that the reader does not know is ignored, so
// that a newer node can say more; a field that stands twice, a second value behind
// the first, and more than MaxBody bytes are refused, because two readers could
// take them in two ways.
package joining

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/version"
)

// Reasons of a refusal that a caller can tell apart.
var (
	// ErrOtherSite: a token's pin names another site's authority.
	ErrOtherSite = errors.New("the token is for another site")
	// ErrTokenExpired, ErrTokenUsed, ErrTokenUnknown: the site refuses a token.
	ErrTokenExpired = errors.New("the token has expired")
	ErrTokenUsed    = errors.New("the token has been used up")
	ErrTokenUnknown = errors.New("the token is not known to the site")
	// ErrNameTaken: a live member has the name that a new node asked for.
	ErrNameTaken = errors.New("the node name is taken")
	// ErrRemoved: the node is no longer a member of its site.
	ErrRemoved = errors.New("this node was removed from its site")
)

// Codes of refusals.
const (
	CodeExpired   = "token_expired"
	CodeUsed      = "token_used"
	CodeUnknown   = "token_unknown"
	CodeOtherSite = "other_site"
	CodeName      = "name_taken"
	CodeMalformed = "malformed"
	CodeRemoved   = "removed"
	CodeVersion   = "version"
	CodeLater     = "try_again"
)

// Refusal is the answer to a request that is not granted.
type Refusal struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (r *Refusal) Error() string { return r.Message }

// Is lets errors.Is find the sentinel that the code stands for, on both ends.
func (r *Refusal) Is(target error) bool {
	want, ok := map[string]error{
		CodeExpired: ErrTokenExpired, CodeUsed: ErrTokenUsed, CodeUnknown: ErrTokenUnknown,
		CodeOtherSite: ErrOtherSite, CodeName: ErrNameTaken, CodeMalformed: pki.ErrMalformed, CodeRemoved: ErrRemoved, CodeVersion: version.ErrMismatch,
	}[r.Code]
	return ok && want == target
}

// Refuse makes a refusal.
func Refuse(code, format string, args ...any) *Refusal {
	return &Refusal{Code: code, Message: fmt.Sprintf(format, args...)}
}

// Decode reads a request: exactly one JSON object, by the rule of the package. Its
// errors are refusals as malformed.
func Decode(body []byte, into any) error {
	if err := single(body); err != nil {
		return Refuse(CodeMalformed, "the request is malformed: %v", err)
	}
	if err := json.Unmarshal(body, into); err != nil {
		return Refuse(CodeMalformed, "the request is malformed: %v", err)
	}
	return nil
}

// single makes sure of one object whose fields stand there once, whatever their
// case: that is how encoding/json takes them.
func single(body []byte) error {
	d := json.NewDecoder(bytes.NewReader(body))
	if begin, err := d.Token(); err != nil {
		return err
	} else if begin != json.Delim('{') {
		return errors.New("it is no object")
	}
	seen := map[string]bool{}
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return err
		}
		field, _ := token.(string) // the decoder lets nothing else stand there
		if field = strings.ToLower(strings.ToUpper(field)); seen[field] {
			return fmt.Errorf("the field %.64q stands there twice", field)
		}
		seen[field] = true
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return err
		}
	}
	if _, err := d.Token(); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows it")
	}
	return nil
}
