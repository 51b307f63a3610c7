package registry

import (
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/node/fault"
)

// Endpoint is one of the kinds of path below /v2/.
type Endpoint uint8

const (
	EndpointBase      Endpoint = iota // /v2/
	EndpointCatalog                   // /v2/_catalog
	EndpointTags                      // /v2/<name>/tags/list
	EndpointManifest                  // /v2/<name>/manifests/<reference>
	EndpointBlob                      // /v2/<name>/blobs/<digest>
	EndpointUploads                   // /v2/<name>/blobs/uploads/
	EndpointSession                   // /v2/<name>/blobs/uploads/<session>
	EndpointReferrers                 // /v2/<name>/referrers/<digest>
)

// template is the endpoint's path as the metrics name it.
func (e Endpoint) template() string {
	return [...]string{"/v2/", "/v2/_catalog", "/v2/{name}/tags/list", "/v2/{name}/manifests/{reference}",
		"/v2/{name}/blobs/{digest}", "/v2/{name}/blobs/uploads/", "/v2/{name}/blobs/uploads/{session}",
		"/v2/{name}/referrers/{digest}"}[e]
}

// defaultProject holds the repositories whose names have one component, so that
// HOST/app and HOST/library/app are the same repository.
const defaultProject = "library"

// Limits of names, in bytes. The path of a request is bounded by both.
const (
	maxName    = 255
	maxSession = 255
)

// Name is a repository's name. The zero value is no name.
type Name struct {
	Sent       string // as the client wrote it, which is what it compares answers with
	Project    string
	Repository string // relative to the project
}

// Full is the name with its project.
func (n Name) Full() string {
	if n.Project == "" {
		return ""
	}
	return n.Project + "/" + n.Repository
}

// Route is a parsed path.
type Route struct {
	Endpoint Endpoint
	Name     Name
	// Reference is what follows the endpoint's word, not yet judged: a tag or a
	// digest, or the id of an upload session.
	Reference string
}

// ParsePath reads the path of a request, in its decoded form. Names may hold any
// of the words that the endpoints use, so the path is read from its end. A path
// of no endpoint is fault.NotFound, a name outside the grammar NAME_INVALID.
func ParsePath(path string) (Route, error) {
	rest, ok := strings.CutPrefix(path, "/v2/")
	switch {
	case path == "/v2" || ok && rest == "":
		return Route{Endpoint: EndpointBase}, nil
	case !ok:
		return Route{}, noEndpoint()
	case rest == "_catalog" || rest == "_catalog/":
		return Route{Endpoint: EndpointCatalog}, nil
	}
	route, name, err := splitEndpoint(rest)
	if err != nil {
		return Route{}, err
	}
	route.Name, err = ParseName(name)
	return route, err
}

// splitEndpoint finds the endpoint at the end of a path and what stands before it.
func splitEndpoint(rest string) (Route, string, error) {
	head, last := cutLast(rest)
	before, word := cutLast(head)
	switch {
	case last == "list" && word == "tags":
		return Route{Endpoint: EndpointTags}, before, nil
	case word == "manifests":
		return Route{Endpoint: EndpointManifest, Reference: last}, before, nil
	case word == "referrers":
		return Route{Endpoint: EndpointReferrers, Reference: last}, before, nil
	case word == "blobs" && last == "uploads":
		return Route{Endpoint: EndpointUploads}, before, nil
	case word == "blobs":
		return Route{Endpoint: EndpointBlob, Reference: last}, before, nil
	}
	if name, blobs := cutLast(before); word == "uploads" && blobs == "blobs" {
		if last == "" {
			return Route{Endpoint: EndpointUploads}, name, nil
		}
		return Route{Endpoint: EndpointSession, Reference: last}, name, nil
	}
	return Route{}, "", noEndpoint()
}

func cutLast(s string) (before, last string) {
	i := strings.LastIndexByte(s, '/')
	if i < 0 {
		return "", s
	}
	return s[:i], s[i+1:]
}

func noEndpoint() error {
	return fault.New(fault.NotFound, "no endpoint of the OCI Distribution API has this path").WithCode(codeNotFound)
}

// ParseName reads a repository's name by the grammar of OCI Distribution 1.1,
// "Pulling manifests". A name of one component is in the project library.
func ParseName(s string) (Name, error) {
	if s == "" || len(s) > maxName {
		return Name{}, nameInvalid(s)
	}
	for rest, more := s, true; more; {
		var component string
		component, rest, more = strings.Cut(rest, "/")
		if !validComponent(component) {
			return Name{}, nameInvalid(s)
		}
	}
	project, repository, ok := strings.Cut(s, "/")
	if !ok {
		project, repository = defaultProject, s
	}
	return Name{Sent: s, Project: project, Repository: repository}, nil
}

func nameInvalid(s string) error {
	return fault.New(fault.Invalid, "%.80q is not a repository name; use lower-case letters and digits, separated by one of . _ __ or dashes, in components separated by slashes, at most %d bytes", s, maxName).WithCode(codeNameInvalid)
}

// validComponent matches [a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*.
func validComponent(s string) bool {
	separators := 0 // at the end of what was read
	for i := range len(s) {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' {
			separators = 0
			continue
		}
		if i == 0 || c != '.' && c != '_' && c != '-' {
			return false
		}
		separators++
		if separators > 1 && c != s[i-1] || separators > 1 && c == '.' || separators > 2 && c == '_' {
			return false
		}
	}
	return s != "" && separators == 0
}

// parseDigest reads a digest that a client sent.
func parseDigest(s string) (digest.Digest, error) {
	d, err := entry.ParseDigest(s)
	if err != nil {
		return "", fault.Wrap(err, fault.Invalid, "%.140q is not a digest; write sha256: and 64, or sha512: and 128, lower-case hexadecimal digits", s).WithCode(codeDigestInvalid)
	}
	return d, nil
}

// isDigest tells the two kinds of reference apart: no tag holds a colon.
func isDigest(reference string) bool { return strings.IndexByte(reference, ':') >= 0 }
