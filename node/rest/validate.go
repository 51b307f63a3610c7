package rest

import (
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/atoll-registry/atoll/node/fault"
)

// checks are the rules of one value, compiled from tags; a struct's hold those
// of its fields.
type checks struct {
	required bool
	min, max *float64
	pattern  *regexp.Regexp
	enum     []string
	fields   []fieldChecks // of a struct
	items    *checks       // of a slice, map or pointer
}

type fieldChecks struct {
	index  int
	name   string // as in JSON
	inline bool   // an embedded struct: its fields have no name in front
	checks *checks
}

// compileChecks reads the rules of a field, and panics on those that cannot be
// read.
func compileChecks(id, name string, t reflect.Type, tag reflect.StructTag) *checks {
	return compileWithin(id, name, t, tag, map[reflect.Type]*checks{})
}

// compileWithin compiles inside the structs that are in seen already.
func compileWithin(id, name string, t reflect.Type, tag reflect.StructTag, seen map[reflect.Type]*checks) *checks {
	c := &checks{required: tag.Get("required") == "true"}
	fail := func(what string, err any) {
		panic(fmt.Sprintf("rest: operation %q: field %s: %s: %v", id, name, what, err))
	}
	bound := func(key string) *float64 {
		s, ok := tag.Lookup(key)
		if !ok {
			return nil
		}
		n, err := strconv.ParseFloat(s, 64)
		if err != nil {
			fail(key, err)
		}
		if !measurable(t) {
			fail(key, "a "+t.String()+" has no size")
		}
		return &n
	}
	c.min, c.max = bound("min"), bound("max")
	if s, ok := tag.Lookup("pattern"); ok {
		re, err := regexp.Compile("^(?:" + s + ")$")
		if err != nil {
			fail("pattern", err)
		}
		c.pattern = re
	}
	if s, ok := tag.Lookup("enum"); ok {
		c.enum = strings.Split(s, ",")
	}
	if (c.pattern != nil || c.enum != nil) && elem(t).Kind() != reflect.String {
		fail("pattern or enum", "only strings can have one")
	}
	c.inner(id, t, seen)
	return c
}

// inner compiles the rules inside a composite type. seen closes the circle of
// types that hold themselves.
func (c *checks) inner(id string, t reflect.Type, seen map[reflect.Type]*checks) {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		e := t.Elem()
		if e.Kind() == reflect.Struct {
			if known, ok := seen[e]; ok {
				c.items = known
				return
			}
		}
		item := &checks{}
		item.inner(id, e, seen)
		if !item.empty() {
			c.items = item
		}
	case reflect.Struct:
		if reflect.PointerTo(t).Implements(textType) {
			return // its own parser has checked it
		}
		seen[t] = c
		for i := range t.NumField() {
			f := t.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if name == "-" || !f.IsExported() && !f.Anonymous {
				continue
			}
			inline := f.Anonymous && name == ""
			if name == "" {
				name = f.Name
			}
			if sub := compileWithin(id, name, f.Type, f.Tag, seen); !sub.empty() {
				c.fields = append(c.fields, fieldChecks{i, name, inline, sub})
			}
		}
	}
}

func (c *checks) empty() bool {
	return !c.required && c.min == nil && c.max == nil && c.pattern == nil && c.enum == nil && c.items == nil && len(c.fields) == 0
}

func elem(t reflect.Type) reflect.Type {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	return t
}

func measurable(t reflect.Type) bool {
	switch elem := t; elem.Kind() {
	case reflect.Pointer:
		return measurable(t.Elem())
	case reflect.String, reflect.Slice, reflect.Map, reflect.Float32, reflect.Float64,
		reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return true
	}
	return false
}

// check holds a value to its rules; path names it for the error.
func (c *checks) check(path string, v reflect.Value) error {
	if v.IsZero() {
		if c.required {
			return unprocessable("%s is required", nameOf(path))
		}
		if v.Kind() != reflect.Struct {
			// An optional value that is absent has nothing to hold to, but a
			// number that was sent as 0 cannot be told from it: a lower bound
			// above 0 belongs on a required field or a pointer.
			return nil
		}
	}
	if err := c.own(path, v); err != nil {
		return err
	}
	switch v.Kind() {
	case reflect.Pointer:
		if c.items != nil {
			return c.items.check(path, v.Elem())
		}
	case reflect.Slice:
		for i := 0; c.items != nil && i < v.Len(); i++ {
			if err := c.items.check(fmt.Sprintf("%s[%d]", path, i), v.Index(i)); err != nil {
				return err
			}
		}
	case reflect.Map:
		for it := v.MapRange(); c.items != nil && it.Next(); {
			if err := c.items.check(join(path, fmt.Sprint(it.Key())), it.Value()); err != nil {
				return err
			}
		}
	case reflect.Struct:
		for _, f := range c.fields {
			name := path
			if !f.inline {
				name = join(path, f.name)
			}
			if err := f.checks.check(name, v.Field(f.index)); err != nil {
				return err
			}
		}
	}
	return nil
}

// own holds a value to the rules of the value itself.
func (c *checks) own(path string, v reflect.Value) error {
	for v.Kind() == reflect.Pointer {
		v = v.Elem()
	}
	if c.min != nil || c.max != nil {
		n, unit := measure(v)
		if c.min != nil && n < *c.min {
			return unprocessable("%s is %v%s: at least %v is wanted", nameOf(path), n, unit, *c.min)
		}
		if c.max != nil && n > *c.max {
			return unprocessable("%s is %v%s: at most %v is allowed", nameOf(path), n, unit, *c.max)
		}
	}
	if c.pattern == nil && c.enum == nil {
		return nil
	}
	values := []string{}
	if v.Kind() == reflect.Slice {
		for i := range v.Len() {
			values = append(values, v.Index(i).String())
		}
	} else {
		values = append(values, v.String())
	}
	for _, s := range values {
		if c.enum != nil && !slices.Contains(c.enum, s) {
			return unprocessable("%s is %q: one of %s is wanted", nameOf(path), clip(s), strings.Join(c.enum, ", "))
		}
		if c.pattern != nil && !c.pattern.MatchString(s) {
			return unprocessable("%s is %q, which does not match %s", nameOf(path), clip(s), c.pattern)
		}
	}
	return nil
}

func measure(v reflect.Value) (n float64, unit string) {
	switch {
	case v.Kind() == reflect.String:
		return float64(utf8.RuneCountInString(v.String())), " characters long"
	case v.Kind() == reflect.Slice || v.Kind() == reflect.Map:
		return float64(v.Len()), " items long"
	case v.CanInt():
		return float64(v.Int()), ""
	case v.CanUint():
		return float64(v.Uint()), ""
	}
	return v.Float(), ""
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

func nameOf(path string) string {
	if path == "" {
		return "the body"
	}
	return path
}

func unprocessable(format string, args ...any) error {
	return fault.New(fault.Invalid, format, args...).WithCode(CodeUnprocessable)
}
