package founding

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// wall puts a machine behind a firewall that lets nothing in, for good.
func (w *world) wall(b *box) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, other := range w.boxes {
		if other != b {
			w.walled[[2]string{other.config.Advertise, b.config.Advertise}] = true
		}
	}
}

// Machines that nobody can dial found the site with those that all can dial, whoever
// has the lowest id, and are never its founder.
func TestMachinesBehindWalls(t *testing.T) {
	for _, c := range []struct{ machines, expect, walled int }{{3, 3, 1}, {3, 3, 2}, {3, 2, 1}, {5, 5, 3}, {5, 4, 2}} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			for range 4 { // the ids are random
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t)
					defer w.end()
					boxes := w.add(c.machines, c.expect, newPairing(t))
					for _, b := range boxes[:c.walled] {
						w.wall(b)
					}
					for _, b := range boxes {
						b.start()
					}
					start := time.Now()
					w.settled(boxes...)
					if took := time.Since(start); took > time.Minute {
						t.Errorf("it took %v", took)
					}
					for _, b := range boxes[:c.walled] {
						if strings.Contains(b.log.all(), "founded the site") {
							t.Errorf("%s founded it, whom nobody can join", b.config.Name)
						}
					}
				})
			}
		})
	}
}

// One that is walled and was killed after it pledged, or before it said so, brings its
// promise, or hears that it is not wanted any more.
func TestWalledMachineIsKilled(t *testing.T) {
	for _, step := range []string{"began", "pledged", "released", "saw the site", "granted"} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			defer w.end()
			boxes := w.add(3, 3, newPairing(t))
			w.wall(boxes[0])
			killed := false
			w.faults(func(b *box, at string) error {
				w.mu.Lock()
				defer w.mu.Unlock()
				if b == boxes[0] && at == step && !killed {
					killed = true
					return errKilled
				}
				return nil
			})
			w.settled(boxes...)
			if !killed && step != "released" {
				t.Errorf("%s was never reached", step)
			}
		})
	}
}

// Each can be dialled by one other and none by all: nobody could take the others in,
// and the log says so.
func TestNobodyCanBeDialledByAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		boxes := w.add(3, 3, newPairing(t))
		for i, b := range boxes {
			w.walled[[2]string{b.config.Advertise, boxes[(i+2)%3].config.Advertise}] = true
		}
		for _, b := range boxes {
			b.start()
		}
		time.Sleep(2 * time.Minute)
		if n := w.exists(0); n != 0 {
			t.Fatal("founded")
		}
		if said := boxes[0].log.all(); !strings.Contains(said, "none of the machines can be dialled by enough of the others") {
			t.Errorf("it says %s", said)
		}
	})
}
