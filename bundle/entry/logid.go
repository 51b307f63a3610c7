package entry

import (
	"fmt"
	"regexp"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

// LogID names one append-only log: who writes it, in which life of the writer,
// and about what. It is the identity of a project between sites; names are not.
type LogID struct {
	Site        string `json:"site" cbor:"site"`
	Incarnation string `json:"incarnation" cbor:"incarnation"`
	Scope       string `json:"scope" cbor:"scope"`
}

// GlobalScope is the scope of what belongs to a site and to no project.
const GlobalScope = "_global"

const originPrefix = "atoll/journal/"

var idForm = regexp.MustCompile(`^[a-z0-9_][a-z0-9_-]{0,63}$`)

// ValidID reports whether s may name a site, an incarnation or a scope: 1-64
// characters of a-z, 0-9, "_" and "-", not starting with "-".
func ValidID(s string) bool { return idForm.MatchString(s) }

// Validate refuses ids that could not stand in a path or a checkpoint.
func (l LogID) Validate() error {
	for _, part := range []string{l.Site, l.Incarnation, l.Scope} {
		if !ValidID(part) {
			return fmt.Errorf("log %s: %q is not an id: %w", l, part, ErrMalformed)
		}
	}
	return nil
}

func (l LogID) String() string { return l.Site + "/" + l.Incarnation + "/" + l.Scope }

// ParseLogID reads what String wrote.
func ParseLogID(s string) (LogID, error) {
	parts := strings.Split(s, "/")
	if len(parts) != 3 {
		return LogID{}, fmt.Errorf("log %q: want site/incarnation/scope: %w", s, ErrMalformed)
	}
	l := LogID{Site: parts[0], Incarnation: parts[1], Scope: parts[2]}
	return l, l.Validate()
}

// Compare orders logs by site, incarnation and scope, as bytes.
func (l LogID) Compare(other LogID) int {
	return strings.Compare(l.Site+"\x00"+l.Incarnation+"\x00"+l.Scope, other.Site+"\x00"+other.Incarnation+"\x00"+other.Scope)
}

// Leaf is the hash of the entry with the sequence number seq (0-based) of a
// log: RFC 6962's leaf hash over the CBOR array [site, incarnation, scope, seq,
// value].
func Leaf(log LogID, seq uint64, value []byte) (tlog.Hash, error) {
	data, err := Marshal([]any{log.Site, log.Incarnation, log.Scope, seq, value})
	if err != nil {
		return tlog.Hash{}, fmt.Errorf("hash entry %d of log %s: %w", seq, log, err)
	}
	return tlog.RecordHash(data), nil
}
