// Package journal keeps the logs that sites exchange: one append-only log for
// each scope (a project) of each life of a site, its own and those that it
// accepted from others.
//
// Invariants:
//   - An entry is appended by the Txn that makes the change it tells of, so log
//     and tables never disagree, and the order of a log is the order in which
//     its changes were committed.
//   - Every append of an own entry is guarded by the row of the site's identity:
//     a site that begins a new life cannot add to the log of the old one.
//   - Appends of one scope do not guard the log's length, so that concurrent
//     writers do not disturb each other; entries of other sites do, so that a
//     gap or a fork never enters.
//   - A value is kept as the bytes it came as; hashes and signatures are over
//     those.
package journal

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"

	"github.com/atoll-registry/atoll/bundle/entry"
	"github.com/atoll-registry/atoll/cluster/table"
	"github.com/atoll-registry/atoll/node/fault"
)

// Wrapped by refusals of entries of other sites: some are missing in between,
// the log says something else at that place, or they are in it already.
var (
	ErrGap      = errors.New("entries are missing in between")
	ErrFork     = errors.New("the log differs from what was accepted before")
	ErrAccepted = errors.New("the entry was accepted before")
)

// Sealer keeps private keys from whoever reads the rows. name is bound to what
// is sealed: it opens under the same name only.
type Sealer interface {
	Seal(name string, plain []byte) ([]byte, error)
	Unseal(name string, sealed []byte) ([]byte, error)
}

// Scope is a log that this site may write: only Journal hands them out.
type Scope struct{ Log entry.LogID }

// SeqEntry is an entry with its place in the log, 0-based.
type SeqEntry struct {
	Seq   uint64
	Value []byte
}

// Journal reads and writes logs. It is safe for use by many goroutines.
type Journal struct {
	db       *table.DB
	sealer   Sealer
	delegate func(ctx context.Context, duty string, ask, answer any) error // may be nil

	sites       *table.Table[siteRow]
	keys        *table.Table[keyRow]
	logs        *table.Table[logRow]
	checkpoints *table.Table[checkpointRow]

	trees treeCache
	site  atomic.Pointer[siteAt] // as it was read last

	mu      sync.Mutex
	signers map[entry.Key]signer // opened private keys of this site
}

// logRow says that a log is known here. It never changes once written.
type logRow struct {
	Own bool `cbor:"own"`
}

type checkpointRow struct {
	Signed []byte `cbor:"signed"`
	Size   uint64 `cbor:"size"`
}

// New defines the journal's tables on db. The site's identity comes later, from
// EnsureSite.
func New(db *table.DB, sealer Sealer) *Journal {
	return &Journal{
		db:          db,
		sealer:      sealer,
		sites:       table.Define[siteRow](db, "site"),
		keys:        table.Define[keyRow](db, "site_key"),
		logs:        table.Define[logRow](db, "journal"),
		checkpoints: table.Define[checkpointRow](db, "checkpoint"),
		signers:     map[entry.Key]signer{},
	}
}

// logName is the name of a log in the replicated map.
func logName(id entry.LogID) string { return "journal/" + id.String() }

func logKey(id entry.LogID) []string { return []string{id.Site, id.Incarnation, id.Scope} }

// Begin opens a new log of this site, for a scope that the caller just made up.
func (j *Journal) Begin(tx *table.Tx, scope string) (Scope, error) {
	site, err := j.Site(tx)
	if err != nil {
		return Scope{}, err
	}
	id := entry.LogID{Site: site.ID, Incarnation: site.Incarnation, Scope: scope}
	if err := id.Validate(); err != nil {
		return Scope{}, fmt.Errorf("begin log: %w", err)
	}
	if err := j.logs.Put(tx, logRow{Own: true}, logKey(id)...); err != nil {
		return Scope{}, fmt.Errorf("begin log %s: %w", id, err)
	}
	return Scope{Log: id}, nil
}

// Own gives the right to write a log of this site in this life, or a Denied
// fault that names the site that owns it.
func (j *Journal) Own(r table.Reader, id entry.LogID) (Scope, error) {
	site, err := j.Site(r)
	if err != nil {
		return Scope{}, err
	}
	if id.Site != site.ID {
		return Scope{}, fault.New(fault.Denied, "this is a mirror of a project of site %s, which alone writes it; push there", id.Site).WithCode("DENIED")
	}
	if id.Incarnation != site.Incarnation {
		return Scope{}, fault.New(fault.Denied, "this project's log belongs to an earlier life (%s) of this site and is read-only", id.Incarnation).WithCode("DENIED")
	}
	return Scope{Log: id}, nil
}

// Append adds an entry to a log of this site, in the Txn that makes the change.
// The Txn takes effect only while the site is still who it was at this read.
func (j *Journal) Append(tx *table.Tx, scope Scope, e entry.Entry) error {
	if _, err := j.Own(tx, scope.Log); err != nil {
		return err
	}
	value, err := e.Encode()
	if err != nil {
		return fmt.Errorf("append to log %s: %w", scope.Log, err)
	}
	tx.Append(logName(scope.Log), value)
	return nil
}

// Follow makes another site's log known, so that its entries may be accepted.
func (j *Journal) Follow(tx *table.Tx, id entry.LogID) error {
	if err := id.Validate(); err != nil {
		return fault.Wrap(err, fault.Invalid, "%s does not name a log", id)
	}
	site, err := j.Site(tx)
	if err != nil {
		return err
	}
	if id.Site == site.ID && id.Incarnation == site.Incarnation {
		return fault.New(fault.Invalid, "log %s is this site's own", id)
	}
	_, _, known, err := j.logs.Get(tx, logKey(id)...)
	if err != nil || known {
		return err
	}
	return j.logs.Put(tx, logRow{}, logKey(id)...)
}

// Accept adds entries of another site's log, the first with the sequence number
// seq. It is to be called once for a log in a Txn. The Txn takes effect only
// when the log ends exactly there; a fault Conflict that wraps ErrGap says that
// entries are missing in between, one that wraps ErrAccepted that the first is in
// the log already: those are the caller's to skip, after Compare.
func (j *Journal) Accept(tx *table.Tx, id entry.LogID, seq uint64, values ...[]byte) error {
	row, _, known, err := j.logs.Get(tx, logKey(id)...)
	if err != nil {
		return err
	}
	if !known || row.Own {
		return fault.New(fault.Precondition, "entries of log %s are not followed here", id)
	}
	size, err := tx.LogLen(logName(id))
	if err != nil {
		return fmt.Errorf("read length of log %s: %w", id, err)
	}
	if seq > size {
		return fault.Wrap(ErrGap, fault.Conflict, "log %s: entries %d to %d are missing; bring a bundle that starts at or before %d", id, size, seq-1, size)
	}
	if seq < size {
		return fault.Wrap(ErrAccepted, fault.Conflict, "log %s: entry %d was accepted before", id, seq)
	}
	for i, value := range values {
		if _, err := entry.Decode(value); err != nil {
			return fault.Wrap(err, fault.Invalid, "log %s: entry %d is malformed", id, seq+uint64(i))
		}
		tx.Append(logName(id), value)
	}
	return nil
}

// Compare tells whether an entry that is already in the log is this one; a
// fault Conflict that wraps ErrFork says that it is another, which two honest
// copies of one log cannot be.
func (j *Journal) Compare(v *table.View, id entry.LogID, e SeqEntry) error {
	for have, err := range j.Entries(v, id, e.Seq, 1) {
		if err != nil {
			return err
		}
		if have.Seq == e.Seq && string(have.Value) == string(e.Value) {
			return nil
		}
		break
	}
	return fault.Wrap(ErrFork, fault.Conflict, "log %s: entry %d differs from the one accepted before: the log's writer, or someone with its key, wrote two histories; nothing was applied", id, e.Seq)
}

// Size is the number of entries of a log, 0 of an unknown one.
func (j *Journal) Size(v *table.View, id entry.LogID) (uint64, error) {
	return v.LogLen(logName(id))
}

// Known reports whether the log is kept here.
func (j *Journal) Known(r table.Reader, id entry.LogID) (bool, error) {
	_, _, known, err := j.logs.Get(r, logKey(id)...)
	return known, err
}

// Entries yields at most n entries from the sequence number from; n 0 is all.
func (j *Journal) Entries(v *table.View, id entry.LogID, from uint64, n int) iter.Seq2[SeqEntry, error] {
	return func(yield func(SeqEntry, error) bool) {
		for e, err := range v.Log(logName(id), from, n) {
			if err != nil {
				yield(SeqEntry{}, fmt.Errorf("read log %s: %w", id, err))
				return
			}
			if !yield(SeqEntry{Seq: e.Seq, Value: e.Value}, nil) {
				return
			}
		}
	}
}

// Logs yields the logs known here after one (the zero LogID: from the start),
// own and foreign, in the order of LogID.Compare.
func (j *Journal) Logs(v *table.View, after entry.LogID) iter.Seq2[entry.LogID, error] {
	return func(yield func(entry.LogID, error) bool) {
		var rg table.Range
		if after != (entry.LogID{}) {
			rg.After = logKey(after)
		}
		for row, err := range j.logs.Scan(v, rg) {
			if err != nil {
				yield(entry.LogID{}, fmt.Errorf("list logs: %w", err))
				return
			}
			if !yield(entry.LogID{Site: row.Key[0], Incarnation: row.Key[1], Scope: row.Key[2]}, nil) {
				return
			}
		}
	}
}
