package identity

import (
	"slices"
	"strings"
)

// The types of resources that a scope names.
const (
	typeRepository = "repository"
	typeRegistry   = "registry"
)

// defaultProject holds the repositories whose names have no slash.
const defaultProject = "library"

const (
	maxScopes      = 64
	maxScopeLength = 512
	maxActions     = 8
)

// scope is what a client asks for, or is given: actions on one resource.
type scope struct {
	Type    string   `json:"type"`
	Name    string   `json:"name"`
	Actions []string `json:"actions"`
}

// parseScopes reads the scope parameters of a token request; each may hold
// several scopes with spaces between them. What is no scope is left out, as
// every client expects: it gets a token that does not allow it. false says that
// there are more than any client asks for.
func parseScopes(params []string) ([]scope, bool) {
	var out []scope
	for _, param := range params {
		for text := range strings.FieldsSeq(param) {
			s, ok := parseScope(text)
			if !ok {
				continue
			}
			if len(out) == maxScopes {
				return nil, false
			}
			out = append(out, s)
		}
	}
	return out, true
}

// parseScope reads type:name:action,action. The name may hold colons: it ends
// at the last one.
func parseScope(text string) (scope, bool) {
	if len(text) > maxScopeLength {
		return scope{}, false
	}
	first, last := strings.IndexByte(text, ':'), strings.LastIndexByte(text, ':')
	if first <= 0 || last <= first+1 {
		return scope{}, false
	}
	kind, name := text[:first], text[first+1:last]
	// An older form names a class of repositories: repository(plugin).
	kind, _, _ = strings.Cut(kind, "(")
	if kind == "" || strings.Trim(kind, "abcdefghijklmnopqrstuvwxyz") != "" || !plainScopeName(name) {
		return scope{}, false
	}
	s := scope{Type: kind, Name: name, Actions: []string{}}
	for action := range strings.SplitSeq(text[last+1:], ",") {
		if len(s.Actions) == maxActions {
			return scope{}, false
		}
		if action != "" && !slices.Contains(s.Actions, action) {
			s.Actions = append(s.Actions, action)
		}
	}
	return s, true
}

func plainScopeName(name string) bool {
	for _, c := range []byte(name) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case strings.IndexByte("/._-:*", c) >= 0:
		default:
			return false
		}
	}
	return name != ""
}

// repositoryName gives the full name of a repository: one without a slash is in
// the default project.
func repositoryName(name string) string {
	if strings.Contains(name, "/") {
		return name
	}
	return defaultProject + "/" + name
}
