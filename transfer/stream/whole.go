package stream

import (
	"context"
	"fmt"
	"hash"

	"github.com/atoll-registry/atoll/transfer"
)

// whole is the state of a fetch without a trusted root. Nothing can be verified
// before the end, so the bytes come in order from one sender at a time, and the next
// sender goes on where the last one broke off. When the digest is wrong in the end
// and several had a part in it, nobody can say who lied: then everybody has to send
// it alone, and a wrong digest is proof. Guarded by hunt.turn.
type whole struct {
	hash hash.Hash
	off  int64
	sent map[*holder]int64
	solo bool
}

func newWhole(blob transfer.Blob) *whole {
	w := &whole{hash: blob.Digest.Algorithm().Hash()}
	w.reset()
	return w
}

func (w *whole) reset() {
	w.hash.Reset()
	w.off = 0
	w.sent = make(map[*holder]int64)
}

// stream works with one holder of a blob without a root until it is dropped, the
// blob is here or ctx ends.
func (h *hunt) stream(ctx context.Context, hd *holder) {
	h.follow(ctx, hd) // one that is still fetching has to finish first
	for ctx.Err() == nil && hd.isComplete() {
		select {
		case h.turn <- struct{}{}:
		case <-ctx.Done():
			return
		}
		epoch := hd.era()
		err := h.pour(ctx, hd)
		<-h.turn
		if err == nil || !h.failed(ctx, hd, epoch, err) {
			return
		}
	}
}

// pour takes the rest of the blob from one holder.
func (h *hunt) pour(ctx context.Context, hd *holder) error {
	select {
	case <-h.finished:
		return nil
	default:
	}
	w := h.whole
	if _, mine := w.sent[hd]; w.solo && !mine {
		w.reset()
	}
	buf, err := h.e.buffers.take(ctx)
	if err != nil {
		return err
	}
	defer h.e.buffers.give(buf)
	ctx, watch := h.e.watch(ctx)
	defer watch.stop()
	body, err := h.e.open(ctx, hd.peer, h.blob, w.off, h.blob.Size-w.off)
	if err != nil {
		return err
	}
	defer body.Close()
	for w.off < h.blob.Size {
		data := buf[:min(transfer.PieceSize, h.blob.Size-w.off)]
		if err := watch.read(ctx, body, data); err != nil {
			return err
		}
		if err := h.a.Write(w.off, data); err != nil {
			h.die(err)
			return err
		}
		w.hash.Write(data)
		w.off += int64(len(data))
		w.sent[hd] += int64(len(data))
		if !w.solo { // else two that break off in turn would go on for ever
			hd.delivered()
		}
	}
	return h.weigh()
}

// weigh verifies the digest of all that has come.
func (h *hunt) weigh() error {
	w := h.whole
	got := fmt.Sprintf("%x", w.hash.Sum(nil))
	if got == h.blob.Digest.Encoded() {
		if h.e.cfg.Hooks.Moved != nil {
			for hd, n := range w.sent {
				h.e.cfg.Hooks.Moved(hd.peer.ID, n)
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
