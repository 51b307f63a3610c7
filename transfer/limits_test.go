package transfer_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

// Who waits is served in turn, whoever gives up leaves nothing behind, and nobody
// overtakes.
func TestPlacesAreTakenInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := transfer.AtMost(1)
		if err := p.Take(t.Context()); err != nil {
			t.Fatal(err)
		}
		left := errors.New("left")
		ctx, leave := context.WithCancelCause(t.Context())
		got := make(chan int, 3)
		for i, ctx := range []context.Context{t.Context(), ctx, t.Context()} {
			go func() {
				if err := p.Take(ctx); err != nil {
					if !errors.Is(err, left) {
						t.Error(err)
					}
					i = -1
				}
				got <- i
			}()
			synctest.Wait()
		}
		if p.Try() {
			t.Error("a place was taken though others wait")
		}
		leave(left)
		if i := <-got; i != -1 {
			t.Errorf("%d has a place", i)
		}
		for _, want := range []int{0, 2} {
			p.Give()
			if p.Try() {
				t.Error("somebody overtook")
			}
			if i := <-got; i != want {
				t.Errorf("%d has a place before %d", i, want)
			}
		}
		p.Give()
		if taken, most := p.Use(); taken != 0 || most != 1 {
			t.Errorf("%d of %d are taken in the end", taken, most)
		}
	})
}

func TestPlacesMayChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var most atomic.Int64
		most.Store(2)
		p := transfer.NewPlaces(func() int { return int(most.Load()) })
		if !p.Try() || !p.Try() || p.Try() {
			t.Fatal("not two places")
		}
		most.Store(1)
		p.Give()
		if p.Try() {
			t.Error("a place beyond the lower bound")
		}
		began := time.Now()
		done := make(chan error)
		go func() { done <- p.Take(t.Context()) }()
		synctest.Wait()
		most.Store(3)
		if err := <-done; err != nil || time.Since(began) > time.Second {
			t.Errorf("a higher bound counts after %v, %v", time.Since(began), err)
		}
	})
}
