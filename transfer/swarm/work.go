package swarm

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// work keeps a connection to one holder until it is dropped or ctx ends; conn is the
// first, on which hello has been said.
func (h *hunt) work(ctx context.Context, hd *holder, conn net.Conn) {
	strikes := 0
	for ctx.Err() == nil {
		var err error
		if conn == nil {
			var all bool
			conn, all, err = h.hello(ctx, hd.peer)
			hd.all.Store(all)
			hd.hops.Store(0)
		}
		delivered := false
		if err == nil {
			delivered, err = h.use(ctx, hd, conn, firstWindow/(1+strikes))
		}
		conn = nil
		if ctx.Err() != nil {
			return
		}
		if delivered {
			strikes = 0
		}
		var f *failure
		if !errors.As(err, &f) {
			f = &failure{transfer.Broken, err}
		}
		strikes++
		if f.why == transfer.Stalled {
			strikes += maxStrikes/2 - 1
		}
		if f.why.Lie() || f.why == transfer.Gone || strikes >= maxStrikes {
			hd.drop(f)
			return
		}
		if !pause(ctx, h.e.cfg.Backoff<<max(0, strikes-1)) {
			return
		}
	}
}

// use takes pieces by a connection until it ends, and says why and whether it has
// brought any. At first it asks for so many at once: what was on its way when a connection
// breaks is lost.
func (h *hunt) use(ctx context.Context, hd *holder, conn net.Conn, window int) (delivered bool, err error) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := h.needTable(ctx, hd, conn); err != nil {
		conn.Close()
		return false, err
	}
	_ = conn.SetDeadline(time.Now().Add(handshakeTimeout))
	if _, err := conn.Write([]byte{askBegin}); err != nil {
		conn.Close()
		return false, because(ctx, err)
	}
	_ = conn.SetDeadline(time.Time{})
	if h.s.ctx().Err() != nil {
		conn.Close()
		return false, transfer.ErrStopped
	}
	t := newTap(h.s, conn, hd.peer.ID, true)
	t.hops = &hd.hops
	t.hops.Store(0)
	h.s.attach(t)
	if !hd.all.Load() {
		window = minWindow
	}
	h.w.join(t, hd.all.Load(), max(1, window))
	select {
	case <-t.done:
	case <-ctx.Done():
		t.end(errLeft)
	}
	return t.brought.Load(), t.err
}

// needTable makes sure that the piece table is known, asking this holder if need be.
func (h *hunt) needTable(ctx context.Context, hd *holder, conn net.Conn) error {
	// One complete holder at a time, since the others would send the same again; but
	// nobody holds the others up for longer than a stall.
	if hd.all.Load() {
		impatient := time.NewTimer(h.e.cfg.StallTimeout)
		defer impatient.Stop()
		select {
		case <-h.known:
			return nil
		case h.turn <- struct{}{}:
			defer func() { <-h.turn }()
		case <-impatient.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	select {
	case <-h.known:
		return nil
	default:
	}
	until := time.Now().Add(tablePatience)
	alive := func() {
		next := time.Now().Add(h.e.cfg.StallTimeout)
		if next.After(until) {
			next = until
		}
		_ = conn.SetDeadline(next)
	}
	alive()
	if _, err := conn.Write([]byte{askTable}); err != nil {
		return because(ctx, err)
	}
	table, err := readTable(conn, h.blob, alive, func(hops int) {
		hd.hops.Store(int32(hops))
		h.stir()
	})
	var slow net.Error
	switch {
	case errors.As(err, &slow) && slow.Timeout():
		return &failure{transfer.Stalled, errStalled}
	case err != nil:
		return because(ctx, err)
	}
	h.learn(table)
	select {
	case <-h.known:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// pause waits for d; false means that ctx was done first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
