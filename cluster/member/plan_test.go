package member

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/hashicorp/raft"
)

// world is a site that carries out its own plans.
type world struct {
	site
	dead, behind map[string]bool
	slow         map[string]bool // to fetch the key that they may have
	refused      map[string]bool // were told to forget it
}

func newWorld() *world {
	w := &world{dead: map[string]bool{}, behind: map[string]bool{}, slow: map[string]bool{}, refused: map[string]bool{}}
	w.self, w.maxVoters = "n1", 5
	w.live = func(id string) bool { return !w.dead[id] }
	w.up = w.live
	w.caught = func(id string) bool { return !w.behind[id] }
	w.holds = func(id string) bool { return w.row(id).Entrusted != 0 && !w.slow[id] }
	w.join("n1")
	w.row("n1").Entrusted = 1
	w.servers = []raft.Server{{ID: "n1", Address: "n1:1", Suffrage: raft.Voter}}
	return w
}

func (w *world) join(id string) {
	w.members = append(w.members, Member{ID: id, Addr: raftAddr(id), Joined: int64(len(w.members))})
}

func raftAddr(id string) string { return id + ":1" }

func (w *world) at(id string) int {
	return slices.IndexFunc(w.servers, func(s raft.Server) bool { return string(s.ID) == id })
}

func (w *world) row(id string) *Member {
	return &w.members[slices.IndexFunc(w.members, func(m Member) bool { return m.ID == id })]
}

// settle takes steps until there are none; it checks each.
func (w *world) settle(t *testing.T) []string {
	t.Helper()
	var taken []string
	for range 50 {
		s := plan(w.site)
		if s.kind == nothing {
			return taken
		}
		taken = append(taken, fmt.Sprint(s.kind, " ", s.id))
		at := w.at(s.id)
		if twice := slices.IndexFunc(w.servers, func(srv raft.Server) bool { return string(srv.Address) == s.addr }); s.addr != "" && twice >= 0 && twice != at {
			t.Fatalf("%v: raft refuses two servers at %s", taken, s.addr)
		}
		switch s.kind {
		case entrust:
			if w.row(s.id).Entrusted != 0 || w.row(s.id).Removed != 0 {
				t.Fatalf("%v: twice, or a node that is gone", taken)
			}
			w.row(s.id).Entrusted = 1
		case withdraw:
			if w.servers[at].Suffrage == raft.Voter {
				t.Fatalf("%v: took the key from a voter", taken)
			}
			w.row(s.id).Entrusted = 0
			w.refused[s.id] = true
		case addNonvoter:
			if at < 0 {
				w.servers = append(w.servers, raft.Server{ID: raft.ServerID(s.id), Suffrage: raft.Nonvoter})
				at = len(w.servers) - 1
			}
			w.servers[at].Address = raft.ServerAddress(s.addr)
		case addVoter:
			if w.servers[at].Suffrage != raft.Voter && (w.dead[s.id] || w.behind[s.id]) {
				t.Fatalf("%v: gave %s a vote though it is dead or behind", taken, s.id)
			}
			if !w.holds(s.id) {
				t.Fatalf("%v: gave %s a vote without the key", taken, s.id)
			}
			w.servers[at].Suffrage, w.servers[at].Address = raft.Voter, raft.ServerAddress(s.addr)
		case demote:
			w.servers[at].Suffrage = raft.Nonvoter
		case remove:
			w.servers = slices.Delete(w.servers, at, at+1)
		case retire:
			w.row(s.id).Removed = 1
		case handOver:
			return taken
		}
		if w.voters() == 0 {
			t.Fatalf("%v: no voter is left", taken)
		}
	}
	t.Fatalf("the plan never ends: %v", taken)
	return nil
}

func (w *world) voterIDs() string {
	var ids []string
	for _, s := range w.servers {
		if s.Suffrage == raft.Voter {
			ids = append(ids, string(s.ID))
		}
	}
	slices.Sort(ids)
	return fmt.Sprint(ids)
}

func TestPlanGrows(t *testing.T) {
	w := newWorld()
	for i, want := range []string{"[n1]", "[n1 n2 n3]", "[n1 n2 n3]", "[n1 n2 n3 n4 n5]", "[n1 n2 n3 n4 n5]"} {
		w.join(fmt.Sprint("n", i+2))
		w.settle(t)
		if got := w.voterIDs(); got != want {
			t.Errorf("%d members have the voters %s, want %s", len(w.members), got, want)
		}
		if len(w.servers) != len(w.members) {
			t.Errorf("%d members are %d servers", len(w.members), len(w.servers))
		}
	}
}

func TestPlanWaitsForBoth(t *testing.T) {
	w := newWorld()
	w.join("n2")
	w.join("n3")
	w.behind["n3"] = true
	w.settle(t)
	if got := w.voterIDs(); got != "[n1]" {
		t.Errorf("with one of two behind the voters are %s", got)
	}
	delete(w.behind, "n3")
	w.settle(t)
	if got := w.voterIDs(); got != "[n1 n2 n3]" {
		t.Errorf("with both caught up the voters are %s", got)
	}
}

func TestPlanTurnsBackFromTwoVoters(t *testing.T) {
	w := newWorld()
	w.join("n2")
	w.join("n3")
	w.settle(t)
	w.servers[w.at("n3")].Suffrage = raft.Nonvoter
	w.dead["n3"] = true
	w.settle(t)
	if got := w.voterIDs(); got != "[n1]" {
		t.Errorf("two voters and a dead third become %s", got)
	}
}

func TestPlanKeepsADeadVoter(t *testing.T) {
	w := newWorld()
	w.join("n2")
	w.join("n3")
	w.settle(t)
	w.dead["n3"] = true
	if taken := w.settle(t); len(taken) != 0 {
		t.Errorf("a dead voter without a replacement makes it do %v", taken)
	}
}

func TestPlanReplaces(t *testing.T) {
	w := newWorld()
	w.join("n2")
	w.join("n3")
	w.settle(t)
	w.dead["n3"], w.behind["n4"] = true, true
	w.join("n4")
	w.row("n3").ReplacedBy = "n4"
	w.settle(t)
	if got := w.voterIDs(); got != "[n1 n2 n3]" {
		t.Errorf("before the replacement has caught up the voters are %s", got)
	}
	delete(w.behind, "n4")
	taken := w.settle(t)
	if got := w.voterIDs(); got != "[n1 n2 n4]" || w.at("n3") >= 0 || w.row("n3").Removed == 0 {
		t.Errorf("after %v the voters are %s", taken, got)
	}
}

// A machine that comes back with an empty disk has the address of the one that it
// replaces, which raft allows one server only.
func TestPlanReplacesAtTheSameAddress(t *testing.T) {
	for _, voters := range []int{3, 5} {
		w := newWorld()
		for i := range voters - 1 {
			w.join(fmt.Sprint("n", i+2))
		}
		w.settle(t)
		w.dead["n3"], w.behind["n9"] = true, true
		w.join("n9")
		w.row("n9").Addr = raftAddr("n3")
		w.row("n3").ReplacedBy = "n9"
		taken := w.settle(t)
		if w.at("n3") >= 0 || w.at("n9") < 0 || w.voters() != voters-1 {
			t.Errorf("of %d voters, after %v, they are %s", voters, taken, w.voterIDs())
		}
		delete(w.behind, "n9")
		if taken := w.settle(t); w.voters() != voters {
			t.Errorf("of %d voters, once the new node has caught up and after %v, they are %s", voters, taken, w.voterIDs())
		}
	}
}

func TestPlanRemoves(t *testing.T) {
	w := newWorld()
	w.join("n2")
	w.join("n3")
	w.settle(t)
	w.row("n2").Removed = 1
	w.settle(t)
	if got := w.voterIDs(); got != "[n1]" || w.at("n2") >= 0 || w.at("n3") < 0 {
		t.Errorf("two members of three have the voters %s", got)
	}
	w = newWorld()
	w.join("n2")
	w.join("n3")
	w.settle(t)
	w.row("n1").Removed = 1
	if taken := w.settle(t); fmt.Sprint(taken) != "[hand over from n1]" {
		t.Errorf("a leader that was removed does %v", taken)
	}
	w = grown(t, 2)
	w.row("n1").Removed = 1
	if taken := w.settle(t); fmt.Sprint(taken) != "[entrust n2 add as voter n2 hand over from n1]" {
		t.Errorf("the only voter was removed and does %v", taken)
	}
	w.self = "n2"
	w.settle(t)
	if got := w.voterIDs(); got != "[n2]" || w.at("n1") >= 0 {
		t.Errorf("its successor has the voters %s", got)
	}
}

// grown is a site of so many members with nothing left to do.
func grown(t *testing.T, members int) *world {
	w := newWorld()
	for i := 1; i < members; i++ {
		w.join(fmt.Sprint("n", i+1))
	}
	w.settle(t)
	return w
}

func TestPlanDrains(t *testing.T) {
	for _, c := range []struct {
		members int
		drained []string
		dead    []string
		want    string
	}{
		{3, []string{"n3"}, nil, "[n1]"},
		{4, []string{"n3"}, nil, "[n1 n2 n4]"},
		{5, []string{"n3"}, nil, "[n1 n2 n4]"},
		{6, []string{"n3"}, nil, "[n1 n2 n4 n5 n6]"},
		{5, []string{"n3", "n4"}, nil, "[n1 n2 n5]"},
		{3, []string{"n3"}, []string{"n2"}, "[n1 n2 n3]"}, // the rest could not decide
		{1, []string{"n1"}, nil, "[n1]"},                  // nobody else
		{3, []string{"n1", "n2", "n3"}, nil, "[n1 n2 n3]"},
	} {
		w := grown(t, c.members)
		for _, id := range c.dead {
			w.dead[id] = true
		}
		for _, id := range c.drained {
			w.row(id).Draining = 1
		}
		taken := w.settle(t)
		if got := w.voterIDs(); got != c.want {
			t.Errorf("%d members, %v drained, %v dead: the voters are %s after %v, want %s", c.members, c.drained, c.dead, got, taken, c.want)
		}
		clear(w.dead)
		for _, id := range c.drained {
			w.row(id).Draining = 0
		}
		w.settle(t)
		if w.voters() != min(5, c.members-1+c.members%2) {
			t.Errorf("%d members have the voters %s when nothing is drained any more", c.members, w.voterIDs())
		}
	}
	for _, members := range []int{2, 3, 4} { // the leader hands over, then loses its vote
		w := grown(t, members)
		w.row("n1").Draining = 1
		taken := w.settle(t)
		if got := taken[len(taken)-1]; got != "hand over from n1" {
			t.Errorf("a leader of %d that is drained does %v", members, taken)
		}
		w.self = "n2"
		w.settle(t)
		if w.servers[w.at("n1")].Suffrage == raft.Voter || w.voters()%2 == 0 {
			t.Errorf("%d members, the former leader drained: the voters are %s", members, w.voterIDs())
		}
	}
}

func TestPlanFollowsAddresses(t *testing.T) {
	w := newWorld()
	w.join("n2")
	w.settle(t)
	w.row("n1").Addr, w.row("n2").Addr = "a:1", "b:1"
	w.settle(t)
	if got := fmt.Sprintf("%s %s %s", w.servers[0].Address, w.servers[1].Address, w.voterIDs()); got != "a:1 b:1 [n1]" {
		t.Errorf("the servers are %s", got)
	}
}

// Whatever happens to the members, plans end, and they end with an odd number
// of voters when everybody is well.
func TestPlanSettles(t *testing.T) {
	for range 300 {
		w := newWorld()
		for i := range 12 {
			id := fmt.Sprint("n", i+2)
			other := w.members[rand.IntN(len(w.members))].ID
			switch rand.IntN(6) {
			case 0, 1:
				w.join(id)
			case 2:
				if other != w.self {
					w.row(other).Removed = 1
				}
			case 3:
				if other != w.self {
					w.dead[other] = true
				}
			case 5:
				w.row(other).Draining = int64(rand.IntN(2))
			case 4:
				w.join(id)
				if other != w.self && w.dead[other] && w.row(other).Removed == 0 {
					w.row(other).ReplacedBy = id
				}
			}
			w.settle(t)
		}
		clear(w.dead)
		for i := range w.members {
			w.members[i].ReplacedBy, w.members[i].Draining = "", 0
		}
		w.settle(t)
		if w.voters()%2 == 0 {
			t.Fatalf("%d voters in the end", w.voters())
		}
	}
}

// entrusted are the members that may have the key.
func (w *world) entrusted() string {
	var ids []string
	for _, m := range w.members {
		if m.Entrusted != 0 && m.Removed == 0 {
			ids = append(ids, m.ID)
		}
	}
	slices.Sort(ids)
	return fmt.Sprint(ids)
}

// TestPlanEntrustsVotersOnly: who has no vote and gets none may not have the key.
func TestPlanEntrustsVotersOnly(t *testing.T) {
	w := newWorld()
	for i := range 7 {
		w.settle(t)
		if got := w.entrusted(); got != w.voterIDs() {
			t.Errorf("%d members: the key is with %s, the voters are %s", len(w.members), got, w.voterIDs())
		}
		w.join(fmt.Sprint("n", i+2))
	}
	// One that leaves takes others down with it to the next odd number.
	w = newWorld()
	w.join("n2")
	w.join("n3")
	w.settle(t)
	w.row("n2").Removed = 1
	w.settle(t)
	if got := w.entrusted(); got != "[n1]" || !w.refused["n3"] {
		t.Errorf("the key is with %s, the voters are %s", got, w.voterIDs())
	}
}

// TestPlanWaitsForTheKey: nobody votes before it holds the key, and the others wait.
func TestPlanWaitsForTheKey(t *testing.T) {
	w := newWorld()
	w.join("n2")
	w.join("n3")
	w.slow["n3"] = true
	w.settle(t)
	if got := w.voterIDs(); got != "[n1]" || w.entrusted() != "[n1 n2 n3]" {
		t.Errorf("with the key missing the voters are %s, entrusted are %s", got, w.entrusted())
	}
	delete(w.slow, "n3")
	w.settle(t)
	if got := w.voterIDs(); got != "[n1 n2 n3]" {
		t.Errorf("the voters are %s", got)
	}
}

// TestPlanDrainedForgets: a node that is drained gives up the key with its vote, and
// who takes the vote has it before.
func TestPlanDrainedForgets(t *testing.T) {
	w := newWorld()
	for i := range 3 {
		w.join(fmt.Sprint("n", i+2))
	}
	w.settle(t)
	w.row("n2").Draining = 1
	w.settle(t)
	if got := w.voterIDs(); got != "[n1 n3 n4]" || w.entrusted() != got || !w.refused["n2"] {
		t.Errorf("the voters are %s, entrusted are %s", got, w.entrusted())
	}
}

// TestPlanHeirWaitsForTheKey: who is to follow a voter that goes keeps what it was
// entrusted with until it has it.
func TestPlanHeirWaitsForTheKey(t *testing.T) {
	for name, leave := range map[string]func(*world){
		"removed": func(w *world) { w.row("n1").Removed = 1 },
		"drained": func(w *world) { w.row("n1").Draining = 1 },
	} {
		w := grown(t, 2)
		w.slow["n2"] = true
		leave(w)
		if taken := w.settle(t); fmt.Sprint(taken) != "[entrust n2]" {
			t.Errorf("%s: %v", name, taken)
		}
		delete(w.slow, "n2")
		if taken := w.settle(t); fmt.Sprint(taken) != "[add as voter n2 hand over from n1]" {
			t.Errorf("%s, with the key: %v", name, taken)
		}
	}
	w := grown(t, 3)
	w.join("n4")
	w.settle(t)
	w.dead["n3"], w.slow["n4"] = true, true
	w.row("n3").ReplacedBy = "n4"
	if taken := w.settle(t); fmt.Sprint(taken) != "[entrust n4]" {
		t.Errorf("replaced: %v", taken)
	}
	delete(w.slow, "n4")
	w.settle(t)
	if got := w.voterIDs(); got != "[n1 n2 n4]" || w.entrusted() != got {
		t.Errorf("the voters are %s, entrusted are %s", got, w.entrusted())
	}
}
