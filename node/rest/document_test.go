package rest_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/rest"
	"github.com/atoll-registry/atoll/node/rest/resttest"
)

func TestOpenAPI(t *testing.T) {
	s := server(t)
	rest.RegisterSystem(s.Kernel, rest.System{})
	var doc map[string]any
	s.As = access.Principal{}
	s.Do("GET", "/api/openapi.json", nil).Want(200).Decode(&doc)
	for _, problem := range resttest.CheckDocument(doc, s.Kernel.Routes()) {
		t.Error(problem)
	}
	op := at(doc, "paths", "/api/v2.0/projects/{project_name_or_id}/things/{repository_name}", "put")
	if got := at(op, "x-atoll-permission"); got != "repository:push" {
		t.Errorf("permission %v", got)
	}
	thing := at(doc, "components", "schemas", "rest_test.thing")
	if diff := cmp.Diff([]any{"name"}, at(thing, "required")); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[string]any{"type": "string", "maxLength": 10.0, "pattern": "^(?:[a-z]+)$"}, at(thing, "properties", "name")); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[string]any{"type": "string", "format": "date-time"}, at(thing, "properties", "made")); diff != "" {
		t.Error(diff)
	}
	if len(resttest.CheckDocument(doc, append(s.Kernel.Routes(), rest.Route{ID: "x", Method: "GET", Path: "/x"}))) == 0 {
		t.Error("a route that is not in the document was not noticed")
	}
}

func at(v any, keys ...string) any {
	for _, key := range keys {
		m, _ := v.(map[string]any)
		v = m[key]
	}
	return v
}

func TestShape(t *testing.T) {
	const shape = `[{"id":"int","tags":[{"name":"str"}],"meta":{"x":"str"}}]`
	for _, test := range []struct {
		body     string
		optional []string
		problems int
	}{
		{`[]`, nil, 0},
		{`[{"id":1,"tags":[{"name":"a"}],"meta":{"x":"y"},"more":true}]`, nil, 0},
		{`[{"id":"1","tags":[{"name":1}],"meta":{}}]`, nil, 3},
		{`[{"id":1,"meta":{}}]`, []string{"[].tags", "[].meta.x"}, 0},
		{`[{"id":1,"tags":null,"meta":{"x":""}}]`, []string{"[].tags"}, 0},
		{`[{"id":1,"tags":null,"meta":{"x":""}}]`, nil, 1},
		{`{}`, nil, 1},
		{`x`, nil, 1},
	} {
		if got := resttest.Compare(shape, []byte(test.body), test.optional...); len(got) != test.problems {
			t.Errorf("%s: %v", test.body, got)
		}
	}
}
