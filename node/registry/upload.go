package registry

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/node/telemetry"
)

// headerForwarded is on a request that a node passed on to the owner of an upload
// session, and names that node: it is not passed on again.
const headerForwarded = "Atoll-Forwarded"

// startUpload opens an upload session, or does without one: by mounting a blob
// that is here already, or by taking the whole blob in at once.
func (g *Registry) startUpload(c *call) error {
	q := c.r.URL.Query()
	algorithm, err := uploadAlgorithm(q)
	if err != nil {
		return err
	}
	if q.Has("mount") {
		d, err := parseDigest(q.Get("mount"))
		if err != nil {
			return err
		}
		from, fromErr := ParseName(q.Get("from"))
		if fromErr == nil {
			c.scopes = []string{scopeOf(from, actionPull)}
		}
		if err := g.permit(c, actionPush); err != nil {
			return err
		}
		if fromErr == nil || q.Get("from") == "" { // else it is nowhere, and the upload begins
			mounted, err := g.mount(c, from, d)
			if err != nil || mounted {
				return err
			}
		}
	} else if err := g.permit(c, actionPush); err != nil {
		return err
	}
	if q.Has("digest") {
		return g.uploadWhole(c, q.Get("digest"))
	}
	u, err := g.newUpload(c)
	if err != nil {
		return err
	}
	u.Expect(algorithm)
	return g.answerSession(c, u, http.StatusAccepted)
}

// uploadAlgorithm reads by which algorithm the client will name the blob, which
// saves reading it again. Clients that do not say it mean sha256.
func uploadAlgorithm(q url.Values) (digest.Algorithm, error) {
	if !q.Has("digest-algorithm") {
		return digest.Canonical, nil
	}
	algorithm, err := entry.ParseAlgorithm(q.Get("digest-algorithm"))
	if err != nil {
		return "", fault.Wrap(err, fault.Invalid, "%.40q is not a digest algorithm that is taken; use sha256 or sha512", q.Get("digest-algorithm")).WithCode(codeDigestInvalid)
	}
	return algorithm, nil
}

// uploadWhole takes a blob in with the request that names it.
func (g *Registry) uploadWhole(c *call, want string) error {
	d, err := blobDigest(want)
	if err != nil {
		return err
	}
	u, err := g.newUpload(c)
	if err != nil {
		return err
	}
	u.Expect(d.Algorithm())
	if _, err := g.take(c, u); err != nil {
		g.uploads.drop(who(c.who), u.ID())
		return errors.Join(err, u.Cancel()) // no client can know the session
	}
	return g.commit(c, u, d)
}

// blobDigest reads the digest under which a client wants a blob stored.
func blobDigest(s string) (digest.Digest, error) {
	if s == "" {
		return "", fault.New(fault.Invalid, "the blob's digest is missing; send it as the query parameter digest").WithCode(codeDigestInvalid)
	}
	return parseDigest(s)
}

// session finds the upload session of a request. A session of another node is
// passed on to it, after which there is nothing left to do: the session is nil.
func (g *Registry) session(c *call) (*blobs.Upload, error) {
	if err := g.permit(c, actionPush); err != nil {
		return nil, err
	}
	reference := c.route.Reference
	cut := strings.LastIndexByte(reference, '-')
	if cut <= 0 || len(reference) > maxSession {
		return nil, uploadUnknown(reference)
	}
	if node := reference[:cut]; node != g.node {
		return nil, g.forward(c, node)
	}
	u, err := g.store.Upload(reference[cut+1:])
	if err == nil {
		g.uploads.hold(who(c.who), u.ID()) // it may be of an earlier process
	}
	return u, err
}

func uploadUnknown(id string) error {
	return fault.New(fault.NotFound, "there is no upload %.80q; start it again", id).WithCode(codeUploadUnknown)
}

// forward has the owner of a session answer. When it is down its sessions are
// as good as lost to the client, which starts again through a node that is up.
func (g *Registry) forward(c *call, node string) error {
	if g.forwarder == nil || c.r.Header.Get(headerForwarded) != "" {
		return uploadUnknown(c.route.Reference)
	}
	g.metrics.forwarded.Inc()
	r := c.r.Clone(access.WithPrincipal(c.r.Context(), c.who))
	r.Header.Set(headerForwarded, g.node)
	r.Header.Set(telemetry.RequestIDHeader, telemetry.RequestID(r.Context()))
	// The owner sets these again.
	kept := c.w.Header().Clone()
	clear(c.w.Header())
	err := g.forwarder.Forward(node, c.w, r)
	if err == nil || c.w.begun() {
		return err
	}
	for name, values := range kept {
		c.w.Header()[name] = values
	}
	if c.r.Context().Err() != nil {
		return err
	}
	return fault.Wrap(err, fault.NotFound, "upload %.80q is on a node that does not answer; start it again", c.route.Reference).WithCode(codeUploadUnknown)
}

// uploadStatus tells how much of an upload is here.
func (g *Registry) uploadStatus(c *call) error {
	u, err := g.session(c)
	if err != nil || u == nil {
		return err
	}
	return g.answerSession(c, u, http.StatusNoContent)
}

// cancelUpload ends a session and frees its space.
func (g *Registry) cancelUpload(c *call) error {
	u, err := g.session(c)
	if err != nil || u == nil {
		return err
	}
	if err := u.Cancel(); err != nil {
		return err
	}
	g.uploads.drop(who(c.who), u.ID())
	return c.empty(http.StatusNoContent)
}

// patchUpload takes in a piece of a blob.
func (g *Registry) patchUpload(c *call) error {
	u, err := g.session(c)
	if err != nil || u == nil {
		return err
	}
	if _, err := g.take(c, u); err != nil {
		return err
	}
	return g.answerSession(c, u, http.StatusAccepted)
}

// finishUpload takes in the last piece, if there is one, and ends the session.
func (g *Registry) finishUpload(c *call) error {
	u, err := g.session(c)
	if err != nil || u == nil {
		return err
	}
	d, err := blobDigest(c.r.URL.Query().Get("digest"))
	if err != nil {
		return err
	}
	if c.body != nil || c.r.Header.Get("Content-Range") != "" {
		if _, err := g.take(c, u); err != nil {
			return err
		}
	}
	return g.commit(c, u, d)
}

// take appends the request's body to a session. A piece that says where it
// belongs must belong at the end of what is here.
func (g *Registry) take(c *call, u *blobs.Upload) (int64, error) {
	at, length := int64(-1), int64(-1)
	if s := c.r.Header.Get("Content-Range"); s != "" {
		var err error
		if at, length, err = parseContentRange(s); err != nil {
			return 0, err
		}
		if c.r.ContentLength >= 0 && c.r.ContentLength != length {
			return 0, fault.New(fault.Invalid, "the Content-Range %.60q has %d bytes but the Content-Length is %d", s, length, c.r.ContentLength).WithCode(codeSizeInvalid)
		}
	}
	if size := u.Size(); at >= 0 && at != size {
		return 0, g.outOfOrder(c, u, at)
	}
	var source io.Reader = c.r.Body
	if length >= 0 {
		source = io.LimitReader(source, length)
	}
	in, done := g.intake(c, u, source)
	defer done()
	if in.announced(max(length, c.r.ContentLength)) {
		return 0, g.tooLarge(c, u)
	}
	n, err := u.Append(c.r.Context(), in, at)
	if in.over {
		return 0, g.tooLarge(c, u)
	}
	if err != nil {
		if at >= 0 && at != u.Size()-n && !fault.Is(err, fault.NotFound) {
			return 0, g.outOfOrder(c, u, at) // another request was faster
		}
		return n, c.readFault(err)
	}
	if length >= 0 && n != length {
		return n, fault.New(fault.Invalid, "the piece has %d bytes, not the %d of its Content-Range; they are kept, go on after them", n, length).WithCode(codeSizeInvalid)
	}
	return n, nil
}

// outOfOrder tells where an upload stands to a client that is elsewhere.
func (g *Registry) outOfOrder(c *call, u *blobs.Upload, at int64) error {
	size := u.Size()
	g.describe(c, u)
	return fault.New(fault.Invalid, "the upload has %d bytes, so the next piece begins at %d, not at %d", size, size, at).
		WithCode(codeRangeInvalid).WithDetail(blobs.Offset{Offset: size})
}

// parseContentRange reads the <start>-<end> of OCI Distribution 1.1, "Pushing a
// blob in chunks", both inclusive. The form of RFC 9110, "bytes <start>-<end>/*",
// is taken too, as some clients send it.
func parseContentRange(s string) (start, length int64, err error) {
	bad := func() (int64, int64, error) {
		return 0, 0, fault.New(fault.Invalid, "the Content-Range %.60q must be <first byte>-<last byte>", s).WithCode(codeUploadInvalid)
	}
	plain := strings.TrimPrefix(s, "bytes ")
	if plain != s {
		plain, _, _ = strings.Cut(plain, "/")
	}
	first, last, ok := strings.Cut(plain, "-")
	if !ok {
		return bad()
	}
	from, err := strconv.ParseUint(first, 10, 62)
	if err != nil {
		return bad()
	}
	to, err := strconv.ParseUint(last, 10, 62)
	if err != nil || to < from {
		return bad()
	}
	return int64(from), int64(to-from) + 1, nil
}

// commit ends a session: the blob is durable here, recorded and linked when the
// answer goes out.
func (g *Registry) commit(c *call, u *blobs.Upload, d digest.Digest) error {
	// Nothing may unlink the file between its arrival and its row.
	release := g.store.Pin(d)
	defer release()
	info, err := u.Commit(c.r.Context(), d)
	g.uploads.drop(who(c.who), u.ID())
	if err != nil {
		g.metrics.uploads.WithLabelValues("refused").Inc()
		return err
	}
	n := c.route.Name
	if err := g.records.Add(c.r.Context(), n.Project, n.Repository, info); err != nil {
		return fmt.Errorf("record blob %s in %s: %w", d, n.Full(), err)
	}
	g.metrics.uploads.WithLabelValues("stored").Inc()
	g.copyLater(d)
	return g.answerBlob(c, d)
}

// answerBlob says that a blob is in the repository, and where.
func (g *Registry) answerBlob(c *call, d digest.Digest) error {
	h := c.w.Header()
	h.Set("Location", "/v2/"+c.route.Name.Sent+"/blobs/"+d.String())
	h.Set("Docker-Content-Digest", d.String())
	return c.empty(http.StatusCreated)
}

// answerSession says where an upload stands.
func (g *Registry) answerSession(c *call, u *blobs.Upload, status int) error {
	g.describe(c, u)
	return c.empty(status)
}

// describe sets the headers by which a client goes on with an upload. An empty
// one has the range 0-0, as one with a single byte has: the header has no other
// way to say it.
func (g *Registry) describe(c *call, u *blobs.Upload) {
	id := g.node + "-" + u.ID()
	h := c.w.Header()
	h.Set("Location", "/v2/"+c.route.Name.Sent+"/blobs/uploads/"+url.PathEscape(id))
	h.Set("Range", "0-"+strconv.FormatInt(max(u.Size()-1, 0), 10))
	h.Set("Docker-Upload-Uuid", id)
}
