package peers

import (
	"strings"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
)

func TestAdviceTellsAnElectionFromALostQuorum(t *testing.T) {
	node := func(name string, up bool) NodeStatus {
		return NodeStatus{ID: name, Name: name, Addr: name + ":5001", Voter: true, Up: up}
	}
	second := node("b", true)
	second.Voter = false
	suspect := node("b", true)
	suspect.Suspect = true
	for _, c := range []struct {
		name   string
		quorum bool
		nodes  []NodeStatus
		want   []string // a part of each line
	}{
		{"all well", true, []NodeStatus{node("a", true), node("b", true), node("c", true)}, nil},
		{"one down", true, []NodeStatus{node("a", true), node("b", false), node("c", true)}, []string{"node b (b:5001) is down"}},
		{"one way", true, []NodeStatus{node("a", true), suspect, node("c", true)}, []string{"node b (b:5001) is up, as other nodes say"}},
		{"electing", false, []NodeStatus{node("a", true), node("b", false), node("c", true)}, []string{"electing", "node b"}},
		{"no quorum", false, []NodeStatus{node("a", true), node("b", false), node("c", false)}, []string{"no quorum", "node b", "node c"}},
		{"two", true, []NodeStatus{node("a", true), second}, []string{"if a fails, which alone votes and holds the cluster key"}},
		{"alone", true, []NodeStatus{node("a", true)}, []string{"add two more"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := advise(Status{Nodes: c.nodes}, member.Status{Quorum: c.quorum}, time.Now())
			if len(got) != len(c.want) {
				t.Fatalf("advice %q, want %d lines", got, len(c.want))
			}
			for i, part := range c.want {
				if !strings.Contains(got[i], part) {
					t.Errorf("line %d is %q, want %q in it", i, got[i], part)
				}
			}
		})
	}
}
