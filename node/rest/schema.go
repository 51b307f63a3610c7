package rest

import (
	"encoding"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"time"
)

// outputPlan is what an operation's answer looks like, compiled from its type.
type outputPlan struct {
	typ     reflect.Type // of the JSON body; nil: no body
	created bool
	paged   bool
}

func compileOutput(t reflect.Type) *outputPlan {
	o := &outputPlan{}
	switch {
	case t == reflect.TypeFor[None]():
	case t == reflect.TypeFor[Created]():
		o.created = true
	case t.Kind() == reflect.Struct && t.Implements(reflect.TypeFor[pager]()):
		o.paged = true
		items, _ := t.FieldByName("Items")
		o.typ = items.Type
	default:
		o.typ = t
	}
	return o
}

// object is a JSON object of the document.
type object = map[string]any

// schemas makes JSON schemas of Go types; structs with a name become components.
type schemas struct {
	components object
	names      map[reflect.Type]string
}

var (
	timeType      = reflect.TypeFor[time.Time]()
	rawType       = reflect.TypeFor[json.RawMessage]()
	marshalerType = reflect.TypeFor[json.Marshaler]()
	toTextType    = reflect.TypeFor[encoding.TextMarshaler]()
)

// of gives the schema of a type: a reference for a named struct.
func (s *schemas) of(t reflect.Type) object {
	switch {
	case t == timeType:
		return object{"type": "string", "format": "date-time"}
	case t == rawType:
		return object{}
	case t == durationType:
		return object{"type": "integer", "format": "int64", "description": "nanoseconds"}
	}
	if t.Kind() != reflect.Pointer {
		text := t.Implements(toTextType) || reflect.PointerTo(t).Implements(textType)
		switch {
		case t.Implements(marshalerType):
			return object{}
		case text && t.Kind() != reflect.Struct || text && t.NumField() > 0:
			return object{"type": "string"}
		}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return s.of(t.Elem())
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.String:
		return object{"type": "string"}
	case reflect.Int64, reflect.Int, reflect.Uint64, reflect.Uint:
		return object{"type": "integer", "format": "int64"}
	case reflect.Int8, reflect.Int16, reflect.Int32, reflect.Uint8, reflect.Uint16, reflect.Uint32:
		return object{"type": "integer", "format": "int32"}
	case reflect.Float32, reflect.Float64:
		return object{"type": "number"}
	case reflect.Slice, reflect.Array:
		if t.Elem().Kind() == reflect.Uint8 {
			return object{"type": "string", "format": "byte"}
		}
		return object{"type": "array", "items": s.of(t.Elem())}
	case reflect.Map:
		return object{"type": "object", "additionalProperties": s.of(t.Elem())}
	case reflect.Struct:
		return s.structure(t)
	}
	return object{} // any
}

func (s *schemas) structure(t reflect.Type) object {
	if t.Name() == "" {
		return s.properties(t)
	}
	name, ok := s.names[t]
	if !ok {
		name = s.name(t)
		s.names[t] = name
		s.components[name] = object{} // holds the place while the type is walked
		s.components[name] = s.properties(t)
	}
	return object{"$ref": "#/components/schemas/" + name}
}

// name gives a component's name, package in front, unique in the document.
func (s *schemas) name(t reflect.Type) string {
	pkg := t.PkgPath()
	pkg = pkg[strings.LastIndexByte(pkg, '/')+1:]
	name := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' {
			return r
		}
		return '_'
	}, pkg+"."+t.Name())
	for unique, n := name, 2; ; n++ {
		if _, taken := s.components[unique]; !taken {
			return unique
		}
		unique = fmt.Sprintf("%s_%d", name, n)
		if _, taken := s.components[unique]; !taken {
			return unique
		}
	}
}

func (s *schemas) properties(t reflect.Type) object {
	properties := object{}
	var required []string
	s.fields(t, properties, &required)
	out := object{"type": "object", "properties": properties}
	if required != nil {
		out["required"] = required
	}
	return out
}

func (s *schemas) fields(t reflect.Type, properties object, required *[]string) {
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case name == "-":
		case f.Anonymous && name == "" && elem(f.Type).Kind() == reflect.Struct:
			s.fields(elem(f.Type), properties, required)
		case f.IsExported():
			if name == "" {
				name = f.Name
			}
			schema := s.of(f.Type)
			properties[name] = withRules(schema, f.Type, compileChecks("document", name, f.Type, f.Tag))
			if f.Tag.Get("required") == "true" {
				*required = append(*required, name)
			}
		}
	}
}

// withRules adds a value's own rules to its schema.
func withRules(schema object, t reflect.Type, c *checks) object {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	low, high := "minimum", "maximum"
	target := schema
	switch t.Kind() {
	case reflect.String:
		low, high = "minLength", "maxLength"
	case reflect.Slice, reflect.Array:
		low, high = "minItems", "maxItems"
		if items, ok := schema["items"].(object); ok {
			target = items
		}
	case reflect.Map:
		low, high = "minProperties", "maxProperties"
	}
	if c.min != nil {
		schema[low] = *c.min
	}
	if c.max != nil {
		schema[high] = *c.max
	}
	if c.pattern != nil {
		target["pattern"] = c.pattern.String()
	}
	if c.enum != nil {
		target["enum"] = c.enum
	}
	return schema
}
