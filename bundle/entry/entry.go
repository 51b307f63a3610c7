// Package entry is the vocabulary of the journal that sites exchange: what an
// entry says, which digests it may name, how it is written as bytes, how a log
// of entries is hashed and signed, and which keys may sign for a site.
//
// Invariants:
//   - A value is written once and carried as those very bytes ever after; its
//     leaf covers the log, the place in it and the bytes. Nothing here depends
//     on where an entry is stored or which carrier brings it.
//   - One meaning has one encoding (RFC 8949 section 4.2.1, core
//     deterministic); Decode refuses any other.
//   - Kinds and fields that this version does not know are kept and forwarded.
//   - No local integer id, password, secret or private key is ever in an entry.
//
// bundle/FORMAT.md is the specification. The package sits on the ground floor
// so that both the journal room and the bundle format speak it; see ADR 4.
package entry

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"sync"

	"github.com/fxamacker/cbor/v2"
	"github.com/opencontainers/go-digest"
)

// Kinds of this version.
const (
	ProjectPut     = "project.put"     // the project's name, visibility and metadata
	ArtifactPut    = "artifact.put"    // a manifest is in a repository
	ArtifactDelete = "artifact.delete" // it no longer is; its tags are deleted by entries before this one
	TagPut         = "tag.put"         // a tag points at a manifest
	TagDelete      = "tag.delete"      // it no longer does
)

// MaxValue bounds an encoded entry, in bytes.
const MaxValue = 64 << 10

// ErrMalformed is wrapped by every refusal to read or write bytes that this
// format does not allow.
var ErrMalformed = errors.New("malformed")

// Entry is one change of one project. Which fields count depends on Kind; the
// others stay empty.
type Entry struct {
	Kind  string `cbor:"kind"`
	At    int64  `cbor:"at"`              // Unix seconds by the writer's clock: shown, never used to order
	Actor string `cbor:"actor,omitempty"` // who did it, as the writing site names people

	// project.put
	Name     string            `cbor:"name,omitempty"` // the owner's name of the project; an importer may use another
	Public   bool              `cbor:"public,omitempty"`
	Metadata map[string]string `cbor:"metadata,omitempty"`

	// artifact.* and tag.*
	Repository string        `cbor:"repository,omitempty"` // relative to the project
	Digest     digest.Digest `cbor:"digest,omitempty"`     // of the manifest
	Tag        string        `cbor:"tag,omitempty"`        // tag.*
	PushedAt   int64         `cbor:"pushed_at,omitempty"`  // Unix seconds; *.put

	// artifact.put
	MediaType    string        `cbor:"media_type,omitempty"`
	Size         int64         `cbor:"size,omitempty"` // of the manifest, in bytes
	ArtifactType string        `cbor:"artifact_type,omitempty"`
	Subject      digest.Digest `cbor:"subject,omitempty"`
}

// Known reports whether this version knows the entry's kind. Others are kept,
// counted in the tree and forwarded, but change no state.
func (e Entry) Known() bool {
	switch e.Kind {
	case ProjectPut, ArtifactPut, ArtifactDelete, TagPut, TagDelete:
		return true
	}
	return false
}

// Encode writes an entry of a known kind as its one encoding.
func (e Entry) Encode() ([]byte, error) {
	if !e.Known() {
		return nil, fmt.Errorf("encode entry: kind %q is not of this version: %w", e.Kind, ErrMalformed)
	}
	if err := e.validate(); err != nil {
		return nil, fmt.Errorf("encode %s entry: %w", e.Kind, err)
	}
	value, err := Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("encode %s entry: %w", e.Kind, err)
	}
	if len(value) > MaxValue {
		return nil, fmt.Errorf("encode %s entry: %d bytes, an entry holds at most %d: %w", e.Kind, len(value), MaxValue, ErrMalformed)
	}
	return value, nil
}

// Decode reads a value. An unknown kind yields its Kind, At and Actor without
// an error; a known kind is validated field by field.
func Decode(value []byte) (Entry, error) {
	if len(value) > MaxValue {
		return Entry{}, fmt.Errorf("decode entry: %d bytes, an entry holds at most %d: %w", len(value), MaxValue, ErrMalformed)
	}
	var common struct {
		Kind  string `cbor:"kind"`
		At    int64  `cbor:"at"`
		Actor string `cbor:"actor"`
	}
	if err := Unmarshal(value, &common); err != nil {
		return Entry{}, fmt.Errorf("decode entry: %w", err)
	}
	e := Entry{Kind: common.Kind, At: common.At, Actor: common.Actor}
	if !kindForm.MatchString(e.Kind) {
		return Entry{}, fmt.Errorf("decode entry: kind %q: %w", e.Kind, ErrMalformed)
	}
	if !e.Known() {
		return e, nil
	}
	// The first reading has checked the encoding.
	if err := read(value, &e); err != nil {
		return Entry{}, fmt.Errorf("decode %s entry: %w", e.Kind, err)
	}
	if err := e.validate(); err != nil {
		return Entry{}, fmt.Errorf("decode %s entry: %w", e.Kind, err)
	}
	return e, nil
}

var (
	kindForm       = regexp.MustCompile(`^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+$`)
	projectForm    = regexp.MustCompile(`^[a-z0-9]+(?:[._-][a-z0-9]+)*$`)
	repositoryForm = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagForm        = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
)

// ValidProject reports whether a project may have the name.
func ValidProject(name string) bool { return len(name) <= 255 && projectForm.MatchString(name) }

// validate checks the fields that the kind uses. Fields of other kinds are
// refused too: one meaning has one encoding.
func (e Entry) validate() error {
	bad := func(field string, value any) error {
		return fmt.Errorf("%s %q: %w", field, fmt.Sprint(value), ErrMalformed)
	}
	if len(e.Kind) > 64 || len(e.Actor) > 256 {
		return bad("actor", e.Actor)
	}
	used := Entry{Kind: e.Kind, At: e.At, Actor: e.Actor}
	switch e.Kind {
	case ProjectPut:
		if !ValidProject(e.Name) {
			return bad("project name", e.Name)
		}
		used.Name, used.Public, used.Metadata = e.Name, e.Public, e.Metadata
	default:
		if len(e.Repository) > 255 || !repositoryForm.MatchString(e.Repository) {
			return bad("repository", e.Repository)
		}
		used.Repository = e.Repository
		if e.Kind != TagDelete {
			if _, err := ParseDigest(e.Digest.String()); err != nil {
				return bad("digest", e.Digest)
			}
			used.Digest = e.Digest
		}
		if e.Kind == TagPut || e.Kind == TagDelete {
			if !tagForm.MatchString(e.Tag) {
				return bad("tag", e.Tag)
			}
			used.Tag = e.Tag
		}
		if e.Kind == TagPut || e.Kind == ArtifactPut {
			used.PushedAt = e.PushedAt
		}
		if e.Kind == ArtifactPut {
			if e.Size <= 0 || e.MediaType == "" || len(e.MediaType) > 255 || len(e.ArtifactType) > 255 {
				return bad("media type or size", fmt.Sprintf("%s, %d bytes", e.MediaType, e.Size))
			}
			if e.Subject != "" {
				if _, err := ParseDigest(e.Subject.String()); err != nil {
					return bad("subject", e.Subject)
				}
			}
			used.MediaType, used.Size, used.ArtifactType, used.Subject = e.MediaType, e.Size, e.ArtifactType, e.Subject
		}
	}
	if !sameEntry(e, used) {
		return fmt.Errorf("a field of another kind is set: %w", ErrMalformed)
	}
	return nil
}

func sameEntry(a, b Entry) bool {
	same := len(a.Metadata) == len(b.Metadata)
	a.Metadata, b.Metadata = nil, nil
	return same && a.Name == b.Name && a.Public == b.Public && a.Repository == b.Repository && a.Digest == b.Digest &&
		a.Tag == b.Tag && a.PushedAt == b.PushedAt && a.MediaType == b.MediaType && a.Size == b.Size &&
		a.ArtifactType == b.ArtifactType && a.Subject == b.Subject
}

// Marshal writes any value of this format as core deterministic CBOR.
func Marshal(v any) ([]byte, error) {
	mode, err := encoding()
	if err != nil {
		return nil, err
	}
	return mode.Marshal(v)
}

// Unmarshal reads core deterministic CBOR and refuses every other encoding of
// the same data. Map fields that v does not have are ignored.
func Unmarshal(data []byte, v any) error {
	var generic any
	if err := read(data, &generic); err != nil {
		return err
	}
	again, err := Marshal(generic)
	if err != nil || !bytes.Equal(again, data) {
		return fmt.Errorf("not in the deterministic encoding: %w", ErrMalformed)
	}
	return read(data, v)
}

func read(data []byte, v any) error {
	mode, err := decoding()
	if err != nil {
		return err
	}
	if err := mode.Unmarshal(data, v); err != nil {
		return fmt.Errorf("%w: %w", err, ErrMalformed)
	}
	return nil
}

// The modes are made once: making one costs as much as reading ten entries.
var (
	encoding = sync.OnceValues(cbor.CoreDetEncOptions().EncMode)
	decoding = sync.OnceValues(cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		UTF8:              cbor.UTF8RejectInvalid,
		MaxNestedLevels:   8,
		MaxArrayElements:  4096,
		MaxMapPairs:       4096,
		FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
	}.DecMode)
)
