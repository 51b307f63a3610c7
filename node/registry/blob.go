package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/catalog"
	"github.com/atoll-registry/atoll/node/fault"
)

// getBlob serves a blob that the repository links: from this node's file, which
// reaches the kernel's sendfile, or from other nodes while it arrives.
func (g *Registry) getBlob(c *call) error {
	d, err := parseDigest(c.route.Reference)
	if err != nil {
		return err
	}
	if err := g.permit(c, actionPull); err != nil {
		return err
	}
	row, err := g.visible(c.r.Context(), c.route.Name, d)
	if err != nil {
		return err
	}
	// Whether it is here a client that pushes must learn, so HEAD asks no gate.
	if c.r.Method != http.MethodHead {
		if err := g.admitBlob(c, c.route.Name, d); err != nil {
			return err
		}
	}
	h := c.w.Header()
	h.Set("Docker-Content-Digest", d.String())
	h.Set("Etag", strconv.Quote(d.String()))
	if unchanged(c.r, d) { // known without the file, which may be on another node
		c.w.WriteHeader(http.StatusNotModified)
		return nil
	}
	if sent, err := g.sendElsewhere(c, d); sent || err != nil {
		return err
	}
	end, err := g.pace(c, d, row)
	if err != nil {
		return err
	}
	defer end()
	h.Set("Content-Type", "application/octet-stream")
	file, err := g.openHeld(d, row)
	switch {
	case err == nil:
		defer file.Close()
		return g.sendHeld(c, d, row, file)
	case !fault.Is(err, fault.NotFound) && !blobs.Unreadable(err):
		return err
	case c.r.Method == http.MethodHead && row.Lost == 0:
		h.Set("Accept-Ranges", "bytes")
		h.Set("Content-Length", strconv.FormatInt(row.Size, 10))
		c.w.WriteHeader(http.StatusOK)
		return nil
	}
	return g.sendRemote(c, d, row)
}

// pace has the answer to a request for more than a small blob keep to what may be
// sent.
func (g *Registry) pace(c *call, d digest.Digest, row blobs.Blob) (end func(), err error) {
	if g.egress == nil || c.r.Method != http.MethodGet || row.Size <= smallBlob {
		return func() {}, nil
	}
	ctx, name := c.r.Context(), c.route.Name
	paced, err := g.egress.Begin(ctx, Outgoing{Digest: d, Size: row.Size, Project: name.Project, Repository: name.Repository, User: c.user(), Client: c.client()})
	if err != nil {
		return nil, err
	}
	c.w.capped = paced.Capped
	c.w.pay = func(n int) error {
		for {
			wait := paced.Take(n)
			if wait <= 0 {
				return nil
			}
			timer := time.NewTimer(wait)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return context.Cause(ctx)
			}
		}
	}
	return paced.End, nil
}

// admitBlob refuses a blob that only manifests name which a gate holds back.
func (g *Registry) admitBlob(c *call, n Name, d digest.Digest) error {
	return g.catalog.AdmitBlob(c.r.Context(), catalog.Pull{Project: n.Project, Repository: n.Repository, Digest: d, Actor: c.who.Name})
}

// unchanged reports whether the request's If-None-Match names the content (RFC
// 9110, section 13.1.2). An entity tag here is a digest in quotes, so that no
// tag has a comma in it.
func unchanged(r *http.Request, d digest.Digest) bool {
	if r.Header["If-None-Match"] == nil || r.Header["If-Match"] != nil {
		return false
	}
	for _, line := range r.Header["If-None-Match"] {
		for tag := range strings.SplitSeq(line, ",") {
			tag = strings.TrimPrefix(strings.TrimSpace(tag), "W/")
			if tag == "*" || tag == strconv.Quote(d.String()) {
				return true
			}
		}
	}
	return false
}

// smallBlob is up to which size, in bytes, a blob is read and sent with its
// header: the kernel's sendfile would be a system call more.
const smallBlob = 4 << 10

// sendSmall serves the whole of a small file.
func (c *call) sendSmall(content io.Reader, size int64) error {
	var data [smallBlob]byte
	if _, err := io.ReadFull(content, data[:size]); err != nil {
		return err
	}
	return c.whole(data[:size])
}

// sendElsewhere sends the client to the object store that holds the blob, when
// that is wanted and there is one. Whoever asks by HEAD is answered here.
func (g *Registry) sendElsewhere(c *call, d digest.Digest) (bool, error) {
	if !g.redirect || c.r.Method != http.MethodGet {
		return false, nil
	}
	to, err := g.store.Redirect(c.r, d)
	if fault.Is(err, fault.NotFound) {
		err = nil // another node may have it
	}
	if to == "" || err != nil {
		return false, err
	}
	c.w.Header().Set("Location", to)
	return true, c.empty(http.StatusTemporaryRedirect)
}

// sendRemote serves a blob that other nodes hold.
func (g *Registry) sendRemote(c *call, d digest.Digest, row blobs.Blob) error {
	content, err := g.openRemote(c, d, row, c.begins(row.Size))
	if err != nil {
		return err
	}
	defer content.Close()
	g.metrics.remote.Inc()
	noted := &notedReader{ReadSeeker: content}
	if err := g.send(c, noted); err != nil {
		if noted.err != nil && c.r.Context().Err() == nil {
			return noted.err
		}
		return err
	}
	return nil
}

// begins is where in content of a size the answer to a request will most likely begin:
// at the first of the ranges that it asks for. http.ServeContent decides.
func (c *call) begins(size int64) int64 {
	list, ok := strings.CutPrefix(c.r.Header.Get("Range"), "bytes=")
	if match := c.r.Header.Get("If-Range"); !ok || match != "" && match != c.w.Header().Get("Etag") {
		return 0
	}
	first, _, _ := strings.Cut(list, ",")
	from, last, ok := strings.Cut(strings.TrimSpace(first), "-")
	at, err := strconv.ParseInt(strings.TrimSpace(from), 10, 64)
	if from == "" {
		if at, err = strconv.ParseInt(strings.TrimSpace(last), 10, 64); at > 0 {
			at = max(size-at, 0)
		}
	}
	if !ok || err != nil || at < 0 || at >= size {
		return 0
	}
	return at
}

// notedReader remembers why reading failed, which http.ServeContent does not say.
type notedReader struct {
	io.ReadSeeker
	err error
}

func (n *notedReader) Read(p []byte) (int, error) {
	got, err := n.ReadSeeker.Read(p)
	if err != nil && err != io.EOF {
		n.err = err
	}
	return got, err
}

// visible gives the row of a blob that a repository links. What is here is
// enough to say yes; a no is confirmed with the leader. A blob that was about to
// be collected is kept, since whoever sees it may rely on it.
func (g *Registry) visible(ctx context.Context, n Name, d digest.Digest) (blobs.Blob, error) {
	var row blobs.Blob
	var seen bool
	read := func(v *table.View) error {
		linked, err := g.records.Linked(v, n.Project, n.Repository, d)
		if err != nil || !linked {
			return err
		}
		row, seen, err = g.records.Get(v, d)
		seen = seen && row.State != blobs.Gone
		return err
	}
	if err := g.db.View(read); err != nil {
		return row, err
	}
	if !seen {
		fresh, err := g.db.Sought(ctx, func(v *table.View) (bool, error) {
			err := read(v)
			return seen, err
		})
		switch {
		case err != nil:
			return row, err
		case !seen && fresh.Stale:
			return row, fault.New(fault.Unavailable, "whether repository %s has blob %s cannot be said: the site has no leader at the moment; try again in a few seconds", n.Sent, d)
		case !seen:
			return row, blobUnknown(n, d)
		}
	}
	if row.State == blobs.Live {
		return row, nil
	}
	return g.records.Revive(ctx, d)
}

func blobUnknown(n Name, d digest.Digest) error {
	return fault.New(fault.NotFound, "repository %s has no blob %s", n.Sent, d).WithCode(codeBlobUnknown)
}

// deleteBlob takes a blob out of the repository's sight. The bytes go later, if
// nothing else needs them. While a manifest of the repository names the blob it
// is refused, which the specification lets a registry do with 405: an image
// that is listed can be pulled.
func (g *Registry) deleteBlob(c *call) error {
	d, err := parseDigest(c.route.Reference)
	if err != nil {
		return err
	}
	if err := g.permit(c, actionDelete); err != nil {
		return err
	}
	n := c.route.Name
	commit, err := g.db.Update(c.r.Context(), func(tx *table.Tx) error {
		linked, err := g.records.Linked(tx, n.Project, n.Repository, d)
		if err != nil {
			return err
		}
		if !linked {
			return blobUnknown(n, d)
		}
		used, err := g.records.Referred(tx, d, n.Project, n.Repository)
		if err != nil {
			return err
		}
		if used {
			return fault.New(fault.Precondition, "a manifest in repository %s needs blob %s; delete that manifest first", n.Sent, d).WithCode(codeUnsupported)
		}
		return g.records.Unlink(tx, n.Project, n.Repository, d)
	})
	if err != nil {
		return err
	}
	if g.teller != nil {
		// Blobs are read without asking the leader; see visible.
		g.teller.Tell(c.r.Context(), commit.Revision)
	}
	return c.empty(http.StatusAccepted)
}

// openRemote opens a blob that this node does not hold, to be read from a byte on. One that is marked lost
// and that nobody gives is unknown, in HEAD too: a client that hears so pushes
// it, which mends every image that needs it. Without the mark it may be back in
// a moment, with a node that restarts.
func (g *Registry) openRemote(c *call, d digest.Digest, row blobs.Blob, from int64) (io.ReadSeekCloser, error) {
	err := error(fault.New(fault.Unavailable, "no node that answers holds blob %s; try again when more nodes of the site are up", d))
	if g.fetcher != nil {
		var content io.ReadSeekCloser
		if content, err = g.fetcher.OpenAt(c.r.Context(), d, row.Size, from); err == nil {
			return content, nil
		}
	}
	if !fault.Is(err, fault.Unavailable) || c.r.Context().Err() != nil {
		return nil, err
	}
	if row.Lost == 0 {
		if g.guardian != nil {
			g.guardian.Suspect(d)
		}
		return nil, err
	}
	fresh, confirming := g.db.Confirmed(c.r.Context(), func(v *table.View) (err error) {
		row, _, err = g.records.Get(v, d)
		return err
	})
	if confirming != nil || fresh.Stale || row.Lost == 0 {
		return nil, err
	}
	return nil, fault.Wrap(err, fault.NotFound, "blob %s is lost: no node that is up holds it; push it again", d).WithCode(codeBlobUnknown)
}

// openHeld opens this node's file of a blob. One of another size is damaged, and
// as good as none.
func (g *Registry) openHeld(d digest.Digest, row blobs.Blob) (blobs.File, error) {
	file, size, err := g.store.OpenBlob(d)
	if err != nil || size == row.Size {
		return file, err
	}
	if g.guardian != nil {
		g.guardian.Unreadable(d, file, fmt.Errorf("its file has %d bytes and not %d", size, row.Size))
	}
	return nil, errors.Join(fault.New(fault.NotFound, "blob %s is damaged on this node", d).WithCode(codeBlobUnknown), file.Close())
}

// sendHeld serves a blob from this node's file. Should the disk fail to read it,
// the blob is quarantined, and what the client still lacks comes from another
// node.
func (g *Registry) sendHeld(c *call, d digest.Digest, row blobs.Blob, file blobs.File) error {
	var err error
	if row.Size <= smallBlob && plain(c.r) {
		err = c.sendSmall(file, row.Size)
		c.w.failed = err
	} else {
		err = g.send(c, file)
	}
	if !blobs.Unreadable(c.w.failed) {
		return err
	}
	if g.guardian != nil {
		g.guardian.Unreadable(d, file, c.w.failed)
	}
	if !c.w.begun() {
		return g.sendRemote(c, d, row)
	}
	first, known := firstByte(c.w)
	promised, lengthErr := strconv.ParseInt(c.w.Header().Get("Content-Length"), 10, 64)
	if !known || lengthErr != nil || g.fetcher == nil {
		return err
	}
	content, openErr := g.openRemote(c, d, row, first+c.w.written)
	if openErr != nil {
		return fmt.Errorf("%w, and not from elsewhere: %w", err, openErr)
	}
	defer content.Close()
	g.metrics.remote.Inc()
	if _, err := content.Seek(first+c.w.written, io.SeekStart); err != nil {
		return err
	}
	_, err = io.CopyN(c.w, content, promised-c.w.written)
	return err
}

// firstByte tells where in the content an answer that has begun starts; false
// when it is in several parts.
func firstByte(w *writer) (at int64, known bool) {
	switch w.status {
	case http.StatusOK:
		return 0, true
	case http.StatusPartialContent:
		n, err := fmt.Sscanf(w.Header().Get("Content-Range"), "bytes %d-", &at)
		return at, n == 1 && err == nil
	}
	return 0, false
}
