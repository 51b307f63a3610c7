package entry

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"iter"
	"maps"
	"slices"

	"github.com/opencontainers/go-digest"
)

// A scope's state is a pure function of its entries in order: a map from keys
// to values that each known kind puts into or deletes from. Local facts (ids,
// counters, the name an importer gave the project) are no part of it, so equal
// logs have equal state roots at every site.

const stateDomain = "atoll state v1\n"

// State says what the entry does to the state of its scope: the key it writes,
// and the value, or nil for a deletion. An entry of an unknown kind does
// nothing: ok is false.
//
// A room that keeps the state as rows of its own makes the put entry that a row
// stands for and takes key and value from here; At and Actor do not matter.
func (e Entry) State() (key string, value []byte, ok bool, err error) {
	var v any
	switch e.Kind {
	case ProjectPut:
		key = "project"
		v = struct {
			Name     string            `cbor:"name"`
			Public   bool              `cbor:"public"`
			Metadata map[string]string `cbor:"metadata,omitempty"`
		}{e.Name, e.Public, e.Metadata}
	case ArtifactPut, ArtifactDelete:
		key = "artifact\x00" + e.Repository + "\x00" + string(e.Digest)
		if e.Kind == ArtifactDelete {
			return key, nil, true, nil
		}
		v = struct {
			MediaType    string        `cbor:"media_type"`
			Size         int64         `cbor:"size"`
			ArtifactType string        `cbor:"artifact_type,omitempty"`
			Subject      digest.Digest `cbor:"subject,omitempty"`
			PushedAt     int64         `cbor:"pushed_at"`
		}{e.MediaType, e.Size, e.ArtifactType, e.Subject, e.PushedAt}
	case TagPut, TagDelete:
		key = "tag\x00" + e.Repository + "\x00" + e.Tag
		if e.Kind == TagDelete {
			return key, nil, true, nil
		}
		v = struct {
			Digest   digest.Digest `cbor:"digest"`
			PushedAt int64         `cbor:"pushed_at"`
		}{e.Digest, e.PushedAt}
	default:
		return "", nil, false, nil
	}
	value, err = Marshal(v)
	return key, value, true, err
}

// StateRoot hashes a scope's state: SHA-256 over "atoll state v1\n" and, for
// each pair in ascending order of keys, the length of the key (8 bytes,
// big-endian), the key, the length of the value and the value. Pairs out of
// order or repeated are an error, as is an error of the sequence.
func StateRoot(pairs iter.Seq2[Pair, error]) ([32]byte, error) {
	h := sha256.New()
	h.Write([]byte(stateDomain))
	last, first := "", true
	var length [8]byte
	write := func(b []byte) {
		binary.BigEndian.PutUint64(length[:], uint64(len(b)))
		h.Write(length[:])
		h.Write(b)
	}
	for pair, err := range pairs {
		if err != nil {
			return [32]byte{}, fmt.Errorf("hash state: %w", err)
		}
		if !first && pair.Key <= last {
			return [32]byte{}, fmt.Errorf("hash state: key %q after %q: %w", pair.Key, last, ErrMalformed)
		}
		last, first = pair.Key, false
		write([]byte(pair.Key))
		write(pair.Value)
	}
	return [32]byte(h.Sum(nil)), nil
}

// Pair is one key of a scope's state with its value.
type Pair struct {
	Key   string
	Value []byte
}

// State is a scope's state in memory. The zero State is that of an empty log.
type State struct {
	values map[string][]byte
}

// Apply changes the state by the next entry.
func (s *State) Apply(e Entry) error {
	key, value, ok, err := e.State()
	if err != nil || !ok {
		return err
	}
	if s.values == nil {
		s.values = map[string][]byte{}
	}
	if value == nil {
		delete(s.values, key)
	} else {
		s.values[key] = value
	}
	return nil
}

// Pairs yields the state in ascending order of keys.
func (s *State) Pairs() iter.Seq2[Pair, error] {
	return func(yield func(Pair, error) bool) {
		for _, key := range slices.Sorted(maps.Keys(s.values)) {
			if !yield(Pair{Key: key, Value: s.values[key]}, nil) {
				return
			}
		}
	}
}

// Root is the state's StateRoot.
func (s *State) Root() ([32]byte, error) { return StateRoot(s.Pairs()) }
