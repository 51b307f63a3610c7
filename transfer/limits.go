package transfer

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"
)

// Places bounds how many of something there are at once. Who has to wait is served in
// turn. The bound may change at any time: what is beyond a lower one ends as it would
// have, and a higher one counts within a second. Safe for concurrent use.
type Places struct {
	most func() int

	mu    sync.Mutex
	taken int
	queue []chan struct{} // closed when its place is there
}

// NewPlaces has as many places as most says at the moment.
func NewPlaces(most func() int) *Places { return &Places{most: most} }

// AtMost has n places.
func AtMost(n int) *Places { return NewPlaces(func() int { return n }) }

// Take waits for a place. An error is ctx's cause, and there is no place then.
func (p *Places) Take(ctx context.Context) error {
	p.mu.Lock()
	if p.try() {
		p.mu.Unlock()
		return nil
	}
	mine := make(chan struct{})
	p.queue = append(p.queue, mine)
	p.mu.Unlock()
	again := time.NewTicker(time.Second)
	defer again.Stop()
	for {
		select {
		case <-mine:
			return nil
		case <-again.C:
			p.mu.Lock()
			p.admit()
			p.mu.Unlock()
		case <-ctx.Done():
			p.mu.Lock()
			defer p.mu.Unlock()
			if k := slices.Index(p.queue, mine); k >= 0 {
				p.queue = slices.Delete(p.queue, k, k+1)
			} else {
				p.taken--
			}
			p.admit()
			return context.Cause(ctx)
		}
	}
}

// Try takes a place if there is one for which nobody waits.
func (p *Places) Try() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.try()
}

func (p *Places) try() bool {
	p.admit()
	if len(p.queue) > 0 || p.taken >= p.most() {
		return false
	}
	p.taken++
	return true
}

// Give gives a place back.
func (p *Places) Give() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.taken--
	p.admit()
}

// admit lets in those who wait, as far as there is room; mu is held.
func (p *Places) admit() {
	for most := p.most(); len(p.queue) > 0 && p.taken < most; p.taken++ {
		close(p.queue[0])
		p.queue = p.queue[1:]
	}
}

// Use is how many places are taken, and how many there are.
func (p *Places) Use() (taken, most int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.taken, p.most()
}

// How much a connection may have in the kernel that is not on the wire yet, in bytes. Where the wire is
// slow what many connections have there would stand before each piece for as long as several
// pieces take; where it is fast a small part of a piece would cost a system call each. On a long path
// it is more.
const (
	Unsent     = 128 << 10
	UnsentSlow = 32 << 10
	UnsentLong = 2 << 20 // at most
)

// Limits of an engine. Several may share them; what is nil has the default named beside
// it.
type Limits struct {
	Fetches *Places // blobs on their way here; others wait their turn. 16
	Pieces  *Places // of 256 KiB each in memory, that come in. 128
	Sending *Places // the same, that go out. 32
	Conns   *Places // of other nodes here; more are turned away. 1024
	// Holders is from how many nodes a blob is taken at once. 10.
	Holders func() int
}

// OrDefault fills in the defaults.
func (l Limits) OrDefault() Limits {
	l.Fetches = cmp.Or(l.Fetches, AtMost(16))
	l.Pieces = cmp.Or(l.Pieces, AtMost(128))
	l.Sending = cmp.Or(l.Sending, AtMost(32))
	l.Conns = cmp.Or(l.Conns, AtMost(1024))
	if l.Holders == nil {
		l.Holders = func() int { return 10 }
	}
	return l
}

// Patience of an engine with its peers. Zero values mean the defaults named beside them.
type Patience struct {
	// AskTimeout for a candidate to say whether it holds a blob. 2 s.
	AskTimeout time.Duration
	// AskAgain is how often those who did not hold it are asked again. 5 s.
	AskAgain time.Duration
	// StallTimeout within which a sender must deliver 16 KiB more. 10 s.
	StallTimeout time.Duration
	// IdleTimeout after which a fetch gives up when the holders that are left, all
	// still fetching themselves, have offered nothing new though one of them says that
	// it knows a source. 30 s.
	IdleTimeout time.Duration
	// Backoff after a holder's first failure in a row; it doubles. 100 ms.
	Backoff time.Duration
}

// OrDefault fills in the defaults.
func (p Patience) OrDefault() Patience {
	return Patience{
		AskTimeout:   orElse(p.AskTimeout, 2*time.Second),
		AskAgain:     orElse(p.AskAgain, 5*time.Second),
		StallTimeout: orElse(p.StallTimeout, 10*time.Second),
		IdleTimeout:  orElse(p.IdleTimeout, 30*time.Second),
		Backoff:      orElse(p.Backoff, 100*time.Millisecond),
	}
}

func orElse(d, fallback time.Duration) time.Duration {
	if d <= 0 {
		return fallback
	}
	return d
}
