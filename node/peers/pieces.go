package peers

import (
	"context"
	"fmt"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/transfer"
)

// tablesKept bounds the piece tables in memory: 32 bytes a piece of 256 KiB, so
// 128 KiB for a blob of 1 GiB.
const tablesKept = 64

// pieceTables computes the piece table of blobs that this node holds, each once
// for as long as it is among the last tablesKept asked for.
type pieceTables struct {
	store *blobs.Store

	mu    sync.Mutex
	order []digest.Digest // oldest first
	calls map[digest.Digest]*tableCall
}

type tableCall struct {
	done  chan struct{}
	table transfer.PieceTable
	err   error
}

func newPieceTables(store *blobs.Store) *pieceTables {
	return &pieceTables{store: store, calls: map[digest.Digest]*tableCall{}}
}

// table gives the piece table of a blob; transfer.ErrNotHeld when this node does
// not hold it. Reading the whole blob can take long; several askers share it.
func (t *pieceTables) table(ctx context.Context, d digest.Digest) (transfer.PieceTable, error) {
	t.mu.Lock()
	call, ok := t.calls[d]
	if !ok {
		call = &tableCall{done: make(chan struct{})}
		t.calls[d] = call
		t.order = append(t.order, d)
		if len(t.order) > tablesKept {
			delete(t.calls, t.order[0])
			t.order = t.order[1:]
		}
	}
	t.mu.Unlock()
	if !ok {
		call.table, call.err = t.compute(d)
		if call.err != nil {
			t.forget(d, call)
		}
		close(call.done)
	}
	select {
	case <-call.done:
		return call.table, call.err
	case <-ctx.Done():
		return transfer.PieceTable{}, ctx.Err()
	}
}

func (t *pieceTables) forget(d digest.Digest, call *tableCall) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.calls[d] == call {
		delete(t.calls, d)
		for i, o := range t.order {
			if o == d {
				t.order = append(t.order[:i], t.order[i+1:]...)
				break
			}
		}
	}
}

func (t *pieceTables) compute(d digest.Digest) (transfer.PieceTable, error) {
	file, size, err := t.store.OpenBlob(d)
	if fault.Is(err, fault.NotFound) {
		return transfer.PieceTable{}, transfer.ErrNotHeld
	}
	if err != nil {
		return transfer.PieceTable{}, err
	}
	defer file.Close()
	return transfer.HashPieces(file, size)
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
