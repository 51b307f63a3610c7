package watch

import (
	"cmp"
	"encoding/json"
	"slices"
	"sync"
	"time"

	"github.com/atoll-registry/atoll/cluster/member"
)

// Severity of a condition.
type Severity uint8

const (
	// Notice: worth knowing, nothing is in danger.
	Notice Severity = iota
	// Warning: nothing fails yet; it will, if nobody does anything.
	Warning
	// Critical: something is refused or not served because of it.
	Critical
)

func (s Severity) String() string {
	return [...]string{"notice", "warning", "critical"}[min(s, Critical)]
}

// MarshalJSON implements json.Marshaler.
func (s Severity) MarshalJSON() ([]byte, error) { return json.Marshal(s.String()) }

// Condition is something that is not as it should be.
type Condition struct {
	Code     string    `json:"code"`    // such as disk-full; it does not change between versions
	Subject  string    `json:"subject"` // the node or thing that it is about; "" is this node
	Severity Severity  `json:"severity"`
	Since    time.Time `json:"since"`
	Text     string    `json:"text"`
	Remedy   string    `json:"remedy"`

	fitness member.Fitness // what it leaves this node fit for
	local   bool           // of this node, so the others are told
	advised bool           // the cluster's status has its own line for it
	parts   []string       // the components of the health that it makes unhealthy
}

type key struct{ code, subject string }

func (c Condition) key() key { return key{c.Code, c.Subject} }

// board keeps what holds at present, and since when each does.
type board struct {
	mu    sync.Mutex
	shown map[key]Condition
}

// news is a condition that has come or gone.
type news struct {
	Condition
	gone bool
}

// show replaces what holds and gives what has changed.
func (b *board) show(found []Condition, now time.Time) (changed []news) {
	b.mu.Lock()
	defer b.mu.Unlock()
	next := make(map[key]Condition, len(found))
	for _, c := range found {
		was, known := b.shown[c.key()]
		c.Since = was.Since
		if !known {
			c.Since = now.UTC().Truncate(time.Second)
			changed = append(changed, news{Condition: c})
		}
		next[c.key()] = c
	}
	for k, c := range b.shown {
		if _, still := next[k]; !still {
			changed = append(changed, news{c, true})
		}
	}
	b.shown = next
	return changed
}

// list gives what holds, the worst first, of equals the oldest.
func (b *board) list() []Condition {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := make([]Condition, 0, len(b.shown))
	for _, c := range b.shown {
		all = append(all, c)
	}
	slices.SortFunc(all, func(x, y Condition) int {
		return cmp.Or(cmp.Compare(y.Severity, x.Severity), x.Since.Compare(y.Since), cmp.Compare(x.Code, y.Code), cmp.Compare(x.Subject, y.Subject))
	})
	return all
}
