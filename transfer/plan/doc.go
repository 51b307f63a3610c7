// Package plan decides which piece of a blob goes when, from whom, to whom. It moves
// nothing and waits for nothing: engines tell it what has happened and ask what to do
// next, and give it the time and the randomness, so that a simulator runs the same
// decisions as a node does (package plantest).
//
// Two sides. A Want is a blob that this node fetches: Next says what to ask of a
// holder. A Queue is everything that others ask of this node: Next says which piece
// goes out next, and to whom.
//
// The rules, and what each is good for:
//
//   - While others fetch the same blob, a holder of all of it is asked for any piece
//     (Any), and it sends the one that it has sent least, to the asker that has passed
//     on what it got before. So each piece leaves the source about once, and goes to
//     those who have uplink to spare.
//   - What one of those has just got it is left to pass on, for a while, though a reader
//     waits at another: that one asks whoever comes to have it.
//   - Everybody else is asked for given pieces, those first that the fewest have,
//     with random ties, few at a time: a choice made late is a better one.
//   - A holder sends first what it has sent least, and has few pieces in service at
//     once: the way of the last piece through the swarm is what the end waits for.
//   - One wanter and several holders: short queues at each, filled as they drain, so
//     that each one's part is in proportion to its speed and no piece comes twice.
//   - A piece is asked of a second holder only when the first makes no progress, or
//     is far slower than the second while nothing else is left to ask for.
//   - What a reader waits for goes before the rest, at the fastest holder; while a
//     reader waits for its first piece nothing else is asked for, unless holders choose.
//   - One node of a site, elected, asks holders beyond a slow link, as long as others
//     of the site that it can trade with want the blob too.
//
// An engine that cannot leave the choice to a holder (BitTorrent cannot) uses the same
// Want with Rules.Specific, and turns Asks into priorities.
package plan
