package watch

import (
	"fmt"
	"strings"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
)

// farBehind is how many revisions a node may lag before it is spoken of: about
// what the log keeps for it, so that beyond it a snapshot has to travel.
const farBehind = 10_000

// shape judges the site's voters and how far each node is.
func shape(s member.Status) []Condition {
	var out []Condition
	voters, up := 0, 0
	var down []string
	for _, m := range s.Members {
		if m.Voter {
			voters++
			if m.Up {
				up++
			} else {
				down = append(down, m.Name)
			}
		}
		if m.Up && m.Lag > farBehind {
			out = append(out, Condition{
				Code: "node-behind", Subject: m.Name, Severity: Warning, advised: true,
				Text:   fmt.Sprintf("node %s is %d changes behind", m.Name, m.Lag),
				Remedy: "if it does not catch up within minutes, look at its disk and at the network to it",
			})
		}
		if m.ID != s.Self && m.Up && len(m.Codes) > 0 {
			out = append(out, Condition{
				Code: "node-ails", Subject: m.Name, Severity: Warning,
				Text:   fmt.Sprintf("node %s reports %s", m.Name, strings.Join(m.Codes, ", ")),
				Remedy: "ask it for details: atoll cluster status on that node",
			})
		}
	}
	majority := voters/2 + 1
	switch {
	case voters == 0:
	case up < majority:
		out = append(out, Condition{
			Code: "no-quorum", Severity: Critical, advised: true, parts: []string{partDatabase, partSite},
			Text:   fmt.Sprintf("%d of %d voters are up and %d are needed: nothing can be written", up, voters, majority),
			Remedy: "start the voters that are down: " + strings.Join(down, ", "),
		})
	case len(down) > 0 && up == majority:
		out = append(out, Condition{
			Code: "voter-down", Subject: strings.Join(down, ","), Severity: Warning, advised: true,
			Text:   fmt.Sprintf("with %s down, no further voter may fail: %d of %d are up and %d are needed", strings.Join(down, ", "), up, voters, majority),
			Remedy: "start it again; if it is gone for good, join a new node under its name, which takes its place",
		})
	case len(down) > 0:
		out = append(out, Condition{
			Code: "voter-down", Subject: strings.Join(down, ","), Severity: Warning, advised: true,
			Text:   fmt.Sprintf("with %s down, %d more voters may fail instead of %d", strings.Join(down, ", "), up-majority, (voters-1)/2),
			Remedy: "start it again; if it is gone for good, join a new node under its name, which takes its place",
		})
	}
	if voters > 1 && voters%2 == 0 {
		out = append(out, Condition{
			Code: "voters-even", Severity: Warning,
			Text:   fmt.Sprintf("%d nodes vote: a network that splits them in halves leaves neither able to write", voters),
			Remedy: "this ends by itself when a node joins or returns; if it stays, add a node or remove one",
		})
	}
	return out
}

// expiring names the certificates that end soon. Those that renew themselves are
// spoken of only when that has not worked for long.
func expiring(all []Certificate, now time.Time) []Condition {
	var out []Condition
	for _, c := range all {
		if c.Leaf == nil {
			continue
		}
		left := c.Leaf.NotAfter.Sub(now)
		if left > c.Within {
			continue
		}
		o := Condition{
			Code: c.Code, Severity: Warning, local: true, Remedy: c.Renew,
			Text: fmt.Sprintf("%s ends on %s", c.Of, c.Leaf.NotAfter.UTC().Format(time.DateOnly)),
		}
		if left <= 0 {
			o.Severity, o.parts = Critical, []string{partSite}
			if c.Public {
				o.parts = []string{partPortal}
			}
			o.Text = fmt.Sprintf("%s has ended on %s", c.Of, c.Leaf.NotAfter.UTC().Format(time.DateOnly))
		}
		out = append(out, o)
	}
	return out
}
