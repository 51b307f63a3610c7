package peers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/blobs"
	"github.com/atoll-registry/atoll/node/fault"
	"github.com/atoll-registry/atoll/transfer"
)

// disk plays a store whose reads wait until the test lets them.
type disk struct {
	opened atomic.Int64
	open   atomic.Int64 // now
	most   atomic.Int64
	gate   chan struct{} // closed: reads go on
	err    error
}

type diskFile struct {
	*bytes.Reader
	d *disk
}

func (f diskFile) Read(p []byte) (int, error) {
	<-f.d.gate
	return f.Reader.Read(p)
}

func (f diskFile) Close() error {
	f.d.open.Add(-1)
	return nil
}

func (d *disk) OpenBlob(want digest.Digest) (blobs.File, int64, error) {
	d.opened.Add(1)
	if d.err != nil {
		return nil, 0, d.err
	}
	d.most.Store(max(d.most.Load(), d.open.Add(1)))
	return diskFile{bytes.NewReader([]byte(want)), d}, int64(len(want)), nil
}

// tables runs pieceTables over a disk until the test ends.
func tables(t *testing.T, d *disk) (*pieceTables, context.CancelFunc) {
	p := newPieceTables(nil)
	p.open = d.OpenBlob
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = p.run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	return p, cancel
}

func named(i int) digest.Digest { return digest.FromString(fmt.Sprint(i)) }

func TestTablesShareWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{gate: make(chan struct{})}
		p, _ := tables(t, d)
		first, leave := context.WithCancel(t.Context())
		var asked sync.WaitGroup
		asked.Go(func() {
			if _, err := p.table(first, named(1)); !errors.Is(err, context.Canceled) {
				t.Errorf("who left got %v", err)
			}
		})
		synctest.Wait()
		for range 5 {
			asked.Go(func() {
				table, err := p.table(t.Context(), named(1))
				if err != nil || table.Size() != int64(len(named(1))) {
					t.Errorf("table of %d bytes, %v", table.Size(), err)
				}
			})
		}
		synctest.Wait()
		leave() // the one who asked first: the others still want it
		synctest.Wait()
		close(d.gate)
		asked.Wait()
		if _, err := p.table(t.Context(), named(1)); err != nil || d.opened.Load() != 1 {
			t.Errorf("the blob was read %d times, %v", d.opened.Load(), err)
		}
	})
}

func TestTablesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{gate: make(chan struct{})}
		p, _ := tables(t, d)
		var asked sync.WaitGroup
		for i := range 3 * tablesKept {
			asked.Go(func() {
				if _, err := p.table(t.Context(), named(i)); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		if n := d.open.Load(); n != tablesAtOnce {
			t.Errorf("%d blobs are read at once, want %d", n, tablesAtOnce)
		}
		close(d.gate)
		asked.Wait()
		if len(p.calls) != tablesKept || len(p.order) != tablesKept {
			t.Errorf("%d tables are kept in %d places, want %d", len(p.calls), len(p.order), tablesKept)
		}

		// What is asked for again stays, what is not goes.
		oldest, second := p.order[0], p.order[1]
		before := d.opened.Load()
		for _, ask := range []digest.Digest{oldest, named(-1), oldest} {
			if _, err := p.table(t.Context(), ask); err != nil {
				t.Fatal(err)
			}
		}
		if n := d.opened.Load() - before; n != 1 || p.calls[second] != nil {
			t.Errorf("%d blobs were read, want the new one only; the least wanted is kept: %v", n, p.calls[second] != nil)
		}
	})
}

func TestTablesForgetFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{gate: make(chan struct{}), err: fault.New(fault.NotFound, "not here")}
		close(d.gate)
		p, _ := tables(t, d)
		if _, err := p.table(t.Context(), named(1)); !errors.Is(err, transfer.ErrNotHeld) {
			t.Fatalf("a blob that is not held: %v", err)
		}
		d.err = errors.New("the disk is broken")
		if _, err := p.table(t.Context(), named(1)); !errors.Is(err, d.err) {
			t.Fatalf("a broken disk: %v", err)
		}
		if len(p.calls) != 0 || len(p.order) != 0 {
			t.Errorf("failures are kept: %d, %d", len(p.calls), len(p.order))
		}
		d.err = nil
		if _, err := p.table(t.Context(), named(1)); err != nil {
			t.Fatalf("the disk is well again: %v", err)
		}
	})
}

func TestTablesEndWithTheRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{gate: make(chan struct{})}
		p, stop := tables(t, d)
		var asked sync.WaitGroup
		var made atomic.Int64
		for i := range 5 {
			asked.Go(func() {
				_, err := p.table(t.Context(), named(i))
				switch {
				case err == nil:
					made.Add(1) // its last byte was being read
				case !errors.Is(err, transfer.ErrStopped) && !errors.Is(err, context.Canceled):
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		stop()
		close(d.gate)
		asked.Wait()
		if made.Load() > tablesAtOnce || d.opened.Load() > tablesAtOnce {
			t.Errorf("%d blobs were read after the end", d.opened.Load())
		}
		if _, err := p.table(t.Context(), named(9)); !errors.Is(err, transfer.ErrStopped) {
			t.Errorf("after the end: %v", err)
		}
	})
}
