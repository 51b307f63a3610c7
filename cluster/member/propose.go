package member

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"time"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/table"
)

// outcome says what a failed attempt to commit means.
type outcome uint8

const (
	never   outcome = iota // this attempt will not take effect; another may be made
	unknown                // it may take effect yet; only the same bytes may be sent again
	refused                // no leader will take these bytes
)

// Propose implements table.Backend: it hands the bytes to the leader, waiting
// up to Timings.LeaderWait for one, and sends the same bytes again for as long
// as it does not know what became of them.
func (n *Node) Propose(ctx context.Context, txn []byte) (kv.Result, error) {
	if len(txn) > kv.MaxTxnBytes {
		return kv.Result{}, table.ErrTooLarge
	}
	if err := n.refusal(); err != nil {
		return kv.Result{}, err
	}
	bounded, cancel := context.WithTimeout(ctx, n.cfg.Timings.LeaderWait)
	defer cancel()
	sent := false
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 250*time.Millisecond) {
		changed := n.changed.wait()
		if err := n.cfg.Epoch.Err(); err != nil && !sent {
			return kv.Result{}, fmt.Errorf("%w: %w", table.ErrNoLeader, err)
		} else if err != nil {
			return kv.Result{}, fmt.Errorf("%w: %w", table.ErrUnknownOutcome, err)
		}
		result, outcome, err := n.attempt(bounded, txn)
		switch {
		case err == nil:
			return result, nil
		case outcome == unknown:
			sent = true
		case outcome == refused && !sent:
			return kv.Result{}, err
		}
		again := time.NewTimer(pause)
		select {
		case <-changed:
		case <-again.C:
		case <-bounded.Done():
		}
		again.Stop()
		if bounded.Err() == nil {
			continue
		}
		if sent {
			return kv.Result{}, fmt.Errorf("%w: %w", table.ErrUnknownOutcome, err)
		}
		if ctx.Err() != nil {
			return kv.Result{}, ctx.Err()
		}
		return kv.Result{}, fmt.Errorf("%w: waited %v, last: %w", table.ErrNoLeader, n.cfg.Timings.LeaderWait, err)
	}
}

// attempt hands the bytes to the leader of the moment, once.
func (n *Node) attempt(ctx context.Context, txn []byte) (kv.Result, outcome, error) {
	addr, id := n.route()
	switch id {
	case "":
		return kv.Result{}, never, errors.New("no leader is known")
	case n.Self():
		return n.commit(ctx, txn)
	default:
		ctx, gone := context.WithCancel(ctx)
		defer gone()
		go n.whileLeads(ctx, id, gone)
		return n.forward(ctx, addr, txn)
	}
}

// whileLeads calls gone when another node leads than id, or none. A leader whose
// machine has died answers nothing, and refuses nothing either: who has sent it a
// transaction would wait for as long as it may. It ends with ctx.
func (n *Node) whileLeads(ctx context.Context, id string, gone func()) {
	for {
		changed := n.changed.wait()
		if _, now := n.route(); now != id {
			gone()
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// commit applies the bytes as the leader.
func (n *Node) commit(ctx context.Context, txn []byte) (kv.Result, outcome, error) {
	// Bytes that the state machine cannot read would halt every node.
	if err := kv.CheckTxn(txn); err != nil {
		return kv.Result{}, refused, err
	}
	in := n.raft.Load()
	if in == nil {
		return kv.Result{}, never, errors.New("the node is starting")
	}
	if err := n.refusal(); err != nil {
		return kv.Result{}, never, err
	}
	in.gate.RLock()
	if in.stopped {
		in.gate.RUnlock()
		return kv.Result{}, never, errStopped
	}
	term := in.CurrentTerm()
	future := in.Apply(txn, timeLeft(ctx))
	in.gate.RUnlock()

	done := make(chan error, 1)
	go func() { done <- future.Error() }() // ends with raft at the latest: see instance.stop
	select {
	case err := <-done:
		if err != nil {
			return kv.Result{}, outcomeOf(err), err
		}
	case <-ctx.Done():
		return kv.Result{}, unknown, ctx.Err()
	}
	switch answer := future.Response().(type) {
	case kv.Result:
		in.tell(future.Index(), term)
		if err := n.awaitSecondCopy(ctx, in, answer.Rev); err != nil {
			return kv.Result{}, unknown, err
		}
		return answer, never, nil
	case error:
		return kv.Result{}, unknown, answer
	default:
		return kv.Result{}, unknown, fmt.Errorf("the state machine answered %T", answer)
	}
}

// tell lets the followers know of a committed entry that was proposed in a term. It
// leaves that to the entries that follow, if there are any.
func (in *instance) tell(index, term uint64) {
	in.gate.RLock()
	defer in.gate.RUnlock()
	if in.stopped || in.CurrentTerm() != term || in.LastIndex() > index {
		return
	}
	in.notices.Committed(index, term, in.servers())
}

// timeLeft is for how long a proposal may wait in raft's queue.
func timeLeft(ctx context.Context) time.Duration {
	if deadline, ok := ctx.Deadline(); ok {
		return max(time.Until(deadline), time.Millisecond)
	}
	return 0
}

// outcomeOf tells apart the errors by which raft says that it never took an
// entry from those after which the entry may still be committed.
func outcomeOf(err error) outcome {
	for _, before := range []error{raft.ErrNotLeader, raft.ErrLeadershipTransferInProgress, raft.ErrEnqueueTimeout} {
		if errors.Is(err, before) {
			return never
		}
	}
	return unknown
}

// awaitSecondCopy makes a write at a site with one voter wait until a
// non-voter has it on disk as well: raft commits it on the voter's disk alone.
// Only non-voters that are live and have caught up are waited for; when there
// is none, the write is acknowledged with one copy.
func (n *Node) awaitSecondCopy(ctx context.Context, in *instance, rev uint64) error {
	for {
		moved := in.moved.wait()
		if !in.loneVoter() {
			return nil
		}
		others, waiting := 0, false
		term := in.CurrentTerm()
		for _, s := range in.servers() {
			if s.ID == in.self {
				continue
			}
			others++
			f := in.progress.Of(string(s.ID), term)
			if f.Durable >= rev {
				return nil
			}
			waiting = waiting || f.Caught && time.Since(f.Contact) < n.cfg.Timings.Lease
		}
		if !waiting {
			if others > 0 {
				n.metrics.singleCopies.Inc()
			}
			return nil
		}
		look := time.NewTimer(n.cfg.Timings.Lease / 4)
		select {
		case <-moved:
		case <-look.C:
		case <-ctx.Done():
		}
		look.Stop()
		if ctx.Err() != nil {
			return fmt.Errorf("waiting for the second copy: %w", ctx.Err())
		}
	}
}

// ReadIndex implements table.Backend. It does not wait for a leader: a caller
// with patience asks again.
func (n *Node) ReadIndex(ctx context.Context) (uint64, error) {
	if err := n.cfg.Epoch.Err(); err != nil {
		return 0, fmt.Errorf("%w: %w", table.ErrNoLeader, err)
	}
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Timings.ReadWait)
	defer cancel()
	addr, id := n.route()
	var index uint64
	err := errors.New("no leader is known")
	switch id {
	case "":
	case n.Self():
		index, err = n.leadIndex(ctx)
	default:
		index, err = n.askIndex(ctx, addr)
	}
	if err != nil {
		return 0, fmt.Errorf("%w: %w", table.ErrNoLeader, err)
	}
	return index, nil
}

// leadIndex gives the leader's commit index and proves that no other leader
// had committed anything when it was asked.
//
// It does not use raft's VerifyLeader: that one counts the answers of
// non-voters, and answers to heartbeats that were sent before it was called.
// Instead a majority of the voters is asked for its term. A voter that is
// still in our term has not voted for a later leader, and every later leader
// needs one of any such majority before it commits.
func (n *Node) leadIndex(ctx context.Context) (uint64, error) {
	in := n.raft.Load()
	if in == nil {
		return 0, errors.New("the node is starting")
	}
	term := in.CurrentTerm()
	for {
		opened := n.changed.wait()
		if in.State() != raft.Leader || in.CurrentTerm() != term {
			return 0, raft.ErrNotLeader
		}
		if n.term.Load() == term {
			break
		}
		// Until an entry of its own term is committed a leader does not know
		// what its predecessors committed.
		select {
		case <-opened:
		case <-ctx.Done():
			return 0, errors.New("the leader is new and has not committed anything yet")
		}
	}
	index := in.CommitIndex()
	if err := n.confirmTerm(ctx, in, term); err != nil {
		return 0, err
	}
	if in.State() != raft.Leader || in.CurrentTerm() != term {
		return 0, raft.ErrNotLeader
	}
	return index, nil
}

// OwnIndex is ReadIndex for a leader that is the only voter, and so its own
// majority: there is nobody to ask, and nothing to wait for. It is not ok on
// every other node, on a leader that is new, and on one that was fenced a moment ago and
// has not left the consensus yet.
func (n *Node) OwnIndex() (uint64, bool) {
	in := n.raft.Load()
	if in == nil || n.cfg.Epoch.Err() != nil {
		return 0, false
	}
	term := in.CurrentTerm()
	if n.term.Load() != term || in.State() != raft.Leader || !in.loneVoter() {
		return 0, false
	}
	index := in.CommitIndex()
	// Another voter, made meanwhile, leads only with this node's vote, which
	// changes the term before that one commits anything.
	if in.State() != raft.Leader || in.CurrentTerm() != term {
		return 0, false
	}
	return index, true
}

// confirmTerm returns once a majority of the voters, this node among them, has
// said after the call that it knows no later term.
func (n *Node) confirmTerm(ctx context.Context, in *instance, term uint64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	voters, asked := 0, 0
	answers := make(chan bool, len(in.servers()))
	servers := in.servers()
	for _, s := range servers {
		if s.Suffrage != raft.Voter {
			continue
		}
		voters++
		if s.ID == in.self {
			continue
		}
		asked++
		go func() { // ends with ctx, and so with the call
			theirs, err := n.askTerm(ctx, string(s.Address), string(s.ID))
			answers <- err == nil && theirs <= term
		}()
	}
	need := voters/2 + 1 - 1 // this node counts: it is a voter, or it would not lead
	for ; need > 0; asked-- {
		if asked < need {
			return errors.New("a majority of the voters did not confirm the leader")
		}
		select {
		case yes := <-answers:
			if yes {
				need--
			}
		case <-ctx.Done():
			return errors.New("a majority of the voters did not answer in time")
		}
	}
	return nil
}

// LastContact is when this node last heard of a leader, in an earlier run if not in this
// one; zero when that is not known.
func (n *Node) LastContact() time.Time {
	in := n.raft.Load()
	if in == nil {
		return n.before
	}
	if in.State() == raft.Leader {
		return time.Now()
	}
	if at := in.LastContact(); at.After(n.before) {
		return at
	}
	return n.before
}

// contactFile, in the directory raft, says when this node last heard of a leader: Unix
// milliseconds (8 bytes, big-endian) and their CRC-32C. A node that comes back alone
// would else take what it serves for as new as its own start. It is written in place and
// never synced: after a power cut it is some seconds old or cannot be read.
const (
	contactFile  = "contact"
	contactBytes = 12
	contactEvery = 5 * time.Second
)

func encodeContact(at time.Time) []byte {
	b := binary.BigEndian.AppendUint64(make([]byte, 0, contactBytes), uint64(at.UnixMilli()))
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

// recallContact gives the last contact of an earlier run as a moment of this one's
// monotonic clock; zero when nothing says it. A clock that is behind it cannot tell how
// long ago that was.
func (n *Node) recallContact() time.Time {
	stored, err := os.ReadFile(filepath.Join(n.raftDir(), contactFile))
	if err != nil || len(stored) != contactBytes {
		return time.Time{}
	}
	at := time.UnixMilli(int64(binary.BigEndian.Uint64(stored)))
	if !bytes.Equal(encodeContact(at), stored) {
		return time.Time{}
	}
	return time.Now().Add(-max(0, n.Now().Sub(at)))
}

// rememberContact keeps the last contact for the next run.
func (n *Node) rememberContact(ctx context.Context) error {
	f, err := os.OpenFile(filepath.Join(n.raftDir(), contactFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		n.log.Info("the next start will not know when this node last heard of a leader", "error", err)
		return nil // a full disk serves pulls
	}
	defer f.Close()
	for more := true; more; {
		more = sleep(ctx, contactEvery)
		if at := n.LastContact(); !at.IsZero() {
			// One that cannot be written is an old one.
			_, _ = f.WriteAt(encodeContact(n.Now().Add(-time.Since(at))), 0)
		}
	}
	return nil
}
