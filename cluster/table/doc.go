// Package table gives the rooms of a node typed tables, logs and counters over
// the replicated map of cluster/kv.
//
// # What always holds
//
//   - A Tx decides on one consistent local state, and everything that it read,
//     absent rows and scanned ranges included, is a condition of the commit.
//     When one of them changed meanwhile the function runs again, so it must
//     have no effect outside its Tx.
//   - An Update that succeeded is durable on a majority and visible on this
//     node. One that failed with an error of its own function, or that wrote
//     nothing, was confirmed at a read index: the state that it decided on was
//     the site's at some moment during the call.
//   - The function never runs again after a proposal whose outcome is unknown:
//     the same bytes are sent again, and the state machine applies them once.
//   - Indexes are derived on each node from the rows, in the engine
//     transaction that writes them. They are in no log and no snapshot, they
//     are rebuilt when their Version changed, and a row that this version
//     cannot decode is in none. No decision rests on an index: a Tx has none.
//   - A Put keeps the fields of the stored row that this version's type does
//     not have, at the top and in nested structs (not inside lists and maps),
//     so that an older node's read-modify-write loses nothing of a newer one's.
//
// # Use
//
// Rooms call [Define] on a [DB] that is not built yet. Then [DB.Build] brings
// indexes up to date and gives the machine for raft, and [DB.Attach] names the
// backend that carries transactions to the leader. Reading by [DB.View] works
// from Build on.
//
// A function passed to View, Confirmed or Update holds a state of the engine
// open: it must not call Update, ReadIndex or WaitApplied.
package table
