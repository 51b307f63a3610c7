package stream

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
)

// failure is why a request to a holder came to nothing.
type failure struct {
	why Reason
	err error
}

func (f *failure) Error() string { return string(f.why) + ": " + f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

func fail(why Reason, format string, args ...any) *failure {
	return &failure{why, fmt.Errorf(format, args...)}
}

var (
	errStalled    = errors.New("no progress within the time allowed")
	errOtherPeer  = errors.New("another node answers at the peer's address")
	errNoProgress = errors.New("still fetching it itself, and offers nothing new")
)

// newClient makes the client over the peer port's connections. A peer is named in
// the URL by id and address, so that connections are kept per peer and a request can
// never reach another node than the one that was meant.
func newClient(cfg Config) *http.Client {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, host string) (net.Conn, error) {
			peer, err := peerOf(host)
			if err != nil {
				return nil, err
			}
			conn, err := cfg.Dial(ctx, peer.Addr)
			if err != nil {
				return nil, err
			}
			if p, ok := conn.(interface{ PeerID() string }); ok && peer.ID != "" && p.PeerID() != peer.ID {
				conn.Close()
				return nil, fmt.Errorf("%w: asked for %s, found %s", errOtherPeer, peer.ID, p.PeerID())
			}
			return conn, nil
		},
		MaxIdleConnsPerHost:    cfg.PerHolder,
		IdleConnTimeout:        time.Minute,
		DisableCompression:     true,
		MaxResponseHeaderBytes: 16 << 10,
		ReadBufferSize:         transfer.LeafSize,
	}
	return &http.Client{
		Transport: transport,
		// A peer that redirects is broken or means harm.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func hostOf(p transfer.Peer) string { return hex.EncodeToString([]byte(p.ID + "\x00" + p.Addr)) }

func peerOf(host string) (transfer.Peer, error) {
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		return transfer.Peer{}, err
	}
	b, err := hex.DecodeString(name)
	if err != nil {
		return transfer.Peer{}, err
	}
	id, addr, _ := strings.Cut(string(b), "\x00")
	return transfer.Peer{ID: id, Addr: addr}, nil
}

func (e *Engine) request(ctx context.Context, method string, p transfer.Peer, d digest.Digest, what string) (*http.Request, error) {
	return http.NewRequestWithContext(ctx, method, "http://"+hostOf(p)+blobPath+d.String()+what, nil)
}

// head asks a peer whether it holds the blob; have is the empty set when the peer is
// still fetching it, nil when it holds it all.
func (e *Engine) head(ctx context.Context, p transfer.Peer, blob transfer.Blob) (have transfer.Bitmap, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, e.cfg.AskTimeout, errStalled)
	defer cancel()
	req, err := e.request(ctx, http.MethodHead, p, blob.Digest, "")
	if err != nil {
		return nil, err
	}
	resp, err := e.client.Do(req)
	if err != nil {
		return nil, because(ctx, err)
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return nil, &failure{Gone, transfer.ErrNotHeld}
	case resp.StatusCode != http.StatusOK:
		return nil, fail(Broken, "answered %s", resp.Status)
	case resp.ContentLength != blob.Size:
		return nil, fail(BadSize, "claims a size of %d bytes, the blob has %d", resp.ContentLength, blob.Size)
	}
	if resp.Header.Get(heldHeader) == heldComplete {
		return nil, nil
	}
	return transfer.PiecesBitmap(transfer.Pieces(blob.Size)), nil
}

// tablePatience bounds how long a peer may take to compute a piece table for the
// first time: it reads the whole blob, and says every now and then that it is at it.
const tablePatience = 10 * time.Minute

// table asks a peer for the piece table and verifies it.
func (e *Engine) table(ctx context.Context, p transfer.Peer, blob transfer.Blob) (transfer.PieceTable, error) {
	ctx, watch := e.watch(ctx)
	defer watch.stop()
	until := time.Now().Add(tablePatience)
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
			if code != http.StatusProcessing || time.Now().After(until) {
				return fmt.Errorf("piece table: told to wait by status %d", code)
			}
			watch.timer.Reset(watch.timeout)
			return nil
		},
	})
	req, err := e.request(ctx, http.MethodGet, p, blob.Digest, "/pieces")
	if err != nil {
		return transfer.PieceTable{}, err
	}
	req.Header.Set(waitHeader, e.waitFor())
	resp, err := e.client.Do(req)
	if err != nil {
		return transfer.PieceTable{}, because(ctx, err)
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return transfer.PieceTable{}, &failure{Gone, transfer.ErrNotHeld}
	case resp.StatusCode != http.StatusOK:
		return transfer.PieceTable{}, fail(Broken, "piece table: answered %s", resp.Status)
	case resp.ContentLength != transfer.TableSize(blob.Size):
		return transfer.PieceTable{}, fail(BadTable, "piece table: %d bytes, want %d", resp.ContentLength, transfer.TableSize(blob.Size))
	}
	raw := make([]byte, resp.ContentLength)
	if err := watch.read(ctx, resp.Body, raw); err != nil {
		return transfer.PieceTable{}, err
	}
	t, err := transfer.DecodePieceTable(raw)
	if err == nil {
		err = t.Verify(blob)
	}
	if err != nil {
		return transfer.PieceTable{}, &failure{BadTable, err}
	}
	return t, nil
}

// more asks a peer that is still fetching for its pieces once there are more than
// n; nil means everything. The peer may answer earlier, after waitFor.
func (e *Engine) more(ctx context.Context, p transfer.Peer, blob transfer.Blob, n int) (transfer.Bitmap, error) {
	ctx, watch := e.watch(ctx)
	defer watch.stop()
	req, err := e.request(ctx, http.MethodGet, p, blob.Digest, "/have?more="+strconv.Itoa(n))
	if err != nil {
		return nil, err
	}
	req.Header.Set(waitHeader, e.waitFor())
	resp, err := e.client.Do(req)
	if err != nil {
		return nil, because(ctx, err)
	}
	defer resp.Body.Close()
	pieces := transfer.Pieces(blob.Size)
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return nil, &failure{Gone, transfer.ErrNotHeld}
	case resp.StatusCode != http.StatusOK:
		return nil, fail(Broken, "pieces held: answered %s", resp.Status)
	case resp.Header.Get(heldHeader) == heldComplete:
		return nil, nil
	case resp.ContentLength != int64((pieces+7)/8):
		return nil, fail(Broken, "pieces held: %d bytes for %d pieces", resp.ContentLength, pieces)
	}
	raw := make([]byte, resp.ContentLength)
	if err := watch.read(ctx, resp.Body, raw); err != nil {
		return nil, err
	}
	have, err := transfer.DecodeBitmap(raw, pieces)
	if err != nil {
		return nil, &failure{Broken, err}
	}
	return have, nil
}

// open asks a peer for the bytes off..off+n-1 and checks everything that can be
// checked before the first byte of them.
func (e *Engine) open(ctx context.Context, p transfer.Peer, blob transfer.Blob, off, n int64) (io.ReadCloser, error) {
	req, err := e.request(ctx, http.MethodGet, p, blob.Digest, "")
	if err != nil {
		return nil, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	resp, err := e.client.Do(req)
	if err != nil {
		return nil, because(ctx, err)
	}
	wanted := fmt.Sprintf("bytes %d-%d/%d", off, off+n-1, blob.Size)
	switch got := resp.Header.Get("Content-Range"); {
	case resp.StatusCode == http.StatusNotFound:
		err = &failure{Gone, transfer.ErrNotHeld}
	case resp.StatusCode != http.StatusPartialContent && resp.StatusCode/100 == 2,
		resp.StatusCode == http.StatusRequestedRangeNotSatisfiable:
		err = fail(BadSize, "asked for %s and got %s", wanted, resp.Status)
	case resp.StatusCode != http.StatusPartialContent:
		err = fail(Broken, "answered %s", resp.Status)
	case got != wanted || resp.ContentLength != n:
		err = fail(BadSize, "asked for %s and got %q with %d bytes", wanted, got, resp.ContentLength)
	default:
		return resp.Body, nil
	}
	resp.Body.Close()
	return nil, err
}

// because makes a failure of a transport's error: a stall if the watch said so.
func because(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), errStalled) {
		return &failure{Stalled, errStalled}
	}
	return &failure{Broken, err}
}

// watchdog ends a request that makes no progress.
type watchdog struct {
	timer   *time.Timer
	cancel  context.CancelCauseFunc
	timeout time.Duration
}

// watch gives a context that ends with errStalled unless progress is made.
func (e *Engine) watch(ctx context.Context) (context.Context, *watchdog) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &watchdog{cancel: cancel, timeout: e.cfg.StallTimeout}
	w.timer = time.AfterFunc(w.timeout, func() { cancel(errStalled) })
	return ctx, w
}

// stop ends the watch and the request.
func (w *watchdog) stop() {
	w.timer.Stop()
	w.cancel(nil)
}

// read fills p; each 16 KiB, and the end, is progress. One byte is not: a peer that
// drips would hold a fetch for days.
func (w *watchdog) read(ctx context.Context, r io.Reader, p []byte) error {
	for len(p) > 0 {
		n := min(len(p), transfer.LeafSize)
		if _, err := io.ReadFull(r, p[:n]); err != nil {
			return because(ctx, fmt.Errorf("answer broke off: %w", err))
		}
		w.timer.Reset(w.timeout)
		p = p[n:]
	}
	return nil
}

// waitFor is how long a peer may keep a request that waits for a change: short
// enough that a peer that answers in time is not taken for a stalled one.
func (e *Engine) waitFor() string {
	return strconv.FormatInt(max(1, (e.cfg.StallTimeout/2).Milliseconds()), 10)
}
