package recovery

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/clustertest"
	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/joining"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/table"
)

type note struct {
	Text string `cbor:"text"`
}

// site is a cluster whose nodes keep notes.
type site struct {
	*clustertest.Cluster
	t     *testing.T
	nodes []*clustertest.Node
}

func grow(t *testing.T, n int) *site {
	s := &site{t: t, Cluster: clustertest.New(t, clustertest.Options{Define: func(n *clustertest.Node, db *table.DB) {
		n.Tables = table.Define(db, "note", table.Index[note]{Name: "text", Version: 1, Keys: func(_ []string, n note) [][]string {
			return [][]string{{n.Text}}
		}})
	}})}
	s.nodes = s.Grow(n)
	return s
}

func notes(n *clustertest.Node) *table.Table[note] { return n.Tables.(*table.Table[note]) }

func write(ctx context.Context, n *clustertest.Node, key, text string) error {
	_, err := n.DB.Update(ctx, func(tx *table.Tx) error {
		tx.Append("journal/test", []byte(text))
		return notes(n).Put(tx, note{text}, key)
	})
	return err
}

func (s *site) write(n *clustertest.Node, key, text string) {
	s.t.Helper()
	if err := write(s.t.Context(), n, key, text); err != nil {
		s.t.Fatalf("%s writes %s: %v", n.Name, key, err)
	}
}

// holds reads a key of the node's own state; "" for none.
func holds(n *clustertest.Node, key string) (text string) {
	_ = n.DB.View(func(v *table.View) error {
		row, _, _, err := notes(n).Get(v, key)
		text = row.Text
		return err
	})
	return text
}

func (s *site) await(n *clustertest.Node, key, text string) {
	s.t.Helper()
	s.Await(fmt.Sprintf("%s holds %s", n.Name, key), func() bool { return holds(n, key) == text })
}

// rest waits until all nodes hold a key, then stops them.
func (s *site) rest(key, text string) {
	s.t.Helper()
	for _, n := range s.nodes {
		s.await(n, key, text)
	}
	for _, n := range s.nodes {
		n.Stop()
	}
}

func (s *site) survivor(n *clustertest.Node) Survivor {
	return Survivor{
		Dir: n.Dir, Log: slog.New(slog.DiscardHandler),
		Answers: func(_ context.Context, addr, _ string) bool {
			for _, other := range s.nodes {
				if other.Addr == addr {
					return other.Up()
				}
			}
			return false
		},
	}
}

func (s *site) recover(n *clustertest.Node) Recovered {
	s.t.Helper()
	out, err := Recover(s.t.Context(), s.survivor(n))
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

// serves fails the test unless the node is a site of its own that takes writes.
func (s *site) serves(n *clustertest.Node, key, text string) {
	s.t.Helper()
	s.write(n, key, text)
	status, err := n.Status(s.t.Context())
	if err != nil || !status.Quorum || status.Leader != status.Self || len(status.Members) != 1 {
		s.t.Fatalf("%s is no site of its own: %+v, %v", n.Name, status, err)
	}
}

// fenced fails the test unless the node knows that it is out and does as told.
func (s *site) fenced(n *clustertest.Node) {
	s.t.Helper()
	s.Await(n.Name+" is fenced", func() bool {
		status, err := n.Status(s.t.Context())
		return err == nil && status.Fenced != nil
	})
	err := write(s.t.Context(), n, "late", "x")
	if !errors.Is(err, epoch.ErrFenced) || !strings.Contains(err.Error(), "atoll node wipe --yes") {
		s.t.Errorf("a write on the fenced %s: %v", n.Name, err)
	}
	fresh, err := n.DB.Confirmed(s.t.Context(), func(*table.View) error { return nil })
	if err != nil || !fresh.Stale {
		s.t.Errorf("a read on the fenced %s: %+v, %v, want one that says it is stale", n.Name, fresh, err)
	}
}

// TestOldMajorityDoesNotTakeOver is what the epoch is for: two of three voters
// come back with the data of before the recovery, more than half of what they
// take for the site.
func TestOldMajorityDoesNotTakeOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := grow(t, 3)
		one, two, three := s.nodes[0], s.nodes[1], s.nodes[2]
		s.write(one, "a", "before")
		for _, n := range s.nodes {
			s.await(n, "a", "before")
		}
		one.Kill()
		two.Kill()
		three.Stop()
		out := s.recover(three)
		if len(out.Left) != 2 || out.Epoch.Number != 1 {
			t.Errorf("recovered: %+v", out)
		}
		three.Start()
		s.serves(three, "b", "after")
		if got := holds(three, "a"); got != "before" {
			t.Fatalf("the recovered site lost a: %q", got)
		}
		if err := three.DB.View(func(v *table.View) error {
			for row, err := range notes(three).Lookup(v, "text", table.Range{Prefix: []string{"before"}}) {
				if err != nil || row.Key[0] != "a" {
					return fmt.Errorf("the index gives %v, %w", row, err)
				}
				return nil
			}
			return errors.New("the index is empty")
		}); err != nil {
			t.Error(err)
		}

		for _, n := range []*clustertest.Node{one, two} {
			if err := n.TryStart(); err != nil {
				t.Fatal(err)
			}
		}
		s.fenced(one)
		s.fenced(two)
		time.Sleep(5 * time.Minute) // of the bubble's time: many elections
		for _, n := range []*clustertest.Node{one, two} {
			if n.Leader() != "" {
				t.Errorf("%s follows %s", n.Name, n.Leader())
			}
			if got := holds(n, "b"); got != "" {
				t.Errorf("%s was given b", n.Name)
			}
		}
		s.serves(three, "c", "still")
		// Who asks how it stands, before it has met the epoch, is not told that it was
		// removed: it would end instead of serving what it has.
		for _, n := range []*clustertest.Node{one, two} {
			pin, err := pki.PinPEM(three.CA())
			if err != nil {
				t.Fatal(err)
			}
			var standing struct{ Removed int64 }
			if err := joining.Post(t.Context(), func(ctx context.Context) (net.Conn, error) {
				return s.Network.Visitor(n.Addr).DialJoin(ctx, three.Addr, pin)
			}, "/v1/standing", map[string]string{"node": n.Self()}, &standing); err != nil || standing.Removed != 0 {
				t.Errorf("%s, which the recovery left out, is told %+v, %v", n.Name, standing, err)
			}
		}
		status, err := three.Status(t.Context())
		if err != nil || len(status.Strays) != 2 || status.Strays[0].Apart {
			t.Errorf("the recovered node names the strays %+v, %v", status.Strays, err)
		}

		// Fenced stays fenced, also when nobody is there to tell.
		one.Stop()
		two.Stop()
		three.Stop()
		one.Start()
		two.Start()
		s.fenced(one)
		s.fenced(two)

		// The recovered site stays one through its own restarts.
		for range 3 {
			three.Start()
			s.serves(three, "d", time.Now().String())
			three.Stop()
		}

		// One wiped and joined anew, under its old name.
		one.Stop()
		if _, err := Wipe(one.Dir); err != nil {
			t.Fatal(err)
		}
		three.Start()
		token, err := three.CreateToken(t.Context(), time.Hour, 1)
		if err != nil {
			t.Fatal(err)
		}
		if err := one.JoinWith(token, three.Addr); err != nil {
			t.Fatal(err)
		}
		one.Start()
		s.await(one, "c", "still")
		if err := one.Epoch.Err(); err != nil || one.Epoch.Wire() != three.Epoch.Wire() {
			t.Errorf("the new member's epoch is %q, %v", one.Epoch.Wire(), err)
		}
	})
}

// TestMajorityOutOfReach: cut off, an old majority cannot know and goes on. When
// it meets the recovered site it steps back, and what it took can be saved.
func TestMajorityOutOfReach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := grow(t, 3)
		one, two, three := s.nodes[0], s.nodes[1], s.nodes[2]
		s.write(one, "a", "before")
		s.rest("a", "before")
		s.recover(three)
		three.Start()
		s.Isolate(three)
		s.serves(three, "b", "after")
		one.Start()
		two.Start()
		s.Await("the old majority leads itself", func() bool { return write(t.Context(), one, "lost", "tail") == nil })
		s.await(two, "lost", "tail")
		s.Rejoin(three)
		s.fenced(one)
		s.fenced(two)
		s.serves(three, "c", "still")
		if got := holds(three, "lost"); got != "" {
			t.Error("the old majority wrote to the recovered site")
		}
		one.Stop()
		var saved bytes.Buffer
		count, err := Salvage(one.Dir, nil, &saved, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		if !count.Exact || count.Entries != 1 || count.Rows < 1 {
			t.Errorf("salvaged %+v", count)
		}
		found := map[string]bool{}
		lines := json.NewDecoder(&saved)
		var head Salvaged
		if err := lines.Decode(&head); err != nil || head.Since == 0 || head.Site == "" {
			t.Errorf("the first line is %+v, %v", head, err)
		}
		for lines.More() {
			var item SalvagedItem
			if err := lines.Decode(&item); err != nil {
				t.Fatal(err)
			}
			if item.Table == "note" {
				found[item.Key[0]+"="+fmt.Sprint(item.Value)] = true
			}
			if item.Log == "journal/test" {
				found["entry"] = true
			}
		}
		if !found["lost=map[text:tail]"] || !found["entry"] || len(found) != 2 {
			t.Errorf("salvaged %v", found)
		}
		one.Start() // salvaging changed nothing
		s.fenced(one)
	})
}

// half is a site of two, whose voter is dead while the other one is stopped.
func half(t *testing.T) (s *site, first, second *clustertest.Node) {
	s = grow(t, 2)
	first, second = s.nodes[0], s.nodes[1]
	s.write(first, "a", "before")
	s.await(second, "a", "before")
	first.Kill()
	second.Stop()
	return s, first, second
}

// TestSecondOfTwo: what is left may be a node without a vote, and the old lone
// voter must not elect itself when it comes back.
func TestSecondOfTwo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, first, second := half(t)
		// It does not hold the cluster key: the dead node's disk, or a copy, has it.
		survivor := s.survivor(second)
		if _, err := Recover(t.Context(), survivor); !errors.Is(err, ErrNoKey) || !strings.Contains(err.Error(), "--cluster-key") {
			t.Errorf("without the key: %v", err)
		}
		if survivor.ClusterKey, _ = os.ReadFile(filepath.Join(first.Dir, member.ClusterKeyFile)); len(survivor.ClusterKey) == 0 {
			t.Fatal("the dead voter has no key")
		}
		if _, err := Recover(t.Context(), survivor); err != nil {
			t.Fatal(err)
		}
		second.Start()
		if _, err := second.Seal("x", nil); err != nil {
			t.Errorf("it does not hold the key now: %v", err)
		}
		s.serves(second, "b", "after")
		first.Start()
		s.fenced(first)
		s.Await("the old lone voter does not lead itself", func() bool { return first.Leader() != first.Self() })
		s.serves(second, "c", "still")
	})
}

// A lone voter that leads a site of before the recovery takes its word back the moment it
// hears of that, not when it has left the consensus.
func TestFencedLoneVoterConfirmsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, first, second := half(t)
		survivor := s.survivor(second)
		survivor.ClusterKey, _ = os.ReadFile(filepath.Join(first.Dir, member.ClusterKeyFile)) // Recover refuses none
		if _, err := Recover(t.Context(), survivor); err != nil {
			t.Fatal(err)
		}
		second.Start()
		s.Isolate(first)
		first.Start()
		s.Await("the old lone voter leads what it knows", func() bool { _, ok := first.OwnIndex(); return ok })
		if err := first.Epoch.Meet(second.Self(), second.Epoch.Wire()); !errors.Is(err, epoch.ErrFenced) {
			t.Fatalf("it meets the recovered one: %v", err)
		}
		if _, ok := first.OwnIndex(); ok {
			t.Error("a fenced node confirms itself")
		}
		s.Rejoin(first)
		s.fenced(first)
	})
}

// TestRecoveredTwiceApart: two survivors that know nothing of each other refuse
// each other, and neither gives way by itself.
func TestRecoveredTwiceApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := grow(t, 3)
		one, two := s.nodes[0], s.nodes[1]
		s.write(one, "a", "before")
		s.rest("a", "before")
		s.recover(one)
		s.recover(two)
		one.Start()
		two.Start()
		s.serves(one, "b", "one")
		s.serves(two, "b", "two")
		s.Await("both name the other", func() bool {
			a, b := one.Epoch.Strays(), two.Epoch.Strays()
			return len(a) == 1 && a[0].Apart && len(b) == 1 && b[0].Apart
		})
		s.serves(one, "c", "one")
		s.serves(two, "c", "two")
	})
}

func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := grow(t, 3)
		s.write(s.nodes[0], "a", "before")
		for _, n := range s.nodes {
			s.await(n, "a", "before")
		}
		one, two, three := s.nodes[0], s.nodes[1], s.nodes[2]
		one.Stop()
		three.Stop()
		if _, err := Recover(t.Context(), s.survivor(three)); !errors.Is(err, ErrAnswers) || !strings.Contains(err.Error(), two.Addr) {
			t.Errorf("with a voter up: %v", err)
		}
		two.Stop()
		s.recover(three)
		if _, err := Recover(t.Context(), s.survivor(three)); !errors.Is(err, ErrNotNeeded) {
			t.Errorf("a second time: %v", err)
		}
		three.Start()
		one.Start()
		s.fenced(one)
		one.Stop()
		three.Stop()
		if _, err := Recover(t.Context(), s.survivor(one)); !errors.Is(err, epoch.ErrFenced) {
			t.Errorf("on a fenced node: %v", err)
		}
		if _, err := Salvage(three.Dir, nil, &bytes.Buffer{}, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "not fenced") {
			t.Errorf("salvage on the recovered node: %v", err)
		}
		if _, err := Recover(t.Context(), s.survivor(&clustertest.Node{Dir: t.TempDir()})); !errors.Is(err, member.ErrEmpty) {
			t.Errorf("in an empty directory: %v", err)
		}
	})
}

var errKilled = errors.New("killed by the test")

// TestKilledWhileRecovering ends the work at every step: until the plan is
// written the node is as it was, after it only the same command goes on.
func TestKilledWhileRecovering(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := grow(t, 3)
		s.write(s.nodes[0], "a", "before")
		s.rest("a", "before")
		three, before := s.nodes[2], s.nodes[2].Dir
		for kill, done := 0, false; !done; kill++ {
			three.Dir = filepath.Join(t.TempDir(), "data")
			if err := os.CopyFS(three.Dir, os.DirFS(before)); err != nil {
				t.Fatal(err)
			}
			survivor, n, where := s.survivor(three), 0, ""
			survivor.Step = func(name string) error {
				if n++; n > kill {
					where = name
					return errKilled
				}
				return nil
			}
			_, err := Recover(t.Context(), survivor)
			if done = err == nil; !done && !errors.Is(err, errKilled) {
				t.Fatal(err)
			}
			if pending := Pending(three.Dir); (pending == nil) != (done || where == "copied" || where == "built") {
				t.Errorf("killed at %s: pending is %v", where, pending)
			} else if pending == nil && !done {
				three.Start() // nothing has happened yet: it is a node of the old site
				if status, err := three.Status(t.Context()); err != nil || len(status.Members) != 3 || holds(three, "a") != "before" {
					t.Errorf("killed at %s, the node is %+v, %v", where, status, err)
				}
				three.Stop()
			}
			if !done {
				s.recover(three)
			}
			if err := Pending(three.Dir); err != nil {
				t.Fatal(err)
			}
			three.Start()
			s.serves(three, "b", "after")
			if got := holds(three, "a"); got != "before" {
				t.Errorf("killed at %s: a is %q", where, got)
			}
			three.Stop()
			for _, name := range []string{stateFile, raftDir} {
				if _, err := os.Stat(filepath.Join(three.Dir, fmt.Sprintf(keptDir, 1), name)); err != nil {
					t.Errorf("killed at %s: the old state is not kept: %v", where, err)
				}
			}
			if _, err := os.Stat(filepath.Join(three.Dir, buildDir)); !os.IsNotExist(err) {
				t.Errorf("killed at %s: the building site is still there: %v", where, err)
			}
			if done && kill < 8 {
				t.Errorf("only %d steps", kill)
			}
		}
	})
}

// TestKilledWhileWiping: what is half wiped starts nothing and joins nothing.
func TestKilledWhileWiping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := grow(t, 2)
		first, second := s.nodes[0], s.nodes[1]
		s.write(first, "a", "before")
		s.await(second, "a", "before")
		second.Kill()
		before := second.Dir
		for kill := 1; ; kill++ {
			second.Dir = filepath.Join(t.TempDir(), "data")
			if err := os.CopyFS(second.Dir, os.DirFS(before)); err != nil {
				t.Fatal(err)
			}
			n := 0
			_, err := wipe(second.Dir, func(string) error {
				if n++; n == kill {
					return errKilled
				}
				return nil
			})
			if err == nil {
				return
			}
			left := false
			for _, name := range []string{stateFile, raftDir} {
				_, err := os.Stat(filepath.Join(second.Dir, name))
				left = left || err == nil
			}
			token, err := first.CreateToken(t.Context(), time.Hour, 1)
			if err != nil {
				t.Fatal(err)
			}
			if err := second.TryStart(); !errors.Is(err, member.ErrEmpty) {
				t.Errorf("killed after %d: a half wiped node starts: %v", kill, err)
			}
			if err := second.JoinWith(token, first.Addr); left == (err == nil) {
				t.Errorf("killed after %d: with state left %v, joining says %v", kill, left, err)
			}
		}
	})
}
