package stream

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/plan"
)

const (
	// writeTimeout within which a peer must take each 64 KiB.
	writeTimeout = 30 * time.Second
	// helloTimeout after which a connection in no session is closed: longer than the
	// wanter keeps it.
	helloTimeout = 2 * time.Minute
	// maxService is how many pieces are on their way out at once, whoever takes them.
	maxService = 32
	// maxAskers that a node serves a blob of several pieces to at once. The next hear that
	// it is busy, or, while it is still fetching the blob, that it holds nothing.
	maxAskers = 20
	// maxLinks are so many sessions of one node about one blob at once.
	maxLinks = 16
)

// session is one wanter's interest in one blob.
type session struct {
	e      *Engine
	link   *link
	blob   transfer.Blob // without a root
	flight *flight       // nil unless it was arriving when the session began
	far    bool          // the wanter is beyond a slow link

	thin    bool // the wanter has heard that the path is; the writer's
	beat    time.Duration
	limited atomic.Int64 // until when a limit holds it back, since the desk began

	// The desk's.
	offer *offer
	asker *plan.Asker
	class transfer.Class

	mu      sync.Mutex
	turn    *plan.Turn // to be sent
	content transfer.Content
	tabling bool       // the piece table is to be sent first
	early   []plan.Ask // what was asked for meanwhile
}

// Serve serves peers that ln has authenticated until ctx is done or ln is closed, and
// returns when all sessions have ended. Connections are closed when ctx is done.
func (e *Engine) Serve(ctx context.Context, ln net.Listener) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	for {
		conn, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("serving blobs to peers: %w", err)
		}
		if !e.cfg.Conns.Try() {
			e.log.Warn("peer turned away: too many ask for blobs", "peer", conn.RemoteAddr())
			conn.Close()
			continue
		}
		wg.Go(func() {
			defer e.cfg.Conns.Give()
			e.serveConn(ctx, conn)
		})
	}
}

// serveConn serves one connection, session by session.
func (e *Engine) serveConn(ctx context.Context, conn net.Conn) {
	l := newLink(conn)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, l.close)
	defer stop()
	defer l.close()
	for {
		k, n, err := l.header(helloTimeout, 0)
		if err != nil {
			return
		}
		body, err := l.body(n, writeTimeout)
		if err != nil {
			return
		}
		if k != kindHello {
			return
		}
		h, err := decodeHello(body)
		if err != nil {
			e.log.Info("peer's request for a blob makes no sense", "peer", l.peer, "err", err)
			return
		}
		if err := e.session(ctx, l, h); err != nil {
			e.log.Debug("session with a peer ended", "peer", l.peer, "blob", h.digest, "err", err)
			return
		}
	}
}

// session serves one blob until the wanter says bye (nil) or the connection ends.
func (e *Engine) session(ctx context.Context, l *link, h hello) error {
	s := &session{
		e: e, link: l, class: h.class,
		blob: transfer.Blob{Digest: h.digest, Size: h.size},
		far:  e.distance(transfer.Peer{ID: l.peer}) == Farthest,
		beat: min(max(h.patience, 20*time.Millisecond), 10*time.Second),
	}
	transfer.Mark(l.conn, s.class)
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer func() {
		e.desk.leave(s)
		cancel()
		wg.Wait()
		if s.content != nil {
			s.content.Close()
		}
	}()
	wg.Go(func() { s.writer(ctx) })
	if err := s.begin(ctx); err != nil {
		return err
	}
	size := int64(0) // nothing that needs the size is heard before it is known to be true
	if s.offer != nil {
		size = h.size
	}
	tabled := false
	for {
		k, n, err := l.header(0, size)
		if err != nil {
			return err
		}
		body, err := l.body(n, writeTimeout)
		if err != nil {
			return err
		}
		switch {
		case k == kindBye:
			e.desk.leave(s)
			cancel()
			wg.Wait() // a piece that is on its way goes out whole
			return l.write(frame(l.take(), kindBye))
		case s.offer == nil && k != kindHello: // said before the wanter knew
		case k == kindTables && tabled:
			return fmt.Errorf("piece table asked for twice: %w", errFrame)
		case k == kindTables:
			tabled = true
			s.await(true)
			wg.Go(func() { s.table(ctx) })
		default:
			if err := s.hear(k, body); err != nil {
				return err
			}
		}
	}
}

// begin finds out what is held of the blob and tells the wanter.
func (s *session) begin(ctx context.Context) error {
	e, d := s.e, s.blob.Digest
	fl := e.flying(d) // before the look into the source: it may arrive in between
	content, err := e.cfg.Source.Open(ctx, d)
	switch {
	case err == nil && content.Size() != s.blob.Size:
		s.link.send(state{heldComplete, uint64(content.Size())}.append)
		return content.Close()
	case err == nil:
		s.content = content
		if !e.desk.join(s, nil) {
			s.link.send(state{heldBusy, uint64(s.blob.Size)}.append)
		}
		return nil
	case !errors.Is(err, transfer.ErrNotHeld):
		e.log.Error("blob cannot be opened for a peer", "blob", d, "peer", s.link.peer, "err", err)
	case fl != nil && !failed(fl.arrival.Fetch()):
		fl.announced(s.link.peer)
		if size := fl.arrival.Fetch().Blob().Size; size != s.blob.Size {
			s.link.send(state{heldPart, uint64(size)}.append)
			return nil
		}
		s.flight = fl
		if !e.desk.join(s, fl.arrival.Held) {
			s.flight = nil
			break // others have as much
		}
		if fl.arrival.Ended() { // before it could be told
			e.desk.held(d, -1, fl.arrival.Fetch().Progress().Done)
		}
		return nil
	}
	s.link.send(state{held: heldNothing}.append)
	return nil
}

// hear takes a frame from the wanter.
func (s *session) hear(k kind, body []byte) error {
	pieces := transfer.Pieces(s.blob.Size)
	switch k {
	case kindAsk:
		asks, err := decodeAsks(body, pieces)
		if err != nil {
			return err
		}
		return s.ask(asks)
	case kindCancel, kindSkip, kindNeed:
		list, err := decodePieces(body, pieces)
		if err != nil {
			return err
		}
		if k == kindCancel {
			s.forget(list)
		}
		s.e.desk.tell(s, func(a *plan.Asker) {
			for _, i := range list {
				switch k {
				case kindCancel:
					a.Cancel(i)
				case kindSkip:
					a.Hear(plan.Note{Piece: i, Kind: plan.Skip})
				default:
					a.Hear(plan.Note{Piece: i, Kind: plan.Need})
				}
			}
		})
	case kindSkips:
		set, err := transfer.DecodeBitmap(body, pieces)
		if err != nil {
			return err
		}
		s.e.desk.tell(s, func(a *plan.Asker) {
			for i := range pieces {
				if set.Has(i) {
					a.Hear(plan.Note{Piece: i, Kind: plan.Skip})
				}
			}
		})
	case kindClass:
		if len(body) != 1 {
			return errFrame
		}
		s.e.desk.tell(s, func(a *plan.Asker) {
			s.class = min(transfer.Class(body[0]), transfer.Prefetch)
			transfer.Mark(s.link.conn, s.class)
			a.Class(s.class)
		})
	default:
		return fmt.Errorf("frame of kind %d from a wanter: %w", k, errFrame)
	}
	return nil
}

// ask takes what the wanter asks for. While the table is awaited it has to wait: a piece
// that comes before the table cannot be verified.
func (s *session) ask(asks []plan.Ask) error {
	s.mu.Lock()
	if s.tabling {
		s.early = append(s.early, asks...)
		over := len(s.early) > perFrame
		s.mu.Unlock()
		return tooMany(over)
	}
	s.mu.Unlock()
	var refused []int
	asks = s.possible(asks, &refused)
	s.link.send(func(to []byte) []byte { return appendPieces(to, kindRefuse, refused...) })
	over := false
	s.e.desk.tell(s, func(a *plan.Asker) {
		for _, ask := range asks {
			a.Ask(ask)
		}
		over = a.Waiting() > perFrame
	})
	return tooMany(over)
}

func tooMany(over bool) error {
	if over {
		return fmt.Errorf("more than %d pieces asked for at once: %w", perFrame, errFrame)
	}
	return nil
}

// await says whether what is asked for has to wait for the table.
func (s *session) await(table bool) (early []plan.Ask) {
	s.mu.Lock()
	defer s.mu.Unlock()
	early, s.early, s.tabling = s.early, nil, table
	return early
}

// forget takes back what waits for the table.
func (s *session) forget(pieces []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.early = slices.DeleteFunc(s.early, func(a plan.Ask) bool { return slices.Contains(pieces, a.Piece) })
}

// possible leaves out asks for what is not held yet.
func (s *session) possible(asks []plan.Ask, refused *[]int) []plan.Ask {
	if s.flight == nil {
		return asks
	}
	a := s.flight.arrival
	kept := asks[:0]
	for _, ask := range asks {
		if ask.Piece != plan.Any && !a.Holds(ask.Piece) {
			*refused = append(*refused, ask.Piece)
			continue
		}
		kept = append(kept, ask)
	}
	return kept
}

// serve gives the session its turn; the desk holds its lock.
func (s *session) serve(t *plan.Turn) {
	s.mu.Lock()
	s.turn = t
	s.mu.Unlock()
	s.link.rouse()
}

const (
	// slowRead is how long a piece may take to be read before the next is read beside
	// it, of as many as maxReads.
	slowRead = 100 * time.Millisecond
	maxReads = 4
)

// loaded is a piece that was read, in its frame.
type loaded struct {
	turn  *plan.Turn
	buf   []byte // to be given back; nil when ctx was done first
	frame []byte
	bytes int64
	err   error
}

// writer writes what is queued, pieces in their turn, and a sign of life now and then,
// until ctx is done.
func (s *session) writer(ctx context.Context) {
	beat := time.NewTicker(s.beat)
	defer beat.Stop()
	slow := time.NewTimer(time.Hour)
	defer slow.Stop()
	ready := make(chan loaded, maxReads)
	reading := 0
	defer func() {
		for ; reading > 0; reading-- {
			s.unload(<-ready)
		}
	}()
	var last *plan.Turn
	for {
		var err error
		if turn := s.next(); turn != nil {
			last = turn
			reading++
			slow.Reset(slowRead)
			go func() { ready <- s.load(ctx, turn) }() // awaited above
		}
		if out := s.link.take(); len(out) > 0 {
			err = s.link.write(out)
		}
		if err == nil {
			select {
			case <-ctx.Done():
				return
			case <-s.link.wake:
			case l := <-ready:
				reading--
				err = s.send(l)
				s.unload(l)
			case <-slow.C:
				if reading < maxReads {
					s.e.desk.aside(last)
				}
			case <-beat.C:
				sign := kindBeat
				if s.limited.Load() > int64(time.Since(s.e.desk.began)) {
					sign = kindWait
				}
				err = s.link.write(frame(nil, sign))
			}
		}
		if err != nil {
			s.link.close() // ends the reader, which ends the session
			return
		}
	}
}

// next takes the session's turn, if it has one.
func (s *session) next() *plan.Turn {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.turn
	s.turn = nil
	return t
}

// load reads a piece.
func (s *session) load(ctx context.Context, t *plan.Turn) loaded {
	l := loaded{turn: t}
	buf, err := s.e.serving.take(ctx)
	if err != nil {
		l.err = err
		return l
	}
	off, n := transfer.PieceRange(s.blob.Size, t.Piece)
	b := append(buf[:0], byte(kindPiece))
	b = binary.BigEndian.AppendUint32(b, uint32(pieceHeader+n))
	b = binary.BigEndian.AppendUint32(b, uint32(t.Piece))
	head := len(b)
	b = b[:head+int(n)]
	l.buf, l.frame, l.bytes = buf, b, n
	l.err = s.readAt(ctx, b[head:], off)
	return l
}

// unload ends a turn.
func (s *session) unload(l loaded) {
	if l.buf != nil {
		s.e.serving.give(l.buf)
	}
	s.e.desk.done(l.turn)
}

// send sends a piece, or says that it cannot be read.
func (s *session) send(l loaded) error {
	if l.err != nil {
		s.e.log.Error("blob cannot be read for a peer", "blob", s.blob.Digest, "piece", l.turn.Piece, "peer", s.link.peer, "err", l.err)
		return s.link.write(appendPieces(nil, kindRefuse, l.turn.Piece))
	}
	began := time.Now()
	if err := s.link.write(l.frame); err != nil {
		return err
	}
	s.link.paced(l.bytes, time.Since(began))
	if s.e.cfg.Hooks.Served != nil {
		s.e.cfg.Hooks.Served(s.link.peer, l.bytes)
	}
	if s.e.cfg.Meter != nil {
		s.e.cfg.Meter.Sent(s.flow(), int(l.bytes))
	}
	return s.thinness()
}

// thinness tells the wanter once if this connection's path carries little. Who sends
// knows what is lost.
func (s *session) thinness() error {
	path, ok := s.link.conn.(interface{ Thin() bool })
	if !ok || s.thin || s.flight != nil || !path.Thin() {
		return nil
	}
	s.thin = true
	return s.link.write(frame(nil, kindThin))
}

// readAt reads from wherever the bytes are: they may have arrived meanwhile.
func (s *session) readAt(ctx context.Context, p []byte, off int64) error {
	content, err := s.open(ctx)
	if err == nil && content == nil {
		n, err := s.flight.arrival.ReadAt(p, off)
		if n == len(p) {
			return nil
		}
		if !errors.Is(err, fs.ErrClosed) {
			return err
		}
	}
	if content == nil && err == nil { // it has just arrived
		content, err = s.open(ctx)
	}
	switch {
	case err != nil:
		return err
	case content == nil:
		return fs.ErrClosed
	}
	if n, err := content.ReadAt(p, off); n != len(p) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	return nil
}

// open gives the blob's content, also of one that has arrived since the session began;
// nil when it still arrives.
func (s *session) open(ctx context.Context) (transfer.Content, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.content != nil || !s.flight.arrival.Ended() {
		return s.content, nil
	}
	content, err := s.e.cfg.Source.Open(ctx, s.blob.Digest)
	if err != nil {
		return nil, err
	}
	if content.Size() != s.blob.Size {
		return nil, errors.Join(fmt.Errorf("blob has %d bytes and was asked for with %d", content.Size(), s.blob.Size), content.Close())
	}
	s.content = content
	return content, nil
}

// table sends the piece table, once there is one. The first time it may have to be
// computed, which takes as long as reading the blob; meanwhile the session's signs of
// life go on.
func (s *session) table(ctx context.Context) {
	var t transfer.PieceTable
	err := error(transfer.ErrNotHeld)
	if s.flight != nil {
		if table, ok := s.flight.arrival.Fetch().AwaitTable(ctx); ok {
			t, err = table, nil
		}
	}
	if err != nil {
		t, err = s.e.cfg.Source.Pieces(ctx, s.blob.Digest)
	}
	if ctx.Err() != nil {
		return
	}
	var raw []byte
	if err == nil {
		raw, err = t.MarshalBinary()
	}
	if err != nil {
		s.e.log.Error("no piece table for a peer", "blob", s.blob.Digest, "peer", s.link.peer, "err", err)
		s.link.send(func(to []byte) []byte { return frame(to, kindGone) })
		return
	}
	s.link.send(func(to []byte) []byte { return frame(to, kindTable, raw...) })
	_ = s.ask(s.await(false)) // they are not more than a session may ask for
}

// flow is what moves, for a limiter and a meter.
func (s *session) flow() transfer.Flow {
	return transfer.Flow{Blob: s.blob, Peer: s.link.peer, Via: transfer.ViaOf(s.link.conn), Class: s.class, Way: transfer.ByStream}
}
