package traffic

import (
	"strings"
	"testing"
	"time"
)

func berlin(t *testing.T) *time.Location {
	t.Helper()
	zone, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	return zone
}

func TestScheduleAt(t *testing.T) {
	const m = 1 << 20
	for _, c := range []struct {
		text, at string // of 2026; 5 January is a Monday
		want     int64
	}{
		{"20MiB", "01-05 12:00:00", 20 * m},
		{"0", "01-05 12:00:00", unlimited},
		{"stop", "01-05 12:00:00", stopped},
		{"Mo-Fr 08:00-18:00 2MiB; else 20MiB", "01-05 07:59:59", 20 * m},
		{"Mo-Fr 08:00-18:00 2MiB; else 20MiB", "01-05 08:00:00", 2 * m},
		{"Mo-Fr 08:00-18:00 2MiB; else 20MiB", "01-05 17:59:59", 2 * m},
		{"Mo-Fr 08:00-18:00 2MiB; else 20MiB", "01-05 18:00:00", 20 * m},
		{"Mo-Fr 08:00-18:00 2MiB; else 20MiB", "01-10 12:00:00", 20 * m},
		{"Fr-Mo 1MiB", "01-11 12:00:00", 1 * m},
		{"Fr-Mo 1MiB", "01-07 12:00:00", unlimited},
		{"sa,SU stop; 3MiB/s", "01-10 00:00:00", stopped},
		{"Fr 22:00-06:00 1MiB; else 2MiB", "01-09 23:00:00", 1 * m},
		{"Fr 22:00-06:00 1MiB; else 2MiB", "01-10 05:59:00", 1 * m},
		{"Fr 22:00-06:00 1MiB; else 2MiB", "01-09 05:59:00", 2 * m},
		{"12:00-24:00 1MiB; 2MiB", "01-09 23:59:59", 1 * m},
		{"08:00-18:00 1MiB; Mo 2MiB; 3MiB", "01-05 09:00:00", 1 * m},
	} {
		s, err := parseSchedule(c.text)
		if err != nil {
			t.Errorf("%s: %v", c.text, err)
			continue
		}
		at, err := time.Parse(time.DateTime, "2026-"+c.at)
		if err != nil {
			t.Fatal(err)
		}
		if got := s.at(at); got != c.want {
			t.Errorf("%s at %s: %d, want %d", c.text, c.at, got, c.want)
		}
	}
	for _, text := range []string{"", ";", "Mo", "Mo-Xx 1MiB", "08:00 1MiB", "08:00-08:00 1MiB", "24:00-08:00 1MiB", "25:00-26:00 1MiB",
		"08:61-09:00 1MiB", "Mo 08:00-09:00 x 1MiB", "1KiB", "-5", "fast", "Mo 08:00-09:00"} {
		if _, err := parseSchedule(text); err == nil {
			t.Errorf("%q was taken", text)
		}
	}
}

// On the nights when clocks change, what they show counts: the hour that does not
// exist has no window, the one that comes twice has its window twice.
func TestScheduleOverChangesOfTheClocks(t *testing.T) {
	zone := berlin(t)
	s, err := parseSchedule("02:00-03:00 1MiB; else 2MiB")
	if err != nil {
		t.Fatal(err)
	}
	minutes := func(from time.Time) (slow int) {
		for i := range 24 * 60 {
			if s.at(from.Add(time.Duration(i)*time.Minute).In(zone)) == 1<<20 {
				slow++
			}
		}
		return slow
	}
	for day, want := range map[string]int{"2026-03-28": 60, "2026-03-29": 0, "2026-10-25": 120, "2026-10-24": 60} {
		from, err := time.ParseInLocation(time.DateOnly, day, zone)
		if err != nil {
			t.Fatal(err)
		}
		if got := minutes(from); got != want {
			t.Errorf("%s: %d minutes in the window, want %d", day, got, want)
		}
	}
	// A month and a day begin when the clock on the wall says so.
	l := ledger{used: map[string]int64{}, ahead: map[string]int64{}}
	l.turn(time.Date(2026, 10, 24, 22, 30, 0, 0, time.UTC).In(zone))
	if l.period != "2026-10-25" {
		t.Errorf("half past midnight in Berlin belongs to %s", l.period)
	}
}

// A higher rate is taken up later by the jitter, a lower one at once.
func TestJitter(t *testing.T) {
	s, err := parseSchedule("08:00-18:00 2MiB; else 20MiB")
	if err != nil {
		t.Fatal(err)
	}
	jitter := 90 * time.Second
	at := func(clock string) int64 {
		when, err := time.Parse(time.DateTime, "2026-01-05 "+clock)
		if err != nil {
			t.Fatal(err)
		}
		return s.eased(when, jitter) >> 20
	}
	for clock, want := range map[string]int64{"07:59:59": 20, "08:00:00": 2, "17:59:59": 2, "18:00:00": 2, "18:01:29": 2, "18:01:30": 20} {
		if got := at(clock); got != want {
			t.Errorf("at %s: %d MiB/s, want %d", clock, got, want)
		}
	}
	bubble(t, 4, func(t *testing.T, s *site) {
		seen := map[time.Duration]bool{}
		for _, n := range s.nodes {
			seen[n.jitter()] = true
		}
		if len(seen) < 3 {
			t.Errorf("four nodes have the delays %v", seen)
		}
		s.set("traffic.jitter", "0")
		if d := s.nodes[0].jitter(); d != 0 {
			t.Errorf("without jitter: %v", d)
		}
	})
}

func TestRulesAreChecked(t *testing.T) {
	for _, text := range []string{"a", "a:", "a: fast", ": 1MiB", "a: 1MiB | a: 2MiB", "zone=>b: 1MiB", "=x: 1MiB", "a>b>c: 1MiB", "a>: 1MiB", "!*>a: 1MiB", "!: 1MiB", "!!a: 1MiB",
		strings.Repeat("a: 1MiB|", 300)} {
		if _, err := parseRules(text, true); err == nil {
			t.Errorf("%.40q was taken as links", text)
		}
	}
	for _, text := range []string{"a: 1GiB", "a: 1GiB/week", "a: 1/day", "node: 1GiB/day soft", "a: 1GiB/day hard hard"} {
		if _, err := parseBudgets(text); err == nil {
			t.Errorf("%q was taken as a budget", text)
		}
	}
	r, err := parseRules("zone=ship <> zone=shore: Mo-Fr 08:00-18:00 2MiB; else 20MiB | *>b: stop|c:1MiB", true)
	if err != nil || len(r.all) != 3 || !r.all[0].link.both || r.all[2].link.from.value != "*" || len(r.all[0].rates.windows) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
}
