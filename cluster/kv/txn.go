// Package kv is the replicated state machine of a site: an ordered map of rows
// and a set of append-only logs, changed by one kind of command, the Txn. It
// knows keys, never features, so it does not change when features are added
// and nodes of different versions cannot diverge.
//
// # What always holds
//
//   - The state is a function of the committed entries alone. Revision = Raft
//     index of the entry that wrote.
//   - A Txn takes effect whole or not at all, and at most once: the results of
//     the last [Window] revisions are part of the state, the same bytes applied
//     again give the first result again, and a Txn whose Base is older than
//     that is refused as TooOld.
//   - The applied index commits in the same engine transaction as the rows, so
//     an entry is never applied twice and never skipped.
//   - An entry that this version cannot read halts the machine: nothing from
//     that entry on is applied, nothing is snapshotted, and a version that can
//     read it goes on from there.
//
// # The format of a Txn
//
// Version 1 is frozen. All integers but the counters are unsigned LEB128
// varints in their shortest form (uvarint); "bytes" is a uvarint length and
// that many bytes.
//
//	offset  size     what
//	0       1        version, 0x01
//	1       16       ID
//	17      uvarint  Base
//	        uvarint  number of conditions, then each condition:
//	          1        kind
//	          kind 1 RevIs:   bytes key, uvarint revision
//	          kind 2 RangeIs: bytes key, bytes end, uvarint rows, uvarint revision
//	          kind 3 LenIs:   bytes log, uvarint length
//	        uvarint  number of operations, then each operation:
//	          1        kind
//	          kind 1 Put:     bytes key, bytes value
//	          kind 2 Delete:  bytes key
//	          kind 3 Add:     bytes key, 8 bytes delta, 8 bytes max (big-endian two's complement)
//	          kind 4 Append:  bytes log, bytes value
//	          kind 5 Trim:    bytes log, uvarint upto
//
// Nothing follows the last operation. A Txn is at most 1 MiB with at most 4096
// conditions and operations; a key, an end or a log name has 1 to 2048 bytes;
// key < end in a RangeIs, which covers at most 256 rows (a larger number does
// not decode). There is exactly one encoding of a Txn, and anything else is
// refused. testdata/txn-v1.golden holds vectors.
package kv

import (
	"crypto/rand"
	"fmt"
)

// Version is the first byte of every encoded Txn.
const Version = 1

// Limits of one Txn. Encode and DecodeTxn both enforce them, so that no
// proposer can commit an entry that an applier would refuse.
const (
	MaxTxnBytes  = 1 << 20 // of the whole encoding
	MaxParts     = 4096    // conditions and operations together
	MaxKeyBytes  = 2048    // of a row key, a range end or a log name
	MaxRangeRows = 256     // that one RangeIs covers
)

// ID names one Txn for ever. It is random: two proposals share an ID only when
// they are the same bytes sent twice.
type ID [16]byte

// NewID gives a fresh random ID.
func NewID() ID {
	var id ID
	rand.Read(id[:]) // never fails: crypto/rand crashes the program instead
	return id
}

// CondKind is the kind of a condition.
type CondKind uint8

const (
	// RevIs holds when the row Key was last written at revision Rev; Rev 0
	// means that there is no such row.
	RevIs CondKind = 1
	// RangeIs holds when [Key, End) has exactly Len rows and the highest of
	// their revisions is Rev (0 when Len is 0). A row that is added or changed
	// raises the revision, one that is removed lowers the number: together
	// they see every change.
	RangeIs CondKind = 2
	// LenIs holds when exactly Len entries were ever appended to the log Key.
	LenIs CondKind = 3
)

// Cond is what must hold for a Txn to take effect.
type Cond struct {
	Kind     CondKind
	Key, End []byte
	Rev, Len uint64
}

// OpKind is the kind of an operation.
type OpKind uint8

const (
	// Put writes the row Key. The row keeps the revision that created it.
	Put OpKind = 1
	// Delete removes the row Key; removing no row is no error.
	Delete OpKind = 2
	// Add adds Delta to the counter in row Key (no row counts as 0; the row's
	// value is 8 bytes, big-endian). Growth past Max and decrease below 0 fail
	// the Txn with OutOfBounds; a decrease may leave the counter above Max, so
	// that lowering a quota never forbids releasing what it counted.
	Add OpKind = 3
	// Append adds Value to the log Key under the next sequence number.
	Append OpKind = 4
	// Trim forgets the entries of the log Key below sequence number Upto. The
	// log's length, which counts entries ever appended, stays.
	Trim OpKind = 5
)

// Op is one change of a Txn.
type Op struct {
	Kind       OpKind
	Key, Value []byte
	Delta, Max int64
	Upto       uint64
}

// Txn is the one command of the state machine: all Ops take effect when all
// Conds hold, else none does.
type Txn struct {
	ID ID
	// Base is the revision of the state that the proposer read. A Txn that is
	// applied more than Window revisions after its Base is refused as TooOld.
	Base  uint64
	Conds []Cond
	Ops   []Op
}

// Code says what became of a Txn.
type Code uint8

const (
	OK          Code = 0 // every operation took effect
	Conflict    Code = 1 // condition At does not hold; nothing took effect
	OutOfBounds Code = 2 // operation At would leave its bounds; nothing took effect
	TooOld      Code = 3 // Base is too far back to rule out that the Txn was applied before
)

func (c Code) String() string {
	switch c {
	case OK:
		return "ok"
	case Conflict:
		return "conflict"
	case OutOfBounds:
		return "out of bounds"
	case TooOld:
		return "too old"
	}
	return fmt.Sprintf("code %d", uint8(c))
}

// Result is what a Txn gave, the same on every node.
type Result struct {
	Rev  uint64 // the revision (Raft index) at which the Txn was first applied
	Code Code
	At   int // which condition (Conflict) or operation (OutOfBounds) failed
	// Numbers has one entry for each Append (its sequence number, from 0) and
	// each Add (the counter's new value), in the order of the operations; nil
	// unless Code is OK.
	Numbers []uint64
}

// Row is one row of the map.
type Row struct {
	Key, Value        []byte
	Created, Revision uint64 // revisions of the first and the last write
}
