package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
)

const (
	blobPath = "/v1/blob/"
	// heldHeader says of an answer whether the peer holds the whole blob or is
	// still fetching it.
	heldHeader   = "Atoll-Held"
	heldComplete = "complete"
	heldPartial  = "partial"
	// waitHeader is how many milliseconds a request may be kept waiting for a change.
	waitHeader = "Atoll-Wait"
	maxWait    = 30 * time.Second
	// writeTimeout within which a peer must take each 256 KiB.
	writeTimeout = 30 * time.Second
)

// Server makes an HTTP server for the blob service, with the limits that it needs.
// The caller serves the peer port's listener with it and closes it.
func (e *Engine) Server() *http.Server {
	return &http.Server{
		Handler:           e,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    8 << 10,
		ErrorLog:          slog.NewLogLogger(e.log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if p, ok := c.(interface{ PeerID() string }); ok {
				return context.WithValue(ctx, peerKey{}, p.PeerID())
			}
			return ctx
		},
	}
}

// peerKey is the context key of the asking peer's id.
type peerKey struct{}

func (e *Engine) routes() *http.ServeMux {
	mux := http.NewServeMux()
	handle := func(pattern string, h func(http.ResponseWriter, *http.Request, digest.Digest) error) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			d, err := digest.Parse(r.PathValue("digest"))
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			err = h(w, r, d)
			switch {
			case err == nil:
			case errors.Is(err, transfer.ErrNotHeld):
				http.Error(w, err.Error(), http.StatusNotFound)
			default:
				e.log.Error("blob not served", "blob", d, "peer", r.Context().Value(peerKey{}), "err", err)
				http.Error(w, "the node cannot read the blob; its log says why", http.StatusInternalServerError)
			}
		})
	}
	handle("GET "+blobPath+"{digest}", e.serveBlob)
	handle("GET "+blobPath+"{digest}/pieces", e.servePieces)
	handle("GET "+blobPath+"{digest}/have", e.serveHave)
	return mux
}

// serveBlob answers HEAD and GET. What is still arriving is served only by ranges
// that are verified; any other range of it is "not held", as yet.
func (e *Engine) serveBlob(w http.ResponseWriter, r *http.Request, d digest.Digest) error {
	w.Header().Set("Content-Type", "application/octet-stream")
	fl := e.flying(d) // before the look into the source: it may arrive in between
	content, err := e.cfg.Source.Open(r.Context(), d)
	if err == nil {
		defer content.Close()
		w.Header().Set(heldHeader, heldComplete)
		e.send(w, r, io.NewSectionReader(content, 0, content.Size()))
		return nil
	}
	if fl == nil || !errors.Is(err, transfer.ErrNotHeld) {
		return err
	}
	f := fl.arrival.Fetch()
	size := f.Blob().Size
	w.Header().Set(heldHeader, heldPartial)
	if r.Method == http.MethodHead {
		w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
		return nil
	}
	off, n, ok := parseRange(r.Header.Get("Range"), size)
	if !ok || !f.Held(off, n) {
		return fmt.Errorf("this part of blob %s: %w", d, transfer.ErrNotHeld)
	}
	reader := f.Reader(r.Context())
	defer reader.Close()
	e.send(w, r, reader)
	return nil
}

// send answers with a range of the content, with a deadline that moves along.
func (e *Engine) send(w http.ResponseWriter, r *http.Request, content io.ReadSeeker) {
	p := &paced{ReadSeeker: content, control: http.NewResponseController(w)}
	http.ServeContent(w, r, "", time.Time{}, p)
	if p.err != nil && r.Context().Err() == nil {
		e.log.Error("blob cannot be read for a peer", "path", r.URL.Path, "peer", r.Context().Value(peerKey{}), "err", p.err)
	}
	if e.cfg.Hooks.Served != nil && p.bytes > 0 {
		peer, _ := r.Context().Value(peerKey{}).(string)
		e.cfg.Hooks.Served(peer, p.bytes)
	}
}

// paced gives the peer a while for what has been read, then reads on.
type paced struct {
	io.ReadSeeker
	control *http.ResponseController
	bytes   int64
	ahead   int
	err     error
}

func (p *paced) Read(b []byte) (int, error) {
	if p.ahead <= 0 {
		p.ahead = transfer.PieceSize
		// Not every writer has deadlines; a listener without them is a test's.
		_ = p.control.SetWriteDeadline(time.Now().Add(writeTimeout))
	}
	n, err := p.ReadSeeker.Read(b)
	p.ahead -= n
	p.bytes += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		p.err = err
	}
	return n, err
}

// servePieces answers with the piece table; of a blob that is arriving, once there
// is one.
func (e *Engine) servePieces(w http.ResponseWriter, r *http.Request, d digest.Digest) error {
	fl := e.flying(d)
	t, err := e.pieces(w, r, d)
	held := heldComplete
	if fl != nil && errors.Is(err, transfer.ErrNotHeld) {
		held = heldPartial
		ctx, cancel := context.WithTimeout(r.Context(), patience(r))
		defer cancel()
		table, ok := fl.arrival.Fetch().AwaitTable(ctx)
		if !ok {
			return fmt.Errorf("piece table of blob %s: %w", d, err)
		}
		t, err = table, nil
	}
	if err != nil {
		return err
	}
	raw, err := t.MarshalBinary()
	if err != nil {
		return err
	}
	answer(w, held, raw)
	return nil
}

// pieces gets the table of a blob that is held. The first time it has to be
// computed, which takes as long as reading the blob: meanwhile the peer hears that
// this node is at it.
func (e *Engine) pieces(w http.ResponseWriter, r *http.Request, d digest.Digest) (transfer.PieceTable, error) {
	type result struct {
		table transfer.PieceTable
		err   error
	}
	done := make(chan result, 1)
	go func() { // ends before this function does
		t, err := e.cfg.Source.Pieces(r.Context(), d)
		done <- result{t, err}
	}()
	tick := time.NewTicker(max(time.Millisecond, patience(r)))
	defer tick.Stop()
	for {
		select {
		case res := <-done:
			return res.table, res.err
		case <-tick.C:
			if patience(r) > 0 && r.Context().Err() == nil {
				_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(maxWait + writeTimeout))
				w.WriteHeader(http.StatusProcessing)
			}
		}
	}
}

// serveHave answers with the set of pieces held, once there are more than asked.
func (e *Engine) serveHave(w http.ResponseWriter, r *http.Request, d digest.Digest) error {
	n, err := strconv.Atoi(r.URL.Query().Get("more"))
	if err != nil {
		n = -1
	}
	if fl := e.flying(d); fl != nil {
		f := fl.arrival.Fetch()
		ctx, cancel := context.WithTimeout(r.Context(), patience(r))
		defer cancel()
		held, err := f.More(ctx, n)
		if err != nil {
			return fmt.Errorf("blob %s: %w: the fetch here failed", d, transfer.ErrNotHeld)
		}
		if !f.Progress().Done {
			answer(w, heldPartial, held)
			return nil
		}
	}
	content, err := e.cfg.Source.Open(r.Context(), d)
	if err != nil {
		return err
	}
	answer(w, heldComplete, nil)
	return content.Close()
}

func answer(w http.ResponseWriter, held string, body []byte) {
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.Header().Set(heldHeader, held)
	_, _ = w.Write(body) // a peer that left needs no answer
}

// patience is how long the peer lets this node wait for a change.
func patience(r *http.Request) time.Duration {
	ms, err := strconv.ParseUint(r.Header.Get(waitHeader), 10, 31)
	if err != nil {
		return 0
	}
	return min(time.Duration(ms)*time.Millisecond, maxWait)
}

// parseRange reads the one form that this engine sends, "bytes=first-last".
func parseRange(s string, size int64) (off, n int64, ok bool) {
	spec, found := strings.CutPrefix(s, "bytes=")
	first, last, dash := strings.Cut(spec, "-")
	if !found || !dash {
		return 0, 0, false
	}
	a, err1 := strconv.ParseUint(first, 10, 63)
	b, err2 := strconv.ParseUint(last, 10, 63)
	if err1 != nil || err2 != nil || b < a || int64(b) >= size {
		return 0, 0, false
	}
	return int64(a), int64(b-a) + 1, true
}
