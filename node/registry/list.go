package registry

import (
	"net/http"
	"net/url"
	"strconv"

	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
)

// maxPage is the most that one page of a listing holds; the answer then links to
// the next.
const maxPage = 1000

// page is which part of a listing is asked for.
type page struct {
	n     int
	last  string // the listing begins after it
	query url.Values
}

func parsePage(r *http.Request) (page, error) {
	p := page{n: maxPage, query: r.URL.Query()}
	p.last = p.query.Get("last")
	if s := p.query.Get("n"); s != "" {
		n, err := strconv.ParseUint(s, 10, 63)
		if err != nil {
			return page{}, fault.New(fault.Invalid, "n is %.40q; it must be a whole number, 0 or more", s).WithCode(codePageInvalid)
		}
		p.n = int(min(n, maxPage))
	}
	return p, nil
}

// next links to the page after this one. The rest of the query stays.
func (p page) next(c *call, path, last string) {
	p.query.Set("n", strconv.Itoa(p.n))
	p.query.Set("last", last)
	c.w.Header().Set("Link", "<"+path+"?"+p.query.Encode()+`>; rel="next"`)
}

func (g *Registry) listTags(c *call) error {
	if err := g.permit(c, actionPull); err != nil {
		return err
	}
	q, err := parsePage(c.r)
	if err != nil {
		return err
	}
	n := c.route.Name
	// A page of none is asked for to learn whether the repository exists.
	tags, page, err := g.catalog.TagNames(c.r.Context(), n.Project, n.Repository, q.last, max(q.n, 1))
	if err != nil {
		return err
	}
	markStale(c.w.Header(), page.Fresh)
	answer := struct {
		Name string   `json:"name"`
		Tags []string `json:"tags"`
	}{n.Sent, append([]string{}, tags[:min(q.n, len(tags))]...)}
	if page.More && len(answer.Tags) > 0 {
		q.next(c, "/v2/"+n.Sent+"/tags/list", answer.Tags[len(answer.Tags)-1])
	}
	return c.json(http.StatusOK, answer)
}

// listReferrers answers which artifacts refer to a manifest, whether or not that
// manifest is here. It never answers 404: clients would take that as a registry
// without this list and keep one of their own under a tag.
func (g *Registry) listReferrers(c *call) error {
	subject, err := parseDigest(c.route.Reference)
	if err != nil {
		return err
	}
	if err := g.permit(c, actionPull); err != nil && !fault.Is(err, fault.NotFound) {
		return err
	}
	q, err := parsePage(c.r)
	if err != nil {
		return err
	}
	n := c.route.Name
	ask := catalog.Referrers{
		Project: n.Project, Repository: n.Repository, Subject: subject, ArtifactType: q.query.Get("artifactType"), N: max(q.n, 1),
	}
	if q.last != "" {
		if ask.After, err = parseDigest(q.last); err != nil {
			return err
		}
	}
	found, page, err := g.catalog.Referrers(c.r.Context(), ask)
	if err != nil && !fault.Is(err, fault.NotFound) {
		return err
	}
	markStale(c.w.Header(), page.Fresh)
	found = found[:min(q.n, len(found))]
	if page.More && len(found) > 0 {
		q.next(c, "/v2/"+n.Sent+"/referrers/"+subject.String(), found[len(found)-1].Digest.String())
	}
	if ask.ArtifactType != "" {
		c.w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	if found == nil {
		found = []v1.Descriptor{}
	}
	c.w.Header().Set("Content-Type", v1.MediaTypeImageIndex)
	return c.json(http.StatusOK, v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: found,
	})
}
