package traffic

import (
	"fmt"
	"strings"

	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/node/settings"
)

// rule caps something that a key names.
type rule struct {
	key   string
	link  link // of a key that is one
	rates schedule
}

// rules are what a setting says. The text tells whether it has changed.
type rules struct {
	text string
	all  []rule
}

// budget is how much may go over a link, or into and out of each node, in a day or a month.
type budget struct {
	key   string
	link  link // zero: each node for itself
	bytes int64
	month bool
	hard  bool // at its end even pulls stop
}

type budgets struct {
	text string
	all  []budget
}

// link is a way between nodes.
type link struct {
	from, to end
	both     bool // counts in both directions
}

// end is one side of a link: a node by name or id, a pair of label and value,
// anybody, or all but such.
type end struct {
	label, value string
	not          bool
}

func (e end) matches(m member.Member) bool {
	if e.not {
		e.not = false
		return !e.matches(m)
	}
	switch {
	case e.label != "":
		return m.Labels[e.label] == e.value
	case e.value == "*":
		return true
	}
	return m.ID == e.value || m.Name == e.value
}

// carries reports whether what one node sends another goes over the link.
func (l link) carries(from, to member.Member) bool {
	return l.from.matches(from) && l.to.matches(to) || l.both && l.from.matches(to) && l.to.matches(from)
}

func parseLink(key string) (l link, err error) {
	var from, to string
	ok := false
	if from, to, ok = strings.Cut(key, "<>"); ok {
		l.both = true
	} else if from, to, ok = strings.Cut(key, ">"); !ok {
		from, to = "*", key
	}
	if l.from, err = parseEnd(from); err == nil {
		l.to, err = parseEnd(to)
	}
	return l, err
}

func parseEnd(text string) (end, error) {
	text = strings.TrimSpace(text)
	of, not := strings.CutPrefix(text, "!")
	label, value, pair := strings.Cut(of, "=")
	if !pair {
		label, value = "", of
	}
	if value == "" || pair && label == "" || not && of == "*" || strings.ContainsAny(of, " <>!") {
		return end{}, fmt.Errorf("%.80q is no end of a link: a node's name or id is wanted, LABEL=VALUE, *, or ! and one of these for all others", text)
	}
	return end{label, value, not}, nil
}

// eachItem splits "KEY: WHAT | KEY: WHAT".
func eachItem(text string, take func(key, what string) error) error {
	seen := map[string]bool{}
	for item := range strings.SplitSeq(text, "|") {
		if strings.TrimSpace(text) == "" {
			break
		}
		key, what, ok := strings.Cut(item, ":")
		key, what = strings.Join(strings.Fields(key), ""), strings.TrimSpace(what)
		if !ok || key == "" {
			return fmt.Errorf("%.80q is not of the form KEY: VALUE; separate several by |", strings.TrimSpace(item))
		}
		if seen[key] {
			return fmt.Errorf("%s is there twice", key)
		}
		seen[key] = true
		if len(seen) > maxRules {
			return fmt.Errorf("there are more than %d", maxRules)
		}
		if err := take(key, what); err != nil {
			return err
		}
	}
	return nil
}

// maxRules bounds the items of one setting.
const maxRules = 256

func parseRules(text string, links bool) (*rules, error) {
	r := &rules{text: text}
	err := eachItem(text, func(key, what string) error {
		one := rule{key: key}
		var err error
		if links {
			if one.link, err = parseLink(key); err != nil {
				return err
			}
		}
		if one.rates, err = parseSchedule(what); err != nil {
			return err
		}
		r.all = append(r.all, one)
		return nil
	})
	return r, err
}

func parseBudgets(text string) (*budgets, error) {
	b := &budgets{text: text}
	err := eachItem(text, func(key, what string) error {
		one := budget{key: key}
		var err error
		if key != keyNode {
			if one.link, err = parseLink(key); err != nil {
				return err
			}
		}
		words := strings.Fields(what)
		if len(words) == 2 && words[1] == "hard" {
			one.hard, words = true, words[:1]
		}
		amount, period, ok := strings.Cut(strings.Join(words, " "), "/")
		if one.bytes, err = settings.ParseBytes(amount); err != nil || !ok || one.bytes < minBudget || period != "day" && period != "month" {
			return fmt.Errorf("%.80q is no budget: write for example 10GiB/day, or 200GiB/month hard; %s is the least", what, settings.FormatBytes(minBudget))
		}
		one.month = period == "month"
		b.all = append(b.all, one)
		return nil
	})
	return b, err
}

const (
	keyNode   = "node" // in budgets: all that a node sends and receives
	minBudget = 1 << 20
)
