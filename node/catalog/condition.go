package catalog

import (
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/fault"
)

// Condition is what a change of a tag rests on. It is judged in the Txn that
// makes the change, so of any number of changes that rest on one state of a tag,
// one is made and the others are refused. The zero value holds always.
type Condition struct {
	// Exists: there is such a tag, wherever it points.
	Exists bool
	// At: the tag points at one of these; nil is anywhere or nowhere.
	At []digest.Digest
	// Absent: there is no such tag.
	Absent bool
	// NotAt: the tag, if there is one, points at none of these.
	NotAt []digest.Digest
}

// Zero reports whether the condition holds always.
func (c Condition) Zero() bool { return !c.Exists && c.At == nil && !c.Absent && c.NotAt == nil }

// Moved is the detail of the fault by which a condition refuses: where the tag
// points now, "" for nowhere.
type Moved struct {
	Tag    string        `json:"tag"`
	Digest digest.Digest `json:"digest"`
}

// check holds the condition to a tag that points at d, or "" when there is none.
// A refusal is a fault Precondition with Moved as its detail.
func (c Condition) check(tag string, d digest.Digest) error {
	holds := (!c.Exists || d != "") && (c.At == nil || slices.Contains(c.At, d)) && (!c.Absent || d == "") && !slices.Contains(c.NotAt, d)
	if holds {
		return nil
	}
	text := fault.New(fault.Precondition, "the tag %s points at %s by now, which the request's condition excludes; nothing was changed. Look at what is there, and ask again on that", tag, d)
	if d == "" {
		text = fault.New(fault.Precondition, "there is no tag %s, and the request rests on one; nothing was changed. Push without If-Match if it is to be made", tag)
	}
	return text.WithDetail(Moved{tag, d})
}
