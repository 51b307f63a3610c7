package identity

import (
	"sync"
	"time"
)

const (
	attemptBurst = 10               // logins that may fail in a row
	attemptEvery = 10 * time.Second // one more is allowed after this
	maxAttempts  = 4096             // pairs of source and name that are remembered
)

// attempts limits failed logins per source and name: a bucket that each attempt
// takes from, that a right password empties, and that time refills. Being per
// pair, it cannot lock a user out from elsewhere.
type attempts struct {
	mu      sync.Mutex
	buckets map[attempt]bucket
}

type attempt struct{ source, name string }

type bucket struct {
	left float64
	at   time.Time
}

func newAttempts() *attempts { return &attempts{buckets: make(map[attempt]bucket)} }

func (b bucket) refilled(now time.Time) bucket {
	if passed := now.Sub(b.at); passed > 0 {
		b.left = min(attemptBurst, b.left+float64(passed)/float64(attemptEvery))
	}
	b.at = now
	return b
}

// take allows an attempt (0) or says how long to wait for the next.
func (a *attempts) take(source, name string, now time.Time) time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	key := attempt{source, name}
	b, ok := a.buckets[key]
	if !ok {
		if len(a.buckets) >= maxAttempts {
			a.makeRoom(now)
		}
		b = bucket{attemptBurst, now}
	}
	b = b.refilled(now)
	if b.left < 1 {
		a.buckets[key] = b
		return time.Duration((1 - b.left) * float64(attemptEvery))
	}
	b.left--
	a.buckets[key] = b
	return 0
}

// makeRoom forgets the pair that has failed least, so that trying many names
// does not free the one that was tried often.
func (a *attempts) makeRoom(now time.Time) {
	var most attempt
	left := -1.0
	for key, b := range a.buckets {
		if b = b.refilled(now); b.left > left {
			most, left = key, b.left
		}
	}
	delete(a.buckets, most)
}

// forget ends the count after a right password.
func (a *attempts) forget(source, name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.buckets, attempt{source, name})
}
