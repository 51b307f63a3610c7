package registry

import (
	"bytes"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/settings"
)

// Headers of our own.
const (
	// headerStale is on answers that no leader has confirmed: the seconds since
	// one was heard of.
	headerStale = "Atoll-Stale"
	// headerCopies is on a manifest's push: how many nodes hold all of it.
	headerCopies = "Atoll-Copies"
)

// maxTags bounds the tags that a push by digest may set at once.
const maxTags = 32

// getManifest serves a manifest as it was pushed, under its own media type,
// whatever the client would rather accept: its digest covers only this form.
func (g *Registry) getManifest(c *call) error {
	if err := g.permit(c, actionPull); err != nil {
		return err
	}
	if err := readable(c.route.Reference); err != nil {
		return err
	}
	n := c.route.Name
	m, fresh, err := g.catalog.Resolve(c.r.Context(), n.Project, n.Repository, c.route.Reference)
	if err != nil {
		return err
	}
	h := c.w.Header()
	markStale(h, fresh)
	h.Set("Content-Type", m.MediaType)
	h.Set("Docker-Content-Digest", m.Digest.String())
	h.Set("Etag", strconv.Quote(m.Digest.String()))
	if plain(c.r) {
		return c.whole(m.Bytes)
	}
	return g.send(c, bytes.NewReader(m.Bytes))
}

// plain reports whether a request wants all of the content in any case, as most
// do.
func plain(r *http.Request) bool {
	h := r.Header
	return r.Method == http.MethodGet && h["Range"] == nil && h["If-None-Match"] == nil && h["If-Match"] == nil &&
		h["If-Modified-Since"] == nil && h["If-Unmodified-Since"] == nil
}

// readable refuses references that nothing can be under. A tag outside the
// grammar is simply not there.
func readable(reference string) error {
	if isDigest(reference) {
		_, err := parseDigest(reference)
		return err
	}
	if catalog.CheckTag(reference) != nil {
		return fault.New(fault.NotFound, "%.80q cannot be a tag", reference).WithCode(codeManifestUnknown)
	}
	return nil
}

func markStale(h http.Header, fresh table.Freshness) {
	if fresh.Stale {
		h.Set(headerStale, strconv.FormatInt(int64(fresh.Age/time.Second), 10))
	}
}

// send serves content with ranges and conditions, and fails when less than was
// promised could be sent.
func (g *Registry) send(c *call, content io.ReadSeeker) error {
	w := &contentWriter{writer: c.w}
	http.ServeContent(w, c.r, "", time.Time{}, content)
	if w.refused {
		return fault.New(fault.Invalid, "the content has no byte in the range %.80q", c.r.Header.Get("Range")).WithCode(codeRangeInvalid)
	}
	promised, err := strconv.ParseInt(c.w.Header().Get("Content-Length"), 10, 64)
	if err != nil || c.r.Method == http.MethodHead || c.w.status >= 300 || c.w.written == promised {
		return nil
	}
	if err := c.r.Context().Err(); err != nil {
		return err
	}
	return fault.New(fault.Unavailable, "only %d of %d bytes could be sent", c.w.written, promised)
}

// contentWriter holds back the plain text with which http.ServeContent refuses a
// range, for an answer in this API's form.
type contentWriter struct {
	*writer
	refused bool
}

func (w *contentWriter) WriteHeader(status int) {
	if status == http.StatusRequestedRangeNotSatisfiable {
		w.refused = true
		return
	}
	w.writer.WriteHeader(status)
}

func (w *contentWriter) Write(p []byte) (int, error) {
	if w.refused {
		return len(p), nil
	}
	return w.writer.Write(p)
}

// putManifest admits a manifest once everything that it names is durable on as
// many nodes as the site wants.
func (g *Registry) putManifest(c *call) error {
	if err := g.permit(c, actionPush); err != nil {
		return err
	}
	tags, want, err := pushReference(c)
	if err != nil {
		return err
	}
	rests, err := tagCondition(c.r.Header, tags)
	if err != nil {
		return err
	}
	release, err := g.manifestPlace(c)
	if err != nil {
		return err
	}
	defer release()
	data, err := g.readManifest(c)
	if err != nil {
		return err
	}
	d := algorithmOf(want).FromBytes(data)
	if want != "" && want != d {
		return fault.New(fault.Invalid, "the manifest was sent as %s but its digest is %s; it changed on the way, or the client computed it over other bytes", want, d).WithCode(codeDigestInvalid)
	}
	mediaType := c.r.Header.Get("Content-Type")
	doc, err := catalog.ParseManifest(mediaType, data)
	if err != nil {
		return err
	}
	if most := g.settings.MaxLayers.Value(); len(doc.Layers) > most {
		return fault.New(fault.Limit, "the manifest has %d layers and %d are allowed; join layers, or %s", len(doc.Layers), most, raise(nameMaxLayers)).WithCode(codeManifestInvalid)
	}
	copies, settled, err := g.settle(c, doc)
	if err != nil {
		return err
	}
	n := c.route.Name
	push := catalog.Push{
		Project: n.Project, Repository: n.Repository, Digest: d, MediaType: mediaType, Bytes: data,
		Carrier: catalog.Client, Actor: c.who.Name, At: time.Now(), Copies: copies, If: rests,
	}
	for _, push.Tag = range tags {
		if _, err := g.catalog.Put(c.r.Context(), push); err != nil {
			return err
		}
		if want != "" && push.Tag != "" {
			c.w.Header().Add("OCI-Tag", push.Tag)
		}
	}
	if !settled { // the last of the blobs came while the manifest did
		if copies, _, err = g.settle(c, doc); err != nil {
			return err
		}
	}
	h := c.w.Header()
	h.Set("Location", "/v2/"+n.Sent+"/manifests/"+d.String())
	h.Set("Docker-Content-Digest", d.String())
	h.Set(headerCopies, strconv.Itoa(copies))
	if doc.Subject != nil {
		h.Set("OCI-Subject", doc.Subject.Digest.String())
	}
	return c.empty(http.StatusCreated)
}

// algorithmOf gives the algorithm by which a manifest is addressed: that of the
// digest under which it was sent, and sha256 when it was sent under a tag.
func algorithmOf(want digest.Digest) digest.Algorithm {
	if want == "" {
		return digest.Canonical
	}
	return want.Algorithm()
}

// pushReference reads under what a manifest is to be: a tag, or a digest with
// any number of tags in the query. tags has "" for a digest alone.
func pushReference(c *call) (tags []string, want digest.Digest, err error) {
	if !isDigest(c.route.Reference) {
		return []string{c.route.Reference}, "", catalog.CheckTag(c.route.Reference)
	}
	if want, err = parseDigest(c.route.Reference); err != nil {
		return nil, "", err
	}
	tags = c.r.URL.Query()["tag"]
	if len(tags) > maxTags {
		return nil, "", fault.New(fault.Limit, "%d tags are more than the %d that one push may set", len(tags), maxTags).WithCode(codeTooManyTags)
	}
	for _, tag := range tags {
		if err := catalog.CheckTag(tag); err != nil {
			return nil, "", err
		}
	}
	if len(tags) == 0 {
		tags = []string{""}
	}
	return tags, want, nil
}

// readManifest takes in a manifest, and no more than one may have.
func (g *Registry) readManifest(c *call) ([]byte, error) {
	most := g.settings.MaxManifest.Value()
	tooLarge := fault.New(fault.Limit, "the manifest is larger than the %s that this registry takes; push large content as blobs and name them in the manifest, or %s", settings.FormatBytes(most), raise(nameMaxManifest)).WithCode(codeManifestInvalid)
	if c.r.ContentLength > most {
		return nil, tooLarge
	}
	var buffer bytes.Buffer
	if c.r.ContentLength > 0 {
		buffer.Grow(int(c.r.ContentLength) + bytes.MinRead)
	}
	if _, err := buffer.ReadFrom(io.LimitReader(c.r.Body, most+1)); err != nil {
		return nil, c.readFault(err)
	}
	if int64(buffer.Len()) > most {
		return nil, tooLarge
	}
	if buffer.Len() == 0 {
		return nil, fault.New(fault.Invalid, "the manifest is empty").WithCode(codeManifestInvalid)
	}
	return buffer.Bytes(), nil
}

// settle waits until what the manifest names is on as many nodes as the site
// wants. What is not in the repository is left to the catalog to refuse; then
// all is false.
func (g *Registry) settle(c *call, doc catalog.Document) (copies int, all bool, err error) {
	ds, all, err := g.named(c.route.Name, doc)
	if err == nil && !all {
		// The blobs may have been pushed through another node a moment ago.
		if err = g.db.ReadIndex(c.r.Context()); err == nil {
			ds, all, err = g.named(c.route.Name, doc)
		}
	}
	if err != nil {
		return 0, false, err
	}
	copies, err = g.ensure(c.r.Context(), ds)
	return copies, all, err
}

// named lists the blobs that a manifest needs and this repository has, by this
// node's state. Manifests are in the site's map, which is on every node, unless
// they are too large for it: then they have the row of a blob.
func (g *Registry) named(n Name, doc catalog.Document) (ds []digest.Digest, all bool, err error) {
	all = true
	err = g.db.View(func(v *table.View) error {
		for _, b := range doc.Blobs() {
			linked, err := g.records.Linked(v, n.Project, n.Repository, b.Digest)
			if err != nil {
				return err
			}
			if linked {
				ds = append(ds, b.Digest)
			} else if !catalog.Foreign(b.MediaType) {
				all = false
			}
		}
		for _, child := range doc.Children {
			row, ok, err := g.records.Get(v, child.Digest)
			if err != nil {
				return err
			}
			if ok && row.State != blobs.Gone && child.Size > catalog.MaxRow {
				ds = append(ds, child.Digest)
			}
		}
		return nil
	})
	return ds, all, err
}

// deleteManifest removes a tag, or a manifest with all its tags.
func (g *Registry) deleteManifest(c *call) error {
	if err := g.permit(c, actionDelete); err != nil {
		return err
	}
	if err := readable(c.route.Reference); err != nil {
		return err
	}
	n, ctx := c.route.Name, c.r.Context()
	tags := []string{c.route.Reference}
	if isDigest(c.route.Reference) {
		tags = nil
	}
	rests, err := tagCondition(c.r.Header, tags)
	if err != nil {
		return err
	}
	if tags == nil {
		err = g.catalog.DeleteManifest(ctx, n.Project, n.Repository, digest.Digest(c.route.Reference), c.who.Name)
	} else {
		err = g.catalog.DeleteTagIf(ctx, catalog.Tagged{Project: n.Project, Repository: n.Repository, Tag: c.route.Reference}, rests, c.who.Name)
	}
	if err != nil {
		return err
	}
	return c.empty(http.StatusAccepted)
}
