package raftnet

import (
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// Notices tell the followers at once what the leader has committed. Raft tells them
// with the next entry, or, when none follows, 50 to 100 ms later; for so long a
// write that came in through a follower would not be visible there, and a read would
// wait. A notice is the message that raft sends then, only earlier: a follower that
// does not have the entry yet, or follows somebody else, refuses it like any other.
type Notices struct {
	transport *Transport
	header    raft.RPCHeader

	mu     sync.Mutex
	newest commit
	busy   map[raft.ServerID]bool // followers to whom one is on its way
	wg     sync.WaitGroup
}

// commit is an entry that is committed, and the term in which it was appended.
type commit struct{ index, term uint64 }

// NewNotices sends by the transport of the node with this id and address.
func NewNotices(t *Transport, self raft.ServerID, addr raft.ServerAddress) *Notices {
	return &Notices{
		transport: t, busy: map[raft.ServerID]bool{},
		header: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(self), Addr: t.EncodePeer(self, addr)},
	}
}

// Committed tells the servers that the entry at index, which this node appended as
// the leader of term, is committed. It does not wait. One notice at a time is on its
// way to each: what is committed meanwhile goes with the next.
func (n *Notices) Committed(index, term uint64, servers []raft.Server) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if index > n.newest.index {
		n.newest = commit{index, term}
	}
	for _, s := range servers {
		if string(s.ID) == string(n.header.ID) || n.busy[s.ID] {
			continue
		}
		n.busy[s.ID] = true
		n.wg.Go(func() { n.tell(s) })
	}
}

// patience is how long a follower is told again that does not have the entry yet: a
// majority of the others was quicker, and its own copy is on the way.
const patience = 32 * time.Millisecond

// tell sends until the follower knows of the newest, or does not answer, or does not
// get the entry: then raft tells it in its own time.
func (n *Notices) tell(s raft.Server) {
	var told commit
	pause := time.Millisecond
	for {
		n.mu.Lock()
		newest := n.newest
		if newest == told {
			n.busy[s.ID] = false
			n.mu.Unlock()
			return
		}
		n.mu.Unlock()
		var resp raft.AppendEntriesResponse
		err := n.transport.AppendEntries(s.ID, s.Address, &raft.AppendEntriesRequest{
			RPCHeader: n.header, Leader: n.header.Addr, Term: newest.term,
			PrevLogEntry: newest.index, PrevLogTerm: newest.term, LeaderCommitIndex: newest.index,
		}, &resp)
		switch {
		case err == nil && resp.Success:
			told, pause = newest, time.Millisecond
		case err == nil && resp.Term <= newest.term && pause < patience:
			time.Sleep(pause)
			pause *= 2
		default:
			n.mu.Lock()
			n.busy[s.ID] = false
			n.mu.Unlock()
			return
		}
	}
}

// Wait returns when none is on its way any more; the transport is closed before.
func (n *Notices) Wait() { n.wg.Wait() }
