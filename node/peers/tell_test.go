package peers

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/table"
)

// Tell waits for every live node, and for one that hangs no longer than it says.
func TestTell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		s.run(s.nodes[0], s.nodes[1])
		s.nodes[2].setDown(true)
		revision := func() (now uint64) {
			if err := s.db.View(func(v *table.View) error { now = v.Revision(); return nil }); err != nil {
				t.Fatal(err)
			}
			return now
		}
		ahead := revision() + 1 // of what the nodes know
		told := make(chan struct{})
		began := time.Now()
		go func() {
			s.nodes[0].Tell(t.Context(), ahead)
			close(told)
		}()
		synctest.Wait()
		select {
		case <-told:
			t.Fatal("a node was told of what it does not know")
		default:
		}
		s.put(bytesOf("one more revision", 10), s.nodes[0])
		<-told
		if took := time.Since(began); took != 0 {
			t.Errorf("it took %v", took)
		}
		s.nodes[2].setDown(false) // live, and answers nothing
		s.nodes[0].Tell(t.Context(), revision())
		if took := time.Since(began); took != tellWait {
			t.Errorf("a node that hangs was waited for %v", took)
		}
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		s.nodes[0].Tell(gone, revision())
	})
}
