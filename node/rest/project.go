package rest

import (
	"strconv"
	"strings"
)

// ProjectRef is embedded by the input of an operation on a project whose path
// holds {project_name_or_id}. A number is an id unless the header says that it
// is a name.
type ProjectRef struct {
	NameOrID string `path:"project_name_or_id" max:"255"`
	IsName   bool   `header:"X-Is-Resource-Name"`
}

// Ref is the reference in the form that ParseProject reads.
func (p ProjectRef) Ref() string {
	if p.IsName {
		return nameRef(p.NameOrID)
	}
	return p.NameOrID
}

// ProjectName is embedded by the input of an operation whose path holds
// {project_name}: never an id.
type ProjectName struct {
	Name string `path:"project_name" max:"255"`
}

// Ref is the reference in the form that ParseProject reads.
func (p ProjectName) Ref() string { return nameRef(p.Name) }

// nameRef marks a name that would be read as an id.
func nameRef(name string) string {
	if allDigits(name) || strings.HasPrefix(name, "=") {
		return "=" + name
	}
	return name
}

// ParseProject reads a reference to a project: all digits are an id, anything
// else is a name; a leading = marks a name, whatever follows. Exactly one of
// name and id is set, unless the reference is empty.
func ParseProject(ref string) (name string, id int64) {
	if after, ok := strings.CutPrefix(ref, "="); ok {
		return after, 0
	}
	if allDigits(ref) {
		if n, err := strconv.ParseInt(ref, 10, 64); err == nil && n > 0 {
			return "", n
		}
	}
	return ref, 0
}

func allDigits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}
