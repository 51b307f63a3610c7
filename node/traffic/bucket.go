package traffic

import (
	"math"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

const (
	// burst is for how long a bucket saves up what nobody took.
	burst = 125 * time.Millisecond
	// leastBurst is what a slow one saves up in any case, in bytes: who has to wait for
	// another cap too comes late.
	leastBurst = transfer.PieceSize / 2
	// catchUp is for how long more is saved up while somebody who might go here has to
	// wait for another cap.
	catchUp = 500 * time.Millisecond
	// poll is after how long one is asked again who lets another go first. It is
	// shorter than burst, or the rate would not be used up meanwhile.
	poll = 50 * time.Millisecond
	// mostWait bounds every wait, so that a change of the settings counts within it.
	mostWait = 500 * time.Millisecond
	// late is how long after its time one that was told to wait keeps its turn.
	late = 25 * time.Millisecond
	// leavesMax bounds those that a bucket tells apart.
	leavesMax = 1024
	// leafLife is how long one is remembered that asks for nothing.
	leafLife = 10 * time.Second
)

// bucket holds a cap. Who may go first is decided by start-time fair queueing in
// two levels, classes by their weight and in each class clients alike; but nothing
// is queued here: whoever has to wait asks again, and while it is expected the others
// know of it.
//
// Bytes are taken as soon as there is any room, and what was taken beyond it is
// waited for afterwards: so a piece needs not fit into what is saved up.
//
// Times are since a start, of a clock that never jumps. Not safe for concurrent use.
type bucket struct {
	name, kind string
	rate       float64 // bytes per second; 0: nothing may go
	room       float64 // bytes; below 0 what was taken too early
	seen       time.Duration
	virtual    float64
	classes    [transfer.Classes]class

	lately  meter         // for the other nodes
	active  time.Duration // when somebody last asked
	refused time.Duration // when somebody last had to wait
	asked   bool          // there was anybody at all

	hindered time.Duration // when somebody last might have gone, but for another cap
}

// turns is the place in a queue of one who asks again and again.
type turns struct {
	start, finish float64       // in virtual time
	until         time.Duration // it is expected again until then; the past: it is not
}

type class struct {
	turns
	virtual float64
	leaves  map[string]*leaf
}

type leaf struct {
	turns
	seen time.Duration
}

func newBucket(kind, name string) *bucket { return &bucket{kind: kind, name: name} }

// refill adds what the time since the last look brings.
func (b *bucket) refill(now time.Duration) {
	if now > b.seen {
		most := max(b.rate*burst.Seconds(), leastBurst)
		if b.hindered > 0 && now-b.hindered < mostWait {
			most += b.rate * catchUp.Seconds()
		}
		b.room = min(b.room+b.rate*(now-b.seen).Seconds(), most)
		b.seen = now
	}
}

// tune sets the rate from now on.
func (b *bucket) tune(now time.Duration, rate float64) {
	if b.rate == rate {
		return
	}
	b.refill(now)
	b.rate = rate
	// A debt at the old rate must not stop a slower one for minutes.
	b.room = max(b.room, -rate*mostWait.Seconds(), -transfer.PieceSize)
}

// check says how long a client has to wait before it may take n bytes; 0: not at
// all. Whoever waits keeps its place.
func (b *bucket) check(now time.Duration, c transfer.Class, client string, n int) time.Duration {
	b.refill(now)
	b.active, b.asked = now, true
	cl := &b.classes[c]
	if cl.until <= now {
		cl.start = max(b.virtual, cl.finish)
	}
	l := cl.leaf(client)
	l.seen = now
	if l.until <= now {
		l.start = max(cl.virtual, l.finish)
	}
	wait := time.Duration(0)
	switch {
	case b.rate <= 0:
		wait = mostWait
	case b.room <= 0:
		wait = time.Duration(math.Ceil(-b.room/b.rate*1e6))*time.Microsecond + time.Microsecond
	case !b.first(now, c, l):
		wait = min(poll, time.Duration(float64(n)/b.rate*float64(time.Second)))
	}
	if wait == 0 {
		l.until = 0
		cl.expect(now)
		return 0
	}
	wait = min(max(wait, time.Millisecond), mostWait)
	l.until = now + wait + late
	cl.until = max(cl.until, l.until)
	b.refused = now
	return wait
}

// first says whether nobody who is expected should go before a client.
func (b *bucket) first(now time.Duration, c transfer.Class, l *leaf) bool {
	own := &b.classes[c]
	for i := range b.classes {
		other := &b.classes[i]
		if other == own || other.until <= now {
			continue
		}
		if other.start < own.start || other.start == own.start && i < int(c) {
			return false
		}
	}
	for _, other := range own.leaves {
		if other != l && other.until > now && other.start < l.start {
			return false
		}
	}
	return true
}

// take counts bytes that go.
func (b *bucket) take(c transfer.Class, client string, n int) {
	b.room -= float64(n)
	b.lately.fresh += float64(n)
	cl := &b.classes[c]
	l := cl.leaf(client)
	b.virtual, cl.virtual = max(b.virtual, cl.start), max(cl.virtual, l.start)
	cl.finish = cl.start + float64(n)/float64(c.Weight())
	l.finish = l.start + float64(n)
	cl.start, l.start = cl.finish, l.finish
}

// expect notes until when any of a class is expected.
func (c *class) expect(now time.Duration) {
	c.until = 0
	for _, l := range c.leaves {
		if l.until > now {
			c.until = max(c.until, l.until)
		}
	}
}

// leaf finds a client, or the one place of all who are too many.
func (c *class) leaf(client string) *leaf {
	if l := c.leaves[client]; l != nil {
		return l
	}
	if c.leaves == nil {
		c.leaves = map[string]*leaf{}
	}
	if len(c.leaves) >= leavesMax {
		client = ""
		if l := c.leaves[client]; l != nil {
			return l
		}
	}
	l := &leaf{}
	c.leaves[client] = l
	return l
}

// sweep forgets who has long not asked.
func (b *bucket) sweep(now time.Duration) {
	for i := range b.classes {
		for client, l := range b.classes[i].leaves {
			if now-l.seen > leafLife {
				delete(b.classes[i].leaves, client)
			}
		}
	}
}
