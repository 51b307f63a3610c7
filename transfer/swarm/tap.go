package swarm

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

const (
	protocol      = "\x13BitTorrent protocol"
	handshakeSize = len(protocol) + 8 + 2*shortSize
	// fastBit, in the last of the reserved bytes, is the one extension that is spoken:
	// BEP 6. pushBit, in the first, says that this end takes what it has not asked for.
	fastBit = 0x04
	pushBit = 0x01

	handshakeTimeout = 10 * time.Second
	// idleTimeout without any message; keep-alives come every minute.
	idleTimeout = 3 * time.Minute
	// writeTimeout within which a peer must take what is written at once, about a chunk.
	writeTimeout = 30 * time.Second
	// heldMost is how long a peer may say that a limit holds it back.
	heldMost = 10 * time.Minute
	// maxAsked chunks that a peer may have asked for and not got: what a wanter asks
	// for at once is less.
	maxRefusals = 64 // in a row
	maxAsked    = 2 * maxWindow * transfer.PieceSize / chunkSize
)

var (
	errLeft     = errors.New("this end closed the connection")
	errFlood    = fmt.Errorf("asks for more than %d chunks at once", maxAsked)
	errStalled  = errors.New("no progress within the time allowed")
	errRejected = errors.New("does not send what it has, after all")
)

// peerAddr stands for an address where the library wants one. It is no IP address, so
// that the library never bans one: many nodes may share it, and who lies is known by
// the certificate.
type peerAddr string

func (peerAddr) Network() string  { return "tcp" }
func (a peerAddr) String() string { return string(a) }

// tap is a connection between this node's BitTorrent and a peer's, over a connection
// of the peer port. The library reads from it and writes to it; the tap looks at every
// message on its way. Nothing reaches the library but well-formed messages that fit
// the blob. What the peer has, offers and sends is this engine's, which asks for pieces
// and puts them together; the library shows what is here, and sends what is asked for.
type tap struct {
	net.Conn
	s        *swarm
	peer     string // node id
	addr     peerAddr
	outgoing bool

	feed chan []byte   // a whole message for the library
	ack  chan struct{} // the library has read it
	wake chan struct{} // something was put in
	cur  []byte        // the reader's own

	refusals int // since the peer last sent something; pump's own

	done   chan struct{}
	ending sync.Once
	err    error // why it ended; set before done is closed

	shaken   atomic.Bool   // the library has read the peer's handshake
	brought  atomic.Bool   // a piece that was wanted, or the rest of one
	progress atomic.Int64  // when bytes of a piece last came, or a limit held them back; Unix nanoseconds
	bytes    atomic.Int64  // when they came
	class    atomic.Uint32 // what the peer wants the blob for
	takes    atomic.Bool   // the peer takes what it has not asked for
	hops     *atomic.Int32 // of the peer's own fetch

	// Of a holder that chooses; swarm.mu guards them.
	choosing bool // the peer knows that it does
	burden   int  // pieces that only this peer got and has not passed on
	turn     int  // when it had its last one

	mu      sync.Mutex
	shown   []byte                // messages that the engine puts before the library
	asks    map[chunk]bool        // what was asked for here and has not come; true: and is not wanted any more
	crossed map[chunk]bool        // of those, what the peer sends unasked, and may send once more
	asked   map[chunk]bool        // what the peer has asked for, or is pushed, and has not got
	have    transfer.Bitmap       // what the peer has
	sent    map[int]struct{}      // pieces that went to the peer, whole or in part
	pushes  map[int]*push         // pieces on their way to it that this node has chosen
	open    bool                  // the peer may ask
	opened  bool                  // the peer may be asked
	chooses bool                  // the peer chooses what it sends
	queue   []chunk               // asked for and not being read yet
	reading int                   // chunks being read, or read and not sent
	inRead  map[chunk]*time.Timer // being read; refuses it when that takes long
	ready   map[chunk]struct{}    // read
	reads   int                   // numbers them
	lined   []line                // of those, what the library does not know of, in order
	showing map[chunk]struct{}    // and what it knows of
	ended   bool
	words   []byte // messages of the engine's own to be sent
	telling bool   // somebody sends them
	greeted bool   // they may be

	wmu   sync.Mutex
	part  []byte // the beginning of a message that the library has not written all of
	shook bool   // its handshake has gone out
}

// newTap makes a tap; pump must run for it to be of use.
func newTap(s *swarm, c net.Conn, peer string, outgoing bool) *tap {
	t := &tap{
		Conn: c, s: s, peer: peer, outgoing: outgoing,
		addr: peerAddr(fmt.Sprintf("%s#%d", peer, s.e.serial.Add(1))),
		feed: make(chan []byte), ack: make(chan struct{}), wake: make(chan struct{}, 1), done: make(chan struct{}),
		asks: make(map[chunk]bool), crossed: make(map[chunk]bool), asked: make(map[chunk]bool), inRead: make(map[chunk]*time.Timer), ready: make(map[chunk]struct{}), showing: make(map[chunk]struct{}),
		hops: new(atomic.Int32), have: transfer.PiecesBitmap(s.shape.pieces), sent: make(map[int]struct{}), pushes: make(map[int]*push),
	}
	t.touch()
	return t
}

// end closes the connection; the first reason counts.
func (t *tap) end(why error) {
	t.ending.Do(func() {
		t.err = why
		close(t.done)
		t.Conn.Close()
	})
}

// Close is the library's way to hang up.
func (t *tap) Close() error {
	t.end(errLeft)
	return nil
}

// wants notes what the peer wants the blob for.
func (t *tap) wants(c transfer.Class) {
	t.class.Store(uint32(c))
	transfer.Mark(t.Conn, c)
}

// flow is what goes out on it.
func (t *tap) flow() transfer.Flow {
	return transfer.Flow{Blob: t.s.blob, Peer: t.peer, Via: transfer.ViaOf(t.Conn), Class: transfer.Class(t.class.Load()), Way: transfer.ByBitTorrent}
}

func (t *tap) touch() {
	now := time.Now().UnixNano()
	t.progress.Store(now)
	t.bytes.Store(now)
}

// excuse notes that a limit of the peer's holds back what it is to bring.
func (t *tap) excuse() {
	if now := time.Now(); now.Sub(time.Unix(0, t.bytes.Load())) < heldMost {
		t.progress.Store(now.UnixNano())
	}
}

func (t *tap) quiet() time.Duration { return time.Since(time.Unix(0, t.progress.Load())) }

func (t *tap) RemoteAddr() net.Addr { return t.addr }
func (t *tap) LocalAddr() net.Addr  { return peerAddr(t.s.e.cfg.Node) }

// The tap sets deadlines itself.
func (t *tap) SetDeadline(time.Time) error      { return nil }
func (t *tap) SetReadDeadline(time.Time) error  { return nil }
func (t *tap) SetWriteDeadline(time.Time) error { return nil }

// ask asks the peer for chunks.
func (t *tap) ask(chunks []chunk) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var words []byte
	for _, c := range chunks {
		t.asks[c] = false
		words = appendChunk(words, msgRequest, c)
	}
	t.tell(words)
}

// owes says whether the peer has not answered yet that a part of the piece is not wanted
// any more: it may not be asked for again before.
func (t *tap) owes(piece int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range t.s.shape.chunksOf(piece) {
		if _, out := t.asks[c]; out {
			return true
		}
	}
	return false
}

// begun says whether a part of a piece that was asked for has come.
func (t *tap) begun(piece int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range t.s.shape.chunksOf(piece) {
		if _, out := t.asks[c]; !out {
			return true
		}
	}
	return false
}

// cancel tells the peer not to send what it has not sent yet of a piece.
func (t *tap) cancel(piece int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var words []byte
	for _, c := range t.s.shape.chunksOf(piece) {
		if cancelled, out := t.asks[c]; out && !cancelled {
			t.asks[c] = true
			words = appendChunk(words, msgCancel, c)
		}
	}
	t.tell(words)
}

// expect notes that a piece comes that was not asked for, or was just now, and then some of
// it may come twice. false: that cannot be.
func (t *tap) expect(piece int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.asks) > maxAsked {
		return false
	}
	for _, c := range t.s.shape.chunksOf(piece) {
		if _, out := t.asks[c]; !out {
			t.asks[c] = false
			continue
		}
		if t.crossed[c] {
			return false
		}
		t.crossed[c] = true
	}
	return true
}

// answered takes a chunk off those that have not come; ours says that it may come.
func (t *tap) answered(c chunk) (cancelled, ours bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	cancelled, ours = t.asks[c]
	delete(t.asks, c)
	if !ours && t.crossed[c] {
		cancelled, ours = true, true
		delete(t.crossed, c)
	}
	return cancelled, ours
}

func (t *tap) wakeUp() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// Read is the library's.
func (t *tap) Read(p []byte) (int, error) {
	for len(t.cur) == 0 {
		n := 0
		if t.shaken.Load() {
			t.mu.Lock()
			n = copy(p, t.shown)
			t.shown = t.shown[:copy(t.shown, t.shown[n:])]
			t.mu.Unlock()
		}
		if n > 0 {
			// A message that did not fit goes on with the next Read, before anything else.
			return n, nil
		}
		select {
		case t.cur = <-t.feed:
		case <-t.wake:
		case <-t.done:
			return 0, t.err
		}
	}
	n := copy(p, t.cur)
	if t.cur = t.cur[n:]; len(t.cur) == 0 {
		t.cur = nil
		select {
		case t.ack <- struct{}{}:
		case <-t.done: // what was read is whole all the same
		}
	}
	return n, nil
}

// pass hands a message to the library and waits until it has been read.
func (t *tap) pass(message []byte) error {
	select {
	case t.feed <- message:
	case <-t.done:
		return t.err
	}
	select {
	case <-t.ack:
		return nil
	case <-t.done:
		return t.err
	}
}

// pump reads what the peer sends until the connection ends. It blocks.
func (t *tap) pump(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { t.end(transfer.ErrStopped) })
	defer stop()
	err := t.shake()
	t.shaken.Store(err == nil)
	t.wakeUp()
	in := bufio.NewReaderSize(t.Conn, 16<<10)
	buf := make([]byte, lengthSize+pieceHead+chunkSize)
	for ignored := 0; err == nil; {
		err = t.next(in, &buf, &ignored)
	}
	t.end(err)
}

// shake checks the peer's handshake and passes it on without any extension but one.
func (t *tap) shake() error {
	_ = t.Conn.SetReadDeadline(time.Now().Add(handshakeTimeout))
	raw := make([]byte, handshakeSize)
	if _, err := io.ReadFull(t.Conn, raw); err != nil {
		return fmt.Errorf("reading a handshake: %w", err)
	}
	reserved := raw[len(protocol) : len(protocol)+8]
	id := peerID(t.peer)
	hash := raw[len(protocol)+8 : len(protocol)+8+shortSize]
	switch {
	case string(raw[:len(protocol)]) != protocol:
		return errors.New("does not speak BitTorrent")
	case string(hash) != string(t.s.hash[:shortSize]):
		return fmt.Errorf("shakes hands for torrent %x instead of %x", hash, t.s.hash[:shortSize])
	case string(raw[len(raw)-shortSize:]) != string(id[:]):
		return errors.New("shakes hands as another peer than its certificate's")
	case reserved[7]&fastBit == 0:
		return errors.New("does not speak the fast extension")
	}
	t.takes.Store(reserved[0]&pushBit != 0)
	clear(reserved)
	reserved[7] = fastBit
	t.s.offer() // the peer is to know before it may ask who chooses
	return t.pass(raw)
}

// next reads one message, tells the engine and passes on what is the library's.
func (t *tap) next(in *bufio.Reader, buf *[]byte, ignored *int) error {
	_ = t.Conn.SetReadDeadline(time.Now().Add(idleTimeout))
	b := *buf
	if _, err := io.ReadFull(in, b[:lengthSize]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(b)
	if n == 0 {
		return nil // keep-alive
	}
	kind, err := in.ReadByte()
	if err != nil {
		return err
	}
	head, err := t.s.shape.header(kind, n)
	if err != nil {
		return &failure{transfer.Broken, err}
	}
	if need := lengthSize + head; need > len(b) {
		b = append(b, make([]byte, need-len(b))...)
		*buf = b
	}
	b[lengthSize] = kind
	if _, err := io.ReadFull(in, b[lengthSize+1:lengthSize+head]); err != nil {
		return err
	}
	m, err := t.s.shape.parse(b[lengthSize:lengthSize+head], n)
	if err != nil {
		return &failure{transfer.Broken, err}
	}
	if m.useless {
		if *ignored++; *ignored > maxIgnoredCount {
			return &failure{transfer.Broken, fmt.Errorf("keeps sending message %d, which nobody asked for", kind)}
		}
		_, err := in.Discard(m.trailing)
		return err
	}
	if kind == msgPiece {
		return t.nextPiece(in, b[:lengthSize+head+m.trailing], m)
	}
	passes, err := t.heard(m)
	if err != nil || !passes {
		return err
	}
	return t.pass(b[:lengthSize+head])
}

// nextPiece reads the bytes of a chunk that was asked for.
func (t *tap) nextPiece(in *bufio.Reader, b []byte, m message) error {
	if _, ours := t.answered(m.chunk); !ours {
		return &failure{transfer.Broken, fmt.Errorf("sends a part of piece %d that was not asked for", m.chunk.piece)}
	}
	if err := t.admit(m.trailing); err != nil {
		return err
	}
	data := b[lengthSize+pieceHead:]
	for at := 0; at < len(data); {
		next := min(at+transfer.LeafSize, len(data))
		if _, err := io.ReadFull(in, data[at:next]); err != nil {
			return err
		}
		at = next
		t.touch()
	}
	t.refusals = 0
	t.s.came(t, m.chunk, data)
	return nil
}

// admit waits until bytes may come in. The peer is not to blame meanwhile.
func (t *tap) admit(n int) error {
	limiter := t.s.e.cfg.Incoming
	for limiter != nil {
		wait := limiter.Take(t.s.inFlow(t.peer), n)
		if wait <= 0 {
			break
		}
		t.touch()
		t.s.crowded(t)
		select {
		case <-time.After(min(wait, max(time.Millisecond, t.s.e.cfg.StallTimeout/4))):
		case <-t.done:
			return t.err
		}
	}
	t.touch()
	return nil
}

// heard takes note of a message and says whether the library should see it.
func (t *tap) heard(m message) (passes bool, err error) {
	switch m.kind {
	case msgHave:
		t.mu.Lock()
		t.have.Add(m.piece)
		t.mu.Unlock()
		t.s.has(t, m.piece)
	case msgBitfield, msgHaveAll:
		t.mu.Lock()
		for i := range t.s.shape.pieces {
			if m.kind == msgHaveAll || m.have.Has(i) {
				t.have.Add(i)
			}
		}
		t.mu.Unlock()
		t.s.hasSome(t)
	case msgHaveNone, msgAllowedFast, msgSuggest:
	case msgChoke, msgUnchoke:
		t.mu.Lock()
		t.opened = m.kind == msgUnchoke
		t.mu.Unlock()
		t.s.told(t)
	case msgChoose:
		t.mu.Lock()
		t.chooses = m.on
		t.mu.Unlock()
		t.s.told(t)
	case msgPush:
		if !t.expect(m.piece) {
			return false, &failure{transfer.Broken, fmt.Errorf("sends piece %d, which is on its way, or too many", m.piece)}
		}
		t.touch()
		t.s.pushedBy(t, m.piece)
	case msgHeld:
		t.excuse()
	case msgHops:
		t.hops.Store(int32(m.hops))
		t.s.stir()
	case msgClass:
		t.wants(m.class)
	case msgRequest:
		return false, t.requested(m.chunk)
	case msgCancel:
		return t.cancelled(m.chunk), nil
	case msgReject:
		cancelled, ours := t.answered(m.chunk)
		if !cancelled {
			t.refusals++
		}
		if !ours || t.refusals > maxRefusals {
			return false, &failure{transfer.Broken, errRejected}
		}
		if cancelled {
			t.s.takenBackBy(t, int(m.chunk.piece))
		} else {
			t.s.refusedBy(t, int(m.chunk.piece))
		}
	default: // interested, not interested
		return true, nil
	}
	return false, nil
}

// requested takes note of what the peer asks for.
func (t *tap) requested(c chunk) error {
	if !t.s.holds(int(c.piece)) {
		return &failure{transfer.Broken, fmt.Errorf("asks for piece %d, which this node does not have", c.piece)}
	}
	t.s.mu.Lock()
	t.s.give(t, int(c.piece))
	if t.choosing {
		t.s.asked = int(c.piece) // who may not choose asks only for what a reader waits for
	}
	t.s.mu.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.pushes[int(c.piece)] != nil:
		return nil // the request and the piece have crossed
	case t.asked[c]:
		return &failure{transfer.Broken, fmt.Errorf("asks for a part of piece %d twice", c.piece)}
	case len(t.asked) >= maxAsked:
		return &failure{transfer.Broken, errFlood}
	}
	t.asked[c] = true
	t.enqueue(c)
	t.serve()
	return nil
}

// cancelled takes note of what the peer wants no more. If the library has not heard
// that it was wanted, the answer to the cancel is due from here.
func (t *tap) cancelled(c chunk) (passes bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.asked[c] {
		return false
	}
	if _, passes = t.showing[c]; passes {
		return true // the library rejects it, and told hears of that
	}
	t.served(c)
	t.unpush(c)
	t.tell(appendReject(nil, c))
	return false
}
