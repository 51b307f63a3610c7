package stream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/transfer"
	"github.com/atoll-registry/atoll/transfer/transfertest"
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

// eachAnother dials under another name each time, as naming reads them.
func eachAnother(dial func(context.Context, string) (net.Conn, error)) func(context.Context, string) (net.Conn, error) {
	var n atomic.Int32
	return func(ctx context.Context, addr string) (net.Conn, error) {
		c, err := dial(ctx, addr)
		if err == nil {
			_, err = fmt.Fprintf(c, "%02d", 50+n.Add(1))
		}
		return c, err
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
	e := mover(t, nil, peers(nil), func(cfg *Config) { cfg.Dial = eachAnother(cfg.Dial) })
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

// A holder of everything serves so many at once; the others get the blob from those, or
// from it when there is room again.
func TestASourceServesSoManyAtOnce(t *testing.T) {
	c := &crowd{t: t}
	content, blob := random(6 * transfer.PieceSize)
	source := c.add("00", nil)
	source.store.Put(content)
	pace := paced(4 << 20)
	most := 0
	source.hold = func(f transfer.Flow, n int) time.Duration { // the desk's mu is held
		most = max(most, source.desk.offers[blob.Digest].Askers())
		return pace(f, n)
	}
	for i := range maxAskers + 8 {
		c.add(fmt.Sprintf("%02d", i+1), nil)
	}
	fetchAll(t, c.nodes[1:], blob)
	source.desk.mu.Lock()
	defer source.desk.mu.Unlock()
	if most > maxAskers || most < maxAskers/2 {
		t.Errorf("%d were served at once, want at most %d", most, maxAskers)
	}
}

// One more than may be served knows of nobody else: it waits until there is room.
func TestWhoFindsTheSourceBusyWaits(t *testing.T) {
	c := &crowd{t: t}
	content, blob := random(4 * transfer.PieceSize)
	source := c.add("00", nil)
	source.store.Put(content)
	e := mover(t, nil, peers(nil), func(cfg *Config) { cfg.Dial = eachAnother(cfg.Dial) })
	greet := hello{digest: blob.Digest, size: blob.Size, patience: time.Second}
	var links []*link
	for range maxAskers {
		l, st, err := e.open(t.Context(), source.peer, greet, nil)
		if err != nil || st.held != heldComplete {
			t.Fatalf("%+v, %v", st, err)
		}
		defer l.close()
		links = append(links, l)
	}
	store := transfertest.NewStore()
	late := mover(t, store, peers{source.peer}, func(cfg *Config) {
		cfg.IdleTimeout, cfg.Dial = 50*time.Millisecond, source.cfg.Dial
	})
	f, err := late.Fetch(t.Context(), blob)
	if err != nil {
		t.Fatal(err)
	}
	if _, st, err := e.open(t.Context(), source.peer, greet, nil); err != nil || st.held != heldBusy {
		t.Fatalf("one more hears %+v, %v", st, err)
	}
	select {
	case <-f.Done():
		t.Fatalf("it did not wait: %v", f.Wait(t.Context()))
	case <-time.After(200 * time.Millisecond): // several times its IdleTimeout
	}
	links[0].close()
	if err := f.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// The only holder is killed in the middle and comes back: the fetch goes on, and no piece
// comes twice.
func TestAHolderThatRestartsIsWaitedFor(t *testing.T) {
	for _, rooted := range []bool{true, false} {
		c := &crowd{t: t}
		content, blob := random(12 * transfer.PieceSize)
		if !rooted {
			blob.Root = nil
		}
		source := c.add("00", nil)
		source.store.Put(content)
		var out atomic.Int64
		source.hold = func(transfer.Flow, int) time.Duration {
			if out.Load() >= 5 {
				return time.Hour
			}
			out.Add(1)
			return 0
		}
		dropped := make(chan transfer.Reason, 1)
		to := c.add("01", func(cfg *Config) {
			cfg.IdleTimeout = 50 * time.Millisecond // not what an absent holder is given
			cfg.Hooks.Dropped = func(_ string, _ digest.Digest, why transfer.Reason) {
				select {
				case dropped <- why:
				default:
				}
			}
		})
		f, err := to.Fetch(t.Context(), blob)
		if err != nil {
			t.Fatal(err)
		}
		waitFor(t, "five pieces", func() bool {
			to.mu.Lock()
			defer to.mu.Unlock()
			return to.received["00"] == 5*transfer.PieceSize
		})
		source.stop()
		if why := <-dropped; why != transfer.Broken {
			t.Errorf("dropped as %s", why)
		}
		ln, err := net.Listen("tcp", source.peer.Addr)
		if err != nil {
			t.Fatal(err)
		}
		again := mover(t, source.store, peers(nil), nil)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = again.Serve(ctx, naming{ln}) })
		if err := f.Wait(t.Context()); err != nil {
			t.Error(err)
		}
		cancel()
		wg.Wait()
		to.mu.Lock()
		if got := to.received["00"]; got != blob.Size {
			t.Errorf("%d bytes came for a blob of %d", got, blob.Size)
		}
		to.mu.Unlock()
	}
}

// A holder that does not come back is given up.
func TestAHolderThatStaysAwayIsGivenUp(t *testing.T) {
	c := &crowd{t: t}
	content, blob := random(4 * transfer.PieceSize)
	source := c.add("00", nil)
	source.store.Put(content)
	source.hold = func(transfer.Flow, int) time.Duration { return time.Hour }
	to := c.add("01", func(cfg *Config) { cfg.Absence = 300 * time.Millisecond })
	f, err := to.Fetch(t.Context(), blob)
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the holder to be asked", func() bool {
		source.desk.mu.Lock()
		defer source.desk.mu.Unlock()
		return source.desk.offers[blob.Digest] != nil
	})
	source.stop()
	if err := f.Wait(t.Context()); !errors.Is(err, transfer.ErrNoHolder) {
		t.Errorf("error is %v", err)
	}
}

// What a reader waits for is asked, with the hello, of a node that is still fetching it and
// has none of it: it says so, which is no fault, and sends it later.
func TestWhatIsHopedForMayBeRefused(t *testing.T) {
	c := &crowd{t: t}
	content, blob := random(6 * transfer.PieceSize)
	source := c.add("00", nil)
	source.store.Put(content)
	gate := transfertest.NewGate()
	source.hold = func(transfer.Flow, int) time.Duration {
		select {
		case <-gate.Opened():
			return 0
		default:
			return 10 * time.Millisecond
		}
	}
	middle := c.add("01", nil)
	first, err := middle.Fetch(t.Context(), blob)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := first.AwaitTable(t.Context()); !ok {
		t.Fatal("no table came")
	}
	to := mover(t, transfertest.NewStore(), peers{middle.peer}, func(cfg *Config) {
		cfg.Dial, cfg.StallTimeout = middle.cfg.Dial, 10*time.Second
		cfg.Hooks.Dropped = func(_ string, _ digest.Digest, why transfer.Reason) { t.Errorf("dropped as %s", why) }
	})
	f, err := to.Fetch(t.Context(), blob, transfer.ReadFrom(0))
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the table to come on", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, ok := f.AwaitTable(ctx)
		return ok
	})
	gate.Open()
	if err := f.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
}
