package watch

import (
	"fmt"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
)

// jumpShown is how long a jump of the clock is shown.
const jumpShown = time.Hour

// jumps finds out when the wall clock moves by another amount than time itself.
type jumps struct {
	wall, real time.Time     // of the last look
	by         time.Duration // of the last jump
	until      time.Time     // shown until, by the monotonic clock
}

func (w *Watch) threshold() time.Duration { return time.Duration(w.skew.Value()) * time.Second }

// judgeClock compares the wall clock with the monotonic one. Small steps by
// which a time service corrects a clock are none of its business.
func (w *Watch) judgeClock(wall time.Time) []Condition {
	j := &w.jumps
	j.look(wall, time.Now(), w.threshold())
	if !time.Now().Before(j.until) {
		return nil
	}
	return []Condition{{
		Code: "clock-jump", Severity: Warning, local: true,
		Text:   fmt.Sprintf("the clock of this node jumped by %v", j.by.Round(time.Second)),
		Remedy: "if that was not somebody setting it right, look at its time service; nothing in the site depends on it but the times that are shown",
	}}
}

// wrongClock tells a clock that cannot be right by what the site knows to be past.
func wrongClock(wall, judged time.Time, threshold time.Duration) []Condition {
	if judged.Sub(wall).Abs() <= max(threshold, 5*look) {
		return nil
	}
	return []Condition{{
		Code: "clock-wrong", Severity: Warning, local: true,
		Text:   fmt.Sprintf("the clock of this node says %s, which cannot be: the site has seen %s", wall.UTC().Format(time.DateTime), judged.UTC().Format(time.DateTime)),
		Remedy: "set the clock; until then certificates are judged by the site's time, and the times of what is pushed here are wrong",
	}}
}

// look takes both clocks at one moment. real has a monotonic reading; wall is
// taken without.
func (j *jumps) look(wall, real time.Time, threshold time.Duration) {
	wall = wall.Round(0)
	if !j.wall.IsZero() {
		if by := wall.Sub(j.wall) - real.Sub(j.real); by.Abs() > threshold {
			j.by, j.until = by, real.Add(jumpShown)
		}
	}
	j.wall, j.real = wall, real
}

// skews names the members whose clocks are certainly off by more than the
// threshold: half the round trip is allowed for.
func skews(s member.Status, threshold time.Duration) []Condition {
	var out []Condition
	off, clocked := 0, 0
	var least, most time.Duration
	for _, m := range s.Members {
		if m.ID == s.Self || !m.Up || !m.Clocked {
			continue
		}
		clocked++
		if m.Skew.Abs()-m.SkewBound <= threshold {
			continue
		}
		if off == 0 {
			least, most = m.Skew, m.Skew
		}
		off, least, most = off+1, min(least, m.Skew), max(most, m.Skew)
		direction := "ahead of"
		if m.Skew < 0 {
			direction = "behind"
		}
		out = append(out, Condition{
			Code: "clock-skew", Subject: m.Name, Severity: Warning,
			Text:   fmt.Sprintf("the clock of node %s is %v %s this node's", m.Name, m.Skew.Abs().Round(time.Second), direction),
			Remedy: "let all nodes take their time from one source (chrony or systemd-timesyncd, from one machine of the site if there is no other)",
		})
	}
	if off > 1 && off == clocked && most-least <= threshold {
		// All others agree, so it is this one.
		return []Condition{{
			Code: "clock-skew", Severity: Warning, local: true,
			Text:   "the clock of this node differs from those of all others",
			Remedy: "set it, and let all nodes take their time from one source",
		}}
	}
	return out
}
