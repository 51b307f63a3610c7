package e2e

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/atoll-registry/atoll/scripts/lab"
)

// used is the time that a node's process has taken of a processor, to 10 ms.
func used(t *testing.T, n *lab.Node) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", n.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), ") ") // behind the name
	fields := strings.Fields(rest)
	ticks := 0
	for _, i := range []int{11, 12} { // utime, stime: proc_pid_stat(5)
		n, err := strconv.Atoi(fields[i])
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// after waits for a time to pass: there is nothing else to wait for.
func after(ctx context.Context, t *testing.T, d time.Duration) {
	t.Helper()
	select {
	case <-time.After(d):
	case <-ctx.Done():
		t.Fatal(ctx.Err())
	}
}

// Three nodes cost next to nothing while nothing happens. One that is frozen again and
// again, as by a machine that swaps, keeps nobody else from working, and is a node like
// the others when it is over.
func TestIdleAndFrozen(t *testing.T) {
	t.Parallel()
	ctx := deadline(t, 4*time.Minute)
	s := newSite(ctx, t, newLab(t), plan{name: "idle", net: 88, nodes: 3})
	img := image(ctx, t, 0)
	s.pushAll(ctx, s.nodes[0], img, "library/app", "v1")
	after(ctx, t, 10*time.Second) // what a push leaves to do
	const length = 20 * time.Second
	var before []time.Duration
	for _, n := range s.nodes {
		before = append(before, used(t, n))
	}
	after(ctx, t, length)
	for i, n := range s.nodes {
		share := float64(used(t, n)-before[i]) / float64(length)
		t.Logf("%s takes %.1f %% of a processor", n.Host.Name, 100*share)
		if share > 0.08 {
			t.Errorf("%s is not idle", n.Host.Name)
		}
	}

	frozen, rest := s.nodes[2], s.nodes[:2]
	began := used(t, rest[0]) + used(t, rest[1])
	start := time.Now()
	for round := range 6 {
		if err := frozen.Process().Freeze(); err != nil {
			t.Fatal(err)
		}
		after(ctx, t, time.Duration(1+round%3*3)*time.Second) // 1, 4, 7: not missed, hardly, for sure
		tag := fmt.Sprint("round", round)
		s.pushAll(ctx, rest[round%2], img, "library/app", tag)
		if err := frozen.Process().Thaw(); err != nil {
			t.Fatal(err)
		}
		if got := s.pullAll(ctx, frozen, "app:"+tag); got != img.Index.String() {
			t.Errorf("thawed, it serves %s as %s, want %s", got, tag, img.Index)
		}
	}
	share := float64(used(t, rest[0])+used(t, rest[1])-began) / float64(time.Since(start))
	t.Logf("meanwhile the others took %.0f %% of a processor", 100*share)
	if share > 1 {
		t.Error("the others have a storm to weather")
	}
	for _, n := range s.nodes {
		if err := n.WaitStatus(ctx, "all to be up", func(st lab.Status) bool {
			up := 0
			for _, node := range st.Nodes {
				if node.Up && node.Voter {
					up++
				}
			}
			return st.Quorum && up == 3
		}); err != nil {
			t.Fatal(err)
		}
	}
}
