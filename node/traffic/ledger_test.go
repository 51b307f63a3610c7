package traffic

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/transfer"
)

func (n *node) flow(peer string, c transfer.Class) transfer.Flow {
	return transfer.Flow{Blob: transfer.Blob{Digest: blob("x"), Size: 1 << 40}, Peer: peer, Class: c}
}

// push sends pieces until told to wait, at most so many.
func (n *node) push(t *testing.T, f transfer.Flow, most int) (sent int64) {
	t.Helper()
	for range most {
		if wait := n.Take(f, piece); wait > 0 {
			return sent
		}
		sent += piece
		pass(20 * time.Millisecond) // a fast wire; the disk gets its turn
	}
	return sent
}

func TestBudgetAtItsEnd(t *testing.T) {
	for _, hard := range []bool{false, true} {
		bubble(t, 2, func(t *testing.T, s *site) {
			text := "zone=ship<>zone=shore: 20MiB/day"
			if hard {
				text += " hard"
			}
			s.set("traffic.budgets", text)
			settle()
			n, other := s.nodes[0], s.nodes[1]
			// What comes counts too, and once, though both ends see it.
			other.push(t, other.flow("id-a", transfer.Pull), 40)
			n.Received(n.flow("id-b", transfer.Pull), 10<<20)
			pass(2 * time.Second) // they tell each other
			if sent := n.push(t, n.flow("id-b", transfer.Prefetch), 1000); sent != 10<<20 {
				t.Errorf("prefetch sent %d bytes of 10 MiB that are left", sent)
			}
			if got := n.Notices(); len(got) != 1 || got[0].Code != "traffic-budget-spent" || !strings.Contains(got[0].Text, "20MiB") {
				t.Errorf("the operator is told %+v", got)
			}
			for c := range transfer.Class(transfer.Classes) {
				goes := n.push(t, n.flow("id-b", c), 5) > 0
				if want := !hard && c != transfer.Repair && c != transfer.Prefetch; goes != want {
					t.Errorf("hard %v: %s goes: %v", hard, c, goes)
				}
			}
			if n.push(t, n.flow("id-c", transfer.Prefetch), 5) == 0 {
				t.Error("a peer over another way was stopped")
			}
			// The next day it begins anew.
			at := time.Now()
			s.mu.Lock()
			s.wall = func() time.Time { return time.Now().Add(24 * time.Hour) }
			s.mu.Unlock()
			settle()
			if n.push(t, n.flow("id-b", transfer.Prefetch), 5) != 5*piece || len(n.Notices()) > 0 {
				t.Error("the next day nothing goes")
			}
			// And a clock that comes back finds the day used up.
			s.mu.Lock()
			s.wall = func() time.Time { return at }
			s.mu.Unlock()
			pass(2 * time.Second)
			if n.push(t, n.flow("id-b", transfer.Prefetch), 5) != 0 {
				t.Error("a clock that jumps there and back gives a new budget")
			}
		})
	}
}

// What went is never counted too low after a crash, and at most a step too high.
func TestBudgetSurvivesACrash(t *testing.T) {
	bubble(t, 2, func(t *testing.T, s *site) {
		s.set("traffic.budgets", "node: 1GiB/month hard")
		settle()
		n := s.nodes[0]
		sent := n.push(t, n.flow("id-b", transfer.Pull), 300)
		if sent != 300*piece {
			t.Fatalf("sent %d", sent)
		}
		dir := t.TempDir()
		data, err := os.ReadFile(filepath.Join(n.Dir, booksName))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, booksName), data, 0o600); err != nil { // as a crash leaves it
			t.Fatal(err)
		}
		again := s.add(n.id, dir)
		stop := s.run(again)
		if _, err := again.settings.Set(t.Context(), "traffic.budgets", "node: 1GiB/month hard", ""); err != nil {
			t.Fatal(err)
		}
		settle()
		stop()
		again.mu.Lock()
		l := again.ledgers["node"]
		used, step := l.used[l.period], l.step()
		again.mu.Unlock()
		if used < sent || used > sent+step {
			t.Errorf("after a crash %d bytes count, %d went and a step has %d", used, sent, step)
		}
	})
}

// A node that ends in order counts to the byte.
func TestBudgetAfterAnOrderlyEnd(t *testing.T) {
	dir := t.TempDir()
	begin := func(t *testing.T, s *site) (*node, func()) {
		n := s.add("id-a", dir)
		stop := s.run(n)
		if _, err := n.settings.Set(t.Context(), "traffic.budgets", "node: 1GiB/day", ""); err != nil {
			t.Fatal(err)
		}
		settle()
		return n, stop
	}
	bubble(t, 2, func(t *testing.T, s *site) {
		n, stop := begin(t, s)
		n.push(t, n.flow("id-b", transfer.Pull), 7)
		stop()
		again, stop := begin(t, s)
		defer stop()
		again.mu.Lock()
		defer again.mu.Unlock()
		if l := again.ledgers["node"]; l.used[l.period] != 7*piece {
			t.Errorf("%d bytes count, %d went", l.used[l.period], 7*piece)
		}
	})
}

// While the disk takes nothing, only what nobody waits for waits.
func TestBudgetOnABrokenDisk(t *testing.T) {
	bubble(t, 2, func(t *testing.T, s *site) {
		n := s.nodes[0]
		n.Dir = filepath.Join(n.Dir, "gone")
		s.set("traffic.budgets", "node: 1GiB/day")
		settle()
		if n.push(t, n.flow("id-b", transfer.Prefetch), 5) != 0 {
			t.Error("prefetch goes uncounted")
		}
		if n.push(t, n.flow("id-b", transfer.Pull), 5) != 5*piece {
			t.Error("a pull was stopped for a budget that is not used up")
		}
		if err := os.Mkdir(n.Dir, 0o700); err != nil {
			t.Fatal(err)
		}
		pass(3 * time.Second)
		if n.push(t, n.flow("id-b", transfer.Prefetch), 5) != 5*piece {
			t.Error("the disk is back, and prefetch still waits")
		}
	})
}

// The nodes of a site use up a budget together.
func TestNodesShareABudget(t *testing.T) {
	bubble(t, 3, func(t *testing.T, s *site) {
		s.set("traffic.budgets", "*>c: 20MiB/day")
		settle()
		a, b := s.nodes[0], s.nodes[1]
		a.push(t, a.flow("id-c", transfer.Replication), 60)
		pass(2 * time.Second)
		if sent := b.push(t, b.flow("id-c", transfer.Prefetch), 1000); sent != 20*piece {
			t.Errorf("the second node sent %d bytes of the 5 MiB that the first had left", sent)
		}
	})
}

// A node's budget is its own, for what it sends and takes in.
func TestEachNodeHasItsBudget(t *testing.T) {
	bubble(t, 2, func(t *testing.T, s *site) {
		s.set("traffic.budgets", "node: 20MiB/day")
		settle()
		a, b := s.nodes[0], s.nodes[1]
		a.Received(a.flow("somebody", transfer.Pull), 15<<20)
		pass(2 * time.Second)
		if sent := b.push(t, b.flow("somebody", transfer.Prefetch), 1000); sent != 20<<20 {
			t.Errorf("a node that used nothing sent %d bytes of 20 MiB", sent)
		}
		if sent := a.push(t, a.flow("somebody", transfer.Prefetch), 1000); sent != 5<<20 {
			t.Errorf("the other sent %d bytes of the 5 MiB that it had left", sent)
		}
	})
}

// What enters or leaves a place has a budget, whatever nodes there are elsewhere; what
// stays in it costs nothing.
func TestBudgetOfAPlace(t *testing.T) {
	bubble(t, 3, func(t *testing.T, s *site) {
		s.set("traffic.budgets", "zone=shore<>!zone=shore: 20MiB/month")
		settle()
		ship, shore := s.nodes[0], s.nodes[1]
		if sent := shore.push(t, shore.flow("id-c", transfer.Prefetch), 200); sent != 200*piece {
			t.Errorf("only %d bytes went within the place", sent)
		}
		ship.push(t, ship.flow("id-b", transfer.Pull), 60)
		pass(2 * time.Second)
		if sent := shore.push(t, shore.flow("id-a", transfer.Prefetch), 1000); sent != 5<<20 {
			t.Errorf("%d bytes went of the 5 MiB that were left", sent)
		}
	})
}
