// Package raftnet is what raft needs from the world besides its files: the way to
// its peers, a record of what they have answered, a log, and the node's state as a
// snapshot.
package raftnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// Network carries connections between the nodes of the site. A dialled connection
// has a method PeerID() string: the node at its other end, proven.
type Network interface {
	Listen(service byte) net.Listener
	Dial(ctx context.Context, addr string, service byte) (net.Conn, error)
}

// Layer is raft's way through the Network. A dial to the node itself never
// leaves it: the lone voter's call for an election takes that way.
type Layer struct {
	net.Listener // of the Network
	network      Network
	service      byte
	self         string

	accepted chan net.Conn
	closed   chan struct{}
	once     sync.Once

	mu    sync.Mutex
	conns map[*layerConn]struct{}
}

// layerConn is a connection that the layer can cut when raft stops: raft
// itself would wait for its deadline.
type layerConn struct {
	net.Conn
	layer *Layer
	once  sync.Once
}

func (c *layerConn) Close() error {
	c.once.Do(func() {
		c.layer.mu.Lock()
		delete(c.layer.conns, c)
		c.layer.mu.Unlock()
	})
	return c.Conn.Close()
}

// NewLayer listens on a service of the network; self is the node's own address.
func NewLayer(network Network, service byte, self string) *Layer {
	l := &Layer{
		Listener: network.Listen(service), network: network, service: service, self: self,
		accepted: make(chan net.Conn), closed: make(chan struct{}), conns: make(map[*layerConn]struct{}),
	}
	return l
}

// Serve moves accepted connections to raft until the listener is closed.
func (l *Layer) Serve() error {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			select {
			case <-l.closed:
				return nil
			default:
				return err
			}
		}
		l.hand(c)
	}
}

func (l *Layer) hand(c net.Conn) {
	select {
	case l.accepted <- c:
	case <-l.closed:
		c.Close()
	}
}

// Accept implements raft.StreamLayer.
func (l *Layer) Accept() (net.Conn, error) {
	select {
	case c := <-l.accepted:
		return l.track(c)
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Dial implements raft.StreamLayer. The address is one that named made: a node
// other than the one meant gets no message.
func (l *Layer) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	id, addr, ok := strings.Cut(string(address), "@")
	if !ok {
		return nil, fmt.Errorf("raft dials %s without saying whom it means", address)
	}
	if addr == l.self {
		near, far := net.Pipe()
		select {
		case l.accepted <- far:
			return l.track(near)
		case <-l.closed:
			return nil, net.ErrClosed
		}
	}
	// raft gives no context; the timeout and Close end the dial.
	ctx, cancel := context.WithTimeout(closing{l.closed}, timeout)
	defer cancel()
	c, err := l.network.Dial(ctx, addr, l.service)
	if err != nil {
		return nil, err
	}
	// Network promises that a connection says who is at its other end.
	if peer := c.(interface{ PeerID() string }).PeerID(); peer != id {
		c.Close()
		return nil, fmt.Errorf("%s is the address of node %s now, not of node %s", addr, peer, id)
	}
	return l.track(c)
}

func (l *Layer) track(c net.Conn) (net.Conn, error) {
	tracked := &layerConn{Conn: c, layer: l}
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.closed:
		c.Close()
		return nil, net.ErrClosed
	default:
	}
	l.conns[tracked] = struct{}{}
	return tracked, nil
}

// Close implements raft.StreamLayer: connections under way are cut.
func (l *Layer) Close() error {
	l.once.Do(func() {
		l.mu.Lock()
		close(l.closed)
		conns := make([]*layerConn, 0, len(l.conns))
		for c := range l.conns {
			conns = append(conns, c)
		}
		l.mu.Unlock()
		for _, c := range conns {
			c.Close()
		}
	})
	return l.Listener.Close()
}

// Addr implements raft.StreamLayer.
func (l *Layer) Addr() net.Addr { return peerAddr(l.self) }

type peerAddr string

func (peerAddr) Network() string  { return "peer" }
func (a peerAddr) String() string { return string(a) }

// closing is a context that ends when a channel is closed.
type closing struct{ done <-chan struct{} }

func (closing) Deadline() (time.Time, bool) { return time.Time{}, false }
func (c closing) Done() <-chan struct{}     { return c.done }
func (closing) Value(any) any               { return nil }
func (c closing) Err() error {
	select {
	case <-c.done:
		return context.Canceled
	default:
		return nil
	}
}

// Transport is raft's network transport with two things more. It remembers what
// each follower has answered: raft itself knows, but does not say how far a
// non-voter is. And it reaches the node that raft means or none: raft dials
// addresses and believes whoever answers, so a machine that was set up anew at
// a dead voter's address would acknowledge entries and give votes in its name,
// without having what the dead one had on its disk.
type Transport struct {
	*raft.NetworkTransport
	Progress *Progress

	mute atomic.Bool
}

// errMute answers raft while its messages are held back.
var errMute = errors.New("this node sends no messages of the consensus at the moment")

// Mute holds back what raft sends to others, or lets it through again; before
// says how it was. What others send is answered all the same.
func (t *Transport) Mute(mute bool) (before bool) { return t.mute.Swap(mute) }

// named is the address under which the layer finds one node and no other. It is
// also what raft keeps its idle connections by.
func named(id raft.ServerID, target raft.ServerAddress) raft.ServerAddress {
	return raft.ServerAddress(id) + "@" + target
}

// RequestVote implements raft.Transport.
func (t *Transport) RequestVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	if t.mute.Load() {
		return errMute
	}
	return t.NetworkTransport.RequestVote(id, named(id, target), args, resp)
}

// RequestPreVote implements raft.WithPreVote.
func (t *Transport) RequestPreVote(id raft.ServerID, target raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	if t.mute.Load() {
		return errMute
	}
	return t.NetworkTransport.RequestPreVote(id, named(id, target), args, resp)
}

// TimeoutNow implements raft.Transport.
func (t *Transport) TimeoutNow(id raft.ServerID, target raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	return t.NetworkTransport.TimeoutNow(id, named(id, target), args, resp)
}

// AppendEntries implements raft.Transport.
func (t *Transport) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if t.mute.Load() {
		return errMute
	}
	err := t.NetworkTransport.AppendEntries(id, named(id, target), args, resp)
	if err == nil && resp.Success && resp.Term <= args.Term {
		index := args.PrevLogEntry
		if n := len(args.Entries); n > 0 {
			index = args.Entries[n-1].Index
		}
		t.Progress.answered(string(id), args.Term, index, args.LeaderCommitIndex)
	}
	return err
}

// AppendEntriesPipeline implements raft.Transport. There is no pipeline: it
// would keep two messages under way instead of one and hide the answers from
// us; a batch of 64 entries per round trip is far above what an edge site writes.
func (t *Transport) AppendEntriesPipeline(raft.ServerID, raft.ServerAddress) (raft.AppendPipeline, error) {
	return nil, raft.ErrPipelineReplicationNotSupported
}

// InstallSnapshot implements raft.Transport.
func (t *Transport) InstallSnapshot(id raft.ServerID, target raft.ServerAddress, args *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	if t.mute.Load() {
		return errMute
	}
	err := t.NetworkTransport.InstallSnapshot(id, named(id, target), args, resp, data)
	if err == nil && resp.Success {
		t.Progress.answered(string(id), args.Term, args.LastLogIndex, 0)
	}
	return err
}

// Progress is what the followers of this leader have answered.
type Progress struct {
	mu    sync.Mutex
	peers map[string]Follower
	moved func() // called when a follower has stored more
}

// Follower is what is known of one.
type Follower struct {
	Term    uint64    // of the leader that it answered
	Durable uint64    // its log holds this entry and all before it on disk
	Caught  bool      // in this term its log has reached what was committed at that time
	Contact time.Time // of its last answer
}

// NewProgress gives a record that calls moved, which must not block, each time a
// follower has stored more.
func NewProgress(moved func()) *Progress {
	return &Progress{peers: make(map[string]Follower), moved: moved}
}

// answered records that a follower's log agrees with the leader's up to index;
// 0 in a heartbeat, which says nothing of the log.
func (p *Progress) answered(id string, term, index, commit uint64) {
	p.mu.Lock()
	f := p.peers[id]
	if term < f.Term {
		p.mu.Unlock()
		return
	}
	if term > f.Term {
		f = Follower{Term: term} // another leader may have cut the log meanwhile
	}
	more := index > f.Durable
	f.Durable = max(f.Durable, index)
	if index > 0 && commit > 0 && f.Durable >= commit {
		f.Caught = true
	}
	f.Contact = time.Now()
	p.peers[id] = f
	p.mu.Unlock()
	if more {
		p.moved()
	}
}

// Of gives what a follower has answered to this node as the leader of term.
func (p *Progress) Of(id string, term uint64) Follower {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.peers[id]
	if f.Term != term {
		return Follower{Term: term}
	}
	return f
}

// Contact is when a follower last answered this node in any term.
func (p *Progress) Contact(id string) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.peers[id].Contact
}

var _ raft.WithPreVote = (*Transport)(nil)
