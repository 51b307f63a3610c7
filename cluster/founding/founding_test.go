package founding

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atoll-registry/atoll/cluster/atomicfile"
	"github.com/atoll-registry/atoll/cluster/joining"
	"github.com/atoll-registry/atoll/cluster/member"
)

func TestCheckExpect(t *testing.T) {
	for _, c := range []struct {
		expect int
		addrs  string
		ok     bool
	}{
		{3, "a b c", true}, {2, "a b c", true}, {3, "a b c d e", true}, {3, "a a b b c c d e", true}, {3, "a", true},
		{3, "a b c d e f", false}, {2, "a b c d", false}, {1, "a", false}, {0, "a", false}, {-1, "a", false}, {33, "a", false},
	} {
		if err := CheckExpect(c.expect, strings.Fields(c.addrs)); (err == nil) != c.ok {
			t.Errorf("%d of %s: %v", c.expect, c.addrs, err)
		}
	}
}

func TestThreeMachinesFoundOneSite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		boxes := w.add(3, 3, newPairing(t))
		boxes[0].start()
		boxes[1].start()
		time.Sleep(2 * time.Minute)
		if n := w.exists(0); n != 0 {
			t.Fatal("two of three founded a site")
		}
		if said := boxes[0].log.all(); !strings.Contains(said, "not all machines are there") || !strings.Contains(said, "box2 at 10.0.0.2:5001") {
			t.Errorf("the first waits and says %s", said)
		}
		boxes[2].start()
		w.settled(boxes...)
		for _, b := range boxes { // the same command line just starts
			b.kill()
		}
		w.settled(boxes...)
	})
}

// A machine that comes hours later joins the site, and so does one of which the
// others were told nothing.
func TestLateMachines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		p := newPairing(t)
		boxes := w.add(5, 3, p)
		stranger := w.add(1, 3, p)[0]
		stranger.config.Addrs = []string{boxes[1].config.Advertise}
		boxes[0].config.Addrs = []string{boxes[1].config.Advertise} // lists differ
		boxes[2].config.Addrs = []string{boxes[0].config.Advertise}
		w.settled(boxes[:3]...)
		time.Sleep(3 * time.Minute)
		w.settled(boxes...)
		w.settled(w.boxes...)
	})
}

// A majority of the addresses found the site; the others cannot found a second.
func TestPartitions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		boxes := w.add(5, 3, newPairing(t))
		for _, a := range boxes[:2] {
			for _, b := range boxes[2:] {
				w.part(a, b, true)
			}
		}
		for _, b := range boxes {
			b.start()
		}
		time.Sleep(2 * time.Minute)
		if n := w.exists(1); n != 1 || boxes[0].site() != "" || boxes[2].site() == "" {
			t.Fatalf("%d sites, of the minority %q", n, boxes[0].site())
		}
		for _, a := range boxes[:2] {
			for _, b := range boxes[2:] {
				w.part(a, b, false)
			}
		}
		w.settled(boxes...)
	})
}

var errKilled = errors.New("killed by the test")

// kill is a machine, by its place among the boxes, that ends at a step.
type kill struct {
	box  int
	step string
}

// Machines are killed at every step that they can take, where it can be so twice, and
// come back before the others notice, or a while later. Who founds is settled by the
// ids, and so is who takes which steps, in whatever order the machines run.
func TestKilledAtEveryStep(t *testing.T) {
	const founder = 0
	taken, killed := map[string]bool{}, map[string]bool{}
	for follower, away := range map[int]time.Duration{1: 0, 2: 20 * time.Second} {
		for _, plan := range [][]kill{
			{{founder, "began"}, {founder, "began"}}, {{founder, "agreed"}, {founder, "agreed"}}, {{founder, "founded"}},
			{{follower, "began"}, {follower, "began"}}, {{follower, "pledged"}, {follower, "released"}, {follower, "pledged"}},
			{{founder, "agreed"}, {follower, "released"}}, {{follower, "saw the site"}}, {{follower, "granted"}, {follower, "granted"}},
			{{follower, "joined"}}, {{founder, "founded"}, {follower, "saw the site"}, {follower, "granted"}, {follower, "joined"}},
		} {
			t.Run(fmt.Sprint(plan, " away ", away), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { killedAt(t, plan, away, taken) })
			})
			for _, k := range plan {
				killed[k.step] = true
			}
		}
	}
	for step := range taken {
		if !killed[step] {
			t.Errorf("nobody is killed at %q", step)
		}
	}
}

// killedAt kills as planned, one after the other, and notes all steps that are taken.
func killedAt(t *testing.T, plan []kill, away time.Duration, taken map[string]bool) {
	w := newWorld(t)
	defer w.end()
	p := newPairing(t)
	boxes := w.add(3, 3, p)
	for i, b := range boxes {
		if err := os.MkdirAll(b.config.Dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := atomicfile.WriteJSON(filepath.Join(b.config.Dir, member.MachineFile), promise{Machine: fmt.Sprintf("%032x", i+1), Token: p.ID()}); err != nil {
			t.Fatal(err)
		}
	}
	var mu sync.Mutex
	left := plan
	victim := make(chan *box, len(plan))
	w.faults(func(b *box, step string) error {
		mu.Lock()
		defer mu.Unlock()
		taken[step] = true
		if len(left) == 0 || boxes[left[0].box] != b || left[0].step != step {
			return nil
		}
		left = left[1:]
		victim <- b
		return errKilled
	})
	for _, b := range boxes {
		b.start()
	}
	for _, k := range plan {
		select {
		case b := <-victim:
			b.kill()
			<-time.After(away)
			b.start()
		case <-time.After(10 * time.Minute):
			t.Fatalf("%s never came to %q", boxes[k.box].config.Name, k.step)
		}
	}
	w.settled(boxes...)
}

// The founder dies when it has founded: the others wait for it, and name it.
func TestTheOthersWaitForTheFounder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		boxes := w.add(3, 3, newPairing(t))
		founder := make(chan *box, 1)
		w.faults(func(b *box, step string) error {
			if step != "founded" {
				return nil
			}
			founder <- b
			return errKilled
		})
		for _, b := range boxes {
			b.start()
		}
		dead := <-founder
		dead.kill()
		w.faults(nil)
		time.Sleep(3 * time.Minute)
		if n := w.exists(1); n != 1 {
			t.Fatalf("%d sites", n)
		}
		for _, b := range boxes {
			if b == dead {
				continue
			}
			if said := b.log.all(); b.site() != "" || !strings.Contains(said, "start it again") || !strings.Contains(said, "founder="+dead.config.Name) {
				t.Errorf("%s is of the site %q and says %s", b.config.Name, b.site(), said)
			}
			b.kill() // they have not forgotten when they start again
		}
		w.settled(boxes...)
		if dead.site() != boxes[0].site() {
			t.Error("the others joined another site")
		}
	})
}

// A founder that died before it founded, and comes back, frees the others from what
// they promised it: it alone can say so.
func TestAFounderThatDidNotFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		boxes := w.add(3, 3, newPairing(t))
		founder := make(chan *box, 1)
		w.faults(func(b *box, step string) error {
			if step != "agreed" {
				return nil
			}
			founder <- b
			return errKilled
		})
		for _, b := range boxes {
			b.start()
		}
		dead := <-founder
		dead.kill()
		w.faults(nil)
		time.Sleep(2 * time.Minute)
		if n := w.exists(0); n != 0 {
			t.Fatal("somebody founded without the founder")
		}
		w.settled(boxes...)
	})
}

// A machine whose disk is cleared when the site is there joins it, with the same
// command line and whichever machine it is, also where fewer are expected than named,
// so that it and those that never came would be enough to found another.
func TestClearedDisk(t *testing.T) {
	for cleared := range 3 {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			defer w.end()
			boxes := w.add(5, 3, newPairing(t))
			w.settled(boxes[:3]...)
			site := boxes[0].site()
			again := boxes[cleared]
			again.kill()
			if err := os.RemoveAll(again.config.Dir); err != nil {
				t.Fatal(err)
			}
			// It sees one node of the site, beside the two machines that never came.
			lost := boxes[(cleared+1)%3]
			lost.kill()
			for _, b := range []*box{again, boxes[3], boxes[4]} {
				b.start()
			}
			w.settled(again, boxes[3], boxes[4])
			w.settled(boxes...)
			if again.site() != site {
				t.Errorf("%s is of the site %s, not %s", again.config.Name, again.site(), site)
			}
		})
	}
}

func TestMisfits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		p := newPairing(t)
		boxes := w.add(3, 3, p)
		says := func(b *box, parts ...string) {
			t.Helper()
			all := b.log.all()
			for _, part := range parts {
				if !strings.Contains(all, part) {
					t.Errorf("%s never said %q, but %s", b.config.Name, part, all)
				}
			}
		}
		// Another token, another number, the same name.
		boxes[2].hold(newPairing(t))
		for _, b := range boxes {
			b.start()
		}
		time.Sleep(time.Minute)
		says(boxes[0], "left out", "10.0.0.3:5001", "another token")
		boxes[2].kill()
		if err := os.Remove(filepath.Join(boxes[2].config.Dir, member.MachineFile)); err != nil {
			t.Fatal(err)
		}
		boxes[2].hold(p)
		boxes[2].config.Expect = 4
		boxes[2].start()
		time.Sleep(time.Minute)
		says(boxes[0], "it expects 4 machines, this one 3")
		says(boxes[2], "it expects 3 machines, this one 4")
		boxes[2].kill()
		boxes[2].config.Expect, boxes[2].config.Name = 3, "box1"
		boxes[2].start()
		time.Sleep(time.Minute)
		w.exists(0)
		said := boxes[0].log.all() + boxes[1].log.all() + boxes[2].log.all()
		if !strings.Contains(said, "two machines are called the same") {
			t.Errorf("with one name twice they say %s", said)
		}
		boxes[2].kill()
		boxes[2].config.Name = "box3"
		w.settled(boxes...)
	})
}

// What a machine has promised with one token binds it when it is given another.
func TestAnotherTokenDoesNotFree(t *testing.T) {
	p, q := newPairing(t), newPairing(t)
	dir := t.TempDir()
	first, err := load(dir, p.ID(), false)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := load(dir, p.ID(), false); err != nil || again.Machine != first.Machine {
		t.Errorf("again: %+v, %v", again, err)
	}
	m := &machine{Config: Config{Dir: dir, Expect: 2}, promise: first, end: func(error) {}}
	if err := m.save("pledged", func(p *promise) { p.Pledge = &Proposal{ID: "x", Founder: Machine{Name: "one"}} }); err != nil {
		t.Fatal(err)
	}
	if _, err := load(dir, q.ID(), false); !errors.Is(err, ErrPromised) || !strings.Contains(err.Error(), "one at") {
		t.Errorf("with another token: %v", err)
	}
	if p, err := load(dir, q.ID(), true); err != nil || p.Pledge != nil {
		t.Errorf("as a member of a site: %+v, %v", p, err)
	}
}

func TestPledges(t *testing.T) {
	dir := t.TempDir()
	p, err := load(dir, "token", false)
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{Config: Config{Dir: dir, Name: "me", Expect: 2}, id: p.Machine, promise: p, end: func(error) {}}
	other := func(id string) Proposal {
		f := Machine{ID: "founder" + id, Name: "f"}
		return Proposal{ID: id, Founder: f, Machines: []Machine{f, {ID: p.Machine, Name: "me"}}}
	}
	ask := func(body string) string {
		_, err := m.pledge(t.Context(), []byte(body))
		var no *joining.Refusal
		if errors.As(err, &no) {
			return no.Code
		}
		if err != nil {
			t.Error(err)
		}
		return ""
	}
	text := func(p Proposal, expect int) string {
		var machines []string
		for _, m := range p.Machines {
			machines = append(machines, `{"id":"`+m.ID+`","name":"`+m.Name+`"}`)
		}
		return `{"newer":1,"expect":` + strconv.Itoa(expect) + `,"proposal":{"id":"` + p.ID + `","founder":{"id":"` + p.Founder.ID + `"},"machines":[` + strings.Join(machines, ",") + `]}}`
	}
	alien := other("c")
	alien.Machines[1].ID = "somebody"
	twice := other("d")
	twice.Machines[1].Name = "f"
	for _, c := range []struct{ name, body, code string }{
		{"another number", text(other("a"), 3), codeExpect},
		{"no JSON", "x", joining.CodeMalformed},
		{"without this machine", text(alien, 2), joining.CodeMalformed},
		{"one name twice", text(twice, 2), joining.CodeMalformed},
		{"good", text(other("a"), 2), ""},
		{"again", text(other("a"), 2), ""},
		{"a second", text(other("b"), 2), joining.CodeLater},
	} {
		if code := ask(c.body); code != c.code {
			t.Errorf("%s: %q, want %q", c.name, code, c.code)
		}
	}
	// It was asked for the promise while it was about to join a site: the founding may
	// count on it now.
	_, done, err := m.enter(t.Context(), nil, []standing{{Machine: Machine{ID: "node"}, Site: "site"}})
	if kept, unread := load(dir, "token", false); done || err != nil || unread != nil || kept.Pledge == nil || kept.Pledge.ID != "a" || kept.Site != "" {
		t.Errorf("on the disk is %+v, %v, %v, %v", kept, unread, done, err)
	}
}

// Random kills, restarts and partitions; ATOLL_TEST_SEED repeats one.
func TestRandomSchedules(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("ATOLL_TEST_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("ATOLL_TEST_SEED=%d", seed)
	for run := range 8 {
		synctest.Test(t, func(t *testing.T) { schedule(t, rand.New(rand.NewPCG(seed, uint64(run)))) })
		if t.Failed() {
			t.Fatalf("run %d of the seed %d", run, seed)
		}
	}
}

func schedule(t *testing.T, rnd *rand.Rand) {
	w := newWorld(t)
	defer w.end()
	n := 3 + rnd.IntN(3)
	boxes := w.add(n, n/2+1+rnd.IntN(n-n/2), newPairing(t))
	if walled := rnd.IntN(n + 1); walled < n { // somebody, or nobody
		w.wall(boxes[walled])
	}
	var mu sync.Mutex
	var dice = rand.New(rand.NewPCG(rnd.Uint64(), 0))
	w.faults(func(*box, string) error {
		mu.Lock()
		defer mu.Unlock()
		if dice.IntN(4) == 0 {
			return errKilled
		}
		return nil
	})
	for range 60 {
		b := boxes[rnd.IntN(n)]
		switch rnd.IntN(5) {
		case 0:
			b.kill()
		case 1, 2:
			b.kill()
			b.start()
		case 3:
			w.part(b, boxes[rnd.IntN(n)], rnd.IntN(3) > 0)
		}
		<-time.After(time.Duration(rnd.IntN(3000)) * time.Millisecond)
		w.exists(1)
	}
	w.faults(nil)
	for _, a := range boxes {
		for _, b := range boxes {
			w.part(a, b, false)
		}
	}
	w.settled(boxes...)
}
