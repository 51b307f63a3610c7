package rest

import (
	"encoding/json"
	"net/http"
	"reflect"
	"strconv"
	"strings"
)

// openAPI makes the document, OpenAPI 3.1, of the table.
func (k *Kernel) openAPI() []byte {
	s := &schemas{components: object{}, names: make(map[reflect.Type]string)}
	paths := object{}
	for _, r := range k.routes {
		template := strings.ReplaceAll(r.path, "...}", "}")
		methods, ok := paths[template].(object)
		if !ok {
			methods = object{}
			paths[template] = methods
		}
		methods[strings.ToLower(r.method)] = s.operation(r)
	}
	failure := s.of(reflect.TypeFor[envelope]())
	document := object{
		"openapi": "3.1.0",
		"info": object{
			"title": "Atoll", "version": orUnknown(k.config.Version),
			"description": "The management API of an Atoll site: Harbor's v2.0 API under /api/v2.0, what Harbor does not have under /api/atoll/v1.",
		},
		"paths":    paths,
		"security": []any{object{"basic": []string{}}},
		"components": object{
			"schemas":         s.components,
			"securitySchemes": object{"basic": object{"type": "http", "scheme": "basic"}},
			"responses": object{"failure": object{
				"description": "The request was not carried out: the errors say why",
				"content":     object{"application/json": object{"schema": failure}},
			}},
		},
	}
	out, err := json.Marshal(document)
	if err != nil {
		// Only maps, strings and numbers are in it.
		panic("rest: the OpenAPI document cannot be encoded: " + err.Error())
	}
	return out
}

func orUnknown(version string) string {
	if version == "" {
		return "unknown"
	}
	return version
}

// operation describes one row of the table.
func (s *schemas) operation(r route) object {
	op := object{
		"operationId": r.id,
		"summary":     r.summary,
		"tags":        []string{r.tag},
		"responses": object{
			strconv.Itoa(r.status): s.answer(r),
			"default":              object{"$ref": "#/components/responses/failure"},
		},
	}
	if r.permission.Resource == "" {
		op["security"] = []any{object{}}
	} else {
		op["x-atoll-permission"] = r.permission.String()
	}
	if parameters := s.parameters(r.input); len(parameters) > 0 {
		op["parameters"] = parameters
	}
	switch {
	case r.input.body != nil:
		op["requestBody"] = object{
			"required": !r.input.body.optional,
			"content":  object{"application/json": object{"schema": s.of(r.input.body.typ)}},
		}
	case r.consumes != "":
		op["requestBody"] = object{"required": true, "content": object{r.consumes: object{}}}
	}
	return op
}

func (s *schemas) parameters(p *plan) []any {
	var out []any
	for _, q := range p.params {
		if q.in == "origin" {
			continue
		}
		schema := withRules(s.of(q.typ), q.typ, q.checks)
		if q.fallback != "" {
			schema["default"] = literal(q.typ, q.fallback)
		}
		parameter := object{
			"name": q.name, "in": q.in, "schema": schema,
			"required": q.in == "path" || q.checks.required,
		}
		if q.typ.Kind() == reflect.Slice && q.in == "query" && schema["type"] == "array" {
			parameter["explode"] = false
		}
		out = append(out, parameter)
	}
	return out
}

// literal gives a default as a JSON value of the parameter's type.
func literal(t reflect.Type, text string) any {
	switch elem(t).Kind() {
	case reflect.Bool, reflect.Int, reflect.Int32, reflect.Int64, reflect.Uint32, reflect.Uint64:
		if json.Valid([]byte(text)) {
			return json.RawMessage(text)
		}
	}
	return text
}

func (s *schemas) answer(r route) object {
	headers := object{"X-Request-Id": header("the request's id, as in the server's log")}
	answer := object{"description": http.StatusText(r.status), "headers": headers}
	if r.output == nil {
		if r.produces != "" {
			answer["content"] = object{r.produces: object{}}
		}
		return answer
	}
	if r.output.created {
		headers["Location"] = header("path of what was created")
	}
	if r.output.paged {
		headers["X-Total-Count"] = header("number of all items that match")
		headers["Link"] = header("the previous and the next page, as paths")
	}
	if r.output.typ != nil {
		answer["content"] = object{"application/json": object{"schema": s.of(r.output.typ)}}
	}
	return answer
}

func header(description string) object {
	return object{"description": description, "schema": object{"type": "string"}}
}
