// Package table gives rooms typed tables over the replicated map of cluster/kv.
package table

import (
	"context"
	"errors"
	"iter"
	"log/slog"
	"time"

	"github.com/atoll-registry/atoll/cluster/kv"
)

var errTodo = errors.New("not there yet")

type failure string

func (e failure) Error() string { return string(e) }

// Unavailable makes the failure one that a client may retry.
func (e failure) Unavailable() bool { return true }

// Failures that a caller can tell apart.
const (
	ErrNoLeader       = failure("no leader")
	ErrUnknownOutcome = failure("outcome unknown")
	ErrConflict       = failure("conflict")
)

var (
	ErrTooLarge    = errors.New("too large")
	ErrOutOfBounds = errors.New("out of bounds")
)

// Backend carries encoded Txns to the site's leader.
type Backend interface {
	Propose(ctx context.Context, txn []byte) (kv.Result, error)
	ReadIndex(ctx context.Context) (uint64, error)
}

type DB struct{}

func New(engine kv.Engine, log *slog.Logger) *DB { return &DB{} }
func (db *DB) Build(ctx context.Context) error   { return errTodo }
func (db *DB) Machine() *kv.Machine              { return nil }
func (db *DB) Attach(b Backend)                  {}
func (db *DB) Update(ctx context.Context, fn func(*Tx) error) (Commit, error) {
	return Commit{}, errTodo
}
func (db *DB) View(fn func(*View) error) error { return errTodo }
func (db *DB) Confirmed(ctx context.Context, fn func(*View) error) (Freshness, error) {
	return Freshness{}, errTodo
}
func (db *DB) ReadIndex(ctx context.Context) error                       { return errTodo }
func (db *DB) WaitApplied(ctx context.Context, rev uint64) error         { return errTodo }
func (db *DB) Watch(ctx context.Context, prefix ...string) <-chan uint64 { return nil }

type Commit struct{ Revision uint64 }
type Freshness struct {
	Stale    bool
	Age      time.Duration
	Revision uint64
}
type Reader interface{ reader() }
type Tx struct{}
type View struct{}

func (*Tx) reader()   {}
func (*View) reader() {}

type Pending struct{ seq *uint64 }

// Seq is the entry's sequence number once Update has returned without error.
func (p Pending) Seq() uint64 { return *p.seq }

func (tx *Tx) Append(log string, value []byte) Pending                            { return Pending{} }
func (tx *Tx) Trim(log string, upto uint64)                                       {}
func (tx *Tx) LogLen(log string) (uint64, error)                                  { return 0, errTodo }
func (tx *Tx) Add(delta, max int64, key ...string) error                          { return errTodo }
func (v *View) Revision() uint64                                                  { return 0 }
func (v *View) LogLen(log string) (uint64, error)                                 { return 0, errTodo }
func (v *View) Counter(key ...string) (int64, error)                              { return 0, errTodo }
func (v *View) Log(log string, from uint64, limit int) iter.Seq2[LogEntry, error] { return nil }

type LogEntry struct {
	Seq   uint64
	Value []byte
}
type Meta struct{ Created, Revision uint64 }
type Range struct {
	Prefix     []string
	After      []string
	AfterIndex []string
	Limit      int
}
type Row[T any] struct {
	Key   []string
	Value T
	Meta
	Index []string
}
type Index[T any] struct {
	Name    string
	Version int
	Keys    func(key []string, v T) [][]string
}
type Table[T any] struct{}

func Define[T any](db *DB, name string, indexes ...Index[T]) *Table[T] { return &Table[T]{} }
func (t *Table[T]) Get(r Reader, key ...string) (v T, meta Meta, ok bool, err error) {
	return v, meta, false, errTodo
}
func (t *Table[T]) Put(tx *Tx, v T, key ...string) error                            { return errTodo }
func (t *Table[T]) Delete(tx *Tx, key ...string) error                              { return errTodo }
func (t *Table[T]) Scan(r Reader, rg Range) iter.Seq2[Row[T], error]                { return nil }
func (t *Table[T]) Lookup(v *View, index string, rg Range) iter.Seq2[Row[T], error] { return nil }
func (t *Table[T]) Count(v *View, prefix ...string) (int, error)                    { return 0, errTodo }

// NewID gives 16 random bytes in hex.
func NewID() string { return "" }
