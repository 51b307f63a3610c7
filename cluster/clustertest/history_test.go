package clustertest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/table"
)

// turn is a lock on which the bubble's time goes on: a node that starts may wait
// for others to answer while it is held.
type turn chan struct{}

func (t turn) Lock()   { t <- struct{}{} }
func (t turn) Unlock() { <-t }

// rig is a cluster under attack. mu is held while a node is replaced by its next
// run, and while the open nodes are read or change.
type rig struct {
	*Cluster
	t       *testing.T
	mu      turn
	open    []*Node // that clients use and that are attacked
	history History
	value   atomic.Int64 // writes are numbered
	added   atomic.Int64 // increments that were acknowledged
	maybe   atomic.Int64 // and those whose outcome is not known
	reads   atomic.Int64 // confirmed
}

// door is a node's database as one run of it has it.
type door struct {
	db    *table.DB
	notes *table.Table[note]
}

func (r *rig) door(i int) door {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.open[i%len(r.open)]
	return door{n.DB, n.notes()}
}

// client reads and writes two registers through random nodes and counts in a row.
func (r *rig) client(ctx context.Context, id int, dice *rand.Rand) {
	for ctx.Err() == nil {
		d := r.door(dice.IntN(1 << 20))
		key := fmt.Sprint("register", dice.IntN(2))
		op, cancel := context.WithTimeout(ctx, 8*time.Second)
		switch dice.IntN(5) {
		case 0:
			r.increment(op, d)
		case 1, 2:
			r.write(op, d, id, key)
		default:
			call := r.history.Read(id, key)
			var v note
			fresh, err := d.db.Confirmed(op, func(view *table.View) (err error) {
				v, _, _, err = d.notes.Get(view, key)
				return err
			})
			if err == nil && !fresh.Stale {
				call.Done(v.Text)
				r.reads.Add(1)
			}
		}
		cancel()
		pause := time.NewTimer(time.Duration(dice.Int64N(int64(400 * time.Millisecond))))
		select {
		case <-pause.C:
		case <-ctx.Done():
		}
		pause.Stop()
	}
}

func (r *rig) write(ctx context.Context, d door, id int, key string) {
	value := strconv.FormatInt(r.value.Add(1), 10)
	call := r.history.Write(id, key, value)
	commit, err := d.db.Update(ctx, func(tx *table.Tx) error { return d.notes.Put(tx, note{value}, key) })
	switch {
	case err == nil || commit.Revision != 0:
		call.Done("")
	case !errors.Is(err, table.ErrNoLeader) && !errors.Is(err, table.ErrConflict):
		call.Lost()
	}
}

func (r *rig) increment(ctx context.Context, d door) {
	commit, err := d.db.Update(ctx, func(tx *table.Tx) error {
		v, _, _, err := d.notes.Get(tx, "count")
		if err != nil {
			return err
		}
		n, _ := strconv.Atoi(v.Text) // none is 0
		return d.notes.Put(tx, note{strconv.Itoa(n + 1)}, "count")
	})
	switch {
	case err == nil || commit.Revision != 0:
		r.added.Add(1)
	case !errors.Is(err, table.ErrNoLeader) && !errors.Is(err, table.ErrConflict):
		r.maybe.Add(1)
	}
}

// The check has teeth: reads that no leader confirmed are found out.
func TestLocalReadsAreNotLinearizable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(t, Options{Define: withNotes})
		c.Grow(3)
		lead := c.Leader()
		behind := c.Others(lead)[0]
		var h History
		write := func(value string) {
			call := h.Write(0, "k", value)
			if err := lead.write(t.Context(), "k", value); err != nil {
				t.Fatal(err)
			}
			call.Done("")
		}
		write("1")
		behind.want("k", "1")
		c.Isolate(behind)
		write("2")
		call := h.Read(1, "k")
		var v note
		err := behind.DB.View(func(view *table.View) (err error) {
			v, _, _, err = behind.notes().Get(view, "k")
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		call.Done(v.Text)
		if h.Linearizable() {
			t.Errorf("a local read of %q after 2 was written passes for linearizable", v.Text)
		}
	})
}
