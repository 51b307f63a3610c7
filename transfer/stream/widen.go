package stream

import (
	"context"
	"errors"
	"slices"
)

// wide is how many connections a fetch has to one holder whose path is long and lossy
// and whose system has nothing better: eight carry some seven times what one does.
const wide = 16

// widen opens more connections to a holder that has everything. For the planner each is
// a holder of its own, for all else they are one node: they take one place among those
// traded with, and a lie over one of them ends all.
func (h *hunt) widen(ctx context.Context, main *holder) {
	if main.main != nil || h.want == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if !main.complete || h.want.Left() < wide || h.isFinished() {
		return
	}
	have := 1
	for _, hd := range h.dealing {
		if hd.main == main {
			have++
		}
	}
	for ; have < wide; have++ {
		hd := &holder{peer: main.peer, far: main.far, complete: true, main: main}
		h.dealing = append(h.dealing, hd)
		h.wg.Go(func() { h.dealBeside(ctx, hd) })
	}
}

// dealBeside trades over one more connection until that ends.
func (h *hunt) dealBeside(ctx context.Context, hd *holder) {
	l, st, err := h.e.open(ctx, hd.peer, h.hello(hd.peer), nil)
	if err == nil && st.held != heldComplete {
		h.e.release(hd.peer, l, h.blob.Size)
		err = errBusy
	} else if err == nil {
		if err = h.session(ctx, hd, l, st); err == nil {
			h.e.links.put(hd.peer, l)
		} else {
			h.e.links.drop(hd.peer, l)
		}
		h.disengage(hd)
	}
	h.mu.Lock()
	h.dealing = slices.DeleteFunc(h.dealing, func(o *holder) bool { return o == hd })
	if hd.planned != nil {
		h.want.Leave(hd.planned)
	}
	var f *failure
	if errors.As(err, &f) && f.why.Lie() && hd.main.betrayed == nil {
		hd.main.betrayed = f
		if hd.main.link != nil {
			hd.main.link.close()
		}
	}
	h.mu.Unlock()
	h.pump()
}
