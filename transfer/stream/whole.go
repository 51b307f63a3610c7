package stream

import (
	"context"
	"fmt"
	"hash"
	"sync/atomic"
	"time"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/plan"
)

// whole is the state of a fetch without a trusted root. Nothing can be verified
// before the end, so the bytes come in order from one sender at a time, and the next
// sender goes on where the last one broke off. When the digest is wrong in the end
// and several had a part in it, nobody can say who lied: then everybody has to send
// it alone, and a wrong digest is proof. Guarded by hunt.turn.
type whole struct {
	hash hash.Hash
	off  int64
	sent map[transfer.Peer]int64
	solo bool
	most atomic.Int64 // of off, ever
}

// wholeDepth is how many pieces are asked of the sender ahead of the one that comes.
const wholeDepth = 16

func newWhole(blob transfer.Blob) *whole {
	w := &whole{hash: blob.Digest.Algorithm().Hash()}
	w.reset()
	return w
}

func (w *whole) reset() {
	w.hash.Reset()
	w.off = 0
	w.sent = make(map[transfer.Peer]int64)
}

// pour takes the rest of the blob from one holder, in its turn, once it has all of it.
func (h *hunt) pour(ctx context.Context, hd *holder, l *link, st state) error {
	h.mu.Lock()
	hd.link, hd.hops = l, 0
	hd.complete = hd.complete || st.held == heldComplete
	complete := hd.complete
	h.mu.Unlock()
	if h.isFinished() {
		h.e.links.part(hd.peer, l)
		return h.bye(l)
	}
	for !complete { // one that is still fetching has to finish first
		k, body, err := h.next(l)
		switch {
		case err != nil:
			return err
		case k == kindBye && h.isFinished():
			return nil
		case k == kindGone:
			return &failure{why: Gone, err: transfer.ErrNotHeld}
		case k == kindComplete:
			complete = true
		case k == kindHops:
			if err := h.told(hd, body); err != nil {
				return err
			}
		case k != kindHave && k != kindHaves && k != kindBeat && k != kindWait:
			return fail(Broken, "frame of kind %d and %d bytes from a holder: %w", k, len(body), errFrame)
		}
	}
	h.mu.Lock()
	hd.complete = true
	h.mu.Unlock()
	select {
	case h.turn <- struct{}{}:
	case <-h.finished:
		return h.bye(l)
	case <-ctx.Done():
		return ctx.Err()
	}
	if h.isFinished() {
		<-h.turn
		return h.bye(l)
	}
	err := h.pourAll(ctx, hd, l)
	<-h.turn
	if err == nil {
		return h.bye(l)
	}
	return err
}

// next reads a frame that is not a piece.
func (h *hunt) next(l *link) (kind, []byte, error) {
	k, n, err := l.header(h.e.cfg.StallTimeout, h.blob.Size)
	if err != nil {
		return 0, nil, err
	}
	body, err := l.body(n, h.e.cfg.StallTimeout)
	return k, body, err
}

// bye waits for the end of the session, which part asks for.
func (h *hunt) bye(l *link) error { return l.drain(h.e.cfg.StallTimeout, h.blob.Size) }

// pourAll asks for the rest, piece by piece and in order.
func (h *hunt) pourAll(ctx context.Context, hd *holder, l *link) error {
	w := h.whole
	if _, mine := w.sent[hd.peer]; w.solo && !mine {
		w.reset()
	}
	buf, err := h.e.buffers.take(ctx)
	if err != nil {
		return err
	}
	defer h.e.buffers.give(buf)
	pieces := transfer.Pieces(h.blob.Size)
	piece := int(w.off / transfer.PieceSize)
	asked, moved, patience := piece, time.Now(), 3*h.e.cfg.StallTimeout
	for piece < pieces {
		var asks []plan.Ask
		held := time.Duration(0)
		for asked < min(pieces, piece+h.depth(hd)) {
			wait, ok := h.mayPour(hd, asked)
			if !ok {
				held = wait
				break
			}
			asks = append(asks, plan.Ask{Piece: asked, Urgent: true}) // which keeps their order
			asked++
		}
		if len(asks) > 0 {
			l.send(func(to []byte) []byte { return appendAsks(to, asks) })
		}
		if asked == piece { // the limit lets nothing in for now
			if !pause(ctx, held) {
				return ctx.Err()
			}
			moved = time.Now()
			continue
		}
		k, n, err := l.header(h.e.cfg.StallTimeout, h.blob.Size)
		if err != nil {
			return err
		}
		switch k {
		case kindPiece:
			h.spend(hd)
			if err := h.pourPiece(hd, l, buf, piece, n); err != nil {
				return err
			}
			piece++
			moved, patience = time.Now(), 3*h.e.cfg.StallTimeout
		case kindBeat, kindWait:
			if k == kindWait {
				patience = limitPatience
			}
			if time.Since(moved) > patience {
				return &failure{why: Stalled, err: errStalled}
			}
		case kindGone:
			return &failure{why: Gone, err: transfer.ErrNotHeld}
		case kindHave, kindHaves, kindComplete: // what it said while it waited for its turn
			if _, err := l.body(n, h.e.cfg.StallTimeout); err != nil {
				return err
			}
		default:
			return fail(Broken, "frame of kind %d instead of piece %d", k, piece)
		}
	}
	return h.weigh()
}

// suppose marks what came without a root, for an attempt that has one. The hunt has
// ended.
func (h *hunt) suppose() error {
	if h.whole == nil {
		return nil
	}
	for i := range transfer.Pieces(h.blob.Size) {
		if off, n := transfer.PieceRange(h.blob.Size, i); off+n > h.whole.off {
			break
		}
		if err := h.a.Suppose(i); err != nil {
			return err
		}
	}
	return nil
}

// depth is how many pieces to have asked of a sender: of one that breaks off soon, one.
func (h *hunt) depth(hd *holder) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	if hd.strikes > 0 {
		return 1
	}
	return wholeDepth
}

// pourPiece takes the next piece.
func (h *hunt) pourPiece(hd *holder, l *link, buf []byte, piece int, length int64) error {
	w := h.whole
	var head [pieceHeader]byte
	if length < pieceHeader {
		return fail(BadSize, "piece frame of %d bytes: %w", length, errFrame)
	}
	if err := l.read(head[:], h.e.cfg.StallTimeout, nil); err != nil {
		return err
	}
	i, n, err := decodePieceHeader(head[:], length, h.blob.Size)
	switch {
	case err != nil:
		return &failure{why: BadSize, err: err}
	case i != piece:
		return fail(Broken, "sent piece %d instead of %d", i, piece)
	}
	data := buf[:n]
	if err := l.read(data, h.e.cfg.StallTimeout, nil); err != nil {
		return err
	}
	if err := h.a.Write(w.off, data); err != nil {
		h.die(err)
		return err
	}
	w.hash.Write(data)
	w.off += n
	w.sent[hd.peer] += n
	w.most.Store(max(w.most.Load(), w.off))
	if h.e.cfg.Meter != nil {
		h.e.cfg.Meter.Received(h.flow(hd), int(n))
	}
	if !w.solo { // else two that break off in turn would go on for ever
		h.mu.Lock()
		hd.strikes = 0
		h.mu.Unlock()
	}
	return nil
}

// weigh verifies the digest of all that has come.
func (h *hunt) weigh() error {
	w := h.whole
	got := fmt.Sprintf("%x", w.hash.Sum(nil))
	if got == h.blob.Digest.Encoded() {
		if h.e.cfg.Hooks.Moved != nil {
			for p, n := range w.sent {
				h.e.cfg.Hooks.Moved(p.ID, n)
			}
		}
		h.finish.Do(func() { close(h.finished) })
		return nil
	}
	alone := len(w.sent) == 1
	w.reset()
	if alone {
		return fail(BadDigest, "sent a blob with the digest %s:%s", h.blob.Digest.Algorithm(), got)
	}
	w.solo = true
	return fail(Broken, "several peers together sent a blob with the digest %s:%s; one of them lies", h.blob.Digest.Algorithm(), got)
}
