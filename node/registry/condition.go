package registry

import (
	"net/http"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
)

// tagCondition reads what a change of a tag rests on from If-Match and
// If-None-Match (RFC 9110, section 13.1), whose entity tag is the digest, as
// pulls give it. Any number of clients that read a tag and then move it on
// If-Match cannot undo each other's moves.
//
// A condition on what is no single tag is refused and never left out: a client
// that sends one would take the answer for a promise.
func tagCondition(h http.Header, tags []string) (c catalog.Condition, err error) {
	match, none := h.Values("If-Match"), h.Values("If-None-Match")
	if match == nil && none == nil {
		return c, nil
	}
	if len(tags) != 1 || tags[0] == "" {
		return c, fault.New(fault.Invalid, "If-Match and If-None-Match go with a change of one tag; what a digest names never changes")
	}
	if c.At, c.Exists, err = entityTags("If-Match", match); err != nil {
		return c, err
	}
	c.NotAt, c.Absent, err = entityTags("If-None-Match", none)
	return c, err
}

// entityTags reads a list of quoted digests; any is the value "*". Weak ones are
// refused: the bytes of a manifest are one digest or another.
func entityTags(header string, values []string) (ds []digest.Digest, any bool, err error) {
	if values == nil {
		return nil, false, nil
	}
	list := strings.Join(values, ",")
	if strings.TrimSpace(list) == "*" {
		return nil, true, nil
	}
	for _, item := range strings.Split(list, ",") {
		item = strings.TrimSpace(item)
		if item == "" {
			continue
		}
		inner, quoted := strings.CutPrefix(item, `"`)
		inner, closed := strings.CutSuffix(inner, `"`)
		d, err := parseDigest(inner)
		if !quoted || !closed || err != nil {
			return nil, false, fault.New(fault.Invalid, "%s takes * or digests in quotes, as the Etag of a pull has it, not %.140q", header, item)
		}
		ds = append(ds, d)
	}
	if ds == nil {
		return nil, false, fault.New(fault.Invalid, "%s is empty; it takes * or digests in quotes, as the Etag of a pull has it", header)
	}
	return ds, false, nil
}
