package resttest

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
)

//go:embed shapes.txt
var shapes string

// Shape holds a JSON answer to what a real Harbor answers to the operation with
// the status: every key that Harbor's answer has must be there with a value of
// the same type; more keys may be. optional are paths such as
// [].tags or metadata.severity that may be missing or null; what is below them
// is held to the shape all the same.
func Shape(t testing.TB, operation string, status int, body []byte, optional ...string) {
	t.Helper()
	want, ok := find(operation, status)
	if !ok {
		t.Fatalf("shapes.txt has no shape of %s with status %d", operation, status)
	}
	for _, problem := range Compare(want, body, optional...) {
		t.Errorf("%s, status %d: %s", operation, status, problem)
	}
}

func find(operation string, status int) (string, bool) {
	prefix := fmt.Sprintf("%s %d ", operation, status)
	for line := range strings.Lines(shapes) {
		if shape, ok := strings.CutPrefix(line, prefix); ok {
			return strings.TrimSpace(shape), true
		}
	}
	return "", false
}

// Compare lists how a JSON answer falls short of a shape.
func Compare(shape string, body []byte, optional ...string) []string {
	var want, got any
	if err := json.Unmarshal([]byte(shape), &want); err != nil {
		return []string{"the shape is no JSON: " + err.Error()}
	}
	if want == nil {
		return nil // no body, or one that nobody reads
	}
	if err := json.Unmarshal(body, &got); err != nil {
		return []string{"the answer is no JSON: " + err.Error()}
	}
	c := comparison{optional: optional}
	c.value("", want, got)
	return c.problems
}

type comparison struct {
	optional []string
	problems []string
}

func (c *comparison) add(path, format string, args ...any) {
	if path == "" {
		path = "the answer"
	}
	c.problems = append(c.problems, path+" "+fmt.Sprintf(format, args...))
}

func (c *comparison) value(path string, want, got any) {
	if got == nil && slices.Contains(c.optional, path) {
		return
	}
	switch want := want.(type) {
	case map[string]any:
		object, ok := got.(map[string]any)
		if !ok {
			c.add(path, "is a %s, not an object", typeOf(got))
			return
		}
		for key, inner := range want {
			at := strings.TrimPrefix(path+"."+key, ".")
			value, ok := object[key]
			if !ok && !slices.Contains(c.optional, at) {
				c.add(at, "is missing")
			}
			if ok {
				c.value(at, inner, value)
			}
		}
	case []any:
		list, ok := got.([]any)
		if !ok {
			c.add(path, "is a %s, not a list", typeOf(got))
			return
		}
		for _, item := range list {
			if len(want) > 0 {
				c.value(path+"[]", want[0], item)
			}
		}
	case string:
		if name := typeOf(got); name != want && want != "NoneType" && !(want == "float" && name == "int") {
			c.add(path, "is a %s, not a %s", name, want)
		}
	}
}

// typeOf names a JSON value's type in the words of the shapes.
func typeOf(v any) string {
	switch v := v.(type) {
	case nil:
		return "null"
	case bool:
		return "bool"
	case string:
		return "str"
	case float64:
		if v == float64(int64(v)) {
			return "int"
		}
		return "float"
	case []any:
		return "list"
	}
	return "object"
}
