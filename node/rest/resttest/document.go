package resttest

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/atoll-registry/atoll/node/rest"
)

var wildcard = regexp.MustCompile(`\{([^}]*)\}`)

// CheckDocument lists what is wrong with an OpenAPI document: routes that are
// not in it, and what OpenAPI 3.1 does not allow.
func CheckDocument(doc map[string]any, routes []rest.Route) []string {
	d := document{doc: doc}
	if v, _ := doc["openapi"].(string); !strings.HasPrefix(v, "3.1.") {
		d.add("openapi is %v", doc["openapi"])
	}
	info := asObject(doc["info"])
	if info["title"] == nil || info["version"] == nil {
		d.add("info has no title or no version")
	}
	paths := asObject(doc["paths"])
	for _, r := range routes {
		template := strings.ReplaceAll(r.Path, "...}", "}")
		op := asObject(asObject(paths[template])[strings.ToLower(r.Method)])
		if op["operationId"] != r.ID {
			d.add("%s %s is not in the document as %s", r.Method, r.Path, r.ID)
		}
	}
	var ids []string
	for path, methods := range paths {
		for method, op := range asObject(methods) {
			d.operation(method+" "+path, path, asObject(op))
			ids = append(ids, fmt.Sprint(asObject(op)["operationId"]))
		}
	}
	slices.Sort(ids)
	if len(slices.Compact(slices.Clone(ids))) != len(ids) {
		d.add("an operationId is used twice")
	}
	d.references("", doc)
	return d.problems
}

type document struct {
	doc      map[string]any
	problems []string
}

func (d *document) add(format string, args ...any) {
	d.problems = append(d.problems, fmt.Sprintf(format, args...))
}

func (d *document) operation(name, path string, op map[string]any) {
	var wanted, found []string
	for _, m := range wildcard.FindAllStringSubmatch(path, -1) {
		wanted = append(wanted, m[1])
	}
	parameters, _ := op["parameters"].([]any)
	seen := map[string]bool{}
	for _, p := range parameters {
		parameter := asObject(p)
		in, _ := parameter["in"].(string)
		field, _ := parameter["name"].(string)
		if !slices.Contains([]string{"path", "query", "header"}, in) || field == "" || parameter["schema"] == nil {
			d.add("%s: parameter %q in %q", name, field, in)
		}
		if seen[in+field] {
			d.add("%s: parameter %s in %s is there twice", name, field, in)
		}
		seen[in+field] = true
		if in == "path" {
			found = append(found, field)
			if parameter["required"] != true {
				d.add("%s: path parameter %s is not required", name, field)
			}
		}
	}
	slices.Sort(wanted)
	slices.Sort(found)
	if !slices.Equal(wanted, found) {
		d.add("%s: the path names %v, the parameters %v", name, wanted, found)
	}
	responses := asObject(op["responses"])
	if len(responses) == 0 {
		d.add("%s: no responses", name)
	}
	for status, r := range responses {
		response := asObject(r)
		if response["$ref"] == nil && response["description"] == nil {
			d.add("%s: response %s has no description", name, status)
		}
	}
}

// references checks that whatever is referred to is there.
func (d *document) references(at string, v any) {
	switch v := v.(type) {
	case map[string]any:
		for key, inner := range v {
			if ref, ok := inner.(string); ok && key == "$ref" {
				var target any = d.doc
				for step := range strings.SplitSeq(strings.TrimPrefix(ref, "#/"), "/") {
					target = asObject(target)[step]
				}
				if target == nil {
					d.add("%s refers to %s, which is not there", at, ref)
				}
			}
			d.references(at+"/"+key, inner)
		}
	case []any:
		for _, inner := range v {
			d.references(at, inner)
		}
	}
}

func asObject(v any) map[string]any {
	m, _ := v.(map[string]any)
	return m
}
