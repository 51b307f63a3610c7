package registry

import (
	"bytes"
	"cmp"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/atoll-registry/atoll/node/access"
	"github.com/atoll-registry/atoll/node/fault"
)

const (
	// sendChunk is how much is handed to the kernel between two looks at the
	// clock: with the default of Idle, a client must take about 2 KB/s.
	sendChunk = 256 << 10
	// cappedChunk is the same where a cap may hold it back: a client should not get
	// what it may have in bursts.
	cappedChunk = 64 << 10
	// drainBytes and drainTime bound what is still read of a request that has
	// been refused, so that a client that reads only after writing hears why.
	drainBytes = 128 << 20
	drainTime  = 30 * time.Second
	// buffered is how much of an answer net/http takes without sending it.
	buffered = 2 << 10
	// drainFree is what net/http itself reads of a body that was left.
	drainFree = 256 << 10
)

// call is one request under way.
type call struct {
	w      *writer
	r      *http.Request
	body   *body
	route  Route
	who    access.Principal
	scopes []string // that a token for this request must reach

	// mirrored is the full name that a client of a mirror asked for, while route
	// has that of the upstream's project; "" otherwise.
	mirrored string
}

func newCall(w http.ResponseWriter, r *http.Request, idle time.Duration) *call {
	control := http.NewResponseController(w)
	p := pace{idle: idle, stream: r.ProtoMajor >= 2}
	c := &call{w: &writer{ResponseWriter: w, control: control, pace: p}, r: r}
	if r.Body != nil && r.Body != http.NoBody {
		c.body = &body{inner: r.Body, control: control, pace: p}
		r.Body = c.body
	}
	return c
}

// release leaves no deadline of this request on the connection for the next, and
// one for what net/http still reads of a body that was left. A connection
// without deadlines has none to set.
func (c *call) release() {
	if !c.w.last.IsZero() {
		_ = c.w.control.SetWriteDeadline(time.Time{})
	}
	if c.body != nil && !c.body.ended && !c.body.pace.stream && c.body.pace.idle > 0 {
		_ = c.w.control.SetReadDeadline(time.Now().Add(c.body.pace.idle))
	}
}

// user names who asks, anonymous for nobody in particular.
func (c *call) user() string { return cmp.Or(c.who.Name, "anonymous") }

// client names who asks: USER@ADDRESS.
func (c *call) client() string {
	host, _, err := net.SplitHostPort(c.r.RemoteAddr)
	if err != nil {
		host = c.r.RemoteAddr
	}
	return c.user() + "@" + host
}

// method is a handler with the request method that it answers.
type method struct {
	name   string
	handle func(*Registry, *call) error
}

// handle lets the handler of the request's method answer. That of GET answers
// HEAD too.
func (g *Registry) handle(c *call, all ...method) error {
	names := make([]string, 0, 8)
	for _, m := range all {
		if m.name == c.r.Method || m.name == http.MethodGet && c.r.Method == http.MethodHead {
			return m.handle(g, c)
		}
		names = append(names, m.name)
		if m.name == http.MethodGet {
			names = append(names, http.MethodHead)
		}
	}
	allow := strings.Join(names, ", ")
	c.w.Header().Set("Allow", allow)
	return fault.New(fault.Invalid, "this path takes %s", allow).WithCode(codeMethodInvalid)
}

// empty answers without a body.
func (c *call) empty(status int) error {
	if status != http.StatusNoContent {
		c.w.Header().Set("Content-Length", "0")
	}
	c.w.WriteHeader(status)
	return nil
}

// json answers with a document. A media type that was set stays.
func (c *call) json(status int, value any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	h := c.w.Header()
	if h.Get("Content-Type") == "" {
		h.Set("Content-Type", "application/json; charset=utf-8")
	}
	h.Set("Content-Length", strconv.Itoa(len(data)))
	c.w.WriteHeader(status)
	_, _ = c.w.Write(data) // a failed write means that the client is gone
	return nil
}

// whole answers with content of which no part was asked for.
func (c *call) whole(data []byte) error {
	h := c.w.Header()
	h.Set("Accept-Ranges", "bytes")
	h.Set("Content-Length", strconv.Itoa(len(data)))
	c.w.WriteHeader(http.StatusOK)
	_, _ = c.w.Write(data) // a failed write means that the client is gone
	return nil
}

// refuse sends the answer to a request that may still be sending. The answer
// goes out at once, then what follows is read for a while: a client that is cut
// off while it writes often never reads why.
func (c *call) refuse(status int, answer []byte) {
	unread := c.body != nil && !c.body.ended && !c.body.pace.stream && (c.r.ContentLength < 0 || c.r.ContentLength-c.body.read > drainFree)
	if c.body != nil && c.body.broken != nil && !c.body.pace.stream {
		c.w.Header().Set("Connection", "close") // nothing more can come
		unread = false
	}
	waiting := c.body != nil && c.body.read == 0 && c.r.Header.Get("Expect") != ""
	if !unread || waiting || c.who.Kind == access.Anonymous || c.w.control.EnableFullDuplex() != nil {
		c.w.WriteHeader(status)
		_, _ = c.w.Write(answer) // a failed write means that the client is gone
		return
	}
	c.w.Header().Set("Connection", "close")
	c.w.WriteHeader(status)
	_, _ = c.w.Write(answer)
	if c.w.control.Flush() != nil || c.w.control.SetReadDeadline(time.Now().Add(drainTime)) != nil {
		return
	}
	_, _ = io.CopyN(io.Discard, c.body.inner, drainBytes) // whatever ends it, the connection closes
}

// pace moves a deadline while bytes flow.
type pace struct {
	idle   time.Duration
	stream bool // HTTP/2: an expired deadline ends the stream even if nothing waits on it
	last   time.Time
}

// due says whether the deadline is to be moved, and to when.
func (p *pace) due() (time.Time, bool) {
	now := time.Now()
	if p.idle <= 0 || !p.stream && now.Sub(p.last) < p.idle/8 {
		return time.Time{}, false
	}
	p.last = now
	return now.Add(p.idle), true
}

// body is the request's body. It remembers why reading it failed, which is the
// client's doing: net/http ends the request's context at the same moment, so
// that whoever took the bytes may only know of that.
type body struct {
	inner   io.ReadCloser
	control *http.ResponseController
	pace    pace
	read    int64
	ended   bool // read to its end
	broken  error
}

func (b *body) Read(p []byte) (int, error) {
	if deadline, due := b.pace.due(); due {
		_ = b.control.SetReadDeadline(deadline) // a connection without deadlines has its own
	}
	n, err := b.inner.Read(p)
	b.read += int64(n)
	if err != nil || b.pace.stream {
		// Without this the deadline would end the request while it is worked on.
		_ = b.control.SetReadDeadline(time.Time{})
	}
	switch {
	case err == io.EOF:
		b.ended = true
	case err != nil:
		b.broken = err
	}
	return n, err
}

func (b *body) Close() error { return b.inner.Close() }

// writer notes whether an answer has begun and moves the deadline while it is
// sent. It keeps io.ReaderFrom, so that a file reaches the kernel's sendfile.
type writer struct {
	http.ResponseWriter
	control *http.ResponseController
	pace
	status  int
	written int64
	failed  error // why ReadFrom ended early
	// pay waits until so many bytes of a blob may go; nil: nothing bounds them.
	pay    func(n int) error
	capped func() bool // with pay: whether it may have to wait
	buffer []byte
}

func (w *writer) begun() bool { return w.status != 0 }

func (w *writer) WriteHeader(status int) {
	if w.status == 0 && status >= 200 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *writer) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	if w.stream || w.written+int64(len(p)) > buffered {
		w.move()
	}
	n, err := w.ResponseWriter.Write(p)
	w.written += int64(n)
	w.rest()
	return n, err
}

// ReadFrom sends from src. What is at hand goes out in chunks, each of which
// stays one LimitedReader around what it was given: the only wrapping that
// sendfile sees through. What may still be arriving goes out as it comes, since
// a source that pauses is not a client that does.
func (w *writer) ReadFrom(src io.Reader) (n int64, err error) {
	defer func() { w.failed = err }()
	if w.status == 0 {
		w.status = http.StatusOK
	}
	limited, ok := src.(*io.LimitedReader)
	if ok && !w.stream {
		switch limited.R.(type) {
		case *os.File, *bytes.Reader:
			return w.sendAtHand(limited)
		}
	}
	if w.buffer == nil {
		w.buffer = make([]byte, 32<<10)
	}
	return io.CopyBuffer(stepWriter{w}, src, w.buffer)
}

func (w *writer) sendAtHand(src *io.LimitedReader) (total int64, err error) {
	chunk := &io.LimitedReader{R: src.R}
	for src.N > 0 {
		chunk.N = min(src.N, sendChunk)
		if w.pay != nil {
			if w.capped() {
				chunk.N = min(chunk.N, cappedChunk)
			}
			if err := w.pay(int(chunk.N)); err != nil {
				return total, err
			}
		}
		want := chunk.N
		w.move()
		n, err := io.Copy(w.ResponseWriter, chunk)
		total += n
		w.written += n
		src.N -= want - chunk.N
		if err != nil || n < want {
			return total, err
		}
	}
	return total, nil
}

// stepWriter is a writer without ReadFrom.
type stepWriter struct{ w *writer }

func (s stepWriter) Write(p []byte) (int, error) {
	if s.w.pay != nil {
		if err := s.w.pay(len(p)); err != nil {
			return 0, err
		}
	}
	return s.w.Write(p)
}

func (w *writer) move() {
	if deadline, due := w.due(); due {
		_ = w.control.SetWriteDeadline(deadline) // a connection without deadlines has its own
	}
}

// rest takes the deadline off a stream on which nothing is being written.
func (w *writer) rest() {
	if w.stream {
		_ = w.control.SetWriteDeadline(time.Time{})
	}
}

func (w *writer) Flush() { _ = w.control.Flush() }

func (w *writer) Unwrap() http.ResponseWriter { return w.ResponseWriter }
