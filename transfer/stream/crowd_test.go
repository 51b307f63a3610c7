package stream

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// Of hundreds of candidates a fetch asks those that may hold the blob and some of the
// others, not all nodes the same.
func TestFewOfVeryManyAreAsked(t *testing.T) {
	_, blob, _ := sample(t, 3*transfer.PieceSize)
	var many peers
	for i := range 300 {
		many = append(many, transfer.Peer{ID: fmt.Sprint(i)})
	}
	e := mover(t, nil, many, nil)
	fl, _ := e.board(blob, transfer.Options{})
	h := newHunt(e, fl)
	a, b := h.choice(t.Context()), h.choice(t.Context())
	if len(a) != maxAsked || !slices.Equal(a[:firstAsked], many[:firstAsked]) || slices.Equal(a, b) {
		t.Errorf("asked are %v, then %v", a, b)
	}
	for i, p := range many {
		if p.ID != fmt.Sprint(i) {
			t.Fatal("the list of candidates was changed")
		}
	}
}

// A node that is still fetching serves so many; the next go elsewhere.
func TestTheCrowdGoesElsewhere(t *testing.T) {
	c := &crowd{t: t}
	content, blob := random(4 * transfer.PieceSize)
	source := c.add("00", nil)
	source.store.Put(content)
	source.hold = func(transfer.Flow, int) time.Duration { return time.Hour }
	middle := c.add("01", nil)
	if _, err := middle.Fetch(t.Context(), blob); err != nil {
		t.Fatal(err)
	}
	e := mover(t, nil, peers(nil), func(cfg *Config) { cfg.Dial = middle.cfg.Dial })
	for i := range maxAskers + 1 {
		l, st, err := e.open(t.Context(), middle.peer, hello{digest: blob.Digest, size: blob.Size, patience: time.Second}, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer l.close()
		want := heldPart
		if i == maxAskers {
			want = heldNothing
		}
		if st.held != want {
			t.Errorf("asker %d hears %d, want %d", i, st.held, want)
		}
	}
}

// What a limit holds back is waited for, with a root and without.
func TestLimitsAreNoStalls(t *testing.T) {
	for i, name := range []string{"with a root", "without"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := &crowd{t: t}
			content, blob := random(4*transfer.PieceSize + i)
			if i == 1 {
				blob.Root = nil
			}
			source := c.add("00", nil)
			source.store.Put(content)
			began := time.Now()
			source.hold = func(transfer.Flow, int) time.Duration {
				// Longer than it takes to drop a holder that stalls.
				return 8*time.Second - time.Since(began)
			}
			to := c.add("01", func(cfg *Config) { cfg.StallTimeout = time.Second })
			f, err := to.Fetch(t.Context(), blob)
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Wait(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}
