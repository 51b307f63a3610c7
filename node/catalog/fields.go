package catalog

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
)

// This file takes manifests apart. Every push does, some fields at a time, and
// encoding/json looks at all of a text again each time that it is asked for a part
// of it. So it says once that the text is JSON, and what is here relies on that.

// checkJSON refuses what bounded, unambiguous JSON does not have: values nested too
// deep, the same field twice in an object, and anything after the value.
func checkJSON(body []byte) error {
	if !json.Valid(body) {
		var any json.RawMessage
		return json.Unmarshal(body, &any) // it says why
	}
	w := walk{rest: body}
	return w.check(0)
}

// walk goes through valid JSON.
type walk struct{ rest []byte }

// next passes space and gives the byte that comes then, which it does not pass.
func (w *walk) next() byte {
	for len(w.rest) > 0 {
		switch c := w.rest[0]; c {
		case ' ', '\t', '\n', '\r', ',', ':':
			w.rest = w.rest[1:]
		default:
			return c
		}
	}
	return 0
}

// text passes a string and gives it with its quotes.
func (w *walk) text() []byte {
	for i := 1; i < len(w.rest); i++ {
		switch w.rest[i] {
		case '\\':
			i++
		case '"':
			return w.take(i + 1)
		}
	}
	return w.take(len(w.rest))
}

func (w *walk) take(n int) []byte {
	b := w.rest[:n:n]
	w.rest = w.rest[n:]
	return b
}

// value passes a value of any kind and gives it.
func (w *walk) value() []byte {
	switch w.next() {
	case '"':
		return w.text()
	case '{', '[':
		all, open := w.rest, 0
		for len(w.rest) > 0 {
			switch w.next() {
			case '"':
				w.text()
				continue
			case '{', '[':
				open++
			case '}', ']':
				open--
			}
			w.rest = w.rest[min(1, len(w.rest)):]
			if open == 0 {
				break
			}
		}
		return all[: len(all)-len(w.rest) : len(all)-len(w.rest)]
	}
	end := bytes.IndexAny(w.rest, " \t\n\r,:]}")
	if end < 0 {
		end = len(w.rest)
	}
	return w.take(end)
}

// check passes a value with so many open around it.
func (w *walk) check(open int) error {
	kind := w.next()
	if kind != '{' && kind != '[' {
		w.value()
		return nil
	}
	if open == maxDepth {
		return fmt.Errorf("values are nested deeper than %d", maxDepth)
	}
	w.take(1)
	var names names
	for c := w.next(); c != '}' && c != ']' && c != 0; c = w.next() {
		if kind == '{' {
			name, err := nameOf(w.text())
			if err != nil {
				return err
			}
			if !names.add(name) {
				return fmt.Errorf("the field %.60q is there twice", name)
			}
		}
		if err := w.check(open + 1); err != nil {
			return err
		}
	}
	w.take(min(1, len(w.rest)))
	return nil
}

// names are those of one object: few for the most part.
type names struct {
	few  [16][]byte
	n    int // of few
	many map[string]bool
}

// add reports whether a name is new.
func (n *names) add(name []byte) bool {
	for _, have := range n.few[:n.n] {
		if bytes.Equal(have, name) {
			return false
		}
	}
	if n.n < len(n.few) {
		n.few[n.n] = name
		n.n++
		return true
	}
	if n.many == nil {
		n.many = map[string]bool{}
	}
	if n.many[string(name)] {
		return false
	}
	n.many[string(name)] = true
	return true
}

// textOf reads a string with its quotes.
func textOf(raw []byte) (s string, err error) {
	b, err := nameOf(raw)
	return string(b), err
}

// nameOf is textOf for who keeps raw as it is.
func nameOf(raw []byte) ([]byte, error) {
	plain := len(raw) >= 2 && raw[0] == '"'
	for _, c := range raw {
		plain = plain && c != '\\' && c < 0x80
	}
	if plain {
		return raw[1 : len(raw)-1], nil
	}
	var s string
	err := json.Unmarshal(raw, &s)
	return []byte(s), err
}

// sizeOf reads a number of bytes.
func sizeOf(raw []byte) (n int64, err error) {
	if len(raw) == 0 {
		return 0, fmt.Errorf("no number")
	}
	if n, err = strconv.ParseInt(string(raw), 10, 64); err == nil {
		return n, nil
	}
	n = 0
	err = json.Unmarshal(raw, &n)
	return n, err
}

// object splits a JSON object into its fields. A field that equals a known one
// except for case is refused: Go's own readers would take it for the known one
// and others would not.
func object(raw []byte, known ...string) (map[string]json.RawMessage, error) {
	w := walk{rest: raw}
	if w.next() != '{' {
		return nil, fmt.Errorf("a manifest and each descriptor in it must be a JSON object")
	}
	w.take(1)
	fields := make(map[string]json.RawMessage, len(known))
	for w.next() == '"' {
		name, err := textOf(w.text())
		if err != nil {
			return nil, err
		}
		fields[name] = w.value()
		for _, k := range known {
			if name != k && strings.EqualFold(name, k) {
				return nil, fmt.Errorf("the field %q must be written %q", name, k)
			}
		}
	}
	return fields, nil
}

// list splits a JSON list; ok is false when it is none.
func list(raw []byte) (items []json.RawMessage, ok bool) {
	w := walk{rest: raw}
	if w.next() != '[' {
		return nil, isNull(raw)
	}
	w.take(1)
	for c := w.next(); c != ']' && c != 0; c = w.next() {
		items = append(items, w.value())
	}
	return items, true
}

// texts reads an object of strings, as encoding/json does: null is none, and a value
// that is null is empty. ok is false when it is another thing.
func texts(raw []byte) (all map[string]string, ok bool) {
	w := walk{rest: raw}
	if w.next() != '{' {
		return nil, isNull(raw)
	}
	w.take(1)
	all = map[string]string{}
	for w.next() == '"' {
		name, err := textOf(w.text())
		if err != nil {
			return nil, false
		}
		value := w.value()
		if all[name], err = textOf(value); err != nil {
			return nil, false
		}
	}
	return all, true
}

func isNull(raw json.RawMessage) bool { return bytes.Equal(bytes.TrimSpace(raw), []byte("null")) }
