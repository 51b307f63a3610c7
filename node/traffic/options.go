package traffic

import (
	"fmt"
	"time"

	"github.com/atoll-registry/atoll/node/settings"
)

// options are what an operator may change while transfers run.
type options struct {
	nodeOut, nodeIn, site *settings.Setting[rates]
	links, projects       *settings.Setting[*rules]
	users                 *settings.Setting[*rules]
	budgets               *settings.Setting[*budgets]
	zone                  *settings.Setting[*time.Location]
	jitter                *settings.Setting[int]
	answers, fetches      *settings.Setting[int]
	pulls, holders, conns *settings.Setting[int]
	memory                *settings.Setting[int64]
}

// rates is a schedule with the text that it was read from.
type rates struct {
	schedule
	text string
}

func defineOptions(s *settings.Settings) options {
	schedules := settings.Kind[rates]{Parse: func(text string) (rates, error) {
		s, err := parseSchedule(text)
		return rates{s, text}, err
	}}
	lists := func(links bool) settings.Kind[*rules] {
		return settings.Kind[*rules]{Parse: func(text string) (*rules, error) { return parseRules(text, links) }}
	}
	one := func(name, summary string) *settings.Setting[rates] {
		return settings.Define(s, settings.Spec[rates]{Name: name, Default: "0", Kind: schedules, Summary: summary})
	}
	return options{
		nodeOut: one("traffic.node", "bytes a second that each node sends to nodes and clients, by the hour if wanted: Mo-Fr 08:00-18:00 2MiB; else 20MiB; 0 is no limit"),
		nodeIn:  one("traffic.node-in", "bytes a second that each node takes in from other nodes, in the same form"),
		site:    one("traffic.site", "bytes a second that all nodes of this site together send to nodes and clients, in the same form"),
		links: settings.Define(s, settings.Spec[*rules]{
			Name: "traffic.links", Default: "", Kind: lists(true),
			Summary: "bytes a second over a link, all nodes together: FROM>TO: RATE | ..., where an end is a node, LABEL=VALUE, * or !END for all others, and <> means both directions: zone=ship<>!zone=ship is all that enters or leaves the ship; RATE as in traffic.node",
		}),
		projects: settings.Define(s, settings.Spec[*rules]{
			Name: "traffic.projects", Default: "", Kind: lists(false),
			Summary: "bytes a second that all nodes together send of a project: PROJECT: RATE | ...",
		}),
		users: settings.Define(s, settings.Spec[*rules]{
			Name: "traffic.users", Default: "", Kind: lists(false),
			Summary: "bytes a second that all nodes together send to a user's clients, robots too: USER: RATE | ...",
		}),
		budgets: settings.Define(s, settings.Spec[*budgets]{
			Name: "traffic.budgets", Default: "", Kind: settings.Kind[*budgets]{Parse: parseBudgets},
			Summary: "how much may go over a metered link, all nodes together, or into and out of each node: FROM<>TO: 10GiB/day | node: 200GiB/month hard; ends as in traffic.links; at its end prefetch and repair stop, with hard everything",
		}),
		zone: settings.Define(s, settings.Spec[*time.Location]{
			Name: "traffic.timezone", Default: "Local", Kind: settings.Kind[*time.Location]{Parse: parseZone},
			Summary: "the time zone of hours, days and months, such as Europe/Berlin; Local is each node's own",
		}),
		jitter: settings.Define(s, settings.Spec[int]{
			Name: "traffic.jitter", Default: "120", Kind: settings.Count(0, 3600),
			Summary: "seconds over which nodes spread the moment at which they take up a higher rate; a lower one counts at once",
		}),
		fetches: settings.Define(s, settings.Spec[int]{
			Name: "traffic.fetches", Default: "16", Kind: settings.Count(1, 256),
			Summary: "how many blobs a node fetches at once for repair and prefetch, each of which takes memory and connections; pulls and copies of pushes do not wait behind them",
		}),
		pulls: settings.Define(s, settings.Spec[int]{
			Name: "traffic.pulls", Default: "64", Kind: settings.Count(4, 1024),
			Summary: "how many blobs a node fetches at once because clients ask for them or a push is copied, besides traffic.fetches; more wait",
		}),
		holders: settings.Define(s, settings.Spec[int]{
			Name: "traffic.holders", Default: "10", Kind: settings.Count(1, 64),
			Summary: "from how many nodes a node takes one blob at once, each over a connection of its own",
		}),
		conns: settings.Define(s, settings.Spec[int]{
			Name: "traffic.connections", Default: "1024", Kind: settings.Count(16, 1<<16),
			Summary: "how many connections of other nodes for blobs a node serves at once, and a quarter of the files that it may open at most; whoever is turned away asks another node, or again",
		}),
		memory: settings.Define(s, settings.Spec[int64]{
			Name: "traffic.memory", Default: "72MiB", Kind: settings.Bytes(18<<20, 16<<30, false),
			Summary: "memory of a node for parts of blobs on their way: four ninths for what comes in by each way of peers.transfer-engine, one for what goes out; with less, transfers wait",
		}),
		answers: settings.Define(s, settings.Spec[int]{
			Name: "traffic.answers", Default: "1024", Kind: settings.Count(1, 1<<16),
			Summary: "how many blobs a node sends to clients at once, each of which takes a file and a connection; more wait",
		}),
	}
}

func parseZone(text string) (*time.Location, error) {
	zone, err := time.LoadLocation(text)
	if err != nil || text == "" {
		return nil, fmt.Errorf("%.40q is no time zone that this node knows; UTC, Local, or a name such as Europe/Berlin is wanted", text)
	}
	return zone, nil
}

// texts are those that tell whether the caps have changed.
func (o options) texts() [5]string {
	return [5]string{
		o.nodeOut.Value().text + "\n" + o.nodeIn.Value().text, o.site.Value().text, o.links.Value().text, o.projects.Value().text + "\n" + o.users.Value().text, o.budgets.Value().text,
	}
}
