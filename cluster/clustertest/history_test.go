package clustertest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
)

// rig is a cluster under attack. mu is held for writing while a node is
// replaced by its next run.
type rig struct {
	*Cluster
	t       *testing.T
	mu      sync.RWMutex
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
	r.mu.RLock()
	defer r.mu.RUnlock()
	n := r.nodes[i%len(r.nodes)]
	return door{n.DB, n.notes()}
}

// client reads and writes two registers through random nodes and counts in a row.
func (r *rig) client(ctx context.Context, id int) {
	for ctx.Err() == nil {
		d := r.door(rand.IntN(len(r.nodes)))
		key := fmt.Sprint("register", rand.IntN(2))
		op, cancel := context.WithTimeout(ctx, 8*time.Second)
		switch rand.IntN(5) {
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
		pause := time.NewTimer(rand.N(400 * time.Millisecond))
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

// attack breaks one thing at a time, waits, and mends it.
func (r *rig) attack(ctx context.Context, rounds int) {
	wait := func(d time.Duration) {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
		}
	}
	for range rounds {
		victim := r.nodes[rand.IntN(len(r.nodes))]
		for _, n := range r.nodes {
			if rand.IntN(2) == 0 && n.Leader() == n.Self() {
				victim = n
			}
		}
		switch rand.IntN(3) {
		case 0:
			victim.Kill()
			wait(rand.N(9 * time.Second))
			r.mu.Lock()
			victim.Start()
			r.mu.Unlock()
		case 1:
			r.Isolate(victim)
			wait(rand.N(9 * time.Second))
			r.Rejoin(victim)
		case 2:
			for _, n := range r.nodes {
				if n != victim && rand.IntN(2) == 0 {
					r.Network.CutOneWay(victim.Addr, n.Addr)
				} else if n != victim {
					r.Network.CutOneWay(n.Addr, victim.Addr)
				}
			}
			wait(rand.N(9 * time.Second))
			r.Rejoin(victim)
		}
		wait(rand.N(4 * time.Second))
	}
}

// Three voters and a non-voter, whose word must not count.
func TestRegisterIsLinearizable(t *testing.T) {
	rounds := 12
	if testing.Short() {
		rounds = 4
	}
	synctest.Test(t, func(t *testing.T) {
		r := &rig{t: t, Cluster: New(t, Options{Define: withNotes, Snapshots: member.Snapshots{MinBytes: 64 << 10, TrailingLogs: 16}})}
		r.Grow(4)
		ctx, cancel := context.WithCancel(t.Context())
		var clients sync.WaitGroup
		for id := range 5 {
			clients.Go(func() { r.client(ctx, id) })
		}
		r.attack(t.Context(), rounds)
		cancel()
		clients.Wait()
		r.AwaitVoters(3)

		if !r.history.Linearizable() {
			t.Errorf("no order explains the %d operations", r.history.Len())
		}
		var count int
		r.Await("the count", func() bool {
			text, fresh, err := r.nodes[0].read(t.Context(), "count")
			count, _ = strconv.Atoi(text)
			return err == nil && !fresh.Stale
		})
		added, maybe := int(r.added.Load()), int(r.maybe.Load())
		if count < added || count > added+maybe {
			t.Errorf("the row counts %d; %d increments were acknowledged and %d may have been made", count, added, maybe)
		}
		for _, n := range r.nodes {
			n.want("count", strconv.Itoa(count))
		}
		if r.history.Len() < 50 || r.reads.Load() < 20 || added < 5 {
			t.Errorf("only %d operations, %d confirmed reads and %d increments got through", r.history.Len(), r.reads.Load(), added)
		}
		t.Logf("%d operations, %d confirmed reads, %d increments and %d unknown", r.history.Len(), r.reads.Load(), added, maybe)
	})
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
