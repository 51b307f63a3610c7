package peers

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/opencontainers/go-digest"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/fault"
)

// TestStrands: a node may not take the last copy of a blob with it, be it up or
// down.
func TestStrands(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 3)
		one, two, three := s.nodes[0], s.nodes[1], s.nodes[2]
		for _, n := range s.nodes { // their peers' services, without repair
			go func() { _ = n.serveHTTP(t.Context(), 4, n.apiServer()) }()
		}
		synctest.Wait()
		both := s.put(bytesOf("both", 100), one, two)
		here := s.put(bytesOf("here", 100), one)
		var more []digest.Digest
		for i := range repairPage { // a second page
			b := bytesOf(fmt.Sprint("more", i), 50)
			more = append(more, digest.FromBytes(b))
			if _, err := two.Store.Put(t.Context(), more[i], bytes.NewReader(b)); err != nil {
				t.Fatal(err)
			}
		}
		s.update(func(tx *table.Tx) error {
			for _, d := range more {
				if err := s.records.Live(tx, d, 50); err != nil {
					return err
				}
			}
			return nil
		})
		for _, c := range []struct {
			asked  *node
			target string
			want   stranded
		}{
			{two, "node1", stranded{1, here, true}},
			{one, "node1", stranded{1, here, true}},

			{three, "node3", stranded{0, "", true}},
		} {
			if got, err := c.asked.strands(t.Context(), c.target); err != nil || got != c.want {
				t.Errorf("%s asked about %s: %+v, %v, want %+v", c.asked.id, c.target, got, err, c.want)
			}
		}
		if got, err := one.strands(t.Context(), "node2"); err != nil || got.blobs != repairPage {
			t.Errorf("%d blobs are on one node only: %+v, %v", repairPage, got, err)
		}
		err := two.spare(t.Context(), member.Member{ID: "node1", Name: "one"})
		if !fault.Is(err, fault.Precondition) || !strings.Contains(err.Error(), "atoll cluster drain one") {
			t.Errorf("a node with a last copy may go: %v", err)
		}
		one.setDown(true)
		if got, err := two.strands(t.Context(), "node1"); err != nil || got != (stranded{1, here, false}) {
			t.Errorf("a node that is down: %+v, %v", got, err)
		}
		two.setDown(true)
		got, err := three.strands(t.Context(), "node1")
		if err != nil || got.blobs != 2+repairPage || got.known {
			t.Errorf("with another down as well: %+v, %v, want %s too", got, err, both)
		}
		if err := three.spare(t.Context(), member.Member{ID: "node1", Name: "one"}); !fault.Is(err, fault.Precondition) {
			t.Errorf("a node that is down and may hold last copies may go: %v", err)
		}

	})
}
