// Package events is the in-process bus: rooms publish what has been committed,
// other rooms listen, and neither knows the other.
//
// Delivery is in order per subscriber and at most once: an event says that
// something happened, the tables say what is true. A subscriber that falls
// behind by more than its buffer loses the oldest events and is told how many.
package events

import (
	"context"
	"sync"
)

// Topic carries events of one type. The zero Topic is ready for use.
type Topic[E any] struct {
	mu   sync.Mutex
	subs map[*subscription[E]]struct{}
}

type subscription[E any] struct {
	ch   chan E
	lost int
}

// Publish hands an event to every subscriber and never blocks.
func (t *Topic[E]) Publish(event E) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for s := range t.subs {
		select {
		case s.ch <- event:
		default:
			select {
			case <-s.ch:
				s.lost++
			default:
			}
			select {
			case s.ch <- event:
			default:
				s.lost++
			}
		}
	}
}

// Each calls handle for every event published from now on, in order, until ctx
// ends. lost is how many events were dropped before this one because the
// subscriber was more than buffer events behind.
func (t *Topic[E]) Each(ctx context.Context, buffer int, handle func(event E, lost int)) {
	s := &subscription[E]{ch: make(chan E, max(buffer, 1))}
	t.mu.Lock()
	if t.subs == nil {
		t.subs = make(map[*subscription[E]]struct{})
	}
	t.subs[s] = struct{}{}
	t.mu.Unlock()
	defer func() {
		t.mu.Lock()
		delete(t.subs, s)
		t.mu.Unlock()
	}()
	for {
		select {
		case <-ctx.Done():
			return
		case event := <-s.ch:
			t.mu.Lock()
			lost := s.lost
			s.lost = 0
			t.mu.Unlock()
			handle(event, lost)
		}
	}
}
