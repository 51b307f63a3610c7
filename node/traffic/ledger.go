package traffic

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/atoll-registry/atoll/cluster/atomicfile"
	"github.com/atoll-registry/atoll/node/settings"
	"github.com/atoll-registry/atoll/transfer"
)

// A budget is written down ahead of its use, step by step: the file says how far
// this node may go until it has written again. So after a crash at most a step too
// much is counted, and never anything too little; a node that ends in order
// writes down what it has used. While the disk does not take the next step, what
// nobody waits for waits.
const (
	booksName  = "traffic-budgets.json"
	stepShare  = 256 // of a budget
	leastStep  = 256 << 10
	periodsMax = 8 // that are remembered: a clock that jumps comes back
)

// ledger counts what went over a metered link in the present day or month.
type ledger struct {
	budget
	period  string
	used    map[string]int64 // by period
	ahead   map[string]int64 // up to where the file goes
	touched []string         // periods, the newest last
	others  int64            // what the other nodes have said that they used of the period
}

// book is a ledger in the file.
type book struct {
	Used    map[string]int64 `json:"used"`
	Periods []string         `json:"periods"`
}

func (l *ledger) name() string { return "budget " + l.key }

func (l *ledger) step() int64 { return max(l.bytes/stepShare, leastStep) }

// turn notes which day or month it is, and says whether that is another one.
func (l *ledger) turn(wall time.Time) bool {
	period := wall.Format(time.DateOnly)
	if l.month {
		period = wall.Format("2006-01")
	}
	if period == l.period {
		return false
	}
	l.period, l.others = period, 0
	for i, p := range l.touched {
		if p == period {
			l.touched = append(append(l.touched[:i:i], l.touched[i+1:]...), period)
			return true
		}
	}
	l.touched = append(l.touched, period)
	for len(l.touched) > periodsMax {
		delete(l.used, l.touched[0])
		delete(l.ahead, l.touched[0])
		l.touched = l.touched[1:]
	}
	return true
}

// left is what may still go in the present period.
func (l *ledger) left() int64 { return l.bytes - l.used[l.period] - l.others }

// holds says whether a class has to wait for the next period, or for the disk.
func (l *ledger) holds(c transfer.Class, n int) bool {
	spare := c == transfer.Repair || c == transfer.Prefetch
	if l.left() < int64(n) && (spare || l.hard) {
		return true
	}
	return (spare || l.hard) && l.used[l.period]+int64(n) > l.ahead[l.period]
}

// spend counts bytes in the ledgers of their way; t.mu is held.
func (t *Traffic) spend(w way, n int) {
	for _, l := range w.ledgers {
		l.used[l.period] += int64(n)
		if l.used[l.period]+l.step()/2 > l.ahead[l.period] {
			t.wakeBooks()
		}
	}
}

func (t *Traffic) wakeBooks() {
	select {
	case t.file <- struct{}{}:
	default:
	}
}

// adoptLedgers makes the ledgers of the budgets in force; t.mu is held. One that is
// taken away keeps its counts, should it come back.
func (t *Traffic) adoptLedgers() {
	next := map[string]*ledger{}
	wall := t.Clock().In(t.set.zone.Value())
	for _, b := range t.set.budgets.Value().all {
		l := t.ledgers[b.key]
		if l == nil {
			l = t.stored[b.key]
		}
		if l == nil {
			l = &ledger{used: map[string]int64{}, ahead: map[string]int64{}}
		}
		if l.month != b.month {
			l.period = ""
		}
		l.budget = b
		l.turn(wall)
		next[b.key] = l
		t.stored[b.key] = l
	}
	t.ledgers = next
	for key := range t.stored {
		if len(t.stored) > 2*maxRules && next[key] == nil {
			delete(t.stored, key)
		}
	}
	if len(next) > 0 {
		t.wakeBooks()
	}
}

// loadLedgers reads what was written down.
func (t *Traffic) loadLedgers() {
	t.stored = map[string]*ledger{}
	books := map[string]book{}
	err := atomicfile.ReadJSON(filepath.Join(t.Dir, booksName), &books)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Log.Warn("what was used of the traffic budgets cannot be read; counting begins anew", "file", booksName, "err", err)
	}
	for key, b := range books {
		l := &ledger{used: map[string]int64{}, ahead: map[string]int64{}, touched: b.Periods}
		for p, n := range b.Used {
			l.used[p], l.ahead[p] = n, n
		}
		t.stored[key] = l
	}
}

// keepBooks writes the ledgers down, a step ahead, until ctx ends, and then what was
// used.
func (t *Traffic) keepBooks(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			t.write(0)
			return
		case <-t.file:
		}
		if !t.write(1) {
			timer := time.NewTimer(time.Second)
			select {
			case <-timer.C:
				t.wakeBooks()
			case <-ctx.Done():
				timer.Stop()
			}
		}
	}
}

// write writes the ledgers down so many steps ahead, and says whether that worked.
func (t *Traffic) write(steps int64) bool {
	t.mu.Lock()
	books := map[string]book{}
	for key, l := range t.stored {
		b := book{Used: map[string]int64{}, Periods: append([]string{}, l.touched...)}
		for _, p := range l.touched {
			b.Used[p] = l.used[p]
			if p == l.period {
				b.Used[p] += steps * l.step()
			}
		}
		books[key] = b
	}
	t.mu.Unlock()
	if len(books) == 0 {
		return true
	}
	if err := atomicfile.WriteJSON(filepath.Join(t.Dir, booksName), books); err != nil {
		t.Log.Warn("what was used of the traffic budgets cannot be written down; prefetch and repair over metered links wait for it", "err", err)
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for key, b := range books {
		for p, n := range b.Used {
			t.stored[key].ahead[p] = max(t.stored[key].ahead[p], n)
		}
	}
	return true
}

// Notice is something that an operator should know, with what to do.
type Notice struct{ Code, Subject, Text, Remedy string }

// Notices are what is the matter with the traffic of this node.
func (t *Traffic) Notices() []Notice {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []Notice
	for _, l := range t.ledgers {
		if l.left() > 0 {
			continue
		}
		goes := "prefetch and repair wait, pulls and copies of pushes go on"
		if l.hard {
			goes = "nothing goes over it any more"
		}
		period := "day"
		if l.month {
			period = "month"
		}
		out = append(out, Notice{
			Code: "traffic-budget-spent", Subject: l.key,
			Text:   fmt.Sprintf("the %s of traffic over %s for this %s are used up: %s", settings.FormatBytes(l.bytes), l.key, period, goes),
			Remedy: fmt.Sprintf("wait for the next %s, or give it more: atoll settings set traffic.budgets", period),
		})
	}
	return out
}
