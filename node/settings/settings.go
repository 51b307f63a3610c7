// Package settings keeps the values that an operator may change while the site
// runs: each is a row that every node has, with a default, a check and a line
// that says what it does. The room that obeys a setting defines it.
//
// Invariants:
//   - Reading a value costs one load from memory: requests may ask every time.
//   - Only values that passed the check are obeyed. A row that this version does
//     not take (a newer one wrote it) leaves the value that was in force.
//   - A setting without a row has its default, which may change between versions.
//   - On the node that took a change it is in force when the call returns, on
//     the others as soon as they have applied it.
package settings

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/fault"
)

const tableName = "setting"

// maxValue bounds a value, in bytes.
const maxValue = 16 << 10

// Settings is the table of settings. It is safe for concurrent use once every
// room has defined its own.
type Settings struct {
	db   *table.DB
	rows *table.Table[row]
	log  *slog.Logger
	all  []definition // in the order of their names

	loading sync.Mutex // one load at a time, so that an older one never wins
	refused map[string]string
}

type row struct {
	Value string `cbor:"value"`
	By    string `cbor:"by"`
	At    int64  `cbor:"at"` // Unix seconds
}

// definition is a setting without its type.
type definition struct {
	name, fallback, summary string
	check                   func(text string) error
	apply                   func(text string) error
}

// Kind says what values a setting takes.
type Kind[T any] struct {
	// Parse reads a value; its error says what is taken instead.
	Parse func(text string) (T, error)
}

// Spec describes a setting.
type Spec[T any] struct {
	Name    string // room.words-of-it
	Default string
	Summary string // one line: what it does, in which unit, what 0 or "" means
	Kind    Kind[T]
}

// Setting is one value in force.
type Setting[T any] struct{ current atomic.Pointer[T] }

// Value is what is in force now. Whoever gets a map or a list must not change it.
func (s *Setting[T]) Value() T { return *s.current.Load() }

// New defines the table of settings.
func New(db *table.DB, log *slog.Logger) *Settings {
	return &Settings{db: db, rows: table.Define[row](db, tableName), log: log, refused: map[string]string{}}
}

// Define adds a setting, in force with its default until Load. It is called
// while the node is put together. A default that does not pass its own check, or
// a name that is taken, is a mistake in the program and panics.
func Define[T any](s *Settings, spec Spec[T]) *Setting[T] {
	out := &Setting[T]{}
	apply := func(text string) error {
		value, err := spec.Kind.Parse(text)
		if err == nil {
			out.current.Store(&value)
		}
		return err
	}
	if err := apply(spec.Default); err != nil {
		panic("settings: the default of " + spec.Name + ": " + err.Error())
	}
	at, taken := slices.BinarySearchFunc(s.all, spec.Name, byName)
	if taken {
		panic("settings: " + spec.Name + " is defined twice")
	}
	s.all = slices.Insert(s.all, at, definition{
		name: spec.Name, fallback: spec.Default, summary: spec.Summary, apply: apply,
		check: func(text string) error { _, err := spec.Kind.Parse(text); return err },
	})
	return out
}

func byName(d definition, name string) int { return strings.Compare(d.name, name) }

func (s *Settings) find(name string) (definition, error) {
	at, ok := slices.BinarySearchFunc(s.all, name, byName)
	if !ok {
		return definition{}, fault.New(fault.NotFound, "there is no setting %.80q; atoll settings show lists them", name)
	}
	return s.all[at], nil
}

// Load puts the rows in force that this node has. Run does it on every change;
// a node also does it before it serves.
func (s *Settings) Load() error {
	s.loading.Lock()
	defer s.loading.Unlock()
	return s.db.View(func(v *table.View) error {
		for _, d := range s.all {
			r, _, ok, err := s.rows.Get(v, d.name)
			if err != nil {
				return err
			}
			if !ok {
				r.Value = d.fallback
			}
			err = d.apply(r.Value)
			if err == nil {
				delete(s.refused, d.name)
			} else if s.refused[d.name] != r.Value {
				s.refused[d.name] = r.Value
				s.log.Warn("a setting has a value that this version does not take; the one before stays in force", "setting", d.name, "value", r.Value, "err", err)
			}
		}
		return nil
	})
}

// Run puts changes in force until ctx ends.
func (s *Settings) Run(ctx context.Context) error {
	changes := s.db.Watch(ctx, tableName) // before the first load: no change falls between
	for {
		if err := s.Load(); err != nil && ctx.Err() == nil {
			s.log.Warn("the settings could not be read; those before stay in force", "err", err)
		}
		if _, more := <-changes; !more {
			return ctx.Err()
		}
	}
}

// Entry is a setting as an operator sees it.
type Entry struct {
	Name    string `json:"name"`
	Value   string `json:"value"`
	Default string `json:"default"`
	Summary string `json:"summary"`
	// ChangedBy and ChangedAt are empty while the default is in force.
	ChangedBy string     `json:"changed_by,omitempty"`
	ChangedAt *time.Time `json:"changed_at,omitempty"`
}

func (d definition) entry(r row, set bool) Entry {
	e := Entry{Name: d.name, Value: d.fallback, Default: d.fallback, Summary: d.summary}
	if set {
		at := time.Unix(r.At, 0).UTC()
		e.Value, e.ChangedBy, e.ChangedAt = r.Value, r.By, &at
	}
	return e
}

// All lists the settings in the order of their names.
func (s *Settings) All(ctx context.Context) ([]Entry, error) {
	entries := make([]Entry, 0, len(s.all))
	_, err := s.db.Confirmed(ctx, func(v *table.View) error {
		entries = entries[:0]
		for _, d := range s.all {
			r, _, set, err := s.rows.Get(v, d.name)
			if err != nil {
				return err
			}
			entries = append(entries, d.entry(r, set))
		}
		return nil
	})
	return entries, err
}

// Get gives one setting; fault.NotFound when there is none of that name.
func (s *Settings) Get(ctx context.Context, name string) (e Entry, err error) {
	d, err := s.find(name)
	if err != nil {
		return Entry{}, err
	}
	_, err = s.db.Confirmed(ctx, func(v *table.View) error {
		r, _, set, err := s.rows.Get(v, name)
		e = d.entry(r, set)
		return err
	})
	return e, err
}

// Set changes a setting for the whole site; fault.Invalid, with what is taken
// instead, when the value does not pass its check.
func (s *Settings) Set(ctx context.Context, name, value, by string) (Entry, error) {
	d, err := s.find(name)
	if err != nil {
		return Entry{}, err
	}
	value = strings.TrimSpace(value)
	if len(value) > maxValue {
		return Entry{}, fault.New(fault.Invalid, "the value of %s has %d bytes; at most %d are taken", name, len(value), maxValue)
	}
	if err := d.check(value); err != nil {
		return Entry{}, fault.New(fault.Invalid, "%s cannot be %.80q: %v", name, value, err)
	}
	r := row{Value: value, By: by, At: time.Now().Unix()}
	if _, err := s.db.Update(ctx, func(tx *table.Tx) error { return s.rows.Put(tx, r, name) }); err != nil {
		return Entry{}, err
	}
	return d.entry(r, true), s.Load()
}

// Reset gives a setting its default back.
func (s *Settings) Reset(ctx context.Context, name string) error {
	if _, err := s.find(name); err != nil {
		return err
	}
	if _, err := s.db.Update(ctx, func(tx *table.Tx) error { return s.rows.Delete(tx, name) }); err != nil {
		return err
	}
	return s.Load()
}
