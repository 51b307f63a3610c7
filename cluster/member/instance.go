package member

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/atomicfile"
	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/raftnet"
)

// logFile is the name of raft's log, its term and its vote, in the directory raft.
const logFile = "log.db"

// instance is raft with its stores and transport.
type instance struct {
	*raft.Raft
	self      raft.ServerID
	layer     *raftnet.Layer
	transport *raftnet.Transport
	store     *kv.Log
	machine   *kv.Machine
	progress  *raftnet.Progress
	notices   *raftnet.Notices
	history   *raftnet.History
	moved     *signal // fires when a follower has stored more

	// gate keeps proposals out of raft's queue once it is stopping: raft never
	// answers what waits in the queue when it ends.
	gate    sync.RWMutex
	stopped bool
}

// open starts raft on the node's directory. It closes what it opened when it
// fails.
func (n *Node) open() (_ *instance, err error) {
	if n.db.Machine() == nil {
		return nil, errors.New("member: the database is not built yet: call DB.Build before Run")
	}
	if err := CheckLog(n.cfg.Dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(n.raftDir(), 0o700); err != nil {
		return nil, fmt.Errorf("making the directory of the log: %w", err)
	}
	log := raftnet.NewLog(n.log)
	store, err := kv.OpenLog(filepath.Join(n.raftDir(), logFile))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			store.Close()
		}
	}()
	snapshots, err := raftnet.NewSnapshots(n.raftDir(), 2, log)
	if err != nil {
		return nil, fmt.Errorf("opening the snapshots: %w", err)
	}
	// Nobody else syncs the names of the log and of the snapshots' directory, and
	// without them a power cut takes all that is synced in them.
	if err := errors.Join(atomicfile.SyncDir(n.raftDir()), atomicfile.SyncDir(n.cfg.Dir)); err != nil {
		return nil, fmt.Errorf("keeping the name of the log: %w", err)
	}
	// Nothing has been voted or acknowledged yet: from here on the log is missed.
	if err := atomicfile.Remove(filepath.Join(n.cfg.Dir, joiningFile)); err != nil {
		return nil, err
	}
	logs := raftnet.NewLogs(n.cfg.Disk.Logs(store), store)
	in := &instance{
		self: raft.ServerID(n.Self()), layer: raftnet.NewLayer(n.cfg.Network, ServiceRaft, n.cfg.Advertise),
		store: store, machine: n.db.Machine(), moved: newSignal(),
	}
	in.progress = raftnet.NewProgress(in.moved.fire)
	in.transport = &raftnet.Transport{Progress: in.progress, NetworkTransport: raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Logger: log, Stream: in.layer, MaxPool: 3, MaxRPCsInFlight: 1, Timeout: n.cfg.Timings.RPC,
	})}
	in.notices = raftnet.NewNotices(in.transport, in.self, raft.ServerAddress(n.cfg.Advertise))
	defer func() {
		if err != nil {
			in.transport.Close()
		}
	}()
	if err := in.machine.CatchUp(store); errors.Is(err, kv.ErrHalted) {
		return nil, err
	} else if err != nil {
		return nil, n.unreadable(err)
	}
	if in.history, err = raftnet.NewHistory(snapshots, logs, in.machine.Position()); errors.Is(err, raftnet.ErrGap) {
		return nil, fmt.Errorf("%w: %w. %s", ErrLogLost, err, wayBack(n.cfg.Dir))
	} else if err != nil {
		return nil, err
	}
	cfg := n.raftConfig(in.history)
	cfg.Logger = log
	stable := n.cfg.Disk.Stable(store)
	if err := n.bootstrap(cfg, logs, stable, snapshots, in.transport); err != nil {
		return nil, err
	}
	if err := in.begin(cfg, logs, stable); err != nil {
		return nil, n.unreadable(err)
	}
	return in, nil
}

// unreadable says what to do when the log or the snapshots cannot be read.
func (n *Node) unreadable(err error) error {
	return fmt.Errorf("starting the consensus: %w. If that is not a passing error of the disk: %s", err, wayBack(n.cfg.Dir))
}

// begin starts raft, which panics on entries of the log that it cannot read.
func (in *instance) begin(cfg *raft.Config, logs raft.LogStore, stable raft.StableStore) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("reading the log: %v", p)
		}
	}()
	in.Raft, err = raft.NewRaft(cfg, raftnet.Machine{Machine: in.machine, Log: in.store}, logs, stable, in.history, in.transport)
	return err
}

func (n *Node) raftConfig(h *raftnet.History) *raft.Config {
	t := n.cfg.Timings
	cfg := raft.DefaultConfig()
	cfg.LocalID = raft.ServerID(n.Self())
	cfg.HeartbeatTimeout, cfg.ElectionTimeout, cfg.LeaderLeaseTimeout = t.Heartbeat, t.Election, t.Lease
	cfg.BatchApplyCh = true
	cfg.MaxAppendEntries = 64
	cfg.ShutdownOnRemove = false
	cfg.TrailingLogs = n.cfg.Snapshots.TrailingLogs
	cfg.NoLegacyTelemetry = true
	// Snapshots are triggered by the size of the log, not by its entries.
	cfg.SnapshotInterval, cfg.SnapshotThreshold = 24*time.Hour, math.MaxUint64
	cfg.NoSnapshotRestoreOnStart = h.Held
	cfg.RestoreCommittedLogs = true // raftnet.Logs says what of it is used
	return cfg
}

// bootstrap writes the first configuration of a new site, once. A node that
// joined gets its configuration from the leader.
func (n *Node) bootstrap(cfg *raft.Config, logs raft.LogStore, stable raft.StableStore, snapshots raft.SnapshotStore, trans raft.Transport) error {
	if _, err := os.Stat(filepath.Join(n.cfg.Dir, foundingFile)); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("looking for a site to found: %w", err)
	}
	n.founding.Store(true)
	last, err := logs.LastIndex()
	if err != nil {
		return fmt.Errorf("looking for the beginning of the log: %w", err)
	}
	taken, err := snapshots.List()
	if err != nil || last > 0 || len(taken) > 0 {
		return err
	}
	// Raft writes the first term, then the first entry. Between the two a power cut
	// leaves a log that belongs to nobody and that raft would not begin again.
	// Without an entry nobody has a vote yet, so no vote is forgotten.
	if err := stable.SetUint64([]byte("CurrentTerm"), 0); err != nil {
		return fmt.Errorf("beginning the log: %w", err)
	}
	first := raft.Configuration{Servers: []raft.Server{{
		Suffrage: raft.Voter, ID: cfg.LocalID, Address: raft.ServerAddress(n.cfg.Advertise),
	}}}
	if err := raft.BootstrapCluster(cfg, logs, stable, snapshots, trans, first); err != nil {
		return fmt.Errorf("founding the site: %w", err)
	}
	return nil
}

// unconfirmed is how many entries of the log nobody has told this node to be committed.
func (in *instance) unconfirmed() uint64 {
	known := max(in.CommitIndex(), in.AppliedIndex(), in.machine.Applied())
	return max(in.LastIndex(), known) - known
}

// servers is raft's newest configuration, committed or not.
func (in *instance) servers() []raft.Server {
	return in.GetConfiguration().Configuration().Servers
}

// loneVoter reports whether this node alone decides what is committed.
func (in *instance) loneVoter() bool {
	voters, self := 0, false
	for _, s := range in.servers() {
		if s.Suffrage == raft.Voter {
			voters++
			self = self || s.ID == in.self
		}
	}
	return voters == 1 && self
}

// elect lets a lone voter lead at once instead of after a heartbeat timeout:
// nobody can object. It is the message by which a leader hands over, sent by
// the node to itself.
func (in *instance) elect(addr string) error {
	return in.transport.TimeoutNow(in.self, raft.ServerAddress(addr), &raft.TimeoutNowRequest{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(in.self), Addr: []byte(addr)},
	}, &raft.TimeoutNowResponse{})
}

// voterStep parts the moments at which the followers of a silent leader stand for
// election, as a share of the heartbeat timeout. A leader that is well is heard of once
// in a tenth to a fifth of it: with a step of a fifth those moments keep their order,
// and two that stand at the same moment, who would take the votes from each other, are
// rare.
const voterStep = 5

// noticeSilence makes raft stand for election as soon as its leader has been silent for
// the heartbeat timeout. Raft looks by itself at random moments, one or two timeouts
// apart, so it notices up to two late; and who has not noticed refuses its vote, so the
// slowest of those that are needed decides. The lease is half as long: a leader that
// was silent for so long to a majority has stepped down, whether it lives or not.
func (n *Node) noticeSilence(ctx context.Context, in *instance) error {
	patience := n.cfg.Timings.Heartbeat
	often := patience / 4 // who leads changes, and with it whose turn it is
	heard := time.Now()   // a node that has just started waits as one that has just heard
	for {
		if at := in.LastContact(); at.After(heard) {
			heard = at
		}
		wait := often
		if in.State() == raft.Follower {
			wait = time.Until(heard.Add(patience + time.Duration(in.turn())*patience/voterStep))
			if wait <= 0 {
				if err := in.lookAtContact(); err != nil {
					n.log.Warn("a silent leader is noticed late", "error", err)
				}
				heard, wait = time.Now(), often
			}
		}
		if !sleep(ctx, min(wait, often)) {
			return nil
		}
	}
}

// turn is the place of this node among the voters that are left without the leader.
func (in *instance) turn() (before int) {
	_, leader := in.LeaderWithID()
	for _, s := range in.servers() {
		if s.Suffrage == raft.Voter && s.ID != leader && s.ID < in.self {
			before++
		}
	}
	return before
}

// lookAtContact makes raft look now when it last heard of its leader: it does so when it
// is told of a shorter heartbeat timeout, which is the only way there is.
func (in *instance) lookAtContact() error {
	is := in.ReloadableConfig()
	shorter := is
	shorter.HeartbeatTimeout--
	return errors.Join(in.ReloadConfig(shorter), in.ReloadConfig(is))
}

// stop ends raft and closes its files.
func (in *instance) stop(n *Node) {
	n.cfg.Disk.Stop()
	in.halt(n)
	if err := in.store.Close(); err != nil {
		n.log.Warn("closing the log", "error", err)
	}
}

// halt ends raft, once: leadership is handed over first, so that writes
// elsewhere do not wait for a timeout; not by a node that is fenced.
func (in *instance) halt(n *Node) {
	in.gate.Lock()
	before := in.stopped
	in.stopped = true
	in.gate.Unlock()
	if before {
		return
	}
	patience := n.cfg.Timings.Election
	if in.State() == raft.Leader && in.otherVoters() && n.cfg.Epoch.Err() == nil {
		if err := within(patience+time.Second, in.LeadershipTransfer().Error); err != nil {
			n.log.Info("the leadership was not handed over; the others elect a leader after a timeout", "error", err)
		}
	}
	// Raft does not answer what is in its queue when it ends. The gate lets
	// nothing more in, and when this barrier is answered the queue is empty.
	_ = within(n.cfg.Timings.Lease*2, in.Barrier(n.cfg.Timings.Lease).Error)
	ended := in.Shutdown()
	in.layer.Close() // cuts messages that raft would wait for
	if err := ended.Error(); err != nil {
		n.log.Warn("stopping the consensus", "error", err)
	}
	in.notices.Wait()
}

func (in *instance) otherVoters() bool {
	for _, s := range in.servers() {
		if s.Suffrage == raft.Voter && s.ID != in.self {
			return true
		}
	}
	return false
}

// within waits for an answer that may never come.
func within(d time.Duration, answer func() error) error {
	done := make(chan error, 1)
	go func() { done <- answer() }()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case err := <-done:
		return err
	case <-t.C:
		return fmt.Errorf("no answer in %v", d)
	}
}

// snapshotShare is how much log there may be since the last snapshot, as a part
// of the state. A snapshot is compressed to half as much, so that each byte of
// the log costs half of one to be forgotten.
const snapshotShare = 2

// snapshotMost is how much log in bytes there may be in any case: it takes disk,
// and a start that cannot begin behind the state reads all of it.
const snapshotMost = 256 << 20

// snapshotWhenDue takes a snapshot whenever the log since the last one
// outweighs its share of the state, or would make a start slow.
func (n *Node) snapshotWhenDue(ctx context.Context, in *instance) error {
	for sleep(ctx, n.cfg.Timings.Ping) {
		logged, wanted := in.machine.Logged(), in.history.Wanted()
		due := n.cfg.Snapshots.MinBytes
		if !n.cfg.Snapshots.Eager {
			due = max(due, min(in.machine.Size()/snapshotShare, snapshotMost))
		}
		if logged < due && !wanted {
			continue
		}
		start := time.Now()
		err := in.Snapshot().Error()
		switch {
		case errors.Is(err, raft.ErrNothingNewToSnapshot), errors.Is(err, raft.ErrRaftShutdown):
		case err != nil:
			n.log.Warn("a snapshot of the state was not taken; the log grows until one is", "error", err)
		default:
			in.history.Taken()
			in.machine.Saved(logged)
			n.log.Debug("took a snapshot of the state", "log_bytes", logged, "took", time.Since(start))
		}
	}
	return nil
}
