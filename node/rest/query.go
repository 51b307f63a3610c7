package rest

import (
	"strings"

	"github.com/atoll-registry/atoll/node/fault"
)

// Filter is embedded by the input of a listing that takes Harbor's query
// language and an order.
type Filter struct {
	Q    Query `query:"q"`
	Sort Sort  `query:"sort"`
}

// Op is how a term of a query compares.
type Op uint8

const (
	Exact Op = iota // k=v
	Fuzzy           // k=~v: holds v
	Range           // k=[a~b]: between, either end may be missing
	AnyOf           // k={a b}: one of them
	AllOf           // k=(a b): all of them
)

// Term is one condition of a query.
type Term struct {
	Key string
	Op  Op
	// Values: one for Exact and Fuzzy; two, either may be "", for Range.
	Values []string
	// Quoted: the value was in quotes, so it is a string even when it looks
	// like a number.
	Quoted bool
}

// Query is a list of terms that must all hold, for example
// name=~web,size=[100~],tag={a b},label=(1 2).
type Query []Term

const (
	maxQueryLength = 4096
	maxQueryTerms  = 32
)

// Find gives the term for a key, whose case does not matter.
func (q Query) Find(key string) (Term, bool) {
	for _, t := range q {
		if strings.EqualFold(t.Key, key) {
			return t, true
		}
	}
	return Term{}, false
}

// Holds reports whether the term for the key, if there is one, holds for a
// value.
func (q Query) Holds(key, value string) bool {
	t, ok := q.Find(key)
	return !ok || t.Holds(value)
}

// Holds reports whether the term holds for a value, compared as strings; AllOf
// holds when there is but that one value to find.
func (t Term) Holds(value string) bool {
	switch t.Op {
	case Exact:
		return t.Values[0] == value
	case Fuzzy:
		return strings.Contains(value, t.Values[0])
	case Range:
		return (t.Values[0] == "" || value >= t.Values[0]) && (t.Values[1] == "" || value <= t.Values[1])
	case AnyOf:
		for _, v := range t.Values {
			if v == value {
				return true
			}
		}
		return false
	default:
		for _, v := range t.Values {
			if v != value {
				return false
			}
		}
		return true
	}
}

// UnmarshalText parses a query.
func (q *Query) UnmarshalText(text []byte) (err error) {
	*q, err = ParseQuery(string(text))
	return err
}

// ParseQuery reads the query language; what it cannot read is fault.Invalid.
func ParseQuery(s string) (Query, error) {
	if len(s) > maxQueryLength {
		return nil, fault.New(fault.Invalid, "q is %d bytes long: at most %d are allowed", len(s), maxQueryLength)
	}
	p := &queryParser{rest: strings.TrimSpace(s)}
	var q Query
	for p.rest != "" {
		term, err := p.term()
		if err != nil {
			return nil, err
		}
		if q = append(q, term); len(q) > maxQueryTerms {
			return nil, fault.New(fault.Invalid, "q has more than %d terms", maxQueryTerms)
		}
		p.space()
		if p.rest == "" {
			break
		}
		if !p.take(',') {
			return nil, p.wrong("a comma between terms")
		}
		p.space()
	}
	return q, nil
}

type queryParser struct{ rest string }

func (p *queryParser) wrong(wanted string) error {
	return fault.New(fault.Invalid, "q cannot be read at %q: %s is wanted, as in name=~web,size=[1~9],tag={a b}", clip(p.rest), wanted)
}

func (p *queryParser) space() { p.rest = strings.TrimLeft(p.rest, " \t") }

func (p *queryParser) take(c byte) bool {
	if p.rest == "" || p.rest[0] != c {
		return false
	}
	p.rest = p.rest[1:]
	return true
}

func (p *queryParser) term() (Term, error) {
	key, after, ok := strings.Cut(p.rest, "=")
	key = strings.TrimSpace(key)
	if !ok || key == "" || strings.ContainsAny(key, ",{}[]()'\"~ ") {
		return Term{}, p.wrong("key=value")
	}
	p.rest = after
	p.space()
	t := Term{Key: key}
	switch {
	case p.take('~'):
		t.Op = Fuzzy
	case p.take('['):
		t.Op = Range
		return t, p.between(&t)
	case p.take('{'):
		t.Op = AnyOf
		return t, p.list(&t, '}')
	case p.take('('):
		t.Op = AllOf
		return t, p.list(&t, ')')
	}
	value, quoted, err := p.value(",")
	t.Values, t.Quoted = []string{value}, quoted
	return t, err
}

// between reads a~b] after the opening bracket.
func (p *queryParser) between(t *Term) error {
	low, quoted, err := p.value("~]")
	if err != nil {
		return err
	}
	p.space()
	if !p.take('~') {
		return p.wrong("a ~ between the ends of a range")
	}
	high, alsoQuoted, err := p.value("]")
	if err != nil {
		return err
	}
	p.space()
	if !p.take(']') {
		return p.wrong("the ] that ends a range")
	}
	t.Values, t.Quoted = []string{low, high}, quoted || alsoQuoted
	return nil
}

// list reads values separated by spaces up to the closing bracket.
func (p *queryParser) list(t *Term, end byte) error {
	for {
		p.space()
		if p.take(end) {
			break
		}
		if p.rest == "" {
			return p.wrong("the " + string(end) + " that ends a list")
		}
		value, quoted, err := p.value(" " + string(end))
		if err != nil {
			return err
		}
		t.Values, t.Quoted = append(t.Values, value), t.Quoted || quoted
	}
	if len(t.Values) == 0 {
		return p.wrong("a value in the list before this")
	}
	return nil
}

// value reads one value, in quotes or up to one of the stop characters.
func (p *queryParser) value(stop string) (value string, quoted bool, err error) {
	p.space()
	for _, quote := range [...]byte{'\'', '"'} {
		if p.take(quote) {
			value, after, ok := strings.Cut(p.rest, string(quote))
			if !ok {
				return "", false, p.wrong("the quote that ends a value")
			}
			p.rest = after
			return value, true, nil
		}
	}
	end := strings.IndexAny(p.rest, stop)
	if end < 0 {
		end = len(p.rest)
	}
	value, p.rest = strings.TrimSpace(p.rest[:end]), p.rest[end:]
	return value, false, nil
}

// Sort is an order: keys, first the most important.
type Sort []SortKey

// SortKey is one key of an order; Descending is written with a minus.
type SortKey struct {
	Key        string
	Descending bool
}

// UnmarshalText parses an order such as name,-creation_time.
func (s *Sort) UnmarshalText(text []byte) error {
	if len(text) > maxQueryLength {
		return fault.New(fault.Invalid, "sort is longer than %d bytes", maxQueryLength)
	}
	*s = nil
	for part := range strings.SplitSeq(string(text), ",") {
		key, descending := strings.CutPrefix(strings.TrimSpace(part), "-")
		if key == "" {
			return fault.New(fault.Invalid, "sort is %q: keys with a comma between them are wanted, as in name,-creation_time", clip(string(text)))
		}
		if *s = append(*s, SortKey{key, descending}); len(*s) > maxQueryTerms {
			return fault.New(fault.Invalid, "sort has more than %d keys", maxQueryTerms)
		}
	}
	return nil
}
