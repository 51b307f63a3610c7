package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/atoll-registry/atoll/cluster/kv"
)

// rawRaft is the floor of the cluster's rows: raft with the log store of a node and
// the transactions of its pushes, over plain TCP, and a state machine that does
// nothing. Its nodes share this process, as those that it is compared with do.
type rawRaft struct {
	nodes  []*raft.Raft
	stores []io.Closer
	leader *raft.Raft
}

// machineIn makes the state machine of a raft in a directory.
type machineIn func(home string) (raft.FSM, io.Closer, error)

// idleMachine does nothing.
func idleMachine(string) (raft.FSM, io.Closer, error) { return nothing{}, nil, nil }

// stateMachine is that of a node.
func stateMachine(home string) (raft.FSM, io.Closer, error) {
	bolt, err := kv.OpenBolt(filepath.Join(home, "meta.db"))
	if err != nil {
		return nil, nil, err
	}
	engine := kv.WriteBehind(bolt)
	machine, err := kv.NewMachine(engine, kv.Hooks{})
	return machine, engine, err
}

// nothing is the state machine.
type nothing struct{}

func (nothing) Apply(*raft.Log) any { return nil }
func (nothing) Snapshot() (raft.FSMSnapshot, error) {
	return nil, errors.New("there is nothing to keep")
}
func (nothing) Restore(r io.ReadCloser) error     { return r.Close() }
func (nothing) ApplyBatch(logs []*raft.Log) []any { return make([]any, len(logs)) }
func (r *rawRaft) commit(payload []byte) error    { return r.leader.Apply(payload, time.Minute).Error() }

// startRaw starts so many nodes and waits for their leader.
func startRaw(dir string, count int, machine machineIn) (r *rawRaft, err error) {
	r = &rawRaft{}
	defer func() {
		if err != nil {
			r.stop()
		}
	}()
	var servers []raft.Server
	for i := range count {
		home := filepath.Join(dir, fmt.Sprintf("raw%d-%d", count, i))
		if err := os.MkdirAll(home, 0o700); err != nil {
			return r, err
		}
		log := hclog.NewNullLogger()
		store, err := kv.OpenLog(filepath.Join(home, "log.db"))
		if err != nil {
			return r, err
		}
		r.stores = append(r.stores, store)
		fsm, state, err := machine(home)
		if state != nil {
			r.stores = append(r.stores, state)
		}
		if err != nil {
			return r, err
		}
		transport, err := raft.NewTCPTransportWithLogger("127.0.0.1:0", nil, 3, 10*time.Second, log)
		if err != nil {
			return r, err
		}
		cfg := raft.DefaultConfig()
		cfg.LocalID, cfg.Logger, cfg.BatchApplyCh = raft.ServerID(fmt.Sprint(i)), log, true
		cached, err := raft.NewLogCache(128, store)
		if err != nil {
			return r, err
		}
		node, err := raft.NewRaft(cfg, fsm, cached, store, raft.NewDiscardSnapshotStore(), transport)
		if err != nil {
			return r, err
		}
		r.nodes = append(r.nodes, node)
		servers = append(servers, raft.Server{ID: cfg.LocalID, Address: transport.LocalAddr()})
	}
	if err := r.nodes[0].BootstrapCluster(raft.Configuration{Servers: servers}).Error(); err != nil {
		return r, err
	}
	for range 300 {
		for _, node := range r.nodes {
			if node.State() == raft.Leader {
				r.leader = node
				return r, nil
			}
		}
		<-time.After(100 * time.Millisecond)
	}
	return r, errors.New("raw raft elects no leader")
}

func (r *rawRaft) stop() {
	for _, node := range r.nodes {
		_ = node.Shutdown().Error() // the run is over
	}
	for _, store := range r.stores {
		store.Close()
	}
}
