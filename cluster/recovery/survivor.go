package recovery

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/keyring"
	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/pki"
	"github.com/atoll-registry/atoll/cluster/raftnet"
)

// Survivor asks to make a node, alone, the whole of its site.
type Survivor struct {
	Dir  string        // of the node, which the caller has locked
	Keys *keyring.Ring // opens and seals the files that hold keys; nil: they are plain
	// Answers reports whether the node at addr is up and proves to be id. It is
	// called for all others at once.
	Answers func(ctx context.Context, addr, id string) bool
	Prepare Prepare // may be nil
	// ClusterKey opens the site's secrets where the node cannot, because it has no
	// vote: the content of the file cluster.key of one that has; else nil.
	ClusterKey []byte
	Log        *slog.Logger

	// Step is called between the steps of the work; its error ends it there, as a
	// crash would. For tests; nil otherwise.
	Step func(name string) error
}

// Recovered says what became of a site.
type Recovered struct {
	Site, Node string
	Epoch      epoch.Epoch
	Kept       string   // where the old state is, in the data directory
	Left       []string // names of the members that the site goes on without
	Resumed    bool     // an earlier try was brought to its end
}

// Refusals of Recover and Salvage.
var (
	// ErrNotNeeded: the node can lead without help.
	ErrNotNeeded = errors.New("this site needs no recovery")
	// ErrNotFenced: there is nothing to salvage, as far as the node knows.
	ErrNotFenced = errors.New("this node is not fenced")
	// ErrAnswers: a node of the old site is up.
	ErrAnswers = errors.New("a node of the site answers")
	// ErrNoKey: the node does not hold the cluster key, and none was given.
	ErrNoKey = errors.New("this node had no vote, so it does not hold the cluster key, without which the site's CA and signing keys cannot be opened")
)

// Recover makes the survivor a site of its own. What its log holds counts as
// committed. It refuses with ErrNotNeeded or ErrAnswers when the others are not
// gone, and with epoch.ErrFenced when the site was recovered elsewhere.
func Recover(ctx context.Context, s Survivor) (Recovered, error) {
	id, err := member.LoadIdentity(s.Dir, s.Keys)
	if err != nil {
		return Recovered{}, err
	}
	out := Recovered{Site: id.SiteID, Node: id.NodeID}
	b := &builder{dir: s.Dir, log: s.Log, prepare: s.Prepare, step: s.Step}
	if p, pending, err := pendingPlan(s.Dir); err != nil {
		return out, err
	} else if pending {
		if out.Epoch, err = epoch.Parse(p.Epoch); err != nil {
			return out, err
		}
		out.Kept, out.Resumed = p.Kept, true
		return out, finish(s.Dir, p, b.at)
	}
	guard, err := epoch.Open(s.Dir, id.SiteID, id.Authorities(), s.Log)
	if err != nil {
		return out, err
	}
	if err := guard.Err(); err != nil {
		return out, err
	}
	old, err := openOld(s.Dir, s.Log)
	if err != nil {
		return out, err
	}
	defer old.close()
	if err := s.refuse(ctx, id, old); err != nil {
		return out, err
	}
	key, given := id.ClusterKey, len(id.ClusterKey) == 0
	if given {
		if key = s.ClusterKey; len(key) == 0 || len(key)%pki.ClusterKeySize != 0 {
			return out, fmt.Errorf("%w. Recover a node that voted instead; or give the file cluster.key of one with --cluster-key FILE, from its disk; or restore a backup (atoll restore); or, when all of these are lost, make a new site of this node's blobs (atoll rebuild)", ErrNoKey)
		}
	}
	if err := b.begin(); err != nil {
		return out, err
	}
	defer b.close()
	if err := old.copyTo(b); err != nil {
		return out, err
	}
	if err := b.at("copied"); err != nil {
		return out, err
	}
	var self member.Member
	err = b.change(ctx, key, func(ctx context.Context, offline *member.Offline) error {
		members, err := offline.Members()
		if err != nil {
			return err
		}
		for _, m := range members {
			if m.ID == id.NodeID {
				self = m
			} else {
				out.Left = append(out.Left, m.Name)
			}
		}
		if self.ID == "" {
			return fmt.Errorf("node %s is no member of its site as far as its own state says: it was removed, or has not caught up since it joined; recover another node", id.NodeID)
		}
		if out.Epoch, err = newEpoch(id.SiteID, guard.Epoch(), offline, func(e *epoch.Epoch) { e.Index, e.Term = old.point, old.pointTerm }); err != nil {
			return err
		}
		return offline.Alone(ctx, self, out.Epoch)
	})
	if err != nil {
		return out, err
	}
	if err := b.consensus(self.ID, self.Addr); err != nil {
		return out, err
	}
	if err := epoch.Save(b.path(), out.Epoch); err != nil {
		return out, err
	}
	names := []string{stateFile, raftDir, epoch.File}
	if given {
		if err := s.Keys.Write(b.path(member.ClusterKeyFile), key); err != nil {
			return out, err
		}
		names = append(names, member.ClusterKeyFile)
	}
	old.close()
	out.Kept = fmt.Sprintf(keptDir, out.Epoch.Number)
	return out, b.commit(plan{Kept: out.Kept, Names: names, Epoch: out.Epoch.Wire(), For: "recover"})
}

// patience bounds how long the other nodes may take to answer.
const patience = 10 * time.Second

// refuse names the reason why the site must not be recovered here.
func (s Survivor) refuse(ctx context.Context, id member.Identity, old *oldState) error {
	voters, self := 0, false
	for _, v := range old.servers {
		if v.Suffrage == raft.Voter {
			voters++
			self = self || string(v.ID) == id.NodeID
		}
	}
	switch {
	case len(old.servers) == 0:
		return fmt.Errorf("the log of %s names no voters: the node never took part in its site; join it anew", s.Dir)
	case voters == 1 && self:
		return fmt.Errorf("%w: this node is its only voter; start it", ErrNotNeeded)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var mu sync.Mutex
	var asked sync.WaitGroup
	var up []string
	for _, v := range old.servers {
		if string(v.ID) == id.NodeID || v.Suffrage != raft.Voter {
			continue
		}
		asked.Go(func() {
			if s.Answers(ctx, string(v.Address), string(v.ID)) {
				mu.Lock()
				defer mu.Unlock()
				up = append(up, fmt.Sprintf("%s at %s", v.ID, v.Address))
			}
		})
	}
	asked.Wait()
	if len(up) > 0 {
		return fmt.Errorf("%w: %s. When enough voters can be started, start them and this node: nothing is lost then. Recover only when they are gone for good, with all others stopped", ErrAnswers, strings.Join(up, ", "))
	}
	return ctx.Err()
}

// oldState is what a stopped node's directory holds.
type oldState struct {
	engine    kv.Engine
	log       *kv.Log
	snapshots *raft.FileSnapshotStore
	newest    *raft.SnapshotMeta // nil: none
	servers   []raft.Server
	applied   uint64
	first     uint64 // entries of the log, 0 and 0 for none
	last      uint64
	lastTerm  uint64 // of the last entry, or the newest snapshot
	term      uint64 // the newest that the node has heard of
	// point and pointTerm are of the last entry that says something. Behind it may
	// be what a leader writes to open its term, which the others need not have.
	point, pointTerm uint64
}

func openOld(dir string, log *slog.Logger) (o *oldState, err error) {
	for _, name := range []string{stateFile, filepath.Join(raftDir, logFile)} {
		if _, err := os.Stat(filepath.Join(dir, name)); errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%s has no %s: its metadata is gone; see atoll restore and atoll rebuild", dir, name)
		} else if err != nil {
			return nil, err
		}
	}
	o = &oldState{}
	opened := o
	defer func() {
		if err != nil {
			opened.close()
		}
	}()
	if o.engine, err = kv.OpenBolt(filepath.Join(dir, stateFile)); err != nil {
		return nil, err
	}
	if err := o.engine.Read(func(c kv.Content) error { o.applied = kv.Applied(c); return nil }); err != nil {
		return nil, err
	}
	if o.log, err = kv.OpenLog(filepath.Join(dir, raftDir, logFile)); err != nil {
		return nil, err
	}
	if o.snapshots, err = raft.NewFileSnapshotStoreWithLogger(filepath.Join(dir, raftDir), snapshots, raftnet.NewLog(log)); err != nil {
		return nil, fmt.Errorf("opening the snapshots: %w", err)
	}
	list, err := o.snapshots.List()
	if err != nil {
		return nil, fmt.Errorf("listing the snapshots: %w", err)
	}
	if len(list) > 0 {
		o.newest = list[0]
		o.servers, o.lastTerm = o.newest.Configuration.Servers, o.newest.Term
		o.point, o.pointTerm = o.newest.Index, o.newest.Term
	}
	if o.term, err = o.log.GetUint64([]byte("CurrentTerm")); err != nil && !errors.Is(err, kv.ErrNotFound) {
		return nil, fmt.Errorf("reading the term: %w", err)
	}
	return o, o.readLog()
}

// readLog finds the newest configuration in the log.
func (o *oldState) readLog() (err error) {
	if o.first, err = o.log.FirstIndex(); err != nil {
		return fmt.Errorf("reading the log: %w", err)
	}
	if o.last, err = o.log.LastIndex(); err != nil {
		return fmt.Errorf("reading the log: %w", err)
	}
	return o.entries(o.first, func(l *raft.Log) error {
		if l.Type == raft.LogConfiguration && (o.newest == nil || l.Index > o.newest.ConfigurationIndex) {
			o.servers = raft.DecodeConfiguration(l.Data).Servers
		}
		o.lastTerm = max(o.lastTerm, l.Term)
		if l.Index > o.point && says(l) {
			o.point, o.pointTerm = l.Index, l.Term
		}
		return nil
	})
}

// says reports whether an entry changes anything.
func says(l *raft.Log) bool {
	if l.Type != raft.LogCommand {
		return l.Type == raft.LogConfiguration
	}
	t, err := kv.DecodeTxn(l.Data)
	return err != nil || len(t.Ops) > 0
}

// entries reads the log from an index on.
func (o *oldState) entries(from uint64, fn func(*raft.Log) error) error {
	if o.last == 0 {
		return nil
	}
	for index := max(from, o.first); index <= o.last; index++ {
		var l raft.Log
		if err := o.log.GetLog(index, &l); err != nil {
			return fmt.Errorf("reading entry %d of the log: %w", index, err)
		}
		if err := fn(&l); err != nil {
			return err
		}
	}
	return nil
}

// copyTo makes the new state: the old one, and all that the log has beyond it.
func (o *oldState) copyTo(b *builder) error {
	if o.newest != nil && o.newest.Index > o.applied {
		// The node died between storing a snapshot and restoring it.
		_, source, err := o.snapshots.Open(o.newest.ID)
		if err != nil {
			return fmt.Errorf("opening the newest snapshot: %w", err)
		}
		defer source.Close()
		if err := b.load(source); err != nil {
			return err
		}
		b.last = max(b.last, o.newest.Index)
	} else if err := o.copyEngine(b); err != nil {
		return err
	}
	b.term = max(o.term, o.lastTerm)
	if o.last > b.last && o.first > b.last+1 {
		return fmt.Errorf("the log begins at entry %d and the state ends at %d: what lies between is missing; recover another node, or restore a backup", o.first, b.last)
	}
	machine, err := kv.NewMachine(b.engine, kv.Hooks{})
	if err != nil {
		return err
	}
	const batch = 64
	var logs []*raft.Log
	flush := func() error {
		if len(logs) > 0 {
			machine.ApplyBatch(logs)
			b.last = logs[len(logs)-1].Index
			logs = nil
		}
		return machine.Err()
	}
	err = o.entries(b.last+1, func(l *raft.Log) error {
		if logs = append(logs, l); len(logs) < batch {
			return nil
		}
		return flush()
	})
	return errors.Join(err, flush())
}

func (o *oldState) copyEngine(b *builder) error {
	state, err := o.engine.Open()
	if err != nil {
		return err
	}
	defer state.Release()
	read, write := io.Pipe()
	var copying sync.WaitGroup
	copying.Go(func() { write.CloseWithError(kv.WriteSnapshot(write, state)) })
	err = b.load(read)
	read.CloseWithError(errors.Join(err, io.ErrClosedPipe)) // ends the writer
	copying.Wait()
	return err
}

func (o *oldState) close() {
	if o.log != nil {
		o.log.Close()
	}
	if o.engine != nil {
		o.engine.Close()
	}
	o.log, o.engine = nil, nil
}

// termAt is the term of an entry; 0 when the log does not have it any more.
func (o *oldState) termAt(index uint64) uint64 {
	var l raft.Log
	if index < o.first || index > o.last || index == math.MaxUint64 || o.log.GetLog(index, &l) != nil {
		return 0
	}
	return l.Term
}
