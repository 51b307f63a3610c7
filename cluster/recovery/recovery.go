// Package recovery works on the data directory of a node that does not run: it
// makes one survivor, or a backup, a whole site of one node, saves what a fenced
// node alone has, and wipes a directory.
//
// What always holds:
//   - A new state is built beside the old one and put in its place by renames
//     that a plan names. Before the plan is on disk the directory is as it was;
//     from then on the work can only be finished, by the same command again, and
//     no node starts in between.
//   - Nothing is deleted but what was built here: the old state stays in a
//     directory of its own.
//   - Whatever is made begins a recovery epoch, signed by the site's authority.
package recovery

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/atomicfile"
	"github.com/atoll-registry/atoll/cluster/epoch"
	"github.com/atoll-registry/atoll/cluster/kv"
	"github.com/atoll-registry/atoll/cluster/member"
	"github.com/atoll-registry/atoll/cluster/raftnet"
	"github.com/atoll-registry/atoll/cluster/table"
)

// What a node keeps of its state in the data directory.
const (
	stateFile = "meta.db"
	raftDir   = "raft"
	logFile   = "log.db" // in raftDir

	planFile  = "recovering.json"
	buildDir  = "recovering"
	keptDir   = "before-recovery-%d" // by epoch
	planForm  = 1
	markForm  = "a recovery or restore of %s was cut short: run the same command again, it goes on where it was"
	snapshots = 2 // how many raft keeps
)

// Prepare changes the state of the layers above. It defines their tables on a
// database that is not built yet and gives what changes their rows afterwards.
// The function may run more than once, on different databases.
type Prepare func(db *table.DB, offline *member.Offline) (func(context.Context) error, error)

// plan is what is to be put in place. Its existence means that all of it is
// built and durable.
type plan struct {
	Form  int      `json:"form"`
	Kept  string   `json:"kept"`  // directory for what was there; "" when nothing was
	Names []string `json:"names"` // in buildDir, in this order
	Epoch string   `json:"epoch"`
	For   string   `json:"for"` // which work this is
}

// Pending reports whether work on the directory was cut short after it could
// no longer be dropped. A node must not start on it.
func Pending(dir string) error {
	if _, err := os.Stat(filepath.Join(dir, planFile)); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	return fmt.Errorf(markForm, dir)
}

// Dirs are the directories in which files of a node with keys are: the data
// directory, and where those are built that are to take their places.
func Dirs(dir string) []string {
	if Pending(dir) == nil {
		return []string{dir}
	}
	return []string{dir, filepath.Join(dir, buildDir)}
}

// builder makes the state of a site of one node in buildDir.
type builder struct {
	dir     string // the data directory
	log     *slog.Logger
	prepare Prepare
	step    func(name string) error // between what a crash can fall between; may be nil

	engine kv.Engine
	last   uint64 // index of the newest entry in the state
	term   uint64 // the newest that the state's log knows
}

func (b *builder) path(names ...string) string {
	return filepath.Join(append([]string{b.dir, buildDir}, names...)...)
}

// begin makes the directory and an empty state in it.
func (b *builder) begin() (err error) {
	if err := os.RemoveAll(b.path()); err != nil {
		return fmt.Errorf("clearing what an earlier try left: %w", err)
	}
	if err := os.MkdirAll(b.path(raftDir), 0o700); err != nil {
		return fmt.Errorf("making a directory for the new state: %w", err)
	}
	b.engine, err = kv.OpenBolt(b.path(stateFile))
	return err
}

func (b *builder) close() {
	if b.engine != nil {
		b.engine.Close()
		b.engine = nil
	}
}

// load fills the state from a snapshot of kv.
func (b *builder) load(source io.Reader) error {
	machine, err := kv.NewMachine(b.engine, kv.Hooks{})
	if err != nil {
		return err
	}
	if err := machine.Restore(io.NopCloser(source)); err != nil {
		return err
	}
	b.last = machine.Applied()
	return nil
}

// change opens the state as a database with the rows of the members and those
// of the layers above, and lets fn change it.
func (b *builder) change(ctx context.Context, clusterKey []byte, fn func(ctx context.Context, offline *member.Offline) error) error {
	db := table.New(b.engine, b.log)
	offline := member.NewOffline(db, clusterKey)
	above := func(context.Context) error { return nil }
	if b.prepare != nil {
		var err error
		if above, err = b.prepare(db, offline); err != nil {
			return err
		}
	}
	if err := db.Build(ctx); err != nil {
		return err
	}
	alone := &alone{machine: db.Machine(), next: b.last + 1, term: b.term + 1}
	db.Attach(alone)
	if err := fn(ctx, offline); err != nil {
		return err
	}
	if err := above(ctx); err != nil {
		return err
	}
	b.last = alone.next - 1
	return nil
}

// consensus writes raft's files: a snapshot of the state and a configuration of
// this node alone, as if the log had been cut to its last entry.
func (b *builder) consensus(id, addr string) (err error) {
	log := raftnet.NewLog(b.log)
	store, err := raftnet.NewSnapshots(b.path(raftDir), snapshots, log)
	if err != nil {
		return fmt.Errorf("making the new snapshots: %w", err)
	}
	machine, err := kv.NewMachine(b.engine, kv.Hooks{})
	if err != nil {
		return err
	}
	// The configuration is an entry too: the state remembers the newest that it
	// has passed, and raft is told of that one at a start (kv.Position).
	term := b.term + 1
	alone := raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter, ID: raft.ServerID(id), Address: raft.ServerAddress(addr)}}}
	b.last++
	last := &raft.Log{Index: b.last, Term: term, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(alone)}
	machine.ApplyBatch([]*raft.Log{last})
	if machine.Applied() != b.last {
		return errors.Join(errors.New("the new state did not take its configuration"), machine.Err())
	}
	state, err := machine.Snapshot()
	if err != nil {
		return err
	}
	defer state.Release()
	_, encoder := raft.NewInmemTransport("")
	sink, err := store.Create(raft.SnapshotVersionMax, b.last, term, alone, b.last, encoder)
	if err != nil {
		return fmt.Errorf("making the new snapshot: %w", err)
	}
	if err := state.Persist(sink); err != nil {
		return err
	}
	logs, err := kv.OpenLog(b.path(raftDir, logFile))
	if err != nil {
		return fmt.Errorf("making the new log: %w", err)
	}
	// The log holds the entry at which the snapshot ends: a node that was sent the
	// snapshot is told of the entry before the next one.
	return errors.Join(logs.StoreLog(last), logs.SetUint64([]byte("CurrentTerm"), term), logs.Close(), atomicfile.SyncDir(b.path(raftDir)))
}

// commit writes the plan and carries it out.
func (b *builder) commit(p plan) error {
	b.close()
	if err := b.at("built"); err != nil {
		return err
	}
	if err := errors.Join(atomicfile.SyncDir(b.path()), atomicfile.SyncDir(b.dir)); err != nil {
		return err
	}
	p.Form = planForm
	if err := atomicfile.WriteJSON(filepath.Join(b.dir, planFile), p); err != nil {
		return fmt.Errorf("writing down what is to be put in place: %w", err)
	}
	return finish(b.dir, p, b.at)
}

func (b *builder) at(name string) error {
	if b.step == nil {
		return nil
	}
	return b.step(name)
}

// finish carries out a plan. Every step may have been taken before.
func finish(dir string, p plan, at func(string) error) error {
	if p.Form != planForm {
		return fmt.Errorf("%s was begun by another version of Atoll (form %d, this one has %d): go on with that one", filepath.Join(dir, planFile), p.Form, planForm)
	}
	if err := at("planned"); err != nil {
		return err
	}
	if p.Kept != "" {
		if err := os.MkdirAll(filepath.Join(dir, p.Kept), 0o700); err != nil {
			return fmt.Errorf("making a directory for the old state: %w", err)
		}
	}
	for _, name := range p.Names {
		if err := replace(dir, p.Kept, name, at); err != nil {
			return fmt.Errorf("putting %s in place: %w", name, err)
		}
	}
	if err := os.RemoveAll(filepath.Join(dir, buildDir)); err != nil {
		return err
	}
	if err := at("placed"); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, planFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return atomicfile.SyncDir(dir)
}

// replace puts one new file or directory in place of the old one, which it
// keeps. As long as the new one is where it was built the work is not done.
func replace(dir, kept, name string, at func(string) error) error {
	fresh, here := filepath.Join(dir, buildDir, name), filepath.Join(dir, name)
	if _, err := os.Lstat(fresh); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if _, err := os.Lstat(here); err == nil && kept != "" {
		if err := os.Rename(here, filepath.Join(dir, kept, name)); err != nil {
			return err
		}
		if err := errors.Join(atomicfile.SyncDir(filepath.Join(dir, kept)), atomicfile.SyncDir(dir), at("kept "+name)); err != nil {
			return err
		}
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(fresh, here); err != nil {
		return err
	}
	return errors.Join(atomicfile.SyncDir(dir), at("placed "+name))
}

// pendingPlan reads the plan of work that was cut short.
func pendingPlan(dir string) (p plan, ok bool, err error) {
	b, err := os.ReadFile(filepath.Join(dir, planFile))
	if errors.Is(err, fs.ErrNotExist) {
		return plan{}, false, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &p)
	}
	return p, err == nil, err
}

// alone is the way to a leader that there is no need for: it applies at once.
type alone struct {
	machine    *kv.Machine
	next, term uint64
}

var _ table.Backend = (*alone)(nil)

// Propose implements table.Backend.
func (a *alone) Propose(ctx context.Context, txn []byte) (kv.Result, error) {
	if err := ctx.Err(); err != nil {
		return kv.Result{}, err
	}
	if _, err := kv.DecodeTxn(txn); err != nil {
		return kv.Result{}, err
	}
	answer := a.machine.Apply(&raft.Log{Type: raft.LogCommand, Index: a.next, Term: a.term, Data: txn})
	a.next++
	switch r := answer.(type) {
	case kv.Result:
		return r, nil
	case error:
		return kv.Result{}, r
	}
	return kv.Result{}, fmt.Errorf("the state machine answered %T", answer)
}

// ReadIndex implements table.Backend.
func (a *alone) ReadIndex(context.Context) (uint64, error) { return a.machine.Applied(), nil }

// newEpoch begins the epoch after one, signed by the site's authority.
func newEpoch(site string, parent epoch.Epoch, offline *member.Offline, point func(*epoch.Epoch)) (epoch.Epoch, error) {
	authority, err := offline.Authority()
	if err != nil {
		return epoch.Epoch{}, fmt.Errorf("opening the site's authority, which signs the recovery epoch: %w", err)
	}
	next := parent.Next(table.NewID(), time.Now())
	point(&next)
	return next.Sign(site, authority.Signer())
}
