package stream

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// failure is why a holder did not deliver.
type failure struct {
	why  Reason
	err  error
	away bool // it cannot be reached, or its connection broke, as when it restarts
}

func (f *failure) Error() string { return string(f.why) + ": " + f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

func fail(why Reason, format string, args ...any) *failure {
	return &failure{why: why, err: fmt.Errorf(format, args...)}
}

var (
	errStalled    = errors.New("no progress within the time allowed")
	errOtherPeer  = errors.New("another node answers at the peer's address")
	errBusy       = errors.New("serves as many as it may; the others have parts of the blob, too")
	errNoProgress = errors.New("still fetching it itself, and offers nothing new")
)

// link is one connection to a peer, on either side. One goroutine reads; frames may be
// sent by any, and one goroutine of the link's own writes them.
type link struct {
	conn net.Conn
	peer string // node id, as the connection proves it; "" when it proves none
	in   *bufio.Reader

	mu   sync.Mutex
	out  []byte // to be written
	wake chan struct{}
	// The writer's: how long a piece takes to be written, and how much may wait in the kernel.
	took   time.Duration
	unsent int
	shut   sync.Once
	done   chan struct{} // closed by close
	// over is there once the next session waits for the end of this one, which closes it; guarded
	// by the links'.
	over chan struct{}
}

func newLink(conn net.Conn) *link {
	l := &link{conn: conn, in: bufio.NewReaderSize(conn, transfer.LeafSize), wake: make(chan struct{}, 1), done: make(chan struct{})}
	if p, ok := conn.(interface{ PeerID() string }); ok {
		l.peer = p.PeerID()
	}
	l.unsent = transfer.UnsentSlow
	transfer.KeepShort(conn, l.unsent)
	return l
}

// close ends the link at once.
func (l *link) close() {
	l.shut.Do(func() {
		close(l.done)
		l.conn.Close()
	})
}

// send queues frames that build appends.
func (l *link) send(build func(to []byte) []byte) {
	l.mu.Lock()
	l.out = build(l.out)
	l.mu.Unlock()
	l.rouse()
}

func (l *link) rouse() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// take is what is queued.
func (l *link) take() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := l.out
	l.out = nil
	return out
}

// writeChunk is how much has to get away within the write timeout.
const writeChunk = 64 << 10

// write writes with a deadline that moves along.
func (l *link) write(b []byte) error {
	for len(b) > 0 {
		n := min(len(b), writeChunk)
		if err := l.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
			return err
		}
		if _, err := l.conn.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// fastPiece is how long a piece takes at most to be written where the wire is fast.
const fastPiece = 100 * time.Millisecond

// longTrip is the round trip above which a path is long.
const longTrip = 20 * time.Millisecond

// paced notes how long a piece took to be written.
func (l *link) paced(bytes int64, took time.Duration) {
	if bytes < transfer.PieceSize {
		return
	}
	if l.took == 0 {
		l.took = took
	}
	l.took += (took - l.took) / 4
	trip := time.Duration(0)
	if path, ok := l.conn.(interface{ RoundTrip() time.Duration }); ok {
		trip = path.RoundTrip()
	}
	if unsent := unsent(l.took, trip); unsent != l.unsent {
		l.unsent = unsent
		transfer.KeepShort(l.conn, unsent)
	}
}

// unsent is how much may wait in the kernel where a piece takes so long to be written. On a long path
// that is what it carries in a round trip: so long takes what is urgent in any case. The kernel asks
// for more only once a third of its room is free, and with less it would have nothing to send
// whenever a packet is lost twice.
func unsent(piece, trip time.Duration) int {
	if piece >= fastPiece {
		return transfer.UnsentSlow
	}
	n := transfer.Unsent
	for trip > longTrip && n < transfer.UnsentLong && time.Duration(2*n)*piece <= transfer.PieceSize*trip {
		n *= 2
	}
	return n
}

// header reads the next frame's head within the timeout; 0: none. The length is within
// what the kind allows for a blob of size bytes.
func (l *link) header(timeout time.Duration, size int64) (k kind, length int64, err error) {
	if err := l.within(timeout); err != nil {
		return 0, 0, err
	}
	var head [frameHeader]byte
	if _, err := io.ReadFull(l.in, head[:]); err != nil {
		return 0, 0, broken(err)
	}
	k, length = kind(head[0]), int64(binary.BigEndian.Uint32(head[1:]))
	most, err := limit(k, size)
	if err != nil {
		return 0, 0, &failure{why: Broken, err: err}
	}
	if length > most {
		return 0, 0, fail(BadSize, "frame of kind %d with %d bytes, %d are possible: %w", k, length, most, errFrame)
	}
	return k, length, nil
}

func (l *link) within(timeout time.Duration) error {
	until := time.Time{}
	if timeout > 0 {
		until = time.Now().Add(timeout)
	}
	if err := l.conn.SetReadDeadline(until); err != nil {
		return broken(err)
	}
	return nil
}

// read fills p. Each 16 KiB, and the end, has to come within the timeout: a peer that
// drips would hold a fetch for days. progress, which may be nil, hears of each.
func (l *link) read(p []byte, timeout time.Duration, progress func()) error {
	for len(p) > 0 {
		if err := l.within(timeout); err != nil {
			return err
		}
		n := min(len(p), transfer.LeafSize)
		if _, err := io.ReadFull(l.in, p[:n]); err != nil {
			return broken(fmt.Errorf("frame broke off: %w", err))
		}
		if progress != nil {
			progress()
		}
		p = p[n:]
	}
	return nil
}

// body reads a small body.
func (l *link) body(length int64, timeout time.Duration) ([]byte, error) {
	b := make([]byte, length)
	return b, l.read(b, timeout, nil)
}

// drain reads frames until the peer says that the session is over.
func (l *link) drain(timeout time.Duration, size int64) error {
	for {
		k, n, err := l.header(timeout, size)
		if err != nil {
			return err
		}
		if k == kindBye {
			return nil
		}
		if err := l.within(timeout); err != nil {
			return err
		}
		if _, err := io.CopyN(io.Discard, l.in, n); err != nil {
			return broken(err)
		}
	}
}

// broken makes a failure of a connection's error: a stall if the time was up.
func broken(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return &failure{why: Stalled, err: errStalled}
	}
	return &failure{Broken, err, true}
}

// links are the connections to holders: those in no session are kept for a while.
type links struct {
	dial func(ctx context.Context, addr string) (net.Conn, error)
	keep int // of one peer

	mu     sync.Mutex
	idle   map[transfer.Peer][]*resting
	ending map[transfer.Peer][]*link // that have said bye, and not heard it yet
	closed bool
}

// resting is a link in no session; it closes by itself.
type resting struct {
	*link
	expiry *time.Timer
}

// idleTimeout after which a connection in no session is closed.
const idleTimeout = time.Minute

// get gives a connection to a peer. One that had sessions before may turn out to be dead; then
// over is not nil, and closed once the last of them has ended.
func (ls *links) get(ctx context.Context, p transfer.Peer) (l *link, over <-chan struct{}, err error) {
	if l, over := ls.kept(p); l != nil {
		return l, over, nil
	}
	conn, err := ls.dial(ctx, p.Addr)
	if err != nil {
		return nil, nil, err
	}
	l = newLink(conn)
	if p.ID != "" && l.peer != "" && l.peer != p.ID {
		l.close()
		return nil, nil, fmt.Errorf("%w: asked for %s, found %s", errOtherPeer, p.ID, l.peer)
	}
	go l.writer()
	return l, nil, nil
}

// kept takes a connection that there is to a peer: one in no session, or one whose session
// is about to end. To open another takes three round trips, and its first bytes go slowly.
func (ls *links) kept(p transfer.Peer) (*link, <-chan struct{}) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for n := len(ls.idle[p]); n > 0; n = len(ls.idle[p]) {
		last := ls.idle[p][n-1]
		if ls.idle[p] = ls.idle[p][:n-1]; n == 1 {
			delete(ls.idle, p)
		}
		if last.expiry.Stop() {
			over := make(chan struct{})
			close(over)
			return last.link, over
		}
	}
	if len(ls.ending[p]) == 0 {
		return nil, nil
	}
	l := ls.ending[p][0] // which has waited for its end the longest
	ls.forget(p, l)
	l.over = make(chan struct{})
	return l, l.over
}

// forget takes a connection out of those whose session is about to end; mu is held.
func (ls *links) forget(p transfer.Peer, l *link) {
	if ls.ending[p] = slices.DeleteFunc(ls.ending[p], func(o *link) bool { return o == l }); len(ls.ending[p]) == 0 {
		delete(ls.ending, p)
	}
}

// part says bye to a holder, once. The next session may say hello at once, see greet.
func (ls *links) part(p transfer.Peer, l *link) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if l.over != nil || slices.Contains(ls.ending[p], l) {
		return
	}
	l.send(func(to []byte) []byte { return frame(to, kindBye) })
	ls.ending[p] = append(ls.ending[p], l)
}

// drop closes a connection.
func (ls *links) drop(p transfer.Peer, l *link) {
	ls.mu.Lock()
	ls.forget(p, l)
	ls.mu.Unlock()
	l.close()
}

// writer writes what is queued until the link is closed.
func (l *link) writer() {
	for {
		select {
		case <-l.wake:
		case <-l.done:
			return
		}
		if out := l.take(); len(out) > 0 {
			if l.write(out) != nil {
				l.close()
				return
			}
		}
	}
}

// put keeps a connection whose session has ended, or leaves it to the next session if
// that has taken it.
func (ls *links) put(p transfer.Peer, l *link) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	ls.forget(p, l)
	if l.over != nil {
		close(l.over)
		l.over = nil
		return
	}
	if ls.closed || len(ls.idle[p]) >= ls.keep {
		l.close()
		return
	}
	ls.idle[p] = append(ls.idle[p], &resting{l, time.AfterFunc(idleTimeout, l.close)})
}

// close closes all that are kept, now and from now on.
func (ls *links) close() {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	ls.closed = true
	for _, rs := range ls.idle {
		for _, r := range rs {
			r.expiry.Stop()
			r.close()
		}
	}
	ls.idle = nil
}

// keptLinks of one peer.
const keptLinks = 4

// release ends a session in which nothing is on its way, and keeps the connection.
func (e *Engine) release(p transfer.Peer, l *link, size int64) {
	e.links.part(p, l)
	select {
	case e.starts <- func(ctx context.Context) {
		stop := context.AfterFunc(ctx, l.close)
		defer stop()
		if l.drain(byeTimeout, size) != nil {
			e.links.drop(p, l)
			return
		}
		e.links.put(p, l)
	}:
	case <-e.stopped:
		e.links.drop(p, l)
	}
}

// open begins a session with a peer: it says hello, and then what more there is to say
// at once, and gets the peer's state. A connection that was kept may have died
// meanwhile, so a new one is tried then.
func (e *Engine) open(ctx context.Context, p transfer.Peer, h hello, more func(to []byte) []byte) (*link, state, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, e.cfg.AskTimeout, errStalled)
	defer cancel()
	for {
		l, over, err := e.links.get(ctx, p)
		if err != nil {
			if errors.Is(context.Cause(ctx), errStalled) {
				return nil, state{}, &failure{Stalled, errStalled, true}
			}
			return nil, state{}, &failure{Broken, err, !errors.Is(err, errOtherPeer)}
		}
		st, err := e.greet(ctx, l, over, h, more)
		if err == nil {
			return l, st, nil
		}
		l.close()
		if over == nil || ctx.Err() != nil {
			return nil, state{}, err
		}
	}
}

// greet says hello and awaits the state. Hello follows the bye of the last session at once: the
// holder reads one after the other. But what it still says of that one is not for this.
func (e *Engine) greet(ctx context.Context, l *link, over <-chan struct{}, h hello, more func(to []byte) []byte) (state, error) {
	stop := context.AfterFunc(ctx, l.close)
	defer stop()
	transfer.Mark(l.conn, h.class)
	l.send(func(to []byte) []byte {
		to = h.append(to)
		if more != nil {
			to = more(to)
		}
		return to
	})
	if over != nil {
		select {
		case <-over:
		case <-l.done:
			return state{}, broken(net.ErrClosed)
		}
	}
	k, n, err := l.header(e.cfg.AskTimeout, h.size)
	if err != nil {
		return state{}, err
	}
	if k != kindState {
		return state{}, fail(Broken, "answered hello with a frame of kind %d: %w", k, errFrame)
	}
	body, err := l.body(n, e.cfg.AskTimeout)
	if err != nil {
		return state{}, err
	}
	st, err := decodeState(body)
	switch {
	case err != nil:
		return state{}, &failure{why: Broken, err: err}
	case !stop():
		return state{}, &failure{why: Stalled, err: errStalled}
	case st.held != heldNothing && st.size != uint64(h.size):
		return state{}, fail(BadSize, "claims a size of %d bytes, the blob has %d", st.size, h.size)
	}
	return st, nil
}
