package rest

import (
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/atoll-registry/atoll/node/fault"
)

// plan is how to fill an operation's input from a request, compiled from the
// input's type.
type plan struct {
	params []param
	body   *bodyPlan // nil: the operation has no body
}

// param is one field that is filled from outside the body.
type param struct {
	in, name string // in: path, query, header or origin
	index    []int
	typ      reflect.Type
	set      func(v reflect.Value, raw []string) error
	fallback string // default; "" for none
	checks   *checks
}

type bodyPlan struct {
	index    []int
	typ      reflect.Type
	checks   *checks
	optional bool // a pointer: no body leaves it nil
}

// compileInput makes the plan of an input type and panics on what can never
// work.
func compileInput(id string, t reflect.Type, template string) *plan {
	if t.Kind() != reflect.Struct {
		panic(fmt.Sprintf("rest: the input of operation %q must be a struct, not %s", id, t))
	}
	p := &plan{}
	p.compile(id, t, nil)
	var named []string
	for _, q := range p.params {
		if q.in == "path" {
			named = append(named, q.name)
		}
	}
	slices.Sort(named)
	if want := wildcards(template); !slices.Equal(named, want) {
		panic(fmt.Sprintf("rest: operation %q: path %s names %v, its input %v", id, template, want, named))
	}
	return p
}

func (p *plan) compile(id string, t reflect.Type, index []int) {
	for i := range t.NumField() {
		f := t.Field(i)
		at := append(slices.Clone(index), i)
		if f.Anonymous && f.Type.Kind() == reflect.Struct {
			p.compile(id, f.Type, at)
			continue
		}
		if !f.IsExported() {
			panic(fmt.Sprintf("rest: operation %q: input field %s is not exported", id, f.Name))
		}
		if f.Name == "Body" {
			b := &bodyPlan{index: at, typ: f.Type, optional: f.Type.Kind() == reflect.Pointer}
			b.checks = compileChecks(id, f.Name, f.Type, f.Tag)
			p.body = b
			continue
		}
		q := param{index: at, typ: f.Type, fallback: f.Tag.Get("default")}
		for _, in := range [...]string{"path", "query", "header"} {
			if name, ok := f.Tag.Lookup(in); ok {
				q.in, q.name = in, name
			}
		}
		if f.Tag.Get("from") == "origin" {
			q.in, q.name = "origin", "origin"
		}
		if q.in == "" {
			panic(fmt.Sprintf("rest: operation %q: input field %s says neither path, query nor header", id, f.Name))
		}
		var err error
		if q.set, err = setter(f.Type); err != nil {
			panic(fmt.Sprintf("rest: operation %q: input field %s: %v", id, f.Name, err))
		}
		if q.fallback != "" {
			if err := q.set(reflect.New(f.Type).Elem(), []string{q.fallback}); err != nil {
				panic(fmt.Sprintf("rest: operation %q: default of input field %s: %v", id, f.Name, err))
			}
		}
		q.checks = compileChecks(id, q.name, f.Type, f.Tag)
		p.params = append(p.params, q)
	}
}

// parameters fills what comes from path, query and headers, and checks it.
func (p *plan) parameters(target reflect.Value, r *http.Request) error {
	var query url.Values
	for _, q := range p.params {
		var raw []string
		switch q.in {
		case "path":
			value, err := unescapeAgain(r.PathValue(q.name))
			if err != nil {
				return fault.Wrap(err, fault.Invalid, "%s in the path is not escaped properly", q.name)
			}
			raw = []string{value}
		case "query":
			if query == nil {
				var err error
				if query, err = url.ParseQuery(r.URL.RawQuery); err != nil {
					return fault.Wrap(err, fault.Invalid, "the query of the address is not escaped properly")
				}
			}
			raw = query[q.name]
		case "header":
			raw = r.Header.Values(q.name)
		case "origin":
			raw = []string{origin(r)}
		}
		if len(raw) == 0 || len(raw) == 1 && raw[0] == "" {
			if q.fallback == "" {
				if q.checks.required {
					return unprocessable("%s is required in the %s", q.name, q.in)
				}
				continue
			}
			raw = []string{q.fallback}
		}
		field := target.FieldByIndex(q.index)
		if err := q.set(field, raw); err != nil {
			var own *fault.Error
			if errors.As(err, &own) {
				return own
			}
			return unprocessable("%s in the %s is %q: %v", q.name, q.in, clip(raw[0]), err)
		}
		if err := q.checks.check(q.name, field); err != nil {
			return err
		}
	}
	return nil
}

// origin is how the client found the node, as far as the node can see.
func origin(r *http.Request) string {
	if r.TLS != nil {
		return "https://" + r.Host
	}
	return "http://" + r.Host
}

// unescapeAgain undoes the second of two escapings. No name that Atoll accepts
// holds a percent sign, so a value that does was escaped twice.
func unescapeAgain(value string) (string, error) {
	if !strings.Contains(value, "%") {
		return value, nil
	}
	return url.PathUnescape(value)
}

// decodeBody reads the JSON body and checks it.
func (p *plan) decodeBody(target reflect.Value, r *http.Request) error {
	b := p.body
	if b == nil {
		return nil
	}
	if t := r.Header.Get("Content-Type"); t != "" {
		media, _, err := mime.ParseMediaType(t)
		if err != nil || media != "application/json" && !strings.HasSuffix(media, "+json") {
			return fault.New(fault.Invalid, "the body is %q: send application/json", clip(t)).WithCode(codeMediaType)
		}
	}
	field := target.FieldByIndex(b.index)
	decoder := json.NewDecoder(r.Body)
	err := decoder.Decode(field.Addr().Interface())
	if errors.Is(err, io.EOF) { // no body at all
		if b.optional {
			return nil
		}
		return fault.New(fault.Invalid, "the request has no body: send a JSON value")
	}
	if err == nil {
		var more json.RawMessage
		if err = decoder.Decode(&more); errors.Is(err, io.EOF) {
			err = nil
		} else if err == nil {
			return fault.New(fault.Invalid, "the body holds more than one JSON value")
		}
	}
	if err != nil {
		return bodyFault(err)
	}
	return b.checks.check("", field)
}

// tooLarge says in the client's terms that a body went over its bound; nil when
// that is not what the error tells.
func tooLarge(err error) error {
	var large *http.MaxBytesError
	if !errors.As(err, &large) {
		return nil
	}
	return fault.Wrap(err, fault.Limit, "the body is larger than the %d bytes that this operation takes", large.Limit)
}

// bodyFault says in the client's terms what is wrong with a body.
func bodyFault(err error) error {
	if large := tooLarge(err); large != nil {
		return large
	}
	var typed *json.UnmarshalTypeError
	var syntax *json.SyntaxError
	switch {
	case errors.As(err, &typed):
		return fault.Wrap(err, fault.Invalid, "%s in the body is a JSON %s: a %s is wanted", orBody(typed.Field), typed.Value, jsonName(typed.Type))
	case errors.As(err, &syntax):
		return fault.Wrap(err, fault.Invalid, "the body is not valid JSON at byte %d", syntax.Offset)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fault.Wrap(err, fault.Invalid, "the body ends in the middle of a JSON value")
	}
	var own *fault.Error
	if errors.As(err, &own) {
		return own
	}
	return fault.Wrap(err, fault.Invalid, "the body is not what this operation takes")
}

func orBody(field string) string {
	if field == "" {
		return "the value"
	}
	return field
}

func jsonName(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Bool:
		return "boolean"
	case reflect.String:
		return "string"
	case reflect.Slice, reflect.Array:
		return "list"
	case reflect.Struct, reflect.Map:
		return "object"
	}
	return "number"
}

func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "..."
	}
	return s
}

var (
	textType     = reflect.TypeFor[encoding.TextUnmarshaler]()
	durationType = reflect.TypeFor[time.Duration]()
)

// setter makes the function that parses a parameter into a field of type t.
func setter(t reflect.Type) (func(reflect.Value, []string) error, error) {
	if reflect.PointerTo(t).Implements(textType) {
		return func(v reflect.Value, raw []string) error {
			return v.Addr().Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(raw[0]))
		}, nil
	}
	switch t.Kind() {
	case reflect.Pointer:
		inner, err := setter(t.Elem())
		if err != nil {
			return nil, err
		}
		return func(v reflect.Value, raw []string) error {
			fresh := reflect.New(t.Elem())
			if err := inner(fresh.Elem(), raw); err != nil {
				return err
			}
			v.Set(fresh)
			return nil
		}, nil
	case reflect.Slice:
		inner, err := setter(t.Elem())
		if err != nil {
			return nil, err
		}
		return func(v reflect.Value, raw []string) error { return setSlice(t, v, raw, inner) }, nil
	}
	one, err := scalar(t)
	if err != nil {
		return nil, err
	}
	return func(v reflect.Value, raw []string) error { return one(v, raw[0]) }, nil
}

// maxListItems bounds a list in a query.
const maxListItems = 1000

func setSlice(t reflect.Type, v reflect.Value, raw []string, inner func(reflect.Value, []string) error) error {
	var parts []string
	for _, value := range raw {
		for part := range strings.SplitSeq(value, ",") {
			if parts = append(parts, part); len(parts) > maxListItems {
				return fmt.Errorf("a list holds at most %d items", maxListItems)
			}
		}
	}
	list := reflect.MakeSlice(t, len(parts), len(parts))
	for i, part := range parts {
		if err := inner(list.Index(i), []string{part}); err != nil {
			return err
		}
	}
	v.Set(list)
	return nil
}

func scalar(t reflect.Type) (func(reflect.Value, string) error, error) {
	if t == durationType {
		return func(v reflect.Value, s string) error {
			d, err := time.ParseDuration(s)
			if err != nil {
				return errors.New("a duration such as 90s or 24h is wanted")
			}
			v.SetInt(int64(d))
			return nil
		}, nil
	}
	switch t.Kind() {
	case reflect.String:
		return func(v reflect.Value, s string) error { v.SetString(s); return nil }, nil
	case reflect.Bool:
		return func(v reflect.Value, s string) error {
			b, err := strconv.ParseBool(s)
			if err != nil {
				return errors.New("true or false is wanted")
			}
			v.SetBool(b)
			return nil
		}, nil
	case reflect.Int, reflect.Int32, reflect.Int64:
		return func(v reflect.Value, s string) error {
			n, err := strconv.ParseInt(s, 10, t.Bits())
			if err != nil {
				return errors.New("a whole number is wanted")
			}
			v.SetInt(n)
			return nil
		}, nil
	case reflect.Uint32, reflect.Uint64:
		return func(v reflect.Value, s string) error {
			n, err := strconv.ParseUint(s, 10, t.Bits())
			if err != nil {
				return errors.New("a whole number that is not negative is wanted")
			}
			v.SetUint(n)
			return nil
		}, nil
	}
	return nil, fmt.Errorf("a parameter cannot be a %s", t)
}
