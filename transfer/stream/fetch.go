package stream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// Fetch implements transfer.Mover. It needs Run to be running: it waits for that
// until ctx is done.
func (e *Engine) Fetch(ctx context.Context, blob transfer.Blob, options ...transfer.Option) (*transfer.Fetch, error) {
	if err := blob.Check(); err != nil {
		return nil, err
	}
	blob.Root = bytes.Clone(blob.Root)
	for {
		fl, fresh := e.board(blob, transfer.Chosen(options))
		f := fl.arrival.Fetch()
		if fresh {
			return f, e.launch(ctx, fl)
		}
		if err := same(f.Blob(), blob); err != nil {
			return nil, err
		}
		if !failed(f) {
			return f, nil
		}
		select { // a failed fetch is on its way out: the next one starts afresh
		case <-fl.gone:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// board finds the fetch of the blob that is under way or lists a fresh one.
func (e *Engine) board(blob transfer.Blob, o transfer.Options) (fl *flight, fresh bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if fl := e.fetches[blob.Digest]; fl != nil {
		fl.arrival.Urge(o.Class)
		fl.expect(o)
		if blob.Root != nil && blob.Size == fl.arrival.Fetch().Blob().Size && fl.arrival.Adopt(blob.Root) {
			close(fl.rooted)
		}
		return fl, false
	}
	reopen := func(ctx context.Context) (transfer.Content, error) {
		return e.cfg.Source.Open(ctx, blob.Digest)
	}
	fl = &flight{
		arrival: transfer.NewArrival(blob, reopen), way: o.Way, gone: make(chan struct{}), rooted: make(chan struct{}),
		news: make(chan string, maxAsked),
	}
	fl.arrival.For(o.Class)
	fl.expect(o)
	fl.arrival.OnHold(func(piece int) {
		e.desk.held(blob.Digest, piece, fl.arrival.Fetch().Progress().Done)
	})
	fl.arrival.OnHops(func(hops int) { e.desk.hops(blob.Digest, hops) })
	e.fetches[blob.Digest] = fl
	return fl, true
}

// launch hands a fresh fetch to Run.
func (e *Engine) launch(ctx context.Context, fl *flight) error {
	var err error
	select {
	case e.starts <- func(ctx context.Context) { e.fly(ctx, fl) }:
		return nil
	case <-e.stopped:
		err = transfer.ErrStopped
	case <-ctx.Done():
		err = fmt.Errorf("the blob mover is not running yet: %w", ctx.Err())
	}
	fl.arrival.Fail(err)
	e.leave(fl)
	return err
}

// leave takes a fetch that has ended off the list.
func (e *Engine) leave(fl *flight) {
	e.mu.Lock()
	delete(e.fetches, fl.arrival.Fetch().Blob().Digest)
	e.mu.Unlock()
	close(fl.gone)
}

// same says whether two requests for a digest agree on what they want.
func same(running, wanted transfer.Blob) error {
	if running.Size != wanted.Size {
		return fmt.Errorf("blob %s is being fetched with %d bytes and was asked for with %d; one of the rows is wrong", wanted.Digest, running.Size, wanted.Size)
	}
	if running.Root != nil && wanted.Root != nil && !bytes.Equal(running.Root, wanted.Root) {
		return fmt.Errorf("blob %s is being fetched with piece root %x and was asked for with %x; one of the rows is wrong", wanted.Digest, running.Root, wanted.Root)
	}
	return nil
}

func failed(f *transfer.Fetch) bool {
	select {
	case <-f.Done():
		return !f.Progress().Done
	default:
		return false
	}
}

// fly runs one fetch from its turn to its end.
func (e *Engine) fly(ctx context.Context, fl *flight) {
	a := fl.arrival
	blob := a.Fetch().Blob()
	defer e.leave(fl)
	began := time.Now()
	err := e.move(ctx, fl)
	if err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("blob %s: %w", blob.Digest, transfer.ErrStopped)
		}
		if !a.Ended() {
			a.Fail(err)
		}
		// Whoever waits for the blob is told, and knows whether it is worth a warning.
		e.log.Debug("blob not fetched", "blob", blob.Digest, "bytes", blob.Size, "held", a.Fetch().Progress().Held, "err", err)
	}
	if e.cfg.Hooks.Ended != nil {
		e.cfg.Hooks.Ended(blob.Digest, blob.Size, time.Since(began), err)
	}
}

// move brings a blob here, from wherever it is.
func (e *Engine) move(ctx context.Context, fl *flight) error {
	a := fl.arrival
	blob := a.Fetch().Blob()
	if !e.cfg.Fetches.Try() {
		a.SetHops(transfer.NoHops) // nobody is to wait for one that waits for its turn
		if err := e.cfg.Fetches.Take(ctx); err != nil {
			return err
		}
		a.SetHops(0)
	}
	defer e.cfg.Fetches.Give()
	content, err := e.cfg.Source.Open(ctx, blob.Digest)
	switch {
	case err == nil:
		if content.Size() != blob.Size {
			content.Close()
			return fmt.Errorf("blob %s is here with %d bytes and was asked for with %d", blob.Digest, content.Size(), blob.Size)
		}
		a.Present(content)
		return nil
	case !errors.Is(err, transfer.ErrNotHeld):
		return fmt.Errorf("looking for blob %s here: %w", blob.Digest, err)
	}
	partial, err := e.cfg.Sink.Create(ctx, blob)
	if err != nil {
		return fmt.Errorf("making room for blob %s: %w", blob.Digest, err)
	}
	a.Begin(partial)
	if carrier := e.carrier(blob, fl.way); carrier != nil {
		err := carrier.Carry(ctx, a)
		if err == nil {
			return a.Commit(ctx)
		}
		if !errors.Is(err, transfer.ErrNotCarried) {
			return err
		}
		e.log.Debug("blob goes piece by piece after all", "blob", blob.Digest, "err", err)
	}
	if err := e.hunt(ctx, fl); err != nil {
		return err
	}
	return a.Commit(ctx)
}

// errRooted ends a hunt without a root when there is one.
var errRooted = errors.New("the blob's root has become known")

// hunt brings a blob piece by piece. One whose root becomes known meanwhile goes on by it
// with what has come, and so readers need not wait for the end of all.
func (e *Engine) hunt(ctx context.Context, fl *flight) error {
	if fl.arrival.Fetch().Blob().Root == nil {
		blind, stop := context.WithCancelCause(ctx)
		var watch sync.WaitGroup
		watch.Go(func() {
			select {
			case <-fl.rooted:
				stop(errRooted)
			case <-blind.Done():
			}
		})
		h := newHunt(e, fl)
		err := h.run(blind)
		stop(nil)
		watch.Wait()
		if err == nil {
			return nil
		}
		if err := errors.Join(err, h.suppose()); !errors.Is(context.Cause(blind), errRooted) {
			return err
		}
	}
	return newHunt(e, fl).run(ctx)
}

// carrier is the other way to move a blob, if one was chosen.
func (e *Engine) carrier(blob transfer.Blob, way transfer.Way) transfer.Carrier {
	if e.cfg.Carrier == nil {
		return nil
	}
	return e.cfg.Carrier(blob, way)
}
