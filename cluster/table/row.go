package table

import (
	"encoding"
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/fxamacker/cbor/v2"
)

// codec turns values into CBOR maps and back. Equal values have equal bytes.
type codec struct {
	enc cbor.EncMode
	dec cbor.DecMode
}

func newCodec() codec {
	options := cbor.CoreDetEncOptions()
	options.Time = cbor.TimeRFC3339Nano // no loss, and the same on every machine
	enc, err := options.EncMode()
	if err != nil {
		panic("table: " + err.Error()) // the options above are constants
	}
	dec, err := cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
		// Go strings may hold any bytes; a row that was written must be read.
		UTF8: cbor.UTF8DecodeInvalid,
	}.DecMode()
	if err != nil {
		panic("table: " + err.Error())
	}
	return codec{enc, dec}
}

// encode gives the bytes of v with the fields of old, the stored bytes (nil
// for none), that v's type does not know.
func (c *codec) encode(s *shape, v any, old []byte) ([]byte, error) {
	b, err := c.enc.Marshal(v)
	if err != nil || old == nil {
		return b, err
	}
	return c.merge(s, b, old)
}

func (c *codec) merge(s *shape, b, old []byte) ([]byte, error) {
	var stored map[string]cbor.RawMessage
	if err := c.dec.Unmarshal(old, &stored); err != nil {
		return nil, fmt.Errorf("the stored row is none that this version can keep the fields of: %w", err)
	}
	if !s.needsMerge(stored) {
		return b, nil
	}
	var fresh map[string]cbor.RawMessage
	if err := c.dec.Unmarshal(b, &fresh); err != nil {
		return nil, err
	}
	for name, raw := range stored {
		inner, known := s.fields[name]
		switch mine, set := fresh[name]; {
		case !known:
			fresh[name] = raw
		case set && inner != nil && isMap(mine) && isMap(raw):
			merged, err := c.merge(inner, mine, raw)
			if err != nil {
				return nil, err
			}
			fresh[name] = merged
		}
	}
	return c.enc.Marshal(fresh)
}

// emptyMap is the CBOR of a map with nothing in it.
const emptyMap = 0xa0

func isMap(raw cbor.RawMessage) bool { return len(raw) > 0 && raw[0]>>5 == 5 }

// shape is what a struct type knows: its fields' names, and the shapes of
// those that are structs themselves (nil for the others).
type shape struct{ fields map[string]*shape }

func (s *shape) needsMerge(stored map[string]cbor.RawMessage) bool {
	for name, raw := range stored {
		if inner, known := s.fields[name]; !known || inner != nil && isMap(raw) {
			return true
		}
	}
	return false
}

// shapeOf panics on a type that is not stored as a map with its fields' names:
// the program could not be updated without losing rows.
func shapeOf(t reflect.Type) *shape {
	if t.Kind() != reflect.Struct || !isPlain(t) {
		panic(fmt.Sprintf("table: rows of %v: only a plain struct keeps the fields that it does not know", t))
	}
	return shapes{}.of(t)
}

type shapes map[reflect.Type]*shape

func (known shapes) of(t reflect.Type) *shape {
	if s, ok := known[t]; ok {
		return s
	}
	s := &shape{fields: map[string]*shape{}}
	known[t] = s // before the fields: a type may hold a pointer to itself
	for i := range t.NumField() {
		known.field(s, t, t.Field(i))
	}
	return s
}

func (known shapes) field(s *shape, t reflect.Type, f reflect.StructField) {
	tag, tagged := f.Tag.Lookup("cbor")
	if !tagged {
		tag = f.Tag.Get("json") // as the CBOR library does
	}
	name, options, _ := strings.Cut(tag, ",")
	if strings.Contains(options, "toarray") || strings.Contains(options, "keyasint") {
		panic(fmt.Sprintf("table: rows of %v: field %s is not stored under its name", t, f.Name))
	}
	inner := f.Type
	if inner.Kind() == reflect.Pointer {
		inner = inner.Elem()
	}
	if f.Anonymous && name == "" && inner.Kind() == reflect.Struct {
		// Its fields are stored among ours; ours win.
		for n, deep := range known.of(inner).fields {
			if _, ok := s.fields[n]; !ok {
				s.fields[n] = deep
			}
		}
		return
	}
	if !f.IsExported() || tag == "-" {
		return
	}
	if name == "" {
		name = f.Name
	}
	s.fields[name] = nil
	if inner.Kind() == reflect.Struct && isPlain(inner) {
		s.fields[name] = known.of(inner)
	}
}

// isPlain reports whether a struct is stored as a map of its fields.
func isPlain(t reflect.Type) bool {
	if t == reflect.TypeFor[time.Time]() {
		return false
	}
	for _, own := range []reflect.Type{reflect.TypeFor[cbor.Marshaler](), reflect.TypeFor[encoding.BinaryMarshaler]()} {
		if t.Implements(own) || reflect.PointerTo(t).Implements(own) {
			return false
		}
	}
	return true
}
