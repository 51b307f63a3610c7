package peers

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/transfer"
)

// tablesKept bounds the piece tables in memory: 32 bytes a piece of 256 KiB, so
// 128 KiB for a blob of 1 GiB. tablesAtOnce bounds the blobs that are read for
// one at the same time, however many are asked for.
const (
	tablesKept   = 64
	tablesAtOnce = 2
)

// pieceTables computes the piece table of blobs that this node holds, each once
// for as long as it is among the last tablesKept asked for. The work belongs to
// run: whoever asked first may leave, the others still get their answer.
type pieceTables struct {
	open    func(digest.Digest) (blobs.File, int64, error)
	work    chan func(context.Context)
	stopped chan struct{}
	slots   chan struct{}

	mu    sync.Mutex
	order []digest.Digest // last asked for at the end
	calls map[digest.Digest]*tableCall
}

type tableCall struct {
	done  chan struct{}
	table transfer.PieceTable
	err   error
}

func newPieceTables(store *blobs.Store) *pieceTables {
	return &pieceTables{
		open: store.OpenBlob, work: make(chan func(context.Context)), stopped: make(chan struct{}),
		slots: make(chan struct{}, tablesAtOnce), calls: map[digest.Digest]*tableCall{},
	}
}

// run does the work until ctx ends. It may be called once.
func (t *pieceTables) run(ctx context.Context) error {
	var working sync.WaitGroup
	defer working.Wait()
	defer close(t.stopped)
	for {
		select {
		case <-ctx.Done():
			return nil
		case do := <-t.work:
			working.Go(func() { do(ctx) })
		}
	}
}

// table gives the piece table of a blob; transfer.ErrNotHeld when this node does
// not hold it. Reading the whole blob can take long; several askers share it.
func (t *pieceTables) table(ctx context.Context, d digest.Digest) (transfer.PieceTable, error) {
	call, begin := t.call(d)
	if begin {
		do := func(ctx context.Context) {
			call.table, call.err = t.compute(ctx, d)
			t.end(d, call)
		}
		select {
		case t.work <- do:
		case <-t.stopped:
			call.err = transfer.ErrStopped
			t.end(d, call)
		case <-ctx.Done(): // run has not begun
			call.err = transfer.ErrStopped
			t.end(d, call)
		}
	}
	select {
	case <-call.done:
		return call.table, call.err
	case <-ctx.Done():
		return transfer.PieceTable{}, ctx.Err()
	}
}

// call finds the computation of a table, under way or done; begin says that there
// was none and that it is for the caller to start it.
func (t *pieceTables) call(d digest.Digest) (call *tableCall, begin bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	call, ok := t.calls[d]
	if !ok {
		call = &tableCall{done: make(chan struct{})}
		t.calls[d] = call
	} else {
		t.order = slices.DeleteFunc(t.order, func(o digest.Digest) bool { return o == d })
	}
	t.order = append(t.order, d)
	if len(t.order) > tablesKept {
		delete(t.calls, t.order[0])
		t.order = slices.Delete(t.order, 0, 1)
	}
	return call, !ok
}

// end tells the askers. A failure is not kept: the next asker tries again.
func (t *pieceTables) end(d digest.Digest, call *tableCall) {
	if call.err != nil {
		t.mu.Lock()
		if t.calls[d] == call {
			delete(t.calls, d)
			t.order = slices.DeleteFunc(t.order, func(o digest.Digest) bool { return o == d })
		}
		t.mu.Unlock()
	}
	close(call.done)
}

func (t *pieceTables) compute(ctx context.Context, d digest.Digest) (transfer.PieceTable, error) {
	select {
	case t.slots <- struct{}{}:
		defer func() { <-t.slots }()
	case <-ctx.Done():
		return transfer.PieceTable{}, transfer.ErrStopped
	}
	file, size, err := t.open(d)
	if fault.Is(err, fault.NotFound) {
		return transfer.PieceTable{}, transfer.ErrNotHeld
	}
	if err != nil {
		return transfer.PieceTable{}, err
	}
	defer file.Close()
	return transfer.HashPieces(until{ctx.Err, file}, size)
}

// until is a reader that ends with an error once ended gives one.
type until struct {
	ended func() error
	from  io.Reader
}

// Read implements io.Reader.
func (u until) Read(p []byte) (int, error) {
	if err := u.ended(); err != nil {
		return 0, err
	}
	return u.from.Read(p)
}

// commitRoot computes the root of a blob that this node holds and commits it to
// the blob's row, for peers to verify pieces against. The store verified the
// digest when it took the blob in.
func (p *Peers) commitRoot(ctx context.Context, d digest.Digest) error {
	table, err := p.tables.table(ctx, d)
	if err != nil {
		return fmt.Errorf("piece table of %s: %w", d, err)
	}
	return p.Records.SetRoot(ctx, d, table.Root())
}
