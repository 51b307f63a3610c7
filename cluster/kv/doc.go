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
