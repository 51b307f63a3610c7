package traffic

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/atoll-registry/atoll/node/settings"
)

// What a schedule says besides a number of bytes per second.
const (
	unlimited int64 = 0
	stopped   int64 = -1
)

// schedule says how fast something may go, in bytes per second, at each moment of
// the week.
type schedule struct {
	windows []window
	rest    int64 // outside all windows
}

// window is some hours of some days. One over midnight belongs to the day on which
// it begins.
type window struct {
	days     [7]bool       // by time.Weekday
	from, to time.Duration // since midnight; from > to is over midnight
	rate     int64
}

var weekdays = [...]string{"Su", "Mo", "Tu", "We", "Th", "Fr", "Sa"}

// parseSchedule reads "Mo-Fr 08:00-18:00 2MiB; Sa,Su stop; else 20MiB": the first
// window that holds counts; without else there is no limit outside them. A rate
// alone holds always; 0 is no limit.
func parseSchedule(text string) (s schedule, err error) {
	for item := range strings.SplitSeq(text, ";") {
		words := strings.Fields(item)
		if len(words) == 0 {
			return s, fmt.Errorf("%.80q is no schedule; write for example: Mo-Fr 08:00-18:00 2MiB; else 20MiB", text)
		}
		rate, err := parseRate(words[len(words)-1])
		if err != nil {
			return s, err
		}
		words = words[:len(words)-1]
		if len(words) == 0 || len(words) == 1 && words[0] == "else" {
			s.rest = rate
			continue
		}
		w, err := parseWindow(words)
		if err != nil {
			return s, err
		}
		w.rate = rate
		s.windows = append(s.windows, w)
	}
	return s, nil
}

func parseRate(text string) (int64, error) {
	if text == "stop" {
		return stopped, nil
	}
	n, err := settings.ParseBytes(strings.TrimSuffix(text, "/s"))
	if err != nil || n != 0 && n < minRate {
		return 0, fmt.Errorf("%.40q is no rate: bytes per second of at least %s such as 512KiB or 20MiB are wanted, 0 for no limit, or stop", text, settings.FormatBytes(minRate))
	}
	return n, nil
}

// minRate is the lowest cap: below it a piece takes so long that it counts as
// stalled.
const minRate = 32 << 10

func parseWindow(words []string) (w window, err error) {
	bad := func() error {
		return fmt.Errorf("%.80q is no time window; write for example: Mo-Fr 08:00-18:00, or Sa,Su, or 22:00-06:00", strings.Join(words, " "))
	}
	w.to = 24 * time.Hour
	rest := words
	if strings.Contains(rest[0], ":") {
		w.days = [7]bool{true, true, true, true, true, true, true}
	} else {
		for part := range strings.SplitSeq(rest[0], ",") {
			first, last, several := strings.Cut(part, "-")
			if !several {
				last = first
			}
			from, ok1 := weekday(first)
			to, ok2 := weekday(last)
			if !ok1 || !ok2 {
				return w, bad()
			}
			for d := from; ; d = (d + 1) % 7 {
				w.days[d] = true
				if d == to {
					break
				}
			}
		}
		rest = rest[1:]
	}
	if len(rest) == 0 {
		return w, nil
	}
	from, to, ok := strings.Cut(rest[0], "-")
	var ok1, ok2 bool
	w.from, ok1 = timeOfDay(from)
	w.to, ok2 = timeOfDay(to)
	if !ok || !ok1 || !ok2 || len(rest) > 1 || w.from == w.to || w.from == 24*time.Hour {
		return w, bad()
	}
	return w, nil
}

func weekday(text string) (int, bool) {
	for i, d := range weekdays {
		if strings.EqualFold(d, text) {
			return i, true
		}
	}
	return 0, false
}

func timeOfDay(text string) (time.Duration, bool) {
	h, m, ok := strings.Cut(text, ":")
	hours, err1 := strconv.Atoi(h)
	minutes, err2 := strconv.Atoi(m)
	d := time.Duration(hours)*time.Hour + time.Duration(minutes)*time.Minute
	return d, ok && err1 == nil && err2 == nil && hours >= 0 && minutes >= 0 && minutes < 60 && d <= 24*time.Hour
}

// at is the rate at a moment, by what a clock on the wall shows in its location:
// an hour that a change of the clocks leaves out never comes, one that it repeats
// counts twice.
func (s schedule) at(t time.Time) int64 {
	since := time.Duration(t.Hour())*time.Hour + time.Duration(t.Minute())*time.Minute + time.Duration(t.Second())*time.Second
	today := int(t.Weekday())
	for _, w := range s.windows {
		yesterday := (today + 6) % 7
		switch {
		case w.from < w.to && w.days[today] && since >= w.from && since < w.to,
			w.from > w.to && w.days[today] && since >= w.from,
			w.from > w.to && w.days[yesterday] && since < w.to:
			return w.rate
		}
	}
	return s.rest
}

// eased is the rate at a moment for a node that takes up a higher rate only jitter
// later than the schedule says, so that the sites of one company do not all begin
// in the same second; a lower one counts at once.
func (s schedule) eased(t time.Time, jitter time.Duration) int64 {
	return slower(s.at(t), s.at(t.Add(-jitter)))
}

// slower is the stricter of two rates.
func slower(a, b int64) int64 {
	switch {
	case a == stopped || b == stopped:
		return stopped
	case a == unlimited:
		return b
	case b == unlimited:
		return a
	}
	return min(a, b)
}
