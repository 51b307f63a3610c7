package scrub

import (
	"context"
	"time"
)

// pacer lets bytes through at a rate. A pause earns no credit. It is for one
// goroutine.
type pacer struct{ next time.Time }

// wait returns once n bytes may be read at a rate in bytes per second.
func (p *pacer) wait(ctx context.Context, n int, rate int64) error {
	if now := time.Now(); p.next.Before(now) {
		p.next = now
	}
	p.next = p.next.Add(time.Duration(float64(n) / float64(rate) * float64(time.Second)))
	timer := time.NewTimer(time.Until(p.next))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// speed is how many bytes a second a pass over held bytes reads: gently enough to
// take most of the time until the next one, at the full rate when it was asked
// for.
func (s *Scrub) speed(held int64) int64 {
	most := s.rate.Value()
	s.mu.Lock()
	asked := s.state.Asked
	s.mu.Unlock()
	days := s.days.Value()
	if asked || days == 0 {
		return most
	}
	const share = 0.8 // of the time, since more blobs come meanwhile
	gentle := int64(float64(held) / (share * float64(days) * 24 * 3600))
	return min(max(gentle, slowest), most)
}
