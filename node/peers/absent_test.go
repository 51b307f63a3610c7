package peers

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/node/fault"
)

// told notes of which blobs its nodes say that nobody holds them.
type told struct {
	mu    sync.Mutex
	times map[digest.Digest]int
}

func listen(nodes ...*node) *told {
	l := &told{times: map[digest.Digest]int{}}
	for _, n := range nodes {
		n.Report(nil, func(d digest.Digest) {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.times[d]++
		})
	}
	return l
}

func (l *told) of(d digest.Digest) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.times[d]
}

// What nobody holds is told of once all nodes are up: until then one that is down may
// have it. What is marked as lost then lacks no copies, and nobody is told again.
func TestRepairTellsWhatNobodyHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		l := listen(s.nodes...)
		s.nodes[2].setDown(true)
		d := s.put(bytesOf("lost", 1000))
		s.run()
		pass(t, time.Hour)
		if n := l.of(d); n > 0 {
			t.Errorf("told %d times while a node is down that may hold it", n)
		}
		s.nodes[2].setDown(false)
		pass(t, 2*retryMost)
		if l.of(d) == 0 {
			t.Errorf("all nodes are up and say that they do not hold it, and nobody was told:\n%s", s.nodes[0].logs.String())
		}
		lacking := func() (n int) {
			for _, n2 := range s.nodes {
				f, err := n2.figures()
				if err != nil {
					t.Fatal(err)
				}
				n += f.Lacking
			}
			return n
		}
		if n := lacking(); n != 1 {
			t.Errorf("%d blobs lack copies before it is known as lost", n)
		}
		if err := s.records.MarkLost(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		pass(t, time.Minute) // for tries that have begun
		before := l.of(d)
		pass(t, time.Hour)
		if n := lacking(); n != 0 || l.of(d) != before {
			t.Errorf("it is lost: %d blobs lack copies, told %d times more", n, l.of(d)-before)
		}
	})
}

// A client that is told of a blob that the site has does not push it; so the site has to
// find out when it has it no more, also while a node is down. It says so of that blob, and
// not of the others that were asked for in the same message.
func TestPushTellsWhatNobodyHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		l := listen(s.nodes[0])
		s.nodes[2].setDown(true)
		d, e := s.put(bytesOf("lost", 1000)), s.put(bytesOf("lost, too", 1000))
		held := s.put(bytesOf("held", 1000), s.nodes[1])
		s.run()
		if _, err := s.nodes[0].Ensure(t.Context(), []digest.Digest{held, d, e}); !fault.Is(err, fault.Unavailable) || l.of(d) != 1 || l.of(e) != 1 || l.of(held) != 0 {
			t.Errorf("a push of two blobs that nobody holds: %v, told %d, %d and %d times", err, l.of(d), l.of(e), l.of(held))
		}
		// A version that does not know of answers for each blob counts on all of them.
		old := heldRequest{Blobs: []heldBlob{{Digest: held, Size: 1000}, {Digest: d, Size: 1000}}}
		if err := s.nodes[0].call(t.Context(), s.nodes[1].id, "held", old, nil); err == nil {
			t.Error("it is told that a node holds a blob that it does not")
		}
	})
}
